//! Who depends on whom: an index from what is named to the objects that name it.

use std::collections::{BTreeSet, HashMap};

use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga},
    controllers::resources::key::{Key, ObjectId, ObjectKind},
};

/// Something that objects name.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Named {
    Microservice(ObjectId),
    /// A Microservice, with whatever publishes its events.
    Publisher(ObjectId),
    ConfigMap(ObjectId),
    Orchestrator(ObjectId),
    /// The database of this Microservice, in which another one's is.
    Database(ObjectId),
}

/// The index, both ways.
#[derive(Debug, Default)]
pub struct References {
    by_object: HashMap<Key, Vec<Named>>,
    /// Sorted. Most are one.
    by_name: HashMap<Named, Vec<Key>>,
}

impl References {
    /// `key` names `named`, and nothing else any more.
    pub fn set(&mut self, key: &Key, named: Vec<Named>) {
        for old in self.by_object.remove(key).unwrap_or_default() {
            if let Some(keys) = self.by_name.get_mut(&old) {
                keys.retain(|known| known != key);
                if keys.is_empty() {
                    self.by_name.remove(&old);
                }
            }
        }
        for new in &named {
            let keys = self.by_name.entry(new.clone()).or_default();
            if let Err(place) = keys.binary_search(key) {
                keys.reserve_exact(1);
                keys.insert(place, key.clone());
            }
        }
        if !named.is_empty() {
            self.by_object.insert(key.clone(), named);
        }
    }

    /// What an object names.
    pub fn named_by(&self, key: &Key) -> &[Named] {
        self.by_object.get(key).map_or(&[], Vec::as_slice)
    }

    /// The objects that name it, sorted.
    pub fn to(&self, named: &Named) -> impl Iterator<Item = &Key> {
        self.by_name.get(named).into_iter().flatten()
    }

    /// Those of one kind.
    pub fn of_kind(&self, named: &Named, kind: ObjectKind) -> impl Iterator<Item = &ObjectId> {
        self.to(named).filter(move |key| key.kind == kind).map(|key| &key.id)
    }
}

pub fn of_microservice(id: &ObjectId, object: &Microservice) -> Vec<Named> {
    let within = |name: &str| ObjectId::new(&id.namespace, name);
    let migrations = object.spec.database.as_ref().and_then(|database| database.migrations.as_ref());
    let config_map = migrations.map(|migrations| Named::ConfigMap(within(&migrations.config_map)));
    let services = object.spec.depends_on.iter().map(|dependency| Named::Microservice(within(&dependency.service)));
    let shared = object.spec.database.as_ref().and_then(|database| database.shared_with.as_ref());
    let host = shared.map(|shared| within(&shared.service));
    let host = host.into_iter().flat_map(|host| [Named::Microservice(host.clone()), Named::Database(host)]);
    let publishers = object.spec.consumes.iter().flat_map(|consumption| {
        let publisher = within(&consumption.from);
        [Named::Microservice(publisher.clone()), Named::Publisher(publisher)]
    });
    config_map.into_iter().chain(services).chain(host).chain(publishers).collect()
}

pub fn of_relay(id: &ObjectId, object: &OutboxRelay) -> Vec<Named> {
    vec![Named::Microservice(ObjectId::new(&id.namespace, &object.spec.microservice))]
}

/// The Microservices that a Saga names: in its steps, their undos, `onCompensated`, `startOn` and its reactions.
pub fn services_of(saga: &Saga) -> BTreeSet<&str> {
    let spec = &saga.spec;
    let steps = spec.steps.iter().map(|step| step.action.service.as_str());
    let undos = spec.steps.iter().filter_map(|step| step.undo.as_ref()?.service.as_deref());
    let start = spec.start_on.as_ref().map(|start| start.service.as_str());
    let end = spec.on_compensated.as_ref().map(|command| command.service.as_str());
    let reacting = spec.reactions.iter().map(|reaction| reaction.service.as_str());
    steps.chain(undos).chain(start).chain(end).chain(reacting).collect()
}

pub fn of_saga(id: &ObjectId, object: &Saga) -> Vec<Named> {
    let within = |name: &str| ObjectId::new(&id.namespace, name);
    let orchestrator = Named::Orchestrator(within(&object.spec.orchestrator));
    let services = services_of(object).into_iter().map(|service| Named::Microservice(within(service)));
    std::iter::once(orchestrator).chain(services).collect()
}
