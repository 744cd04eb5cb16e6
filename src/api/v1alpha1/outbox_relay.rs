//! `OutboxRelay`: how a service's transactional outbox reaches the broker.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema, core::Duration};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How a service's transactional outbox reaches the broker.
#[derive(CustomResource, Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "weft.dev",
    version = "v1alpha1",
    kind = "OutboxRelay",
    plural = "outboxrelays",
    namespaced,
    shortname = "relay",
    shortname = "relays",
    category = "weft",
    status = "OutboxRelayStatus",
    derive = "PartialEq",
    cel,
    doc = "The transactional outbox of a Microservice: the service writes its rows and an outbox row in one local transaction, and a relay publishes the row to the broker, at least once, in order within each aggregate.",
    printcolumn(name = "Service", type_ = "string", json_path = ".spec.microservice"),
    printcolumn(name = "Mode", type_ = "string", json_path = ".spec.mode"),
    printcolumn(name = "Sink", type_ = "string", json_path = ".status.sink"),
    printcolumn(name = "Published", type_ = "integer", json_path = ".status.published"),
    printcolumn(name = "Pending", type_ = "integer", json_path = ".status.pending"),
    printcolumn(name = "Lag", type_ = "string", json_path = ".status.lag.summary"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Leader", type_ = "string", priority = 1, json_path = ".status.leader"),
    printcolumn(name = "Held", type_ = "integer", priority = 1, json_path = ".status.held"),
    printcolumn(name = "Dead", type_ = "integer", priority = 1, json_path = ".status.deadLetters"),
    printcolumn(name = "Message", type_ = "string", priority = 1, json_path = r#".status.conditions[?(@.type=="Ready")].message"#),
    validation = Rule::new("!has(self.spec.sink.http) || !has(self.spec.sink.http.batch) || (has(self.spec.format) && self.spec.format == 'CloudEventsStructured')").message("spec.sink.http.batch needs spec.format CloudEventsStructured, since a batch is a JSON array of such events: set it, or leave the batch out"),
    validation = Rule::new("size(self.metadata.name) <= 32").message("metadata.name is too long: at most 32 characters, so that the names of its children fit into 63"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("metadata.name becomes part of a ConfigMap's name: lower case letters, digits and '-', beginning with a letter, without dots")
)]
#[serde(rename_all = "camelCase")]
pub struct OutboxRelaySpec {
    /// The Microservice whose outbox it is. One outbox has one relay.
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.microservice cannot change: make another OutboxRelay for the other Microservice"))]
    pub microservice: String,
    /// How committed rows are found.
    #[serde(default)]
    pub mode: RelayMode,
    /// Where the events are in the database.
    #[serde(default)]
    pub outbox: Outbox,
    /// The broker that gets the events.
    pub sink: RelaySink,
    /// Form of the published messages. `CloudEvents` (binary mode): the payload, with the attributes as headers `ce-…`.
    /// `CloudEventsStructured`: one JSON object with the attributes and the payload as `data`. `Raw`: the payload, with the
    /// headers `event-id` and `event-key`; it starts no saga.
    #[serde(default)]
    pub format: EventFormat,
    /// Where the relay runs.
    #[serde(default)]
    pub placement: Placement,
    /// What becomes of an event once the broker has it.
    #[serde(default)]
    pub retention: OutboxRetention,
    /// When an event that the broker refuses is given up: it moves to the dead letters (`weft.relay_dead` in the service's database) with its cause, and what waits behind it in its aggregate goes on. Left out, it is held, with those behind it, until the broker accepts it or a person skips it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dead_letter: Option<DeadLetter>,
    /// Publish nothing until set back; rows wait in the outbox.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
}

/// How the relay finds committed rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RelayMode {
    /// By streaming the transaction log (logical replication). The lowest latency and cost.
    #[default]
    LogTailing,
    /// By asking the table, woken by `NOTIFY`. Needs no replication slot.
    Polling,
}

