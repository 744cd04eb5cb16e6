//! Applying a plan.

use std::collections::BTreeMap;

use k8s_openapi::api::{
    apps::v1::{Deployment, DeploymentSpec},
    batch::v1::Job,
    core::v1::{Secret, Service, ServiceAccount},
};
use kube::api::ObjectMeta;
use tokio::time::{Duration, Instant};
use weft::controllers::{
    apply::{Memory, Outcome, apply},
    resources::{
        child::{Child, ChildKind, ChildRef},
        fields::{FieldPath, ForeignField},
        key::{Key, ObjectKind},
        plan::Plan,
        reason::Reason,
    },
    store::live::ChildSeen,
};

use super::server::Server;

fn metadata(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(name.to_owned()), namespace: Some("shop".to_owned()), ..ObjectMeta::default() }
}

fn plan() -> Plan {
    Plan {
        children: vec![
            Child::Secret(Secret { metadata: metadata("orders-db"), ..Secret::default() }),
            Child::Service(Service { metadata: metadata("orders"), ..Service::default() }),
            Child::Job(Job { metadata: metadata("orders-db-setup-01234567"), ..Job::default() }),
            Child::Deployment(Deployment { metadata: metadata("orders"), ..Deployment::default() }),
        ],
        ..Plan::default()
    }
}

/// What the operator has between two passes: its memory, and the children that it knows.
#[derive(Default)]
struct Operator {
    memory: Memory,
    present: BTreeMap<ChildRef, ChildSeen>,
}

impl Operator {
    async fn pass(&mut self, server: &Server, plan: &Plan) -> Outcome {
        let owner = Key::new(ObjectKind::Microservice, "shop", "orders");
        let outcome = apply(&server.client(), &self.memory, &owner, &self.present, plan, Instant::now()).await;
        for written in &outcome.written {
            self.present.insert(written.child.clone(), written.seen.clone());
        }
        for (child, _) in &outcome.deleted {
            self.present.remove(child);
        }
        outcome
    }

    fn seen(&mut self, kind: ChildKind) -> &mut ChildSeen {
        self.present.iter_mut().find(|(child, _)| child.kind == kind).map(|(_, seen)| seen).expect("known")
    }
}

const EVERYTHING: [&str; 4] = ["POST secrets", "PATCH services/orders", "POST jobs", "PATCH deployments/orders"];

#[tokio::test]
async fn children_are_written_in_the_plan_s_order_and_then_never_again() {
    let (server, mut operator) = (Server::default(), Operator::default());
    operator.pass(&server, &plan()).await;
    assert_eq!(server.lines(), EVERYTHING);
    let outcome = operator.pass(&server, &plan()).await;
    assert_eq!(server.lines(), [""; 0]);
    assert!(outcome.applied.failures.is_empty() && outcome.written.is_empty() && outcome.drifted.is_empty());
}

#[tokio::test]
async fn the_first_apply_takes_nothing_from_a_stranger() {
    let (server, mut operator) = (Server::default(), Operator::default());
    operator.pass(&server, &plan()).await;
    let asked = server.asked();
    assert!(
        asked[1].query.contains("fieldManager=weft") && !asked[1].query.contains("force=true"),
        "{}",
        asked[1].query
    );

    server.refuse("PATCH services", 409, "Apply failed with 1 conflict: conflict with \"helm\"");
    let outcome = Operator::default().pass(&server, &plan()).await;
    let failure = &outcome.applied.failures[0];
    assert_eq!(failure.reason, Reason::ChildConflict);
    assert!(failure.message.contains("Service orders exists and is not Weft's"), "{}", failure.message);
}

#[tokio::test]
async fn a_stranger_that_does_not_conflict_by_itself_is_found_out() {
    let (server, mut operator) = (Server::default(), Operator::default());
    let account = ServiceAccount { metadata: metadata("orders"), ..ServiceAccount::default() };
    let plan = Plan { children: vec![Child::ServiceAccount(account)], ..Plan::default() };
    server.refuse("POST serviceaccounts", 409, "serviceaccounts \"orders\" already exists");
    let outcome = operator.pass(&server, &plan).await;
    assert_eq!(server.lines(), ["POST serviceaccounts"]);
    let failure = &outcome.applied.failures[0];
    assert_eq!(failure.reason, Reason::ChildConflict);
}

