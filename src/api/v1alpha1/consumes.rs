//! `Microservice.spec.consumes`: events of other services.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{KubeSchema, core::Duration};
use serde::{Deserialize, Serialize};

/// Events of one Microservice, delivered to this one: each once, in order per aggregate, whichever of its replicas gets it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    cel,
    validation = Rule::new("has(self.http) != has(self.function)").message("spec.consumes: give each entry either http, such as {path: /events}, or function, such as orders.on_credit_reserved")
)]
pub struct Consumption {
    /// Microservice of the namespace that publishes the events. One that does not exist yet, or has no OutboxRelay, is said in the condition `Consuming`, and stops nothing.
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub from: String,
    /// Types of events, such as `OrderCreated`. All of them when left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 255)))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub types: Vec<String>,
    /// Each event is a POST of a CloudEvent (binary mode) to the service. 2xx: handled. 409, 413, 422, or the header `Weft-Reject`: refused for good. Anything else: delivered again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<ConsumerHttp>,
    /// Each event is handed to a function of the service's database, `SCHEMA.NAME(event jsonb)`, in one transaction with `weft.receive`; without a schema it is the service's own (`public`, unless the database is shared). SQLSTATE `WEFTR` refuses an event for good.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 127), regex(pattern = r"^[a-z_][a-z0-9_]{0,62}(\.[a-z_][a-z0-9_]{0,62})?$"))]
    pub function: Option<String>,
    /// Events that were published earlier are not delivered, such as `2026-11-27T10:00:00Z`. When left out: the creation of this Microservice. It counts only until the first event is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// When an event is given up.
    #[serde(default)]
    pub dead_letter: ConsumerDeadLetter,
}

/// Where a service gets events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(cel)]
pub struct ConsumerHttp {
    /// Path of the request, beginning with `/`, on the first port with `protocol: http`.
    #[schemars(length(max = 1024), regex(pattern = r"^/[^\s?#]*$"))]
    pub path: String,
    /// How long an answer is awaited.
    #[serde(default = "default_timeout")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) >= duration('100ms') && duration(self) <= duration('10m')").message("spec.consumes: http.timeout must be a duration such as 30s, from 100ms to 10m"))]
    pub timeout: Duration,
}

fn default_timeout() -> Duration {
    std::time::Duration::from_secs(30).into()
}

/// When an event becomes a dead letter, which `weft inbox dead` lists, retries and deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConsumerDeadLetter {
    /// How often an event is delivered in vain while the service handles others; with growing pauses, twenty times take about a quarter of an hour.
    #[serde(default = "default_max_attempts")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_attempts: i32,
}

fn default_max_attempts() -> i32 {
    20
}

impl Default for ConsumerDeadLetter {
    fn default() -> Self {
        Self { max_attempts: default_max_attempts() }
    }
}
