//! Which Secrets of a database were deleted.
//!
//! The operator may not read Secrets, nor list or watch them, for each of these rights discloses the passwords. A pod that cannot
//! start for want of one reports it. Whether it is missing still is found out by a creation that changes nothing (a
//! dry run): it is refused when there is one.

use std::collections::BTreeSet;

use tokio::time::Instant;

use crate::{
    controllers::{
        apply::secret_is_missing,
        render::broker::secret_name,
        resources::{
            child::{ChildKind, ChildRef},
            key::Key,
        },
        runtime::Context,
    },
    nats::accounts::Access,
};

/// Of the Secrets `of_the_database` of `owner`, by whose name its children are named, those that were deleted; those with the broker's
/// credentials are made again by the way. Nothing is asked while nothing may be written: even a dry run is a write.
pub async fn missing(
    context: &Context,
    key: &Key,
    owner: &str,
    accesses: &[Access],
    may_be_missed: bool,
    of_the_database: Vec<String>,
) -> BTreeSet<String> {
    let mut missing = BTreeSet::new();
    for secret in missed(context, key, owner, accesses, may_be_missed, &of_the_database) {
        match secret_is_missing(&context.client, key, &secret).await {
            Ok(true) => {
                context.memory.forget_secret(key, &ChildRef::new(ChildKind::Secret, secret.clone()));
                missing.insert(secret);
            }
            Ok(false) => {}
            Err(error) => tracing::debug!(secret, error = error.message(), "cannot find out whether it exists"),
        }
    }
    if !missing.is_empty() {
        tracing::warn!(?missing, "Secrets were deleted: they are made again");
        // what reads them follows once they are there
        context.enqueue_at(key, Instant::now());
    }
    // the broker's credentials are the same again: nothing has to follow
    missing.retain(|secret| of_the_database.contains(secret));
    missing
}

/// Those that pods report to be missing. Those of a database that is only being made are not made again.
fn missed(
    context: &Context,
    key: &Key,
    owner: &str,
    accesses: &[Access],
    may_be_missed: bool,
    of_the_database: &[String],
) -> Vec<String> {
    let store = context.store();
    let may_write = may_be_missed && store.not_opted_in(&key.id.namespace).is_none();
    // nearly every pass ends here; the name of the broker's Secret costs a signature
    if !may_write || !store.misses_secrets(key) {
        return Vec::new();
    }
    // a Microservice has a relay that publishes, and an inbox that reads
    let broker = accesses.iter().filter_map(|access| secret_name(owner, &key.id.namespace, *access, &context.settings));
    of_the_database.iter().cloned().chain(broker).filter(|secret| store.misses_secret(key, secret)).collect()
}
