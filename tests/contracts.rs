//! The contracts between the planes, pinned: what this operator writes for the sample system is `tests/golden/contract/*`,
//! byte for byte, and this data plane reads it. A change of a golden file is a change that a running data plane of the
//! previous version must be able to read; whoever changes a field's meaning raises `contract::VERSION`.
//!
//! `UPDATE_GOLDEN=1 cargo test --test contracts` writes the files anew.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

#[path = "support/settings.rs"]
mod settings;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use settings::settings;
use weft::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga},
    contract::{
        Contract, ContractError, Server,
        database_setup::{DatabaseSetup, Outcome},
        inbox::{Inbox, Target},
        orchestrator::Orchestrator,
        outbox::Outbox,
        problem::{Problem, ProblemReason},
        relay::{KafkaSink, Mechanism, Relay, Sink},
        status::{
            FindingCount, InboxStatus, Latency, OrchestratorStatus, RelayStatus, SagaCounts, StuckInstance,
            SubscriptionStatus,
        },
    },
    controllers::{
        kinds::{microservice, outbox_relay, saga},
        resources::{
            child::Child,
            labels::CONTRACT_ANNOTATION,
            observed::{DatabaseObserved, Migrations, Workload},
            plan::Plan,
        },
        runtime::driver::Kind,
    },
    domain::choreography::definition,
};

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn sample<K: DeserializeOwned + ResourceExt>(file: &str, kind: &str) -> K {
    sample_of("customers-and-orders", file, kind)
}

fn sample_of<K: DeserializeOwned + ResourceExt>(folder: &str, file: &str, kind: &str) -> K {
    let text = std::fs::read_to_string(at("config/samples").join(folder).join(file)).unwrap();
    let documents = serde_yaml::Deserializer::from_str(&text).map(|one| serde_json::Value::deserialize(one).unwrap());
    let mut found: K =
        documents.filter(|one| one["kind"] == kind).map(|one| serde_json::from_value(one).unwrap()).next().unwrap();
    found.meta_mut().namespace = Some("shop".to_owned());
    found
}

/// The text of the one file in the ConfigMap `name`.
fn file_of(plan: &Plan, name: &str) -> String {
    let mut maps = plan.children.iter().filter_map(|child| match child {
        Child::ConfigMap(map) if map.name_any() == name => map.data.clone(),
        _ => None,
    });
    maps.next().expect(name).into_values().next().unwrap()
}

/// The contract of a set-up: its pods read their own annotation.
fn set_up_of(plan: &Plan) -> String {
    let mut jobs = plan.children.iter().filter_map(|child| match child {
        Child::Job(job) => job.spec.as_ref()?.template.metadata.as_ref()?.annotations.clone(),
        _ => None,
    });
    jobs.next().expect("a Job").remove(CONTRACT_ANNOTATION).unwrap()
}

/// A set-up begins when the server and the migrations exist.
fn may_be_set_up(observed: &mut DatabaseObserved) {
    observed.server = Some(Workload::default());
    observed.migrations = Some(Migrations::Found { hash: "0".into(), files: vec!["001.sql".into()] });
}

/// Compares with the golden file, and gives back what the data plane reads from it.
fn pinned<C: Contract>(name: &str, text: &str) -> C {
    let path = at("tests/golden/contract").join(name);
    compare(&path, text);
    C::load(&path).unwrap()
}

fn compare(path: &Path, text: &str) {
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(path, text).unwrap();
    }
    let golden = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(text, golden, "{} has changed", path.display());
}

fn services() -> BTreeMap<String, Arc<Microservice>> {
    let services = ["customers", "orders"].map(|name| sample::<Microservice>(&format!("{name}.yaml"), "Microservice"));
    services.map(|service| (service.name_any(), Arc::new(service))).into()
}

fn orders_relay() -> Arc<OutboxRelay> {
    Arc::new(sample("orders.yaml", "OutboxRelay"))
}

