//! `weft database setup`: makes of a server's database what a service (or an orchestrator) needs, then migrates it.
//!
//! It runs in a Job inside the pod network, so that the operator itself needs no way to any database. It can be repeated
//! at any time: where nothing is to be done it locks no table. Set-ups of one database take turns, and one that is killed
//! anywhere leaves whole stages behind.
//!
//! ```text
//! wait for the server ─► take the turn ─► roles, privileges ─► Weft's tables ─► migration 1 ─► … ─► the team's outbox
//!                                         (a transaction each, superuser)       (each, migrator)    (superuser)
//! ```
//! Errors that may pass by themselves are waited out: an attempt that fails when nothing has got further for
//! [`Args::patience`] (since the start, or the last migration applied) is the last one, so that the error can be seen from
//! outside, and its container is started again, with growing pauses. A migration that works has no limit. A definite error ends
//! the program at once, with [`EXIT_DEFINITE`], and is repeated by those that follow ([`definite`]). The last thing is one sentence,
//! or after success an [`Outcome`]: the container's termination message, which the operator reads.

mod by_hand;
mod definite;
mod fitness;
mod layout;
mod locks;
mod migrations;
mod no_transaction;
mod other_tools;
mod outbox;
mod refusal;
mod roles;
mod schemas;
mod session;
mod slot;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use secrecy::SecretString;
use tokio::time::Instant;
use tokio_postgres::Client;

use self::{
    locks::Watched,
    migrations::{Applied, ApplyError, Migration, MigrationError},
    outbox::{AdaptError, OutboxError},
    refusal::{Failure, Refusal},
    roles::{Login, Roles},
    schemas::Schemas,
    session::Session,
};
use crate::{
    contract::{
        Contract, ContractError, Role, RoleName,
        database_setup::{DatabaseSetup, Outcome, migrations_hash},
    },
    outage::with_causes,
    output,
    postgres::login::{self, Address, LoginError},
    shutdown::Shutdown,
};

pub use crate::contract::database_setup::EXIT_DEFINITE;

/// Pause before an attempt is repeated: doubled each time, between these.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Deadline of everything but the migrations themselves and waiting for the turn.
const STAGE_DEADLINE: Duration = Duration::from_secs(45);

/// Key of the advisory lock that set-ups of one database take turns by: "weft set" in ASCII.
const LOCK: i64 = 0x7765_6674_2073_6574;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The contract file
    #[arg(long, env = "WEFT_CONFIG")]
    config: PathBuf,
    /// Where the outcome, or the sentence that says why there is none, goes for Kubernetes to show; written only if the file exists
    #[arg(long, default_value = "/dev/termination-log")]
    termination_log: PathBuf,
    /// Folder in which a definite error is kept, for the next start of the same container to repeat it
    #[arg(long)]
    state: Option<PathBuf>,
    /// Seconds without progress after which an error that might pass ends the program all the same
    #[arg(long, default_value_t = 30)]
    patience: u64,
    #[command(flatten)]
    print: Print,
}

