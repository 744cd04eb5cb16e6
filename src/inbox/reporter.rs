//! What the inbox reports about itself: status, problems, metrics, health.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU64},
    time::Duration,
};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use tokio::sync::watch;

use super::{deliver::Outcome, problem::InboxProblem};
use crate::{
    contract::{
        inbox::Inbox,
        problem::{Problem, ProblemReason},
        status::{InboxStatus, SubscriptionStatus},
    },
    metrics::inbox::{DEAD, DELIVERIES, DELIVERY_DURATION, HELD, LAG_SECONDS, LEADING, OUTCOME, SUBSCRIPTION, WAITING},
};

/// While one of these lasts, events are not consumed.
const BLOCKING: [ProblemReason; 6] = [
    ProblemReason::BrokerUnreachable,
    ProblemReason::ContractInvalid,
    ProblemReason::DatabaseNotReady,
    ProblemReason::DatabaseUnreachable,
    ProblemReason::DeliveryFailing,
    ProblemReason::SourceUnusable,
];

#[derive(Debug)]
pub(super) struct Reporter {
    state: Mutex<State>,
    status: watch::Sender<InboxStatus>,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct State {
    contract: String,
    leading: bool,
    /// Whether the database is connected.
    database: bool,
    subscriptions: BTreeMap<String, SubscriptionStatus>,
    /// By reason and subscription.
    problems: BTreeMap<(ProblemReason, String), InboxProblem>,
}

type OfSubscription = [(&'static str, String); 1];
type OfOutcome = [(&'static str, String); 2];

#[derive(Debug)]
struct Metrics {
    deliveries: Family<OfOutcome, Counter>,
    duration: Family<OfSubscription, Histogram>,
    waiting: Family<OfSubscription, Gauge>,
    held: Family<OfSubscription, Gauge>,
    dead: Family<OfSubscription, Gauge>,
    lag: Family<OfSubscription, Gauge<f64, AtomicU64>>,
    leading: Gauge,
}

/// Buckets from 0.5 ms to 16 s.
fn durations() -> Histogram {
    Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(0.0005, 2.0, 16))
}

impl Metrics {
    fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            deliveries: Family::default(),
            duration: Family::new_with_constructor(durations),
            waiting: Family::default(),
            held: Family::default(),
            dead: Family::default(),
            lag: Family::default(),
            leading: Gauge::default(),
        };
        let Self { deliveries, duration, waiting, held, dead, lag, leading } = &metrics;
        registry.register(DELIVERIES, "Deliveries of events to the service", deliveries.clone());
        registry.register_with_unit(DELIVERY_DURATION, "One delivery", Unit::Seconds, duration.clone());
        registry.register(WAITING, "Published events that the service has not handled", waiting.clone());
        registry.register(HELD, "Events that are delivered in vain, and those that wait behind them", held.clone());
        registry.register(DEAD, "Events that were given up", dead.clone());
        registry.register(LAG_SECONDS, "Age of the oldest event that waits", lag.clone());
        registry.register(LEADING, "1 when this process delivers, 0 when it is a standby", leading.clone());
        metrics
    }
}

impl Reporter {
    pub(super) fn new(registry: &mut Registry) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::default(),
            status: watch::Sender::new(InboxStatus::default()),
            metrics: Metrics::new(registry),
        })
    }

    pub(super) fn status(&self) -> watch::Receiver<InboxStatus> {
        self.status.subscribe()
    }

    pub(super) fn ready(&self) -> Result<(), String> {
        let status = self.status.borrow();
        if status.ready {
            return Ok(());
        }
        let problems: Vec<_> = status.problems.iter().map(|problem| problem.message.as_str()).collect();
        Err(if problems.is_empty() {
            "the inbox is starting: it is not connected to the database yet".to_owned()
        } else {
            problems.join("; ")
        })
    }

    /// Sets the contract in force; what was reported of other subscriptions is over.
    pub(super) fn contract(&self, contract: &Inbox) {
        self.change(|state| {
            state.contract.clone_from(&contract.version);
            let is_there = |name: &str| contract.subscriptions.iter().any(|known| known.name == name);
            state.subscriptions.retain(|name, _| is_there(name));
            state.problems.retain(|(_, name), _| name.is_empty() || is_there(name));
        });
    }

    /// The database is connected; this process leads, or is a standby.
    pub(super) fn leading(&self, leading: bool) {
        self.change(|state| {
            (state.database, state.leading) = (true, leading);
            let is_over = |reason: &ProblemReason| {
                matches!(reason, ProblemReason::DatabaseUnreachable | ProblemReason::DatabaseNotReady)
            };
            state.problems.retain(|(reason, _), _| !is_over(reason));
        });
        self.metrics.leading.set(i64::from(leading));
    }

    /// A term ended: nothing is known of any subscription.
    pub(super) fn ended(&self) {
        self.change(|state| {
            (state.database, state.leading) = (false, false);
            state.problems.retain(|(_, subscription), _| subscription.is_empty());
            state.subscriptions.clear();
        });
        self.metrics.leading.set(0);
    }

    /// Reports a problem, until it is resolved. An outage keeps the time at which it began.
    pub(super) fn report(&self, mut problem: InboxProblem) {
        let key = (problem.reason(), problem.subscription().to_owned());
        let mut changed = false;
        self.change(|state| {
            let known = state.problems.get_mut(&key);
            let since = known.and_then(InboxProblem::outage_mut).map(|outage| outage.since);
            if let (Some(outage), Some(since)) = (problem.outage_mut(), since) {
                outage.since = since;
            }
            changed = state.problems.get(&key) != Some(&problem);
            state.problems.insert(key.clone(), problem.clone());
        });
        if changed {
            tracing::warn!(reason = key.0.as_str(), message = %problem, "a problem was found");
        }
    }

    pub(super) fn resolve(&self, reason: ProblemReason, subscription: &str) {
        let key = (reason, subscription.to_owned());
        if self.lock().problems.contains_key(&key) {
            tracing::info!(reason = reason.as_str(), subscription, "the problem is resolved");
            self.change(|state| drop(state.problems.remove(&key)));
        }
    }

    pub(super) fn delivered(&self, subscription: &str, outcome: &Outcome, elapsed: Duration) {
        let outcome = match outcome {
            Outcome::Handled => "handled",
            Outcome::Refused(_) => "refused",
            Outcome::Failed(_) => "failed",
        };
        let labels = [(SUBSCRIPTION, subscription.to_owned()), (OUTCOME, outcome.to_owned())];
        self.metrics.deliveries.get_or_create(&labels).inc();
        let of = [(SUBSCRIPTION, subscription.to_owned())];
        self.metrics.duration.get_or_create(&of).observe(elapsed.as_secs_f64());
    }

    pub(super) fn numbers(&self, subscription: &str, numbers: &SubscriptionStatus) {
        let of = [(SUBSCRIPTION, subscription.to_owned())];
        let set = |family: &Family<OfSubscription, Gauge>, value: u64| {
            family.get_or_create(&of).set(i64::try_from(value).unwrap_or(i64::MAX));
        };
        set(&self.metrics.waiting, numbers.waiting);
        set(&self.metrics.held, numbers.held);
        set(&self.metrics.dead, numbers.dead_letters);
        self.metrics.lag.get_or_create(&of).set(numbers.lag_seconds);
        self.change(|state| {
            state.subscriptions.insert(subscription.to_owned(), numbers.clone());
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        change(&mut state);
        let State { contract, leading, database, subscriptions, problems } = &*state;
        let blocked = problems.keys().any(|(reason, _)| BLOCKING.contains(reason));
        let problems = problems.iter().map(|((reason, _), problem)| Problem::new(*reason, problem.to_string()));
        let status = InboxStatus {
            contract: contract.clone(),
            leading: *leading,
            ready: *database && !blocked,
            subscriptions: subscriptions.clone(),
            problems: problems.collect(),
        };
        self.status.send_if_modified(|current| {
            let changed = *current != status;
            *current = status;
            changed
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
