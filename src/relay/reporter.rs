//! What the relay reports about itself: status, problems, metrics, health.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicI64, AtomicU64},
    },
    time::Duration,
};

use jiff::Timestamp;
use prometheus_client::{
    metrics::{counter::Counter, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use tokio::{sync::watch, time::Instant};

use super::{
    latency::{Latencies, Percentiles},
    problem::{BLOCKING, RelayProblem},
    source::{
        Point,
        postgres::{dead::DeadEvents, ledger::HeldEvents, slot::Slot, tail::Tail},
    },
};
use crate::{
    contract::{
        problem::{Problem, ProblemReason},
        relay::Relay,
        status::{Latency, RelayStatus},
    },
    metrics::relay as names,
};

/// The process is not live when events wait, none was acknowledged for this long, and no problem explains it.
const STUCK: Duration = Duration::from_mins(1);

#[derive(Debug)]
pub(crate) struct Reporter {
    state: Mutex<State>,
    status: watch::Sender<RelayStatus>,
    metrics: Metrics,
    started: Instant,
    latencies: Mutex<Latencies>,
}

#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts, not a state machine")]
struct State {
    leading: bool,
    /// Whether the database is connected.
    database: bool,
    broker: bool,
    /// Version of the contract in force.
    contract: String,
    paused: bool,
    problems: BTreeMap<ProblemReason, String>,
    /// Since when the database and the broker cannot be used, if they cannot.
    database_outage: Option<Timestamp>,
    broker_outage: Option<Timestamp>,
    /// Published events according to the ledger, and those acknowledged since but not recorded yet.
    recorded: u64,
    unrecorded: u64,
    /// Rows of the outbox: the last count, less what was deleted since.
    rows: u64,
    /// When the oldest of them was made, by the clock of this process.
    oldest: Option<Timestamp>,
    held: u64,
    dead: u64,
    /// Whether an event was published or waited since the rows were last counted, so that counting again is worthwhile.
    busy: bool,
    waiting: Waiting,
    tail: Option<Tail>,
    slot_lag: Option<u64>,
    position: Option<String>,
    last_published: Option<Timestamp>,
    /// When an event was last acknowledged, or nothing waited.
    progressed: Instant,
}

/// What the publisher has in its window.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Waiting {
    pub(crate) events: usize,
    pub(crate) in_flight: usize,
    /// `created_at` of the oldest, in microseconds since 1970.
    pub(crate) oldest: Option<i64>,
}

/// What is in the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Counted {
    /// Counted up to a million.
    pub(crate) rows: u64,
    /// Age of the oldest of them.
    pub(crate) oldest: Option<Duration>,
}

#[derive(Debug)]
struct Metrics {
    published: Counter,
    retries: Counter,
    duration: Histogram,
    latency: Histogram,
    pending: Gauge,
    inflight: Gauge,
    held: Gauge,
    dead: Gauge,
    lag_seconds: Gauge<f64, AtomicU64>,
    lag_bytes: Gauge<i64, AtomicI64>,
    leading: Gauge,
}

impl Metrics {
    fn new(registry: &mut Registry) -> Self {
        // from 0.25 ms, to 8 s and to 9 minutes
        let buckets = |count| (0..count).map(|power| 0.000_25 * f64::from(1 << power));
        let metrics = Self {
            published: Counter::default(),
            retries: Counter::default(),
            duration: Histogram::new(buckets(16)),
            latency: Histogram::new(buckets(22)),
            pending: Gauge::default(),
            inflight: Gauge::default(),
            held: Gauge::default(),
            dead: Gauge::default(),
            lag_seconds: Gauge::default(),
            lag_bytes: Gauge::default(),
            leading: Gauge::default(),
        };
        let Self { published, retries, duration, latency, pending, inflight, held, dead, .. } = &metrics;
        let Self { lag_seconds, lag_bytes, leading, .. } = &metrics;
        registry.register(names::PUBLISHED, "Events that the broker acknowledged to this process", published.clone());
        registry.register(names::RETRIES, "Publishes that failed and are repeated", retries.clone());
        registry.register(names::PUBLISH_DURATION, "From publish to acknowledgement", duration.clone());
        registry.register(names::LATENCY, "From commit to acknowledgement", latency.clone());
        registry.register(names::PENDING, "Rows of the outbox that are not acknowledged", pending.clone());
        registry.register(names::INFLIGHT, "Events on the way to the broker", inflight.clone());
        registry.register(names::HELD, "Events that the broker refuses, and those that wait behind them", held.clone());
        registry.register(names::DEAD, "Events that were given up", dead.clone());
        registry.register(names::LAG_SECONDS, "Age of the oldest event that waits", lag_seconds.clone());
        registry.register(names::LAG_BYTES, "WAL behind the slot's confirmed position", lag_bytes.clone());
        registry.register(names::LEADING, "1 when this process publishes, 0 when it is a standby", leading.clone());
        metrics
    }
}

