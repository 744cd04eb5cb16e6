//! `weft relay`: publishes the rows of a service's outbox.
//!
//! ```text
//!   source (log, or windows of the table) ──batches──► publisher ──► sink (NATS, Kafka, …)
//!      ▲                                                │ window │
//!      │ recorded marks                                 │        ◄──answers──┘
//!      └─────────── recorder (ledger, deletes rows) ◄───┘ published, held
//!                        └── held events, again ──► publisher
//! ```
//! One process leads ([`crate::postgres::leader`]). A term of leadership ([`term`]) consists of the four parts above and ends when any
//! of them fails; the next term restarts from what is recorded. Nothing is lost, because nothing is recorded before the
//! broker has stored it; nothing is reordered, because of the rule in [`window`]. An event that the broker refuses is
//! *held* with those behind it in its key, which is recorded too, so that it stops nothing else.

mod cli;
pub mod encode;
mod held;
mod latency;
pub mod problem;
mod publisher;
mod reporter;
#[cfg(test)]
mod simulation;
pub mod sink;
pub mod source;
mod term;
pub mod window;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use prometheus_client::registry::Registry;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use self::{problem::RelayProblem, reporter::Reporter, source::SourceError, term::TermError};
use crate::{
    admin::{self, Admin},
    contract::{ADMIN_PORT, Contract, ContractError, problem::ProblemReason, relay::Relay},
    postgres::leader::{Leadership, Pause},
    reload,
    shutdown::Shutdown,
};

/// Key of the leader's lock: "weft rel" in ASCII. It belongs to the database, as outbox and slot do, and not to the relay: while the
/// pods of a service roll, sidecars of an OutboxRelay and of the one that replaces it run side by side. Even if two processes led at
/// once, order would hold (see [`window`]).
const LOCK: i64 = 0x7765_6674_2072_656c;

/// Where the operator mounts the contract file.
const CONFIG: &str = "/etc/weft/relay/relay.yaml";

/// Publish a service's outbox to a broker, and list, retry and skip events that the broker refuses.
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Publish the outbox (a sidecar that the operator starts)
    Run(RunArgs),
    #[command(flatten)]
    Cli(cli::Command),
}

impl Args {
    /// A command for people; the other one is the relay.
    pub fn is_for_people(&self) -> bool {
        matches!(self.command, Command::Cli(_))
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
        Command::Cli(command) => cli::run(command).await,
        Command::Run(args) => Box::pin(publish(args, shutdown)).await,
    }
}

async fn publish(args: RunArgs, shutdown: Shutdown) -> anyhow::Result<()> {
    let RunArgs { config, admin } = args;
    let contract = Relay::load(&config)?;
    let mut registry = Registry::default();
    let reporter = Reporter::new(&contract.name, &mut registry);
    let (live, ready) = (reporter.clone(), reporter.clone());
    let endpoints = Admin {
        live: Arc::new(move || live.live()),
        ready: Arc::new(move || ready.ready()),
        status: reporter.status(),
        registry: Arc::new(registry),
    };
    let (contracts, current) = watch::channel(contract);
    // the endpoints serve until the last term has ended
    let (serving, stop) = (Shutdown::default(), shutdown.token().clone());
    let report = |error: Option<&ContractError>| match error {
        Some(error) => reporter.report(RelayProblem::contract(error)),
        None => reporter.resolve(ProblemReason::ContractInvalid),
    };
    // the Secret of another name is mounted into new pods only: this one goes on with what it has
    let is_mounted = |contract: &Relay| contract.sink.secret_folder().is_none_or(Path::exists);
    tokio::select! {
        served = admin::serve(endpoints.router(), admin, serving) => Ok(served?),
        () = reload::follow(&config, &contracts, is_mounted, report) => Ok(()),
        () = Box::pin(run_terms(current, &reporter, stop)) => Ok(()),
    }
}

/// Runs one term after the other, until it is asked to stop.
async fn run_terms(mut contracts: watch::Receiver<Relay>, reporter: &Arc<Reporter>, stop: CancellationToken) {
    let mut pause_between = Pause::default();
    let (pause, paused) = watch::channel(false);
    while !stop.is_cancelled() {
        let contract = contracts.borrow_and_update().clone();
        pause.send_replace(contract.paused);
        reporter.contract(&contract);
        let started = Instant::now();
        let end = stop.child_token();
        let mut term = Box::pin(lead_once(&contract, paused.clone(), reporter, end.clone()));
        let ended = tokio::select! {
            ended = &mut term => ended,
            () = contract_replaced(&contract, &mut contracts, &pause, reporter) => {
                end.cancel();
                term.await
            }
        };
        reporter.ended();
        let Err(error) = ended else { continue };
        reporter.report(RelayProblem::term(&error, &contract.source));
        pause_between.after_term(started, &stop).await;
    }
}

/// Waits until no other process leads, then leads until an error, or until `stop`.
async fn lead_once(
    contract: &Relay,
    paused: watch::Receiver<bool>,
    reporter: &Arc<Reporter>,
    stop: CancellationToken,
) -> Result<(), TermError> {
    let application = term::application(&contract.name);
    let leadership = tokio::select! {
        biased;
        () = stop.cancelled() => return Ok(()),
        leadership = Leadership::acquire(&contract.source, &application, LOCK, || reporter.leading(false)) => {
            leadership.map_err(SourceError::from)?
        }
    };
    tokio::select! {
        ended = Box::pin(term::lead(contract, paused, reporter, stop)) => ended,
        () = leadership.lost().cancelled() => Err(TermError::LockLost),
    }
}

/// Returns when the contract has changed in anything but `paused`; a change of `paused` alone is applied to the running
/// term.
async fn contract_replaced(
    contract: &Relay,
    contracts: &mut watch::Receiver<Relay>,
    pause: &watch::Sender<bool>,
    reporter: &Reporter,
) {
    while contracts.changed().await.is_ok() {
        let new = contracts.borrow_and_update().clone();
        if (Relay { paused: contract.paused, version: contract.version.clone(), ..new.clone() }) != *contract {
            // this change was consumed here: mark it as unseen, so that the next term starts with it
            contracts.mark_changed();
            return;
        }
        pause.send_replace(new.paused);
        reporter.contract(&new);
    }
    std::future::pending::<()>().await;
}
