use std::sync::Arc;

use super::{
    super::{
        Member, Orchestrator,
        plan::{define, orchestrator},
    },
    *,
};
use crate::{
    api::v1alpha1::SagaEvent,
    contract::status::{OrchestratorStatus, StartReport},
    controllers::{
        fixtures::{self, job, message, microservice, now, ready, refused, saga, settings, summaries},
        resources::{
            child::ChildKind,
            observed::{JobOutcome, Problem, Workload},
            reason::Reason,
        },
        runtime::PassResult,
    },
};

const SPEC: &str = "{steps: [{name: act, do: {service: orders, command: Act}, undo: {none: true}}]}";

fn settled() -> (Saga, Observed) {
    let object = saga("create-order", SPEC);
    let orders = "{image: i, ports: [{name: http, port: 80}], commands: {Act: {http: {path: /act}}}}";
    let mut observed = Observed {
        services: [("orders".to_owned(), Arc::new(microservice("orders", orders)))].into(),
        ..Observed::default()
    };
    let defined = define(&object, &observed).unwrap();
    let version = defined.version().to_owned();
    let counts = SagaCounts { version, running: 3, completed: 5, compensated: 1, ..SagaCounts::default() };
    observed.orchestrator.database.server = Some(ready(1));
    observed.orchestrator.deployment = Some(ready(1));
    observed.orchestrator.status = Some(OrchestratorStatus {
        ready: true,
        sagas: [("create-order".to_owned(), counts)].into(),
        ..OrchestratorStatus::default()
    });
    let group = Orchestrator {
        namespace: "shop".to_owned(),
        name: "default".to_owned(),
        members: vec![Member { saga: Arc::new(object.clone()), defined: Some(defined) }],
        unreadable: Vec::new(),
        kept: Vec::new(),
    };
    let plan = orchestrator(&group, &observed.orchestrator, &settings()).unwrap();
    let name = fixtures::names(&plan).into_iter().find_map(|name| name.strip_prefix("Job/").map(str::to_owned));
    observed.orchestrator.database.jobs.insert(name.unwrap(), job(JobOutcome::Succeeded));
    (object, observed)
}

fn status_of(object: &Saga, observed: &Observed) -> SagaStatus {
    status(object, observed, &define(object, observed), now())
}

fn with(change: impl FnOnce(&mut Observed)) -> SagaStatus {
    let (object, mut observed) = settled();
    change(&mut observed);
    status_of(&object, &observed)
}

fn counts(observed: &mut Observed) -> &mut SagaCounts {
    observed.orchestrator.status.as_mut().unwrap().sagas.get_mut("create-order").unwrap()
}

#[test]
fn a_saga_that_runs() {
    insta::assert_yaml_snapshot!(with(|_| ()));
}

#[test]
fn stuck_instances_are_loud_and_do_not_stop_new_ones() {
    let status = with(|observed| {
        let instance = StuckInstance {
            id: "0192-a".to_owned(),
            step: "act".to_owned(),
            operation: "undo".to_owned(),
            message: "503 Service Unavailable".to_owned(),
            since: now(),
        };
        let counts = counts(observed);
        counts.stuck = 2;
        counts.stuck_instances = vec![instance];
    });
    assert_eq!(summaries(&status.conditions)[0], "Ready=True InstancesStuck");
    assert!(
        message(&status.conditions, "Ready").contains("of the saga; 2 instances wait for a person; the oldest, 0192-a")
    );
    assert_eq!(summaries(&status.conditions).last().unwrap(), "Stuck=True InstancesStuck");
    assert_eq!(
        message(&status.conditions, "Stuck"),
        "2 instances wait for a person; the oldest, 0192-a, cannot undo step `act`: 503 Service Unavailable"
    );
    assert_eq!((status.stuck, status.stuck_instances.len()), (2, 1));
}

