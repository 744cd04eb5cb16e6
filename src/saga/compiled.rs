//! A definition with its expressions compiled, and what they are evaluated with.

use std::sync::Arc;

use serde_json::{Map, Value};

use super::counts::Counts;
use crate::domain::saga::{
    definition::{Call, Definition},
    expression::{Body, Scope},
    schema::{Schema, SchemaError},
    state::{Failure, Json, Phase, State},
};

/// Values of this length and expressions without a macro take less than a millisecond.
const SHORT: usize = 16 * 1024;

/// A definition with its expressions compiled, shared by all its instances.
#[derive(Debug)]
pub(super) struct Compiled {
    pub definition: Definition,
    pub counts: Arc<Counts>,
    input: Option<Result<Schema, SchemaError>>,
    /// Of each step, the do and the undo.
    steps: Vec<(Compilation, Compilation)>,
    notify: Compilation,
    /// Whether any expression has a macro.
    has_macros: bool,
}

/// A compiled body, or why an expression does not compile. The call then fails with this text; the lint keeps such a
/// definition from being applied.
type Compilation = Result<Body, String>;

impl Compiled {
    pub(super) fn new(definition: Definition, counts: Arc<Counts>) -> Self {
        let optional = |call: Option<&Call>| call.map_or_else(|| Ok(Body::default()), compile);
        let steps = definition.steps.iter().map(|step| (compile(&step.action), optional(step.undo.as_ref()))).collect();
        let notify = optional(definition.on_compensated.as_ref());
        let input = definition.input.as_ref().map(Schema::compile);
        let compiled = Self { definition, counts, input, steps, notify, has_macros: false };
        let mut phases = (0..compiled.steps.len()).map(Phase::Do).chain([Phase::Notify]);
        Self { has_macros: phases.any(|phase| compiled.repeats(phase)), ..compiled }
    }

    fn compiled(&self, phase: Phase) -> Option<&Compilation> {
        match phase {
            Phase::Do(index) => self.steps.get(index).map(|(action, _)| action),
            Phase::Undo(index) => self.steps.get(index).map(|(_, undo)| undo),
            Phase::Notify => Some(&self.notify),
            Phase::Completed | Phase::Compensated => None,
        }
    }

    /// Whether an evaluation over values of `length` bytes of JSON may take so long that it belongs onto a thread of its own.
    pub(super) fn is_heavy(&self, phase: Phase, length: usize) -> bool {
        length > SHORT || self.repeats(phase)
    }

    fn repeats(&self, phase: Phase) -> bool {
        let heavy = |compiled: &Compilation| compiled.as_ref().is_ok_and(Body::is_heavy);
        let undo = if let Phase::Do(index) = phase { self.compiled(Phase::Undo(index)) } else { None };
        self.compiled(phase).into_iter().chain(undo).any(heavy)
    }

    /// Whether [`Self::check_input`] of `length` bytes may take so long.
    pub(super) fn has_heavy(&self, length: usize) -> bool {
        length > SHORT || self.has_macros
    }

    /// Why this is no input: it does not fit the schema, or an expression that reads nothing else fails, so that no instance
    /// could end well or be undone. Names the step and the member, and no value.
    pub(super) fn check_input(&self, input: &Json) -> Result<(), String> {
        let facts = Facts { input: input.clone(), replies: Vec::new(), failure: Value::Null };
        let values = facts.values(&self.definition)?;
        match &self.input {
            Some(Ok(schema)) => schema.check(&values.input)?,
            Some(Err(why)) => return Err(format!("spec.input {why}")),
            None => {}
        }
        for index in 0..self.steps.len() {
            self.check(Phase::Do(index), &values, |_| false)?;
            let own = self.definition.steps.get(index).map_or("", |step| &step.name);
            self.check(Phase::Undo(index), &values, |step| step == own)?;
        }
        self.check(Phase::Notify, &values, |_| true)
    }

    /// Evaluates what in the body of `phase` reads no other replies than the `known` ones.
    fn check(&self, phase: Phase, values: &Values, known: impl Fn(&str) -> bool) -> Result<(), String> {
        let Some(Ok(body)) = self.compiled(phase) else { return Ok(()) };
        let (step, operation) =
            (phase.step(&self.definition).unwrap_or_default(), phase.operation().unwrap_or_default());
        body.check(values.scope(phase), known).map_err(|error| format!("step `{step}` ({operation}): {error}"))
    }

