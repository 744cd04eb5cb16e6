//! `weft saga run`: connects the parts, follows the contract, and shuts down in order.

use std::{
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
    engine::Engine,
    key::PARTITIONS,
    liveness::Liveness,
    meters::Meters,
    problem::{Problems, SagaProblem},
    reader::Reader,
    starts::Starts,
    tracker::Tracker,
    writer::Writer,
};
use crate::{
    admin::{self, Admin},
    contract::{
        Contract,
        orchestrator::{MEMORY_LIMIT, Orchestrator},
        status::OrchestratorStatus,
    },
    domain::saga::definition::Definition,
    outage::with_causes,
    shutdown::Shutdown,
};

/// How often the contract's file is read and the status is updated.
const REFRESH_INTERVAL: Duration = Duration::from_secs(1);
/// How often the deadlines of instances are checked.
const DEADLINES: Duration = Duration::from_millis(100);
/// At shutdown, calls in progress are awaited for this long; otherwise their results would be unknown.
const LAST_CALLS: Duration = Duration::from_secs(5);
/// At shutdown, the last commits are awaited for this long.
const LAST_COMMITS: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub struct RunArgs {
    /// The contract file
    #[arg(long, env = "WEFT_CONFIG")]
    config: PathBuf,
    /// Port of /livez, /readyz, /metrics and /status
    #[arg(long, env = "WEFT_ADMIN_PORT", default_value_t = crate::contract::ADMIN_PORT)]
    admin_port: u16,
    /// Bytes of memory that the process may use, of which running instances get a half
    #[arg(long, env = MEMORY_LIMIT, default_value_t = DEFAULT_MEMORY)]
    memory_limit: usize,
}

/// Where nobody says what the limit is.
const DEFAULT_MEMORY: usize = 512 << 20;

/// What the orchestrator's tasks share.
struct Parts {
    engine: Arc<Engine>,
    reader: Arc<Reader>,
    problems: Arc<Problems>,
    status: watch::Sender<OrchestratorStatus>,
    starts: Starts,
    tracker: Arc<Tracker>,
}

pub(super) async fn run(args: RunArgs, shutdown: Shutdown) -> anyhow::Result<()> {
    let RunArgs { config, admin_port, memory_limit } = args;
    let contract = Orchestrator::load(&config)?;
    let mut registry = Registry::default();
    let engine = Engine::new(Meters::register(&mut registry), memory_limit / 2);
    engine.kept.retain(contract.retention_ms);
    let reader = Arc::new(Reader::new(contract.database.clone()));
    let problems = Arc::new(Problems::default());
    let liveness = Arc::new(Liveness::default());
    let first = OrchestratorStatus { orchestrator: contract.name.clone(), ..OrchestratorStatus::default() };
    let (status, status_receiver) = watch::channel(first);
    let close = CancellationToken::new();
    let writer = Writer {
        engine: Arc::clone(&engine),
        reader: Arc::clone(&reader),
        problems: Arc::clone(&problems),
        liveness: Arc::clone(&liveness),
        login: contract.database.clone(),
        holder: holder(),
        close: close.clone(),
    };
    let writer = tokio::spawn(writer.run());
    let api_reader = Arc::new(Reader::for_api(contract.database.clone()));
    let tracker = Tracker::start(contract.database.clone(), &engine, &reader, &problems);
    let api = Api { engine: Arc::clone(&engine), reader: api_reader, tracker: Arc::clone(&tracker) };
    let served_api = tokio::spawn(admin::serve(api.router(), admin::any(contract.api_port), shutdown.clone()));
    let live: admin::Check = Arc::new(move || liveness.check(Instant::now()));
    let admin = Admin { live, ready: ready(&engine), status: status_receiver, registry: Arc::new(registry) };
    let admin = tokio::spawn(admin::serve(admin.router(), admin::any(admin_port), shutdown.clone()));

    let starts = Starts::new(Arc::clone(&engine), Arc::clone(&reader), Arc::clone(&problems));
    let parts = Parts { engine, reader, problems, status, starts, tracker };
    let ended = tokio::select! {
        ended = parts.follow(config, contract) => ended,
        served = served_api => served.context("serving the API")?.context("serving the API"),
        served = admin => served.context("serving the admin port")?.context("serving the admin port"),
        () = shutdown.requested() => Ok(()),
    };
    parts.end().await;
    close.cancel();
    let _ = tokio::time::timeout(LAST_COMMITS, writer).await;
    ended
}

