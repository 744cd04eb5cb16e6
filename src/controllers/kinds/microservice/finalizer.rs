//! The one finalizer there is: a Microservice with `retention: Delete` takes its Secrets with it.
//!
//! The server and its set-up go first, and the volume with them, by the StatefulSet's own retention policy. Whoever applies the
//! same Microservice again right away then begins anew, and does not find an old volume with new passwords. (Secrets carry no
//! owner, so that they outlive mistakes.)
//!
//! What counts is the spec at the time of the deletion, also if that was never applied. So the object keeps the finalizer until its
//! volume really stays.

use jiff::Timestamp;
use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::json;

use crate::{
    api::v1alpha1::{Microservice, MicroserviceStatus, Retention},
    controllers::{
        apply::{delete, delete_secret},
        request::{RequestError, within_deadline},
        resources::{
            child::{ChildKind, ChildRef},
            key::Key,
            labels::{Component, DATABASE_FINALIZER, FIELD_MANAGER},
        },
        runtime::{Context, Verdict, report},
        status::{
            conditions::{Conditions, status_of},
            progress::Progress,
        },
        store::live::{ChildSeen, Live},
    },
    domain::names,
};

/// Sets the finalizer, before anything is made that is to go with the object.
pub async fn ensure(context: &Context, key: &Key, object: &Microservice) -> Result<(), RequestError> {
    if retention(object) == Retention::Delete && !has(object) { set(context, key, object, true).await } else { Ok(()) }
}

/// Takes the finalizer off an object whose data are to stay, once that is true of its volume too. To be called when all that is
/// planned was applied.
pub async fn release(context: &Context, key: &Key, object: &Microservice) -> Result<(), RequestError> {
    if retention(object) == Retention::Delete
        || !has(object)
        || !volume_follows(context, key, Retention::Retain).await?
    {
        return Ok(());
    }
    set(context, key, object, false).await
}

/// The object is being deleted: deletes its Secrets if the spec asks for it, then removes the finalizer; or reports what that waits for.
pub async fn finish(context: &Context, key: &Key, object: &Microservice) -> Verdict {
    if !has(object) {
        return Verdict::Done;
    }
    let (progress, verdict) = match release_when_due(context, key, object).await {
        Ok(None) => return Verdict::Done,
        Err(error) if error.code() == Some(404) => return Verdict::Done,
        Ok(Some(waits)) => (Progress::waiting("Deleting", waits), Verdict::Done),
        Err(error) => {
            tracing::warn!(error = error.message(), "the deletion could not be finished");
            let (class, reason) = error.class();
            let message = format!("the deletion could not be finished: {}", error.message());
            (Progress::waiting(reason, message), Verdict::Failed(class))
        }
    };
    match report::write(context, key, object, being_deleted(object, &progress)).await {
        Ok(()) => verdict,
        Err(error) => Verdict::Failed(error.class().0),
    }
}

/// Takes the finalizer off when its time has come; else what it waits for, whose end wakes the object.
async fn release_when_due(context: &Context, key: &Key, object: &Microservice) -> Result<Option<String>, RequestError> {
    let (namespace, name) = (&key.id.namespace, &key.id.name);
    if context.store().not_opted_in(namespace).is_some() {
        // nothing may be deleted there, and nothing is to be held up
        set(context, key, object, false).await?;
        return Ok(None);
    }
    // the last spec may not have been applied: the object was suspended, or its plan rejected
    if !volume_follows(context, key, retention(object)).await? {
        return Ok(Some("Kubernetes has yet to take note of what becomes of the volume".to_owned()));
    }
    if retention(object) == Retention::Delete {
        let left = left_of_database(context, key).await?;
        if !left.is_empty() {
            return Ok(Some(format!("these end first: {}", left.join(", "))));
        }
        for secret in [names::database(name), names::admin_secret(name), names::relay_secret(name)] {
            delete_secret(&context.client, namespace, &secret).await?;
        }
    }
    // a Microservice of this name needs Secrets of its own
    context.memory.forget(key);
    set(context, key, object, false).await?;
    Ok(None)
}