#[test]
fn an_inbox() {
    let customers: Microservice = sample("customers.yaml", "Microservice");
    let published = microservice::Published { relays: vec![orders_relay()], kept_relay: None };
    let observed =
        microservice::Observed { publishers: [("orders".to_owned(), published)].into(), ..Default::default() };
    let broker = weft::controllers::resources::settings::Broker {
        url: "nats://weft-nats.weft-system:4222".to_owned(),
        accounts: weft::nats::accounts::Accounts::new("a seed of a test, which nobody else has".to_owned()),
    };
    let settings = weft::controllers::resources::settings::Settings { broker: Some(broker), ..settings() };
    let plan = microservice::Controller::plan(&customers, &observed, &settings).unwrap();
    let read: Inbox = pinned("inbox.yaml", &file_of(&plan, "customers-inbox"));
    assert_eq!((read.service.as_str(), read.database.role.name.clone()), ("customers", "app".into()));
    let subscription = &read.subscriptions[0];
    assert_eq!((subscription.name.as_str(), &subscription.types[..]), ("orders", &["OrderApproved".to_owned()][..]));
    let Target::Http(target) = &subscription.target else { panic!("an HTTP target") };
    assert_eq!(target.url, "http://customers.shop.svc:8080/events");
    assert_eq!(read.clone().seal().version, read.version);
}

#[test]
fn the_status_of_an_inbox() {
    let subscription = SubscriptionStatus { consumed: 41, waiting: 3, held: 1, dead_letters: 1, lag_seconds: 1.5 };
    let status = InboxStatus {
        contract: "0123456789abcdef".to_owned(),
        leading: true,
        ready: true,
        subscriptions: [("orders".to_owned(), subscription)].into(),
        problems: vec![Problem::new(ProblemReason::DeadLetters, "1 event is given up")],
    };
    let text = serde_json::to_string_pretty(&status).unwrap();
    let path = at("tests/golden/contract/inbox-status.json");
    compare(&path, &format!("{text}\n"));
    let read: InboxStatus = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(read, status);
}

#[test]
fn the_set_up_of_a_service() {
    let orders = services()["orders"].clone();
    let mut observed = microservice::Observed::default();
    may_be_set_up(&mut observed.database);
    let plan = microservice::Controller::plan(&orders, &observed, &settings()).unwrap();
    let contract: DatabaseSetup = pinned("database-setup-service.yaml", &set_up_of(&plan));
    let host = "orders-db.shop.svc".to_owned();
    assert_eq!(contract.admin.server, Server::Address { host, port: 5432, database: "orders".to_owned() });
}

#[test]
fn the_set_up_of_a_service_with_an_outbox_of_its_own() {
    let payments: Microservice = sample_of("outboxes", "custom.yaml", "Microservice");
    let relay: OutboxRelay = sample_of("outboxes", "custom.yaml", "OutboxRelay");
    let mut observed = microservice::Observed { relays: vec![Arc::new(relay)], ..microservice::Observed::default() };
    may_be_set_up(&mut observed.database);
    let plan = microservice::Controller::plan(&payments, &observed, &settings()).unwrap();
    let contract: DatabaseSetup = pinned("database-setup-outbox.yaml", &set_up_of(&plan));
    assert!(matches!(contract.outbox, Some(Outbox::Custom { .. })), "{contract:?}");
}

#[test]
fn a_relay_in_both_modes() {
    for (mode, file) in [("LogTailing", "relay-log-tailing.yaml"), ("Polling", "relay-polling.yaml")] {
        let mut relay = orders_relay().as_ref().clone();
        relay.spec.mode = serde_json::from_value(mode.into()).unwrap();
        let relay = Arc::new(relay);
        let microservice = services().remove("orders");
        let observed =
            outbox_relay::Observed { microservice, relays: vec![relay.clone()], ..outbox_relay::Observed::default() };
        let plan = outbox_relay::Controller::plan(&relay, &observed, &settings()).unwrap();
        let contract: Relay = pinned(file, &file_of(&plan.children, &format!("{}-relay", relay.name_any())));
        assert_eq!(contract.service, "orders");
        assert_eq!(contract.clone().seal(), contract, "a version is of the content");
        assert_eq!(
            Relay { paused: true, ..contract.clone() }.seal().version,
            contract.version,
            "a pause does not change the version"
        );
    }
}

