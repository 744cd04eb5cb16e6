//! `weft relay`: publishes the rows of a service's outbox.
//!
//! ```text
//!   source (WAL or snapshot windows) ──batches──► publisher ──► sink (NATS JetStream)
//!      ▲                                            │ window    │
//!      │ recorded marks                             ◄──answers──┘
//!      └──────────── recorder (deletes rows, checkpoint) ◄── acknowledged
//! ```
//! One process leads ([`control`]). A term of leadership ([`term`]) consists of the four parts above and ends when any
//! of them fails; the next term restarts from what is recorded. Nothing is lost, because nothing is recorded before the
//! broker has stored it; nothing is reordered, because of the rule in [`window`].

mod checkpoint;
mod control;
pub mod problem;
mod publisher;
mod reporter;
#[cfg(test)]
mod simulation;
pub mod sink;
mod slot;
pub mod source;
mod term;
pub mod window;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use prometheus_client::registry::Registry;
use tokio::{
    sync::watch,
    time::{Instant, sleep},
};

use self::{
    control::{Control, LOCK_RETRY},
    problem::RelayProblem,
    reporter::Reporter,
    term::TermError,
};
use crate::{
    admin::{self, Admin},
    contract::{ADMIN_PORT, Contract, problem::ProblemReason, relay::Relay},
    shutdown::Shutdown,
};

/// How often the contract file is read again.
const RELOAD: Duration = Duration::from_secs(1);
/// Wait between two terms: the shortest, and the longest after repeated failures.
const BETWEEN_TERMS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// After a term of at least this length the wait between terms starts again at the shortest.
const STABLE_TERM: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The contract file
    #[arg(long, env = "WEFT_CONFIG")]
    config: PathBuf,
    /// Address of the admin endpoints: /livez, /readyz, /metrics, /status
    #[arg(long, env = "WEFT_ADMIN", default_value_t = admin::any(ADMIN_PORT))]
    admin: SocketAddr,
}

pub async fn run(args: Args, shutdown: Shutdown) -> anyhow::Result<()> {
    let Args { config, admin } = args;
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
    tokio::select! {
        served = admin::serve(endpoints.router(), admin, shutdown.clone()) => Ok(served?),
        () = reload(&config, &contracts, &reporter) => Ok(()),
        () = Box::pin(run_terms(current, &reporter)) => Ok(()),
        () = shutdown.requested() => Ok(()),
    }
}

/// Follows changes of the contract file, forever.
async fn reload(path: &Path, contracts: &watch::Sender<Relay>, reporter: &Reporter) {
    loop {
        sleep(RELOAD).await;
        let (file, path) = (path.to_owned(), path.to_owned());
        let read = tokio::task::spawn_blocking(move || Relay::load(&file)).await;
        match read {
            Ok(Ok(contract)) => {
                reporter.resolve(ProblemReason::ContractInvalid);
                let changed = contracts.send_if_modified(|current| {
                    let changed = *current != contract;
                    *current = contract;
                    changed
                });
                if changed {
                    tracing::info!(path = %path.display(), "the contract changed");
                }
            }
            Ok(Err(error)) => reporter.report(RelayProblem::contract(&error)),
            Err(_cancelled) => return,
        }
    }
}

/// Runs one term after the other, forever.
async fn run_terms(mut contracts: watch::Receiver<Relay>, reporter: &Arc<Reporter>) {
    let mut wait = BETWEEN_TERMS.0;
    let (pause, paused) = watch::channel(false);
    loop {
        let contract = contracts.borrow_and_update().clone();
        pause.send_replace(contract.paused);
        reporter.contract(&contract);
        let started = Instant::now();
        let ended = tokio::select! {
            ended = Box::pin(lead_once(&contract, paused.clone(), reporter)) => Some(ended),
            () = contract_replaced(&contract, &mut contracts, &pause, reporter) => None,
        };
        reporter.ended();
        let Some(Err(error)) = ended else { continue };
        reporter.report(RelayProblem::term(&error, &contract.source));
        if started.elapsed() > STABLE_TERM {
            wait = BETWEEN_TERMS.0;
        }
        sleep(wait).await;
        wait = (wait * 2).min(BETWEEN_TERMS.1);
    }
}

/// Waits for the leader's lock, then leads until an error ends the term.
async fn lead_once(contract: &Relay, paused: watch::Receiver<bool>, reporter: &Arc<Reporter>) -> Result<(), TermError> {
    let control = Control::connect(&contract.source, &term::application(&contract.name)).await?;
    tokio::select! {
        ended = Box::pin(lead_when_free(contract, &control, paused, reporter)) => ended,
        () = control.watch(&contract.source, reporter) => Err(TermError::LockLost),
    }
}

async fn lead_when_free(
    contract: &Relay,
    control: &Control,
    paused: watch::Receiver<bool>,
    reporter: &Arc<Reporter>,
) -> Result<(), TermError> {
    while !control.try_lead().await? {
        reporter.leading(false);
        tokio::select! {
            () = sleep(LOCK_RETRY) => {}
            () = control.lost.cancelled() => return Err(TermError::LockLost),
        }
    }
    term::lead(contract, control, paused, reporter).await
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
