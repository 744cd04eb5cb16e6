use std::sync::Arc;

use super::{super::plan::plan, *};
use crate::controllers::{
    fixtures::{self, message, microservice, now, ready, refused, relay_of, settings, summaries},
    resources::{
        child::{ChildKind, ChildRef},
        observed::Workload,
        outcome::ForeignChange,
    },
};
use crate::{
    api::v1alpha1::SetUp,
    contract::{problem::Problem, status as contract},
};

fn leads() -> RelayStatus {
    RelayStatus {
        relay: "orders".to_owned(),
        leading: true,
        ready: true,
        published: 41,
        pending: 2,
        lag_seconds: 75.4,
        lag_bytes: Some(4096),
        latency: Some(contract::Latency { p50_seconds: 0.000_8, p99_seconds: 0.004 }),
        position: Some("0/16B3748".to_owned()),
        last_published: Some(now()),
        ..RelayStatus::default()
    }
}

fn stands_by() -> RelayStatus {
    RelayStatus { leading: false, ready: true, ..RelayStatus::default() }
}

fn settled() -> (OutboxRelay, Observed) {
    let object = relay_of("orders");
    let pods = [("orders-1", leads()), ("orders-2", stands_by())];
    let observed = Observed {
        microservice: Some(Arc::new(microservice("orders", "{image: i, database: {postgres: {}}}"))),
        relays: vec![object.clone()],
        deployment: Some(ready(2)),
        pods: pods.map(|(pod, status)| (pod.to_owned(), Some(status))).into(),
        ..Observed::default()
    };
    (object.as_ref().clone(), observed)
}

fn status_of(object: &OutboxRelay, observed: &Observed) -> OutboxRelayStatus {
    status(object, observed, &plan(object, observed, &settings()), &Applied::default(), now())
}

fn with(change: impl FnOnce(&mut RelayStatus)) -> OutboxRelayStatus {
    let (object, mut observed) = settled();
    change(observed.pods.get_mut("orders-1").unwrap().as_mut().unwrap());
    status_of(&object, &observed)
}

#[test]
fn a_relay_that_publishes() {
    let (object, observed) = settled();
    insta::assert_yaml_snapshot!(status_of(&object, &observed));
}

#[test]
fn a_broker_that_is_away_is_said_and_goes_away_by_itself() {
    let away = with(|leader| {
        leader.ready = false;
        leader.problems = vec![Problem::new(ProblemReason::BrokerUnreachable, "nats://n:4222 does not answer")];
    });
    assert_eq!(
        summaries(&away.conditions)[..2],
        ["Ready=False BrokerUnreachable", "Reconciling=True BrokerUnreachable"]
    );
    assert_eq!(message(&away.conditions, "Ready"), "nats://n:4222 does not answer");
    assert_eq!(summaries(&with(|_| ()).conditions)[0], "Ready=True Publishing");
}

#[test]
fn a_pod_that_cannot_run_is_the_cause_of_a_silent_relay() {
    let (object, mut observed) = settled();
    observed.pods = [("orders-relay-1".to_owned(), None)].into();
    assert_eq!(summaries(&status_of(&object, &observed).conditions)[0], "Ready=False RelaySilent");
    let problem = crate::controllers::resources::observed::Problem::new(Reason::OutOfMemory, "it needs more");
    observed.deployment.as_mut().unwrap().problems = vec![problem];
    let conditions = status_of(&object, &observed).conditions;
    assert_eq!(
        (summaries(&conditions)[0].as_str(), message(&conditions, "Ready")),
        ("Ready=False OutOfMemory", "it needs more")
    );
}

#[test]
fn who_contests_the_contract_is_a_condition() {
    let (object, observed) = settled();
    let contested = ForeignChange {
        child: ChildRef::new(ChildKind::ConfigMap, "orders-relay"),
        fields: vec!["data".to_owned()],
        author: "a tool".to_owned(),
    };
    let applied = Applied { contested: vec![contested], ..Applied::default() };
    let status = status(&object, &observed, &plan(&object, &observed, &settings()), &applied, now());
    assert!(message(&status.conditions, "Contested").contains("a tool"));
}

#[test]
fn another_contract_s_word_does_not_count() {
    let (object, observed) = settled();
    let version = plan(&object, &observed, &settings()).unwrap().contract_version;
    assert_eq!(summaries(&with(|leader| leader.contract = version).conditions)[0], "Ready=True Publishing");
    let older = with(|leader| leader.contract = "another".to_owned());
    assert_eq!(summaries(&older.conditions)[..2], ["Ready=False Loading", "Reconciling=True Loading"]);
    let another = with(|leader| leader.relay = "predecessor".to_owned());
    assert_eq!(summaries(&another.conditions)[0], "Ready=False RollingOut");
    assert!(message(&another.conditions, "Ready").contains("`predecessor`"));
    let unread = with(|leader| {
        leader.contract = "another".to_owned();
        leader.problems = vec![Problem::new(ProblemReason::ContractInvalid, "no such field")];
    });
    assert_eq!(message(&unread.conditions, "Ready"), "no such field");
}

#[test]
fn a_slot_at_risk_has_its_own_condition() {
    let risky = with(|leader| {
        leader.problems = vec![Problem::new(ProblemReason::SlotAtRisk, "the server will drop log in 10 MiB")];
    });
    assert_eq!(summaries(&risky.conditions)[0], "Ready=True Publishing");
    assert_eq!(summaries(&risky.conditions).last().unwrap(), "SlotAtRisk=True SlotAtRisk");
}