impl Reporter {
    pub(crate) fn new(relay: &str, registry: &mut Registry) -> Arc<Self> {
        let status = RelayStatus { relay: relay.to_owned(), ..RelayStatus::default() };
        Arc::new(Self {
            state: Mutex::new(State {
                leading: false,
                database: false,
                broker: false,
                contract: String::new(),
                paused: false,
                problems: BTreeMap::new(),
                database_outage: None,
                broker_outage: None,
                recorded: 0,
                unrecorded: 0,
                rows: 0,
                oldest: None,
                held: 0,
                dead: 0,
                busy: true,
                waiting: Waiting::default(),
                tail: None,
                slot_lag: None,
                position: None,
                last_published: None,
                progressed: Instant::now(),
            }),
            status: watch::Sender::new(status),
            metrics: Metrics::new(registry),
            started: Instant::now(),
            latencies: Mutex::default(),
        })
    }

    pub(crate) fn status(&self) -> watch::Receiver<RelayStatus> {
        self.status.subscribe()
    }

    /// An error when only a restart of the process can help, as far as the relay can know.
    pub(crate) fn live(&self) -> Result<(), String> {
        let state = self.lock();
        let stuck = state.progressed.elapsed() > STUCK && state.is_publishing() && state.waiting.events > 0;
        if !stuck {
            return Ok(());
        }
        Err(format!("no event was acknowledged for {} s although events wait", state.progressed.elapsed().as_secs()))
    }

    pub(crate) fn ready(&self) -> Result<(), String> {
        let state = self.lock();
        if state.is_ready() {
            return Ok(());
        }
        let problems: Vec<&str> = state.problems.values().map(String::as_str).collect();
        Err(if problems.is_empty() {
            "the relay is starting: it is not connected to the database yet".to_owned()
        } else {
            problems.join("; ")
        })
    }

    /// The database is connected; this process leads, or is a standby.
    pub(crate) fn leading(&self, leading: bool) {
        self.change(|state| {
            state.database = true;
            state.database_outage = None;
            state.leading = leading;
            state.progressed = Instant::now();
            state.problems.remove(&ProblemReason::DatabaseUnreachable);
            state.problems.remove(&ProblemReason::DatabaseNotReady);
            if !leading {
                state.problems.remove(&ProblemReason::SlotPending);
            }
        });
    }

    /// The database answers again, within the same term.
    pub(crate) fn database_answers(&self) {
        self.change(|state| {
            state.database_outage = None;
            state.problems.remove(&ProblemReason::DatabaseUnreachable);
        });
    }

    /// A term ended: forgets everything but the ledger's count.
    pub(crate) fn ended(&self) {
        self.change(|state| {
            state.leading = false;
            state.database = false;
            state.broker = false;
            state.busy = true;
            state.unrecorded = 0;
            state.waiting = Waiting::default();
            state.tail = None;
            state.slot_lag = None;
            for resolved in [
                ProblemReason::DeadLetters,
                ProblemReason::EventRefused,
                ProblemReason::PublicationInvalid,
                ProblemReason::PublishFailing,
                ProblemReason::SlotAtRisk,
                ProblemReason::SlotLost,
            ] {
                state.problems.remove(&resolved);
            }
            (state.held, state.dead) = (0, 0);
            for resolved in [ProblemReason::BrokerUnreachable, ProblemReason::StreamMissing, ProblemReason::SlotPending]
            {
                state.problems.remove(&resolved);
            }
        });
    }

