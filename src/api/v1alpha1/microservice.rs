//! `Microservice`: a service with its own database.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::autoscaling::v2::MetricSpec,
    api::core::v1::{EnvFromSource, EnvVar, Probe, ResourceRequirements},
    apimachinery::pkg::apis::meta::v1::Condition,
};
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use super::{
    Consumption,
    database::{Database, DatabaseStatus},
};

/// A service with its own database, and everything it needs to run.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "weft.dev",
    version = "v1alpha1",
    kind = "Microservice",
    namespaced,
    shortname = "ms",
    category = "weft",
    status = "MicroserviceStatus",
    derive = "PartialEq",
    cel,
    doc = "A service with its own database: Weft makes its Deployment, Service and PostgreSQL, applies its migrations before a new version starts, and lets nobody else reach the data.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Replicas", type_ = "string", json_path = ".status.summary.replicas"),
    printcolumn(name = "Database", type_ = "string", json_path = ".status.summary.database"),
    printcolumn(name = "Status", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Consumed", type_ = "integer", priority = 1, json_path = ".status.summary.consumed"),
    printcolumn(name = "Waiting", type_ = "integer", priority = 1, json_path = ".status.summary.waiting"),
    printcolumn(name = "Message", type_ = "string", priority = 1, json_path = r#".status.conditions[?(@.type=="Ready")].message"#),
    validation = Rule::new("size(self.metadata.name) <= 32").message("metadata.name is too long: at most 32 characters, so that the names of its children (NAME-db-setup-HASH) fit into 63"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("metadata.name becomes the name of a Service: lower case letters, digits and '-', beginning with a letter, without dots"),
    validation = Rule::new("!self.metadata.name.endsWith('-db') && !self.metadata.name.endsWith('-relay') && !self.metadata.name.endsWith('-inbox') && !self.metadata.name.endsWith('-orchestrator')").message("metadata.name ends in `-db`, `-relay`, `-inbox` or `-orchestrator`, as the databases, relays, inboxes and orchestrators that Weft makes do: choose another name"),
    validation = Rule::new("!has(self.spec.dependsOn) || self.spec.dependsOn.all(d, d.service != self.metadata.name)").message("spec.dependsOn names this Microservice itself: remove it"),
    validation = Rule::new("!has(self.spec.database) || !has(self.spec.database.sharedWith) || self.spec.database.sharedWith.service != self.metadata.name").message("spec.database.sharedWith.service is this Microservice itself: name the one in whose server the database is, or use spec.database.postgres for a server of its own"),
    validation = Rule::new("has(self.spec.database) == has(oldSelf.spec.database)").message("spec.database cannot be added or removed afterwards: delete the Microservice and apply it again (the volume is kept under `retention: Retain`)")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.commands) || size(self.commands) == 0 || (has(self.ports) && self.ports.exists(p, p.protocol == 'http'))").message("spec.commands needs a port with `protocol: http` in spec.ports to be called on"),
    validation = Rule::new("!has(self.consumes) || size(self.consumes) == 0 || has(self.database)").message("spec.consumes needs spec.database, which holds what was received and the dead letters: add it"),
    validation = Rule::new("!has(self.consumes) || !self.consumes.exists(c, has(c.http)) || (has(self.ports) && self.ports.exists(p, p.protocol == 'http'))").message("spec.consumes needs a port with `protocol: http` in spec.ports to deliver to"),
    validation = Rule::new("!has(self.commands) || self.commands.all(name, name.matches('^[A-Za-z][A-Za-z0-9_-]{0,63}$'))").message("spec.commands has a name that is none: letters, digits, '-' and '_', beginning with a letter, at most 64 characters, such as ReserveCredit"),
    validation = Rule::new("!has(self.ports) || self.ports.all(p, self.ports.exists_one(q, q.port == p.port))").message("spec.ports has the same port number twice: give each port a number of its own"),
    validation = Rule::new("!has(self.ports) || self.ports.all(p, p.port != 9464)").message("spec.ports uses 9464, on which the relay in the same pod answers: choose another port"),
    validation = Rule::new("!has(self.autoscaling) || !has(self.autoscaling.cpu) || (has(self.resources) && ((has(self.resources.requests) && 'cpu' in self.resources.requests) || (has(self.resources.limits) && 'cpu' in self.resources.limits)))").message("spec.autoscaling.cpu is a percentage of spec.resources.requests.cpu: set that too"),
    validation = Rule::new("!has(self.database) || !has(self.dependsOn) || self.dependsOn.all(d, d.service != 'database')").message("spec.dependsOn names `database`, whose variable DATABASE_URL is that of the service's own database: rename that Microservice")
)]
pub struct MicroserviceSpec {
    /// Container image of the service. It must run as a user other than root, given as a number in the image or in `podTemplate`.
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^\S+$"))]
    pub image: String,
    /// Entrypoint, in place of the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128))]
    pub command: Vec<String>,
    /// Arguments, in place of the image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128))]
    pub args: Vec<String>,
    /// How many pods of the service run. `kubectl scale` works on it. With `autoscaling` it has no effect.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
    /// Has a HorizontalPodAutoscaler find how many pods run; then nothing else sets their number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// Ports that the container listens on; each also becomes a port of the Service, which is named like the Microservice.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub ports: Vec<ServicePort>,
    /// Environment variables. Weft adds `DATABASE_URL`, `SERVICE_BINDING_ROOT` and a `SERVICE_URL` for each of `dependsOn`; a variable of the same name here wins.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub env: Vec<EnvVar>,
    /// ConfigMaps and Secrets whose keys become environment variables.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub env_from: Vec<EnvFromSource>,
    /// CPU and memory of the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
    /// Probes of the container. Without a readiness probe, Weft probes the first port: by gRPC health check if it is `grpc`, else by opening it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probes: Option<Probes>,
    /// The service's own database. Leave it out for a service that keeps no data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<Database>,
    /// Other Microservices of the namespace that this one calls. Each gives an environment variable `SERVICE_URL` (`order-history` gives `ORDER_HISTORY_URL`). One that does not exist yet is said in the condition `DependenciesFound`, and stops nothing.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["service".into()]))]
    pub depends_on: Vec<Dependency>,
    /// Events of other Microservices of the namespace that are delivered to this one, by the Microservice that publishes them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["from".into()]))]
    pub consumes: Vec<Consumption>,
    /// What sagas may ask of this service, by the command's name, such as `ReserveCredit`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub commands: BTreeMap<String, Command>,
    /// A partial PodTemplateSpec (`metadata` and `spec`), strategically merged over what Weft makes, last. For what has no field here: tolerations, volumes, a sidecar. The service's container is named `service`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "opaque_object")]
    pub pod_template: Option<serde_json::Value>,
    /// Stop reconciling this object: what exists stays as it is, and changes by hand are left alone.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub suspend: bool,
}

