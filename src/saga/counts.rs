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
        state::{Stage, State, Status},
        tree::Tree,
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
        let stuck_since = state.stuck().map(|(_, stuck)| stuck.since_ms);
        Self { live: !state.stage.is_end(), compensating: state.stage == Stage::Compensating, stuck_since }
    }
}

impl Counts {
    /// Updates the counts for an instance that was `before` and is now in `state` (`None`: it is no longer in this
    /// process).
    pub(super) fn change(&self, id: Uuid, before: Counted, tree: &Tree, state: Option<&State>) {
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
            stuck.insert((since, id), stuck_instance(id, tree, state));
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

/// The first step that is stuck.
fn stuck_instance(id: Uuid, tree: &Tree, state: &State) -> StuckInstance {
    let id = id.to_string();
    let Some((active, stuck)) = state.stuck() else { return StuckInstance { id, ..StuckInstance::default() } };
    StuckInstance {
        id,
        step: tree.path(active.at).into_owned(),
        operation: tree.operation(active.at).to_owned(),
        message: stuck.message.clone(),
        since: Timestamp::from_millisecond(stuck.since_ms).unwrap_or_default(),
    }
}
