//! The bad specs of the end-to-end tests, as far as they can be judged without a cluster: the plans say the operator's
//! sentences, and the types' CEL rules say their own. What the schema alone refuses is for the API server, and so is what
//! it says of a child (`ChildRefused`).

#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

#[path = "support/settings.rs"]
mod settings;

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use kube::ResourceExt;
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;
use settings::settings;
use weft::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga},
    controllers::{
        kinds::{microservice, outbox_relay, saga},
        resources::outcome::Applied,
        runtime::driver::Kind,
    },
};

const FILES: [&str; 3] = [
    include_str!("e2e/bad_specs/microservice.yaml"),
    include_str!("e2e/bad_specs/outboxrelay.yaml"),
    include_str!("e2e/bad_specs/saga.yaml"),
];

#[derive(Deserialize)]
struct File {
    base: Value,
    #[serde(default)]
    with: Vec<Value>,
    bad: Vec<Bad>,
}

#[derive(Clone, Deserialize)]
struct Bad {
    why: String,
    by: By,
    change: Value,
    from: Option<Value>,
    #[serde(default)]
    with: Vec<Value>,
    reason: Option<String>,
    says: String,
}

/// RFC 7386.
fn merged(base: &Value, change: &Value) -> Value {
    let Value::Object(change) = change else { return change.clone() };
    let mut result = base.as_object().cloned().unwrap_or_default();
    for (name, value) in change {
        if value.is_null() {
            result.remove(name);
        } else {
            let before = result.remove(name).unwrap_or(Value::Null);
            result.insert(name.clone(), merged(&before, value));
        }
    }
    Value::Object(result)
}

fn files() -> Vec<File> {
    FILES.iter().map(|text| serde_yaml::from_str(text).unwrap()).collect()
}

fn parsed<K: DeserializeOwned>(object: &Value) -> K {
    serde_json::from_value(object.clone()).unwrap_or_else(|error| panic!("{object}: {error}"))
}

/// Who refuses it.
#[derive(Clone, Copy, Deserialize, PartialEq)]
#[serde(rename_all = "lowercase")]
enum By {
    Apply,
    Operator,
}

/// The other objects of a case, by kind.
#[derive(Default)]
struct Others {
    services: BTreeMap<String, Arc<Microservice>>,
    relays: Vec<Arc<OutboxRelay>>,
}

impl Others {
    fn new(objects: impl Iterator<Item = Value>) -> Self {
        let mut others = Self::default();
        for object in objects {
            match object["kind"].as_str() {
                Some("Microservice") => {
                    let service: Microservice = parsed(&object);
                    others.services.insert(service.name_any(), Arc::new(service));
                }
                Some("OutboxRelay") => others.relays.push(Arc::new(parsed(&object))),
                kind => panic!("what is a {kind:?}?"),
            }
        }
        others
    }

    fn relays_of(&self, service: &str) -> Vec<Arc<OutboxRelay>> {
        self.relays.iter().filter(|relay| relay.spec.microservice == service).cloned().collect()
    }
}

/// `Accepted` of the object's status: reason and message.
fn judged(object: &Value, others: &Others) -> (String, String) {
    let (settings, applied, now) = (settings(), Applied::default(), Timestamp::UNIX_EPOCH);
    let conditions = match object["kind"].as_str() {
        Some("Microservice") => {
            let (object, observed) = (parsed(object), microservice::Observed::default());
            let planned = microservice::Controller::plan(&object, &observed, &settings);
            microservice::Controller::status(&object, &observed, &planned, &applied, now).conditions
        }
        Some("OutboxRelay") => {
            let object: OutboxRelay = parsed(object);
            let mut relays = others.relays_of(&object.spec.microservice);
            relays.push(Arc::new(object.clone()));
            let microservice = others.services.get(&object.spec.microservice).cloned();
            let observed = outbox_relay::Observed { microservice, relays, ..outbox_relay::Observed::default() };
            let planned = outbox_relay::Controller::plan(&object, &observed, &settings);
            outbox_relay::Controller::status(&object, &observed, &planned, &applied, now).conditions
        }
        Some("Saga") => {
            let object: Saga = parsed(object);
            let (services, relays) = (others.services.clone(), others.relays.clone());
            let observed = saga::Observed { services, relays, ..saga::Observed::default() };
            let planned = saga::Controller::plan(&object, &observed, &settings);
            saga::Controller::status(&object, &observed, &planned, &applied, now).conditions
        }
        kind => panic!("what is a {kind:?}?"),
    };
    let accepted = conditions.into_iter().find(|condition| condition.type_ == "Accepted").unwrap();
    assert_eq!(accepted.status, "False", "{object} is accepted");
    (accepted.reason, accepted.message)
}

