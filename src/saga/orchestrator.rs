//! `weft saga run`: puts the parts together, follows the contract, and ends in order.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use prometheus_client::registry::Registry;
use tokio::{sync::watch, time::interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    api::Api,
    engine::{Engine, PARTITIONS},
    meters::Meters,
    problems::{Problems, in_words},
    pulse::Pulse,
    reader::Reader,
    starts::Starts,
    writer::Writer,
};
use crate::{
    admin::{self, Admin},
    contract::{Contract, orchestrator::Orchestrator, status::OrchestratorStatus},
    domain::saga::definition::Definition,
    shutdown::Shutdown,
};

/// The contract's file is looked at, and the status is told, so often.
const LOOK: Duration = Duration::from_secs(1);
/// Deadlines of instances are looked at so often.
const DEADLINES: Duration = Duration::from_millis(100);
/// At the end, calls under way are waited for so long; their results would be unknown otherwise.
const LAST_CALLS: Duration = Duration::from_secs(5);
/// …and the last commits so long.
const LAST_COMMITS: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The contract file
    #[arg(long, env = "WEFT_CONFIG")]
    config: PathBuf,
    /// Port of /livez, /readyz, /metrics and /status
    #[arg(long, env = "WEFT_ADMIN_PORT", default_value_t = crate::contract::ADMIN_PORT)]
    admin_port: u16,
}

impl RunArgs {
    pub(super) fn of(config: PathBuf) -> Self {
        Self { config, admin_port: crate::contract::ADMIN_PORT }
    }
}

/// Everything that the orchestrator's tasks share.
struct Parts {
    engine: Arc<Engine>,
    reader: Arc<Reader>,
    problems: Arc<Problems>,
    status: watch::Sender<OrchestratorStatus>,
    starts: Starts,
}

pub(super) async fn run(args: RunArgs, shutdown: Shutdown) -> anyhow::Result<()> {
    let RunArgs { config, admin_port } = args;
    let contract = Orchestrator::load(&config)?;
    let mut registry = Registry::default();
    let engine = Engine::new(Meters::register(&mut registry));
    let reader = Arc::new(Reader::new(contract.database.clone()));
    let problems = Arc::new(Problems::default());
    let pulse = Arc::new(Pulse::default());
    let first = OrchestratorStatus { orchestrator: contract.name.clone(), ..OrchestratorStatus::default() };
    let (status, seen) = watch::channel(first);
    let close = CancellationToken::new();
    let writer = Writer {
        engine: Arc::clone(&engine),
        reader: Arc::clone(&reader),
        problems: Arc::clone(&problems),
        pulse: Arc::clone(&pulse),
        login: contract.database.clone(),
        holder: holder(),
        close: close.clone(),
    };
    let writer = tokio::spawn(writer.run());
    let api = Api { engine: Arc::clone(&engine), reader: Arc::clone(&reader) };
    let served = tokio::spawn(admin::serve(api.router(), any(contract.api_port), shutdown.clone()));
    let live: admin::Check = Arc::new(move || pulse.check(Instant::now()));
    let admin = Admin { live, ready: ready(&engine), status: seen, registry: Arc::new(registry) };
    let admin = tokio::spawn(admin::serve(admin.router(), any(admin_port), shutdown.clone()));

    let starts = Starts::new(Arc::clone(&engine), Arc::clone(&problems));
    let parts = Parts { engine, reader, problems, status, starts };
    let ended = tokio::select! {
        ended = parts.follow(config, contract) => ended,
        served = served => served.context("serving the API")?.context("serving the API"),
        served = admin => served.context("serving the admin port")?.context("serving the admin port"),
        () = shutdown.requested() => Ok(()),
    };
    parts.end().await;
    close.cancel();
    let _ = tokio::time::timeout(LAST_COMMITS, writer).await;
    ended
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::from(([0, 0, 0, 0], port))
}

/// The pod, and this run of the process in it.
fn holder() -> String {
    let pod = std::env::var("HOSTNAME").unwrap_or_else(|_| "local".to_owned());
    format!("{pod}/{}", Uuid::new_v4())
}

