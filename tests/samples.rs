//! The samples in `config/samples`: every field is known, every reference leads somewhere, every saga passes the lint, and
//! the migrations are those of the example.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

#[path = "support/settings.rs"]
mod settings;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use settings::settings;
use weft::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga},
    controllers::{
        kinds::{microservice, outbox_relay, saga},
        runtime::driver::Kind,
    },
};

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// All documents of one sample, by kind.
#[derive(Default)]
struct Sample {
    microservices: Vec<Microservice>,
    relays: Vec<OutboxRelay>,
    sagas: Vec<Saga>,
    config_maps: Vec<ConfigMap>,
}

impl Sample {
    fn read(folder: &Path) -> Self {
        let mut sample = Self::default();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            sample.add(&path, &fs::read_to_string(&path).unwrap());
        }
        sample
    }

    fn add(&mut self, path: &Path, documents: &str) {
        for document in serde_yaml::Deserializer::from_str(documents) {
            let document = Value::deserialize(document).unwrap();
            match document["kind"].as_str() {
                Some("Microservice") => self.microservices.push(parse(path, document)),
                Some("OutboxRelay") => self.relays.push(parse(path, document)),
                Some("Saga") => self.sagas.push(parse(path, document)),
                Some("ConfigMap") => self.config_maps.push(parse(path, document)),
                kind => panic!("{}: this is no manifest, its kind is {kind:?}: {document}", path.display()),
            }
        }
    }

    fn microservice(&self, name: &str) -> &Microservice {
        let found = self.microservices.iter().find(|service| service.name_any() == name);
        found.unwrap_or_else(|| panic!("there is no Microservice {name}"))
    }

    fn assert_command(&self, service: &str, command: &str) {
        let commands = &self.microservice(service).spec.commands;
        assert!(commands.contains_key(command), "{service} has no command {command}");
    }
}

/// Parses strictly: a field that the type does not know is gone after a round trip.
fn parse<T: DeserializeOwned + Serialize>(path: &Path, mut document: Value) -> T {
    // what the API server adds
    document["metadata"]["namespace"] = "shop".into();
    document["metadata"]["uid"] = "00000000-0000-0000-0000-000000000000".into();
    let object: T =
        serde_json::from_value(document.clone()).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let known = fields(&serde_json::to_value(&object).unwrap());
    let unknown: Vec<_> = fields(&document).difference(&known).cloned().collect();
    assert!(unknown.is_empty(), "{}: unknown fields {unknown:?}", path.display());
    object
}

/// Paths of all fields, `/spec/ports/0/name`.
fn fields(value: &Value) -> BTreeSet<String> {
    fn walk(value: &Value, path: &str, found: &mut BTreeSet<String>) {
        let mut child = |name: &str, value| {
            let path = format!("{path}/{name}");
            walk(value, &path, found);
            found.insert(path);
        };
        match value {
            Value::Object(members) => members.iter().for_each(|(name, value)| child(name, value)),
            Value::Array(items) => items.iter().enumerate().for_each(|(n, value)| child(&n.to_string(), value)),
            _ => {}
        }
    }
    let mut found = BTreeSet::new();
    walk(value, "", &mut found);
    found
}

/// Each service that `saga` calls, and the command.
fn commands(saga: &Saga) -> Vec<(&str, &str)> {
    let mut commands = Vec::new();
    for task in saga.spec.tasks() {
        commands.extend(task.action.iter().map(|action| (action.service.as_str(), action.command.as_str())));
        let undo = task.undo.iter().filter(|undo| !undo.none);
        commands.extend(undo.map(|undo| (undo.service.as_deref().unwrap(), undo.command.as_deref().unwrap())));
    }
    commands.extend(saga.spec.on_compensated.iter().map(|call| (call.service.as_str(), call.command.as_str())));
    commands
}

fn samples() -> Vec<(PathBuf, Sample)> {
    let folders = fs::read_dir(at("config/samples")).unwrap().map(|entry| entry.unwrap().path());
    folders.filter(|path| path.is_dir()).map(|path| (path.clone(), Sample::read(&path))).collect()
}

#[test]
fn every_reference_leads_somewhere() {
    let samples = samples();
    assert!(!samples.is_empty());
    for (_, sample) in &samples {
        for service in &sample.microservices {
            for dependency in &service.spec.depends_on {
                sample.microservice(&dependency.service);
            }
            let migrations = service.spec.database.as_ref().and_then(|database| database.migrations.as_ref());
            if let Some(migrations) = migrations {
                assert!(sample.config_maps.iter().any(|map| map.name_any() == migrations.config_map));
            }
        }
        for relay in &sample.relays {
            sample.microservice(&relay.spec.microservice);
        }
        for saga in &sample.sagas {
            if let Some(start) = &saga.spec.start_on {
                assert!(sample.relays.iter().any(|relay| relay.spec.microservice == start.service));
            }
            for reaction in &saga.spec.reactions {
                assert!(sample.relays.iter().any(|relay| relay.spec.microservice == reaction.service));
            }
            for (service, command) in commands(saga) {
                sample.assert_command(service, command);
            }
        }
    }
}

