//! The contract of `weft inbox`.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Contract, DatabaseLogin, relay::NatsSink};
use crate::domain::version;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Inbox {
    /// Hash of the content, set by [`Inbox::seal`]; the inbox reports it in its status.
    #[serde(default)]
    pub version: String,
    pub namespace: String,
    /// The `Microservice` that consumes.
    pub service: String,
    /// The service's own database, as the role that the service itself has: it holds positions, held events and dead letters.
    pub database: DatabaseLogin,
    /// Sorted by name.
    pub subscriptions: Vec<Subscription>,
}

/// Events of one service, and where they are delivered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Subscription {
    /// Its positions and dead letters are kept under this name. It is also the consumer of `weft.receive` where the inbox calls that
    /// itself.
    pub name: String,
    /// The `Microservice` that publishes the events; their CloudEvents `source` must be `/NAMESPACE/SERVICE`.
    pub from: Publisher,
    /// CloudEvents types; none: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub types: Vec<String>,
    /// Where reading begins, the first time: events that the broker stored earlier are not delivered. From then on the recorded
    /// position counts. Without it every event in the stream is delivered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Timestamp>,
    /// The stream to which the publisher's relay publishes.
    pub stream: NatsSink,
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub target: Target,
    /// How often an event is delivered in vain, while others are delivered, before it becomes a dead letter.
    pub max_attempts: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Publisher {
    pub namespace: String,
    pub service: String,
}

/// What gets the events. Externally tagged: `target: {http: {…}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Target {
    Http(HttpTarget),
    Function(FunctionTarget),
}

/// A POST of each event, in CloudEvents' binary mode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpTarget {
    /// `http://HOST:PORT/PATH`.
    pub url: String,
    /// How long an answer is awaited.
    pub timeout_ms: u64,
}

/// A function of the service's database, called with the event as `jsonb` in one transaction with `weft.receive`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FunctionTarget {
    /// As in the catalog, without quotes. Absent: the first on the role's `search_path` that has the function.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    pub name: String,
}

impl Inbox {
    /// Sets [`Inbox::version`].
    #[must_use]
    pub fn seal(self) -> Self {
        version::seal(self, |inbox| &mut inbox.version)
    }
}

impl Contract for Inbox {
    const KIND: &'static str = "Inbox";
}
