//! A definition with its tree, and its expressions compiled.

use std::sync::Arc;

use jiff::Timestamp;
use serde_json::Value;

use super::{
    catalogue::Address,
    counts::Counts,
    facts::{Facts, Values},
};
use crate::domain::saga::{
    definition::{Call, Definition},
    expression::{Expression, ExpressionError},
    request::{Arguments, Request, Target},
    schema::{Schema, SchemaError},
    state::{At, Json, Place, State},
    tree::{Kind, NodeId, Order, ROOT, Tree},
};

/// Values of this length and expressions without a macro take less than a millisecond.
const SHORT: usize = 16 * 1024;
/// Longest output, in bytes of its JSON: as of a reply.
const MAX_OUTPUT: usize = super::answer::MAX_BODY;
/// Longest business key, in bytes.
pub(super) const MAX_KEY: usize = 256;
/// Longest wait until a time, in milliseconds: 8760 hours, as of `wait`.
const MAX_WAIT_MS: i64 = 8760 * 3_600_000;
/// Maximum number of items of a `forEach`.
const MAX_ITEMS: usize = 1_000;

/// Whether an instance may have this business key.
pub(super) fn may_be_key(text: &str) -> bool {
    text.len() <= MAX_KEY && !text.is_empty() && !text.chars().any(char::is_control)
}

/// A definition with its expressions compiled, shared by all its instances.
#[derive(Debug)]
pub(super) struct Compiled {
    pub definition: Definition,
    pub tree: Tree,
    pub counts: Arc<Counts>,
    input: Option<Result<Schema, SchemaError>>,
    /// Of the business key.
    key: Option<Compilation<Expression>>,
    nodes: Vec<Expressions>,
    notify: Expressions,
    /// Whether any expression has a macro.
    has_macros: bool,
}

/// What is compiled, or why an expression does not compile. The call then fails with this text; the lint keeps such a
/// definition from being applied.
type Compilation<T> = Result<T, String>;

/// The expressions of a node.
#[derive(Debug, Default)]
struct Expressions {
    action: Option<Compilation<Arguments>>,
    undo: Option<Compilation<Arguments>>,
    /// Of a condition, a list or a time.
    value: Option<Compilation<Expression>>,
    /// The members of the output.
    output: Vec<(String, Compilation<Expression>)>,
    /// The steps whose replies these read, or what is evaluated together with them.
    reads: Vec<NodeId>,
}

impl Expressions {
    fn of(kind: &Kind) -> Self {
        let mut own = Self::default();
        match kind {
            Kind::Call(transaction) => {
                own.action = Some(compile(&transaction.action));
                own.undo = transaction.undo.call().map(compile);
            }
            Kind::Choice { condition: source, .. } | Kind::Each { items: source, .. } | Kind::WaitUntil(source) => {
                own.value = Some(Expression::compile(source).map_err(|error| error.to_string()));
            }
            Kind::Output(members) => {
                let compile = |source: &String| Expression::compile(source).map_err(|error| error.to_string());
                own.output = members.iter().map(|(name, source)| (name.clone(), compile(source))).collect();
            }
            Kind::Wait { .. } | Kind::Signal { .. } | Kind::Sequence(_) | Kind::All(_) => {}
        }
        own
    }

    fn steps(&self) -> Vec<&str> {
        let calls = [&self.action, &self.undo].into_iter().flatten().flatten();
        calls.flat_map(Arguments::steps).chain(self.values().flat_map(Expression::steps)).collect()
    }

    fn is_heavy(&self) -> bool {
        let mut calls = [&self.action, &self.undo].into_iter().flatten().flatten();
        calls.any(Arguments::is_heavy) || self.values().any(Expression::is_heavy)
    }

    fn values(&self) -> impl Iterator<Item = &Expression> {
        self.value.iter().chain(self.output.iter().map(|(_, member)| member)).flatten()
    }
}

fn compile(call: &Call) -> Compilation<Arguments> {
    Arguments::compile(call).map_err(|error| error.to_string())
}