/// For a server on which a person sets the database up.
#[derive(Debug, clap::Args)]
struct Print {
    /// Print the SQL that a superuser runs with psql, and do nothing else
    #[arg(long = "print-sql")]
    sql: bool,
    /// Name of the database, where the Secret is not mounted
    #[arg(long, requires = "sql")]
    database: Option<String>,
    /// Name of the service's login, where the Secret is not mounted
    #[arg(long, requires = "sql")]
    app: Option<String>,
    /// Folder with the migrations, in place of the contract's
    #[arg(long, requires = "sql")]
    migrations: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error(transparent)]
    Migration(#[from] MigrationError),
    #[error(transparent)]
    Outbox(#[from] OutboxError),
    /// What is mounted says neither where nor as whom to log in.
    #[error("{0}")]
    Login(String),
    #[error(
        "database {database} on {host} does not let role {role} in: {refusal}; {}",
        if *adopted {
            "correct `admin-username` and `admin-password` of the Secret, or the server's pg_hba.conf"
        } else {
            "its Secret and its volume may not belong together"
        }
    )]
    LoginRefused { database: String, host: String, role: String, refusal: Box<Refusal>, adopted: bool },
    #[error("the server refuses to {doing}: {refusal}")]
    Refused { doing: String, refusal: Refusal },
    #[error(
        "migrations.last asks for {wanted}, which is neither among the mounted migrations ({}) nor applied; it is tried again, since a new ConfigMap may take a moment: if that does not help, add the file or correct the name",
        newest.as_ref().map_or_else(|| "there are none".to_owned(), |newest| format!("the last one is {newest}"))
    )]
    Behind { wanted: String, newest: Option<String> },
    #[error(
        "{what} waits for a lock: {}; it is tried again and again, for {} each time unless the file says longer, so that others do not wait behind it",
        holder.as_deref().unwrap_or("see old transactions in pg_stat_activity"),
        locks::LOCK_TIMEOUT
    )]
    Locked { what: String, holder: Option<String> },
    #[error("cannot {doing}: {why}; it is tried again, with growing pauses")]
    Passing { doing: String, why: String },
    /// There is no superuser's login, and a person has not set up everything yet.
    #[error(
        "the Secret has no `admin-username` and `admin-password`, so a person sets the database up, and {missing} is missing: run what `weft database setup --print-sql` prints; it is looked at again, with growing pauses"
    )]
    ByHand { missing: String },
    /// The server or the database is not as Weft needs it.
    #[error("{0}; it is tried again, with growing pauses")]
    Unfit(String),
    #[error("asked to end before the set-up was done")]
    Interrupted,
    /// A definite error of an earlier run.
    #[error("{0}")]
    Repeated(String),
}

impl DatabaseError {
    /// Repeating cannot help; a person must change the input.
    pub fn is_definite(&self) -> bool {
        match self {
            Self::Contract(_)
            | Self::Migration(_)
            | Self::Outbox(_)
            | Self::Login(_)
            | Self::LoginRefused { adopted: false, .. }
            | Self::Refused { .. }
            | Self::Repeated(_) => true,
            Self::LoginRefused { .. }
            | Self::Unfit(_)
            | Self::ByHand { .. }
            | Self::Behind { .. }
            | Self::Locked { .. }
            | Self::Passing { .. }
            | Self::Interrupted => false,
        }
    }

    fn of_the_files(error: LoginError) -> Self {
        Self::Login(with_causes(&error))
    }

    fn while_doing(doing: &str) -> impl Fn(tokio_postgres::Error) -> Self {
        move |error| match Failure::from(error) {
            Failure::Refused(refusal) => Self::Refused { doing: doing.to_owned(), refusal },
            Failure::Locked => Self::Locked { what: "the set-up".to_owned(), holder: None },
            Failure::Passing(why) => Self::Passing { doing: doing.to_owned(), why },
        }
    }
}

pub async fn run(args: Args, shutdown: Shutdown) -> anyhow::Result<()> {
    let Args { config, termination_log, state, patience, print } = args;
    if print.sql {
        let script = script(&config, &print).await?;
        return output::answer(&script).context("writing the SQL");
    }
    let ended = tokio::select! {
        ended = set_up_unless_refused(&config, state.as_deref(), Duration::from_secs(patience)) => ended,
        () = shutdown.requested() => Err(DatabaseError::Interrupted),
    };
    write_message(&termination_log, &ended.as_ref().map_or_else(ToString::to_string, Outcome::to_message));
    let Outcome { files, applied, last, hash, .. } = ended?;
    tracing::info!(files, applied, last, hash, "the database is ready");
    Ok(())
}