/// Where the service writes its events.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.layout != 'Weft' || (!has(self.table) && !has(self.columns) && !has(self.values) && self.existing == 'Skip')").message("spec.outbox: the layout Weft has a table of its own: leave table, columns, values and existing out, or choose another layout"),
    validation = Rule::new("self.layout != 'Custom' || (has(self.table) && has(self.columns))").message("spec.outbox: the layout Custom needs table and columns"),
    validation = Rule::new("self.layout == 'Custom' || !has(self.columns)").message("spec.outbox: only the layout Custom has columns, the others know theirs"),
    validation = Rule::new("self.layout == 'Custom' || !has(self.values) || (!has(self.values.aggregateType) && !has(self.values.type))").message("spec.outbox.values: only the layout Custom has values for aggregateType and type, the others have columns"),
    validation = Rule::new("self.layout != 'Custom' || !has(self.columns) || (has(self.columns.aggregateType) != (has(self.values) && has(self.values.aggregateType)))").message("spec.outbox: give aggregateType either in columns or in values"),
    validation = Rule::new("self.layout != 'Custom' || !has(self.columns) || (has(self.columns.type) != (has(self.values) && has(self.values.type)))").message("spec.outbox: give type either in columns or in values")
)]
pub struct Outbox {
    /// The table's form.
    #[serde(default)]
    pub layout: OutboxLayout,
    /// The table, as `SCHEMA.NAME`, both exactly as in the catalog and without quotes. Left out: `public.outbox` (Debezium) or
    /// `eventuate.message` (Eventuate).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 127), regex(pattern = r"^[^.]{1,63}\..{1,63}$"))]
    pub table: Option<String>,
    /// The columns that the parts of an event are read from (Custom only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<OutboxColumns>,
    /// What has no column, because it is the same for all rows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<OutboxValues>,
    /// What becomes of rows that are in the table when Weft begins to follow it.
    #[serde(default)]
    pub existing: ExistingRows,
}

/// The outbox table's form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OutboxLayout {
    /// Weft's own table `weft.outbox` (`aggregate_type`, `aggregate_id`, `type`, `payload`, `headers`), which set-up makes.
    #[default]
    Weft,
    /// The table of Debezium's outbox event router: `id`, `aggregatetype`, `aggregateid`, `type`, `payload`; every other column becomes a header.
    Debezium,
    /// The table `message` of Eventuate Tram.
    Eventuate,
    /// Any table, by `columns`.
    Custom,
}

/// Columns of the team's table, by what they hold. Names exactly as in the catalog, without quotes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutboxColumns {
    /// The event's id: text, uuid, a number or an enum.
    #[schemars(length(min = 1, max = 63))]
    pub id: String,
    /// The kind of thing that the event is about, unless `values` has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub aggregate_type: Option<String>,
    /// What the event is about: events of one aggregate are published in order.
    #[schemars(length(min = 1, max = 63))]
    pub aggregate_id: String,
    /// The event's type, unless `values` has it.
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub kind: Option<String>,
    /// The payload: jsonb, json, text or bytea.
    #[schemars(length(min = 1, max = 63))]
    pub payload: String,
    /// The headers, a JSON object: jsonb, json or text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub headers: Option<String>,
    /// The payload's media type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub content_type: Option<String>,
    /// The event's time: timestamptz, timestamp (in UTC) or bigint (milliseconds since 1970). Left out: that of the transaction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub created_at: Option<String>,
}

/// What all rows of the team's table have in common.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutboxValues {
    /// The kind of thing that all events are about (Custom only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub aggregate_type: Option<String>,
    /// The type of all events (Custom only).
    #[serde(default, rename = "type", skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 256))]
    pub kind: Option<String>,
    /// Media type of the payloads, such as `application/avro`, where no column says another one. Left out: `application/json` for jsonb, json and text that is JSON, `text/plain` for other text, `application/octet-stream` for bytea.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128), regex(pattern = r"^[!-~]+/[!-~]+$"))]
    pub content_type: Option<String>,
}

/// What becomes of rows that are in the team's table when Weft begins to follow it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ExistingRows {
    /// They are not published: somebody else has done so.
    #[default]
    Skip,
    /// They are published, once, before those that come later.
    Publish,
}

/// The broker that gets the events: exactly one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("[has(self.nats), has(self.kafka), has(self.rabbitmq), has(self.redis), has(self.http)].filter(given, given).size() == 1").message("spec.sink names no broker, or more than one: give one of nats, kafka, rabbitmq, redis and http"))]
pub struct RelaySink {
    /// A NATS JetStream stream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nats: Option<NatsSink>,
    /// An exchange of RabbitMQ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rabbitmq: Option<RabbitMqSink>,
    /// Streams of Redis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub redis: Option<RedisSink>,
    /// An HTTP endpoint that accepts CloudEvents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<HttpSink>,
    /// A Kafka cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kafka: Option<KafkaSink>,
}