#[test]
fn who_owes_what_and_what_was_never_declared_is_said_of_a_choreography() {
    let spec = "{style: Choreography, startOn: {service: orders, event: OrderCreated},
        reactions: [{to: {service: orders, event: OrderCreated}, service: orders, emits: [OrderApproved], within: 5s}],
        completes: [{service: orders, event: OrderApproved}]}";
    let object = saga("create-order", spec);
    let (_, mut observed) = settled();
    observed.relays = vec![fixtures::relay_of("orders")];
    counts(&mut observed).version = define(&object, &observed).unwrap().version().to_owned();
    let calm = status_of(&object, &observed);
    let expected = "every event that was seen is declared, and came in time";
    assert_eq!((message(&calm.conditions, "AsDeclared"), calm.steps), (expected, 1));
    let owes = "orders owes OrderApproved to OrderCreated since 12:04:00 UTC, within 5s";
    let instance = StuckInstance {
        id: "0192-a".to_owned(),
        step: "orders".to_owned(),
        operation: REACT.to_owned(),
        message: owes.to_owned(),
        since: now(),
    };
    let of = |service: &str, event: &str| Kind::new(service, event);
    let finding = |finding: &str, cause: Option<Kind>, count: u64| FindingCount {
        finding: finding.to_owned(),
        event: of("orders", "OrderChecked"),
        cause,
        count,
    };
    let counted = counts(&mut observed);
    (counted.stuck, counted.stuck_instances) = (1, vec![instance]);
    let created = Some(of("orders", "OrderCreated"));
    counted.findings = vec![
        finding("undeclared", created.clone(), 4),
        finding("late", created, 2),
        finding("repeated", None, 1),
        finding("late", None, 1),
    ];
    let status = status_of(&object, &observed);
    assert_eq!(
        message(&status.conditions, "Stuck"),
        format!("1 instance waits for a person; the oldest, 0192-a: {owes}")
    );
    assert_eq!(
        message(&status.conditions, "AsDeclared"),
        "`orders` emitted OrderChecked in reaction to OrderCreated 4 times, which no reaction of the Saga declares; `orders` emitted OrderChecked in reaction to OrderCreated 2 times, later than the Saga allows; `orders` emitted OrderChecked once, although it had reacted already; and 1 more"
    );
}

#[test]
fn what_a_saga_waits_for_is_said() {
    let reason = |change: &dyn Fn(&mut Observed)| summaries(&with(change).conditions)[0].clone();
    assert_eq!(reason(&|observed| observed.services.clear()), "Ready=False MicroserviceNotFound");
    assert_eq!(reason(&|observed| observed.orchestrator.database.server = None), "Ready=False Creating");
    assert_eq!(reason(&|observed| observed.orchestrator.database.jobs.clear()), "Ready=False SetupPending");
    assert_eq!(
        reason(&|observed| {
            let crashing = vec![Problem::new(Reason::CrashLooping, "exits with code 1")];
            observed.orchestrator.deployment = Some(Workload { ready: 0, problems: crashing, ..ready(1) });
        }),
        "Ready=False CrashLooping"
    );
    assert_eq!(reason(&|observed| observed.orchestrator.status = None), "Ready=False OrchestratorSilent");
    assert_eq!(
        reason(&|observed| observed.orchestrator.status.as_mut().unwrap().ready = false),
        "Ready=False Starting"
    );
    assert_eq!(reason(&|observed| counts(observed).version.clear()), "Ready=False Loading");
}

#[test]
fn a_rejection_that_ends_by_itself_does_not_stall_and_another_does() {
    let waiting = with(|observed| observed.services.clear());
    assert_eq!(
        summaries(&waiting.conditions)[1..4],
        ["Reconciling=True MicroserviceNotFound", "Stalled=False NotStalled", "Accepted=False MicroserviceNotFound"]
    );
    let (mut object, observed) = settled();
    object.spec.steps[0].task.undo = None;
    let invalid = status_of(&object, &observed);
    assert_eq!(summaries(&invalid.conditions)[2..4], ["Stalled=True InvalidSaga", "Accepted=False InvalidSaga"]);
    assert_eq!((invalid.running, invalid.completed), (3, 5), "its running instances are still counted");
}