#[test]
fn a_relay_to_kafka() {
    let microservice: Microservice = sample_of("kafka", "orders.yaml", "Microservice");
    let relay: Arc<OutboxRelay> = Arc::new(sample_of("kafka", "orders.yaml", "OutboxRelay"));
    let observed = outbox_relay::Observed {
        microservice: Some(Arc::new(microservice)),
        relays: vec![relay.clone()],
        ..outbox_relay::Observed::default()
    };
    let plan = outbox_relay::Controller::plan(&relay, &observed, &settings()).unwrap();
    let contract: Relay = serde_yaml::from_str(&file_of(&plan.children, "orders-relay")).unwrap();
    let expected = Sink::Kafka(KafkaSink {
        servers: vec!["kafka-bootstrap.messaging:9093".to_owned()],
        tls: true,
        secret_folder: Some("/etc/weft/sinks/kafka-orders".into()),
        mechanism: Mechanism::ScramSha512,
        topic: "{namespace}.{service}.{aggregate_type}".to_owned(),
    });
    assert_eq!(contract.sink, expected);
}

/// An orchestrator of one saga.
fn orchestrator_of(saga: Saga, defined: saga::Defined) -> saga::Orchestrator {
    saga::Orchestrator {
        namespace: "shop".into(),
        name: "default".into(),
        members: vec![saga::Member { saga: Arc::new(saga), defined: Some(defined) }],
        unreadable: Vec::new(),
        kept: Vec::new(),
    }
}

#[test]
fn an_orchestrator_and_the_set_up_of_its_database() {
    let mut saga: Saga = sample("create-order.yaml", "Saga");
    saga.metadata.creation_timestamp = Some(Time("2026-11-22T09:00:00Z".parse().unwrap()));
    let observed = saga::Observed { services: services(), relays: vec![orders_relay()], ..saga::Observed::default() };
    let defined = saga::Controller::plan(&saga, &observed, &settings()).unwrap();
    let orchestrator = orchestrator_of(saga, defined);
    let mut observed = saga::OrchestratorObserved::default();
    may_be_set_up(&mut observed.database);
    let plan = saga::OrchestratorController::plan(&orchestrator, &observed, &settings()).unwrap();
    let contract: Orchestrator = pinned("orchestrator.yaml", &file_of(&plan, "default-orchestrator"));
    assert_eq!(contract.sagas[0].clone().seal(), contract.sagas[0], "a version is of the content");
    let setup: DatabaseSetup = pinned("database-setup-orchestrator.yaml", &set_up_of(&plan));
    assert_eq!(setup.relay, None);
}

#[test]
fn an_orchestrator_that_watches_a_choreography() {
    let file = "create-order.yaml";
    let mut saga: Saga = sample_of("choreography", file, "Saga");
    saga.metadata.creation_timestamp = Some(Time("2026-11-22T09:00:00Z".parse().unwrap()));
    let text = std::fs::read_to_string(at("config/samples/choreography").join(file)).unwrap();
    let documents = serde_yaml::Deserializer::from_str(&text).map(|one| serde_json::Value::deserialize(one).unwrap());
    let mut observed = saga::Observed::default();
    for document in documents {
        match document["kind"].as_str().unwrap() {
            "Microservice" => {
                let service: Microservice = serde_json::from_value(document).unwrap();
                observed.services.insert(service.name_any(), Arc::new(service));
            }
            "OutboxRelay" => observed.relays.push(Arc::new(serde_json::from_value(document).unwrap())),
            _ => {}
        }
    }
    let defined = saga::Controller::plan(&saga, &observed, &settings()).unwrap();
    let orchestrator = orchestrator_of(saga, defined);
    let plan = saga::OrchestratorController::plan(&orchestrator, &saga::OrchestratorObserved::default(), &settings());
    let contract: Orchestrator =
        pinned("orchestrator-choreography.yaml", &file_of(&plan.unwrap(), "default-orchestrator"));
    let definition = &contract.choreographies[0].definition;
    assert_eq!(definition.clone().seal(), *definition, "a version is of the content");
}

