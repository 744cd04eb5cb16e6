//! One reconcile: observe → plan → apply → status.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Resource;

use super::{
    apply::{self, Outcome, Written},
    contract_readers,
    events::Notice,
    failure::RequestError,
    finalizer,
    key::{Key, ObjectId, ObjectKind},
    kind::{Applied, Class, Kind},
    live::ChildSeen,
    microservice, outbox_relay,
    plan::{ChildKind, ChildRef, Plan, Rejection},
    runtime::{Shared, Verdict},
    saga, status,
    world::{Concerned, FOR_EVER},
};
use crate::api::v1alpha1::{Microservice, OutboxRelay, Saga};

/// What the last pass over each orchestrator came to, for its Sagas to tell.
pub type OrchestratorResults = Mutex<HashMap<ObjectId, OrchestratorResult>>;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OrchestratorResult {
    pub applied: Applied,
    pub rejection: Option<Rejection>,
}

/// Brings one object to what its spec says, as far as it goes today.
pub async fn reconcile(shared: &Arc<Shared>, key: &Key) -> Verdict {
    let malformed = shared.world().malformed(key);
    if let Some(malformed) = malformed {
        return match key.kind {
            ObjectKind::Microservice => status::write_malformed::<Microservice>(shared, key, &malformed).await,
            ObjectKind::OutboxRelay => status::write_malformed::<OutboxRelay>(shared, key, &malformed).await,
            ObjectKind::Saga => status::write_malformed::<Saga>(shared, key, &malformed).await,
            ObjectKind::Orchestrator => Verdict::Done,
        };
    }
    match key.kind {
        ObjectKind::Microservice => reconcile_microservice(shared, key).await,
        ObjectKind::OutboxRelay => reconcile_relay(shared, key).await,
        ObjectKind::Saga => reconcile_saga(shared, key).await,
        ObjectKind::Orchestrator => reconcile_orchestrator(shared, key).await,
    }
}

async fn reconcile_microservice(shared: &Arc<Shared>, key: &Key) -> Verdict {
    type Controller = microservice::Controller;
    let Some(object) = shared.world().get::<Microservice>(&key.id) else { return gone(shared, key) };
    if object.metadata.deletion_timestamp.is_some() {
        return finalizer::finish(shared, key, &object).await;
    }
    let observed = match microservice::observe::observe(shared, &key.id, &object).await {
        Ok(observed) => observed,
        Err(error) => return failed(error.class().0, &error.words()),
    };
    let planned = Controller::plan(&object, &observed, &shared.settings);
    let mut applied = Applied::default();
    if !object.spec.suspend {
        if let Err(error) = finalizer::ensure(shared, key, &object).await {
            return failed(error.class().0, &error.words());
        }
        applied = carry_out(shared, key, &[object.object_ref(&())], &planned).await;
        if planned.is_ok()
            && applied.failures.is_empty()
            && let Err(error) = finalizer::release(shared, key, &object).await
        {
            return failed(error.class().0, &error.words());
        }
    }
    let observed = microservice::observe::look(&shared.world(), &key.id, &object, observed.database.migrations.clone());
    let status = Controller::status(&object, &observed, &planned, &applied, Timestamp::now());
    verdict(&applied, status::write(shared, key, object.as_ref(), status).await)
}

async fn reconcile_relay(shared: &Arc<Shared>, key: &Key) -> Verdict {
    type Controller = outbox_relay::Controller;
    let Some(object) = shared.world().get::<OutboxRelay>(&key.id) else { return gone(shared, key) };
    if object.metadata.deletion_timestamp.is_some() {
        return Verdict::Done;
    }
    let observed = outbox_relay::observe::observe(&shared.world(), &key.id, &object);
    if object.status.is_some()
        && observed.pods.values().any(Option::is_none)
        && let Some(later) = shared.still_listening()
    {
        return Verdict::At(later);
    }
    let planned = Controller::plan(&object, &observed, &shared.settings);
    let applied = carry_out(shared, key, &[object.object_ref(&())], &planned).await;
    let status = Controller::status(&object, &observed, &planned, &applied, Timestamp::now());
    verdict(&applied, status::write(shared, key, object.as_ref(), status).await)
}

async fn reconcile_saga(shared: &Arc<Shared>, key: &Key) -> Verdict {
    type Controller = saga::Controller;
    let Some(object) = shared.world().get::<Saga>(&key.id) else { return gone(shared, key) };
    if object.metadata.deletion_timestamp.is_some() {
        return Verdict::Done;
    }
    let orchestrator = ObjectId::new(&key.id.namespace, &object.spec.orchestrator);
    let result = results(shared).get(&orchestrator).cloned();
    if result.is_none() && object.status.is_some() {
        // a new leader knows no better than the old one before its first pass over the orchestrator, which tells all its Sagas
        return Verdict::Done;
    }
    let result = result.unwrap_or_default();
    let observed = saga::observe::observe(&shared.world(), &key.id, &object, result.rejection);
    if object.status.is_some()
        && observed.orchestrator.deployment.is_some()
        && observed.orchestrator.status.is_none()
        && let Some(later) = shared.still_listening()
    {
        return Verdict::At(later);
    }
    let planned = Controller::plan(&object, &observed, &shared.settings);
    let status = Controller::status(&object, &observed, &planned, &result.applied, Timestamp::now());
    // what failed to be applied is tried again by the orchestrator's own reconcile
    verdict(&Applied::default(), status::write(shared, key, object.as_ref(), status).await)
}