impl RelaySink {
    /// The broker's kind, as the field is called.
    pub fn kind(&self) -> &'static str {
        match self {
            Self { nats: Some(_), .. } => "nats",
            Self { rabbitmq: Some(_), .. } => "rabbitmq",
            Self { redis: Some(_), .. } => "redis",
            Self { http: Some(_), .. } => "http",
            Self { kafka: Some(_), .. } => "kafka",
            Self { nats: None, kafka: None, rabbitmq: None, redis: None, http: None } => "none",
        }
    }

    /// The Secret that the relay reads credentials and certificates from.
    pub fn secret(&self) -> Option<&str> {
        let Self { nats, kafka, rabbitmq, redis, http } = self;
        let secrets = [
            nats.as_ref().map(|sink| &sink.secret),
            kafka.as_ref().map(|sink| &sink.secret),
            rabbitmq.as_ref().map(|sink| &sink.secret),
            redis.as_ref().map(|sink| &sink.secret),
            http.as_ref().map(|sink| &sink.secret),
        ];
        secrets.into_iter().flatten().find_map(Option::as_deref)
    }
}

/// A Kafka cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct KafkaSink {
    /// Addresses of brokers of one cluster, such as `kafka-bootstrap.messaging:9092`; the others are learned from them.
    #[schemars(
        length(min = 1, max = 16),
        inner(length(max = 512), regex(pattern = r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}$"))
    )]
    pub servers: Vec<String>,
    /// Connect with TLS.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tls: bool,
    /// A Secret with any of `username` and `password` (SASL), `ca.crt`, `tls.crt` and `tls.key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub secret: Option<String>,
    /// The SASL mechanism by which `username` and `password` of the Secret are used.
    #[serde(default)]
    pub mechanism: KafkaMechanism,
    /// Topic of each event, with the placeholders of a subject; other characters of a value than letters, digits, `_` and `-` become `_` and two digits. A topic that is missing is made by the broker, where it is set up so, or by a person.
    #[serde(default = "default_topic")]
    #[schemars(
        length(min = 1, max = 249),
        regex(
            pattern = r"^([A-Za-z0-9._-]|\{(namespace|service|aggregate_type|aggregate_id|type|header:[A-Za-z0-9_-]+)\})+$"
        )
    )]
    pub topic: String,
}

fn default_topic() -> String {
    "{namespace}.{service}.{aggregate_type}".to_owned()
}

/// A SASL mechanism.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KafkaMechanism {
    /// PLAIN. Without TLS, the password can be read on the way.
    Plain,
    /// SCRAM-SHA-256.
    ScramSha256,
    /// SCRAM-SHA-512.
    #[default]
    ScramSha512,
}

/// An exchange of RabbitMQ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RabbitMqSink {
    /// Addresses of the nodes of one cluster, such as `amqp://rabbitmq.messaging:5672`, or `amqps://…` with TLS. The first that answers is used.
    #[schemars(
        length(min = 1, max = 16),
        inner(length(max = 512), regex(pattern = r"^amqps?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?$"))
    )]
    pub servers: Vec<String>,
    /// A Secret with any of `username` and `password`, `ca.crt`, `tls.crt` and `tls.key`. With a certificate and without a user, the login is by the certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub secret: Option<String>,
    /// The virtual host.
    #[serde(default = "default_virtual_host")]
    #[schemars(length(min = 1, max = 255))]
    pub virtual_host: String,
    /// The exchange that events go to. It is made when missing, as a durable topic exchange, and never altered.
    #[serde(default = "default_exchange")]
    #[schemars(length(min = 1, max = 127), regex(pattern = r"^[A-Za-z0-9._:-]+$"))]
    pub exchange: String,
    /// Routing key of each event. `{namespace}`, `{service}`, `{aggregate_type}`, `{aggregate_id}`, `{type}` and `{header:NAME}` are replaced as in a subject.
    #[serde(default = "default_routing_key")]
    #[schemars(
        length(min = 1, max = 256),
        regex(
            pattern = r"^([A-Za-z0-9._:~/-]|\{(namespace|service|aggregate_type|aggregate_id|type|header:[A-Za-z0-9_-]+)\})+$"
        )
    )]
    pub routing_key: String,
    /// What becomes of an event that no queue gets.
    #[serde(default)]
    pub unroutable: Unroutable,
}