    pub(crate) fn broker(&self, connected: bool) {
        self.change(|state| {
            state.broker = connected;
            state.progressed = Instant::now();
            if connected {
                state.broker_outage = None;
                state.problems.remove(&ProblemReason::BrokerUnreachable);
                state.problems.remove(&ProblemReason::StreamMissing);
            }
        });
    }

    /// Sets the contract in force.
    pub(crate) fn contract(&self, contract: &Relay) {
        self.change(|state| {
            state.contract.clone_from(&contract.version);
            state.paused = contract.paused;
            state.progressed = Instant::now();
        });
    }

    /// Reports a problem, until it is resolved.
    pub(crate) fn report(&self, problem: RelayProblem) {
        let reason = problem.reason();
        let (mut message, mut changed) = (String::new(), false);
        self.change(|state| {
            message = state.continued(problem).to_string();
            changed = state.problems.insert(reason, message.clone()).as_ref() != Some(&message);
        });
        if changed {
            tracing::warn!(reason = reason.as_str(), message, "a problem was found");
        }
    }

    pub(crate) fn resolve(&self, reason: ProblemReason) {
        if self.lock().problems.contains_key(&reason) {
            tracing::info!(reason = reason.as_str(), "the problem is resolved");
            self.change(|state| {
                state.problems.remove(&reason);
            });
        }
    }

    /// Sets the count of published events from the ledger, at the start of a term.
    pub(crate) fn ledger(&self, published: u64) {
        self.change(|state| state.recorded = published);
    }

    pub(crate) fn acknowledged(&self, events: usize) {
        let mut state = self.lock();
        state.unrecorded += events as u64;
        state.busy = true;
        state.progressed = Instant::now();
        state.last_published = Some(Timestamp::now());
        self.metrics.published.inc_by(events as u64);
    }

    /// An event was acknowledged `duration` after it was sent, and `latency` after its commit; `None` when that says nothing,
    /// because the event was held.
    pub(crate) fn acknowledged_after(&self, duration: Duration, latency: Option<Duration>) {
        self.metrics.duration.observe(duration.as_secs_f64());
        if let Some(latency) = latency {
            self.metrics.latency.observe(latency.as_secs_f64());
            self.latencies().observe(self.started.elapsed(), latency);
        }
    }

    fn latencies(&self) -> MutexGuard<'_, Latencies> {
        self.latencies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn retried(&self) {
        self.metrics.retries.inc();
    }

    /// Updates what waits in the window.
    pub(crate) fn waiting(&self, waiting: Waiting) {
        self.change(|state| {
            state.busy |= waiting.events > 0;
            if waiting.events == 0 {
                state.progressed = Instant::now();
            }
            state.waiting = waiting;
        });
    }

    pub(crate) fn tail(&self, tail: Tail) {
        self.change(|state| state.tail = Some(tail));
    }

    pub(crate) fn recorded(&self, rows: u64, published: u64, point: Option<&Point>) {
        self.change(|state| {
            state.recorded = published;
            state.unrecorded = state.unrecorded.saturating_sub(rows);
            state.rows = state.rows.saturating_sub(rows);
            if let Some(point) = point {
                state.position = Some(point.lsn().to_string());
            }
        });
    }

    /// Whether an event was published or waited since the last call.
    pub(crate) fn take_busy(&self) -> bool {
        std::mem::take(&mut self.lock().busy)
    }

    pub(crate) fn counted(&self, Counted { rows, oldest }: Counted) {
        self.change(|state| {
            state.rows = rows;
            state.oldest = oldest.map(|age| Timestamp::now() - age);
            // nothing is left to count, or it is to be counted again
            state.busy |= rows > 0;
        });
    }

    pub(crate) fn held(&self, held: Option<HeldEvents>) {
        self.change(|state| {
            state.held = held.as_ref().map_or(0, |held| held.events);
            state.progressed = Instant::now();
        });
        match held {
            Some(HeldEvents { events, refused, first: Some(first) }) => {
                self.report(RelayProblem::EventRefused {
                    event: first.id,
                    others: refused.saturating_sub(1),
                    waiting: events.saturating_sub(refused),
                    cause: first.cause,
                });
            }
            _ => self.resolve(ProblemReason::EventRefused),
        }
    }

