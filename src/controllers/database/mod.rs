//! A database's children, whoever owns it: a Microservice or an orchestrator.
//!
//! ```text
//! Secrets (made once, they stay) ─► StatefulSet, Service, NetworkPolicy ─► set-up Job ─► the owner's Deployment
//! ```
//! The Job waits for the server by itself, so everything but the owner's Deployment is written at once.
//!
//! The Secrets go with the volume: they have no owner, so that whoever applies a Microservice again finds its passwords, but under
//! `retention: Delete`. One that is gone is made again, and the server, its roles and the pods get the new password.

mod secrets;
mod server;
mod setup;
pub mod status;

pub use secrets::{URI as BINDING_URI, replaced_annotation, secrets_of};
pub use server::{CONTAINER, claim_of as claim, storage};

use std::path::Path;

use crate::{
    api::v1alpha1::{Postgres, Retention},
    contract::database_setup::Purpose,
    controllers::{
        render::owner::Owner,
        resources::{
            child::Child,
            observed::{DatabaseObserved, JobOutcome, JobState, Migrations},
            plan::Rejection,
            settings::Settings,
        },
    },
    domain::names,
};

/// The database that an owner wants.
#[derive(Clone, Debug)]
pub struct Wanted<'a> {
    pub owner: &'a Owner,
    pub postgres: &'a Postgres,
    pub retention: Retention,
    pub purpose: Purpose,
    /// Name of the ConfigMap of migrations.
    pub migrations: Option<&'a str>,
    /// The owner asks for the newest images.
    pub upgrade: bool,
}

/// How far the set-up of the present input has come. The owner's Deployment is written at [`Stage::Done`] only.
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
    /// The Job is not there yet.
    Pending,
    Running(&'a JobState),
    Failed {
        job: String,
        message: &'a str,
    },
    Done,
}

/// The children of the database, in the order in which they are applied.
pub fn children(
    wanted: &Wanted<'_>,
    observed: &DatabaseObserved,
    settings: &Settings,
) -> Result<Vec<Child>, Rejection> {
    let mut setup = setup::all(wanted, observed, settings)?.into_iter();
    // the contract records which Secrets are made again, before they are
    let mut children: Vec<_> = setup.next().into_iter().collect();
    children.extend(secrets::all(wanted, settings));
    children.extend(server::all(wanted, observed, settings)?);
    children.extend(setup);
    Ok(children)
}

/// How far the set-up of the present input has come.
pub fn stage<'a>(wanted: &Wanted<'a>, observed: &'a DatabaseObserved) -> Stage<'a> {
    if let Some(config_map) = wanted.migrations {
        match &observed.migrations {
            None | Some(Migrations::Missing) => return Stage::MigrationsMissing { config_map },
            Some(Migrations::Found { keys, .. }) if !keys.iter().any(|key| is_migration(key)) => {
                return Stage::MigrationsEmpty { config_map };
            }
            Some(Migrations::Found { .. }) => {}
        }
    }
    let job = setup::job_name(wanted, observed);
    match observed.jobs.get(&job) {
        None => Stage::Pending,
        Some(state) => match &state.outcome {
            JobOutcome::Running => Stage::Running(state),
            JobOutcome::Succeeded => Stage::Done,
            JobOutcome::Failed { message } => Stage::Failed { job, message },
        },
    }
}

/// As the set-up reads the folder.
fn is_migration(key: &str) -> bool {
    Path::new(key).extension().is_some_and(|extension| extension == "sql")
}

/// Host name of the server of `owner` inside the cluster.
pub fn host(owner: &str, namespace: &str) -> String {
    format!("{}.{namespace}.svc", names::database(owner))
}

/// Names of a pod's volumes with passwords, and where they are mounted. The same in every pod that has them.
pub const ADMIN_PASSWORD: (&str, &str) = ("weft-admin", "/etc/weft/admin");
pub const APP_PASSWORD: (&str, &str) = ("weft-app", "/etc/weft/app");
pub const RELAY_PASSWORD: (&str, &str) = ("weft-relay-role", "/etc/weft/relay-role");
