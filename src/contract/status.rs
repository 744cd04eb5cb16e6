//! What the data plane answers on its admin port's `/status`, and the operator reads.
//!
//! `GET /status` is one JSON document; `GET /status?watch=true` streams it as newline-delimited JSON: once at once, then
//! whenever it changes, at most once a second, and at least every 30 s as a sign of life.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Something that a person should know, in words. It goes away by itself when mended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// PascalCase; becomes a condition's reason: `DatabaseUnreachable`, `BrokerUnreachable`, `SlotAtRisk`, …
    pub reason: String,
    /// One sentence: what, where, how to mend it. Never a payload or a credential.
    pub message: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RelayStatus {
    pub relay: String,
    /// Version of the contract that it works by.
    #[serde(default)]
    pub contract: String,
    /// This process holds the outbox; the others stand by.
    pub leading: bool,
    /// Connected to source and sink and publishing (or paused on purpose).
    pub ready: bool,
    pub paused: bool,
    /// Events acknowledged by the broker since the relay first ran (kept in the checkpoint).
    pub published: u64,
    /// Rows in the outbox that are not yet acknowledged.
    pub pending: u64,
    pub lag_seconds: f64,
    /// WAL between the server's position and the slot's `confirmed_flush_lsn`; `None` when polling.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag_bytes: Option<u64>,
    /// Last acknowledged commit position, an LSN (`0/16B3748`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_published: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OrchestratorStatus {
    pub orchestrator: String,
    /// All partitions that this process should hold are held and recovered.
    pub ready: bool,
    pub sagas: BTreeMap<String, SagaCounts>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
}

/// Counts of one saga's instances, all versions together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SagaCounts {
    /// The definition's version that new instances get.
    pub version: String,
    /// Not ended: includes those compensating and those stuck.
    pub running: u64,
    /// Of those, the ones being undone.
    pub compensating: u64,
    pub completed: u64,
    pub compensated: u64,
    /// Of the running ones, those that have exhausted their attempts and wait for a person.
    pub stuck: u64,
    /// The oldest ten stuck instances.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stuck_instances: Vec<StuckInstance>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StuckInstance {
    pub id: String,
    pub step: String,
    /// `do` or `undo`.
    pub operation: String,
    /// What the last attempt came to.
    pub message: String,
    pub since: Timestamp,
}
