use std::{path::Path, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use super::{CONTRACT_FILE, check_brokers, define, orchestrator};
use crate::{
    api::v1alpha1::{EventFormat, Saga},
    contract::{Contract, orchestrator as contract},
    controllers::{
        fixtures::{self, find, microservice, ready, relay, relay_of, saga, settings, settings_with_broker},
        kinds::saga::{Defined, Member, Observed, Orchestrator, OrchestratorObserved},
        render::owner::reference,
        resources::{
            child::{Child, ChildKind, ChildRef},
            observed::{JobOutcome, Workload},
            plan::{Plan, Rejection},
            reason::Reason,
        },
    },
};

const CREATE_ORDER: &str = r"
startOn: {service: orders, event: OrderCreated}
deadline: 1m30s
steps:
- name: reserve-credit
  do: {service: customers, command: ReserveCredit, with: {amount: input.total}}
  undo: {service: customers, command: ReleaseCredit, with: {amount: input.total}}
  failures: {CreditLimitExceeded: INSUFFICIENT_CREDIT}
  timeout: 1500ms
  retry: {maxAttempts: 5, initialBackoff: 50ms, maxBackoff: 1s}
- name: look
  do: {service: orders, command: ApproveOrder}
  undo: {none: true}
- name: approve
  pivot: true
  do: {service: orders, command: ApproveOrder}
onCompensated: {service: orders, command: RejectOrder, with: {reason: failure.reason}}
";

fn create_order() -> Saga {
    saga("create-order", CREATE_ORDER)
}

fn observed() -> Observed {
    let customers = r"
image: i
ports: [{name: grpc, port: 9090, protocol: grpc}, {name: http, port: 8080}]
commands:
  ReserveCredit: {http: {path: /commands/reserve-credit}}
  ReleaseCredit: {http: {path: /commands/release-credit, method: PUT}}
";
    let orders = r"
image: i
database: {postgres: {}}
ports: [{name: http, port: 8081}]
commands:
  ApproveOrder: {http: {path: /commands/approve-order}}
  RejectOrder: {http: {path: /commands/reject-order}}
";
    let services = [("customers", customers), ("orders", orders)];
    Observed {
        services: services.map(|(name, spec)| (name.to_owned(), Arc::new(microservice(name, spec)))).into(),
        relays: vec![relay_of("orders")],
        ..Observed::default()
    }
}

fn member(saga: Saga, observed: &Observed) -> Member {
    let defined = define(&saga, observed).ok();
    Member { saga: Arc::new(saga), defined }
}

fn two_sagas() -> Orchestrator {
    let broken = saga("broken", "{steps: [{name: a, do: {service: nobody, command: Act}, undo: {none: true}}]}");
    let members = vec![member(broken, &observed()), member(create_order(), &observed())];
    Orchestrator {
        namespace: "shop".to_owned(),
        name: "default".to_owned(),
        members,
        unreadable: Vec::new(),
        kept: Vec::new(),
    }
}

/// The store after the database's set-up.
fn settled(object: &Orchestrator) -> OrchestratorObserved {
    let mut observed = OrchestratorObserved::default();
    observed.database.server = Some(ready(1));
    let plan = orchestrator(object, &observed, &settings()).unwrap();
    let job = fixtures::names(&plan).into_iter().find_map(|name| name.strip_prefix("Job/").map(str::to_owned));
    observed.database.jobs.insert(job.unwrap(), fixtures::job(JobOutcome::Succeeded));
    observed
}

const CHOREOGRAPHY: &str = r"
style: Choreography
startOn: {service: orders, event: OrderCreated}
reactions:
- {to: {service: orders, event: OrderCreated}, service: customers, emits: [CreditReserved, CreditLimitExceeded], within: 5s}
completes: [{service: customers, event: CreditReserved}]
compensates: [{service: customers, event: CreditLimitExceeded}]
";

#[test]
fn a_choreography_is_followed_where_its_services_publish() {
    let saga = saga("credit", CHOREOGRAPHY);
    let mut observed = observed();
    let refused = |observed: &Observed| {
        let Rejection { reason, message } = define(&saga, observed).unwrap_err();
        (reason, message)
    };
    let (reason, message) = refused(&observed);
    assert_eq!(reason, Reason::OutboxRelayNotFound);
    assert!(message.starts_with("spec.reactions[0].service: no OutboxRelay publishes the events of `customers`"));
    observed.relays.push(relay_of("customers"));
    let member = member(saga.clone(), &observed);
    let Some(Defined::Choreographed(followed)) = &member.defined else { panic!() };
    assert_eq!(followed.sinks.keys().collect::<Vec<_>>(), ["customers", "orders"]);
    let object = Orchestrator { members: vec![member], ..two_sagas() };
    let plan = orchestrator(&object, &OrchestratorObserved::default(), &settings()).unwrap();
    let config = plan.children.iter().find_map(|child| match child {
        Child::ConfigMap(map) if map.name_any() == "default-orchestrator" => Some(map.clone()),
        _ => None,
    });
    let text = config.unwrap().data.unwrap().remove(CONTRACT_FILE).unwrap();
    assert!(text.contains("withinMs: 5000") && text.contains("event: CreditLimitExceeded"), "{text}");
    observed.services.remove("customers");
    assert_eq!(refused(&observed).0, Reason::MicroserviceNotFound);
}

#[test]
fn a_definition_has_addresses_and_milliseconds() {
    let Ok(Defined::Orchestrated { definition, start }) = define(&create_order(), &observed()) else { panic!() };
    insta::assert_yaml_snapshot!(definition);
    let start = start.unwrap();
    assert_eq!((start.service.as_str(), start.event_type.as_str()), ("orders", "OrderCreated"));
}

#[test]
fn an_orchestrator_has_credentials_of_the_installed_broker_whatever_its_sagas_need() {
    let object = two_sagas();
    let plan = orchestrator(&object, &settled(&object), &settings_with_broker()).unwrap();
    let secret =
        fixtures::names(&plan).into_iter().find(|name| name.starts_with("Secret/default-orchestrator-broker-"));
    let metadata = find(&plan, &secret.unwrap())["metadata"].clone();
    assert!(metadata["ownerReferences"].is_null(), "it outlives the Saga that was there when it was made");
    let pod = find(&plan, "Deployment/default-orchestrator")["spec"]["template"]["spec"].to_string();
    assert!(pod.contains("/etc/weft/broker"));
}

#[test]
fn an_event_that_nobody_can_read_rejects_its_saga_alone() {
    let mut observed = observed();
    observed.relays = vec![relay("orders", "{microservice: orders, sink: {nats: {}}}")];
    let defined = define(&create_order(), &observed).unwrap();
    let rejection = check_brokers(&defined, &settings()).unwrap_err();
    assert_eq!(rejection.reason, Reason::NoBroker);
    assert!(rejection.message.starts_with("spec.startOn.service: the OutboxRelay of `orders` is rejected: "));
    let object = Orchestrator { members: vec![member(create_order(), &observed)], ..two_sagas() };
    let plan = orchestrator(&object, &settled(&object), &settings()).unwrap();
    assert!(!find(&plan, "ConfigMap/default-orchestrator").to_string().contains("OrderCreated"));
}

#[test]
fn a_definitions_version_is_of_its_content() {
    let version = |saga: &Saga| define(saga, &observed()).unwrap().version().to_owned();
    let mut other = create_order();
    assert_eq!(version(&other), version(&create_order()));
    other.spec.steps[0].task.failures.clear();
    assert_ne!(version(&other), version(&create_order()));
}

fn contract_of(plan: &Plan) -> contract::Orchestrator {
    let text = find(plan, "ConfigMap/default-orchestrator")["data"]["orchestrator.yaml"].as_str().unwrap().to_owned();
    contract::Orchestrator::from_yaml(&text, Path::new("orchestrator.yaml")).unwrap()
}

#[test]
fn the_last_good_definition_stays_in_force_while_a_saga_is_rejected_or_cannot_be_read() {
    let mut object = two_sagas();
    let mut observed = settled(&object);
    let settings = settings_with_broker();
    let before = orchestrator(&object, &observed, &settings).unwrap();
    let names =
        |plan: &Plan| find(plan, "ConfigMap/default-orchestrator")["metadata"]["annotations"]["weft.dev/sagas"].clone();
    assert_eq!(names(&before), r#"["create-order"]"#, "what was never good does not start");
    observed.contract = Some(Box::new(contract_of(&before)));

    // an edit with a mistake in it
    let mut edited = create_order();
    edited.spec.steps[0].task.action.as_mut().unwrap().command = "Reserve".to_owned();
    edited.spec.start_on.as_mut().unwrap().event = "OrderMade".to_owned();
    object.members[1] = member(edited, &self::observed());
    assert_eq!(object.members[1].defined, None);
    object.kept = vec!["create-order".to_owned()];
    let rejected = orchestrator(&object, &observed, &settings).unwrap();
    assert_eq!(contract_of(&rejected), contract_of(&before), "definition and start");
    assert_eq!(names(&rejected), names(&before));

    // the others go on: another one is added meanwhile
    let other = saga("other", "{steps: [{name: a, do: {service: orders, command: ApproveOrder}, undo: {none: true}}]}");
    object.members.push(member(other, &self::observed()));
    let added = contract_of(&orchestrator(&object, &observed, &settings).unwrap());
    assert_eq!(added.sagas.iter().map(|saga| saga.name.as_str()).collect::<Vec<_>>(), ["create-order", "other"]);
    assert_eq!(added.sagas[0], contract_of(&before).sagas[0]);

    let unreadable = object.members.remove(1);
    object.unreadable = vec![reference(unreadable.saga.as_ref())];
    let unread = orchestrator(&object, &observed, &settings).unwrap();
    assert_eq!(contract_of(&unread), added);
    let deployment = |plan| find(plan, "Deployment/default-orchestrator");
    assert_eq!(
        deployment(&before)["metadata"]["ownerReferences"],
        deployment(&rejected)["metadata"]["ownerReferences"]
    );

    // it is corrected
    object.kept.clear();
    object.unreadable.clear();
    object.members.push(member(create_order(), &self::observed()));
    let corrected = contract_of(&orchestrator(&object, &observed, &settings).unwrap());
    assert_eq!(corrected.sagas.len(), 2);
}

#[test]
fn what_sagas_that_cannot_be_read_asked_for_stays() {
    let mut object = two_sagas();
    let mut long = create_order();
    long.spec.retention = std::time::Duration::from_hours(2160).into();
    object.members[1] = member(long, &self::observed());
    let mut observed = settled(&object);
    let settings = settings_with_broker();
    let mut before = contract_of(&orchestrator(&object, &observed, &settings).unwrap());
    assert_eq!(before.retention_ms, 2160 * 3_600_000);
    before.draining = vec!["create-order".to_owned()];
    observed.contract = Some(Box::new(before));
    let unreadable = object.members.remove(1);
    object.unreadable = vec![reference(unreadable.saga.as_ref())];
    object.kept = vec!["create-order".to_owned()];
    for rest in [object.members.clone(), Vec::new()] {
        object.members = rest;
        let contract = contract_of(&orchestrator(&object, &observed, &settings).unwrap());
        assert_eq!(contract.retention_ms, 2160 * 3_600_000);
        assert_eq!(contract.draining, ["create-order"], "it starts nothing again");
    }
    observed.contract = None;
    let contract = contract_of(&orchestrator(&object, &observed, &settings).unwrap());
    assert_eq!(contract.retention_ms, 168 * 3_600_000, "the default, and never nothing");
}

#[test]
fn what_a_saga_names_and_cannot_be_read_is_waited_for() {
    let mut observed = observed();
    observed.services.remove("customers");
    observed.unreadable = ["customers".to_owned()].into();
    let rejection = define(&create_order(), &observed).unwrap_err();
    assert!(rejection.reason.is_waited_for(), "{rejection:?}");
    assert_eq!(rejection.reason, Reason::MicroserviceMalformed);
    let mut observed = self::observed();
    observed.kept_relays = [("orders".to_owned(), "orders".to_owned())].into();
    assert_eq!(define(&create_order(), &observed).unwrap_err().reason, Reason::OutboxRelayMalformed);
}

#[test]
fn the_orchestrator_gets_no_secret_of_weft_for_a_relay() {
    let mut observed = observed();
    let with = |secret: &str| {
        relay(
            "orders",
            &format!("{{microservice: orders, sink: {{nats: {{servers: ['nats://thief'], secret: {secret}}}}}}}"),
        )
    };
    observed.relays = vec![with("customers-db-admin")];
    assert_eq!(define(&create_order(), &observed).unwrap_err().reason, Reason::NotItsOwn);
    // one that was let in earlier is not mounted
    observed.relays = vec![with("mine")];
    let mut object = two_sagas();
    object.members = vec![member(create_order(), &observed)];
    for (secret, mounted) in [("mine", true), ("orders-db", false)] {
        if let Some(Defined::Orchestrated { start: Some(start), .. }) = object.members[0].defined.as_mut() {
            start.sink.secret = Some(secret.to_owned());
        }
        let plan = orchestrator(&object, &settled(&object), &settings()).unwrap();
        let deployment = find(&plan, "Deployment/default-orchestrator").to_string();
        assert_eq!(deployment.contains(&format!("\"secretName\":\"{secret}\"")), mounted, "{secret}");
    }
}

#[test]
fn what_a_saga_names_and_does_not_exist_gets_a_sentence() {
    let refused = |change: &dyn Fn(&mut Saga, &mut Observed)| {
        let (mut saga, mut observed) = (create_order(), observed());
        change(&mut saga, &mut observed);
        let rejection = define(&saga, &observed).unwrap_err();
        (rejection.reason, rejection.message)
    };
    let (reason, message) = refused(&|_, observed| drop(observed.services.remove("customers")));
    assert_eq!(reason, Reason::MicroserviceNotFound);
    assert_eq!(
        message,
        "spec.steps[0].do.service: there is no Microservice `customers` in this namespace yet: apply it, or correct the name"
    );

    let (reason, message) =
        refused(&|saga, _| "Reserve".clone_into(&mut saga.spec.steps[0].task.action.as_mut().unwrap().command));
    assert_eq!(reason, Reason::CommandNotFound);
    assert!(message.contains("has no command `Reserve` (it has `ReleaseCredit`, `ReserveCredit`)"), "{message}");

    let (reason, message) = refused(&|saga, _| saga.spec.deadline = std::time::Duration::from_hours(2_160).into());
    assert_eq!(reason, Reason::InvalidSaga);
    assert!(
        message.contains("may outlast the 7776000s for") && message.contains("duplicateWindow.commands"),
        "{message}"
    );

    let (reason, message) = refused(&|_, observed| observed.relays.clear());
    assert_eq!(reason, Reason::OutboxRelayNotFound);
    assert!(message.starts_with("spec.startOn.service: no OutboxRelay publishes the events of `orders`"), "{message}");

    let (reason, message) =
        refused(&|_, observed| Arc::make_mut(&mut observed.relays[0]).spec.format = EventFormat::Raw);
    assert_eq!(reason, Reason::NoEventType);
    assert!(message.starts_with("spec.startOn: the OutboxRelay of `orders` publishes in the format Raw"), "{message}");

    let (reason, _) = refused(&|_, observed| {
        let mut customers = observed.services["customers"].as_ref().clone();
        customers.spec.ports.pop();
        observed.services.insert("customers".to_owned(), Arc::new(customers));
    });
    assert_eq!(reason, Reason::NoHttpPort);
}

#[test]
fn what_is_wrong_with_a_saga_is_said_at_once_and_before_what_it_names() {
    let mut saga = create_order();
    saga.spec.steps[0].task.undo = None;
    saga.spec.steps[1].task.action.as_mut().unwrap().with.insert("x".to_owned(), "input.".to_owned());
    let refused = define(&saga, &Observed::default()).unwrap_err();
    assert_eq!(refused.reason, Reason::InvalidSaga);
    assert!(refused.message.contains("spec.steps[0].undo:"), "{}", refused.message);
    assert!(refused.message.contains("spec.steps[1].do.with.x:"), "{}", refused.message);
}

#[test]
fn a_negative_duration_is_refused() {
    let saga = saga(
        "s",
        "{deadline: -5m, steps: [{name: a, do: {service: orders, command: ApproveOrder}, undo: {none: true}}]}",
    );
    let refused = define(&saga, &observed()).unwrap_err();
    assert!(refused.message.starts_with("spec.deadline: -300s is negative"), "{}", refused.message);
}

#[test]
fn an_orchestrator_as_a_whole() {
    let plan = orchestrator(&two_sagas(), &settled(&two_sagas()), &settings()).unwrap();
    let without_database: Vec<_> =
        plan.children.iter().filter(|child| !child.reference().name.contains("-db")).cloned().collect();
    insta::assert_snapshot!(fixtures::yaml(&crate::controllers::resources::plan::Plan {
        children: without_database,
        ..Default::default()
    }));
    insta::assert_yaml_snapshot!(fixtures::names(&plan));
}

#[test]
fn a_rejected_saga_is_left_out_and_the_others_go_on() {
    let plan = orchestrator(&two_sagas(), &settled(&two_sagas()), &settings()).unwrap();
    let text = find(&plan, "ConfigMap/default-orchestrator")["data"]["orchestrator.yaml"].as_str().unwrap().to_owned();
    let contract = crate::contract::orchestrator::Orchestrator::from_yaml(&text, "".as_ref()).unwrap();
    assert_eq!(contract.sagas.iter().map(|saga| saga.name.as_str()).collect::<Vec<_>>(), ["create-order"]);
    assert_eq!(contract.starts.len(), 1);
}

#[test]
fn all_its_sagas_own_it_together() {
    let plan = orchestrator(&two_sagas(), &settled(&two_sagas()), &settings()).unwrap();
    for child in plan.children.iter().map(fixtures::value).filter(|child| child["kind"] != "Secret") {
        let owners = child["metadata"]["ownerReferences"].as_array().unwrap();
        let names: Vec<_> = owners.iter().map(|owner| owner["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["broken", "create-order"]);
        assert!(owners.iter().all(|owner| owner.get("controller").is_none()));
    }
}

#[test]
fn nothing_is_made_before_the_first_saga_is_accepted_and_nothing_goes_when_the_last_is_rejected() {
    let mut object = two_sagas();
    object.members.truncate(1);
    assert_eq!(
        fixtures::names(&orchestrator(&object, &OrchestratorObserved::default(), &settings()).unwrap()),
        [""; 0]
    );
    let plan = orchestrator(&object, &settled(&two_sagas()), &settings()).unwrap();
    assert!(fixtures::names(&plan).contains(&"Deployment/default-orchestrator".to_owned()));
}

#[test]
fn the_orchestrator_waits_for_its_database() {
    let observed = OrchestratorObserved::default();
    let plan = orchestrator(&two_sagas(), &observed, &settings()).unwrap();
    assert!(!fixtures::names(&plan).contains(&"Deployment/default-orchestrator".to_owned()));
    assert_eq!(plan.retained, [ChildRef::new(ChildKind::Deployment, "default-orchestrator")]);
}

#[test]
fn a_set_up_of_new_tables_stops_no_repair_of_the_orchestrator() {
    let mut observed = settled(&two_sagas());
    let first = orchestrator(&two_sagas(), &observed, &settings()).unwrap();
    let kept = find(&first, "ConfigMap/default-orchestrator-db-setup");
    let released = kept["data"]["released.json"].as_str().unwrap();
    observed.database.released = serde_json::from_str(released).unwrap();
    observed.database.jobs.clear();
    let mut newer = settings();
    newer.image = "localhost/weft:2".to_owned();
    let second = orchestrator(&two_sagas(), &observed, &newer).unwrap();
    let spec = |plan| find(plan, "Deployment/default-orchestrator")["spec"].clone();
    assert_eq!(spec(&first), spec(&second), "though it was deleted");
}

#[test]
fn another_operator_or_another_saga_restarts_nothing() {
    let mut observed = settled(&two_sagas());
    let first = orchestrator(&two_sagas(), &observed, &settings()).unwrap();
    let deployment = find(&first, "Deployment/default-orchestrator");
    let annotations = serde_json::from_value(deployment["metadata"]["annotations"].clone()).unwrap();
    observed.deployment = Some(Workload { annotations, ..ready(1) });
    let mut newer = settings();
    newer.image = "localhost/weft:2".to_owned();
    let mut fewer = two_sagas();
    fewer.members.remove(0);
    let second = orchestrator(&fewer, &observed, &newer).unwrap();
    assert_eq!(deployment["spec"], find(&second, "Deployment/default-orchestrator")["spec"]);
}

#[test]
fn its_pods_keep_to_pod_security_restricted() {
    let plan = orchestrator(&two_sagas(), &settled(&two_sagas()), &settings()).unwrap();
    fixtures::assert_restricted(&find(&plan, "Deployment/default-orchestrator")["spec"]["template"]["spec"]);
}

#[test]
fn a_saga_that_is_being_deleted_drains_and_owns_the_orchestrator_until_then() {
    let mut object = two_sagas();
    let before = orchestrator(&object, &settled(&object), &settings_with_broker()).unwrap();
    let mut deleted = create_order();
    deleted.metadata.finalizers = Some(vec!["weft.dev/drain".to_owned()]);
    deleted.metadata.deletion_timestamp = Some(Time(fixtures::now()));
    object.members[1] = member(deleted, &observed());
    assert!(object.members[1].defined.is_some());
    let after = orchestrator(&object, &settled(&object), &settings_with_broker()).unwrap();
    let contract = |plan| find(plan, "ConfigMap/default-orchestrator")["data"]["orchestrator.yaml"].to_string();
    assert!(!contract(&before).contains("draining") && contract(&after).contains("draining:\\n- create-order"));
    let deployment = |plan| find(plan, "Deployment/default-orchestrator");
    assert_eq!(deployment(&before), deployment(&after));
    // nothing is made for it
    let nothing = orchestrator(&object, &OrchestratorObserved::default(), &settings_with_broker()).unwrap();
    assert!(nothing.children.is_empty());
}
