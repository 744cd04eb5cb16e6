//! Which Secrets of a database were deleted.
//!
//! The operator may not read Secrets, nor list or watch them, for each of these rights discloses the passwords. That one exists is
//! what a creation that changes nothing (a dry run) is refused for. It is asked for each Secret once by each process, and
//! again when a pod reports that it misses one.

use std::collections::BTreeSet;

use tokio::time::Instant;

use crate::{
    contract::database_setup::Purpose,
    controllers::{
        apply::secret_is_missing,
        database::secrets_of,
        resources::{
            child::{ChildKind, ChildRef},
            key::Key,
            observed::SecretsObserved,
        },
        runtime::Context,
    },
    domain::names,
};

/// What is known of the Secrets of the database of `owner`, by whose name its children are named. Nothing is asked while nothing may
/// be written: even a dry run is a write.
pub async fn observe(
    context: &Context,
    key: &Key,
    owner: &str,
    purpose: Purpose,
    is_suspended: bool,
) -> SecretsObserved {
    let secrets = secrets_of(owner, purpose);
    let (replaced, is_asked, doubted) = {
        let store = context.store();
        let replaced = store.replaced_secrets(key, owner);
        // those of a database that is only being made are not made again
        let exists = store.child(key, &ChildRef::new(ChildKind::StatefulSet, names::database(owner))).is_some();
        let may_write = !is_suspended && store.not_opted_in(&key.id.namespace).is_none();
        (replaced, exists && may_write, secrets.iter().any(|secret| store.misses_secret(key, secret)))
    };
    let mut observed = SecretsObserved { replaced, missing: BTreeSet::new() };
    if !is_asked {
        return observed;
    }
    if doubted {
        context.memory.doubt_secrets(key);
    }
    for secret in secrets {
        let child = ChildRef::new(ChildKind::Secret, secret);
        if context.memory.knows_secret(key, &child) {
            continue;
        }
        match secret_is_missing(&context.client, key, &child.name).await {
            Ok(true) => drop(observed.missing.insert(child.name)),
            Ok(false) => context.memory.remember_secret(key, child),
            Err(error) => tracing::debug!(secret = child.name, error = error.message(), "does this Secret exist?"),
        }
    }
    if !observed.missing.is_empty() {
        tracing::warn!(missing = ?observed.missing, "Secrets were deleted: they are made again, with new passwords");
        // what reads them follows once they are there
        context.enqueue_at(key, Instant::now());
    }
    observed
}