#[tokio::test]
async fn what_somebody_changed_is_put_right_and_reported() {
    let (server, mut operator) = (Server::default(), Operator::default());
    operator.pass(&server, &plan()).await;
    server.lines();
    let deployment = operator.seen(ChildKind::Deployment);
    // somebody took a field from us
    deployment.ours += 1;
    deployment.version += 100;
    let outcome = operator.pass(&server, &plan()).await;
    let asked = server.asked();
    assert_eq!((asked.len(), asked[0].line().as_str()), (1, "PATCH deployments/orders"));
    assert!(asked[0].query.contains("force=true"));
    assert_eq!(outcome.drifted.iter().map(|(child, _)| child.kind).collect::<Vec<_>>(), [ChildKind::Deployment]);
}

/// Somebody writes `spec.replicas` whenever Weft does, as an autoscaler of the Deployment does.
#[tokio::test(start_paused = true)]
async fn who_undoes_every_repair_is_answered_ever_more_slowly_and_named() {
    let (server, mut operator) = (Server::default(), Operator::default());
    let mut plan = plan();
    let Some(Child::Deployment(deployment)) = plan.children.last_mut() else { panic!("no Deployment") };
    deployment.spec = Some(DeploymentSpec { replicas: Some(2), ..DeploymentSpec::default() });
    operator.pass(&server, &plan).await;
    let (mut repairs, mut outcome) = (0, Outcome::default());
    for _ in 0..20 {
        let seen = operator.seen(ChildKind::Deployment);
        seen.ours = 1;
        seen.version += 1;
        seen.foreign = vec![ForeignField {
            manager: "kube-controller-manager (scale)".to_owned(),
            path: FieldPath::of(&["spec", "replicas"]),
        }];
        server.lines();
        outcome = operator.pass(&server, &plan).await;
        repairs += server.lines().len();
        assert!(outcome.again.is_some(), "it is looked at again by itself");
        tokio::time::advance(Duration::from_secs(5)).await;
    }
    assert_eq!(repairs, 2, "at once, and after a minute");
    let [contested] = outcome.applied.contested.as_slice() else { panic!("{outcome:?}") };
    assert_eq!(
        (contested.fields.join(","), contested.author.as_str()),
        ("spec.replicas".to_owned(), "kube-controller-manager (scale)")
    );

    // the other one gives up
    tokio::time::advance(Duration::from_mins(5)).await;
    operator.pass(&server, &plan).await;
    tokio::time::advance(Duration::from_mins(15)).await;
    server.lines();
    let outcome = operator.pass(&server, &plan).await;
    assert!(
        outcome.applied.contested.is_empty() && outcome.again.is_none() && server.lines().is_empty(),
        "{outcome:?}"
    );
}

/// A policy that takes the annotation off whatever is written.
#[tokio::test(start_paused = true)]
async fn a_policy_that_changes_what_is_sent_is_no_endless_loop() {
    let (server, mut operator) = (Server::default(), Operator::default());
    operator.pass(&server, &plan()).await;
    let mut repairs = 0;
    for _ in 0..50 {
        operator.seen(ChildKind::Service).applied_hash = None;
        server.lines();
        operator.pass(&server, &plan()).await;
        repairs += server.lines().len();
        tokio::time::advance(Duration::from_millis(200)).await;
    }
    assert_eq!(repairs, 1);
}