async fn script(config: &Path, print: &Print) -> Result<String, DatabaseError> {
    let setup = DatabaseSetup::load(config)?;
    let folder = print.migrations.as_deref().or(setup.migrations.as_deref());
    let files = folder.map(migrations::read).transpose()?.unwrap_or_default();
    let database = match &print.database {
        Some(database) => database.clone(),
        None => Address::of(&setup.admin.server).await.map_err(DatabaseError::of_the_files)?.database,
    };
    // a script has no passwords
    let login = async |role: &Role, given: Option<&String>| {
        let name = match given {
            Some(name) => Ok(name.clone()),
            None => login::role_name(&role.name, &database).await.map_err(DatabaseError::of_the_files),
        };
        name.map(|name| Login { name, password: SecretString::default() })
    };
    let (app, relay) = (login(&setup.app, print.app.as_ref()).await?, setup.relay.as_ref());
    let relay = match relay {
        Some(relay) => Some(login(relay, None).await?),
        None => None,
    };
    let roles = named_roles(&setup, database.clone(), app, relay).await?;
    Ok(by_hand::script(&setup, &roles, &files))
}

/// Writes the pod's termination message. Kubernetes makes the file; elsewhere there is none.
fn write_message(path: &Path, message: &str) {
    if path.exists()
        && let Err(error) = std::fs::write(path, message)
    {
        tracing::warn!(%error, path = %path.display(), "the termination message was not written");
    }
}

/// What this run has achieved, over its attempts.
struct Progress {
    /// Migrations applied.
    applied: usize,
    /// When it got further last.
    at: Instant,
}

/// As [`set_up`], unless a record in the folder `state` says that the same input failed for good before.
async fn set_up_unless_refused(
    config: &Path,
    state: Option<&Path>,
    patience: Duration,
) -> Result<Outcome, DatabaseError> {
    let record = state.map(|folder| definite::Record::of_input(folder, config));
    if let Some(sentence) = record.as_ref().and_then(definite::Record::read) {
        return Err(DatabaseError::Repeated(sentence));
    }
    let ended = set_up(config, patience).await;
    if let (Some(record), Err(error)) = (&record, &ended)
        && error.is_definite()
    {
        record.write(&error.to_string());
    }
    ended
}

/// Repeats until the database is as the contract says, an error is definite, or nothing has got further for too long.
async fn set_up(config: &Path, patience: Duration) -> Result<Outcome, DatabaseError> {
    let mut progress = Progress { applied: 0, at: Instant::now() };
    let mut pause = FIRST_PAUSE;
    loop {
        let error = match Box::pin(attempt(config, &mut progress)).await {
            Ok(outcome) => return Ok(outcome),
            Err(error) => error,
        };
        if error.is_definite() || progress.at.elapsed() + pause >= patience {
            return Err(error);
        }
        tracing::warn!(%error, "trying again in {} ms", pause.as_millis());
        tokio::time::sleep(pause).await;
        pause = LONGEST_PAUSE.min(pause * 2);
    }
}

/// Contract and files are read again each time: what is mounted may have become newer.
async fn attempt(config: &Path, progress: &mut Progress) -> Result<Outcome, DatabaseError> {
    let setup = DatabaseSetup::load(config)?;
    let files = setup.migrations.as_deref().map(migrations::read).transpose()?.unwrap_or_default();
    let roles = roles(&setup).await?;
    if is_by_hand(&setup) {
        let outcome = by_hand::check(&setup, &roles, &files, progress).await?;
        remove_slot(&setup, &roles.schemas).await?;
        return Ok(outcome);
    }
    let mut admin = session::admin(&setup).await?;
    let stages = async {
        fitness::check_server(&admin.client, &setup, &roles).await?;
        take_turn(&admin.client).await?;
        in_time("make roles and tables", prepare(&mut admin.client, &setup, &roles)).await
    };
    watched("the set-up", admin.process, &setup, Box::pin(stages)).await?;
    let last = migrate(&mut admin, &setup, &roles, &files, progress).await?;
    adapt_outbox(&mut admin, &setup, &roles.schemas).await?;
    remove_slot(&setup, &roles.schemas).await?;
    let hash = migrations_hash(files.iter().map(|file| (file.name.as_str(), file.sql.as_str())));
    let written = fitness::written_by_others(&admin.client, &roles).await;
    let written_by_others = written.map_err(DatabaseError::while_doing("find out who may write the tables"))?;
    Ok(Outcome { files: files.len(), applied: progress.applied, last, hash, written_by_others })
}

