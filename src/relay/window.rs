//! The acknowledgement window: decides which event may be sent, and up to which mark everything is acknowledged. Pure.
//!
//! # The order promise
//! **An event is handed out only when every earlier event of its key is acknowledged.** So at most one event of a key
//! is in flight, and whatever is sent can arrive at any time, any number of times, or never: for each key, the events
//! that the broker has stored are a prefix of what was committed, and their first occurrences are in commit order.
//!
//! This needs no assumption about the broker or the network. Pipelining within a key would: a broker may refuse event 1
//! and store event 2 (JetStream sheds load, changes its leader, fills up), and then 1 can only come after 2. JetStream
//! could fence with `Nats-Expected-Last-Msg-Id`, but only for a stream with one publisher. For the same reason a former
//! leader need not be fenced at the broker: what it still has in flight was preceded by acknowledged events only, so
//! its copies are duplicates of a prefix, or the event that follows it. The price is that a single key proceeds at one
//! event per round trip.
//!
//! # Runs
//! Where the sink can ([`super::sink::Session::longest_run`]), consecutive events of one key are handed out together, as a
//! *run* with one ticket and one answer. The promise needs one thing of the broker: of each copy of a run that arrives, it
//! stores the events in their order and none behind one that it did not store. What it has of the run is then a prefix
//! again. An event is part of a run only when it is sent for the first time: a run that was not stored as a whole, or of which
//! that is not known, is sent again one by one, which also finds the event at fault.
//!
//! Keys are 64-bit hashes: a collision reduces concurrency but never changes the order.
//!
//! # Progress
//! A mark lies between events; when everything before it is acknowledged it is *passed*. Only a passed mark may be
//! confirmed to the source. Marks that wait for the same event are merged into the last of them, so an event that is
//! blocked for hours costs no memory for the events that overtake it.
//!
//! # Refusals
//! A refused event leaves the window together with the events that wait behind it in its key: they are *held*, which the
//! caller records ([`super::held`]). So it occupies nothing, and no mark waits for it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    hash::{BuildHasherDefault, Hasher},
    time::Duration,
};

/// Limits of the window, and back-off between attempts.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Events in the window, sent or not.
    pub events: usize,
    /// Their bytes. The limits are checked before a batch is admitted, so one batch may exceed them.
    pub bytes: usize,
    /// Events in flight to the broker.
    pub in_flight: usize,
    /// Fewer events of a key than this are not sent as a run: one by one they cost the broker less.
    pub shortest_run: usize,
    /// Shortest and longest wait before an event is sent again.
    pub backoff: (Duration, Duration),
}

/// Identifies one attempt to send one event, or a run that begins with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket {
    /// The event's number since the window was created.
    pub number: u64,
    pub attempt: u32,
}

/// An event of the window.
pub trait Entry {
    /// Hash of the key within which order is kept.
    fn key(&self) -> u64;
    /// Its size in bytes.
    fn size(&self) -> usize;
}

type ByHash<V> = HashMap<u64, V, BuildHasherDefault<AlreadyHashed>>;

/// `E` are the events, `M` the marks between them. The caller provides the time, as a duration since any fixed moment.
#[derive(Debug)]
pub struct Window<E, M> {
    limits: Limits,
    /// The number of the next event.
    next: u64,
    /// Unacknowledged events by number.
    slots: ByHash<Slot<E>>,
    /// Keys that have an unacknowledged event.
    keys: ByHash<Key>,
    ready: VecDeque<u64>,
    /// Events that wait for their next attempt, ordered by its time.
    waiting: BTreeSet<(Duration, u64)>,
    in_flight: usize,
    bytes: usize,
    /// Each stretch counts the unacknowledged events between a mark and the one before it; the last stretch has no mark
    /// yet.
    stretches: BTreeMap<u64, Stretch<M>>,
    open: u64,
    passed: Option<M>,
}

