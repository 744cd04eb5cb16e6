//! The queue of rows to commit, between the engine that decides and the writer that commits.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use jiff::Timestamp;
use tokio::sync::{Notify, oneshot};
use uuid::Uuid;

use crate::domain::saga::{decide::Actions, state::Status};

/// Maximum number of rows of one commit: enough to share one `fsync`, few enough for a statement of a few megabytes.
const BATCH: usize = 4_096;
/// Bytes of their bodies, unless one row has more: PostgreSQL accepts no value of 1 GiB, and a statement is in memory several
/// times.
const BATCH_BYTES: usize = 16 << 20;
/// With more queued entries, or more bytes of them, no new instances are accepted: the database is not keeping up.
const CONGESTED: (usize, usize) = (50_000, 256 << 20);

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
    /// To be done once the row is durable.
    pub actions: Actions,
    pub acknowledge: Option<Acknowledge>,
}

#[derive(Debug)]
pub(super) struct Row {
    /// Of the instance, see `weft.saga_bucket`.
    pub bucket: i32,
    pub seq: i32,
    /// In whole microseconds, the resolution of the database.
    pub at: Timestamp,
    pub body: String,
    /// If this is the instance's first row.
    pub start: Option<Start>,
    /// Saga and final state, if this is the instance's last row.
    pub end: Option<(String, Status)>,
}

/// What is known of an instance from its start on.
#[derive(Debug)]
pub(super) struct Start {
    pub saga: String,
    pub version: String,
    /// Its business key.
    pub key: Option<String>,
}

/// Entries in the order of their decisions.
#[derive(Debug, Default)]
pub(super) struct Queue {
    entries: Mutex<VecDeque<Entry>>,
    /// Of the entries' bodies.
    bytes: AtomicUsize,
    wake: Notify,
}

impl Entry {
    fn size(&self) -> usize {
        self.row.as_ref().map_or(0, |row| row.body.len())
    }
}

impl Queue {
    pub(super) fn push(&self, entry: Entry) {
        self.bytes.fetch_add(entry.size(), Ordering::Relaxed);
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).push_back(entry);
        self.wake.notify_one();
    }

    pub(super) fn len(&self) -> usize {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// How many entries wait, when they are too many for another start.
    pub(super) fn congested(&self) -> Option<usize> {
        let (waiting, bytes) = (self.len(), self.bytes.load(Ordering::Relaxed));
        (waiting > CONGESTED.0 || bytes > CONGESTED.1).then_some(waiting)
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
        self.removed(VecDeque::into(gone))
    }

    fn removed(&self, entries: Vec<Entry>) -> Vec<Entry> {
        self.bytes.fetch_sub(entries.iter().map(Entry::size).sum(), Ordering::Relaxed);
        entries
    }

    /// Removes and returns the next group. An instance never starts and ends in one group, since its end updates the
    /// row that its start inserts.
    pub(super) fn take(&self) -> Vec<Entry> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let mut started = HashSet::new();
        let (mut count, mut bytes) = (0, 0);
        for entry in entries.iter().take(BATCH) {
            bytes += entry.size();
            if bytes > BATCH_BYTES && count > 0 {
                break;
            }
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
        self.removed(entries.drain(..count).collect())
    }
}

/// The current time in the resolution of the database, microseconds.
pub(super) fn now() -> Timestamp {
    let now = Timestamp::now();
    Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(bytes: usize) -> Entry {
        let row = Row { bucket: 1, seq: 0, at: now(), body: "x".repeat(bytes), start: None, end: None };
        Entry { id: Uuid::now_v7(), partition: 0, row: Some(row), actions: Actions::default(), acknowledge: None }
    }

    #[test]
    fn a_group_is_bounded_in_rows_and_bytes_and_has_one_row_at_least() {
        let queue = Queue::default();
        for bytes in [10, BATCH_BYTES, 1, BATCH_BYTES + 1, 10, 10] {
            queue.push(entry(bytes));
        }
        let groups: Vec<usize> = std::iter::from_fn(|| Some(queue.take().len()).filter(|&rows| rows > 0)).collect();
        assert_eq!(groups, [1, 1, 1, 1, 2]);
        for _ in 0..=BATCH {
            queue.push(entry(0));
        }
        assert_eq!((queue.take().len(), queue.take().len()), (BATCH, 1));
    }

    #[test]
    fn many_bytes_are_too_much_as_many_entries_are() {
        let queue = Queue::default();
        for _ in 0..16 {
            queue.push(entry(BATCH_BYTES));
        }
        assert_eq!(queue.congested(), None);
        queue.push(entry(1));
        assert_eq!(queue.congested(), Some(17));
        queue.withdraw(|entry| entry.size() == 1);
        assert_eq!(queue.congested(), None);
        while !queue.take().is_empty() {}
        assert_eq!(queue.bytes.load(Ordering::Relaxed), 0);
    }
}