impl Compiled {
    pub(super) fn new(definition: Definition, counts: Arc<Counts>) -> Self {
        let tree = Tree::of(&definition);
        let mut nodes: Vec<Expressions> = tree.nodes().map(|(_, node)| Expressions::of(&node.kind)).collect();
        let action = definition.on_compensated.as_ref().map(compile);
        let mut notify = Expressions { action, ..Expressions::default() };
        for own in nodes.iter_mut().chain([&mut notify]) {
            let mut reads: Vec<NodeId> = own.steps().into_iter().filter_map(|step| tree.task(step)).collect();
            reads.sort_unstable();
            reads.dedup();
            own.reads = reads;
        }
        // what comes after the pivot is evaluated before it, too
        if let Some(pivot) = tree.pivot() {
            let later = nodes.get(pivot as usize..).unwrap_or_default();
            let mut reads: Vec<NodeId> = later.iter().flat_map(|later| later.reads.iter().copied()).collect();
            reads.sort_unstable();
            reads.dedup();
            if let Some(own) = nodes.get_mut(pivot as usize) {
                own.reads = reads;
            }
        }
        let has_macros = nodes.iter().chain([&notify]).any(Expressions::is_heavy);
        let input = definition.input.as_ref().map(Schema::compile);
        let compile = |source: &String| Expression::compile(source).map_err(|error| error.to_string());
        let key = definition.key.as_ref().map(compile);
        let has_macros = has_macros || key.iter().flatten().any(Expression::is_heavy);
        Self { definition, tree, counts, input, key, nodes, notify, has_macros }
    }

    fn expressions(&self, at: At) -> Option<&Expressions> {
        match at {
            At::Do(place) | At::Undo(place) => self.nodes.get(place.node as usize),
            At::Notify => Some(&self.notify),
        }
    }

    fn arguments(&self, at: At) -> Option<&Compilation<Arguments>> {
        let own = self.expressions(at)?;
        if matches!(at, At::Undo(_)) { own.undo.as_ref() } else { own.action.as_ref() }
    }

    /// What the expressions of `at` read.
    pub(super) fn facts(&self, at: At, state: &State) -> Facts {
        let reads = self.expressions(at).map_or(&[][..], |own| own.reads.as_slice());
        Facts::of(&self.tree, state, at.place(), reads)
    }

    fn values(&self, at: At, facts: &Facts) -> Result<Values, String> {
        let own = at.place().map(|place| place.node);
        let reads = self.expressions(at).map_or(&[][..], |own| own.reads.as_slice());
        facts.values(&self.tree, reads.iter().copied().chain(own))
    }

    /// Whether an evaluation over values of `length` bytes of JSON may take so long that it belongs onto a thread of its own.
    pub(super) fn is_heavy(&self, at: At, length: usize) -> bool {
        length > SHORT || self.expressions(at).is_some_and(Expressions::is_heavy)
    }

    /// Whether [`Self::check_input`] of `length` bytes may take so long.
    pub(super) fn has_heavy(&self, length: usize) -> bool {
        length > SHORT || self.has_macros
    }

    /// Why this is no input: it does not fit the schema, or an expression that reads nothing else fails, so that no instance
    /// could end well or be undone. Names the step and the member, and no value. What depends on a condition, or on a list that
    /// may be empty, is evaluated when it is known to be done.
    pub(super) fn check_input(&self, input: &Json) -> Result<(), String> {
        let facts = Facts::of_input(input.clone());
        match &self.input {
            Some(Ok(schema)) => schema.check(&facts.values(&self.tree, std::iter::empty())?.input)?,
            Some(Err(why)) => return Err(format!("spec.input {why}")),
            None => {}
        }
        for node in self.certain() {
            let at = At::of(node);
            let values = self.values(at, &facts)?;
            self.check(at, &values, |_| false)?;
            self.check(At::Undo(Place { node, item: None }), &values, |step| step == node)?;
        }
        self.check(At::Notify, &self.values(At::Notify, &facts)?, |_| true)
    }

