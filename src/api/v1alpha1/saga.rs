//! `Saga`: a business transaction over several services.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema, core::Duration};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A business transaction over several services, with compensations.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "weft.dev",
    version = "v1alpha1",
    kind = "Saga",
    namespaced,
    shortname = "sg",
    category = "weft",
    status = "SagaStatus",
    derive = "PartialEq",
    cel,
    doc = "A business transaction over several services: steps that each ask a service to act, and how to undo them. The definition is here; its instances live in the orchestrator's database.",
    printcolumn(name = "Style", type_ = "string", json_path = ".spec.style"),
    printcolumn(name = "Steps", type_ = "integer", json_path = ".status.steps"),
    printcolumn(name = "Running", type_ = "integer", json_path = ".status.running"),
    printcolumn(name = "Completed", type_ = "integer", json_path = ".status.completed"),
    printcolumn(name = "Compensated", type_ = "integer", json_path = ".status.compensated"),
    printcolumn(name = "Stuck", type_ = "integer", json_path = ".status.stuck"),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Orchestrator", type_ = "string", priority = 1, json_path = ".spec.orchestrator"),
    printcolumn(name = "Message", type_ = "string", priority = 1, json_path = r#".status.conditions[?(@.type=="Ready")].message"#),
    validation = Rule::new("size(self.metadata.name) <= 63").message("metadata.name is too long: at most 63 characters"),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')").message("metadata.name becomes part of a URL and of idempotency keys: lower case letters, digits and '-', beginning with a letter, without dots")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.style == 'Choreography' || (has(self.steps) && !has(self.reactions) && !has(self.completes) && !has(self.compensates))").message("a saga of `style: Orchestration` has `steps`, and none of `reactions`, `completes` and `compensates`"),
    validation = Rule::new("self.style == 'Orchestration' || (has(self.startOn) && has(self.reactions) && has(self.completes) && !has(self.steps) && !has(self.input) && !has(self.key) && !has(self.onCompensated) && !has(self.output))").message("a saga of `style: Choreography` has `startOn`, `reactions` and `completes`, and none of `steps`, `input`, `key`, `onCompensated` and `output`"),
    validation = Rule::new("!has(self.steps) || self.steps.filter(s, has(s.pivot) && s.pivot).size() <= 1").message("spec.steps has more than one `pivot: true`: a saga has one point of no return")
)]
pub struct SagaSpec {
    /// Who coordinates.
    #[serde(default)]
    pub style: SagaStyle,
    /// Sagas of a namespace that name the same orchestrator share one (`NAME-orchestrator`: a Deployment, a Service and a database).
    #[serde(default = "default_orchestrator")]
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.orchestrator cannot change: running instances live in its database; make another Saga"))]
    pub orchestrator: String,
    /// An event that starts the saga. With orchestration it is optional, and its data is the saga's input; with choreography it is the one to which the first reactions are declared. Because it goes through the service's outbox, starting is atomic with the service's own transaction. An orchestrated saga can always be started over HTTP too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_on: Option<SagaEvent>,
    /// JSON Schema (2020-12 unless `$schema` says otherwise) of the input, at most 16 KiB and without `$ref`. What does not fit is refused: with 400 over HTTP, and an event that does not fit is a dead start. Expressions that read a property which it does not list are refused when the Saga is applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(schema_with = "super::microservice::opaque_object")]
    pub input: Option<serde_json::Value>,
    /// The business key by which instances are found (`weft saga list NAME --key ORDER-1`): a CEL expression over `input`, such as `input.orderId`, that gives a string or a number of at most 256 bytes. An input without one starts nothing. Several instances may have the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1000))]
    pub key: Option<String>,
    /// With orchestration, the time from the start after which a saga that has not passed its pivot is compensated. With choreography each reaction has its own time, `within`.
    #[serde(default = "default_deadline")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) <= duration('8760h')").message("spec.deadline must be a duration such as 100ms, 2s or 1h30m, at most 8760h"))]
    pub deadline: Duration,
    /// How long instances that have ended are kept, with their histories and idempotency keys, after which they are deleted; the Sagas of one orchestrator share the longest. An instance that has not ended is kept.
    #[serde(default = "default_retention")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) >= duration('10m') && duration(self) <= duration('8760h')").message("spec.retention must be a duration such as 24h or 168h, from 10m to 8760h"))]
    pub retention: Duration,
    /// With orchestration, what is done, in order. Compensation undoes it in reverse.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub steps: Vec<SagaStep>,
    /// With choreography, which service reacts to which event by which others. Weft only watches: from the events it knows who owes the next one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 64))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub reactions: Vec<SagaReaction>,
    /// With choreography, the events with which the saga ends well.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["service".into(), "event".into()]))]
    pub completes: Vec<SagaEvent>,
    /// With choreography, the events with which the saga ends undone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["service".into(), "event".into()]))]
    pub compensates: Vec<SagaEvent>,
    /// Command to call once everything is undone, until it succeeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_compensated: Option<SagaCommand>,
    /// What a completed instance shows to those who start sagas (never in a status): members, each a CEL expression over `input` and `steps.NAME.reply`, evaluated once at the end. If one has no value then, the instance completes without an output, and its history says why.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub output: BTreeMap<String, String>,
}

