//! `weft database setup`: makes of a server's database what a service (or an orchestrator) needs, then migrates it.
//!
//! It runs in a Job inside the pod network, so that the operator itself needs no way to any database. Every stage is one
//! transaction under one advisory lock and can be repeated: two set-ups at the same time take turns, and one that is
//! killed anywhere leaves whole stages behind.
//!
//! ```text
//! wait for the server ─► roles, privileges, Weft's tables ─► migration 1 ─► migration 2 ─► …
//!                        (one transaction)                   (a transaction each)
//! ```
//! Errors that may pass by themselves are logged and waited out, for as long as it takes; a definite one ends the program
//! with [`EXIT_DEFINITE`] and one sentence, which is also the pod's termination message, so that the operator can show it.
//! A lock that somebody does not give up ends it too, with that one's name, and the Job tries again.

mod layout;
mod locks;
mod migrations;
mod refusal;
mod roles;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use postgres_protocol::escape::escape_identifier;
use tokio_postgres::{Client, Transaction};

use self::{
    migrations::{ApplyError, Migration, MigrationError},
    refusal::{Failure, Refusal},
    roles::{Login, Roles},
};
use crate::{
    contract::{Contract, ContractError, Role, database_setup::DatabaseSetup},
    postgres::login::{self, LoginError},
    shutdown::Shutdown,
};

pub use crate::contract::database_setup::EXIT_DEFINITE;

/// Pause before an attempt is repeated: doubled each time, between these.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Key of the advisory lock that set-ups of one database take turns by: "weft set" in ASCII.
const LOCK: i64 = 0x7765_6674_2073_6574;

/// After so many attempts in a row that ended because of a lock, the program ends, so that it can be seen from outside.
const LOCKED_ATTEMPTS: u32 = 5;

/// Whatever the server's own settings are: a migration may take its time, and one whose client is gone is ended. How long it
/// waits for locks is said in each transaction ([`locks`]).
const SESSION: &str = "-c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0 \
    -c client_connection_check_interval=2s -c client_min_messages=warning";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The contract file
    #[arg(long, env = "WEFT_CONFIG")]
    config: PathBuf,
    /// Where the last sentence goes for Kubernetes to show; written only if the file exists
    #[arg(long, default_value = "/dev/termination-log")]
    termination_log: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error(transparent)]
    Migration(#[from] MigrationError),
    #[error("{0}")]
    Password(String),
    #[error(
        "database {database} on {host} does not let role {role} in: {refusal}; its Secret and its volume may not belong together"
    )]
    LoginRefused { database: String, host: String, role: String, refusal: Refusal },
    #[error("the server refuses to {doing}: {refusal}")]
    Refused { doing: &'static str, refusal: Refusal },
    #[error(
        "{what} waits for a lock: {}; it is tried again and again, for {} each time, so that others do not wait behind it",
        holder.as_deref().unwrap_or("look for old transactions in pg_stat_activity"),
        locks::LOCK_TIMEOUT
    )]
    Locked { what: String, holder: Option<String> },
    #[error("cannot {doing}: {why}")]
    Passing { doing: &'static str, why: String },
    #[error("asked to end before the set-up was done")]
    Interrupted,
}

impl DatabaseError {
    /// Repeating cannot help; a person must change the input.
    pub fn is_definite(&self) -> bool {
        match self {
            Self::Contract(_)
            | Self::Migration(_)
            | Self::Password(_)
            | Self::LoginRefused { .. }
            | Self::Refused { .. } => true,
            Self::Locked { .. } | Self::Passing { .. } | Self::Interrupted => false,
        }
    }

    fn while_doing(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> Self {
        move |error| match Failure::from(error) {
            Failure::Refused(refusal) => Self::Refused { doing, refusal },
            Failure::Locked => Self::Locked { what: "the set-up".to_owned(), holder: None },
            Failure::Passing(why) => Self::Passing { doing, why },
        }
    }
}

pub async fn run(args: Args, shutdown: Shutdown) -> anyhow::Result<()> {
    let Args { config, termination_log } = args;
    let ended = tokio::select! {
        ended = set_up(&config) => ended,
        () = shutdown.requested() => Err(DatabaseError::Interrupted),
    };
    let sentence = ended.as_ref().map_or_else(ToString::to_string, Summary::to_string);
    leave_word(&termination_log, &sentence);
    let summary = ended?;
    tracing::info!(applied = summary.applied, migrations = summary.migrations, "the database is ready");
    Ok(())
}

/// Writes the pod's termination message. Kubernetes makes the file; elsewhere there is none.
fn leave_word(path: &Path, sentence: &str) {
    if path.exists()
        && let Err(error) = std::fs::write(path, sentence)
    {
        tracing::warn!(%error, path = %path.display(), "the termination message was not written");
    }
}

/// What a set-up came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Migrations that this run applied.
    applied: usize,
    /// Migrations that the folder holds.
    migrations: usize,
}

impl std::fmt::Display for Summary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the database is ready; {} of {} migrations were new", self.applied, self.migrations)
    }
}

/// Repeats until the database is as the contract says, or an error is definite.
async fn set_up(config: &Path) -> Result<Summary, DatabaseError> {
    let setup = DatabaseSetup::load(config)?;
    let files = setup.migrations.as_deref().map(migrations::read).transpose()?.unwrap_or_default();
    let mut pause = FIRST_PAUSE;
    let mut locked = 0;
    loop {
        match attempt(&setup, &files).await {
            Err(error) if !error.is_definite() => {
                locked = if matches!(error, DatabaseError::Locked { .. }) { locked + 1 } else { 0 };
                if locked == LOCKED_ATTEMPTS {
                    return Err(error);
                }
                tracing::warn!(%error, "trying again in {} ms", pause.as_millis());
                tokio::time::sleep(pause).await;
                pause = LONGEST_PAUSE.min(pause * 2);
            }
            ended => return ended,
        }
    }
}

