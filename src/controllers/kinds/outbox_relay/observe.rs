//! What is there of an OutboxRelay: all of it is in the store.

use super::Observed;
use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, Placement},
    controllers::{
        resources::{
            child::ChildKind,
            key::{Key, ObjectId, ObjectKind},
        },
        store::Store,
    },
    domain::names,
};

/// Of the pods that run the relay.
fn deployment(object: &OutboxRelay) -> String {
    match object.spec.placement {
        Placement::Sidecar => object.spec.microservice.clone(),
        Placement::Standalone => names::relay(&object.spec.microservice),
    }
}

pub fn observe(store: &Store, id: &ObjectId, object: &OutboxRelay) -> Observed {
    let service = Key::new(ObjectKind::Microservice, &id.namespace, &object.spec.microservice);
    Observed {
        microservice: store.get::<Microservice>(&service.id),
        relays: store.relays_of(&service.id),
        kept_relay: store.kept_relay(&service.id),
        unreadable: store.is_unreadable(&service),
        deployment: store.workload(&service, ChildKind::Deployment, &deployment(object)),
        set_up: store.recorded_set_up(&service, &service.id.name),
        pods: store.relay_pods(&service),
    }
}
