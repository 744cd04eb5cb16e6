//! Objects that do not have the form of their type: the last form that could be read stays in force.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::{Value, json};
use weft::{
    api::v1alpha1::{Microservice, OutboxRelay},
    controllers::{
        kinds::reconcile,
        resources::key::{Key, ObjectKind},
        runtime::Verdict,
    },
};

use super::{
    reconcile::{context, microservice, orders, relay},
    server::{Asked, Server},
};

fn metadata(name: &str, generation: i64) -> ObjectMeta {
    serde_json::from_value(json!({"name": name, "namespace": "shop", "uid": format!("uid-{name}"),
        "generation": generation, "resourceVersion": "9"}))
    .unwrap()
}

/// The condition of that type in the status that was written.
fn condition<'a>(asked: &'a Asked, type_: &str) -> &'a Value {
    let conditions = asked.body["status"]["conditions"].as_array().unwrap();
    conditions.iter().find(|condition| condition["type"] == type_).unwrap()
}

fn events() -> Key {
    Key::new(ObjectKind::OutboxRelay, "shop", "events")
}

#[tokio::test]
async fn an_object_that_was_never_read_is_rejected_in_a_sentence_and_keeps_its_columns() {
    let server = Server::default();
    server.rule(|asked| {
        let status = json!({"published": 41, "pending": 2, "conditions": [{"type": "SlotAtRisk", "status": "False",
            "reason": "SlotSafe", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
        let item = json!({"apiVersion": "weft.dev/v1alpha1", "kind": "OutboxRelay", "spec": {"microservice": 5},
            "metadata": metadata("events", 3), "status": status});
        (asked.line() == "GET outboxrelays").then(|| (200, json!({"metadata": {}, "items": [item]})))
    });
    let context = context(&server);
    let requeue = context.store().set_malformed::<OutboxRelay>(metadata("events", 3), "no field `sink`".to_owned());
    assert_eq!(requeue.now, [events()]);
    assert_eq!(reconcile(&context, &events()).await, Verdict::Done);
    let asked = server.asked();
    assert_eq!(asked.last().unwrap().line(), "PATCH outboxrelays/events/status");
    let written = asked.last().unwrap();
    let accepted = condition(written, "Accepted");
    assert_eq!((&accepted["status"], &accepted["reason"]), (&json!("False"), &json!("Malformed")));
    assert!(accepted["message"].as_str().unwrap().contains("no field `sink`"), "{accepted}");
    assert_eq!(condition(written, "SlotAtRisk")["lastTransitionTime"], "2026-01-01T00:00:00Z");
    let status = &written.body["status"];
    assert_eq!((&status["published"], &status["pending"]), (&json!(41), &json!(2)));
}

#[tokio::test]
async fn an_object_that_is_not_found_any_more_is_not_reported_on() {
    let server = Server::default();
    server.rule(|asked| (asked.method == "GET").then(|| (200, json!({"metadata": {}, "items": []}))));
    let context = context(&server);
    context.store().set_malformed::<Microservice>(metadata("orders", 3), "missing field `image`".to_owned());
    assert_eq!(reconcile(&context, &orders()).await, Verdict::Done);
    assert_eq!(server.lines(), ["GET microservices"]);
}

#[tokio::test]
async fn what_was_read_last_is_reconciled_and_reported_once() {
    let server = Server::default();
    let context = context(&server);
    context.store().set(microservice(&json!({"image": "shop/orders:1", "database": {"postgres": {}}})));
    context.store().set(relay(&json!({"observedGeneration": 1, "published": 41, "pending": 2, "conditions": []})));
    context.store().set_malformed::<OutboxRelay>(metadata("events", 2), "microservice: invalid type".to_owned());
    // the answer to its status cannot be read either
    server.rule(|asked| {
        let answer = json!({"apiVersion": "weft.dev/v1alpha1", "kind": "OutboxRelay", "spec": {"microservice": 5},
            "metadata": metadata("events", 2), "status": asked.body["status"]});
        asked.line().ends_with("/status").then_some((200, answer))
    });
    reconcile(&context, &events()).await;
    let asked = server.asked();
    assert!(asked.iter().any(|asked| asked.line() == "POST configmaps"), "its contract is made");
    let written = asked.last().unwrap();
    assert_eq!(condition(written, "Ready")["reason"], "Malformed");
    assert_eq!(written.body["status"]["published"], 41);
    assert_eq!(written.body["status"]["observedGeneration"], 2);
    reconcile(&context, &events()).await;
    assert_eq!(server.lines(), [""; 0], "once");
}