#[test]
fn the_status_documents_of_the_data_plane() {
    let since = "2026-01-02T03:04:05Z".parse().unwrap();
    let problem = Problem::new(ProblemReason::BrokerUnreachable, "NATS at n:4222 has not answered since 12:04:05 UTC");
    let relay = RelayStatus {
        relay: "orders".into(),
        contract: "7c0e5b1d2f3a4968".into(),
        leading: true,
        ready: false,
        paused: false,
        published: 41,
        pending: 2,
        held: 2,
        dead_letters: 1,
        lag_seconds: 1.5,
        lag_bytes: Some(4096),
        latency: Some(Latency { p50_seconds: 0.000_8, p99_seconds: 0.004 }),
        position: Some("0/16B3748".into()),
        last_published: Some(since),
        problems: vec![problem],
    };
    let stuck = StuckInstance {
        id: "0192".into(),
        step: "reserve-credit".into(),
        operation: "undo".into(),
        message: "503 Service Unavailable".into(),
        since,
    };
    let counts = SagaCounts {
        draining: false,
        start: None,
        version: "26d9d70147928676".into(),
        running: 3,
        compensating: 1,
        completed: 5,
        compensated: 2,
        stuck: 1,
        stuck_instances: vec![stuck],
        findings: vec![FindingCount {
            finding: "undeclared".into(),
            event: definition::Kind::new("customers", "CreditChecked"),
            cause: Some(definition::Kind::new("orders", "OrderCreated")),
            count: 4,
        }],
    };
    let orchestrator = OrchestratorStatus {
        orchestrator: "default".into(),
        ready: true,
        sagas: [("create-order".to_owned(), counts)].into(),
        problems: vec![],
    };
    let outcome = Outcome {
        files: 3,
        applied: 1,
        last: Some("003_total.sql".into()),
        hash: "7c0e5b1d2f3a4968".into(),
        written_by_others: Vec::new(),
    };
    assert_eq!(Outcome::from_message(&outcome.to_message()), Some(outcome.clone()));
    assert_pinned("database-setup-outcome.json", &outcome);
    assert_pinned("relay-status.json", &relay);
    assert_pinned("orchestrator-status.json", &orchestrator);
}

fn assert_pinned<S: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(name: &str, status: &S) {
    let path = at("tests/golden/contract").join(name);
    compare(&path, &format!("{}\n", serde_json::to_string_pretty(status).unwrap()));
    assert_eq!(&serde_json::from_str::<S>(&std::fs::read_to_string(&path).unwrap()).unwrap(), status);
}

/// An operator of the next minor version may add fields, one of the previous version leaves the optional ones out.
#[test]
fn fields_that_are_not_known_are_ignored_and_optional_ones_may_be_absent() {
    let path = at("tests/golden/contract/relay-polling.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    let known = Relay::load(&path).unwrap();
    let newer = format!("{text}compression: zstd\n");
    assert_eq!(Relay::from_yaml(&newer, &path).unwrap(), known);
    let older: String = text
        .split_inclusive('\n')
        .filter(|line| !line.starts_with("paused") && !line.starts_with("retention"))
        .collect();
    assert_eq!(Relay::from_yaml(&older, &path).unwrap(), known);
    assert_eq!(serde_json::from_str::<RelayStatus>(r#"{"relay": "orders", "leading": true, "ready": true, "paused": false, "published": 0, "pending": 0, "lagSeconds": 0, "new": 1}"#).unwrap().lag_bytes, None);
}

#[test]
fn another_version_and_another_kind_are_refused_with_both_names() {
    let path = at("tests/golden/contract/relay-polling.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    let newer = text.replace("contract.weft.dev/v1", "contract.weft.dev/v2");
    let error = Relay::from_yaml(&newer, &path).unwrap_err();
    assert!(matches!(&error, ContractError::Version { found, .. } if found == "contract.weft.dev/v2"), "{error}");
    let error = Orchestrator::from_yaml(&text, &path).unwrap_err();
    assert!(
        matches!(&error, ContractError::Kind { found, expected: "Orchestrator", .. } if found == "Relay"),
        "{error}"
    );
}
