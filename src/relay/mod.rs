//! `weft relay`: publishes the rows of a service's outbox.
//!
//! ```text
//!   source (WAL or snapshot windows) ──batches──► publisher ──► sink (NATS JetStream)
//!      ▲                                            │ window    │
//!      │ recorded marks                             ◄──answers──┘
//!      └──────────── recorder (deletes rows, checkpoint) ◄── acknowledged
//! ```
//! One process leads ([`control`]); a term of leadership ([`term`]) is the four parts above, and ends when any of them fails.
//! Then everything is begun again from what is recorded. Nothing is lost because nothing is recorded before the broker
//! holds it; nothing is reordered because of the rule in [`window`].

mod checkpoint;
mod control;
mod publisher;
mod report;
#[cfg(test)]
mod simulation;
pub mod sink;
mod slot;
pub mod source;
mod term;
pub mod window;

use std::{
    net::{Ipv4Addr, SocketAddr},
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
    control::{Control, STANDBY},
    report::{Report, reason},
    source::SourceError,
    term::TermError,
};
use crate::{
    admin::{self, Admin},
    contract::{ADMIN_PORT, Contract, relay::Relay},
    postgres::replication::ReplicationError,
    shutdown::Shutdown,
};

/// How often the contract file is looked at.
const RELOAD: Duration = Duration::from_secs(1);
/// Wait between terms: the shortest, and the longest after repeated failures.
const BETWEEN_TERMS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// A term that lasted so long was a good one.
const GOOD_TERM: Duration = Duration::from_secs(30);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The contract file
    #[arg(long, env = "WEFT_CONFIG")]
    config: PathBuf,
    /// Address of the admin endpoints: /livez, /readyz, /metrics, /status
    #[arg(long, env = "WEFT_ADMIN", default_value_t = SocketAddr::from((Ipv4Addr::UNSPECIFIED, ADMIN_PORT)))]
    admin: SocketAddr,
}

pub async fn run(args: Args, shutdown: Shutdown) -> anyhow::Result<()> {
    let Args { config, admin } = args;
    let contract = Relay::load(&config)?;
    let mut registry = Registry::default();
    let report = Report::new(&contract.name, &mut registry);
    let (live, ready) = (report.clone(), report.clone());
    let endpoints = Admin {
        live: Arc::new(move || live.live()),
        ready: Arc::new(move || ready.ready()),
        status: report.status(),
        registry: Arc::new(registry),
    };
    let (contracts, current) = watch::channel(contract);
    tokio::select! {
        served = admin::serve(endpoints.router(), admin, shutdown.clone()) => Ok(served?),
        () = reload(&config, &contracts, &report) => Ok(()),
        () = Box::pin(terms(current, &report)) => Ok(()),
        () = shutdown.requested() => Ok(()),
    }
}

/// Takes the contract file's changes up, for ever.
async fn reload(path: &Path, contracts: &watch::Sender<Relay>, report: &Report) {
    loop {
        sleep(RELOAD).await;
        let (file, path) = (path.to_owned(), path.to_owned());
        let read = tokio::task::spawn_blocking(move || Relay::load(&file)).await;
        match read {
            Ok(Ok(contract)) => {
                report.mended(reason::CONTRACT_INVALID);
                let changed = contracts.send_if_modified(|current| {
                    let changed = *current != contract;
                    *current = contract;
                    changed
                });
                if changed {
                    tracing::info!(path = %path.display(), "the contract changed");
                }
            }
            Ok(Err(error)) => report.problem(reason::CONTRACT_INVALID, sentence(&error)),
            Err(_cancelled) => return,
        }
    }
}

/// One term after the other, for ever.
async fn terms(mut contracts: watch::Receiver<Relay>, report: &Arc<Report>) {
    let mut wait = BETWEEN_TERMS.0;
    let (pause, paused) = watch::channel(false);
    loop {
        let contract = contracts.borrow_and_update().clone();
        pause.send_replace(contract.paused);
        report.contract(&contract);
        let begun = Instant::now();
        let ended = tokio::select! {
            ended = Box::pin(term(&contract, paused.clone(), report)) => Some(ended),
            () = replaced(&contract, &mut contracts, &pause, report) => None,
        };
        report.ended();
        let Some(Err(error)) = ended else { continue };
        report.problem(why(&error), sentence(&error));
        if begun.elapsed() > GOOD_TERM {
            wait = BETWEEN_TERMS.0;
        }
        sleep(wait).await;
        wait = (wait * 2).min(BETWEEN_TERMS.1);
    }
}

/// Waits for the lock, then leads.
async fn term(contract: &Relay, paused: watch::Receiver<bool>, report: &Arc<Report>) -> Result<(), TermError> {
    let control = Control::connect(&contract.source, &term::application(&contract.name)).await?;
    while !control.lead().await? {
        report.leading(false);
        tokio::select! {
            () = sleep(STANDBY) => {}
            () = control.lost.cancelled() => return Err(TermError::LockLost),
        }
    }
    term::lead(contract, &control, paused, report).await
}

/// Returns when the contract is another one; a pause alone is passed on.
async fn replaced(
    contract: &Relay,
    contracts: &mut watch::Receiver<Relay>,
    pause: &watch::Sender<bool>,
    report: &Report,
) {
    while contracts.changed().await.is_ok() {
        let new = contracts.borrow_and_update().clone();
        if (Relay { paused: contract.paused, version: contract.version.clone(), ..new.clone() }) != *contract {
            // seen here, to be taken up by the next term
            contracts.mark_changed();
            return;
        }
        pause.send_replace(new.paused);
        report.contract(&new);
    }
    std::future::pending::<()>().await;
}

/// A problem's reason.
fn why(error: &TermError) -> &'static str {
    let answered = match error {
        TermError::Sink(error) => return error.reason(),
        TermError::Source(SourceError::SlotPending(_)) => return reason::SLOT_PENDING,
        TermError::Source(SourceError::Query { source, .. }) => source.as_db_error().is_some(),
        TermError::Source(SourceError::Layout(_) | SourceError::Replication(ReplicationError::Server { .. })) => true,
        TermError::Source(_) | TermError::LockLost => false,
    };
    if answered { reason::DATABASE_NOT_READY } else { reason::DATABASE_UNREACHABLE }
}

/// An error and its causes in one line.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
