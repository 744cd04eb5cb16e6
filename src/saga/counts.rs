//! Counts of one saga's instances by state, updated with every change.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicI64, AtomicU64, Ordering::Relaxed},
    },
};

use jiff::Timestamp;
use uuid::Uuid;

use crate::{
    contract::status::{SagaCounts, StuckInstance},
    domain::saga::{
        definition::Definition,
        state::{State, Status},
    },
};

/// Maximum number of stuck instances in the status.
const MAX_REPORTED: usize = 10;

#[derive(Debug, Default)]
pub(super) struct Counts {
    running: AtomicI64,
    compensating: AtomicI64,
    completed: AtomicU64,
    compensated: AtomicU64,
    /// Oldest first.
    stuck: Mutex<BTreeMap<(i64, Uuid), StuckInstance>>,
}

/// The part of a state that is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    live: bool,
    compensating: bool,
    stuck_since: Option<i64>,
}

impl Counted {
    /// Of an instance that is not, or no longer, in this process.
    pub(super) const NOTHING: Self = Self { live: false, compensating: false, stuck_since: None };

    pub(super) fn of(state: &State) -> Self {
        let live = !state.phase.is_end();
        let stuck_since = state.stuck.as_ref().filter(|_| live).map(|stuck| stuck.since_ms);
        Self { live, compensating: live && state.is_compensating(), stuck_since }
    }
}

impl Counts {
    /// Updates the counts for an instance that was `before` and is now in `state` (`None`: it is no longer in this
    /// process).
    pub(super) fn change(&self, id: Uuid, before: Counted, definition: &Definition, state: Option<&State>) {
        let now = state.map_or(Counted::NOTHING, Counted::of);
        if before == now {
            return;
        }
        self.running.fetch_add(i64::from(now.live) - i64::from(before.live), Relaxed);
        self.compensating.fetch_add(i64::from(now.compensating) - i64::from(before.compensating), Relaxed);
        if before.stuck_since == now.stuck_since {
            return;
        }
        let mut stuck = self.stuck.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(since) = before.stuck_since {
            stuck.remove(&(since, id));
        }
        if let (Some(since), Some(state)) = (now.stuck_since, state) {
            stuck.insert((since, id), stuck_instance(id, definition, state));
        }
    }

    /// Sets the counts of ended instances from the database; no commit of this process may be in progress.
    pub(super) fn set_ended(&self, completed: u64, compensated: u64) {
        self.completed.store(completed, Relaxed);
        self.compensated.store(compensated, Relaxed);
    }

    /// Counts an end that became durable.
    pub(super) fn ended(&self, status: Status) {
        match status {
            Status::Completed => self.completed.fetch_add(1, Relaxed),
            Status::Compensated => self.compensated.fetch_add(1, Relaxed),
            Status::Running | Status::Compensating | Status::Stuck => 0,
        };
    }

    pub(super) fn running(&self) -> u64 {
        u64::try_from(self.running.load(Relaxed)).unwrap_or(0)
    }

    pub(super) fn snapshot(&self, version: String) -> SagaCounts {
        let stuck = self.stuck.lock().unwrap_or_else(PoisonError::into_inner);
        SagaCounts {
            version,
            draining: false,
            running: self.running(),
            compensating: u64::try_from(self.compensating.load(Relaxed)).unwrap_or(0),
            completed: self.completed.load(Relaxed),
            compensated: self.compensated.load(Relaxed),
            stuck: stuck.len() as u64,
            start: None,
            stuck_instances: stuck.values().take(MAX_REPORTED).cloned().collect(),
            findings: Vec::new(),
        }
    }
}

fn stuck_instance(id: Uuid, definition: &Definition, state: &State) -> StuckInstance {
    let stuck = state.stuck.as_ref();
    StuckInstance {
        id: id.to_string(),
        step: state.phase.step(definition).unwrap_or_default().to_owned(),
        operation: state.phase.operation().unwrap_or_default().to_owned(),
        message: stuck.map(|stuck| stuck.message.clone()).unwrap_or_default(),
        since: stuck.and_then(|stuck| Timestamp::from_millisecond(stuck.since_ms).ok()).unwrap_or_default(),
    }
}