fn ready(engine: &Arc<Engine>) -> admin::Check {
    let engine = Arc::clone(engine);
    Arc::new(move || {
        let held = engine.held();
        if held == usize::from(PARTITIONS.unsigned_abs()) {
            return Ok(());
        }
        Err(format!(
            "{held} of {PARTITIONS} partitions are held; the others are another orchestrator's, or not read yet"
        ))
    })
}

impl Parts {
    /// Deadlines, status, and the contract's changes, until cancelled.
    async fn follow(&self, config: PathBuf, contract: Orchestrator) -> anyhow::Result<()> {
        let (mut deadlines, mut look) = (interval(DEADLINES), interval(LOOK));
        let mut known = String::new();
        let mut wanted = Some(contract);
        loop {
            tokio::select! {
                _ = deadlines.tick() => self.engine.deadlines(),
                _ = look.tick() => {
                    self.reload(&config, &mut known, &mut wanted).await;
                    if let Some(contract) = wanted.take() {
                        wanted = self.publish(contract).await;
                    }
                    self.tell();
                }
            }
        }
    }

    /// Reads the contract again when its text has changed. A broken one leaves the last good one in force.
    async fn reload(&self, config: &PathBuf, known: &mut String, wanted: &mut Option<Orchestrator>) {
        const SOURCE: &str = "contract";
        let text = match tokio::fs::read_to_string(config).await {
            Ok(text) if text == *known => return,
            Ok(text) => text,
            Err(error) => {
                let message = format!("reading {}: {error}; running with the last good contract", config.display());
                return self.problems.say(SOURCE, "ContractUnreadable", message);
            }
        };
        match Orchestrator::from_yaml(&text, config) {
            Ok(contract) => {
                self.problems.mended(SOURCE);
                *wanted = Some(contract);
            }
            Err(error) => self.problems.say(SOURCE, "ContractInvalid", in_words(&error)),
        }
        *known = text;
    }

    /// Puts a contract in force; gives it back when the database does not take its definitions yet.
    async fn publish(&self, contract: Orchestrator) -> Option<Orchestrator> {
        const SOURCE: &str = "definitions";
        let seal = |definition: &Definition| {
            let definition = definition.clone();
            if definition.version.is_empty() { definition.seal() } else { definition }
        };
        let (runnable, empty): (Vec<_>, Vec<_>) =
            contract.sagas.iter().map(seal).partition(|definition| !definition.steps.is_empty());
        for definition in &runnable {
            // stored before the first instance refers to it
            if let Err(error) = self.reader.store(definition).await {
                self.problems.say(SOURCE, "DefinitionsNotStored", in_words(&error));
                return Some(contract);
            }
        }
        match empty.first() {
            Some(definition) => {
                let message = format!("saga `{}` has no steps and is not run; give it at least one", definition.name);
                self.problems.say(SOURCE, "DefinitionInvalid", message);
            }
            None => self.problems.mended(SOURCE),
        }
        self.engine.catalogue.publish(runnable);
        self.starts.follow(&contract);
        tracing::info!(orchestrator = contract.name, sagas = contract.sagas.len(), "contract in force");
        None
    }

    fn tell(&self) {
        let sagas = self.engine.catalogue.counts();
        let sagas =
            sagas.into_iter().map(|(saga, version, counts)| (saga, counts.snapshot(version.unwrap_or_default())));
        let status = OrchestratorStatus {
            orchestrator: self.status.borrow().orchestrator.clone(),
            ready: self.engine.held() == usize::from(PARTITIONS.unsigned_abs()),
            sagas: sagas.collect(),
            problems: self.problems.all(),
        };
        self.engine.meters.follow(&status);
        self.status.send_if_modified(|told| {
            let changed = *told != status;
            *told = status;
            changed
        });
    }

    /// No new call goes out; those under way are given a moment, since their results save a repetition.
    async fn end(&self) {
        self.starts.stop();
        self.engine.ending.cancel();
        self.engine.tasks.close();
        let _ = tokio::time::timeout(LAST_CALLS, self.engine.tasks.wait()).await;
    }
}