async fn attempt(setup: &DatabaseSetup, files: &[Migration]) -> Result<Summary, DatabaseError> {
    let roles = Roles {
        owner: setup.owner.clone(),
        app: read_login(&setup.app).await?,
        relay: match &setup.relay {
            Some(relay) => Some(read_login(relay).await?),
            None => None,
        },
    };
    let mut client = connect(setup).await?;
    let process = client.query_one("select pg_backend_pid()", &[]).await.and_then(|row| row.try_get(0));
    let process = process.map_err(DatabaseError::while_doing("log in"))?;
    let work = async {
        prepare(&mut client, setup, &roles).await?;
        migrate(&mut client, files, &setup.owner).await
    };
    match locks::watched(process, async || connect(setup).await, Box::pin(work)).await {
        (Err(DatabaseError::Locked { what, holder: _ }), holder) => Err(DatabaseError::Locked { what, holder }),
        (worked, _) => Ok(Summary { applied: worked?, migrations: files.len() }),
    }
}

async fn read_login(role: &Role) -> Result<Login, DatabaseError> {
    let password = login::password(role).await.map_err(|error| DatabaseError::Password(error.to_string()))?;
    Ok(Login { name: role.name.clone(), password })
}

async fn connect(setup: &DatabaseSetup) -> Result<Client, DatabaseError> {
    let failed = |error| login_failed(setup, error);
    let mut config = login::config(&setup.admin, "weft database setup").await.map_err(failed)?;
    config.options(SESSION);
    let (client, connection) = login::open(&setup.admin, &config).await.map_err(failed)?;
    // ends with the client; a failure shows in the client's next call
    tokio::spawn(connection);
    Ok(client)
}

fn login_failed(setup: &DatabaseSetup, error: LoginError) -> DatabaseError {
    let doing = "log in";
    match error {
        LoginError::Password { .. } => DatabaseError::Password(error.to_string()),
        LoginError::Timeout { .. } => DatabaseError::Passing { doing, why: error.to_string() },
        LoginError::Connect { database, host, role, source, .. } => match Failure::from(source) {
            Failure::Refused(refusal) => DatabaseError::LoginRefused { database, host, role, refusal },
            Failure::Locked => DatabaseError::Passing { doing, why: "a lock is held".to_owned() },
            Failure::Passing(why) => {
                DatabaseError::Passing { doing, why: format!("{host}:{}: {why}", setup.admin.port) }
            }
        },
    }
}

/// Roles, privileges and Weft's own tables, in one transaction.
async fn prepare(client: &mut Client, setup: &DatabaseSetup, roles: &Roles) -> Result<(), DatabaseError> {
    let doing = "make roles and tables";
    let transaction = take_turn(client, doing).await?;
    roles.make(&transaction, &setup.admin.database).await.map_err(DatabaseError::while_doing(doing))?;
    layout::bring_up_to_date(&transaction, setup.purpose, roles).await.map_err(DatabaseError::while_doing(doing))?;
    transaction.commit().await.map_err(DatabaseError::while_doing(doing))
}

/// Applies what is still to be applied; says how many files those were.
async fn migrate(client: &mut Client, files: &[Migration], owner: &str) -> Result<usize, DatabaseError> {
    let doing = "migrate";
    let owner = escape_identifier(owner);
    for count in 0.. {
        let transaction = take_turn(client, doing).await?;
        let applied = migrations::applied(&transaction).await.map_err(DatabaseError::while_doing(doing))?;
        let Some(migration) = migrations::next(files, &applied)? else { return Ok(count) };
        let started = Instant::now();
        tracing::info!(migration = migration.name, "applying");
        match migrations::apply(transaction, migration, &owner).await {
            Ok(()) => {}
            Err(ApplyError::Definite(error)) => return Err(error.into()),
            Err(ApplyError::Locked) => {
                return Err(DatabaseError::Locked { what: format!("migration {}", migration.name), holder: None });
            }
            Err(ApplyError::Passing(why)) => return Err(DatabaseError::Passing { doing, why }),
        }
        let milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(migration = migration.name, milliseconds, "applied");
        // what the file set for its session must not reach the next one
        client.batch_execute("discard all").await.map_err(DatabaseError::while_doing(doing))?;
    }
    Ok(0)
}

/// Begins a transaction that no other set-up of this database is in at the same time.
async fn take_turn<'a>(client: &'a mut Client, doing: &'static str) -> Result<Transaction<'a>, DatabaseError> {
    let transaction = client.transaction().await.map_err(DatabaseError::while_doing(doing))?;
    let free = transaction.query_one("select pg_try_advisory_xact_lock($1)", &[&LOCK]).await;
    if !free.and_then(|row| row.try_get(0)).map_err(DatabaseError::while_doing(doing))? {
        tracing::info!("another set-up of this database is at work; waiting for it");
        let taken = transaction.execute("select pg_advisory_xact_lock($1)", &[&LOCK]).await;
        taken.map_err(DatabaseError::while_doing(doing))?;
    }
    // only now: a turn is waited for as long as it takes
    let bound = format!("set local lock_timeout = '{}'", locks::LOCK_TIMEOUT);
    transaction.batch_execute(&bound).await.map_err(DatabaseError::while_doing(doing))?;
    Ok(transaction)
}