impl SagaSpec {
    /// What the steps of all levels have, in order.
    pub fn tasks(&self) -> Vec<&SagaTask> {
        let mut tasks = Vec::new();
        for SagaStep { task, pivot: _, all, steps, otherwise } in &self.steps {
            tasks.push(task);
            for SagaBranch { task, steps } in all {
                tasks.push(task);
                tasks.extend(steps.iter().map(|step| &step.task));
            }
            tasks.extend(steps.iter().chain(otherwise).map(|step| &step.task));
        }
        tasks
    }
}

fn default_orchestrator() -> String {
    "default".to_owned()
}

fn default_deadline() -> Duration {
    std::time::Duration::from_mins(5).into()
}

/// 168h, of a Saga that does not say another.
pub fn default_retention() -> Duration {
    std::time::Duration::from_hours(168).into()
}

/// Who coordinates a saga.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SagaStyle {
    /// An orchestrator asks the services to act and to undo.
    #[default]
    Orchestration,
    /// The services react to each other's events by themselves; Weft watches them.
    Choreography,
}

/// An event of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SagaEvent {
    /// The Microservice that emits the event; it needs an OutboxRelay.
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub service: String,
    /// Type of the event, such as `OrderCreated`.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9._-]+$"))]
    pub event: String,
}

/// A service reacts to an event by another one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SagaReaction {
    /// The event that is reacted to.
    pub to: SagaEvent,
    /// Further events that the service waits for: the reaction is due once all of them, and `to`, have occurred, once per instance.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub and: Vec<SagaEvent>,
    /// The Microservice that reacts; it needs an OutboxRelay.
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub service: String,
    /// Types of events, of which it emits one.
    #[schemars(length(min = 1, max = 16), inner(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9._-]+$")))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub emits: Vec<String>,
    /// Time from the event to the reaction, by the times that both events carry. After it the instance is stuck until the event comes.
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) <= duration('8760h')").message("within must be a duration such as 500ms, 5s or 1h30m, at most 8760h"))]
    pub within: Duration,
}

/// One step of a saga: a command, a wait, a signal, or a group of steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    cel,
    validation = Rule::new("[has(self.do), has(self.wait), has(self.waitUntil), has(self.signal), has(self.all), has(self.steps)].filter(given, given).size() == 1").message("a step has exactly one of `do`, `wait`, `waitUntil`, `signal`, `all` and `steps`"),
    validation = Rule::new("has(self.do) || (!has(self.undo) && !has(self.failures) && !(has(self.pivot) && self.pivot))").message("`undo`, `failures` and `pivot` belong to a step with `do`; a wait, a signal and a group have nothing of their own to undo")
)]
pub struct SagaStep {
    #[serde(flatten)]
    pub task: SagaTask,
    /// The point of no return: once it has succeeded, the later steps are retried until they succeed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pivot: bool,
    /// Steps that are done at the same time; the next step begins when all are done. When one of them fails, what is in progress in the others is undone as if it had happened, and then what is done, in reverse order of completion.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub all: Vec<SagaBranch>,
    /// Steps that are done one after the other, under one `when` or one `forEach`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub steps: Vec<SagaInnerStep>,
    /// What is done instead, one after the other, when `when` is false.
    #[serde(rename = "else", default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub otherwise: Vec<SagaInnerStep>,
}

/// One of several steps that are done at the same time: a command, a wait, a signal, or a sequence of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    cel,
    validation = Rule::new("[has(self.do), has(self.wait), has(self.waitUntil), has(self.signal), has(self.steps)].filter(given, given).size() == 1").message("a step has exactly one of `do`, `wait`, `waitUntil`, `signal` and `steps`"),
    validation = Rule::new("has(self.do) || (!has(self.undo) && !has(self.failures))").message("`undo` and `failures` belong to a step with `do`; a wait, a signal and a group have nothing of their own to undo")
)]
pub struct SagaBranch {
    #[serde(flatten)]
    pub task: SagaTask,
    /// Steps that are done one after the other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub steps: Vec<SagaInnerStep>,
}

