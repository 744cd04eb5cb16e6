//! A relay, by the rules of [`crate::relay::source::postgres`], and what it records.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use rand::{Rng, rngs::StdRng};

use super::database::{Database, Mark, Row, TableRow};
use crate::relay::{
    held::HeldKeys,
    source::postgres::snapshot::Snapshot,
    window::{Entry, Limits, Ticket, Window},
};

const LIMITS: Limits = Limits {
    events: 12,
    bytes: 1 << 20,
    in_flight: 5,
    shortest_run: 2,
    backoff: (Duration::from_secs(1), Duration::from_secs(8)),
};

/// What survives a crash of the relay.
pub(super) struct Ledger {
    /// What is before this in the log is settled; `None` when no slot belongs to it.
    pub(super) log: Option<usize>,
    /// What it sees is settled.
    pub(super) snapshot: Snapshot,
    /// No later event has a lower position.
    pub(super) floor: u64,
    pub(super) held: Vec<Row>,
    /// Published and not deleted yet.
    pub(super) undeleted: BTreeSet<usize>,
}

/// A process that believes that it is the leader.
pub(super) struct Relay {
    pub(super) window: Window<Item, Mark>,
    pub(super) keys: HeldKeys,
    pub(super) session: u32,
    pub(super) source: Source,
    pub(super) unrecorded: Done,
    pub(super) in_flight: Vec<Ticket>,
    /// Held events that are in the window again.
    pub(super) loaded: BTreeSet<usize>,
    pub(super) handed: HashMap<u64, u64>,
}

#[derive(Default)]
pub(super) struct Done {
    pub(super) published: Vec<usize>,
    pub(super) freed: Vec<Row>,
    pub(super) held: Vec<Row>,
    pub(super) refused: Vec<usize>,
    pub(super) mark: Option<Mark>,
}

/// An event in the window.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    pub(super) row: Row,
    pub(super) held: bool,
}

impl Entry for Item {
    fn key(&self) -> u64 {
        self.row.key
    }

    fn size(&self) -> usize {
        1
    }
}

pub(super) struct Source {
    pub(super) queue: Vec<Read>,
    pub(super) floor: u64,
    pub(super) seen: Snapshot,
    pub(super) next: Next,
}

pub(super) enum Next {
    Log(usize),
    Poll,
    /// The slot is made: where it begins, and what it sees.
    Copy(usize, Snapshot),
}

pub(super) enum Read {
    Row(Row),
    Mark(Mark),
}

impl Relay {
    pub(super) fn start(
        database: &Database,
        ledger: &mut Ledger,
        polling: bool,
        session: u32,
        random: &mut StdRng,
    ) -> Self {
        let next = match ledger.log {
            Some(next) if !polling => Next::Log(next),
            _ => {
                ledger.log = None;
                Next::Poll
            }
        };
        let (seen, floor) = (ledger.snapshot.clone(), ledger.floor);
        let mut relay = Self {
            window: Window::new(LIMITS),
            keys: HeldKeys::new(ledger.held.iter().map(|row| row.key)),
            session,
            source: Source { queue: Vec::new(), floor, seen, next },
            unrecorded: Done::default(),
            in_flight: Vec::new(),
            loaded: BTreeSet::new(),
            handed: HashMap::new(),
        };
        if !polling && matches!(relay.source.next, Next::Poll) && random.random_bool(0.5) {
            relay.make_slot(database);
        }
        relay
    }

    pub(super) fn make_slot(&mut self, database: &Database) {
        self.source.next = Next::Copy(database.log.len(), database.slot_snapshot());
    }

    /// Reads one item into the window.
    pub(super) fn read(&mut self, database: &Database, ledger: &Ledger) {
        if !self.window.has_room() {
            return;
        }
        let source = &mut self.source;
        if source.queue.is_empty() {
            source.fill(database, ledger);
        }
        match source.queue.pop() {
            Some(Read::Row(row)) if self.keys.has(row.key) => self.hold(row),
            Some(Read::Row(row)) => self.window.admit(Item { row, held: false }),
            Some(Read::Mark(mark)) => self.window.mark(mark),
            None => {}
        }
        self.pass();
    }

    pub(super) fn hold(&mut self, row: Row) {
        self.keys.hand_over(row.key, 1);
        self.unrecorded.held.push(row);
    }

    fn pass(&mut self) {
        self.unrecorded.mark = self.window.passed().or(self.unrecorded.mark.take());
    }

    pub(super) fn acknowledge(&mut self, ticket: Ticket) {
        let mut events = Vec::new();
        self.window.acknowledged(ticket, &mut events);
        for Item { row, held } in events {
            self.unrecorded.published.push(row.id);
            if held {
                self.unrecorded.freed.push(row);
            }
        }
        self.pass();
    }

    pub(super) fn refuse(&mut self, ticket: Ticket) {
        for (place, Item { row, held }) in self.window.hold(ticket).into_iter().enumerate() {
            if !held {
                self.hold(row);
            } else if place == 0 {
                self.unrecorded.refused.push(row.id);
            }
        }
        self.pass();
    }
}

impl Source {
    fn fill(&mut self, database: &Database, ledger: &Ledger) {
        let held = &ledger.held;
        match &self.next {
            // the floor must be recorded before it is the position of anything that the log has
            Next::Log(_) if ledger.log.is_none() => {}
            Next::Log(next) => {
                let Some((transaction, rows)) = database.log.get(*next) else { return };
                if !self.seen.sees(*transaction) {
                    let lsn = database.positions[*next];
                    let (lsn, first) = if lsn > self.floor { (lsn, 0) } else { (self.floor, lsn << 32) };
                    let rows = rows.iter().zip(first..);
                    self.queue.extend(rows.map(|(&id, index)| Read::Row(row(database, id, lsn, index))));
                }
                self.queue.push(Read::Mark(Mark::Committed(*next + 1)));
                self.next = Next::Log(*next + 1);
            }
            Next::Poll => {
                let current = database.snapshot();
                let seen = std::mem::replace(&mut self.seen, current.clone());
                self.window(database, &seen, &current, held);
                self.queue.push(Read::Mark(Mark::Seen(current, self.floor)));
            }
            Next::Copy(begins, snapshot) => {
                if database.committing.iter().any(|&(transaction, _)| snapshot.sees(transaction)) {
                    return;
                }
                let (begins, snapshot) = (*begins, snapshot.clone());
                let seen = self.seen.clone();
                self.window(database, &seen, &snapshot, held);
                self.queue.push(Read::Mark(Mark::Slot(begins, seen, self.floor)));
                self.next = Next::Log(begins);
            }
        }
        self.queue.reverse();
    }

    fn window(&mut self, database: &Database, seen: &Snapshot, current: &Snapshot, held: &[Row]) {
        let rows = database.between(seen, current, held);
        if rows.is_empty() {
            return;
        }
        self.floor = (database.end_of_log + 1).max(self.floor + 1);
        self.queue.extend(rows.into_iter().map(|id| Read::Row(row(database, id, self.floor, id as u64))));
    }
}

fn row(database: &Database, id: usize, lsn: u64, index: u64) -> Row {
    let TableRow { key, number, .. } = database.rows[id];
    Row { id, key, number, sequence: (lsn, index) }
}