/// The status that the object had, but for where it stands.
fn being_deleted(object: &Microservice, progress: &Progress) -> MicroserviceStatus {
    let previous = object.status.clone().unwrap_or_default();
    let generation = object.metadata.generation;
    let mut conditions = Conditions::new(&previous.conditions, generation, Timestamp::now());
    progress.set(&mut conditions);
    let mut conditions = conditions.finish();
    let others = previous.conditions.iter().filter(|known| status_of(&conditions, &known.type_).is_none());
    let others: Vec<_> = others.cloned().collect();
    conditions.extend(others);
    MicroserviceStatus { observed_generation: generation, conditions, ..previous }
}

/// Data are kept unless the spec asks for their deletion.
fn retention(object: &Microservice) -> Retention {
    object.spec.database.as_ref().map_or(Retention::Retain, |database| database.retention)
}

/// Makes the StatefulSet's volume stay or go with it, as `retention` wants it; whether that is so by now. It is when the
/// StatefulSet's own controller has seen it, which wakes this object: that one marks the claim as owned, or not.
async fn volume_follows(context: &Context, key: &Key, retention: Retention) -> Result<bool, RequestError> {
    let child = ChildRef::new(ChildKind::StatefulSet, names::database(&key.id.name));
    let Some(uid) = context.store().child(key, &child).filter(|seen| !seen.deleting).map(|seen| seen.uid) else {
        return Ok(true);
    };
    let policy = json!({"whenDeleted": retention});
    let body = json!({"metadata": {"uid": uid}, "spec": {"persistentVolumeClaimRetentionPolicy": policy}});
    let resource = ChildKind::StatefulSet.resource();
    let api: Api<Live> = Api::namespaced_with(context.client.clone(), &key.id.namespace, &resource);
    match within_deadline(api.patch(&child.name, &by_us(), &Patch::Merge(&body))).await {
        Ok(live) => Ok(ChildSeen::from(live).is_observed()),
        Err(error) if error.code() == Some(404) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Asks for the deletion of the StatefulSet and the Jobs; what of them, pods included, is still there.
async fn left_of_database(context: &Context, key: &Key) -> Result<Vec<String>, RequestError> {
    let (children, pods) = {
        let store = context.store();
        (store.children(key), store.has_pods(key, Component::Database))
    };
    let is_database = |child: &ChildRef| matches!(child.kind, ChildKind::StatefulSet | ChildKind::Job);
    let left: Vec<_> = children.iter().filter(|(child, seen)| is_database(child) && seen.managed).collect();
    for (child, seen) in left.iter().filter(|(_, seen)| !seen.deleting) {
        delete(&context.client, key, child, seen).await?;
    }
    let children = left.iter().map(|(child, _)| child.to_string());
    Ok(children.chain(pods.then(|| format!("the pod of {}", names::database(&key.id.name)))).collect())
}

fn has(object: &Microservice) -> bool {
    object.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == DATABASE_FINALIZER)
}

async fn set(context: &Context, key: &Key, object: &Microservice, wanted: bool) -> Result<(), RequestError> {
    let others = object.metadata.finalizers.iter().flatten().filter(|finalizer| *finalizer != DATABASE_FINALIZER);
    let finalizers: Vec<&str> = others.map(String::as_str).chain(wanted.then_some(DATABASE_FINALIZER)).collect();
    // the whole list, whoever wrote it: with the version it was read at, nothing of another's is lost
    let body = json!({"metadata": {"resourceVersion": object.metadata.resource_version, "finalizers": finalizers}});
    let api: Api<Microservice> = Api::namespaced(context.client.clone(), &key.id.namespace);
    let answer = within_deadline(api.patch(&key.id.name, &by_us(), &Patch::Merge(&body))).await?;
    if answer.metadata.deletion_timestamp.is_none() {
        context.store().set(answer);
    }
    Ok(())
}

fn by_us() -> PatchParams {
    PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() }
}