#[test]
fn the_operator_accepts_them() {
    let settings = settings();
    for (_, sample) in samples() {
        let services: BTreeMap<_, _> =
            sample.microservices.iter().map(|service| (service.name_any(), Arc::new(service.clone()))).collect();
        let relays_of = |service: &str| -> Vec<Arc<OutboxRelay>> {
            let relays = sample.relays.iter().filter(|relay| relay.spec.microservice == service);
            relays.cloned().map(Arc::new).collect()
        };
        for (name, service) in &services {
            service.validate_cel().unwrap();
            let observed = microservice::Observed {
                dependencies: services.clone(),
                relays: relays_of(name),
                ..microservice::Observed::default()
            };
            microservice::Controller::plan(service, &observed, &settings).unwrap();
        }
        for relay in &sample.relays {
            relay.validate_cel().unwrap();
            let observed = outbox_relay::Observed {
                microservice: services.get(&relay.spec.microservice).cloned(),
                relays: relays_of(&relay.spec.microservice),
                ..outbox_relay::Observed::default()
            };
            outbox_relay::Controller::plan(relay, &observed, &settings).unwrap();
        }
        for saga in &sample.sagas {
            saga.validate_cel().unwrap();
            let relays = sample.relays.iter().cloned().map(Arc::new).collect();
            let observed = saga::Observed { services: services.clone(), relays, ..saga::Observed::default() };
            // the lint is part of it
            saga::Controller::plan(saga, &observed, &settings).unwrap();
        }
    }
}

/// Blocks of YAML in a document. An API server judges them by the rules of the definitions (tests/charts/run).
fn blocks(document: &str) -> impl Iterator<Item = &str> {
    document.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap())
}

#[test]
fn the_manifests_in_the_documents_are_valid() {
    let settings = settings();
    let documents = fs::read_dir(at("docs")).unwrap().map(|entry| entry.unwrap().path());
    let mut sample = Sample::default();
    for path in documents.filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        for block in blocks(&fs::read_to_string(&path).unwrap()) {
            sample.add(&path, block);
        }
    }
    assert!(sample.sagas.len() > 2 && sample.microservices.len() > 1 && sample.relays.len() > 1);
    for saga in &sample.sagas {
        let (services, relays) = participants(saga);
        let observed = saga::Observed { services, relays, ..saga::Observed::default() };
        saga::Controller::plan(saga, &observed, &settings).unwrap();
    }
}

/// Services that have each command that `saga` names, and publish their events.
fn participants(saga: &Saga) -> (BTreeMap<String, Arc<Microservice>>, Vec<Arc<OutboxRelay>>) {
    let mut commands = BTreeMap::<String, BTreeSet<&str>>::new();
    let spec = &saga.spec;
    for service in spec.start_on.iter().map(|start| &start.service).chain(spec.reactions.iter().map(|it| &it.service)) {
        commands.entry(service.clone()).or_default();
    }
    for (service, command) in self::commands(saga) {
        commands.entry(service.to_owned()).or_default().insert(command);
    }
    let manifest = |kind: &str, name: &str, spec: Value| json!({"apiVersion": "weft.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec});
    let (mut services, mut relays) = (BTreeMap::new(), Vec::new());
    for (name, commands) in commands {
        let command = |command: &str| json!({"http": {"path": format!("/{command}")}});
        let commands: BTreeMap<_, _> = commands.into_iter().map(|name| (name, command(name))).collect();
        let ports = json!([{"name": "http", "port": 8080, "protocol": "http"}]);
        let service = json!({"image": "example", "ports": ports, "database": {"postgres": {}}, "commands": commands});
        let relay = json!({"microservice": name, "sink": {"nats": {}}});
        let relay = serde_json::from_value(manifest("OutboxRelay", &name, relay)).unwrap();
        relays.push(Arc::new(relay));
        let service = serde_json::from_value(manifest("Microservice", &name, service)).unwrap();
        services.insert(name, Arc::new(service));
    }
    (services, relays)
}

#[test]
fn the_migrations_are_those_of_the_example() {
    let sample = Sample::read(&at("config/samples/customers-and-orders"));
    for service in ["customers", "orders"] {
        let folder = at(&format!("examples/customers-and-orders/migrations/{service}"));
        let files: BTreeMap<_, _> = fs::read_dir(&folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), fs::read_to_string(&path).unwrap()))
            .collect();
        let name = format!("{service}-migrations");
        let map = sample.config_maps.iter().find(|map| map.name_any() == name).unwrap();
        assert_eq!(map.data.as_ref(), Some(&files), "config/samples/customers-and-orders/{name}.yaml is behind");
    }
}

#[test]
fn the_manifests_in_the_readme_are_those_of_the_sample() {
    let readme = fs::read_to_string(at("README.md")).unwrap();
    let shown: Vec<Value> = blocks(&readme).map(|block| serde_yaml::from_str(block).unwrap()).collect();
    let sample = fs::read_to_string(at("config/samples/parcels/parcels.yaml")).unwrap();
    let applied: Vec<Value> =
        serde_yaml::Deserializer::from_str(&sample).map(|document| Value::deserialize(document).unwrap()).collect();
    assert_eq!(shown, applied);
}
