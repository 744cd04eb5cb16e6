//! A saga's definition as the orchestrator runs it: addresses are resolved, durations are numbers.
//!
//! The operator makes it from a `Saga` object and the `Microservice`s that it names. An instance keeps the definition
//! that it started with, so a definition is identified by the hash of its content ([`Definition::version`]).
//!
//! Steps contain steps, as deep as the author wrote them; [`super::tree`] numbers them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::domain::version;

/// One saga, ready to run. Steps run in order; compensation undoes them in reverse order of their completion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Definition {
    /// The `Saga` object's name, unique within its orchestrator.
    pub name: String,
    /// First 16 hex digits of the SHA-256 of the canonical JSON of everything else (see [`Definition::seal`]). The
    /// orchestrator computes it for a definition without one, such as one that is written by hand.
    #[serde(default)]
    pub version: String,
    /// Milliseconds from the start after which a saga that has not reached its pivot is compensated. After the pivot a
    /// passed deadline is only reported.
    pub deadline_ms: u64,
    /// JSON Schema of the input. Without one every JSON is an input, as long as the expressions can use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<serde_json::Value>,
    /// The business key by which people find an instance: a CEL expression over `input`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    pub steps: Vec<Step>,
    /// Called once everything is undone, retried like an undo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_compensated: Option<Call>,
    /// What a completed instance shows, each member a CEL expression over `input` and `steps.NAME.reply`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub output: BTreeMap<String, String>,
}

impl Definition {
    /// Sets [`Definition::version`] from the content: members in the order of this file, maps sorted by key.
    #[must_use]
    pub fn seal(self) -> Self {
        version::seal(self, |definition| &mut definition.version)
    }

    /// All calls: of the steps, and after a compensation.
    pub fn calls(&self) -> Vec<&Call> {
        let mut calls = Vec::new();
        self.steps.iter().for_each(|step| step.add_calls(&mut calls));
        calls.extend(&self.on_compensated);
        calls
    }

    /// As [`Self::calls`].
    pub fn calls_mut(&mut self) -> Vec<&mut Call> {
        let mut calls = Vec::new();
        self.steps.iter_mut().for_each(|step| step.add_calls_mut(&mut calls));
        calls.extend(&mut self.on_compensated);
        calls
    }
}

/// A step: one task, which may be done on a condition and for each item of a list. The condition is evaluated first.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// Unique within the saga, groups included, so that it is the step's path: the idempotency key is `SAGA-ID/NAME/do`, or
    /// `SAGA-ID/NAME.ITEM/do` in a `forEach`.
    pub name: String,
    /// CEL expression, true or false. It is evaluated once, when the saga comes to the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    /// What is done instead when `when` is false.
    #[serde(rename = "else", default, skip_serializing_if = "Vec::is_empty")]
    pub otherwise: Vec<Step>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_each: Option<ForEach>,
    #[serde(flatten)]
    pub task: Task,
}

impl Step {
    /// The step's transaction, if it has one.
    pub fn transaction(&self) -> Option<&Transaction> {
        if let Task::Call(transaction) = &self.task { Some(transaction) } else { None }
    }

    pub fn transaction_mut(&mut self) -> Option<&mut Transaction> {
        if let Task::Call(transaction) = &mut self.task { Some(transaction) } else { None }
    }

    /// The steps within it.
    pub fn children(&self) -> impl Iterator<Item = &Step> {
        let group = match &self.task {
            Task::All(steps) | Task::Steps(steps) => steps.as_slice(),
            Task::Call(_) | Task::Wait(_) | Task::WaitUntil(_) | Task::Signal(_) => &[],
        };
        group.iter().chain(&self.otherwise)
    }