    /// The business key of an instance with this input, or why it has none.
    pub(super) fn key(&self, input: &Json) -> Result<Option<String>, String> {
        let Some(key) = &self.key else { return Ok(None) };
        let values = Facts::of_input(input.clone()).values(&self.tree, std::iter::empty())?;
        let found = key.as_ref().map_err(Clone::clone)?.evaluate(values.scope(At::of(ROOT)));
        match found.map_err(|error| format!("key {error}"))? {
            Value::String(key) if key.is_empty() || key.chars().any(char::is_control) => {
                Err("key is empty, or has control characters".to_owned())
            }
            Value::String(key) if key.len() > MAX_KEY => Err(format!("key is longer than {MAX_KEY} bytes")),
            // they are other places of the API
            Value::String(key) if ["batch", ".", ".."].contains(&key.as_str()) => {
                Err(format!("key is `{key}`, which the API cannot tell from a path of its own"))
            }
            Value::String(key) => Ok(Some(key)),
            Value::Number(key) => Ok(Some(key.to_string())),
            _ => Err("key is neither a string nor a number".to_owned()),
        }
    }

    /// The nodes that are done by every instance that completes.
    fn certain(&self) -> impl Iterator<Item = NodeId> {
        self.tree.nodes().filter(|(_, node)| !node.conditional && node.each.is_none()).map(|(node, _)| node)
    }

    /// Evaluates what of `at` reads no other replies than the `known` ones.
    fn check(&self, at: At, values: &Values, known: impl Fn(NodeId) -> bool) -> Result<(), String> {
        let known = |step: &str| self.tree.task(step).is_some_and(&known);
        let failed = |error: &ExpressionError| format!("step `{}` ({}): {error}", self.tree.path(at), at.operation());
        if let (Some(Ok(arguments)), Some((call, _))) = (self.arguments(at), self.tree.call(at)) {
            arguments.check(values.scope(at), Target::of(call), known).map_err(|error| failed(&error))?;
        }
        match (at, self.expressions(at).and_then(|own| own.value.as_ref())) {
            (At::Do(place), Some(Ok(value))) if value.steps().all(known) => {
                let (path, found) = (self.tree.path(at), value.evaluate(values.scope(at)));
                let found = found.map_err(|error| format!("step `{path}` ({}): {error}", self.kind_of_value(place)))?;
                self.check_kind(place, &found).map_err(|why| format!("step `{path}`: {why}"))
            }
            _ => Ok(()),
        }
    }

    /// What to send, or why it cannot be made; to where the command is now, if that is not where the definition says.
    ///
    /// A step begins only if its undo can be made from what is known before it: `input`, the replies of earlier steps, and
    /// some failure. An undo that fails with more than that (its own step's reply, or this very failure) is made from that
    /// again, so that no instance is stuck because of an expression. A pivot begins only if the calls after it can be made, as
    /// far as they do not read later replies.
    pub(super) fn request(&self, at: At, facts: &Facts, moved: Option<&Address>) -> Result<Request, String> {
        let absent = || "there is no such call".to_owned();
        let (call, _) = self.tree.call(at).ok_or_else(absent)?;
        let target = moved.map_or_else(|| Target::of(call), Address::target);
        let arguments = self.arguments(at).ok_or_else(absent)?.as_ref().map_err(Clone::clone)?;
        let own = moved.and_then(|moved| moved.with_path_of(call));
        let evaluate = |values: &Values| {
            let made = arguments.evaluate(values.scope(at), target);
            // these values have no place in what the command is now: they go by its former method and path to where it is now
            match (made, &own) {
                (Err(ExpressionError::Unsendable(_)), Some(own)) => arguments.evaluate(values.scope(at), own.target()),
                (made, _) => made,
            }
            .map_err(|error| error.to_string())
        };
        let mut values = self.values(at, facts)?;
        let made = evaluate(&values);
        match (at, made) {
            (At::Do(place), Ok(made)) => self.check_ahead(place, &values).map(|()| made),
            (At::Undo(_) | At::Notify, Err(why)) => {
                let step = self.tree.path(at);
                tracing::warn!(saga = self.definition.name, %step, why, "an undo is made without its step's reply");
                values.forget(at.place().and_then(|place| self.tree.node(place.node)).map(|node| node.name.as_str()));
                evaluate(&values)
            }
            (_, made) => made,
        }
    }

