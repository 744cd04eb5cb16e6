//! Whole reconciles: observe, plan, apply, status.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use weft::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga},
    contract::status::RelayStatus,
    controllers::{
        kinds::reconcile,
        resources::{
            key::{Key, ObjectId, ObjectKind},
            outcome::Class,
            settings::Settings,
        },
        runtime::{Context, News, Verdict, events::Events, metrics::OperatorMetrics},
        store::{DataPlaneStatus, live_pod::LivePod},
    },
};

use super::{
    server::{Asked, Server, failure},
    settings::settings,
};

const PASSWORD: &str = "correct-horse-battery-staple";

pub fn context(server: &Server) -> Arc<Context> {
    context_with_metrics(server, &mut Registry::default())
}

pub fn context_with_metrics(server: &Server, registry: &mut Registry) -> Arc<Context> {
    context_of(server, settings(), registry)
}

/// Of an operator with these settings.
pub fn context_of(server: &Server, settings: Settings, registry: &mut Registry) -> Arc<Context> {
    let settings = Settings { password: || PASSWORD.to_owned(), ..settings };
    let metrics = OperatorMetrics::register(registry);
    // events are not written: the task that would is not run
    let (events, _) = Events::new(server.client(), "test".to_owned(), CancellationToken::new());
    Arc::new(Context::new(server.client(), settings, events, metrics))
}

pub fn microservice(spec: &Value) -> Microservice {
    serde_json::from_value(json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "Microservice",
        "metadata": {"name": "orders", "namespace": "shop", "uid": "uid-orders", "generation": 1, "resourceVersion": "1"},
        "spec": spec,
    }))
    .unwrap()
}

pub fn orders() -> Key {
    Key::new(ObjectKind::Microservice, "shop", "orders")
}

/// A server that answers to a status as the real one does: with the whole object.
pub fn server(object: &Microservice) -> Server {
    let (server, object) = (Server::default(), serde_json::to_value(object).unwrap());
    let newest = AtomicU32::new(100);
    server.rule(move |asked| {
        let mut answer = object.clone();
        if asked.line().ends_with("/status") {
            answer["status"] = asked.body["status"].clone();
            answer["metadata"]["uid"] = asked.body["metadata"]["uid"].clone();
        } else {
            return None;
        }
        answer["metadata"]["resourceVersion"] = json!(newest.fetch_add(1, Ordering::Relaxed).to_string());
        Some((200, answer))
    });
    server
}

#[tokio::test]
async fn a_service_without_a_database_takes_few_requests_and_then_none() {
    let object = microservice(&json!({"image": "shop/orders:1", "ports": [{"name": "http", "port": 8080}]}));
    let server = server(&object);
    let context = context(&server);
    context.store().set(object);
    reconcile(&context, &orders()).await;
    let lines = server.lines();
    assert!(lines.contains(&"PATCH deployments/orders".to_owned()) && lines.len() <= 7, "{lines:?}");
    assert_eq!(lines.last().unwrap(), "PATCH microservices/orders/status");
    let verdict = reconcile(&context, &orders()).await;
    assert_eq!((verdict, server.lines()), (Verdict::Done, Vec::new()));
}