    fn add_calls<'a>(&'a self, calls: &mut Vec<&'a Call>) {
        if let Some(transaction) = self.transaction() {
            calls.push(&transaction.action);
            calls.extend(transaction.undo.call());
        }
        self.children().for_each(|step| step.add_calls(calls));
    }

    fn add_calls_mut<'a>(&'a mut self, calls: &mut Vec<&'a mut Call>) {
        match &mut self.task {
            Task::Call(transaction) => {
                calls.push(&mut transaction.action);
                if let Undo::Call(undo) = &mut transaction.undo {
                    calls.push(undo);
                }
            }
            Task::All(steps) | Task::Steps(steps) => steps.iter_mut().for_each(|step| step.add_calls_mut(calls)),
            Task::Wait(_) | Task::WaitUntil(_) | Task::Signal(_) => {}
        }
        self.otherwise.iter_mut().for_each(|step| step.add_calls_mut(calls));
    }
}

/// What a step does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Task {
    Call(Box<Transaction>),
    Wait(Wait),
    /// Nothing is done until a time: a CEL expression that gives one in the form of RFC 3339, evaluated when the saga comes to
    /// the step.
    WaitUntil(String),
    Signal(Signal),
    /// All at the same time.
    All(Vec<Step>),
    /// One after the other.
    Steps(Vec<Step>),
}

impl Task {
    pub fn call(transaction: Transaction) -> Self {
        Self::Call(Box::new(transaction))
    }
}

impl Default for Task {
    fn default() -> Self {
        Self::Steps(Vec::new())
    }
}

/// A participant's transaction, and how it is compensated.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Transaction {
    /// The pivot (the point of no return): once it has succeeded, the saga can only go forward.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pivot: bool,
    #[serde(rename = "do")]
    pub action: Call,
    /// The pivot's asks whether the pivot happened: a refusal of it means that it did.
    #[serde(default, skip_serializing_if = "Undo::is_no_call")]
    pub undo: Undo,
    /// Time-out of each request in milliseconds; the outcome of one that takes longer is *unknown*. A job that the service
    /// accepts is polled for as long as the deadline.
    pub timeout_ms: u64,
    pub retry: RetryPolicy,
    /// The participant's failure code → the saga's `failure.reason`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub failures: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Undo {
    Call(Call),
    /// `undo: {none: true}`, or a step after the pivot.
    #[default]
    #[serde(skip)]
    Nothing,
    /// Not given. The lint refuses it before the pivot; it runs like [`Undo::Nothing`].
    #[serde(skip)]
    Missing,
}

impl Undo {
    pub fn call(&self) -> Option<&Call> {
        if let Self::Call(call) = self { Some(call) } else { None }
    }

    fn is_no_call(&self) -> bool {
        self.call().is_none()
    }
}

/// The task is done for each item of a list, which the expressions within it read as `item`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ForEach {
    /// CEL expression, a list. It is evaluated once, when the saga comes to the step.
    pub items: String,
    /// How many items are worked on at the same time; they begin in the order of the list.
    pub concurrency: u32,
}

/// Nothing is done for some time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Wait {
    pub duration_ms: u64,
}

/// A message from outside is awaited, which is the step's reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Signal {
    /// Longest wait in milliseconds, from when the saga comes to the step.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub within_ms: Option<u64>,
}

/// A command of a participant, with the address that it had when the definition was made. An instance of an older definition
/// calls where the command is now.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Call {
    pub service: String,
    pub command: String,
    /// HTTP method, upper case.
    pub method: String,
    /// Absolute URL; its path may name arguments: `/orders/{orderId}`.
    pub url: String,
    /// The arguments, each a CEL expression over `input`, `steps.NAME.reply`, `item` in a `forEach` and, when compensating,
    /// `failure`. [`super::request`] says where each goes.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub with: BTreeMap<String, String>,
    /// The whole JSON body, one such expression.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Further headers, each such an expression.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<String, String>,
}

/// Exponential back-off with full jitter between attempts whose result is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RetryPolicy {
    /// Attempts of a `do` before the pivot; after them the saga compensates. An undo, and a step from the pivot on, is
    /// retried forever; after this many attempts the saga is `Stuck`, and still retried.
    pub max_attempts: u32,
    pub initial_backoff_ms: u64,
    pub max_backoff_ms: u64,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { max_attempts: 10, initial_backoff_ms: 100, max_backoff_ms: 10_000 }
    }
}
