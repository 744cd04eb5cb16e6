//! What should exist because of a Microservice.
//!
//! A new pod template waits until the set-up of the present input is done; everything else is kept as the spec wants it
//! meanwhile, so that a failed migration leaves the old version serving, scaled and repaired.

mod deployment;
mod environment;
mod inbox;
mod network;
mod relay;
mod scaling;
mod standalone;

pub(super) use deployment::pod_labels;
pub(super) use inbox::{CONTRACT_FILE as INBOX_CONTRACT_FILE, stays_in_force, wanted as inbox_wanted};

use kube::ResourceExt;

use super::Observed;
use crate::{
    api::v1alpha1::{Database, Microservice, Retention},
    contract::database_setup::Purpose,
    controllers::{
        database::{self, Stage, Wanted},
        render::{
            owner::{Owner, reference},
            pod::{service_account, wants_upgrade},
        },
        resources::{
            child::Child,
            labels::Component,
            plan::{Plan, Rejection},
            reason::Reason,
            settings::Settings,
        },
    },
    domain::names::{self, MAX_NAME},
};

/// Value of `weft.dev/owner-kind` on the children of a Microservice.
pub const OWNER_KIND: &str = "Microservice";

pub fn plan(object: &Microservice, observed: &Observed, settings: &Settings) -> Result<Plan, Rejection> {
    check(object)?;
    if let Some(database) = &object.spec.database {
        database::check(database)?;
        database::placement(database).check(&object.name_any(), &observed.database)?;
    }
    if observed.predecessor_ends {
        return Err(Rejection::predecessor_ends(&object.name_any()));
    }
    let owner = Owner::of(object, OWNER_KIND);
    let mut plan = Plan::default();
    plan.children.push(service_account(owner.metadata(owner.name.clone(), Component::Service), settings).into());
    plan.children.extend(network::service(object, &owner).map(Child::Service));
    plan.children.extend(scaling::autoscaler(object, &owner).map(Child::HorizontalPodAutoscaler));
    plan.children.extend(network::policy(object, observed, &owner, settings).map(Child::NetworkPolicy));
    let carried = relay::of(object, observed);
    let credentials = carried.as_ref().and_then(|_| relay::credentials(&owner, settings));
    if let Some(carried) = carried.filter(|carried| relay::is_alone(carried, observed)) {
        let carried = (&carried, credentials.as_ref());
        plan.children.extend(standalone::children(object, &owner, observed, carried, settings)?);
    }
    plan.children.extend(inbox::children(object, &owner, observed, settings)?);
    let deployment = deployment::deployment(object, &owner, observed, credentials.as_ref(), settings)?;
    plan.children.extend(credentials.map(Child::Secret));
    // the server outlives its own service as long as the data of others is in it
    let guests = observed.guests.iter().map(|guest| reference(guest.as_ref()));
    let owners = owner.and(guests.chain(observed.unreadable_guests.iter().cloned()));
    match object.spec.database.as_ref().map(|database| wanted(object, &owners, database, observed)) {
        None => plan.children.push(Child::Deployment(deployment)),
        Some(wanted) => {
            let Plan { children, retained, recheck_in } =
                database::plan(&wanted, &observed.database, deployment, settings)?;
            plan.children.extend(children);
            plan.retained.extend(retained);
            plan.recheck_in = recheck_in;
        }
    }
    if observed.inbox_waits {
        // the new contract of the inbox is written when the pods' template may be
        plan.recheck_in = plan.recheck_in.or(observed.database.settles_in);
    }
    plan.children.extend(scaling::disruption_budget(object, &owner).map(Child::PodDisruptionBudget));
    Ok(plan)
}

/// Passes on how far the set-up has come; `None` without a database.
pub(super) fn stage<R>(
    object: &Microservice,
    observed: &Observed,
    use_stage: impl FnOnce(Option<Stage<'_>>) -> R,
) -> R {
    let owner = Owner::of(object, OWNER_KIND);
    let wanted = object.spec.database.as_ref().map(|database| wanted(object, &owner, database, observed));
    use_stage(wanted.as_ref().map(|wanted| database::stage(wanted, &observed.database)))
}

/// As [`database::remaining_slot`]; `None` without a database.
pub(super) fn remaining_slot<'a>(object: &Microservice, observed: &'a Observed) -> Option<(Option<String>, &'a str)> {
    let owner = Owner::of(object, OWNER_KIND);
    let wanted = wanted(object, &owner, object.spec.database.as_ref()?, observed);
    database::remaining_slot(&wanted, &observed.database)
}

fn wanted<'a>(object: &Microservice, owner: &'a Owner, database: &'a Database, observed: &'a Observed) -> Wanted<'a> {
    let guests = observed.guests();
    Wanted {
        owner,
        placement: database::placement(database),
        // nobody deletes the data of another
        retention: if guests.is_empty() { database.retention } else { Retention::Retain },
        guests,
        purpose: Purpose::Service,
        duplicate_window: Some(&database.duplicate_window),
        migrations: database.migrations.as_ref(),
        outbox: relay::outbox(observed),
        log_tailing: relay::is_log_tailing(observed),
        has_relay: !observed.relays.is_empty() || observed.kept_relay.is_some(),
        upgrade: wants_upgrade(object),
    }
}

/// What the API server refuses by CEL, for clusters on which an object came past it.
fn check(object: &Microservice) -> Result<(), Rejection> {
    let name = object.name_any();
    if name.len() > MAX_NAME {
        return Err(Rejection {
            reason: Reason::NameTooLong,
            message: format!(
                "metadata.name: `{name}` has {} characters, so `{}` would not fit into 63: use at most {MAX_NAME}",
                name.len(),
                names::setup_job(&name, "01234567")
            ),
        });
    }
    if object.spec.depends_on.iter().any(|dependency| dependency.service == name) {
        return Err(Rejection {
            reason: Reason::DependsOnItself,
            message: format!("spec.dependsOn names `{name}` itself: remove it"),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
