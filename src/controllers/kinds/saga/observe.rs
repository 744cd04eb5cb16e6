//! What is there of a Saga and of an orchestrator: all of it is in the store.

use std::collections::BTreeSet;

use kube::ResourceExt;

use super::{Member, Observed, Orchestrator, OrchestratorObserved, plan};
use crate::{
    api::v1alpha1::{Microservice, Saga},
    controllers::{
        resources::{
            child::ChildKind,
            key::{Key, ObjectId, ObjectKind},
        },
        runtime::PassResult,
        store::{Store, id_of, references::services_of},
    },
    domain::names,
};

pub fn observe(store: &Store, id: &ObjectId, object: &Saga, orchestrator_pass: Option<PassResult>) -> Observed {
    let within = |name: &str| ObjectId::new(&id.namespace, name);
    let services = services_of(object).into_iter().filter_map(|service| {
        let found = store.get::<Microservice>(&within(service))?;
        Some((service.to_owned(), found))
    });
    let start = object.spec.start_on.iter().map(|start| start.service.as_str());
    let publishing: BTreeSet<_> =
        start.chain(object.spec.reactions.iter().map(|reaction| reaction.service.as_str())).collect();
    let kept = |service: &&str| Some(((*service).to_owned(), store.kept_relay(&within(service))?));
    Observed {
        services: services.collect(),
        kept_relays: publishing.iter().filter_map(kept).collect(),
        relays: publishing.iter().flat_map(|service| store.relays_of(&within(service))).collect(),
        unreadable: store.unreadable(&id.namespace, services_of(object)),
        orchestrator: observe_orchestrator(store, &within(&object.spec.orchestrator)),
        orchestrator_pass,
    }
}

pub fn observe_orchestrator(store: &Store, id: &ObjectId) -> OrchestratorObserved {
    let (key, full_name) = (Key::of(ObjectKind::Orchestrator, id), names::orchestrator(&id.name));
    OrchestratorObserved {
        deployment: store.workload(&key, ChildKind::Deployment, &full_name),
        database: store.database(&key, &full_name),
        contract: None,
        status: store.orchestrator_status(&key),
    }
}

/// The orchestrator with its Sagas; `None` when no Saga names it (any more).
pub fn orchestrator(store: &Store, id: &ObjectId) -> Option<Orchestrator> {
    let in_contract = store.defined_sagas(&Key::of(ObjectKind::Orchestrator, id));
    let members: Vec<_> = store
        .members_of(id)
        .into_iter()
        .map(|saga| {
            let defined = plan::define(&saga, &observe(store, &id_of(saga.as_ref()), &saga, None));
            Member { saga, defined: defined.ok() }
        })
        .collect();
    let unreadable: Vec<_> = in_contract
        .iter()
        .filter_map(|name| store.unreadable_owner::<Saga>(&ObjectId::new(&id.namespace, name)))
        .collect();
    let rejected = members.iter().filter(|member| member.defined.is_none()).map(|member| member.saga.name_any());
    let mut kept: Vec<_> = rejected.filter(|name| in_contract.contains(name)).collect();
    kept.extend(unreadable.iter().map(|owner| owner.name.clone()));
    let exists = !members.is_empty() || !unreadable.is_empty();
    exists.then(|| Orchestrator {
        namespace: id.namespace.to_string(),
        name: id.name.to_string(),
        members,
        unreadable,
        kept,
    })
}