#[tokio::test]
async fn a_service_with_a_database_waits_for_its_set_up() {
    let object = microservice(&json!({"image": "shop/orders:1", "database": {"postgres": {"version": "17"}}}));
    let server = server(&object);
    let context = context(&server);
    context.store().set(object);
    reconcile(&context, &orders()).await;
    let asked = server.asked();
    let lines: Vec<_> = asked.iter().map(Asked::line).collect();
    assert!(lines.contains(&"PATCH statefulsets/orders-db".to_owned()), "{lines:?}");
    assert!(lines.contains(&"POST jobs".to_owned()), "it is for this server, which is known by then: {lines:?}");
    assert!(!lines.contains(&"PATCH deployments/orders".to_owned()), "the schema comes first: {lines:?}");
    assert!(lines.len() <= 11, "{lines:?}");
    assert_eq!(lines.iter().filter(|line| line.ends_with("/status")).count(), 1, "{lines:?}");
    let status = &asked.last().unwrap().body["status"];
    assert!(status.to_string().contains("SetupRunning"), "{status}");
    // no password is anywhere but in a Secret
    let leaks: Vec<_> = asked
        .iter()
        .filter(|asked| asked.line() != "POST secrets" && asked.body.to_string().contains(PASSWORD))
        .collect();
    assert!(leaks.is_empty(), "{leaks:?}");
    reconcile(&context, &orders()).await;
    assert_eq!(server.lines(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_roll_out_that_goes_well_is_one_answer_and_ready() {
    let object = microservice(&json!({"image": "shop/orders:1", "ports": [{"name": "http", "port": 8080}],
        "database": {"postgres": {"version": "17"}}}));
    let server = server(&object);
    let context = context(&server);
    context.store().set(object);
    reconcile(&context, &orders()).await;
    let mut lines = server.lines();
    // PostgreSQL takes its time; then the set-up is done, and the pods become ready
    for (seconds, version) in [(8, 1_000_000), (2, 2_000_000)] {
        tokio::time::advance(Duration::from_secs(seconds)).await;
        server.settle(&context, version);
        reconcile(&context, &orders()).await;
        lines.extend(server.lines());
    }
    let known = context.store().get::<Microservice>(&orders().id).unwrap();
    assert_eq!(known.status.as_ref().unwrap().conditions[0].status, "True");
    assert_eq!(lines.iter().filter(|line| line.ends_with("/status")).count(), 2, "{lines:?}");
    assert_eq!(lines.len(), 14, "12 children and the statuses: {lines:?}");
}

#[tokio::test]
async fn a_suspended_object_is_only_told_so() {
    let object = microservice(&json!({"image": "shop/orders:1", "suspend": true}));
    let server = server(&object);
    let context = context(&server);
    context.store().set(object);
    reconcile(&context, &orders()).await;
    assert_eq!(server.lines(), ["PATCH microservices/orders/status"]);
}

#[tokio::test]
async fn retention_delete_needs_nobody_to_finish_a_deletion() {
    let spec = json!({"image": "shop/orders:1", "database": {"postgres": {}, "retention": "Delete"}});
    let object = microservice(&spec);
    let server = server(&object);
    let context = context(&server);
    context.store().set(object.clone());
    reconcile(&context, &orders()).await;
    let asked = server.asked();
    let secrets: Vec<_> = asked.iter().filter(|asked| asked.line() == "POST secrets").collect();
    assert_eq!(secrets.len(), 3);
    for secret in secrets {
        assert_eq!(secret.body["metadata"]["ownerReferences"][0]["uid"], "uid-orders", "{}", secret.body);
    }
    let policy = |asked: &[Asked]| {
        let set = asked.iter().find(|asked| asked.line() == "PATCH statefulsets/orders-db").unwrap();
        set.body["spec"]["persistentVolumeClaimRetentionPolicy"]["whenDeleted"].clone()
    };
    assert_eq!(policy(&asked), "Delete");
    assert!(!asked.iter().any(|asked| asked.line() == "PATCH microservices/orders"), "no finalizer");

    // applied again right away, under the same name: the old server is not adopted
    let mut again = object;
    again.metadata.uid = Some("another".to_owned());
    again.metadata.resource_version = Some("1000000".to_owned());
    context.store().remove::<Microservice>(&orders().id, 999_999);
    context.store().set(again);
    reconcile(&context, &orders()).await;
    let asked = server.asked();
    let lines: Vec<_> = asked.iter().map(Asked::line).collect();
    assert_eq!(lines, ["PATCH microservices/orders/status"], "it waits");
    assert_eq!(asked[0].body["status"]["conditions"][0]["reason"], "PredecessorEnding");
    let children = context.store().children(&orders());
    for (child, seen) in children {
        context.store().remove_child(&orders(), &child, &seen.uid, seen.version);
    }
    reconcile(&context, &orders()).await;
    assert_eq!(policy(&server.asked()), "Delete");
}

#[tokio::test]
async fn an_answer_that_comes_late_does_not_bring_back_what_is_gone() {
    let object = microservice(&json!({"image": "shop/orders:1"}));
    let server = server(&object);
    let context = context(&server);
    context.store().set(object.clone());
    context.store().remove::<Microservice>(&orders().id, 7);
    assert!(context.store().set(object).now.is_empty());
    assert!(context.store().get::<Microservice>(&orders().id).is_none());
}

#[tokio::test]
async fn a_namespace_that_goes_away_is_waited_for_and_said() {
    let object = microservice(&json!({"image": "shop/orders:1"}));
    let server = server(&object);
    server.refuse("PATCH deployments", 403, "deployments.apps \"orders\" is forbidden: unable to create new content in namespace shop because it is being terminated");
    let context = context(&server);
    context.store().set(object);
    assert_eq!(reconcile(&context, &orders()).await, Verdict::Failed(Class::Retry));
    let asked = server.asked();
    let status = asked.last().unwrap();
    assert_eq!(status.line(), "PATCH microservices/orders/status");
    assert!(status.body.to_string().contains("NamespaceTerminating"), "{}", status.body);
}

#[tokio::test]
async fn a_quantity_that_is_none_is_not_accepted_until_it_is_mended() {
    let accepted = |asked: &[Asked]| {
        let status = asked.iter().rfind(|asked| asked.line() == "PATCH microservices/orders/status").unwrap();
        let conditions = status.body["status"]["conditions"].as_array().unwrap().iter();
        conditions.filter(|condition| condition["type"] == "Accepted").cloned().collect::<Value>()[0].clone()
    };
    let mut object = microservice(&json!({"image": "shop/orders:1", "resources": {"limits": {"cpu": "lots"}}}));
    let server = server(&object);
    // the words of API server 1.34, which has a mere 500 for them
    server.rule(|asked| {
        let odd = asked.line() == "PATCH deployments/orders" && asked.body.to_string().contains("lots");
        odd.then(|| (500, failure(500, "failed to convert new object (shop/orders; apps/v1, Kind=Deployment) to proper version: unable to convert unstructured object to apps/v1, Kind=Deployment: quantities must match the regular expression")))
    });
    let context = context(&server);
    context.store().set(object.clone());
    assert_eq!(reconcile(&context, &orders()).await, Verdict::Failed(Class::Invalid));
    let condition = accepted(&server.asked());
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("False"), &json!("ChildRefused")));
    assert!(condition["message"].as_str().unwrap().contains("quantities must match"), "{condition}");

    object.spec.resources = None;
    object.metadata.resource_version = Some("1000000".to_owned());
    context.store().set(object);
    reconcile(&context, &orders()).await;
    assert_eq!(accepted(&server.asked())["status"], "True");
}

/// Its Deployment is refused.
fn refused_service() -> (Server, Microservice) {
    let object = microservice(&json!({"image": "shop/orders:1"}));
    let server = server(&object);
    server.refuse("PATCH deployments", 422, "volumeMounts[0].name: Not found");
    (server, object)
}

#[tokio::test]
async fn whoever_applies_again_and_again_is_answered_each_time() {
    let (server, mut object) = refused_service();
    let context = context(&server);
    for count in 1..=10 {
        object.metadata.uid = Some(format!("uid-{count}"));
        context.store().set(object.clone());
        assert_eq!(reconcile(&context, &orders()).await, Verdict::Failed(Class::Invalid));
        let told = server.lines().iter().filter(|line| line.ends_with("/status")).count();
        assert_eq!(told, 1, "applied for the {count}th time, it waits for its status");
    }
}

#[tokio::test]
async fn a_status_that_has_to_wait_does_not_wait_for_the_next_attempt() {
    let (server, mut object) = refused_service();
    let context = context(&server);
    object.status = serde_json::from_value(json!({"observedGeneration": 1})).unwrap();
    context.store().set(object);
    while context.pace.enter(&orders(), News::Condition, Instant::now()).is_ok() {}
    assert_eq!(reconcile(&context, &orders()).await, Verdict::Failed(Class::Invalid));
    assert!(!server.lines().iter().any(|line| line.ends_with("/status")), "{:?}", server.lines());
    assert_eq!(context.backlog(), 1, "it comes again at its pace, whatever the pause after the failure");
}

/// The API server answers to a status with the whole object as it is by then.
#[tokio::test]
async fn a_change_that_the_answer_to_a_status_tells_first_is_reconciled() {
    let object = microservice(&json!({"image": "shop/orders:1"}));
    let mut changed = object.clone();
    changed.metadata.generation = Some(2);
    let server = server(&changed);
    let context = context(&server);
    context.store().set(object);
    reconcile(&context, &orders()).await;
    assert_eq!(context.backlog(), 1);
    let known = context.store().get::<Microservice>(&orders().id).unwrap();
    assert_eq!(known.metadata.generation, Some(2));
    assert!(context.store().set(known.as_ref().clone()).now.is_empty(), "the watch has no news for it");
}

pub fn relay(status: &Value) -> OutboxRelay {
    serde_json::from_value(json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "OutboxRelay",
        "metadata": {"name": "events", "namespace": "shop", "uid": "uid-events", "generation": 1, "resourceVersion": "1"},
        "spec": {"microservice": "orders", "sink": {"nats": {"servers": ["nats://nats:4222"]}}},
        "status": status,
    }))
    .unwrap()
}

