//! What is there of an OutboxRelay: all of it is in the world.

use super::Observed;
use crate::{
    api::v1alpha1::{Microservice, OutboxRelay},
    controllers::{
        key::{Key, ObjectId, ObjectKind},
        plan::ChildKind,
        world::World,
    },
};

pub fn observe(world: &World, id: &ObjectId, object: &OutboxRelay) -> Observed {
    let service = Key::new(ObjectKind::Microservice, &id.namespace, &object.spec.microservice);
    Observed {
        microservice: world.get::<Microservice>(&service.id),
        relays: world.relays_of(&service.id),
        deployment: world.workload(&service, ChildKind::Deployment, &service.id.name),
        pods: world.relay_pods(&service),
    }
}
