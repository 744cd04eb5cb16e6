//! The contract of `weft relay`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Contract, DatabaseLogin};
use crate::domain::version;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Relay {
    /// The `OutboxRelay`'s name; also names its checkpoint in the database.
    pub name: String,
    /// Hash of the content except `paused`, set by [`Relay::seal`]; the relay reports it in its status.
    #[serde(default)]
    pub version: String,
    pub namespace: String,
    /// The `Microservice` whose outbox it is; CloudEvents `source` is `/NAMESPACE/SERVICE`.
    pub service: String,
    pub mode: Mode,
    pub source: DatabaseLogin,
    #[serde(with = "serde_yaml::with::singleton_map")]
    pub sink: Sink,
    #[serde(default)]
    pub format: Format,
    /// How long published events are kept in `weft.relay_published`, in milliseconds; 0: not at all.
    #[serde(default)]
    pub keep_published_ms: u64,
    /// Without it a refused event is held until the broker accepts it, or a person skips it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_letter: Option<DeadLetter>,
    /// Keep connections and leadership, publish nothing.
    #[serde(default)]
    pub paused: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mode {
    /// Streaming replication of the outbox table (pgoutput).
    LogTailing,
    /// Snapshot-window queries, notified by `LISTEN`.
    Polling,
}

/// Where events go. Externally tagged: `sink: {nats: {…}}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Sink {
    Nats(NatsSink),
    Http(HttpSink),
    Kafka(KafkaSink),
    Redis(RedisSink),
    #[serde(rename = "rabbitmq")]
    RabbitMq(RabbitMqSink),
}

/// A Kafka cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KafkaSink {
    /// `HOST:PORT` of brokers of one cluster.
    pub servers: Vec<String>,
    #[serde(default)]
    pub tls: bool,
    /// Folder with a file for each key of the Secret; read again for each new connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_folder: Option<PathBuf>,
    /// How the login of the Secret is used.
    #[serde(default)]
    pub mechanism: Mechanism,
    /// Topic template, with the placeholders of [`NatsSink::subject`].
    pub topic: String,
}

/// A SASL mechanism.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mechanism {
    Plain,
    ScramSha256,
    #[default]
    ScramSha512,
}

impl Mechanism {
    /// Its registered name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
        }
    }
}

/// An exchange of RabbitMQ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RabbitMqSink {
    /// `amqp://HOST:PORT` or `amqps://HOST:PORT`, of the nodes of one cluster.
    pub servers: Vec<String>,
    /// Folder with a file for each key of the Secret; read again for each new connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_folder: Option<PathBuf>,
    pub virtual_host: String,
    /// A durable topic exchange, declared when missing, never altered.
    pub exchange: String,
    /// Template of the routing key.
    pub routing_key: String,
    #[serde(default)]
    pub unroutable: Unroutable,
}

/// What becomes of an event that no queue gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unroutable {
    /// It is held as refused.
    #[default]
    Hold,
    /// It counts as published.
    Drop,
}

/// Streams of Redis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RedisSink {
    /// `redis://HOST:PORT` or `rediss://HOST:PORT`, of one primary and its replicas.
    pub servers: Vec<String>,
    /// Folder with a file for each key of the Secret; read again for each new connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_folder: Option<PathBuf>,
    /// Template of the stream's key.
    pub stream: String,
    /// Entries that a stream keeps, about; `None` keeps all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_length: Option<u64>,
}

/// An endpoint that accepts CloudEvents.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HttpSink {
    /// Template of the URL, with placeholders in the path.
    pub url: String,
    /// Most events of a request, in CloudEvents' batched content mode, which is for [`Format::CloudEventsStructured`]; `None`: each event is
    /// a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<usize>,
    /// Folder with a file for each key of the Secret; read again for each new connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_folder: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NatsSink {
    /// `nats://HOST:PORT` or `tls://HOST:PORT`, of the servers of one cluster.
    pub servers: Vec<String>,
    /// Folder with a file for each key of the Secret; read again for each new connection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_folder: Option<PathBuf>,
    /// Prefix of the subjects on which a publisher's requests are answered, where the account permits no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbox_prefix: Option<String>,
    /// JetStream stream; created when missing (file storage, subjects from [`NatsSink::subject`] with `*` for each
    /// placeholder), never altered.
    pub stream: String,
    /// Subject template. Placeholders: `{namespace}`, `{service}` (the outbox's), `{aggregate_type}`, `{aggregate_id}`, `{type}`,
    /// `{header:NAME}` (the row's).
    pub subject: String,
    /// How long a stream that the relay creates keeps an event; 0 keeps it forever.
    #[serde(default = "default_max_age")]
    pub max_age_seconds: u64,
}

/// One week, the default of OutboxRelay.
fn default_max_age() -> u64 {
    7 * 24 * 3600
}

/// How an event is written as a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// CloudEvents in binary mode: attributes in headers, the payload as the body.
    #[default]
    CloudEvents,
    /// CloudEvents in structured mode: one JSON object.
    CloudEventsStructured,
    /// The payload as the body; `event-id`, `event-key` and `content-type` as headers.
    Raw,
}

/// When an event is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetter {
    /// How often the broker may refuse an event, the first time included.
    pub max_attempts: u32,
}

impl Sink {
    /// The folder of the Secret.
    pub fn secret_folder(&self) -> Option<&Path> {
        match self {
            Self::Nats(sink) => sink.secret_folder.as_deref(),
            Self::Http(sink) => sink.secret_folder.as_deref(),
            Self::Kafka(sink) => sink.secret_folder.as_deref(),
            Self::Redis(sink) => sink.secret_folder.as_deref(),
            Self::RabbitMq(sink) => sink.secret_folder.as_deref(),
        }
    }
}

impl Relay {
    /// Sets [`Relay::version`].
    #[must_use]
    pub fn seal(self) -> Self {
        let content = Self { version: String::new(), paused: false, ..self.clone() };
        Self { version: version::of(&content), ..self }
    }
}

impl Contract for Relay {
    const KIND: &'static str = "Relay";
}
