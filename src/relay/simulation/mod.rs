//! A seeded simulation of source, window, broker, ledger and held events, in which everything goes wrong.
//!
//! A transaction commits in two steps: first it is in the log, later it is visible to others (as with a synchronous
//! standby). The simulation's relay follows the rules of [`crate::relay::source::postgres`]: the log leaves out what the
//! ledger's snapshot sees; a new slot's snapshot is read when everything that it sees is visible; a row is gone only when its
//! transaction is visible and the row is not.
//!
//! The broker and the network are worse than any real one: what was sent may arrive late, twice, in any order, after
//! the connection ended, after its sender died; the broker forgets which ids it has seen; answers get lost, duplicated,
//! reordered; of a run it may store the first ones only, and refuse it or be silent. A dead leader may not know that it is dead and
//! continue to send. Every single arrival is checked: for each key the broker must have a prefix of what was committed, and the broker must have whatever is recorded.
//!
//! `WEFT_SEEDS=N` runs N schedules (default 10,000), `WEFT_SEED=S` runs one again.

mod database;
mod relay;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::Duration,
};

use rand::{Rng, SeedableRng, rngs::StdRng};

use self::{
    database::{Database, Mark, RECORD, Row, RowState},
    relay::{Done, Item, Ledger, Next, Relay},
};
use super::{source::postgres::snapshot::Snapshot, window::Ticket};

const STEPS: usize = 250;
/// After the faults everything must be published and recorded within this many steps.
const QUIET_STEPS: usize = 20_000;

#[derive(Clone)]
struct Publish {
    session: u32,
    ticket: Ticket,
    /// An event, or a run of one key.
    rows: Vec<Row>,
}

#[derive(Clone, Copy)]
enum Answer {
    Stored,
    Failed,
    Refused,
}