    /// The JSON text to send in `phase`, or why it cannot be made.
    ///
    /// A step begins only if its undo can be made from what is known before it: `input`, the replies of earlier steps, and
    /// some failure. An undo that fails with more than that (its own step's reply, or this very failure) is made from that
    /// again, so that no instance is stuck because of an expression. A pivot begins only if the calls after it can be made, as
    /// far as they do not read later replies.
    pub(super) fn body(&self, phase: Phase, facts: &Facts) -> Result<String, String> {
        let Some(compiled) = self.compiled(phase) else { return Err(format!("there is no call in phase {phase:?}")) };
        let body = compiled.as_ref().map_err(Clone::clone)?;
        let mut values = facts.values(&self.definition)?;
        let made = body.evaluate(values.scope(phase)).map_err(|error| error.to_string());
        match (phase, made) {
            (Phase::Do(index), Ok(made)) => self.check_ahead(index, &values).map(|()| made),
            (Phase::Undo(_) | Phase::Notify, Err(why)) => {
                tracing::warn!(saga = self.definition.name, ?phase, why, "an undo is made without its step's reply");
                values.forget(phase.step(&self.definition).filter(|_| phase != Phase::Notify));
                body.evaluate(values.scope(phase)).map_err(|error| error.to_string())
            }
            (_, made) => made,
        }
    }

    fn check_ahead(&self, index: usize, values: &Values) -> Result<(), String> {
        let known = |step: &str| self.definition.steps.iter().take(index).any(|earlier| earlier.name == step);
        let own = self.definition.steps.get(index).map_or("", |step| &step.name);
        self.check(Phase::Undo(index), values, |step| known(step) || step == own)?;
        if self.definition.pivot() == Some(index) {
            for later in index + 1..self.steps.len() {
                self.check(Phase::Do(later), values, known)?;
            }
        }
        Ok(())
    }
}

fn compile(call: &Call) -> Compilation {
    Body::compile(call).map_err(|error| error.to_string())
}

/// What expressions may refer to, extracted from an instance's state.
#[derive(Debug)]
pub(super) struct Facts {
    input: Json,
    replies: Vec<Option<Json>>,
    failure: Value,
}

struct Values {
    input: Value,
    steps: Value,
    /// Some failure, until there is one.
    failure: Value,
}

impl Values {
    fn scope(&self, phase: Phase) -> Scope<'_> {
        let failure = (!matches!(phase, Phase::Do(_))).then_some(&self.failure);
        Scope { input: &self.input, steps: &self.steps, failure }
    }

    /// As it was before `step` (`None`: before all steps) and before the failure.
    fn forget(&mut self, step: Option<&str>) {
        self.failure = some_failure();
        for (name, members) in self.steps.as_object_mut().into_iter().flatten() {
            if step.is_none_or(|step| step == name) {
                *members = Value::Object(Map::new());
            }
        }
    }
}

fn some_failure() -> Value {
    let (step, code, reason, message) = (String::new(), String::new(), String::new(), String::new());
    serde_json::to_value(Failure { step, code, reason, message }).unwrap_or_default()
}

impl Facts {
    pub(super) fn of(state: &State) -> Self {
        let failure =
            state.failure.as_ref().and_then(|failure| serde_json::to_value(failure).ok()).unwrap_or(Value::Null);
        Self { input: state.input.clone(), replies: state.replies.clone(), failure }
    }

    /// Length of the JSON.
    pub(super) fn length(&self) -> usize {
        self.input.as_str().len() + self.replies.iter().flatten().map(|reply| reply.as_str().len()).sum::<usize>()
    }

