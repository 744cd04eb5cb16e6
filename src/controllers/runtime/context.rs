//! What every reconcile works with: the client, what is known of the cluster, and what is remembered between reconciles.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use kube::Client;
use tokio::{sync::Notify, time::Instant};

use super::{
    backoff::Backoff,
    broker::WantedAccounts,
    config_maps::ConfigMaps,
    events::Events,
    metrics::OperatorMetrics,
    pace::{News, StatusPace},
    queue::{Priority, Queue},
    settling::Settling,
};
use crate::controllers::{
    apply::Memory,
    resources::{
        key::Key,
        outcome::{Applied, Class},
        plan::Rejection,
        settings::Settings,
    },
    store::{Requeue, Store},
};

/// Changes that come together are reconciled together.
const DEBOUNCE: Duration = Duration::from_millis(200);

/// A new leader gives the data plane of a scope this long to report before it concludes, and writes, that it is silent.
const FIRST_REPORTS: Duration = Duration::from_secs(15);

/// What every reconcile works with.
pub struct Context {
    pub client: Client,
    pub settings: Settings,
    pub memory: Memory,
    pub pace: StatusPace,
    pub events: Events,
    pub metrics: Arc<OperatorMetrics>,
    pub config_maps: ConfigMaps,
    pub settling: Settling,
    pub accounts: WantedAccounts,
    store: Mutex<Store>,
    queue: Queue,
    backoff: Backoff,
    results: Mutex<HashMap<Key, PassResult>>,
    pods_changed: Notify,
    /// Since when reports of the data plane can arrive, of every pod that is known.
    listening_since: Mutex<Instant>,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

/// What a reconcile resulted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing to do until something changes.
    Done,
    /// Not done: requeued for that time.
    At(Instant),
    /// Retried after a growing pause.
    Failed(Class),
}

/// What the last pass over a key resulted in, for objects whose status depends on another key's pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PassResult {
    pub applied: Applied,
    pub rejection: Option<Rejection>,
}

impl Context {
    pub fn new(client: Client, settings: Settings, events: Events, metrics: Arc<OperatorMetrics>) -> Self {
        Self {
            client,
            settings,
            memory: Memory::default(),
            pace: StatusPace::default(),
            events,
            metrics,
            config_maps: ConfigMaps::default(),
            settling: Settling::default(),
            accounts: WantedAccounts::default(),
            store: Mutex::default(),
            queue: Queue::default(),
            backoff: Backoff::default(),
            results: Mutex::default(),
            pods_changed: Notify::new(),
            listening_since: Mutex::new(Instant::now()),
        }
    }

    /// Never held across an await.
    pub fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pods of `key` use the broker, in the account of their namespace.
    pub fn want_account(&self, key: &Key) {
        if self.store().not_opted_in(&key.id.namespace).is_none() {
            self.accounts.want(&key.id.namespace);
        }
    }

    /// `priority` is that of what must not wait; numbers that moved never have more than that of an event.
    pub fn enqueue(&self, requeue: Requeue, priority: Priority) {
        let now = Instant::now();
        for key in requeue.now {
            self.queue.add(key, now + DEBOUNCE, priority);
        }
        for key in requeue.paced {
            if let Some(at) = self.pace.next(&key, now) {
                self.queue.add(key, at.max(now + DEBOUNCE), priority.min(Priority::Event));
            }
        }
    }

    /// Reconciles `key` then, if not before.
    pub fn enqueue_at(&self, key: &Key, at: Instant) {
        self.queue.add(key.clone(), at, Priority::Event);
    }

    /// Reconciles each object whose status waited for the budget of all, when its turn has come. Never ends.
    pub(super) async fn grant_turns(&self) {
        loop {
            let (key, news) = self.pace.turn().await;
            // whoever edited the object waits for it, whatever the backlog is
            let priority = if news == News::Answer { Priority::SpecChange } else { Priority::Event };
            self.queue.add(key, Instant::now(), priority);
        }
    }

    /// A scope's pods have become known: from now on they can report.
    pub fn start_listening(&self) {
        *self.listening_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Until when the silence of a pod proves nothing, because this process has only begun to listen.
    pub fn still_listening(&self) -> Option<Instant> {
        let until = *self.listening_since.lock().unwrap_or_else(PoisonError::into_inner) + FIRST_REPORTS;
        (Instant::now() < until).then_some(until)
    }

    pub fn pods_changed(&self) {
        self.pods_changed.notify_one();
    }

    pub async fn on_pods_changed(&self) {
        self.pods_changed.notified().await;
    }

    /// What the last pass over `key` resulted in; `None` before the first one of this process.
    pub fn result_of(&self, key: &Key) -> Option<PassResult> {
        self.lock_results().get(key).cloned()
    }

    /// True when it differs from the pass before.
    pub fn set_result(&self, key: &Key, result: PassResult) -> bool {
        self.lock_results().insert(key.clone(), result.clone()) != Some(result)
    }

    /// The object is gone: nothing about it is remembered.
    pub fn forget(&self, key: &Key) {
        self.memory.forget(key);
        self.pace.forget(key);
        self.settling.forget(key);
        self.backoff.succeeded(key);
        self.lock_results().remove(key);
    }

    /// For tests and logs: how many keys wait or run.
    pub fn backlog(&self) -> usize {
        self.queue.len()
    }

    pub(super) async fn next(&self) -> Key {
        self.queue.next().await
    }

    /// `key` is no longer being reconciled; `None` when the reconcile was cut off.
    pub(super) fn settle(&self, key: &Key, verdict: Option<Verdict>) {
        self.queue.done(key);
        match verdict {
            None => {}
            Some(Verdict::Done) => self.backoff.succeeded(key),
            Some(Verdict::At(instant)) => {
                self.backoff.succeeded(key);
                self.queue.add(key.clone(), instant, Priority::Event);
            }
            Some(Verdict::Failed(class)) => {
                let pause = self.backoff.failed(key, class, rand::random());
                tracing::debug!(%key, ?class, pause_ms = pause.as_millis(), "reconcile failed, retrying");
                self.queue.add(key.clone(), Instant::now() + pause, Priority::Event);
            }
        }
    }

    fn lock_results(&self) -> MutexGuard<'_, HashMap<Key, PassResult>> {
        self.results.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