/// What becomes of an event that no queue gets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Unroutable {
    /// It is held, with those behind it in its aggregate, until a queue is bound for it.
    #[default]
    Hold,
    /// It counts as published.
    Drop,
}

fn default_virtual_host() -> String {
    "/".to_owned()
}

fn default_exchange() -> String {
    "events".to_owned()
}

fn default_routing_key() -> String {
    "{namespace}.{service}.{aggregate_type}.{type}".to_owned()
}

/// Streams of Redis.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RedisSink {
    /// Addresses of the primary and, where it has any, its replicas, such as `redis://redis.messaging:6379`, or `rediss://…` with TLS. Events go to the one that is the primary.
    #[schemars(
        length(min = 1, max = 16),
        inner(length(max = 512), regex(pattern = r"^rediss?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?$"))
    )]
    pub servers: Vec<String>,
    /// A Secret with any of `username` and `password`, `ca.crt`, `tls.crt` and `tls.key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub secret: Option<String>,
    /// Key of the stream of each event. `{namespace}`, `{service}`, `{aggregate_type}`, `{aggregate_id}`, `{type}` and `{header:NAME}` are replaced as in a subject.
    #[serde(default = "default_redis_stream")]
    #[schemars(
        length(min = 1, max = 256),
        regex(
            pattern = r"^([A-Za-z0-9._:~/-]|\{(namespace|service|aggregate_type|aggregate_id|type|header:[A-Za-z0-9_-]+)\})+$"
        )
    )]
    pub stream: String,
    /// About how many entries a stream keeps: each new one trims the oldest beyond it, read or not. Left out, a stream grows until somebody trims it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1))]
    pub max_length: Option<i64>,
}

fn default_redis_stream() -> String {
    "events:{namespace}:{service}:{aggregate_type}".to_owned()
}

/// An HTTP endpoint that accepts CloudEvents: a Knative broker, a webhook, a gateway.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpSink {
    /// Where each event is sent with POST. In the path, `{namespace}`, `{service}`, `{aggregate_type}`, `{aggregate_id}`, `{type}` and `{header:NAME}` are replaced as in a subject.
    #[schemars(
        length(max = 512),
        regex(
            pattern = r"^https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?(/([A-Za-z0-9._~!$&'()*+,;=:@%/-]|\{(namespace|service|aggregate_type|aggregate_id|type|header:[A-Za-z0-9_-]+)\})*)?$"
        )
    )]
    pub url: String,
    /// A Secret with any of `token` (a bearer token), `username` and `password`, `ca.crt`, `tls.crt` and `tls.key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub secret: Option<String>,
    /// Send several events in one request, in CloudEvents' batched content mode. Needs `format: CloudEventsStructured`. Left out, each event is a request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<HttpBatch>,
}

/// Several events in one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpBatch {
    /// How many events a request has at most. They are of different aggregates, and what waits is sent at once, so that a request of a quiet service has one.
    #[schemars(range(min = 2, max = 1000))]
    pub max: i32,
}

/// A NATS JetStream stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.secret) || has(self.servers)").message("spec.sink.nats.secret is for servers of your own: name them in spec.sink.nats.servers, or leave the secret out"))]
pub struct NatsSink {
    /// Addresses of the servers of one cluster, such as `nats://nats.messaging:4222`, or `tls://…` with TLS. Left out, the broker that is installed with Weft, in which each namespace has an account of its own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(length(max = 512), regex(pattern = r"^(nats|tls)://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:[0-9]{1,5})?$"))
    )]
    pub servers: Vec<String>,
    /// A Secret with any of `nats.creds`, `username` and `password`, `token`, `ca.crt`, `tls.crt` and `tls.key`. For servers of your own only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub secret: Option<String>,
    /// Name of the stream. It is made when missing and never altered.
    #[serde(default = "default_stream")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[A-Za-z0-9_-]+$"))]
    pub stream: String,
    /// Subject of each event. `{namespace}` and `{service}` are replaced by those of the Microservice, `{aggregate_type}`, `{aggregate_id}`, `{type}` and `{header:NAME}` by the row's values.
    #[serde(default = "default_subject")]
    #[schemars(
        length(min = 1, max = 256),
        regex(
            pattern = r"^[A-Za-z0-9_-]+(\.([A-Za-z0-9_-]|\{(namespace|service|aggregate_type|aggregate_id|type|header:[A-Za-z0-9_-]+)\})+)*$"
        )
    )]
    pub subject: String,
    /// How long the stream keeps an event; `0s`: for ever, which some day fills the broker's volume. Used when the relay makes the stream; a stream that exists is left as it is.
    #[serde(default = "default_max_age")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && (duration(self) == duration('0s') || (duration(self) >= duration('1m') && duration(self) <= duration('87600h')))").message("spec.sink.nats.maxAge must be a duration such as 24h or 168h, at least 1m and at most 87600h, or 0s"))]
    pub max_age: Duration,
}