#[tokio::test]
async fn what_somebody_added_is_shown_with_its_author() {
    let (server, mut operator) = (Server::default(), Operator::default());
    operator.pass(&server, &plan()).await;
    let added = |members: &[&str]| ForeignField { manager: "kubectl-set".to_owned(), path: FieldPath::of(members) };
    operator.seen(ChildKind::Deployment).foreign =
        vec![added(&["spec", "paused"]), added(&["spec", "template", "metadata", "annotations", "restartedAt"])];
    let outcome = operator.pass(&server, &plan()).await;
    let [change] = outcome.applied.added.as_slice() else { panic!("{outcome:?}") };
    assert_eq!(
        (change.fields.as_slice(), change.author.as_str()),
        (["spec.paused".to_owned()].as_slice(), "kubectl-set")
    );
    operator.seen(ChildKind::Deployment).foreign.clear();
    operator.seen(ChildKind::Service).foreign = vec![added(&["spec", "type"])];
    let outcome = operator.pass(&server, &plan()).await;
    let [change] = outcome.applied.added.as_slice() else { panic!("{outcome:?}") };
    assert_eq!(
        (change.child.kind, change.fields.as_slice()),
        (ChildKind::Service, ["spec.type".to_owned()].as_slice())
    );
}

#[tokio::test]
async fn what_somebody_deleted_is_made_again() {
    let (server, mut operator) = (Server::default(), Operator::default());
    operator.pass(&server, &plan()).await;
    server.lines();
    operator.present.retain(|child, _| !matches!(child.kind, ChildKind::Service | ChildKind::Job));
    let outcome = operator.pass(&server, &plan()).await;
    assert_eq!(server.lines(), ["PATCH services/orders", "POST jobs"]);
    assert_eq!(outcome.drifted.iter().map(|(child, _)| child.kind).collect::<Vec<_>>(), [ChildKind::Service]);
}

#[tokio::test]
async fn a_restart_applies_once_more_and_calls_nothing_drift() {
    let (server, mut operator) = (Server::default(), Operator::default());
    operator.pass(&server, &plan()).await;
    server.lines();
    operator.memory = Memory::default();
    server.refuse("POST secrets", 409, "secrets \"orders-db\" already exists");
    let outcome = operator.pass(&server, &plan()).await;
    assert_eq!(server.lines(), ["POST secrets", "PATCH services/orders", "PATCH deployments/orders"]);
    assert!(outcome.applied.failures.is_empty() && outcome.drifted.is_empty());
    operator.pass(&server, &plan()).await;
    assert_eq!(server.lines(), [""; 0]);
}

#[tokio::test]
async fn one_child_that_is_refused_does_not_keep_the_others_from_being_written() {
    let (server, mut operator) = (Server::default(), Operator::default());
    server.refuse("PATCH services", 422, "Service \"orders\" is invalid: spec.ports: Required value");
    let outcome = operator.pass(&server, &plan()).await;
    assert_eq!(server.lines(), EVERYTHING);
    let failures: Vec<_> = outcome.applied.failures.iter().map(|failure| failure.reason).collect();
    assert_eq!(failures, [Reason::ChildRefused]);
}

#[tokio::test]
async fn what_is_no_longer_planned_is_deleted_and_only_that_very_object() {
    let (server, mut operator) = (Server::default(), Operator::default());
    operator.pass(&server, &plan()).await;
    server.lines();
    let mut smaller = plan();
    smaller.children.retain(|child| !matches!(child, Child::Job(_) | Child::Deployment(_)));
    smaller.retained.push(ChildRef::new(ChildKind::Deployment, "orders"));
    operator.pass(&server, &smaller).await;
    let asked = server.asked();
    assert_eq!(
        asked.iter().map(super::server::Asked::line).collect::<Vec<_>>(),
        ["DELETE jobs/orders-db-setup-01234567"]
    );
    assert_eq!(asked[0].body["preconditions"]["uid"], "uid-orders-db-setup-01234567");
    assert_eq!(asked[0].body["propagationPolicy"], "Background");
}

#[tokio::test(start_paused = true)]
async fn an_api_server_that_does_not_answer_is_given_up_on() {
    let service = tower::service_fn(|_: axum::http::Request<kube::client::Body>| async {
        std::future::pending::<Result<axum::http::Response<kube::client::Body>, kube::Error>>().await
    });
    let client = kube::Client::new(service, "default");
    let owner = Key::new(ObjectKind::Microservice, "shop", "orders");
    let outcome = apply(&client, &Memory::default(), &owner, &BTreeMap::new(), &plan(), Instant::now()).await;
    assert_eq!(outcome.applied.failures.len(), 4);
    assert!(outcome.applied.failures.iter().all(|failure| failure.reason == Reason::ApiUnavailable));
}