/// The pod `orders-1` of the service, whose relay runs.
fn set_relay_pod(context: &Context) {
    set_relay_pod_as(context, json!({"phase": "Running", "podIP": "10.0.0.1"}));
}

fn set_relay_pod_as(context: &Context, status: Value) {
    let pod: LivePod = serde_json::from_value(json!({
        "metadata": {"name": "orders-1", "namespace": "shop"},
        "spec": {"containers": [{"name": "relay", "ports": [{"containerPort": 9464}]}]},
        "status": status,
    }))
    .unwrap();
    context.store().set_pod(&orders(), "orders-1", pod.into());
}

/// As after an eviction: the object stays for long.
#[tokio::test]
async fn a_dead_pod_tells_nothing_more() {
    let context = context(&Server::default());
    set_relay_pod(&context);
    let told = RelayStatus { leading: true, pending: 5, ..RelayStatus::default() };
    context.store().set_status(&ObjectId::new("shop", "orders-1"), Some(DataPlaneStatus::Relay(told)));
    assert_eq!(context.store().totals().pending, 5);
    set_relay_pod_as(&context, json!({"phase": "Failed", "podIP": "10.0.0.1"}));
    assert_eq!(context.store().totals().pending, 0);
}

#[tokio::test]
async fn a_deployment_that_was_written_concerns_the_relays_that_it_carries() {
    let object = microservice(&json!({"image": "shop/orders:1"}));
    let server = server(&object);
    let context = context(&server);
    context.store().set(object);
    context.store().set(relay(&Value::Null));
    assert_eq!(context.backlog(), 0);
    reconcile(&context, &orders()).await;
    assert_eq!(context.backlog(), 1);
}