fn default_max_age() -> Duration {
    std::time::Duration::from_hours(168).into()
}

fn default_stream() -> String {
    "events".to_owned()
}

fn default_subject() -> String {
    "events.{namespace}.{service}.{aggregate_type}.{type}".to_owned()
}

/// Form of the published messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum EventFormat {
    /// CloudEvents 1.0 in binary mode: attributes in headers (`ce-id`, `ce-type`, …), the payload as the body.
    #[default]
    CloudEvents,
    /// CloudEvents 1.0 in structured mode: the body is a JSON object with the attributes and the payload.
    CloudEventsStructured,
    /// The payload alone as the body, with the headers `event-id`, `event-key` and `content-type`.
    Raw,
}

/// Where the relay runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Placement {
    /// As a native sidecar of the service's pods; one of them leads, the others stand by.
    #[default]
    Sidecar,
    /// In a pod of its own, for a service of many pods, of which each would hold a connection to the database.
    Standalone,
}

/// What becomes of an event once the broker has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutboxRetention {
    /// How long a published event is kept in the service's database (`weft.relay_published`), from where `weft relay replay` publishes it again; `0s`: not at all. The outbox itself never has what is published.
    #[serde(default = "not_at_all")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && (duration(self) == duration('0s') || (duration(self) >= duration('1m') && duration(self) <= duration('87600h')))").message("spec.retention.after must be a duration such as 24h or 168h, from 1m to 87600h, or 0s"))]
    pub after: Duration,
}

fn not_at_all() -> Duration {
    std::time::Duration::ZERO.into()
}

impl Default for OutboxRetention {
    fn default() -> Self {
        Self { after: not_at_all() }
    }
}

/// When an event that the broker refuses is given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeadLetter {
    /// How often the broker may refuse an event, the first time included. Attempts are 1, 2, 4, 8, 16 and then 30 seconds apart.
    #[schemars(range(min = 1, max = 1000))]
    pub max_attempts: i32,
}

/// What Weft found and did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct OutboxRelayStatus {
    /// The generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`, `Reconciling`, `Stalled`, `Accepted`, `SlotAtRisk`, each with a reason and a sentence.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Kind of the sink, such as `nats`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sink: Option<String>,
    /// The pod whose relay publishes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leader: Option<String>,
    /// Events that the broker has acknowledged, since the relay was made.
    #[serde(default)]
    pub published: i64,
    /// Events that wait in the outbox.
    #[serde(default)]
    pub pending: i64,
    /// Of these, events that the broker refuses, and those that wait behind them in their aggregates.
    #[serde(default)]
    pub held: i64,
    /// Events that were given up: `weft relay list` shows them.
    #[serde(default)]
    pub dead_letters: i64,
    /// How far the relay is behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag: Option<Lag>,
    /// The time from the commit of an event until the broker had acknowledged it. The events of the last minute; left out when there were none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latency: Option<Latency>,
    /// Commit position of the last acknowledged event: an LSN, such as `0/16B3748`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub position: Option<String>,
    /// When the broker last acknowledged an event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_published_time: Option<Time>,
    /// Digest of the children as they were applied: an operator that starts finds by it whether any of them changed meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied_hash: Option<String>,
}

/// Percentiles of a latency, at most an eighth too high.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Latency {
    /// Half of the events were acknowledged within this time, in seconds.
    pub p50_seconds: f64,
    /// 99 of 100 events were acknowledged within this time, in seconds.
    pub p99_seconds: f64,
}

/// How far the relay is behind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Lag {
    /// Age of the oldest event that waits, in seconds.
    pub seconds: f64,
    /// Transaction log that the server keeps for the relay, in bytes (log tailing only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<i64>,
    /// What `kubectl get` shows, such as `0s`.
    pub summary: String,
}
