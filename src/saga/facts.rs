//! What expressions are evaluated with, extracted from an instance's state.

use serde_json::{Map, Value};

use crate::domain::saga::{
    expression::Scope,
    state::{At, Failure, Json, Place, State},
    tree::{NodeId, Tree},
};

/// What expressions may refer to.
#[derive(Debug)]
pub(super) struct Facts {
    input: Json,
    /// Of the steps that are read, as far as there are any.
    replies: Vec<(NodeId, Reply)>,
    item: Option<Json>,
    failure: Value,
}

#[derive(Debug)]
enum Reply {
    One(Json),
    /// Of a step in a `forEach`, as seen from outside: by item, `null` where there is none.
    List(Vec<Option<Json>>),
}

impl Facts {
    /// `place` is where they are used, `reads` the steps that are read.
    pub(super) fn of(tree: &Tree, state: &State, place: Option<Place>, reads: &[NodeId]) -> Self {
        let each_of = |node: NodeId| tree.node(node).and_then(|node| node.each);
        let here = place.and_then(|place| each_of(place.node));
        let item = place.and_then(|place| place.item);
        let reply = |node: NodeId| match each_of(node) {
            None => state.reply(Place { node, item: None }).cloned().map(Reply::One),
            each if each == here => state.reply(Place { node, item }).cloned().map(Reply::One),
            Some(each) => state.items(each).map(|items| {
                let items = 0..u32::try_from(items.len()).unwrap_or(u32::MAX);
                Reply::List(items.map(|item| state.reply(Place { node, item: Some(item) }).cloned()).collect())
            }),
        };
        let replies = reads.iter().filter_map(|node| Some((*node, reply(*node)?))).collect();
        let item = here.zip(item).and_then(|(each, item)| state.items(each)?.get(item as usize).cloned());
        let failure =
            state.failure.as_ref().and_then(|failure| serde_json::to_value(failure).ok()).unwrap_or(Value::Null);
        Self { input: state.input.clone(), replies, item, failure }
    }

    /// Before the first step.
    pub(super) fn of_input(input: Json) -> Self {
        Self { input, replies: Vec::new(), item: None, failure: Value::Null }
    }

    /// Length of the JSON.
    pub(super) fn length(&self) -> usize {
        let replies = self.replies.iter().map(|(_, reply)| match reply {
            Reply::One(reply) => reply.as_str().len(),
            Reply::List(replies) => replies.iter().flatten().map(|reply| reply.as_str().len()).sum(),
        });
        self.input.as_str().len() + replies.sum::<usize>()
    }

    /// `named`: the steps that expressions name; those without a reply are there, so that `has(steps.NAME.reply)` works.
    pub(super) fn values(&self, tree: &Tree, named: impl Iterator<Item = NodeId>) -> Result<Values, String> {
        let name = |node: NodeId| tree.node(node).map_or_else(String::new, |node| node.name.clone());
        let mut steps = Map::new();
        for node in named {
            steps.insert(name(node), Value::Object(Map::new()));
        }
        for (node, reply) in &self.replies {
            let reply = match reply {
                Reply::One(reply) => parse(reply)?,
                Reply::List(replies) => {
                    let replies = replies.iter().map(|reply| reply.as_ref().map_or(Ok(Value::Null), parse));
                    Value::Array(replies.collect::<Result<_, _>>()?)
                }
            };
            let members = Map::from_iter([("reply".to_owned(), reply)]);
            steps.insert(name(*node), Value::Object(members));
        }
        let failure = if self.failure.is_null() { some_failure() } else { self.failure.clone() };
        let item = self.item.as_ref().map(parse).transpose()?;
        Ok(Values { input: parse(&self.input)?, steps: Value::Object(steps), item, failure })
    }
}

fn parse(json: &Json) -> Result<Value, String> {
    serde_json::from_str(json.as_str()).map_err(|error| format!("reading the recorded values: {error}"))
}

#[derive(Debug)]
pub(super) struct Values {
    pub input: Value,
    steps: Value,
    item: Option<Value>,
    /// Some failure, until there is one.
    failure: Value,
}

impl Values {
    pub(super) fn scope(&self, at: At) -> Scope<'_> {
        let failure = (!matches!(at, At::Do(_))).then_some(&self.failure);
        Scope { input: &self.input, steps: &self.steps, item: self.item.as_ref(), failure }
    }

    /// As it was before `step` (`None`: before all steps) and before the failure.
    pub(super) fn forget(&mut self, step: Option<&str>) {
        self.failure = some_failure();
        for (name, members) in self.steps.as_object_mut().into_iter().flatten() {
            if step.is_none_or(|step| step == name) {
                *members = Value::Object(Map::new());
            }
        }
    }
}

fn some_failure() -> Value {
    // not empty: a path may name it
    let [step, code, reason, message] = ["unknown"; 4].map(str::to_owned);
    serde_json::to_value(Failure { step, code, reason, message }).unwrap_or_default()
}
