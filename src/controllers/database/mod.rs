//! A database's children, whoever owns it: a Microservice or an orchestrator.
//!
//! ```text
//! Secrets (made once, they stay) ─► StatefulSet, Service, NetworkPolicy ─► set-up Job ─► the owner's new pod template
//! ```
//! The Job waits for the server to answer by itself. Of the owner's own children only the pod template waits: see [`gate`].
//!
//! That a set-up is done is recorded in an annotation of its ConfigMap (and shown in a Microservice's status), so it does not
//! depend on a Job that anyone may delete. What it was done for is a hash of all that it works from, the server's uid
//! among it: a server that is made anew is set up anew.
//!
//! The Secrets go with the volume: they have no owner, so that whoever applies a Microservice again finds its passwords, but under
//! `retention: Delete`. One that is gone is made again, and the server, its roles and the pods get the new password.

mod gate;
mod outbox;
mod placement;
mod secrets;
mod server;
mod setup;
pub mod status;

pub use outbox::hash as outbox_hash;
pub use placement::{Access, Mount, Placement, User, check, placement};
pub use secrets::{URI as BINDING_URI, replaced_annotation};
pub use server::{CONTAINER, claim_of as claim, storage};
pub use setup::{CONTAINER as SETUP_CONTAINER, RELEASED_FILE, remaining_slot};

use k8s_openapi::api::apps::v1::Deployment;

use crate::{
    api::v1alpha1::{self, DuplicateWindow, Outbox, Retention},
    contract::database_setup::Purpose,
    controllers::{
        render::{owner::Owner, pod::service_account},
        resources::{
            child::{Child, ChildKind, ChildRef},
            labels::DATABASE_CLIENT_LABEL,
            observed::{DatabaseObserved, JobOutcome, JobState, Migrations},
            plan::{Plan, Rejection},
            settings::Settings,
        },
    },
};

/// The database that an owner wants.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    pub owner: &'a Owner,
    pub placement: &'a dyn Placement,
    pub retention: Retention,
    /// The Microservices whose databases are in this one's, by name.
    pub guests: Vec<String>,
    pub purpose: Purpose,
    pub duplicate_window: Option<&'a DuplicateWindow>,
    pub migrations: Option<&'a v1alpha1::Migrations>,
    /// Of the OutboxRelay. Without one, whatever was set up stays, and events wait.
    pub outbox: Option<&'a Outbox>,
    /// That relay reads the transaction log.
    pub log_tailing: bool,
    /// There is an OutboxRelay, whether it is accepted or not.
    pub has_relay: bool,
    /// The owner asks for the newest images.
    pub upgrade: bool,
}

/// How far the set-up of the present input has come. A new pod template of the owner waits for [`Stage::Done`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage<'a> {
    /// The ConfigMap of migrations does not exist.
    MigrationsMissing {
        config_map: &'a str,
    },
    /// It has no key that ends in `.sql`.
    MigrationsEmpty {
        config_map: &'a str,
    },
    /// It does not have the file `wanted` that the spec asks for.
    MigrationsBehind {
        config_map: &'a str,
        wanted: &'a str,
        newest: Option<&'a str>,
    },
    /// The Job is not there yet, or has to run again: it read another version of the migrations.
    Pending,
    Running(&'a JobState),
    Failed {
        job: String,
        message: &'a str,
    },
    Done,
}

/// The database's children in the order in which they are applied, and the owner's `deployment` as far as it may be written.
pub fn plan(
    wanted: &Wanted<'_>,
    observed: &DatabaseObserved,
    deployment: Deployment,
    settings: &Settings,
) -> Result<Plan, Rejection> {
    let passed = gate::pass(deployment, stage(wanted, observed) == Stage::Done, observed);
    let mut plan = Plan::default();
    // it says which Secrets are made again, before they are
    plan.children.extend(setup::record(wanted, observed, passed.released.as_ref()).map(Child::ConfigMap));
    plan.children.extend(secrets::all(wanted, observed, settings));
    plan.children.push(Child::ServiceAccount(service_account(server::metadata(wanted), settings)));
    plan.children.extend(wanted.placement.server(wanted, observed, settings)?);
    setup::add_job(wanted, observed, settings, &mut plan)?;
    match passed.deployment {
        Some(deployment) => plan.children.push(Child::Deployment(deployment)),
        None => plan.retained.push(ChildRef::new(ChildKind::Deployment, wanted.owner.name.clone())),
    }
    plan.recheck_in = observed.settles_in.filter(|_| passed.settles);
    Ok(plan)
}

/// How far the set-up of the present input has come.
pub fn stage<'a>(wanted: &Wanted<'a>, observed: &'a DatabaseObserved) -> Stage<'a> {
    if let Some(stage) = wanted.migrations.and_then(|wanted| unusable(wanted, observed.migrations.as_ref())) {
        return stage;
    }
    if setup::done(wanted, observed).is_some() {
        return Stage::Done;
    }
    let Some(job) = setup::job_name(wanted, observed) else { return Stage::Pending };
    match observed.jobs.get(&job) {
        None => Stage::Pending,
        Some(state) => match &state.outcome {
            JobOutcome::Running if state.report.is_none() => Stage::Running(state),
            JobOutcome::Running | JobOutcome::Succeeded => Stage::Pending,
            JobOutcome::Failed { message } => Stage::Failed { job, message },
        },
    }
}

/// Why there is nothing to run with the ConfigMap of migrations as it is.
fn unusable<'a>(wanted: &'a v1alpha1::Migrations, found: Option<&'a Migrations>) -> Option<Stage<'a>> {
    let config_map = wanted.config_map.as_str();
    let Some(Migrations::Found { files, .. }) = found else { return Some(Stage::MigrationsMissing { config_map }) };
    if files.is_empty() {
        return Some(Stage::MigrationsEmpty { config_map });
    }
    let last = wanted.last.as_ref().filter(|last| !files.contains(last))?;
    Some(Stage::MigrationsBehind { config_map, wanted: last, newest: files.last().map(String::as_str) })
}

/// The label by which the NetworkPolicy of a database admits a pod of the owner `name`.
pub fn client_label(placement: &dyn Placement, name: &str) -> Option<(String, String)> {
    placement.client_of(name).map(|host| (DATABASE_CLIENT_LABEL.to_owned(), host.to_owned()))
}
