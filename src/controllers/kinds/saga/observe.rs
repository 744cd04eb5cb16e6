//! What is there of a Saga and of an orchestrator: all of it is in the store.

use std::sync::Arc;

use jiff::Timestamp;

use super::{Defined, Member, Observed, Orchestrator, OrchestratorObserved, plan};
use crate::{
    api::v1alpha1::{Microservice, Saga},
    controllers::{
        resources::{
            child::ChildKind,
            key::{Key, ObjectId, ObjectKind},
        },
        runtime::PassResult,
        store::{Store, references::services_of},
    },
    domain::names,
};

pub fn observe(store: &Store, id: &ObjectId, object: &Saga, orchestrator_pass: Option<PassResult>) -> Observed {
    let within = |name: &str| ObjectId::new(&id.namespace, name);
    let services = services_of(object).into_iter().filter_map(|service| {
        let found = store.get::<Microservice>(&within(service))?;
        Some((service.to_owned(), found))
    });
    let start = object.spec.start_on.as_ref();
    Observed {
        services: services.collect(),
        relays: start.map(|start| store.relays_of(&within(&start.service))).unwrap_or_default(),
        orchestrator: observe_orchestrator(store, &within(&object.spec.orchestrator)),
        orchestrator_pass,
    }
}

pub fn observe_orchestrator(store: &Store, id: &ObjectId) -> OrchestratorObserved {
    let (key, full_name) = (Key::of(ObjectKind::Orchestrator, id), names::orchestrator(&id.name));
    OrchestratorObserved {
        deployment: store.workload(&key, ChildKind::Deployment, &full_name),
        database: store.database(&key, &full_name, Timestamp::now()),
        status: store.orchestrator_status(&key),
    }
}

/// The orchestrator with its Sagas; `None` when no Saga names it (any more).
pub fn orchestrator(store: &Store, id: &ObjectId) -> Option<Orchestrator> {
    let members: Vec<_> = store.members_of(id).into_iter().map(|saga| member(store, id, saga)).collect();
    (!members.is_empty()).then(|| Orchestrator { namespace: id.namespace.clone(), name: id.name.clone(), members })
}

fn member(store: &Store, orchestrator: &ObjectId, saga: Arc<Saga>) -> Member {
    let id = ObjectId::new(&orchestrator.namespace, saga.metadata.name.clone().unwrap_or_default());
    let defined: Option<Defined> = plan::define(&saga, &observe(store, &id, &saga, None)).ok();
    Member { saga, defined }
}
