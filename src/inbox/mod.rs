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

use std::{net::SocketAddr, path::PathBuf, sync::Arc};

use futures::future::try_join_all;
use prometheus_client::registry::Registry;
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use self::{problem::InboxProblem, reporter::Reporter, store::Store, subscription::Context};
use crate::{
    admin::{self, Admin},
    contract::{ADMIN_PORT, Contract, ContractError, inbox::Inbox, problem::ProblemReason},
    postgres::{
        leader::{Leadership, Pause},
        session::{Session, SessionError},
    },
    reload,
    shutdown::Shutdown,
};

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
    let report = |error: Option<&ContractError>| match error {
        Some(error) => reporter.report(InboxProblem::contract(error)),
        None => reporter.resolve(ProblemReason::ContractInvalid, ""),
    };
    tokio::select! {
        served = admin::serve(endpoints.router(), admin, serving) => Ok(served?),
        () = reload::follow(&config, &contracts, |_| true, report) => Ok(()),
        () = Box::pin(run_terms(current, &reporter, stop)) => Ok(()),
    }
}

/// Runs one term after the other, until it is asked to stop.
async fn run_terms(mut contracts: watch::Receiver<Inbox>, reporter: &Reporter, stop: CancellationToken) {
    let mut pause_between = Pause::default();
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
        pause_between.after_term(started, &stop).await;
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