    fn check_ahead(&self, place: Place, values: &Values) -> Result<(), String> {
        let node = place.node;
        let known = |step: NodeId| matches!(self.tree.order(step, node), Order::Before { .. });
        self.check(At::Undo(place), values, |step| known(step) || step == node)?;
        if self.tree.pivot() == Some(node) {
            for later in self.certain().filter(|later| *later > node) {
                self.check(At::of(later), values, known)?;
            }
        }
        Ok(())
    }

    /// What a condition, a list or a time is, or why it has no value.
    pub(super) fn value(&self, place: Place, facts: &Facts) -> Result<Value, String> {
        let at = At::Do(place);
        let value = self.expressions(at).and_then(|own| own.value.as_ref());
        let value = value.ok_or_else(|| "there is no such expression".to_owned())?.as_ref().map_err(Clone::clone)?;
        let found = value.evaluate(self.values(at, facts)?.scope(at));
        let found = found.map_err(|error| format!("{}: {error}", self.kind_of_value(place)))?;
        self.check_kind(place, &found)?;
        Ok(found)
    }

    /// What the instance shows, or why it has no output: that one of its members has no value, which the message names.
    pub(super) fn output(&self, place: Place, facts: &Facts) -> Result<Json, String> {
        let at = At::Do(place);
        let values = self.values(at, facts)?;
        let members = self.expressions(at).map_or(&[][..], |own| own.output.as_slice());
        // member by member, so that no more than one too many is in memory
        let mut output = serde_json::Map::new();
        let mut left = MAX_OUTPUT;
        for (name, member) in members {
            let value = member.as_ref().map_err(Clone::clone)?.evaluate(values.scope(at));
            let value = value.map_err(|error| format!("output.{name} {error}"))?;
            let length = serde_json::to_string(&value).map_or(0, |text| text.len()) + name.len() + 4;
            left = left.checked_sub(length).ok_or_else(|| {
                format!("output.{name} makes the output longer than the {MAX_OUTPUT} bytes of JSON that are allowed")
            })?;
            output.insert(name.clone(), value);
        }
        serde_json::value::to_raw_value(&output).map(Json::from).map_err(|error| error.to_string())
    }

    fn kind_of_value(&self, place: Place) -> &'static str {
        match self.tree.kind(place.node) {
            Some(Kind::Choice { .. }) => "when",
            Some(Kind::WaitUntil(_)) => "waitUntil",
            _ => "forEach.items",
        }
    }

    fn check_kind(&self, place: Place, found: &Value) -> Result<(), String> {
        match (self.tree.kind(place.node), found) {
            (Some(Kind::Choice { .. }), Value::Bool(_)) => Ok(()),
            (Some(Kind::WaitUntil(_)), Value::String(text)) if time(text).is_some() => {
                let latest = Timestamp::now().as_millisecond().saturating_add(MAX_WAIT_MS);
                if time(text).is_some_and(|until| until > latest) {
                    return Err("waitUntil is more than 8760h ahead".to_owned());
                }
                Ok(())
            }
            (Some(Kind::WaitUntil(_)), _) => {
                Err("waitUntil is no time in the form of RFC 3339, such as 2026-12-24T18:00:00Z".to_owned())
            }
            (Some(Kind::Choice { .. }), _) => Err("when is neither true nor false".to_owned()),
            (_, Value::Array(items)) if items.len() > MAX_ITEMS => {
                Err(format!("forEach.items has {} items, and at most {MAX_ITEMS} are allowed", items.len()))
            }
            (_, Value::Array(_)) => Ok(()),
            _ => Err("forEach.items is no list".to_owned()),
        }
    }
}

/// A time in the form of RFC 3339, in milliseconds since the epoch.
pub(super) fn time(text: &str) -> Option<i64> {
    text.parse::<Timestamp>().ok().map(Timestamp::as_millisecond)
}

#[cfg(test)]
#[path = "compiled_tests.rs"]
mod tests;
