//! Writes a status: only when it differs, at its pace, by its own field manager; and publishes the Events that the change is worth.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{
    Api, ResourceExt,
    api::{ApiResource, DynamicObject, ListParams, Patch, PatchParams},
    core::DeserializeGuard,
};
use serde::Deserialize;
use serde_json::json;
use tokio::time::Instant;

use super::{
    Context,
    pace::{News, Wait},
    queue::Priority,
};
use crate::controllers::{
    request::{RequestError, within_deadline},
    resources::{key::Key, labels::STATUS_MANAGER, reason::Reason},
    status::{
        conditions::{ACCEPTED, Conditions, status_of},
        events,
        progress::{self, Progress},
    },
    store::{Custom, Malformed},
};

/// Writes `status` if it is not what the object has. If it has to wait, the object is requeued for when it may be written.
pub async fn write<K: Custom>(context: &Context, key: &Key, object: &K, status: K::Status) -> Result<(), RequestError> {
    let before = object.status();
    let malformed = context.store().malformed(key);
    let status = match &malformed {
        Some(malformed) => mark_malformed::<K>(status, before, malformed),
        None => status,
    };
    if before == Some(&status) {
        context.pace.withdraw(key);
        return Ok(());
    }
    let was = before.map(K::conditions).unwrap_or_default();
    let is_answered = before.and_then(K::observed_generation) == K::observed_generation(&status);
    let news = if is_answered { of_change(was, K::conditions(&status)) } else { News::Answer };
    if !may_write(context, key, news) {
        return Ok(());
    }
    let answer = match patch::<K>(context, key, object.meta().uid.as_deref(), &json!(status)).await {
        // deleted meanwhile: its own watch event follows. A conflict is retried: another object may have this name by now, or two
        // writes met
        Err(error) if error.code() == Some(404) => return Ok(()),
        answer => answer?,
    };
    for notice in events::of_change(was, K::conditions(&status)) {
        context.events.publish(notice, object.object_ref(&()));
    }
    match answer.0 {
        Ok(object) => {
            // a change of the spec, or a deletion, may have come before the answer, which then carries it first
            let requeue = context.store().set(object);
            context.enqueue(requeue, Priority::SpecChange);
        }
        Err(_malformed) => context.store().set_reported::<K>(&key.id, status),
    }
    Ok(())
}

/// Whether the status is to be written now; else the object comes again when it may be.
fn may_write(context: &Context, key: &Key, news: News) -> bool {
    match context.pace.enter(key, news, Instant::now()) {
        Ok(()) => true,
        Err(Wait::Until(later)) => {
            context.enqueue_at(key, later);
            false
        }
        Err(Wait::Turn) => false,
    }
}

/// `Accepted=False` on an object that does not have its type's form and of which no earlier form is known. Its other columns stay,
/// which takes one request to read them.
pub async fn write_malformed<K: Custom>(
    context: &Context,
    key: &Key,
    malformed: &Malformed,
) -> Result<(), RequestError> {
    if !may_write(context, key, News::Answer) {
        return Ok(());
    }
    let resource = ApiResource::erase::<K>(&());
    let api: Api<DynamicObject> = Api::namespaced_with(context.client.clone(), &key.id.namespace, &resource);
    // the operator has the right to list, which it needs anyway, and not the one to get
    let this = ListParams::default().fields(&format!("metadata.name={}", key.id.name));
    let found = within_deadline(api.list(&this)).await?.items;
    let Some(object) = found.into_iter().find(|object| object.name_any() == key.id.name) else { return Ok(()) };
    // a status that cannot be read either is replaced
    let before = object.data.get("status").and_then(|status| K::Status::deserialize(status).ok());
    let status = mark_malformed::<K>(before.clone().unwrap_or_default(), before.as_ref(), malformed);
    if before.as_ref() == Some(&status) {
        return Ok(());
    }
    tracing::warn!(error = malformed.error, "malformed object");
    match patch::<K>(context, key, object.metadata.uid.as_deref(), &json!(status)).await {
        Err(error) if error.code() != Some(404) => Err(error),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// `status`, with the conditions of an object that cannot be read in place of those that say that all is well.
fn mark_malformed<K: Custom>(mut status: K::Status, before: Option<&K::Status>, malformed: &Malformed) -> K::Status {
    let message = format!(
        "the object does not have the form of a {}: {}; its last valid form stays in force",
        K::KIND.as_str(),
        malformed.error
    );
    let previous = before.map(K::conditions).unwrap_or_default();
    let mut conditions = Conditions::new(previous, malformed.generation, Timestamp::now());
    Progress::Stalled(Reason::Malformed, message.clone()).set(&mut conditions);
    conditions.set(ACCEPTED, false, Reason::Malformed, &message);
    let mut conditions = conditions.finish();
    // the others are about what is in force
    let others = K::conditions(&status).iter().filter(|known| status_of(&conditions, &known.type_).is_none());
    let others: Vec<_> = others.cloned().collect();
    conditions.extend(others);
    K::set_conditions(&mut status, conditions, malformed.generation);
    status
}

async fn patch<K: Custom>(
    context: &Context,
    key: &Key,
    uid: Option<&str>,
    status: &serde_json::Value,
) -> Result<DeserializeGuard<K>, RequestError> {
    let mut metadata = json!({"name": key.id.name});
    if let (Some(uid), Some(metadata)) = (uid, metadata.as_object_mut()) {
        metadata.insert("uid".to_owned(), uid.into());
    }
    let body = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": metadata,
        "status": status,
    });
    let api: Api<DeserializeGuard<K>> = Api::namespaced(context.client.clone(), &key.id.namespace);
    let params = PatchParams::apply(STATUS_MANAGER).force();
    let answer = within_deadline(api.patch_status(&key.id.name, &params, &Patch::Apply(&body))).await?;
    context.metrics.status_written(key.kind);
    Ok(answer)
}

/// What a change of conditions is, of the same spec.
fn of_change(was: &[Condition], is: &[Condition]) -> News {
    if was == is {
        News::Numbers
    } else if progress::is_on_the_way(was, is) {
        News::Progress
    } else if essence(was) == essence(is) {
        // a message that only counts further
        News::Numbers
    } else {
        News::Condition
    }
}

/// Conditions without their messages.
fn essence(conditions: &[Condition]) -> Vec<(&str, &str, &str)> {
    conditions
        .iter()
        .map(|condition| (condition.type_.as_str(), condition.status.as_str(), condition.reason.as_str()))
        .collect()
}