/// A step in a sequence within a group: a command, a wait or a signal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    cel,
    validation = Rule::new("[has(self.do), has(self.wait), has(self.waitUntil), has(self.signal)].filter(given, given).size() == 1").message("a step has exactly one of `do`, `wait`, `waitUntil` and `signal`"),
    validation = Rule::new("has(self.do) || (!has(self.undo) && !has(self.failures))").message("`undo` and `failures` belong to a step with `do`; a wait, a signal and a group have nothing of their own to undo")
)]
pub struct SagaInnerStep {
    #[serde(flatten)]
    pub task: SagaTask,
}

/// What steps of all levels have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SagaTask {
    /// Name of the step, unique in the saga, groups included; part of the idempotency key.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// CEL expression over `input`, `steps.NAME.reply` of earlier steps and, in a `forEach`, `item`: the step is done when it is true. It is evaluated once, when the saga comes to the step, and its value is recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1000))]
    pub when: Option<String>,
    /// The step, or the group, is done for each item of a list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub for_each: Option<SagaForEach>,
    /// The command that does it.
    #[serde(rename = "do", default, skip_serializing_if = "Option::is_none")]
    pub action: Option<SagaCommand>,
    /// The command that undoes it. A step before the pivot must have one, or say `undo: {none: true}`. The pivot's is called before the saga turns back at the pivot, and is refused (409) when the pivot happened; without one, a pivot in doubt waits for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub undo: Option<Undo>,
    /// How long one request of a command may take before its result counts as unknown. A job that the service accepts (202) may take until the saga's deadline.
    #[serde(default = "default_timeout")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) <= duration('8760h')").message("timeout must be a duration such as 100ms, 2s or 1h30m, at most 8760h"))]
    pub timeout: Duration,
    /// How attempts of a command whose result is unknown (time-outs, 5xx, broken connections) are repeated.
    #[serde(default)]
    pub retry: Retry,
    /// Definite failures by which the service may refuse the command, and the reason each gives the saga: `CreditLimitExceeded: INSUFFICIENT_CREDIT`. Others pass as they are.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub failures: BTreeMap<String, String>,
    /// Nothing is done for this time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) <= duration('8760h')").message("wait must be a duration such as 100ms, 2s or 1h30m, at most 8760h"))]
    pub wait: Option<Duration>,
    /// Nothing is done until this time: a CEL expression over `input`, `steps.NAME.reply` of earlier steps and, in a `forEach`, `item`, that gives a time in the form of RFC 3339, such as `2026-12-24T18:00:00Z`. It is evaluated once, when the saga comes to the step; a time that has passed is over at once, and one more than 8760h ahead is no value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1000))]
    pub wait_until: Option<String>,
    /// A message from outside is awaited (`POST /sagas/NAME/ID/signals/STEP`), whose body is the step's reply.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signal: Option<SagaSignal>,
}

/// A list, for each item of which a step is done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SagaForEach {
    /// CEL expression over `input` and `steps.NAME.reply` of earlier steps: a list of at most 1,000 items. The step's expressions read the item as `item`.
    #[schemars(length(min = 1, max = 1000))]
    pub items: String,
    /// How many items are worked on at the same time.
    #[serde(default = "default_concurrency")]
    #[schemars(range(min = 1, max = 100))]
    pub concurrency: i32,
}

fn default_concurrency() -> i32 {
    1
}

/// A message from outside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(cel)]
pub struct SagaSignal {
    /// How long it is awaited, from when the saga comes to the step. Then the saga is compensated; after the pivot it is `Stuck`, and still waits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) <= duration('8760h')").message("signal.within must be a duration such as 100ms, 2s or 1h30m, at most 8760h"))]
    pub within: Option<Duration>,
}

fn default_timeout() -> Duration {
    std::time::Duration::from_secs(5).into()
}