/// What comes of showing an object to the CEL rules.
#[derive(Debug, PartialEq, Eq)]
enum Shown {
    /// It does not even have its type's form, so the rules cannot be asked.
    Formless,
    Taken,
    Refused(String),
}

fn show(before: Option<&Value>, object: &Value) -> Shown {
    fn said<K: DeserializeOwned>(
        before: Option<&Value>,
        object: &Value,
        create: impl Fn(&K) -> Option<String>,
        update: impl Fn(&K, &K) -> Option<String>,
    ) -> Shown {
        let Ok(object) = serde_json::from_value::<K>(object.clone()) else { return Shown::Formless };
        let refusal = match before {
            Some(before) => update(&object, &parsed(before)),
            None => create(&object),
        };
        refusal.map_or(Shown::Taken, Shown::Refused)
    }
    macro_rules! said {
        ($kind:ty) => {
            said::<$kind>(
                before,
                object,
                |object| object.validate_cel().err().map(|error| error.to_string()),
                |object, before| object.validate_cel_update(before).err().map(|error| error.to_string()),
            )
        };
    }
    match object["kind"].as_str() {
        Some("Microservice") => said!(Microservice),
        Some("OutboxRelay") => said!(OutboxRelay),
        Some("Saga") => said!(Saga),
        kind => panic!("what is a {kind:?}?"),
    }
}

#[test]
fn the_operator_says_its_sentences() {
    for File { base, with, bad } in files() {
        for Bad { why, change, with: own, reason, says, .. } in bad.into_iter().filter(|bad| bad.by == By::Operator) {
            let object = merged(&base, &change);
            assert_eq!(show(None, &object), Shown::Taken, "{why}: refused already");
            if reason.as_deref() == Some("ChildRefused") {
                continue;
            }
            let (found, message) = judged(&object, &Others::new(with.iter().cloned().chain(own)));
            assert!(message.contains(&says), "{why}: it got: {message}\nnot: {says}");
            assert!(reason.is_none_or(|reason| reason == found), "{why}: the reason is {found}");
        }
    }
}

#[test]
fn the_rules_say_their_sentences() {
    let rules = rules();
    for File { base, bad, .. } in files() {
        assert_eq!(show(None, &base), Shown::Taken);
        for Bad { why, change, from, says, .. } in bad.into_iter().filter(|bad| bad.by == By::Apply) {
            if !rules.iter().any(|message| message.contains(&says)) {
                continue;
            }
            let before = from.map(|from| merged(&base, &from));
            let object = merged(before.as_ref().unwrap_or(&base), &change);
            match show(before.as_ref(), &object) {
                // a duration or a size that is none has no form in the types
                Shown::Formless => {}
                Shown::Taken => panic!("{why}: the rules take it"),
                Shown::Refused(message) => {
                    assert!(message.contains(&says), "{why}: it got: {message}\nnot: {says}");
                }
            }
        }
    }
}

#[test]
fn every_rule_has_a_bad_spec() {
    let sentences: Vec<_> = files().into_iter().flat_map(|file| file.bad).map(|bad| bad.says).collect();
    for message in rules() {
        assert!(sentences.iter().any(|says| message.contains(says)), "no bad spec breaks the rule: {message}");
    }
}

/// The messages of all CEL rules in the custom resource definitions.
fn rules() -> Vec<String> {
    fn collect(value: &Value, found: &mut Vec<String>) {
        if let Some(rules) = value.get("x-kubernetes-validations").and_then(Value::as_array) {
            found.extend(rules.iter().map(|rule| rule["message"].as_str().unwrap().to_owned()));
        }
        match value {
            Value::Object(members) => members.values().for_each(|value| collect(value, found)),
            Value::Array(items) => items.iter().for_each(|value| collect(value, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    for crd in weft::crds::all() {
        collect(&serde_json::to_value(crd).unwrap(), &mut found);
    }
    found
}
