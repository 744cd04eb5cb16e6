//! An operator that starts, or becomes the leader, where another one has worked.

use std::sync::Arc;

use serde_json::json;
use weft::{
    api::v1alpha1::Microservice,
    controllers::{
        kinds::reconcile,
        resources::{child::ChildKind, key::Key},
        runtime::Context,
        store::live::ChildSeen,
    },
};

use super::{
    reconcile::{context, microservice, orders, server},
    server::Server,
};

/// A Microservice with a database, as far as the first operator brings it.
async fn worked_on() -> (Server, Arc<Context>) {
    let object = microservice(&json!({"image": "shop/orders:1", "ports": [{"name": "http", "port": 8080}],
        "database": {"postgres": {"version": "17"}}}));
    let server = server(&object);
    let first = context(&server);
    first.store().set(object);
    reconcile(&first, &orders()).await;
    // the Job is for this server, which is known by then
    reconcile(&first, &orders()).await;
    assert!(server.lines().len() > 8);
    (server, first)
}

/// A second operator, whose watches have found what the first one left, but for `changed`.
fn started(server: &Server, first: &Context, changed: impl Fn(ChildKind, &mut ChildSeen)) -> Arc<Context> {
    let second = context(server);
    let object = first.store().get::<Microservice>(&orders().id).unwrap();
    second.store().set(object.as_ref().clone());
    for (child, mut seen) in first.store().children(&orders()) {
        changed(child.kind, &mut seen);
        second.store().set_child(&orders(), child, seen);
    }
    second
}

fn statuses(lines: &[String]) -> usize {
    lines.iter().filter(|line| line.ends_with("/status")).count()
}

#[tokio::test]
async fn an_operator_that_starts_sends_nothing_where_nothing_changed() {
    let (server, first) = worked_on().await;
    let second = started(&server, &first, |_, _| {});
    reconcile(&second, &orders()).await;
    assert_eq!(server.lines(), [""; 0]);
    // and it knows what it took over: later drift is repaired alone
    let key: Key = orders();
    let children = second.store().children(&key);
    let (service, mut seen) = children.into_iter().find(|(child, _)| child.kind == ChildKind::Service).unwrap();
    seen.ours += 1;
    seen.version += 100;
    second.store().set_child(&key, service, seen);
    reconcile(&second, &key).await;
    let lines = server.lines();
    assert!(lines.len() <= 2 && lines[0].starts_with("PATCH services/"), "{lines:?}");
}

#[tokio::test]
async fn what_drifted_while_no_operator_ran_is_repaired() {
    let (server, first) = worked_on().await;
    let second = started(&server, &first, |kind, seen| {
        if kind == ChildKind::StatefulSet {
            seen.ours += 1;
        }
    });
    reconcile(&second, &orders()).await;
    let asked = server.asked();
    let repaired = asked.iter().find(|asked| asked.line() == "PATCH statefulsets/orders-db").expect("repaired");
    assert!(repaired.query.contains("force=true"), "{}", repaired.query);
    // what is recorded then is the repaired state
    let third = started(&server, &second, |_, _| {});
    reconcile(&third, &orders()).await;
    assert_eq!(server.lines(), [""; 0]);
}

#[tokio::test]
async fn what_was_deleted_while_no_operator_ran_is_made_again() {
    let (server, first) = worked_on().await;
    let second = context(&server);
    let object = first.store().get::<Microservice>(&orders().id).unwrap();
    second.store().set(object.as_ref().clone());
    let left =
        first.store().children(&orders()).into_iter().filter(|(child, _)| child.kind != ChildKind::NetworkPolicy);
    for (child, seen) in left {
        second.store().set_child(&orders(), child, seen);
    }
    server.refuse("POST secrets", 409, "already exists");
    reconcile(&second, &orders()).await;
    assert!(server.lines().contains(&"PATCH networkpolicies/orders-db".to_owned()));
}

#[tokio::test]
async fn a_status_without_a_record_makes_everything_be_applied_once() {
    let (server, first) = worked_on().await;
    let mut object = first.store().get::<Microservice>(&orders().id).unwrap().as_ref().clone();
    object.status.as_mut().unwrap().applied_hash = None;
    object.metadata.resource_version = Some("1000000".to_owned());
    first.store().set(object);
    let second = started(&server, &first, |_, _| {});
    server.refuse("POST secrets", 409, "already exists");
    reconcile(&second, &orders()).await;
    let lines = server.lines();
    assert!(lines.contains(&"PATCH statefulsets/orders-db".to_owned()), "{lines:?}");
    assert_eq!(statuses(&lines), 1, "the record is written: {lines:?}");
    reconcile(&second, &orders()).await;
    assert_eq!(server.lines(), [""; 0]);
}
