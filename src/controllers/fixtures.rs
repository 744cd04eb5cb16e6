//! Objects and settings for the tests of plans and statuses.

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use serde::de::DeserializeOwned;

use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga, Storage},
    controllers::resources::{
        child::{Child, ChildKind, ChildRef},
        observed::{JobOutcome, JobState, Workload},
        outcome::{Applied, Failure},
        plan::Plan,
        reason::Reason,
        settings::{Broker, Resources, Settings},
    },
    nats::accounts::Accounts,
};

pub(crate) fn settings() -> Settings {
    Settings {
        image: "localhost/weft:1".to_owned(),
        image_pull_policy: None,
        postgres_image: "docker.io/library/postgres:{version}".to_owned(),
        resources: Resources::default(),
        orchestrator_storage: Storage::default(),
        namespace: "weft-system".to_owned(),
        pod_labels: [("app.kubernetes.io/name".to_owned(), "weft".to_owned())].into(),
        metrics_clients: Vec::new(),
        image_pull_secrets: Vec::new(),
        fixed_user_ids: true,
        broker: None,
        password: || "password0123456789".to_owned(),
    }
}

/// The settings of an installation with its broker.
pub(crate) fn settings_with_broker() -> Settings {
    let broker =
        Broker { url: "nats://weft-nats.weft-system:4222".to_owned(), accounts: Accounts::new("a seed".to_owned()) };
    Settings { broker: Some(broker), ..settings() }
}

pub(crate) fn now() -> Timestamp {
    Timestamp::from_second(1_700_000_000).unwrap()
}

fn object<K: DeserializeOwned>(kind: &str, name: &str, spec: &str) -> K {
    let spec: serde_yaml::Value = serde_yaml::from_str(spec).unwrap();
    let text = serde_json::json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": kind, "spec": spec,
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-of-{name}"), "generation": 3},
    });
    serde_json::from_value(text).unwrap()
}

/// A Microservice of namespace `shop` with the spec in YAML.
pub(crate) fn microservice(name: &str, spec: &str) -> Microservice {
    object("Microservice", name, spec)
}

pub(crate) fn relay(name: &str, spec: &str) -> Arc<OutboxRelay> {
    Arc::new(object("OutboxRelay", name, spec))
}

pub(crate) fn saga(name: &str, spec: &str) -> Saga {
    object("Saga", name, spec)
}

/// The relay of the Microservice `service`, with the defaults.
pub(crate) fn relay_of(service: &str) -> Arc<OutboxRelay> {
    relay(service, &format!("{{microservice: {service}, sink: {{nats: {{servers: ['nats://nats.messaging:4222']}}}}}}"))
}

pub(crate) fn ready(pods: i32) -> Workload {
    Workload {
        generation: 1,
        observed_generation: 1,
        wanted: pods,
        replicas: pods,
        updated: pods,
        ready: pods,
        available: pods,
        ..Workload::default()
    }
}

pub(crate) fn job(outcome: JobOutcome) -> JobState {
    JobState {
        annotations: BTreeMap::default(),
        outcome,
        problems: Vec::new(),
        missing_images: Vec::new(),
        report: None,
    }
}

/// The children as one YAML stream, for snapshots.
pub(crate) fn yaml(plan: &Plan) -> String {
    let document = |child: &Child| format!("---\n{}", serde_yaml::to_string(&value(child)).unwrap());
    plan.children.iter().map(document).collect::<Vec<_>>().concat()
}

/// A child as JSON, with its kind.
pub(crate) fn value(child: &Child) -> serde_json::Value {
    child.to_json().unwrap()
}

/// `KIND/NAME` of each child, in order.
pub(crate) fn names(plan: &Plan) -> Vec<String> {
    let name = |child: &serde_json::Value| {
        format!("{}/{}", child["kind"].as_str().unwrap(), child["metadata"]["name"].as_str().unwrap())
    };
    plan.children.iter().map(value).map(|child| name(&child)).collect()
}

/// The child `KIND/NAME`, which must be there.
pub(crate) fn find(plan: &Plan, wanted: &str) -> serde_json::Value {
    let at = names(plan).iter().position(|name| name == wanted).unwrap_or_else(|| panic!("{wanted} is not planned"));
    value(&plan.children[at])
}

/// Pod Security `restricted`, as far as its rules concern fields that Weft writes.
/// <https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted>
pub(crate) fn assert_restricted(pod: &serde_json::Value) {
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    for list in ["containers", "initContainers"] {
        for container in pod[list].as_array().into_iter().flatten() {
            let security = &container["securityContext"];
            assert_eq!(security["allowPrivilegeEscalation"], false, "{}", container["name"]);
            assert_eq!(security["capabilities"], serde_json::json!({"drop": ["ALL"]}), "{}", container["name"]);
        }
    }
    for volume in pod["volumes"].as_array().into_iter().flatten() {
        let allowed = ["configMap", "downwardAPI", "emptyDir", "projected", "secret"]
            .iter()
            .any(|kind| volume.get(kind).is_some());
        assert!(allowed, "{volume}");
    }
}

/// `TYPE=STATUS REASON` of each condition, in order.
pub(crate) fn summaries(conditions: &[Condition]) -> Vec<String> {
    let line = |one: &Condition| format!("{}={} {}", one.type_, one.status, one.reason);
    conditions.iter().map(line).collect()
}

/// The message of a condition, which must be there.
pub(crate) fn message<'a>(conditions: &'a [Condition], type_: &str) -> &'a str {
    &conditions.iter().find(|condition| condition.type_ == type_).unwrap().message
}

/// The API server refuses a child, whatever is done but a change of the spec.
pub(crate) fn refused(kind: ChildKind, name: &str) -> Applied {
    let child = ChildRef::new(kind, name);
    let message = format!("cannot apply {child}: no such quantity");
    Applied { failures: vec![Failure { child, reason: Reason::ChildRefused, message }], ..Applied::default() }
}
