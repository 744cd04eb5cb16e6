//! A saga's definition as the orchestrator runs it: addresses are resolved, durations are numbers.
//!
//! The operator makes it from a `Saga` object and the `Microservice`s that it names. An instance keeps the definition
//! that it started with, so a definition is identified by the hash of its content ([`Definition::version`]).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::domain::version;

/// One saga, ready to run. Steps run in order; compensation undoes them in reverse.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    pub steps: Vec<Step>,
    /// Called once everything is undone, retried like an undo.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_compensated: Option<Call>,
}

impl Definition {
    /// Sets [`Definition::version`] from the content: members in the order of this file, maps sorted by key.
    #[must_use]
    pub fn seal(mut self) -> Self {
        self.version.clear();
        self.version = version::of(&self);
        self
    }

    /// All calls: of the steps, and after a compensation.
    pub fn calls(&self) -> impl Iterator<Item = &Call> {
        let of_steps = self.steps.iter().flat_map(|step| std::iter::once(&step.action).chain(&step.undo));
        of_steps.chain(&self.on_compensated)
    }

    /// Index of the point of no return, if the saga has one.
    pub fn pivot(&self) -> Option<usize> {
        self.steps.iter().position(|step| step.pivot)
    }

    /// The pivot when it has no undo, so that nothing can ask whether it happened.
    pub fn final_pivot(&self) -> Option<usize> {
        self.steps.iter().position(|step| step.pivot && step.undo.is_none())
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Step {
    /// Unique within the saga; part of the idempotency key `SAGA-ID/STEP/do`.
    pub name: String,
    /// The pivot (the point of no return): once it has succeeded, the saga can only go forward.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pivot: bool,
    #[serde(rename = "do")]
    pub action: Call,
    /// `None` when there is nothing to undo (`undo: {none: true}`, or a step after the pivot). The pivot's asks whether the
    /// pivot happened: a refusal of it means that it did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<Call>,
    /// Time-out of each request in milliseconds; the outcome of one that takes longer is *unknown*. A job that the service
    /// accepts is polled for as long as the deadline.
    pub timeout_ms: u64,
    pub retry: RetryPolicy,
    /// The participant's failure code → the saga's `failure.reason`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub failures: BTreeMap<String, String>,
}

/// A command of a participant, with the address that it had when the definition was made. An instance of an older definition
/// calls where the command is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Call {
    pub service: String,
    pub command: String,
    /// HTTP method, upper case.
    pub method: String,
    /// Absolute URL.
    pub url: String,
    /// The JSON body's members, each a CEL expression over `input`, `steps.NAME.reply` and, when compensating, `failure`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub with: BTreeMap<String, String>,
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