/// A command of a Microservice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SagaCommand {
    /// The Microservice that is asked.
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub service: String,
    /// One of its `spec.commands`.
    #[schemars(length(min = 1, max = 64))]
    pub command: String,
    /// The command's arguments, each a CEL expression over `input`, `steps.NAME.reply` of earlier steps, `item` in a `forEach` and, when undoing, `failure.reason`. Those that the command's path names (`/orders/{orderId}`) fill it; the others are members of the JSON body or, with GET and DELETE, query parameters.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub with: BTreeMap<String, String>,
    /// The whole JSON body, one CEL expression such as `input`. Then `with` has only what the path names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1000))]
    pub body: Option<String>,
    /// Further headers of the request, each a CEL expression (`'constant'` in quotes) that gives a string, a number or a boolean. No secrets: whoever may read Sagas sees them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub headers: BTreeMap<String, String>,
}

/// How to undo a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    cel,
    validation = Rule::new("(has(self.none) && self.none) ? !has(self.service) && !has(self.command) && !has(self.with) && !has(self.body) && !has(self.headers) : has(self.service) && has(self.command)").message("undo names a `service` and a `command`, or says `none: true` and nothing else")
)]
pub struct Undo {
    /// The step has nothing to undo, such as one that only reads.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub none: bool,
    /// The Microservice that is asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    pub service: Option<String>,
    /// One of its `spec.commands`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub command: Option<String>,
    /// The command's arguments, each a CEL expression over `input`, `steps.NAME.reply`, `item` in a `forEach` and `failure`; they are sent as those of `do`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub with: BTreeMap<String, String>,
    /// The whole JSON body, one CEL expression such as `input`. Then `with` has only what the path names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1000))]
    pub body: Option<String>,
    /// Further headers of the request, each a CEL expression (`'constant'` in quotes) that gives a string, a number or a boolean. No secrets: whoever may read Sagas sees them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub headers: BTreeMap<String, String>,
}

/// Exponential back-off with jitter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(cel)]
pub struct Retry {
    /// Attempts without an answer before the saga compensates; an undo, and a step from the pivot on, is `Stuck` after as many and goes on at the longest pause.
    #[serde(default = "default_attempts")]
    #[schemars(range(min = 1, max = 1000))]
    pub max_attempts: i32,
    /// Longest pause before the second attempt; it doubles with each.
    #[serde(default = "default_initial_backoff")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) <= duration('8760h')").message("retry.initialBackoff must be a duration such as 100ms, 2s or 1h30m, at most 8760h"))]
    pub initial_backoff: Duration,
    /// Longest pause between two attempts.
    #[serde(default = "default_max_backoff")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) <= duration('8760h')").message("retry.maxBackoff must be a duration such as 100ms, 2s or 1h30m, at most 8760h"))]
    pub max_backoff: Duration,
}

fn default_attempts() -> i32 {
    10
}

fn default_initial_backoff() -> Duration {
    std::time::Duration::from_millis(100).into()
}

fn default_max_backoff() -> Duration {
    std::time::Duration::from_secs(10).into()
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            max_attempts: default_attempts(),
            initial_backoff: default_initial_backoff(),
            max_backoff: default_max_backoff(),
        }
    }
}

/// What Weft found and did, and how the saga's instances fare.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SagaStatus {
    /// The generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// `Ready`, `Reconciling`, `Stalled`, `Accepted`, `DatabaseReady`, `Stuck`, `StartEventSeen` with `startOn` of an orchestrated saga, `AsDeclared` of a choreographed one, and `Deleting` while it is being deleted, each with a reason and a sentence.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Number of steps, those in groups included; or of reactions.
    #[serde(default)]
    pub steps: i32,
    /// Instances that have not ended, those that compensate or are stuck among them.
    #[serde(default)]
    pub running: i64,
    /// Instances that ended well.
    #[serde(default)]
    pub completed: i64,
    /// Instances that were undone.
    #[serde(default)]
    pub compensated: i64,
    /// Instances that wait for a person.
    #[serde(default)]
    pub stuck: i64,
    /// Events of the last month that can never start the saga, since they have no id or their data cannot be its input: rows of `weft.saga_dead_start`.
    #[serde(default)]
    pub dead_starts: i64,
    /// The oldest stuck instances, at most ten.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stuck_instances: Vec<StuckSaga>,
    /// URL of the orchestrator's API inside the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Digest of the orchestrator's children as they were applied: an operator that starts finds by it whether any of them changed meanwhile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub applied_hash: Option<String>,
}

/// An instance that waits for a person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StuckSaga {
    /// The instance's id.
    pub id: String,
    /// The step that cannot go on; of a choreographed saga the service that owes the next event.
    pub step: String,
    /// `do` or `undo`; of a choreographed saga `react`.
    pub operation: String,
    /// What the last attempt came to, or what is owed to which event.
    pub message: String,
    /// Since when.
    pub since: Time,
}