#[test]
fn a_saga_whose_orchestrator_is_refused_is_not_accepted() {
    let (object, observed) = settled();
    let applied = refused(ChildKind::StatefulSet, "default-orchestrator-db");
    let observed = Observed { orchestrator_pass: Some(PassResult { applied, rejection: None }), ..observed };
    let status = status(&object, &observed, &define(&object, &observed), now());
    assert_eq!(summaries(&status.conditions)[2..4], ["Stalled=True ChildRefused", "Accepted=False ChildRefused"]);
}

#[test]
fn numbers_stay_while_nobody_can_tell() {
    let (mut object, mut observed) = settled();
    object.status = Some(status_of(&object, &observed));
    observed.orchestrator.status = None;
    let silent = status_of(&object, &observed);
    assert_eq!((silent.running, silent.completed, silent.compensated), (3, 5, 1));
    assert_eq!(summaries(&silent.conditions).last().unwrap(), "Stuck=Unknown OrchestratorSilent");
}

#[test]
fn a_rejected_saga_says_which_version_runs() {
    let (mut object, mut observed) = settled();
    object.spec.steps[0].task.action.as_mut().unwrap().command = "Akt".to_owned();
    let version = counts(&mut observed).version.clone();
    let accepted = |observed: &Observed| message(&status_of(&object, observed).conditions, "Accepted").to_owned();
    let sentence = accepted(&observed);
    assert!(sentence.ends_with(&format!("; new instances start with the last good version, {version}")), "{sentence}");
    // one that was never good has none
    counts(&mut observed).version.clear();
    assert!(!accepted(&observed).contains("last good"));
}

#[test]
fn a_deleted_saga_says_what_it_waits_for() {
    let (mut object, mut observed) = settled();
    object.metadata.finalizers = Some(vec!["weft.dev/drain".to_owned()]);
    object.metadata.deletion_timestamp = Some(Time(now()));
    counts(&mut observed).draining = true;
    let conditions = status_of(&object, &observed).conditions;
    assert_eq!(summaries(&conditions)[0], "Ready=False Draining");
    assert!(message(&conditions, "Deleting").starts_with("3 instances are left"), "{conditions:?}");
}

#[test]
fn an_event_that_was_never_seen_is_said_and_hinders_nothing() {
    let (mut object, mut observed) = settled();
    let planned = define(&object, &observed);
    object.spec.start_on = Some(SagaEvent { service: "orders".to_owned(), event: "OrderCreatd".to_owned() });
    let report = |seen, types: &[&str]| {
        let types = types.iter().map(|&one| one.to_owned()).collect();
        Some(StartReport { seen, types, dead: 2 })
    };
    let mut said = |start| {
        counts(&mut observed).start = start;
        let status = status(&object, &observed, &planned, now());
        assert_eq!(summaries(&status.conditions)[0], "Ready=True Ready");
        let found = status.conditions.iter().find(|one| one.type_ == "StartEventSeen");
        (found.map(|one| (one.status.clone(), one.reason.clone(), one.message.clone())), status.dead_starts)
    };
    assert_eq!(said(None), (None, 0));
    assert_eq!(said(report(None, &[])), (None, 2), "subjects do not say the type");
    let sentence = "`orders` has published no event of type `OrderCreatd` yet; those that the stream has are `OrderCreated`, `OrderPaid`";
    let unseen = Some(("False".to_owned(), "NoSuchEvent".to_owned(), sentence.to_owned()));
    assert_eq!(said(report(Some(false), &["OrderCreated", "OrderPaid"])), (unseen, 2));
    assert_eq!(said(report(Some(true), &[])).0.unwrap().0, "True");
}
