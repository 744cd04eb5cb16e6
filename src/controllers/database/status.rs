//! Conditions of a database, for the status of its owner.

use super::Stage;
use crate::controllers::{
    resources::{observed::Workload, reason::Reason},
    status::progress::{Finding, Progress},
};

/// `DatabaseReady`: the server answers.
pub fn server(live: Option<&Workload>) -> Finding {
    let Some(live) = live else { return Finding::new(false, Reason::Creating, "the database server is being made") };
    if live.observed_generation >= live.generation && live.ready >= live.wanted {
        return Finding::new(true, Reason::Ready, "the database server answers");
    }
    match live.problems.first() {
        Some(problem) => Finding::from(problem),
        None => Finding::new(false, Reason::Starting, "the database server is starting"),
    }
}

/// `Migrated`: the schema is as the present spec and its migrations want it.
pub fn migrated(stage: &Stage<'_>) -> Finding {
    match stage {
        Stage::MigrationsMissing { config_map } => Finding::new(
            false,
            Reason::MigrationsNotFound,
            format!(
                "spec.database.migrations.configMap: there is no ConfigMap `{config_map}` in this namespace: create it, or correct the name"
            ),
        ),
        Stage::MigrationsEmpty { config_map } => Finding::new(
            false,
            Reason::MigrationsEmpty,
            format!(
                "spec.database.migrations.configMap: ConfigMap `{config_map}` has no key that ends in `.sql`: add the migrations, or leave spec.database.migrations out"
            ),
        ),
        Stage::MigrationsBehind { config_map, wanted, newest } => Finding::new(
            false,
            Reason::MigrationsBehind,
            format!(
                "spec.database.migrations.last: ConfigMap `{config_map}` has no `{wanted}` (its last file is `{}`): add the file, or correct the name",
                newest.unwrap_or_default()
            ),
        ),
        Stage::Pending => Finding::new(false, Reason::SetupPending, "the set-up of the database has not started yet"),
        Stage::Running(job) => match job.problems.first() {
            Some(problem) => Finding::from(problem),
            None => Finding::new(false, Reason::SetupRunning, "the database is being set up"),
        },
        Stage::Failed { job, message } => Finding::new(
            false,
            Reason::SetupFailed,
            format!(
                "{}; change the migrations, or delete Job `{job}` to try again",
                message.trim().trim_end_matches('.')
            ),
        ),
        Stage::Done => Finding::new(true, Reason::Migrated, "the database is set up and every migration is applied"),
    }
}

/// `SlotRemains`: the Job that is to remove the replication slot of an OutboxRelay that is gone says why it cannot.
pub fn slot_remains(job: Option<&str>, message: &str) -> Finding {
    let message = message.trim().trim_end_matches('.');
    let again = job.map(|job| format!("; Job `{job}` tries again")).unwrap_or_default();
    let message =
        format!("the replication slot of an OutboxRelay that is gone keeps the server's log: {message}{again}");
    Finding::new(true, Reason::SlotRemains, message)
}

/// What the owner waits for, or is stalled by: a failed set-up needs a person, everything else comes by itself.
pub fn progress(server: &Finding, stage: &Stage<'_>) -> Option<Progress> {
    let migrated = migrated(stage);
    match stage {
        Stage::Failed { .. } => Some(Progress::Stalled(migrated.reason, migrated.message)),
        Stage::MigrationsMissing { .. } | Stage::MigrationsEmpty { .. } | Stage::MigrationsBehind { .. } => {
            migrated.blocking()
        }
        Stage::Pending | Stage::Running(_) | Stage::Done => server.clone().blocking().or_else(|| migrated.blocking()),
    }
}
