//! A Secret that was deleted is made again, and what reads it follows: the server, the roles, the pods.

use std::{collections::BTreeSet, sync::Mutex};

use serde_json::{Value, json};
use weft::controllers::{
    kinds::reconcile,
    resources::key::{Key, ObjectKind},
    store::live_pod::LivePod,
};

use super::{
    reconcile::{context, microservice, orders},
    server::{Asked, Server, failure},
};

/// Of these Secrets none exists until it is made; all others do.
fn without(server: &Server, missing: &[&'static str]) {
    let missing: Mutex<BTreeSet<_>> = Mutex::new(missing.iter().copied().collect());
    server.rule(move |asked| {
        let name = asked.body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        if asked.line() != "POST secrets" {
            return None;
        }
        let mut missing = missing.lock().unwrap();
        let is_missing = if asked.query.contains("dryRun=All") {
            missing.contains(name.as_str())
        } else {
            missing.remove(name.as_str());
            true
        };
        (!is_missing).then(|| (409, failure(409, "already exists")))
    });
}

/// A pod that waits for a Secret.
fn waits_for(secret: &str) -> LivePod {
    let waiting = json!({"reason": "CreateContainerConfigError", "message": format!("secret \"{secret}\" not found")});
    serde_json::from_value(json!({
        "metadata": {"name": "orders-1", "namespace": "shop", "uid": "pod"}, "spec": {},
        "status": {"phase": "Pending", "containerStatuses": [{"name": "service", "state": {"waiting": waiting}}]},
    }))
    .unwrap()
}

/// The names of the Secrets that were made, and of what else was written, in order.
fn written(asked: &[Asked]) -> Vec<String> {
    let real = asked.iter().filter(|asked| !asked.query.contains("dryRun=All"));
    real.map(|asked| match asked.body["metadata"]["name"].as_str() {
        Some(name) if asked.method == "POST" => format!("{}/{name}", asked.line()),
        _ => asked.line(),
    })
    .collect()
}

fn find<'a>(asked: &'a [Asked], line: &str) -> Option<&'a Value> {
    asked.iter().find(|asked| asked.line() == line).map(|asked| &asked.body)
}

#[tokio::test]
async fn a_secret_that_a_pod_misses_is_made_again_and_the_roles_get_its_password() {
    let server = Server::default();
    let context = context(&server);
    context.store().set(microservice(&json!({"image": "shop/orders:1", "database": {"postgres": {}}})));
    reconcile(&context, &orders()).await;
    reconcile(&context, &orders()).await;
    let before = written(&server.asked());
    let jobs = |lines: &[String]| -> Vec<String> {
        lines.iter().filter(|line| line.starts_with("POST jobs/")).cloned().collect()
    };
    assert_eq!(jobs(&before).len(), 1, "{before:?}");

    without(&server, &["orders-db"]);
    context.store().set_pod(&orders(), "orders-1", waits_for("orders-db").into());
    reconcile(&context, &orders()).await;
    let asked = server.asked();
    let lines = written(&asked);
    let at = |line: &str| lines.iter().position(|known| known == line);
    let (record, secret) = (at("POST configmaps/orders-db-setup"), at("POST secrets/orders-db"));
    assert!(record.is_some() && record < secret, "recorded before it is made: {lines:?}");
    assert!(at("POST secrets/orders-db-admin").is_none(), "the others exist: {lines:?}");
    let record = &find(&asked, "POST configmaps").unwrap()["metadata"]["annotations"];
    assert_eq!(record["weft.dev/secrets"], r#"{"orders-db":1}"#);
    assert!(context.backlog() > 0, "what reads it follows");

    let again = jobs(&lines);
    assert!(again.len() == 1 && again != jobs(&before), "the roles get the new password: {lines:?}");
    assert!(!lines.contains(&"PATCH statefulsets/orders-db".to_owned()), "the server has no part in it: {lines:?}");
}

#[tokio::test]
async fn a_hosts_secret_that_only_a_guest_misses_is_made_again() {
    let server = Server::default();
    let context = context(&server);
    context.store().set(microservice(&json!({"image": "shop/orders:1", "database": {"postgres": {}}})));
    let mut guest = microservice(&json!({"image": "shop/reports:1",
        "database": {"sharedWith": {"service": "orders", "schema": "reports"}}}));
    (guest.metadata.name, guest.metadata.uid) = (Some("reports".to_owned()), Some("uid-reports".to_owned()));
    context.store().set(guest);
    reconcile(&context, &orders()).await;
    reconcile(&context, &orders()).await;
    server.lines();
    without(&server, &["orders-db-admin"]);
    let reports = Key::new(ObjectKind::Microservice, "shop", "reports");
    let requeue = context.store().set_pod(&reports, "reports-db-setup-1", waits_for("orders-db-admin").into());
    assert!(requeue.now.contains(&orders()), "{requeue:?}");
    reconcile(&context, &orders()).await;
    let lines = written(&server.asked());
    assert!(lines.contains(&"POST secrets/orders-db-admin".to_owned()), "{lines:?}");
}

#[tokio::test]
async fn the_server_restarts_with_a_new_password_of_its_superuser_before_the_roles_are_set() {
    let server = Server::default();
    let context = context(&server);
    context.store().set(microservice(&json!({"image": "shop/orders:1", "database": {"postgres": {}}})));
    reconcile(&context, &orders()).await;
    reconcile(&context, &orders()).await;
    server.lines();
    without(&server, &["orders-db-admin"]);
    context.store().set_pod(&orders(), "orders-1", waits_for("orders-db-admin").into());
    reconcile(&context, &orders()).await;
    let lines = written(&server.asked());
    assert!(lines.contains(&"POST secrets/orders-db-admin".to_owned()), "{lines:?}");
    assert!(!lines.contains(&"PATCH statefulsets/orders-db".to_owned()), "not before it is there: {lines:?}");

    reconcile(&context, &orders()).await;
    let asked = server.asked();
    let set = find(&asked, "PATCH statefulsets/orders-db").expect("the server restarts");
    let template = &set["spec"]["template"]["metadata"]["annotations"];
    assert_eq!(template["weft.dev/secrets"], r#"{"orders-db-admin":1}"#);
    assert!(find(&asked, "POST jobs").is_none(), "the server has not started with it yet");
}