fn one() -> i32 {
    1
}

pub(super) fn opaque_object(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": "object", "x-kubernetes-preserve-unknown-fields": true})
}

/// Between which numbers of pods the autoscaler chooses, and by what: `cpu`, `metrics`, or both.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    cel,
    validation = Rule::new("self.min <= self.max").message("spec.autoscaling.min is larger than spec.autoscaling.max: correct one of them"),
    validation = Rule::new("has(self.cpu) || (has(self.metrics) && size(self.metrics) > 0)").message("spec.autoscaling says between what, but not by what: set spec.autoscaling.cpu, such as 70, or spec.autoscaling.metrics")
)]
pub struct Autoscaling {
    /// Fewest pods.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 1000))]
    pub min: i32,
    /// Most pods.
    #[schemars(range(min = 1, max = 1000))]
    pub max: i32,
    /// CPU that the service's container uses on average, in percent of its request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub cpu: Option<i32>,
    /// Further metrics, in the form of a HorizontalPodAutoscaler (`autoscaling/v2`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub metrics: Vec<MetricSpec>,
}

/// A port of the service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServicePort {
    /// Name of the port: lower case letters, digits and single `-`, beginning with a letter, at most 15 characters.
    #[schemars(length(min = 1, max = 15), regex(pattern = r"^[a-z](-?[a-z0-9])*$"))]
    pub name: String,
    /// Port number, the same in the pod and on the Service.
    #[schemars(range(min = 1, max = 65535))]
    pub port: i32,
    /// What is spoken on it.
    #[serde(default)]
    pub protocol: Protocol,
}

/// What is spoken on a port; it becomes the Service's `appProtocol` and the kind of the default probe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    #[default]
    Http,
    H2c,
    Grpc,
    Tcp,
}

/// Probes of the service's container, in Kubernetes' own terms.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Probes {
    /// Is the pod to get requests?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<Probe>,
    /// Is the container to be restarted?
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub liveness: Option<Probe>,
    /// Has the container started? Until it has, the other probes wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub startup: Option<Probe>,
}

/// Another Microservice of the namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Dependency {
    /// Name of the Microservice.
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub service: String,
}

/// Something that a saga can ask the service to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Command {
    /// The HTTP request that carries the command.
    pub http: HttpCommand,
}

/// A command over HTTP, on the first port with `protocol: http`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HttpCommand {
    /// Method of the request.
    #[serde(default)]
    pub method: HttpMethod,
    /// Path of the request, beginning with `/`. A saga's arguments fill what is in braces: `/orders/{orderId}`.
    #[schemars(length(max = 1024), regex(pattern = r"^/([^\s?#{}]|\{[A-Za-z_][A-Za-z0-9_]*\})*$"))]
    pub path: String,
}

/// HTTP methods of a command. With GET and DELETE arguments are query parameters; the others carry a JSON body.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
pub enum HttpMethod {
    #[default]
    Post,
    Put,
    Patch,
    Get,
    Delete,
}

/// What Weft found and did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct MicroserviceStatus {
    /// The generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`, `Reconciling`, `Stalled`, `Accepted`, `DatabaseReady`, `Migrated`, `SharedDatabase` where services share a database, `DependenciesFound`, `Consuming` with `consumes`, and while others interfere `Contested` and `Drifted`, each with a reason and a sentence.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Pods of the service that exist.
    #[serde(default)]
    pub replicas: i32,
    /// Label selector of the service's pods, for the scale sub-resource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// The database, once it is planned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<DatabaseStatus>,
    /// The Secret that binds applications to the database, as the Service Binding specification has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binding: Option<Binding>,
    /// What `kubectl get` shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summary: Option<MicroserviceSummary>,
    /// Digest of the children as they were applied: an operator that starts finds by it whether any of them changed meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied_hash: Option<String>,
}

/// Columns of `kubectl get ms`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MicroserviceSummary {
    /// Ready pods of wanted pods, such as `2/3`.
    pub replicas: String,
    /// Engine and version, or where the database is: `postgres 17`, `external`, `in customers`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<String>,
    /// Events that the service has handled, of all its subscriptions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consumed: Option<i64>,
    /// Events that are published and not handled yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<i64>,
}

/// Reference to a Secret of the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Binding {
    /// Name of the Secret.
    pub name: String,
}