async fn reconcile_orchestrator(shared: &Arc<Shared>, key: &Key) -> Verdict {
    let (object, observed) = {
        let world = shared.world();
        let Some(object) = saga::observe::orchestrator(&world, &key.id) else {
            drop(world);
            results(shared).remove(&key.id);
            return gone(shared, key);
        };
        (object, saga::observe::observe_orchestrator(&world, &key.id))
    };
    let planned = saga::OrchestratorController::plan(&object, &observed, &shared.settings);
    let about: Vec<_> = object.members.iter().map(|member| member.saga.object_ref(&())).collect();
    let applied = carry_out(shared, key, &about, &planned).await;
    let result = OrchestratorResult { applied: applied.clone(), rejection: planned.err() };
    if results(shared).insert(key.id.clone(), result.clone()) != Some(result) {
        let members = object.members.iter().filter_map(|member| member.saga.metadata.name.as_ref());
        let sagas = members.map(|name| Key::new(ObjectKind::Saga, &key.id.namespace, name)).collect();
        shared.enqueue(Concerned { now: sagas, gently: Vec::new() });
    }
    verdict(&applied, Ok(()))
}

fn results(shared: &Shared) -> std::sync::MutexGuard<'_, HashMap<ObjectId, OrchestratorResult>> {
    shared.orchestrators.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Applies a plan and lets the world know at once, before the watches do. `about`: whom Events concern.
async fn carry_out(
    shared: &Arc<Shared>,
    key: &Key,
    about: &[ObjectReference],
    planned: &Result<Plan, Rejection>,
) -> Applied {
    // a rejected object keeps what it has
    let Ok(plan) = planned else { return Applied::default() };
    let present: BTreeMap<_, _> = shared.world().children(key);
    let Outcome { applied, written, drifted, deleted } =
        apply::apply(&shared.client, &shared.memory, key, &present, plan).await;
    let changed = changed_contract(&present, &written);
    let mut concerned: Concerned = {
        let mut world = shared.world();
        let set: Vec<_> = written.into_iter().map(|child| world.set_child(key, child.child, child.seen)).collect();
        let removed: Vec<_> =
            deleted.iter().map(|(child, uid)| world.remove_child(key, child, uid, FOR_EVER)).collect();
        set.into_iter().chain(removed).collect()
    };
    // this pass goes on with what it wrote; the others that look at it are told
    concerned.now.retain(|other| other != key);
    shared.enqueue(concerned);
    if let Some(version) = changed {
        let pods = shared.world().contract_readers(key);
        contract_readers::hurry(&shared.client, &key.id.namespace, &pods, version).await;
    }
    for child in drifted {
        shared.metrics.drift_corrected(child.kind);
        let message = format!("{} {} had been changed or deleted; it is as declared again", child.kind, child.name);
        tracing::info!(child = child.kind, name = child.name, "drift corrected");
        for object in about {
            let related = ObjectReference {
                kind: Some(child.kind.to_owned()),
                name: Some(child.name.clone()),
                namespace: Some(key.id.namespace.clone()),
                ..ObjectReference::default()
            };
            let notice = Notice {
                warning: false,
                reason: "DriftCorrected".to_owned(),
                message: message.clone(),
                related: Some(related),
            };
            shared.events.publish(notice, object.clone());
        }
    }
    for failure in &applied.failures {
        tracing::warn!(reason = failure.reason, message = failure.message, "a child could not be written");
    }
    applied
}

/// The version of a contract that existed before and has just been changed.
fn changed_contract(present: &BTreeMap<ChildRef, ChildSeen>, written: &[Written]) -> Option<u64> {
    let changed = written.iter().find(|Written { child, seen }| {
        child.kind == ChildKind::ConfigMap.as_str()
            && present.get(child).is_some_and(|before| before.version != seen.version)
    });
    changed.map(|Written { seen, .. }| seen.version)
}

/// The object is gone, and the children with it: Kubernetes collects them.
fn gone(shared: &Shared, key: &Key) -> Verdict {
    shared.forget(key);
    Verdict::Done
}

fn failed(class: Class, error: &str) -> Verdict {
    tracing::warn!(error, "reconcile failed");
    Verdict::Failed(class)
}

fn verdict(applied: &Applied, status: Result<(), RequestError>) -> Verdict {
    let class = applied.failures.iter().map(|failure| failure.class).min();
    match (class, status) {
        (Some(class), _) => Verdict::Failed(class),
        (None, Err(error)) => failed(error.class().0, &error.words()),
        (None, Ok(())) => Verdict::Done,
    }
}
