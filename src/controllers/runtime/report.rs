//! Writes a status: only when it differs, at its pace, by its own field manager; and publishes the Events that the change is worth.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{
    Api,
    api::{Patch, PatchParams},
    core::DeserializeGuard,
};
use serde_json::json;
use tokio::time::Instant;

use super::{
    Context,
    pace::{News, Wait},
    queue::Priority,
};
use crate::controllers::{
    request::{RequestError, within_deadline},
    resources::{key::Key, labels::STATUS_MANAGER},
    status::{
        conditions::{ACCEPTED, Conditions, READY, STALLED},
        events,
    },
    store::{Custom, Malformed},
};

/// Writes `status` if it is not what the object has. If it has to wait, the object is requeued for when it may be written.
pub async fn write<K: Custom>(context: &Context, key: &Key, object: &K, status: K::Status) -> Result<(), RequestError> {
    let before = object.status();
    if before == Some(&status) {
        context.pace.withdraw(key);
        return Ok(());
    }
    let was = before.map(K::conditions).unwrap_or_default();
    let news = if before.and_then(K::observed_generation) != K::observed_generation(&status) {
        News::Answer
    } else if essence(was) != essence(K::conditions(&status)) {
        News::Condition
    } else {
        News::Numbers
    };
    if !may_write(context, key, news) {
        return Ok(());
    }
    let answer = match patch::<K>(context, key, object.meta().uid.as_deref(), &json!(status)).await {
        // deleted meanwhile (404), or another object of this name by now (409): its own watch events follow
        Err(error) if matches!(error.code(), Some(404 | 409)) => return Ok(()),
        answer => answer?,
    };
    for notice in events::of_change(was, K::conditions(&status)) {
        context.events.publish(notice, object.object_ref(&()));
    }
    if let Ok(object) = answer.0 {
        // a change of the spec, or a deletion, may have come before the answer, which then carries it first
        let requeue = context.store().set(object);
        context.enqueue(requeue, Priority::SpecChange);
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

/// `Accepted=False` on an object that does not have its type's form.
pub async fn write_malformed<K: Custom>(
    context: &Context,
    key: &Key,
    malformed: &Malformed,
) -> Result<(), RequestError> {
    if !may_write(context, key, News::Answer) {
        return Ok(());
    }
    let message = format!("the object does not have the form of a {}: {}", K::KIND.as_str(), malformed.error);
    let mut conditions = Conditions::new(&[], malformed.generation, Timestamp::now());
    conditions.set(READY, false, "Malformed", &message).set(STALLED, true, "Malformed", &message).set(
        ACCEPTED,
        false,
        "Malformed",
        &message,
    );
    let status = json!({"observedGeneration": malformed.generation, "conditions": conditions.finish()});
    tracing::warn!(error = malformed.error, "malformed object");
    match patch::<K>(context, key, None, &status).await {
        Ok(_) => Ok(()),
        Err(error) if error.code() == Some(404) => Ok(()),
        Err(error) => Err(error),
    }
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

/// What of conditions is worth an immediate write: not a message that only counts further.
fn essence(conditions: &[Condition]) -> Vec<(&str, &str, &str)> {
    conditions
        .iter()
        .map(|condition| (condition.type_.as_str(), condition.status.as_str(), condition.reason.as_str()))
        .collect()
}