#[test]
fn polling_has_no_slot() {
    let (mut object, observed) = settled();
    object.spec.mode = RelayMode::Polling;
    assert!(!summaries(&status_of(&object, &observed).conditions).iter().any(|line| line.starts_with("SlotAtRisk")));
}

#[test]
fn an_event_that_the_broker_refuses_is_said_while_others_go_on() {
    let poisoned = with(|leader| {
        leader.problems = vec![Problem::new(ProblemReason::EventRefused, "event 7 of order o-1 is too large")];
    });
    assert_eq!(summaries(&poisoned.conditions)[0], "Ready=True EventRefused");
}

#[test]
fn a_paused_relay_is_ready_once_it_has_read_so() {
    let (mut object, mut observed) = settled();
    object.spec.paused = true;
    assert_eq!(summaries(&status_of(&object, &observed).conditions)[0], "Ready=False Loading");
    observed.pods.get_mut("orders-1").unwrap().as_mut().unwrap().paused = true;
    assert_eq!(summaries(&status_of(&object, &observed).conditions)[0], "Ready=True Paused");
}

#[test]
fn numbers_stay_while_nobody_can_tell() {
    let (mut object, mut observed) = settled();
    object.status = Some(status_of(&object, &observed));
    for status in observed.pods.values_mut() {
        *status = None;
    }
    let silent = status_of(&object, &observed);
    assert_eq!(summaries(&silent.conditions)[0], "Ready=False RelaySilent");
    assert_eq!((silent.published, silent.pending, silent.leader), (41, 2, None));
}

#[test]
fn what_a_relay_waits_for_is_said() {
    let reason = |change: &dyn Fn(&mut Observed)| {
        let (object, mut observed) = settled();
        change(&mut observed);
        summaries(&status_of(&object, &observed).conditions)[0].clone()
    };
    assert_eq!(reason(&|observed| observed.microservice = None), "Ready=False MicroserviceNotFound");
    assert_eq!(
        reason(&|observed| (observed.pods.clear(), observed.deployment = None).1),
        "Ready=False MicroserviceNotReady"
    );
    assert_eq!(
        reason(&|observed| (observed.pods.clear(), observed.deployment = Some(Workload::default())).1),
        "Ready=False ScaledToZero"
    );
    assert_eq!(reason(&|observed| drop(observed.pods.insert("orders-1".to_owned(), None))), "Ready=False NoLeader");
}

#[test]
fn an_unknown_microservice_is_not_accepted_and_ends_by_itself() {
    let (object, mut observed) = settled();
    let microservice = observed.microservice.take();
    let conditions = status_of(&object, &observed).conditions;
    assert_eq!(
        summaries(&conditions)[1..4],
        ["Reconciling=True MicroserviceNotFound", "Stalled=False NotStalled", "Accepted=False MicroserviceNotFound"]
    );
    observed.microservice = microservice;
    assert_eq!(summaries(&status_of(&object, &observed).conditions)[3], "Accepted=True Accepted");
}

#[test]
fn a_relay_waits_until_its_table_is_followed() {
    let (_, mut observed) = settled();
    let spec = "{microservice: orders, sink: {nats: {servers: ['nats://n']}}, outbox: {layout: Debezium}}";
    let object = fixtures::relay("orders", spec);
    observed.relays = vec![object.clone()];
    let ready = |observed: &Observed| summaries(&status_of(&object, observed).conditions)[0].clone();
    assert_eq!(ready(&observed), "Ready=False MicroserviceNotReady");
    let outbox_hash = database::outbox_hash(&object.spec.outbox);
    observed.set_up = Some(SetUp { outbox_hash, ..SetUp::default() });
    assert_eq!(ready(&observed), "Ready=True Publishing");
    observed.set_up = Some(SetUp { outbox_hash: Some("another".to_owned()), ..SetUp::default() });
    assert_eq!(ready(&observed), "Ready=False MicroserviceNotReady");
}

#[test]
fn a_second_relay_on_the_outbox_is_not_accepted() {
    let (_, mut observed) = settled();
    let second = fixtures::relay("second", "{microservice: orders, sink: {nats: {servers: ['nats://n']}}}");
    observed.relays.push(second.clone());
    let conditions = status_of(&second, &observed).conditions;
    assert_eq!(summaries(&conditions)[2..4], ["Stalled=True OutboxTaken", "Accepted=False OutboxTaken"]);
}

#[test]
fn a_relay_whose_contract_is_refused_is_not_accepted() {
    let (object, observed) = settled();
    let planned = plan(&object, &observed, &settings());
    let status = status(&object, &observed, &planned, &refused(ChildKind::ConfigMap, "orders-relay"), now());
    assert_eq!(summaries(&status.conditions)[2..4], ["Stalled=True ChildRefused", "Accepted=False ChildRefused"]);
}

#[test]
fn ages_are_short() {
    let ages = [0.0, 0.4, 59.9, 60.0, 3599.0, 7300.0, f64::NAN, -1.0].map(age);
    assert_eq!(ages, ["0s", "0s", "59s", "1m", "59m", "2h", "0s", "0s"]);
}