#[tokio::test]
async fn a_new_leader_listens_before_it_says_that_a_relay_is_silent() {
    let object = microservice(&json!({"image": "shop/orders:1"}));
    let server = server(&object);
    let context = context(&server);
    context.store().set(object);
    context.store().set(relay(&json!({"conditions": []})));
    set_relay_pod(&context);
    let verdict = reconcile(&context, &Key::new(ObjectKind::OutboxRelay, "shop", "events")).await;
    assert!(matches!(verdict, Verdict::At(_)), "{verdict:?}");
    assert_eq!(server.lines(), [""; 0]);
}

#[tokio::test]
async fn a_new_leader_listens_before_it_says_that_an_inbox_is_silent() {
    let mut object = microservice(&json!({"image": "shop/orders:1", "database": {"postgres": {}},
        "consumes": [{"from": "stock", "function": "stock.on_moved"}]}));
    object.status = Some(serde_json::from_value(json!({"conditions": []})).unwrap());
    let server = server(&object);
    let context = context(&server);
    context.store().set(object);
    let pod: LivePod = serde_json::from_value(json!({
        "metadata": {"name": "orders-inbox-1", "namespace": "shop", "labels": {"app.kubernetes.io/component": "inbox"}},
        "spec": {"containers": [{"name": "inbox", "ports": [{"containerPort": 9464}]}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1"},
    }))
    .unwrap();
    context.store().set_pod(&orders(), "orders-inbox-1", pod.into());
    let verdict = reconcile(&context, &orders()).await;
    assert!(matches!(verdict, Verdict::At(_)), "{verdict:?}");
    assert_eq!(server.lines(), [""; 0]);
}

#[tokio::test]
async fn a_changed_contract_is_read_at_once() {
    let server = Server::default();
    let context = context(&server);
    context.store().set(microservice(&json!({"image": "shop/orders:1", "database": {"postgres": {}}})));
    set_relay_pod(&context);
    let key = Key::new(ObjectKind::OutboxRelay, "shop", "events");
    let mut events = relay(&Value::Null);
    context.store().set(events.clone());
    reconcile(&context, &key).await;
    let lines = server.lines();
    assert!(!lines.iter().any(|line| line.contains("pods/")), "a new contract has no readers yet: {lines:?}");
    events.spec.paused = true;
    events.metadata.resource_version = Some("2".to_owned());
    context.store().set(events);
    reconcile(&context, &key).await;
    let asked = server.asked();
    let told = asked.iter().find(|asked| asked.line() == "PATCH pods/orders-1").expect("the pod is told");
    assert!(told.body["metadata"]["annotations"]["weft.dev/contract-version"].is_string(), "{}", told.body);
}

/// A Saga in the form of its type, accepted beside [`microservice`].
fn saga(metadata: &Value) -> Saga {
    let mut object = json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "Saga",
        "metadata": {"name": "create-order", "namespace": "shop", "uid": "uid-saga", "generation": 1, "resourceVersion": "1"},
        "spec": {"steps": [{"name": "act", "do": {"service": "orders", "command": "Act"}, "undo": {"none": true}}]},
    });
    for (name, value) in metadata.as_object().unwrap() {
        object["metadata"][name] = value.clone();
    }
    serde_json::from_value(object).unwrap()
}

