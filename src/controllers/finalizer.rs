//! The one finalizer there is: a Microservice with `retention: Delete` takes its Secrets with it.
//!
//! The server and its set-up go first, and the volume with them, by the StatefulSet's own retention policy. Whoever applies the
//! same Microservice again right away then begins anew, and does not find an old volume with new passwords. (Secrets carry no
//! owner, so that they outlive mistakes.)

use kube::{
    Api,
    api::{Patch, PatchParams},
};
use serde_json::json;

use super::{
    apply::{delete, delete_secret},
    failure::{RequestError, within_deadline},
    key::Key,
    labels::{Component, DATABASE_FINALIZER},
    plan::{ChildKind, ChildRef},
    runtime::{Shared, Verdict},
};
use crate::{
    api::v1alpha1::{GROUP, Microservice, Retention, VERSION},
    domain::names,
};

/// Its own field manager: what it applies is the finalizer and nothing else.
const MANAGER: &str = "weft-finalizer";

/// Sets or removes the finalizer, if it is not as `retention` wants it.
pub async fn ensure(shared: &Shared, key: &Key, object: &Microservice) -> Result<(), RequestError> {
    let database = object.spec.database.as_ref();
    let wanted = database.is_some_and(|database| database.retention == Retention::Delete);
    if wanted == has(object) { Ok(()) } else { set(shared, key, object, wanted).await }
}

/// The object is being deleted: deletes its Secrets if it is to, then lets it go.
pub async fn finish(shared: &Shared, key: &Key, object: &Microservice) -> Verdict {
    if !has(object) {
        return Verdict::Done;
    }
    let (namespace, name) = (&key.id.namespace, &key.id.name);
    let finished = async {
        if still_has_database(shared, key).await? {
            // its end wakes this object
            return Ok(());
        }
        for secret in [names::database(name), names::admin_secret(name), names::relay_secret(name)] {
            delete_secret(&shared.client, namespace, &secret).await?;
        }
        // a Microservice of this name needs Secrets of its own
        shared.memory.forget(key);
        set(shared, key, object, false).await
    };
    match finished.await {
        Ok(()) => Verdict::Done,
        Err(error) if error.code() == Some(404) => Verdict::Done,
        Err(error) => {
            tracing::warn!(error = error.words(), "the database could not be deleted");
            Verdict::Failed(error.class().0)
        }
    }
}

/// Asks for the deletion of the StatefulSet and the Jobs; whether anything of them, pods included, is still there.
async fn still_has_database(shared: &Shared, key: &Key) -> Result<bool, RequestError> {
    let (children, pods) = {
        let world = shared.world();
        (world.children(key), world.has_pods(key, Component::Database))
    };
    let is_database =
        |child: &ChildRef| [ChildKind::StatefulSet, ChildKind::Job].map(ChildKind::as_str).contains(&child.kind);
    let left: Vec<_> = children.iter().filter(|(child, _)| is_database(child)).collect();
    for (child, seen) in left.iter().filter(|(_, seen)| !seen.deleting) {
        delete(&shared.client, key, child, seen).await?;
    }
    Ok(pods || !left.is_empty())
}

fn has(object: &Microservice) -> bool {
    object.metadata.finalizers.iter().flatten().any(|finalizer| finalizer == DATABASE_FINALIZER)
}

async fn set(shared: &Shared, key: &Key, object: &Microservice, wanted: bool) -> Result<(), RequestError> {
    let finalizers = if wanted { vec![DATABASE_FINALIZER] } else { Vec::new() };
    let body = json!({
        "apiVersion": format!("{GROUP}/{VERSION}"),
        "kind": "Microservice",
        "metadata": {"name": key.id.name, "uid": object.metadata.uid, "finalizers": finalizers},
    });
    let api: Api<Microservice> = Api::namespaced(shared.client.clone(), &key.id.namespace);
    let params = PatchParams::apply(MANAGER).force();
    let answer = within_deadline(api.patch(&key.id.name, &params, &Patch::Apply(&body))).await?;
    if answer.metadata.deletion_timestamp.is_none() {
        shared.world().set(answer);
    }
    Ok(())
}