async fn roles(setup: &DatabaseSetup) -> Result<Roles, DatabaseError> {
    let Address { database, .. } = Address::of(&setup.admin.server).await.map_err(DatabaseError::of_the_files)?;
    let login = async |role: &Role| {
        let (name, password) = login::credentials(role, &database).await.map_err(DatabaseError::of_the_files)?;
        Ok::<_, DatabaseError>(Login { name, password })
    };
    let app = login(&setup.app).await?;
    let relay = match &setup.relay {
        Some(relay) => Some(login(relay).await?),
        None => None,
    };
    named_roles(setup, database.clone(), app, relay).await
}

async fn named_roles(
    setup: &DatabaseSetup,
    database: String,
    app: Login,
    relay: Option<Login>,
) -> Result<Roles, DatabaseError> {
    let schemas = Schemas::of(setup);
    Ok(Roles {
        owner: login::role_name(&setup.owner, &database).await.map_err(DatabaseError::of_the_files)?,
        migrator: schemas.migrator_of(&database),
        app,
        relay,
        reads: setup.reads.clone(),
        schemas,
        database,
    })
}

/// A person sets the database up: the Secret has no superuser's login.
fn is_by_hand(setup: &DatabaseSetup) -> bool {
    let Role { name, password_file } = &setup.admin.role;
    matches!(name, RoleName::File { file } if !file.exists() && !password_file.exists())
}

/// Roles and privileges, then Weft's own tables; each in one transaction, as the first has the server's other databases wait.
async fn prepare(admin: &mut Client, setup: &DatabaseSetup, roles: &Roles) -> Result<(), DatabaseError> {
    let failed = DatabaseError::while_doing("make roles and tables");
    let transaction = admin.transaction().await.map_err(&failed)?;
    fitness::check_schema(&transaction, roles).await?;
    roles.make(&transaction).await.map_err(&failed)?;
    transaction.commit().await.map_err(&failed)?;
    let transaction = admin.transaction().await.map_err(&failed)?;
    layout::bring_up_to_date(&transaction, setup.purpose, roles).await.map_err(&failed)?;
    if let Some(window) = setup.duplicate_window {
        layout::set_duplicate_window(&transaction, window, &roles.schemas).await.map_err(&failed)?;
    }
    transaction.commit().await.map_err(&failed)
}

/// No other set-up of this database is at work at the same time, as long as the session is there.
async fn take_turn(admin: &Client) -> Result<(), DatabaseError> {
    let failed = DatabaseError::while_doing("take the turn");
    let free = admin.query_one("select pg_try_advisory_lock($1)", &[&LOCK]).await;
    if free.and_then(|row| row.try_get(0)).map_err(&failed)? {
        return Ok(());
    }
    tracing::info!("another set-up of this database is at work; waiting for it");
    admin.execute("select pg_advisory_lock($1)", &[&LOCK]).await.map_err(&failed).map(drop)
}

/// Applies what is still to be applied; gives the name of the last migration that is.
async fn migrate(
    admin: &mut Session,
    setup: &DatabaseSetup,
    roles: &Roles,
    files: &[Migration],
    progress: &mut Progress,
) -> Result<Option<String>, DatabaseError> {
    let mut applied = migrations::applied(&admin.client, &roles.schemas)
        .await
        .map_err(DatabaseError::while_doing("read what is migrated"))?;
    require(setup.last_migration.as_deref(), files, &applied)?;
    let mut migrator = None;
    while let Some(migration) = migrations::next(files, &applied)? {
        let session = if let Some(session) = &migrator {
            session
        } else {
            let opened = session::migrator(setup, roles, &admin.client);
            migrator.insert(Box::pin(in_time("open the session for migrations", opened)).await?)
        };
        let started = Instant::now();
        tracing::info!(migration = migration.name, "applying");
        apply(admin, session, setup, migration, &roles.schemas).await?;
        let milliseconds = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(migration = migration.name, milliseconds, "applied");
        *progress = Progress { applied: progress.applied + 1, at: Instant::now() };
        applied.push(Applied { name: migration.name.clone(), sha256: migration.sha256() });
        if let Some(outbox) = &setup.outbox {
            let adapted = outbox::adapt_between(&mut admin.client, outbox, &roles.schemas).await;
            adapted.map_err(DatabaseError::while_doing(ADAPT))?;
        }
    }
    Ok(applied.pop().map(|last| last.name))
}