#[tokio::test]
async fn a_saga_gets_its_finalizer_once_and_loses_it_when_it_is_deleted_by_force() {
    let service =
        microservice(&json!({"image": "shop/orders:1", "ports": [{"name": "http", "port": 80, "protocol": "http"}],
        "commands": {"Act": {"http": {"path": "/act"}}}}));
    let key = Key::new(ObjectKind::Saga, "shop", "create-order");
    let with_finalizer = json!({"finalizers": ["weft.dev/drain"], "resourceVersion": "2"});
    let deleted = json!({"finalizers": ["weft.dev/drain"], "deletionTimestamp": "2026-01-02T03:04:05Z",
        "annotations": {"weft.dev/force-delete": "true"}, "resourceVersion": "3"});
    for (metadata, finalizers) in
        [(json!({}), Some(json!(["weft.dev/drain"]))), (with_finalizer, None), (deleted, Some(json!([])))]
    {
        let server = Server::default();
        let context = context(&server);
        context.store().set(service.clone());
        context.store().set(saga(&metadata));
        reconcile(&context, &key).await;
        let asked = server.asked();
        let written = asked.iter().find(|asked| asked.line() == "PATCH sagas/create-order");
        assert_eq!(written.map(|asked| asked.body["metadata"]["finalizers"].clone()), finalizers, "{metadata}");
        assert!(written.is_none_or(|asked| asked.body["metadata"]["uid"] == "uid-saga"));
        // nothing is reported on one that is gone
        let is_gone = finalizers == Some(json!([]));
        let lines: Vec<_> = asked.iter().map(Asked::line).collect();
        assert_eq!(lines.iter().any(|line| line.ends_with("/status")), !is_gone, "{lines:?}");
    }
}
