//! The contract of `weft saga`.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Contract, DatabaseLogin, relay::NatsSink};
use crate::domain::{choreography, saga::definition::Definition};

/// Environment variable with the container's memory limit in bytes.
pub const MEMORY_LIMIT: &str = "WEFT_MEMORY_LIMIT";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Orchestrator {
    pub name: String,
    pub namespace: String,
    /// Port of the orchestrator's HTTP API.
    pub api_port: u16,
    pub database: DatabaseLogin,
    /// How long ended instances are kept in the database, with their logs and idempotency keys, in milliseconds.
    #[serde(default = "default_retention_ms")]
    pub retention_ms: u64,
    /// Sorted by name.
    pub sagas: Vec<Definition>,
    /// Sagas that are being deleted: nothing starts them any more, and their instances go on until they end. Sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub draining: Vec<String>,
    /// Events that start sagas; sorted by saga.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub starts: Vec<Start>,
    /// Sagas that are watched; sorted by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choreographies: Vec<Choreography>,
}

/// A saga whose services react to each other's events by themselves. The orchestrator reads the events, and sends nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Choreography {
    pub definition: choreography::definition::Definition,
    /// As of a [`Start`]: events that the broker stored before the Saga was created are not read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// Where each of its services publishes its events; sorted by service.
    pub sources: Vec<Source>,
}

/// Where the relay of a service publishes its events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    pub service: String,
    pub from: NatsSink,
}

/// A week.
fn default_retention_ms() -> u64 {
    604_800_000
}

/// An event of a service that starts a saga, consumed from the stream to which the service's relay publishes it. The
/// event's `data` is the saga's `input`; its `id` is the idempotency key, so a duplicate starts nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Start {
    pub saga: String,
    /// The `Microservice` that publishes the event, in the orchestrator's namespace; the event's CloudEvents `source` must
    /// be `/NAMESPACE/SERVICE`.
    pub service: String,
    /// CloudEvents `type`.
    pub event_type: String,
    /// Where starting begins, the first time: events that the broker stored earlier start nothing. This is the creation time
    /// of the `Saga` object, so that a new Saga does not start for all past events. From then on the recorded position
    /// counts, also for a Saga that is deleted and applied again. Without it (as in a file written by hand) every event in
    /// the stream counts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// The stream.
    pub from: NatsSink,
}

impl Contract for Orchestrator {
    const KIND: &'static str = "Orchestrator";
}