    fn values(&self, definition: &Definition) -> Result<Values, String> {
        let unreadable = |error: serde_json::Error| format!("reading the recorded values: {error}");
        let mut steps = Map::new();
        let replies = self.replies.iter().map(Option::as_ref).chain(std::iter::repeat(None));
        for (step, reply) in definition.steps.iter().zip(replies) {
            let mut members = Map::new();
            if let Some(reply) = reply {
                members.insert("reply".to_owned(), serde_json::from_str(reply.as_str()).map_err(unreadable)?);
            }
            steps.insert(step.name.clone(), Value::Object(members));
        }
        let input = serde_json::from_str(self.input.as_str()).map_err(unreadable)?;
        let failure = if self.failure.is_null() { some_failure() } else { self.failure.clone() };
        Ok(Values { input, steps: Value::Object(steps), failure })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;
    use crate::domain::saga::definition::{RetryPolicy, Step};

    fn call(with: &[(&str, &str)]) -> Call {
        let text = String::new;
        let with = with.iter().map(|(name, source)| ((*name).to_owned(), (*source).to_owned())).collect();
        Call { service: text(), command: text(), method: text(), url: text(), with }
    }

    fn step(name: &str, action: Call, undo: Option<Call>) -> Step {
        let (name, retry, failures) = (name.to_owned(), RetryPolicy::default(), BTreeMap::new());
        Step { name, pivot: false, action, undo, timeout_ms: 1, retry, failures }
    }

    /// `reserve` is undone by its reply, if there is one; `charge` is the pivot; `ship` reads both.
    fn compiled() -> Compiled {
        let undo = call(&[
            ("id", "has(steps.reserve.reply) ? steps.reserve.reply.id : input.order"),
            ("why", "failure.code == 'Teapot' ? failure.tea : failure.code"),
        ]);
        let reserve = step("reserve", call(&[("amount", "input.total * 2")]), Some(undo));
        let charge = step("charge", call(&[]), None);
        let ship = step("ship", call(&[("to", "input.address.street"), ("from", "steps.reserve.reply.depot")]), None);
        let definition = Definition {
            name: "order".to_owned(),
            version: String::new(),
            deadline_ms: 1,
            input: None,
            steps: vec![reserve, Step { pivot: true, ..charge }, ship],
            on_compensated: Some(call(&[("order", "input.order")])),
        };
        Compiled::new(definition, Arc::default())
    }

    fn json(value: &Value) -> Json {
        Json::parse(value.to_string()).unwrap()
    }

    fn facts(replies: &[Value], code: Option<&str>) -> Facts {
        let input = json(&json!({"order": "o-1", "total": 4, "address": {"street": "s"}}));
        let failure =
            code.map_or(Value::Null, |code| json!({"step": "s", "code": code, "reason": "r", "message": "m"}));
        Facts { input, replies: replies.iter().map(|reply| Some(json(reply))).collect(), failure }
    }

    #[test]
    fn an_input_is_refused_when_an_expression_that_reads_nothing_else_fails() {
        let compiled = compiled();
        let check = |input: Value| compiled.check_input(&json(&input));
        assert_eq!(check(json!({"order": "o-1", "total": 4, "address": {"street": "s"}})), Ok(()));
        for (input, why) in [
            (json!({}), "step `reserve` (do): cannot be evaluated: with.amount: there is no `input.total`"),
            (json!([1]), "step `reserve` (do): cannot be evaluated: with.amount: there is no `input.total`"),
            (
                json!({"order": "o-1", "total": "hunter2"}),
                "step `reserve` (do): cannot be evaluated: with.amount: `mul` of string and int is not defined",
            ),
            // the undo, when the step has no reply
            (json!({"total": 4}), "step `reserve` (undo): cannot be evaluated: with.id: there is no `input.order`"),
        ] {
            assert_eq!(check(input).unwrap_err(), why);
        }
        // what reads replies is not known yet, what stands beside it is
        assert_eq!(
            check(json!({"order": "o-1", "total": 4})).unwrap_err(),
            "step `ship` (do): cannot be evaluated: with.to: `input.address.street` has no `address`"
        );
    }

    #[test]
    fn an_undo_can_always_be_made() {
        let compiled = compiled();
        let undo = |replies: &[Value], code| {
            serde_json::from_str::<Value>(&compiled.body(Phase::Undo(0), &facts(replies, Some(code))).unwrap()).unwrap()
        };
        assert_eq!(undo(&[json!({"id": 7})], "Sold"), json!({"id": 7, "why": "Sold"}));
        assert_eq!(undo(&[], "Sold"), json!({"id": "o-1", "why": "Sold"}));
        // its own reply is not as expected, this failure is not: as when the outcome is unknown
        assert_eq!(undo(&[json!({"ident": 7})], "Sold"), json!({"id": "o-1", "why": ""}));
        assert_eq!(undo(&[json!({"id": 7})], "Teapot"), json!({"id": "o-1", "why": ""}));
    }

    #[test]
    fn a_pivot_begins_only_if_what_comes_after_it_can_be_called() {
        let compiled = compiled();
        let good = facts(&[json!({"id": 7, "depot": "d"})], None);
        assert!(compiled.body(Phase::Do(1), &good).is_ok());
        let why = compiled.body(Phase::Do(1), &facts(&[json!({"id": 7})], None)).unwrap_err();
        assert_eq!(why, "step `ship` (do): cannot be evaluated: with.from: `steps.reserve.reply.depot` has no `depot`");
    }
}