/// Identifies the pod and this run of its process.
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
            "{held} of {PARTITIONS} partitions are held; the others are held by another orchestrator, or not recovered yet"
        ))
    })
}

impl Parts {
    /// Checks deadlines, updates the status, and follows the contract, until cancelled.
    async fn follow(&self, config: PathBuf, contract: Orchestrator) -> anyhow::Result<()> {
        let (mut deadlines, mut refresh) = (interval(DEADLINES), interval(REFRESH_INTERVAL));
        let mut last_text = String::new();
        let mut pending = Some(contract);
        loop {
            tokio::select! {
                _ = deadlines.tick() => self.engine.check_timers(),
                _ = refresh.tick() => {
                    self.reload(&config, &mut last_text, &mut pending).await;
                    if let Some(contract) = pending.take() {
                        pending = self.publish(contract).await;
                    }
                    self.report_status();
                }
            }
        }
    }

    /// Reads the contract again when its text has changed. An invalid one leaves the last valid one in force.
    async fn reload(&self, config: &PathBuf, last_text: &mut String, pending: &mut Option<Orchestrator>) {
        const SOURCE: &str = "contract";
        let text = match tokio::fs::read_to_string(config).await {
            Ok(text) if text == *last_text => return,
            Ok(text) => text,
            Err(error) => {
                let (path, cause) = (config.clone(), error.to_string());
                return self.problems.report(SOURCE, SagaProblem::ContractUnreadable { path, cause });
            }
        };
        match Orchestrator::from_yaml(&text, config) {
            Ok(contract) => {
                self.problems.resolve(SOURCE);
                *pending = Some(contract);
            }
            Err(error) => self.problems.report(SOURCE, SagaProblem::ContractInvalid(with_causes(&error))),
        }
        *last_text = text;
    }

    /// Puts a contract in force; returns it when the database cannot store its definitions yet.
    async fn publish(&self, contract: Orchestrator) -> Option<Orchestrator> {
        const SOURCE: &str = "definitions";
        let seal = |definition: &Definition| {
            let definition = definition.clone();
            if definition.version.is_empty() { definition.seal() } else { definition }
        };
        let (runnable, empty): (Vec<_>, Vec<_>) =
            contract.sagas.iter().map(seal).partition(|definition| !definition.steps.is_empty());
        for definition in &runnable {
            // the definition must be stored before the first instance refers to it
            if let Err(error) = self.reader.store(definition).await {
                let refused = |address, cause| SagaProblem::DefinitionsNotStored { address, cause };
                self.problems.report(SOURCE, self.reader.problem(&error, refused));
                return Some(contract);
            }
        }
        match empty.first() {
            Some(definition) => {
                let saga = definition.name.clone();
                self.problems.report(SOURCE, SagaProblem::DefinitionInvalid { saga });
            }
            None => self.problems.resolve(SOURCE),
        }
        self.engine.kept.retain(contract.retention_ms);
        self.engine.catalogue.publish(runnable, &contract.draining);
        self.starts.follow(&contract);
        self.tracker.follow(&contract);
        tracing::info!(orchestrator = contract.name, sagas = contract.sagas.len(), "the contract is in force");
        None
    }

    fn report_status(&self) {
        let mut sagas = self.engine.catalogue.counts();
        self.tracker.report(&mut sagas);
        for (saga, report) in self.starts.reports() {
            if let Some(counts) = sagas.get_mut(&saga) {
                counts.start = Some(report);
            }
        }
        let status = OrchestratorStatus {
            orchestrator: self.status.borrow().orchestrator.clone(),
            ready: self.engine.held() == usize::from(PARTITIONS.unsigned_abs()),
            sagas,
            problems: self.problems.all(),
        };
        self.engine.meters.follow(&status);
        self.status.send_if_modified(|reported| {
            let changed = *reported != status;
            *reported = status;
            changed
        });
    }

    /// Sends no new calls, and gives the calls in progress a moment, since their results save a repetition.
    async fn end(&self) {
        self.starts.stop();
        self.tracker.stop();
        self.engine.stopping.cancel();
        self.engine.tasks.close();
        let _ = tokio::time::timeout(LAST_CALLS, self.engine.tasks.wait()).await;
    }
}