    pub(crate) fn dead(&self, dead: Option<DeadEvents>) {
        self.change(|state| state.dead = dead.as_ref().map_or(0, |dead| dead.events));
        match dead {
            Some(DeadEvents { events, latest, cause }) => {
                self.report(RelayProblem::DeadLetters { events, latest, cause });
            }
            None => self.resolve(ProblemReason::DeadLetters),
        }
    }

    pub(crate) fn slot(&self, slot: Option<&Slot>) {
        self.change(|state| state.slot_lag = slot.map(|slot| slot.lag_bytes));
        match slot.and_then(|slot| slot.at_risk) {
            Some(bytes) => self.report(RelayProblem::SlotAtRisk { bytes }),
            None => self.resolve(ProblemReason::SlotAtRisk),
        }
    }

    fn latency(&self) -> Option<Latency> {
        let Percentiles { p50, p99 } = self.latencies().percentiles(self.started.elapsed())?;
        Some(Latency { p50_seconds: p50.as_secs_f64(), p99_seconds: p99.as_secs_f64() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let Metrics { pending, inflight, held, dead, lag_seconds, lag_bytes, leading, .. } = &self.metrics;
        let gauge = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        pending.set(gauge(state.pending()));
        inflight.set(gauge(state.waiting.in_flight as u64));
        held.set(gauge(state.held));
        dead.set(gauge(state.dead));
        lag_seconds.set(state.lag_seconds());
        lag_bytes.set(gauge(state.lag_bytes().unwrap_or_default()));
        leading.set(i64::from(state.leading));
        self.status.send_if_modified(|status| {
            let now = RelayStatus { latency: self.latency(), ..state.status(&status.relay) };
            let changed = *status != now;
            *status = now;
            changed
        });
    }
}

impl State {
    /// The problem, with the start of the present outage.
    fn continued(&mut self, problem: RelayProblem) -> RelayProblem {
        match problem {
            RelayProblem::DatabaseUnreachable(outage) => {
                RelayProblem::DatabaseUnreachable(outage.continued(&mut self.database_outage))
            }
            RelayProblem::BrokerUnreachable(outage) => {
                RelayProblem::BrokerUnreachable(outage.continued(&mut self.broker_outage))
            }
            other => other,
        }
    }

    fn is_ready(&self) -> bool {
        let blocked = BLOCKING.iter().any(|reason| self.problems.contains_key(reason));
        self.database && !blocked && (!self.leading || self.broker)
    }

    fn is_publishing(&self) -> bool {
        self.leading && !self.paused && self.is_ready()
    }

    fn pending(&self) -> u64 {
        self.rows.saturating_sub(self.unrecorded).max(self.waiting.events as u64 + self.held)
    }

    #[allow(clippy::cast_precision_loss, reason = "microseconds of a lag fit 52 bits")]
    fn lag_seconds(&self) -> f64 {
        let counted = self.oldest.filter(|_| self.pending() > 0).map(Timestamp::as_microsecond);
        let oldest = self.waiting.oldest.into_iter().chain(counted).min();
        let age = |oldest: i64| (Timestamp::now().as_microsecond() - oldest).max(0) as f64 / 1e6;
        // rounded to tenths of a second, so that the status does not change more often than a person can read
        (oldest.map_or(0.0, age) * 10.0).round() / 10.0
    }

    /// Zero when everything that was read is recorded: what is written besides needs no one's attention.
    fn lag_bytes(&self) -> Option<u64> {
        let tail = self.tail?;
        let behind = tail.wal_end.0.saturating_sub(tail.confirmed.0);
        Some(if tail.idle && self.pending() == 0 { 0 } else { behind.max(self.slot_lag.unwrap_or_default()) })
    }

    fn status(&self, relay: &str) -> RelayStatus {
        RelayStatus {
            relay: relay.to_owned(),
            contract: self.contract.clone(),
            leading: self.leading,
            ready: self.is_ready(),
            paused: self.paused,
            published: self.recorded + self.unrecorded,
            pending: self.pending(),
            held: self.held,
            dead_letters: self.dead,
            lag_seconds: self.lag_seconds(),
            lag_bytes: self.lag_bytes(),
            latency: None,
            position: self.position.clone(),
            last_published: self.last_published,
            problems: self.problems.iter().map(|(reason, message)| Problem::new(*reason, message.clone())).collect(),
        }
    }
}