const ADAPT: &str = "adapt the outbox";

/// Has the events that the service writes into a table of its own copied to `weft.outbox`. Without a deadline: rows that are
/// there may be many.
async fn adapt_outbox(admin: &mut Session, setup: &DatabaseSetup, schemas: &Schemas) -> Result<(), DatabaseError> {
    let Some(outbox) = &setup.outbox else { return Ok(()) };
    let work = async {
        outbox::adapt(&mut admin.client, outbox, schemas).await.map_err(|error| match error {
            AdaptError::Unfit(error) => error.into(),
            AdaptError::Query(error) => DatabaseError::while_doing(ADAPT)(error),
        })
    };
    watched("the set-up", admin.process, setup, Box::pin(work)).await
}

async fn remove_slot(setup: &DatabaseSetup, schemas: &Schemas) -> Result<(), DatabaseError> {
    match setup.relay.as_ref().filter(|_| setup.remove_slot) {
        Some(relay) => in_time("remove the replication slot", slot::remove(setup, relay, &schemas.weft)).await,
        None => Ok(()),
    }
}

/// The file that the contract asks for must be there, before any is applied.
fn require(wanted: Option<&str>, files: &[Migration], applied: &[Applied]) -> Result<(), DatabaseError> {
    let Some(wanted) = wanted else { return Ok(()) };
    let is_there = files.iter().any(|file| file.name == wanted) || applied.iter().any(|applied| applied.name == wanted);
    if is_there {
        return Ok(());
    }
    Err(DatabaseError::Behind { wanted: wanted.to_owned(), newest: files.last().map(|file| file.name.clone()) })
}

/// Applies one file in the migrator's session.
async fn apply(
    admin: &mut Session,
    migrator: &Session,
    setup: &DatabaseSetup,
    migration: &Migration,
    schemas: &Schemas,
) -> Result<(), DatabaseError> {
    let what = format!("migration {}", migration.name);
    let doing = format!("apply {what}");
    let announced = async {
        let token = migrations::announce(&mut admin.client, migration, schemas).await;
        token.map_err(DatabaseError::while_doing(&doing))
    };
    let token = watched(&what, admin.process, setup, Box::pin(announced)).await?;
    let work = async {
        migrations::apply(&migrator.client, migration, &token, schemas).await.map_err(|error| match error {
            ApplyError::Definite(error) => error.into(),
            ApplyError::Locked => DatabaseError::Locked { what: what.clone(), holder: None },
            ApplyError::Passing(why) => DatabaseError::Passing { doing: doing.clone(), why },
        })
    };
    watched(&what, migrator.process, setup, Box::pin(work)).await
}

/// Does the `work` of a server's process, and completes the error of one that waited for a lock in vain.
async fn watched<T>(
    what: &str,
    process: i32,
    setup: &DatabaseSetup,
    work: impl Future<Output = Result<T, DatabaseError>>,
) -> Result<T, DatabaseError> {
    let connect = async || session::admin(setup).await.map(|session| session.client);
    let Watched { ended, holder } = locks::watched(process, connect, work).await;
    match ended {
        Some(Err(DatabaseError::Locked { what, holder: _ })) => Err(DatabaseError::Locked { what, holder }),
        Some(ended) => ended,
        None => Err(DatabaseError::Locked { what: what.to_owned(), holder }),
    }
}

async fn in_time<T>(doing: &str, work: impl Future<Output = Result<T, DatabaseError>>) -> Result<T, DatabaseError> {
    let late = |_| DatabaseError::Passing {
        doing: doing.to_owned(),
        why: format!("no answer within {} s", STAGE_DEADLINE.as_secs()),
    };
    tokio::time::timeout(STAGE_DEADLINE, work).await.map_err(late)?
}
