//! What is there of a Saga and of an orchestrator: all of it is in the world.

use std::sync::Arc;

use super::{Defined, Member, Observed, Orchestrator, OrchestratorObserved, plan, services_of};
use crate::{
    api::v1alpha1::{Microservice, Saga},
    controllers::{
        key::{Key, ObjectId, ObjectKind},
        observed::DatabaseObserved,
        plan::{ChildKind, Rejection},
        world::World,
    },
    domain::names,
};

pub fn observe(world: &World, id: &ObjectId, object: &Saga, orchestrator_rejection: Option<Rejection>) -> Observed {
    let within = |name: &str| ObjectId::new(&id.namespace, name);
    let services = services_of(object).into_iter().filter_map(|service| {
        let found = world.get::<Microservice>(&within(service))?;
        Some((service.to_owned(), found))
    });
    let start = object.spec.start_on.as_ref();
    Observed {
        services: services.collect(),
        relays: start.map(|start| world.relays_of(&within(&start.service))).unwrap_or_default(),
        orchestrator: observe_orchestrator(world, &within(&object.spec.orchestrator)),
        orchestrator_rejection,
    }
}

pub fn observe_orchestrator(world: &World, id: &ObjectId) -> OrchestratorObserved {
    let (key, full_name) = (Key::of(ObjectKind::Orchestrator, id), names::orchestrator(&id.name));
    OrchestratorObserved {
        deployment: world.workload(&key, ChildKind::Deployment, &full_name),
        database: DatabaseObserved {
            server: world.workload(&key, ChildKind::StatefulSet, &names::database(&full_name)),
            jobs: world.jobs(&key),
            migrations: None,
        },
        status: world.orchestrator_status(&key),
    }
}

/// The orchestrator with its Sagas; `None` when no Saga names it (any more).
pub fn orchestrator(world: &World, id: &ObjectId) -> Option<Orchestrator> {
    let members: Vec<_> = world.members_of(id).into_iter().map(|saga| member(world, id, saga)).collect();
    (!members.is_empty()).then(|| Orchestrator { namespace: id.namespace.clone(), name: id.name.clone(), members })
}

fn member(world: &World, orchestrator: &ObjectId, saga: Arc<Saga>) -> Member {
    let id = ObjectId::new(&orchestrator.namespace, saga.metadata.name.clone().unwrap_or_default());
    let defined: Option<Defined> = plan::define(&saga, &observe(world, &id, &saga, None)).ok();
    Member { saga, defined }
}
