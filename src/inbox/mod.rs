//! `weft inbox`: delivers events of other services to a service.
//!
//! All inboxes of a service run the same contract, and one leads ([`crate::postgres::leader`]): so a key has one delivery at a
//! time, wherever it goes. The leader does not call its own pod but the service's address, behind which all replicas are, so
//! that they share the load. Another one that leads begins at the recorded position, behind which nothing is settled that was
//! not waited for; what comes twice by that is dropped by `weft.receive`.
//!
//! Of each [`subscription`] nothing depends on the others, but for the database. `source` says what a broker has to give.

mod cli;
mod deliver;
mod event;
pub mod problem;
mod queue;
mod reporter;
mod source;
mod store;
mod subscription;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::future::try_join_all;
use prometheus_client::registry::Registry;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;

use self::{problem::InboxProblem, reporter::Reporter, store::Store, subscription::Context};
use crate::{
    admin::{self, Admin},
    contract::{ADMIN_PORT, Contract, inbox::Inbox, problem::ProblemReason},
    postgres::{
        leader::Leadership,
        session::{Session, SessionError},
    },
    shutdown::Shutdown,
};

/// How often the contract file is read again.
const RELOAD: Duration = Duration::from_secs(1);
/// Wait between two terms: the shortest, and the longest after repeated failures.
const BETWEEN_TERMS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// After a term of at least this length the wait between terms starts again at the shortest.
const STABLE_TERM: Duration = Duration::from_secs(30);
/// Key of the leader's lock: "weft inb" in ASCII.
const LOCK: i64 = 0x7765_6674_2069_6e62;

/// Where the operator mounts the contract file.
const CONFIG: &str = "/etc/weft/inbox/inbox.yaml";

/// Deliver events of other services to a service, and list, retry and skip those that it does not handle.
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Deliver events (the operator starts it beside the service)
    Run(RunArgs),
    /// Events that the service does not handle, those that wait behind them, and dead letters
    #[command(subcommand)]
    Dead(cli::Command),
}

impl Args {
    /// A command for people; the other one is the inbox.
    pub fn is_for_people(&self) -> bool {
        matches!(self.command, Command::Dead(_))
    }
}

#[derive(Debug, clap::Args)]
struct RunArgs {
    /// The contract file
    #[arg(long, env = "WEFT_CONFIG", default_value = CONFIG)]
    config: PathBuf,
    /// Address of the admin endpoints: /livez, /readyz, /metrics, /status
    #[arg(long, env = "WEFT_ADMIN", default_value_t = admin::any(ADMIN_PORT))]
    admin: SocketAddr,
}

pub async fn run(args: Args, shutdown: Shutdown) -> anyhow::Result<()> {
    match args.command {
        Command::Dead(command) => cli::run(command).await,
        Command::Run(args) => Box::pin(deliver(args, shutdown)).await,
    }
}

async fn deliver(args: RunArgs, shutdown: Shutdown) -> anyhow::Result<()> {
    let RunArgs { config, admin } = args;
    let contract = Inbox::load(&config)?;
    let mut registry = Registry::default();
    let reporter = Reporter::new(&mut registry);
    let ready = reporter.clone();
    let endpoints = Admin {
        live: Arc::new(|| Ok(())),
        ready: Arc::new(move || ready.ready()),
        status: reporter.status(),
        registry: Arc::new(registry),
    };
    let (contracts, current) = watch::channel(contract);
    // the endpoints serve until the last term has ended
    let (serving, stop) = (Shutdown::default(), shutdown.token().clone());
    tokio::select! {
        served = admin::serve(endpoints.router(), admin, serving) => Ok(served?),
        () = reload(&config, &contracts, &reporter) => Ok(()),
        () = Box::pin(run_terms(current, &reporter, stop)) => Ok(()),
    }
}

/// Follows changes of the contract file, forever.
async fn reload(path: &Path, contracts: &watch::Sender<Inbox>, reporter: &Reporter) {
    loop {
        sleep(RELOAD).await;
        let file = path.to_owned();
        match tokio::task::spawn_blocking(move || Inbox::load(&file)).await {
            Ok(Ok(contract)) => {
                reporter.resolve(ProblemReason::ContractInvalid, "");
                let changed = contracts.send_if_modified(|current| {
                    let changed = *current != contract;
                    *current = contract;
                    changed
                });
                if changed {
                    tracing::info!(path = %path.display(), "the contract changed");
                }
            }
            Ok(Err(error)) => reporter.report(InboxProblem::contract(&error)),
            Err(_cancelled) => return,
        }
    }
}

/// Runs one term after the other, until it is asked to stop.
async fn run_terms(mut contracts: watch::Receiver<Inbox>, reporter: &Reporter, stop: CancellationToken) {
    let mut wait = BETWEEN_TERMS.0;
    while !stop.is_cancelled() {
        let contract = contracts.borrow_and_update().clone();
        reporter.contract(&contract);
        let (started, end) = (Instant::now(), stop.child_token());
        let mut term = Box::pin(lead_once(&contract, reporter, end.clone()));
        let ended = tokio::select! {
            ended = &mut term => ended,
            Ok(()) = contracts.changed() => {
                end.cancel();
                term.await
            }
        };
        reporter.ended();
        let Err(error) = ended else { continue };
        reporter.report(InboxProblem::session(&error, &contract.database));
        if started.elapsed() > STABLE_TERM {
            wait = BETWEEN_TERMS.0;
        }
        tokio::select! { () = sleep(wait) => {} () = stop.cancelled() => {} }
        wait = (wait * 2).min(BETWEEN_TERMS.1);
    }
}

/// Waits until no other process leads, then delivers until an error, or until `stop`.
async fn lead_once(contract: &Inbox, reporter: &Reporter, stop: CancellationToken) -> Result<(), SessionError> {
    let application = format!("weft inbox {}", contract.service);
    let leadership = tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(()),
        leadership = Leadership::acquire(&contract.database, &application, LOCK, || reporter.leading(false)) => leadership?,
    };
    let session = Session::connect(&contract.database, &application).await?;
    reporter.leading(true);
    tracing::info!(service = contract.service, subscriptions = contract.subscriptions.len(), "leading");
    let subscriptions = contract.subscriptions.iter().map(|subscription| {
        let store = Store { client: &session.client, subscription: &subscription.name };
        Box::pin(Context { contract, subscription, store, reporter }.run(stop.clone()))
    });
    let answers = |silence| match silence {
        Some(silence) => reporter.report(InboxProblem::silent_database(&contract.database, silence)),
        None => reporter.resolve(ProblemReason::DatabaseUnreachable, ""),
    };
    let lost = || Err(SessionError::Lost);
    tokio::select! {
        biased;
        () = leadership.lost().cancelled() => lost(),
        () = session.lost.cancelled() => lost(),
        ended = try_join_all(subscriptions) => ended.map(drop),
        () = session.watch(&contract.database, answers) => lost(),
    }
}
