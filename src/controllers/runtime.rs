//! Runs the reconciles: takes keys from the queue, a bounded number at a time, and decides when each comes again.

use std::{
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use kube::Client;
use tokio::{
    sync::{Notify, Semaphore},
    time::Instant,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use super::{
    apply::Memory,
    backoff::Backoff,
    events::Events,
    key::Key,
    kind::{Class, Settings},
    metrics::OperatorMetrics,
    microservice::observe::MigrationsCache,
    queue::Queue,
    reconcile,
    status_gate::StatusGate,
    world::{Concerned, World},
};

/// Changes that come together are reconciled together.
const DEBOUNCE: Duration = Duration::from_millis(200);
/// Longest that one reconcile may take; every request in it has a deadline of its own.
const RECONCILE_DEADLINE: Duration = Duration::from_mins(5);

/// A new leader gives the data plane this long to tell of itself before it concludes, and writes, that it does not.
const LISTENING: Duration = Duration::from_secs(15);

/// What every reconcile works with.
pub struct Shared {
    pub client: Client,
    pub settings: Settings,
    pub memory: Memory,
    pub gate: StatusGate,
    pub events: Events,
    pub metrics: Arc<OperatorMetrics>,
    pub migrations: MigrationsCache,
    pub orchestrators: reconcile::OrchestratorResults,
    world: Mutex<World>,
    queue: Queue,
    backoff: Backoff,
    pods_changed: Notify,
    /// Since when the data plane can be heard.
    listens: OnceLock<Instant>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").finish_non_exhaustive()
    }
}

/// What a reconcile came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing to do until something changes.
    Done,
    /// Not done: look again then.
    At(Instant),
    /// Try again after a growing pause.
    Failed(Class),
}

impl Shared {
    pub fn new(client: Client, settings: Settings, events: Events, metrics: Arc<OperatorMetrics>) -> Self {
        Self {
            client,
            settings,
            memory: Memory::default(),
            gate: StatusGate::default(),
            events,
            metrics,
            migrations: MigrationsCache::default(),
            orchestrators: reconcile::OrchestratorResults::default(),
            world: Mutex::default(),
            queue: Queue::default(),
            backoff: Backoff::default(),
            pods_changed: Notify::new(),
            listens: OnceLock::new(),
        }
    }

    /// Never held across an await.
    pub fn world(&self) -> MutexGuard<'_, World> {
        self.world.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn enqueue(&self, concerned: Concerned) {
        let now = Instant::now();
        for key in concerned.now {
            self.queue.add(key, now + DEBOUNCE);
        }
        for key in concerned.gently {
            let at = self.gate.next(&key, now).max(now + DEBOUNCE);
            self.queue.add(key, at);
        }
    }

    /// To be looked at then, if not before.
    pub fn enqueue_at(&self, key: &Key, at: Instant) {
        self.queue.add(key.clone(), at);
    }

    /// Until when a pod that was not heard of proves nothing, because this process has only begun to listen.
    pub fn still_listening(&self) -> Option<Instant> {
        let until = *self.listens.get_or_init(Instant::now) + LISTENING;
        (Instant::now() < until).then_some(until)
    }

    pub fn pods_changed(&self) {
        self.pods_changed.notify_one();
    }

    pub async fn on_pods_changed(&self) {
        self.pods_changed.notified().await;
    }

    /// The object is gone: nothing about it is remembered.
    pub fn forget(&self, key: &Key) {
        self.memory.forget(key);
        self.gate.forget(key);
        self.backoff.succeeded(key);
    }

    /// For tests and logs: how much waits.
    pub fn backlog(&self) -> usize {
        self.queue.len()
    }

    fn settle(&self, key: &Key, verdict: Verdict) {
        match verdict {
            Verdict::Done => self.backoff.succeeded(key),
            Verdict::At(instant) => {
                self.backoff.succeeded(key);
                self.queue.add(key.clone(), instant);
            }
            Verdict::Failed(class) => {
                let pause = self.backoff.failed(key, class, rand::random());
                tracing::debug!(%key, ?class, pause_ms = pause.as_millis(), "reconcile failed, trying again");
                self.queue.add(key.clone(), Instant::now() + pause);
            }
        }
    }
}

/// Reconciles what the queue says until `stop`; then waits for nothing: a reconcile that is cut off is simply done again.
pub async fn run(shared: Arc<Shared>, concurrency: usize, tasks: TaskTracker, stop: CancellationToken) {
    shared.listens.get_or_init(Instant::now);
    let permits = Arc::new(Semaphore::new(concurrency.max(1)));
    loop {
        let next = async {
            let permit = Arc::clone(&permits).acquire_owned().await.ok()?;
            Some((permit, shared.queue.next().await))
        };
        let next = tokio::select! { () = stop.cancelled() => None, next = next => next };
        let Some((permit, key)) = next else { return };
        let (shared, stop) = (Arc::clone(&shared), stop.clone());
        let span = tracing::info_span!(
            "reconcile",
            kind = key.kind.as_str(),
            namespace = key.id.namespace,
            name = key.id.name
        );
        let work = async move {
            let verdict = tokio::select! {
                () = stop.cancelled() => None,
                verdict = one(&shared, &key) => Some(verdict),
            };
            shared.queue.done(&key);
            if let Some(verdict) = verdict {
                shared.settle(&key, verdict);
            }
            drop(permit);
        };
        tasks.spawn(work.instrument(span));
    }
}

async fn one(shared: &Arc<Shared>, key: &Key) -> Verdict {
    let started = Instant::now();
    // boxed: the future holds a whole plan
    let work = Box::pin(reconcile::reconcile(shared, key));
    let verdict = tokio::time::timeout(RECONCILE_DEADLINE, work).await.unwrap_or(Verdict::Failed(Class::Retry));
    shared.metrics.reconciled(key.kind, verdict, started.elapsed());
    verdict
}
