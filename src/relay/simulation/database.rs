//! A database with overlapping transactions, and its log.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, rngs::StdRng};

use crate::relay::source::postgres::snapshot::Snapshot;

const KEYS: u64 = 6;
/// Bytes of log that a commit takes at least: fewer windows than that are polled between two of them.
pub(super) const RECORD: u64 = 32;

/// A row `id`; `number` counts the events of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) id: usize,
    pub(super) key: u64,
    pub(super) number: u64,
    /// Its commit position: sorts as the stream of its relay does.
    pub(super) sequence: (u64, u64),
}

#[derive(Clone, Debug)]
pub(super) enum Mark {
    Slot(usize, Snapshot, u64),
    Committed(usize),
    Seen(Snapshot, u64),
}

/// A database with overlapping transactions; a transaction locks the keys that it writes until it is visible.
#[derive(Default)]
pub(super) struct Database {
    pub(super) rows: Vec<TableRow>,
    pub(super) open: Vec<(u64, Vec<usize>)>,
    /// In the log, and not visible yet.
    pub(super) committing: Vec<(u64, Vec<usize>)>,
    /// The transactions and their rows in the order of the log.
    pub(super) log: Vec<(u64, Vec<usize>)>,
    /// Where each of them is in the log, and where it ends.
    pub(super) positions: Vec<u64>,
    pub(super) end_of_log: u64,
    pub(super) next_transaction: u64,
    pub(super) committed: BTreeMap<u64, u64>,
}

pub(super) struct TableRow {
    pub(super) key: u64,
    pub(super) number: u64,
    pub(super) transaction: u64,
    pub(super) state: RowState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RowState {
    Open,
    Aborted,
    Committing,
    Committed,
    Deleted,
}

impl Database {
    pub(super) fn begin(&mut self) {
        self.next_transaction += 1;
        self.open.push((self.next_transaction, Vec::new()));
    }

    pub(super) fn insert(&mut self, random: &mut StdRng) {
        if self.open.is_empty() {
            return;
        }
        let writer = random.random_range(0..self.open.len());
        let key = random.random_range(0..KEYS);
        let holds = |rows: &[usize]| rows.iter().any(|&row| self.rows[row].key == key);
        let others = self.open.iter().enumerate().filter(|&(other, _)| other != writer).map(|(_, open)| open);
        if others.chain(&self.committing).any(|(_, rows)| holds(rows)) {
            return;
        }
        let own = self.open[writer].1.iter().filter(|&&row| self.rows[row].key == key).count() as u64;
        let number = self.committed.get(&key).copied().unwrap_or_default() + own + 1;
        let transaction = self.open[writer].0;
        self.open[writer].1.push(self.rows.len());
        self.rows.push(TableRow { key, number, transaction, state: RowState::Open });
    }

    /// Writes the end of a transaction to the log.
    pub(super) fn end(&mut self, which: usize, commit: bool) {
        let (transaction, rows) = self.open.swap_remove(which);
        for &row in &rows {
            self.rows[row].state = if commit { RowState::Committing } else { RowState::Aborted };
            if commit {
                let number = self.rows[row].number;
                self.committed.insert(self.rows[row].key, number);
            }
        }
        if commit {
            self.log.push((transaction, rows.clone()));
            self.end_of_log += RECORD;
            self.positions.push(self.end_of_log);
            self.committing.push((transaction, rows));
        }
    }

    pub(super) fn make_visible(&mut self, which: usize) {
        let (_, rows) = self.committing.swap_remove(which);
        for row in rows {
            self.rows[row].state = RowState::Committed;
        }
    }

    fn snapshot_without(&self, running: impl Iterator<Item = u64>) -> Snapshot {
        let running: BTreeSet<u64> = running.collect();
        let xmax = self.next_transaction + 1;
        let xmin = running.first().copied().unwrap_or(xmax);
        let xip: Vec<String> = running.iter().map(u64::to_string).collect();
        format!("{xmin}:{xmax}:{}", xip.join(",")).parse().unwrap()
    }

    /// As `pg_current_snapshot()`.
    pub(super) fn snapshot(&self) -> Snapshot {
        self.snapshot_without(self.open.iter().chain(&self.committing).map(|&(transaction, _)| transaction))
    }

    /// As a new slot exports it: made from the log.
    pub(super) fn slot_snapshot(&self) -> Snapshot {
        self.snapshot_without(self.open.iter().map(|&(transaction, _)| transaction))
    }

    /// Rows of the table that one snapshot sees and the other does not, in the order of their ids (`seq`).
    pub(super) fn between(&self, previous: &Snapshot, current: &Snapshot, held: &[Row]) -> Vec<usize> {
        let is_new = |&(id, row): &(usize, &TableRow)| {
            row.state == RowState::Committed
                && !previous.sees(row.transaction)
                && current.sees(row.transaction)
                && !held.iter().any(|held| held.id == id)
        };
        self.rows.iter().enumerate().filter(is_new).map(|(id, _)| id).collect()
    }
}