/// All parts, and the checks.
struct World {
    random: StdRng,
    now: Duration,
    database: Database,
    ledger: Ledger,
    leader: Relay,
    /// A former leader that does not know yet that it lost the leadership.
    former: Option<Relay>,
    /// Whether there was a former leader at any time.
    two_leaders: bool,
    sessions: u32,
    /// The first session of the present leader.
    since: u32,
    publishes: Vec<Publish>,
    answers: Vec<(u32, Ticket, Answer)>,
    /// Ids within the broker's duplicate window.
    remembered: BTreeSet<usize>,
    stored: BTreeSet<usize>,
    /// For each key the last event that was stored for the first time.
    held: HashMap<u64, Row>,
    polling: bool,
    faults: bool,
    duplicates: u64,
    /// Of which more than one event was stored.
    runs: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let polling = random.random_bool(0.5);
        let database = Database::default();
        let mut ledger =
            Ledger { log: None, snapshot: Snapshot::nothing(), floor: 0, held: Vec::new(), undeleted: BTreeSet::new() };
        let leader = Relay::start(&database, &mut ledger, polling, 0, &mut random);
        Self {
            random,
            now: Duration::ZERO,
            database,
            ledger,
            leader,
            former: None,
            two_leaders: false,
            sessions: 0,
            since: 0,
            publishes: Vec::new(),
            answers: Vec::new(),
            remembered: BTreeSet::new(),
            stored: BTreeSet::new(),
            held: HashMap::new(),
            polling,
            faults: true,
            duplicates: 0,
            runs: 0,
        }
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(100);
        let dice = self.random.random_range(0..100);
        match dice {
            0..10 => self.database.begin(),
            10..30 => self.database.insert(&mut self.random),
            30..37 => self.end_transaction(),
            37..44 => self.make_visible(),
            44..54 => self.leader.read(&self.database, &self.ledger),
            54..64 => self.send(),
            64..78 => self.arrive(),
            78..90 => self.answer(),
            90..93 => self.record(),
            93..94 => self.try_held(),
            94..96 => self.lose_connection(),
            96..97 => self.time_out(),
            97..98 => self.change_leader(),
            98..99 => self.forget(),
            _ => self.former = None,
        }
        self.leader.window.wake(self.now);
    }

    fn end_transaction(&mut self) {
        if !self.database.open.is_empty() {
            let which = self.random.random_range(0..self.database.open.len());
            let commit = self.random.random_bool(0.8);
            self.database.end(which, commit);
        }
    }

    fn make_visible(&mut self) {
        if !self.database.committing.is_empty() {
            let which = self.random.random_range(0..self.database.committing.len());
            self.database.make_visible(which);
        }
        if !self.polling && matches!(self.leader.source.next, Next::Poll) && self.random.random_bool(0.3) {
            self.leader.make_slot(&self.database);
        }
    }

    fn send(&mut self) {
        let publishes = &mut self.publishes;
        let longest = self.random.random_range(1..6);
        for relay in std::iter::once(&mut self.leader).chain(&mut self.former) {
            let session = relay.session;
            if let Some((ticket, _)) = relay.window.take(longest) {
                let rows = relay.window.run(ticket).map(|item| item.row).collect();
                publishes.push(Publish { session, ticket, rows });
                relay.in_flight.push(ticket);
            }
        }
    }

    /// Any publish that is in flight arrives, and perhaps arrives again later.
    fn arrive(&mut self) {
        if self.publishes.is_empty() {
            return;
        }
        let which = self.random.random_range(0..self.publishes.len());
        let again = self.faults && self.random.random_bool(0.1);
        let publish = if again { self.publishes[which].clone() } else { self.publishes.swap_remove(which) };
        let (stored, answer) = match self.random.random_range(0..20) {
            0 if self.faults => (self.random.random_range(0..publish.rows.len()), Answer::Failed),
            1 if self.faults => (self.random.random_range(0..publish.rows.len()), Answer::Refused),
            _ => (publish.rows.len(), Answer::Stored),
        };
        self.runs += u64::from(stored > 1);
        let is_former = publish.session < self.since;
        for row in publish.rows.into_iter().take(stored) {
            self.store(row, is_former);
        }
        self.answers.push((publish.session, publish.ticket, answer));
    }

    /// Checks one arrival at the broker, from the present leader or a former one.
    fn store(&mut self, row: Row, is_former: bool) {
        assert!(
            !matches!(self.database.rows[row.id].state, RowState::Open | RowState::Aborted),
            "{row:?} was never committed"
        );
        if !self.remembered.insert(row.id) {
            return;
        }
        if !self.stored.insert(row.id) {
            self.duplicates += 1;
            return;
        }
        let held = self.held.insert(row.key, row);
        let before = held.map_or(0, |held| held.number);
        assert_eq!(row.number, before + 1, "reordered: {row:?} came after {held:?}");
        // two leaders may have read the same rows through different snapshots; the former one may be gone, and its last run late
        let sorted = self.two_leaders || is_former || held.is_none_or(|held| held.sequence < row.sequence);
        assert!(sorted, "{row:?} does not sort after {held:?}");
    }

    fn answer(&mut self) {
        if self.answers.is_empty() {
            return;
        }
        let which = self.random.random_range(0..self.answers.len());
        let again = self.faults && self.random.random_bool(0.1);
        let (session, ticket, answer) = if again { self.answers[which] } else { self.answers.swap_remove(which) };
        if self.faults && self.random.random_bool(0.1) {
            return;
        }
        let now = self.now;
        for relay in std::iter::once(&mut self.leader).chain(&mut self.former) {
            if relay.session == session {
                match answer {
                    Answer::Stored => relay.acknowledge(ticket),
                    Answer::Failed => {
                        relay.window.failed(ticket, now);
                    }
                    Answer::Refused => relay.refuse(ticket),
                }
            }
        }
    }

    /// The leader writes the ledger, and deletes what it can; a former leader cannot.
    fn record(&mut self) {
        let Done { published, freed, held, refused, mark } = std::mem::take(&mut self.leader.unrecorded);
        for &id in &published {
            assert!(self.stored.contains(&id), "row {id} is recorded and the broker does not have it");
        }
        self.ledger.undeleted.extend(published);
        for row in held {
            *self.leader.handed.entry(row.key).or_default() += 1;
            if !self.ledger.held.iter().any(|held| held.id == row.id) {
                self.ledger.held.push(row);
            }
        }
        for row in &freed {
            self.ledger.held.retain(|held| held.id != row.id);
            self.leader.loaded.remove(&row.id);
        }
        for id in refused {
            let key = self.database.rows[id].key;
            self.leader.loaded.retain(|&loaded| self.database.rows[loaded].key != key);
        }
        let settled =
            |world: &Self, id: usize| world.stored.contains(&id) || world.ledger.held.iter().any(|held| held.id == id);
        let (log, seen) = match mark {
            None => (None, None),
            Some(Mark::Slot(next, snapshot, floor)) => (Some(next), Some((snapshot, floor))),
            Some(Mark::Committed(next)) => (Some(next), None),
            Some(Mark::Seen(snapshot, floor)) => (None, Some((snapshot, floor))),
        };
        if let Some(next) = log {
            let before: Vec<usize> = self.database.log.iter().take(next).flat_map(|(_, rows)| rows.clone()).collect();
            for id in before {
                assert!(settled(self, id), "row {id} is confirmed and neither stored nor held");
            }
            self.ledger.log = Some(next);
        }
        if let Some((snapshot, floor)) = seen {
            for (id, row) in self.database.rows.iter().enumerate() {
                let done =
                    matches!(row.state, RowState::Committed | RowState::Committing) && snapshot.sees(row.transaction);
                assert!(!done || settled(self, id), "row {id} is behind the ledger and neither stored nor held");
            }
            (self.ledger.snapshot, self.ledger.floor) = (snapshot, floor.max(self.ledger.floor));
        }
        let visible = self.database.snapshot();
        self.ledger.undeleted.retain(|&id| {
            let row = &mut self.database.rows[id];
            if row.state == RowState::Committed {
                row.state = RowState::Deleted;
            }
            !visible.sees(row.transaction)
        });
        for key in freed.into_iter().map(|row| row.key).collect::<BTreeSet<_>>() {
            self.go_on(key);
        }
    }

    /// After an event of a key is held no more: the next ones of the key, or none is held.
    fn go_on(&mut self, key: u64) {
        let leader = &mut self.leader;
        if leader.loaded.iter().any(|&id| self.database.rows[id].key == key) {
            return;
        }
        let left: Vec<Row> = self.ledger.held.iter().copied().filter(|held| held.key == key).collect();
        if left.is_empty() {
            leader.keys.free(key, leader.handed.remove(&key).unwrap_or_default());
        }
        for row in left.into_iter().take(3) {
            leader.loaded.insert(row.id);
            leader.window.admit_recorded(Item { row, held: true });
        }
    }

    /// The first held event of a key is tried again.
    fn try_held(&mut self) {
        let busy: BTreeSet<u64> = self.leader.loaded.iter().map(|&id| self.database.rows[id].key).collect();
        let first = self.ledger.held.iter().find(|held| !busy.contains(&held.key)).copied();
        if let Some(row) = first {
            self.leader.loaded.insert(row.id);
            self.leader.window.admit_recorded(Item { row, held: true });
        }
    }

    /// What is in flight may still arrive; its answers are lost.
    fn lose_connection(&mut self) {
        self.sessions += 1;
        self.leader.session = self.sessions;
        self.leader.window.connection_lost();
        if self.random.random_bool(0.5) {
            self.leader.window.wake_all();
        }
        self.leader.in_flight.clear();
        if self.random.random_bool(0.3) {
            self.publishes.clear();
        }
    }

    fn time_out(&mut self) {
        if let Some(ticket) = self.leader.in_flight.pop() {
            self.leader.window.failed(ticket, self.now);
        }
    }

    /// A crash, a lost lock, a lost slot or a change of the mode: the next leader starts from what is recorded.
    fn change_leader(&mut self) {
        self.sessions += 1;
        if self.random.random_bool(0.2) {
            self.polling = !self.polling;
        }
        if self.random.random_bool(0.2) {
            self.ledger.log = None;
        }
        self.since = self.sessions;
        // a term begins by writing the ledger
        self.database.end_of_log += RECORD;
        let leader = Relay::start(&self.database, &mut self.ledger, self.polling, self.sessions, &mut self.random);
        let former = std::mem::replace(&mut self.leader, leader);
        if self.random.random_bool(0.5) {
            self.former = Some(former);
            self.two_leaders = true;
        }
    }

    /// Some ids leave the duplicate window.
    fn forget(&mut self) {
        let random = &mut self.random;
        self.remembered.retain(|_| random.random_bool(0.5));
    }

    /// No more faults: everything committed must arrive and be recorded.
    fn run_to_the_end(&mut self) {
        self.faults = false;
        while !self.database.open.is_empty() {
            self.database.end(0, true);
        }
        while !self.database.committing.is_empty() {
            self.database.make_visible(0);
        }
        for _ in 0..QUIET_STEPS {
            self.now += Duration::from_secs(1);
            self.leader.window.wake(self.now);
            self.leader.read(&self.database, &self.ledger);
            self.try_held();
            self.send();
            self.arrive();
            self.answer();
            self.record();
            // an answer was lost while faults were injected
            if self.publishes.is_empty() && self.answers.is_empty() && self.leader.window.in_flight() > 0 {
                self.leader.window.connection_lost();
            }
            // an event whose row is deleted may be in flight once more: wait for its answer too
            let done = !self.database.rows.iter().any(|row| row.state == RowState::Committed);
            if done && self.leader.window.is_empty() {
                break;
            }
        }
        let left = self.database.rows.iter().filter(|row| row.state == RowState::Committed).count();
        assert_eq!(left, 0, "events that never came");
        let held: BTreeMap<u64, u64> = self.held.iter().map(|(&key, row)| (key, row.number)).collect();
        assert_eq!(held, self.database.committed, "lost");
        assert!(self.leader.window.is_empty());
        assert_eq!(self.leader.window.in_flight(), 0);
        assert_eq!((self.ledger.held.len(), self.ledger.undeleted.len()), (0, 0));
    }
}

fn schedule(seed: u64) -> (usize, u64, u64) {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
    }
    world.run_to_the_end();
    (world.stored.len(), world.duplicates, world.runs)
}

#[test]
fn nothing_is_lost_or_reordered_in_any_schedule() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    if let Some(seed) = number("WEFT_SEED") {
        println!("seed {seed}: {:?} (events, duplicates, runs)", schedule(seed));
        return;
    }
    let (mut events, mut duplicates, mut runs) = (0, 0, 0);
    for seed in 0..number("WEFT_SEEDS").unwrap_or(10_000) {
        let Ok((stored, again, together)) = std::panic::catch_unwind(|| schedule(seed)) else {
            panic!("the schedule of seed {seed} breaks the promise: run it again with WEFT_SEED={seed}");
        };
        events += stored;
        duplicates += again;
        runs += together;
    }
    println!("{events} events, {duplicates} duplicates, {runs} runs");
    assert!(events > 0 && duplicates > 0 && runs > 0, "schedules that show nothing");
}