#[derive(Debug)]
struct Slot<E> {
    event: E,
    key: u64,
    size: usize,
    /// `None`: no mark waits for the event.
    stretch: Option<u64>,
    state: State,
    attempt: u32,
    /// Events of the run that begins here, while it is in flight; else 1.
    run: usize,
    failures: u32,
    /// The next event of the key.
    next: Option<u64>,
}

#[derive(Debug)]
struct Key {
    tail: u64,
    events: usize,
}

#[derive(Debug)]
struct Stretch<M> {
    unacknowledged: usize,
    mark: Option<M>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waits for an unacknowledged event of its key.
    Queued,
    Ready,
    InFlight,
    /// In flight, in the run of an earlier event.
    Carried,
    /// Waits for its next attempt.
    Waiting {
        until: Duration,
    },
}

impl<E: Entry, M> Window<E, M> {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            next: 0,
            slots: HashMap::default(),
            keys: HashMap::default(),
            ready: VecDeque::new(),
            waiting: BTreeSet::new(),
            in_flight: 0,
            bytes: 0,
            stretches: BTreeMap::new(),
            open: 0,
            passed: None,
        }
    }

    /// Whether another batch may be admitted.
    pub fn has_room(&self) -> bool {
        self.slots.len() < self.limits.events && self.bytes < self.limits.bytes
    }

    /// Appends an event; the next mark waits for it.
    pub fn admit(&mut self, event: E) {
        let stretch = self.open;
        self.stretches.entry(stretch).or_insert(Stretch { unacknowledged: 0, mark: None }).unacknowledged += 1;
        self.append(event, Some(stretch));
    }

    /// Appends an event that is recorded elsewhere already, so that no mark waits for it.
    pub fn admit_recorded(&mut self, event: E) {
        self.append(event, None);
    }

    fn append(&mut self, event: E, stretch: Option<u64>) {
        let number = self.next;
        self.next += 1;
        let (hash, size) = (event.key(), event.size());
        let key = self.keys.entry(hash).or_insert(Key { tail: number, events: 0 });
        let before = std::mem::replace(&mut key.tail, number);
        key.events += 1;
        let state = if key.events == 1 { State::Ready } else { State::Queued };
        if state == State::Ready {
            self.ready.push_back(number);
        } else if let Some(slot) = self.slots.get_mut(&before) {
            slot.next = Some(number);
        }
        self.bytes += size;
        self.slots.insert(
            number,
            Slot { event, key: hash, size, stretch, state, attempt: 0, run: 1, failures: 0, next: None },
        );
    }

    /// Sets a mark after all events that are admitted so far.
    pub fn mark(&mut self, mark: M) {
        let ended = self.open;
        self.open += 1;
        self.stretches.entry(ended).or_insert(Stretch { unacknowledged: 0, mark: None }).mark = Some(mark);
        self.settle(ended);
    }

    /// The next event to send, or a run of at most `longest`, if one may be sent. They stay in the window. Returns the first one;
    /// [`Self::run`] has all.
    pub fn take(&mut self, longest: usize) -> Option<(Ticket, &mut E)> {
        let room = self.limits.in_flight.checked_sub(self.in_flight).filter(|&room| room > 0)?;
        let number = self.ready.pop_front()?;
        let run = self.run_from(number, longest.min(room));
        let mut carried = self.slots.get(&number)?.next;
        for _ in 1..run {
            let slot = carried.and_then(|number| self.slots.get_mut(&number))?;
            slot.state = State::Carried;
            slot.attempt += 1;
            carried = slot.next;
        }
        self.in_flight += run;
        let slot = self.slots.get_mut(&number)?;
        slot.state = State::InFlight;
        slot.run = run;
        slot.attempt += 1;
        Some((Ticket { number, attempt: slot.attempt }, &mut slot.event))
    }

    /// How many events from `number` on, which is the first of its key, are sent together.
    fn run_from(&self, number: u64, longest: usize) -> usize {
        let slots = std::iter::successors(self.slots.get(&number), |slot| self.slots.get(&slot.next?));
        if longest < self.limits.shortest_run {
            return 1;
        }
        let run = slots.take(longest).take_while(|slot| slot.attempt == 0).count();
        if run < self.limits.shortest_run { 1 } else { run }
    }

    /// The events that are in flight by this ticket, in their order.
    pub fn run(&self, ticket: Ticket) -> impl Iterator<Item = &E> {
        let first = self.slots.get(&ticket.number);
        let slots = std::iter::successors(first, |slot| self.slots.get(&slot.next?));
        slots.take(first.map_or(0, |slot| slot.run)).map(|slot| &slot.event)
    }

    /// The broker has stored the event, or the whole run; the acknowledgement of any attempt counts. The events are appended to
    /// `events` the first time.
    pub fn acknowledged(&mut self, ticket: Ticket, events: &mut Vec<E>) {
        let number = ticket.number;
        let Some(&Slot { state, run, .. }) = self.slots.get(&number) else { return };
        match state {
            // a ticket that was never issued
            State::Queued | State::Carried => return,
            State::InFlight => self.in_flight -= run,
            State::Ready => self.ready.retain(|&ready| ready != number),
            State::Waiting { until } => {
                self.waiting.remove(&(until, number));
            }
        }
        let mut next = Some(number);
        // a run is a first attempt, so that this is its own answer
        for _ in 0..run {
            let Some(slot) = next.and_then(|number| self.slots.remove(&number)) else { break };
            next = slot.next;
            events.push(self.leave(slot));
        }
        if let Some(next) = next {
            self.make_ready(next);
        }
    }

    /// Removes an event and all behind it in its key, in their order: they are recorded as held. Nothing when the
    /// attempt is not the current one, or was a run, which is sent again one by one.
    pub fn hold(&mut self, ticket: Ticket) -> Vec<E> {
        let mut held = Vec::new();
        if !self.is_in_flight(ticket) || self.split(ticket) {
            return held;
        }
        self.in_flight -= 1;
        let mut next = Some(ticket.number);
        while let Some(slot) = next.and_then(|number| self.slots.remove(&number)) {
            next = slot.next;
            held.push(self.leave(slot));
        }
        held
    }

    /// The rest of an event's removal: its key, its bytes, and the mark that waits for it.
    fn leave(&mut self, slot: Slot<E>) -> E {
        self.bytes -= slot.size;
        if let Some(key) = self.keys.get_mut(&slot.key) {
            key.events -= 1;
            if key.events == 0 {
                self.keys.remove(&slot.key);
            }
        }
        if let Some(id) = slot.stretch
            && let Some(stretch) = self.stretches.get_mut(&id)
        {
            stretch.unacknowledged -= 1;
            self.settle(id);
        }
        slot.event
    }

    /// The attempt failed, or its outcome is unknown: the event is sent again after a back-off, and its key waits with
    /// it. `false` when that does not count as a failure: it is not the current attempt, or it was a run, which is sent again one by
    /// one and at once.
    pub fn failed(&mut self, ticket: Ticket, now: Duration) -> bool {
        let (shortest, longest) = self.limits.backoff;
        if self.split(ticket) {
            return false;
        }
        let Some(slot) = self.attempt(ticket) else { return false };
        slot.failures += 1;
        let wait = shortest.saturating_mul(1 << slot.failures.saturating_sub(1).min(16)).min(longest);
        let until = now + wait;
        slot.state = State::Waiting { until };
        self.in_flight -= 1;
        self.waiting.insert((until, ticket.number));
        true
    }

    /// Ends the attempt if it is a run: its first event is ready, and the others wait behind it. `false`: it is none.
    fn split(&mut self, ticket: Ticket) -> bool {
        let Some(&mut Slot { run, .. }) = self.attempt(ticket) else { return false };
        if run == 1 {
            return false;
        }
        self.in_flight -= run;
        self.end_run(ticket.number);
        self.ready.push_back(ticket.number);
        true
    }

    /// The events of a run that is no longer in flight: the first one is ready, the others wait for it.
    fn end_run(&mut self, first: u64) {
        let run = self.slots.get(&first).map_or(0, |slot| slot.run);
        let mut next = Some(first);
        for place in 0..run {
            let Some(slot) = next.and_then(|number| self.slots.get_mut(&number)) else { break };
            slot.state = if place == 0 { State::Ready } else { State::Queued };
            slot.run = 1;
            next = slot.next;
        }
    }

    /// How often the event has failed.
    pub fn failures(&self, ticket: Ticket) -> u32 {
        self.slots.get(&ticket.number).map_or(0, |slot| slot.failures)
    }

    /// The connection is lost: events in flight may have arrived or not, and are sent again, the oldest first.
    pub fn connection_lost(&mut self) {
        let in_flight = self.slots.iter().filter(|(_, slot)| slot.state == State::InFlight);
        let mut again: Vec<u64> = in_flight.map(|(&number, _)| number).collect();
        again.sort_unstable();
        self.in_flight = 0;
        for number in again.into_iter().rev() {
            self.end_run(number);
            self.ready.push_front(number);
        }
    }

    /// Makes the events ready whose wait is over, and returns when the next wait is over.
    pub fn wake(&mut self, now: Duration) -> Option<Duration> {
        while let Some(&(until, number)) = self.waiting.first() {
            if until > now {
                return Some(until);
            }
            self.waiting.pop_first();
            self.make_ready(number);
        }
        None
    }

    /// Ends every wait at once, because there is a new connection.
    pub fn wake_all(&mut self) {
        for (_until, number) in std::mem::take(&mut self.waiting) {
            self.make_ready(number);
        }
    }

    /// The last passed mark, if there is a new one since the last call.
    pub fn passed(&mut self) -> Option<M> {
        self.passed.take()
    }

    /// Whether the attempt is the current one and has no answer yet.
    pub fn is_in_flight(&self, ticket: Ticket) -> bool {
        let current = |slot: &Slot<E>| slot.state == State::InFlight && slot.attempt == ticket.attempt;
        self.slots.get(&ticket.number).is_some_and(current)
    }

    /// The oldest unacknowledged event. Iterates over all of them.
    pub fn oldest(&self) -> Option<&E> {
        self.slots.iter().min_by_key(|&(&number, _)| number).map(|(_, slot)| &slot.event)
    }

    /// The unacknowledged events, in no order.
    pub fn entries(&self) -> impl Iterator<Item = &E> {
        self.slots.values().map(|slot| &slot.event)
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Number of events that are admitted and not acknowledged.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// A stretch with a mark and without unacknowledged events is passed if it is the first one, else merged into the
    /// one before it.
    fn settle(&mut self, id: u64) {
        let complete = |stretch: &Stretch<M>| stretch.unacknowledged == 0 && stretch.mark.is_some();
        if !self.stretches.get(&id).is_some_and(complete) {
            return;
        }
        let mark = self.stretches.remove(&id).and_then(|stretch| stretch.mark);
        match self.stretches.range_mut(..id).next_back() {
            Some((_, before)) => before.mark = mark,
            None => self.passed = mark,
        }
    }

    fn attempt(&mut self, ticket: Ticket) -> Option<&mut Slot<E>> {
        let slot = self.slots.get_mut(&ticket.number)?;
        (slot.state == State::InFlight && slot.attempt == ticket.attempt).then_some(slot)
    }

    fn make_ready(&mut self, number: u64) {
        if let Some(slot) = self.slots.get_mut(&number) {
            slot.state = State::Ready;
            self.ready.push_back(number);
        }
    }
}

/// A hasher for keys that are hashes already, and for dense numbers.
#[derive(Debug, Default)]
struct AlreadyHashed(u64);

impl Hasher for AlreadyHashed {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    fn write_u64(&mut self, number: u64) {
        // the hash table uses the top bits too: spread dense numbers over all bits (Fibonacci hashing)
        self.0 = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
