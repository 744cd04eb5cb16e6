//! The documents that the data plane serves at `/status` on its admin port, and that the operator reads.
//!
//! `GET /status` returns one JSON document. `GET /status?watch=true` streams documents as newline-delimited JSON: one
//! at once, then one whenever it changes, at most once a second, and at least every 30 s as a keepalive.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::problem::Problem;
use crate::domain::choreography::definition::Kind;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RelayStatus {
    pub relay: String,
    /// Version of the contract in force.
    #[serde(default)]
    pub contract: String,
    /// Whether this process leads; the others are standbys.
    pub leading: bool,
    /// Connected to database and broker and publishing (or paused on purpose).
    pub ready: bool,
    pub paused: bool,
    /// Events acknowledged by the broker since the relay first ran (kept in the checkpoint).
    pub published: u64,
    /// Rows in the outbox that are not yet acknowledged.
    pub pending: u64,
    /// Events that the broker refuses, and those that wait behind them; part of `pending`.
    #[serde(default)]
    pub held: u64,
    /// Events that were given up.
    #[serde(default)]
    pub dead_letters: u64,
    pub lag_seconds: f64,
    /// WAL between the server's position and the slot's `confirmed_flush_lsn`; `None` when polling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<u64>,
    /// From commit to acknowledgement, of the events of the last minute; `None` when there were none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
    /// Last acknowledged commit position, an LSN (`0/16B3748`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_published: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

/// Percentiles of a latency, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Latency {
    pub p50_seconds: f64,
    pub p99_seconds: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InboxStatus {
    /// Version of the contract in force.
    pub contract: String,
    /// Whether this process leads; the others are standbys.
    pub leading: bool,
    /// Connected to the database, and every subscription is read and delivered.
    pub ready: bool,
    pub subscriptions: BTreeMap<String, SubscriptionStatus>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SubscriptionStatus {
    /// Events that the service has handled since the subscription was made.
    pub consumed: u64,
    /// Events that are published and not handled, held ones included.
    pub waiting: u64,
    /// Events that the service refuses, and those that wait behind them; part of `waiting`.
    pub held: u64,
    pub dead_letters: u64,
    /// Age of the oldest event that waits.
    pub lag_seconds: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OrchestratorStatus {
    pub orchestrator: String,
    /// Whether this process holds all partitions and has recovered them.
    pub ready: bool,
    pub sagas: BTreeMap<String, SagaCounts>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

/// Counts of one saga's instances, all versions together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SagaCounts {
    /// The definition's version that new instances start with.
    pub version: String,
    /// The saga is being deleted, and no start of it can be in progress any more: `running` only falls.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// Instances that have not ended, including compensating and stuck ones.
    pub running: u64,
    /// Running instances that are being compensated.
    pub compensating: u64,
    pub completed: u64,
    pub compensated: u64,
    /// Running instances that have exhausted their attempts, or were refused where nothing may be refused.
    pub stuck: u64,
    /// Of the event that starts the saga; `None` without one, or as long as nothing is known of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start: Option<StartReport>,
    /// The oldest ten stuck instances.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stuck_instances: Vec<StuckInstance>,
    /// Of a choreographed saga: what was seen that its definition does not say, the most frequent first, at most ten.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<FindingCount>,
}

/// How often something was seen that a choreography does not declare.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FindingCount {
    /// `undeclared`, `repeated` or `late`.
    pub finding: String,
    pub event: Kind,
    /// The event that it reacted to, if it names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Kind>,
    pub count: u64,
}

/// What is known of the event that starts a saga.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StartReport {
    /// Whether the stream has, or had, an event of this type; `None` where subjects do not say the type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<bool>,
    /// While it has none: the types of the service's events that it has, at most twenty.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<String>,
    /// Events of the last month that can never start the saga.
    #[serde(default)]
    pub dead: u64,
}

/// The `operation` of a stuck instance of a choreographed saga.
pub const REACT: &str = "react";

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StuckInstance {
    pub id: String,
    /// The first of its steps that is stuck, or the service that owes the next event.
    pub step: String,
    /// `do` or `undo`; `signal`, `when` or `forEach` of what is no call; or [`REACT`].
    pub operation: String,
    /// The error of the last attempt, or who owes what to which event.
    pub message: String,
    pub since: Timestamp,
}
