//! The queue of rows to commit, between the engine that decides and the writer that commits.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Mutex, PoisonError},
};

use jiff::Timestamp;
use tokio::sync::{Notify, oneshot};
use uuid::Uuid;

use crate::domain::saga::{decide::Command, state::Status};

/// Maximum number of rows of one commit: enough to share one `fsync`, few enough for a statement of a few megabytes.
const BATCH: usize = 4_096;
/// With more queued entries the API accepts no new instances: the database is not keeping up.
pub(super) const CONGESTED: usize = 50_000;

/// Why an entry was not recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unrecorded {
    #[error("another orchestrator has taken over this instance; try again")]
    TakenOver,
}

/// The result of a committed entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Recorded {
    Written,
    /// The instance that was to be started exists already.
    Existed,
}

pub(super) type Acknowledge = oneshot::Sender<Result<Recorded, Unrecorded>>;

/// One transition of one instance. Without `row` it is only a request to be acknowledged when everything before it is
/// durable.
#[derive(Debug)]
pub(super) struct Entry {
    pub id: Uuid,
    pub partition: i16,
    pub row: Option<Row>,
    /// To be sent once the row is durable.
    pub command: Option<Command>,
    pub acknowledge: Option<Acknowledge>,
}

#[derive(Debug)]
pub(super) struct Row {
    pub seq: i32,
    /// In whole microseconds, the resolution of the database.
    pub at: Timestamp,
    pub body: String,
    /// Saga and version, if this is the instance's first row.
    pub start: Option<(String, String)>,
    /// Saga and final state, if this is the instance's last row.
    pub end: Option<(String, Status)>,
}

/// Entries in the order of their decisions.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: Mutex<VecDeque<Entry>>,
    wake: Notify,
}

impl Queue {
    pub(super) fn push(&self, entry: Entry) {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push_back(entry);
        self.wake.notify_one();
    }

    pub(super) fn len(&self) -> usize {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub(super) async fn filled(&self) {
        while self.len() == 0 {
            self.wake.notified().await;
        }
    }

    /// Removes and returns the queued entries that are `unwanted`.
    pub(super) fn withdraw(&self, unwanted: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (gone, kept) = entries.drain(..).partition(unwanted);
        *entries = kept;
        VecDeque::into(gone)
    }

    /// Removes and returns the next group. An instance never starts and ends in one group, since its end updates the
    /// row that its start inserts.
    pub(super) fn take(&self) -> Vec<Entry> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let mut started = HashSet::new();
        let mut count = 0;
        for entry in entries.iter().take(BATCH) {
            if let Some(row) = &entry.row {
                if row.end.is_some() && started.contains(&entry.id) {
                    break;
                }
                if row.start.is_some() {
                    started.insert(entry.id);
                }
            }
            count += 1;
        }
        entries.drain(..count).collect()
    }
}

/// The current time in the resolution of the database, microseconds.
pub(super) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
}
