//! Which event is delivered next: pure, with the time as a parameter.
//!
//! Events come in the order of the stream. Those of one key are delivered one after the other, those of different keys side by
//! side. The position before which everything is settled ([`Queue::floor`]) is what may be recorded.
//!
//! # When nothing succeeds
//! A service that is away, or whose path does not exist, fails at every event, which is no event's fault. After
//! [`FAILURES`] failures in a row one event at a time is tried, with growing pauses, until one succeeds; and a failure counts
//! as an event's own only if another event was handled since the attempt before.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, VecDeque},
    time::Duration,
};

use tokio::time::Instant;

/// Events that are read ahead of the oldest one that is not settled, and their bytes.
const MAX_EVENTS: usize = 2_048;
const MAX_BYTES: usize = 8 << 20;
/// Failures in a row, with no success in between, after which one event at a time is tried.
const FAILURES: u32 = 10;
/// Pause between two such attempts: the shortest, doubled each time, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Pause before a failed event is delivered again: the shortest, doubled each time, and the longest.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(250), Duration::from_mins(1));
/// After so many failures an event, and those behind it, are held: they leave the window, so that it has room for others.
pub(super) const HOLD_AFTER: u32 = 4;

/// Pause before an event is delivered again that has failed `failures` times.
pub(super) fn backoff(failures: u32) -> Duration {
    let doubled = BACKOFF.0.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled.min(BACKOFF.1)
}

/// Whether the service handles anything at all.
#[derive(Debug, Default)]
pub(super) struct Circuit {
    successes: u64,
    /// Since the last success.
    failures: u32,
    until: Option<Instant>,
}

impl Circuit {
    pub(super) fn succeeded(&mut self) {
        self.successes += 1;
        (self.failures, self.until) = (0, None);
    }

    pub(super) fn failed(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        if let Some(more) = self.failures.checked_sub(FAILURES) {
            self.until = Some(now + PAUSE.0.saturating_mul(1 << more.min(8)).min(PAUSE.1));
        }
    }

    /// Nothing succeeds: see the module.
    pub(super) fn is_open(&self) -> bool {
        self.until.is_some()
    }

    /// When the next attempt may begin, while nothing succeeds.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// How often the service has handled an event: what an attempt compares its beginning with.
    pub(super) fn successes(&self) -> u64 {
        self.successes
    }

    /// Whether one more delivery may begin, beside those on the way.
    pub(super) fn admits(&self, on_the_way: usize, now: Instant) -> bool {
        self.until.is_none_or(|until| on_the_way == 0 && until <= now)
    }
}

#[derive(Debug)]
struct Entry<T> {
    event: T,
    key: u64,
    size: usize,
}

/// Of a key that has events in the window.
#[derive(Debug)]
struct Key {
    /// Sequences, in order.
    waiting: VecDeque<u64>,
    on_the_way: bool,
    /// When the first one may be delivered.
    due: Instant,
    /// Of the first one: deliveries in vain, and those of them that count.
    failures: u32,
    attempts: u32,
    /// Successes of the subscription when it was last tried.
    successes: u64,
}

/// What becomes of an event that was delivered in vain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failed {
    /// It is delivered again.
    Again,
    /// It and those behind it are to be held; so many of its attempts count.
    Hold { attempts: u32 },
    /// It is to become a dead letter.
    Dead { attempts: u32 },
}

#[derive(Debug)]
pub(super) struct Queue<T> {
    max_attempts: u32,
    events: BTreeMap<u64, Entry<T>>,
    keys: HashMap<u64, Key>,
    /// Keys whose first event waits to be delivered.
    due: BTreeSet<(Instant, u64)>,
    bytes: usize,
    /// Behind everything that was received.
    next: u64,
    /// What is settled behind the floor: at most as many as the window is wide.
    settled: BTreeSet<u64>,
    on_the_way: usize,
}

impl<T> Queue<T> {
    /// Begins at `next`; of what follows, `settled` is settled already.
    pub(super) fn new(next: u64, settled: impl IntoIterator<Item = u64>, max_attempts: u32) -> Self {
        Self {
            max_attempts,
            settled: settled.into_iter().collect(),
            events: BTreeMap::new(),
            keys: HashMap::new(),
            due: BTreeSet::new(),
            bytes: 0,
            next,
            on_the_way: 0,
        }
    }

    /// Everything before it is settled.
    pub(super) fn floor(&self) -> u64 {
        self.events.first_key_value().map_or(self.next, |(sequence, _)| *sequence)
    }

    /// Of what comes behind the floor, what is settled already.
    pub(super) fn settled(&self) -> impl Iterator<Item = u64> {
        self.settled.range(self.floor()..).copied()
    }

    pub(super) fn is_settled(&self, sequence: u64) -> bool {
        self.settled.contains(&sequence)
    }

    /// Whether more may be received. While there is no event whose end would make room there must be some: what is settled may be all
    /// from a former life, and the events between it not be received yet.
    pub(super) fn has_room(&self) -> bool {
        self.events.is_empty() || (self.events.len() + self.settled.len() < MAX_EVENTS && self.bytes < MAX_BYTES)
    }

    /// `sequence` left the window, and needs nothing any more.
    fn note_settled(&mut self, sequence: u64) {
        self.settled.insert(sequence);
        let floor = self.floor();
        while self.settled.first().is_some_and(|first| *first < floor) {
            self.settled.pop_first();
        }
    }

    /// Events that are not settled.
    pub(super) fn len(&self) -> usize {
        self.events.len()
    }

    #[cfg(test)]
    pub(super) fn on_the_way(&self) -> usize {
        self.on_the_way
    }

    /// The oldest event.
    pub(super) fn oldest(&self) -> Option<&T> {
        self.events.first_key_value().map(|(_, entry)| &entry.event)
    }

    /// No event of the key is in the window.
    pub(super) fn is_idle(&self, key: u64) -> bool {
        !self.keys.contains_key(&key)
    }

    /// Everything up to `sequence` was received; what is not pushed needs nothing.
    pub(super) fn received(&mut self, sequence: u64) {
        self.next = self.next.max(sequence + 1);
    }

    /// `sequence` is above those before.
    pub(super) fn push(&mut self, sequence: u64, key: u64, size: usize, event: T, now: Instant) {
        self.received(sequence);
        self.bytes += size;
        self.events.insert(sequence, Entry { event, key, size });
        let of_key = self.keys.entry(key).or_insert_with(|| {
            self.due.insert((now, key));
            Key { waiting: VecDeque::new(), on_the_way: false, due: now, failures: 0, attempts: 0, successes: 0 }
        });
        of_key.waiting.push_back(sequence);
    }

    /// The next event to be delivered, which is on the way from then on.
    pub(super) fn take(&mut self, circuit: &Circuit, now: Instant) -> Option<(u64, &T)> {
        let &(due, key) = self.due.first()?;
        if due > now {
            return None;
        }
        self.due.pop_first();
        let of_key = self.keys.get_mut(&key)?;
        of_key.on_the_way = true;
        if of_key.failures == 0 {
            of_key.successes = circuit.successes();
        }
        let sequence = *of_key.waiting.front()?;
        self.on_the_way += 1;
        self.events.get(&sequence).map(|entry| (sequence, &entry.event))
    }

    /// When there may be something to take.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(due, _)| *due)
    }

    /// The event is settled: handled, or recorded as a dead letter. The next one of its key follows.
    pub(super) fn settle(&mut self, sequence: u64, now: Instant) -> Option<T> {
        let entry = self.events.remove(&sequence)?;
        self.bytes -= entry.size;
        self.note_settled(sequence);
        if let Some(of_key) = self.keys.get_mut(&entry.key) {
            of_key.waiting.retain(|waiting| *waiting != sequence);
            self.on_the_way -= usize::from(std::mem::take(&mut of_key.on_the_way));
            (of_key.failures, of_key.attempts, of_key.due) = (0, 0, now);
            if of_key.waiting.is_empty() {
                self.keys.remove(&entry.key);
            } else {
                self.due.insert((now, entry.key));
            }
        }
        Some(entry.event)
    }

    /// The event was delivered in vain; of the circuit this is known already. It stays on the way until it is settled or
    /// removed, unless it is to be delivered again.
    pub(super) fn fail(&mut self, sequence: u64, circuit: &Circuit, now: Instant) -> Failed {
        let key = self.events.get(&sequence).map(|entry| entry.key);
        let Some((key, of_key)) = key.and_then(|key| Some((key, self.keys.get_mut(&key)?))) else {
            return Failed::Again;
        };
        of_key.failures += 1;
        of_key.attempts += u32::from(circuit.successes() > of_key.successes);
        of_key.successes = circuit.successes();
        let attempts = of_key.attempts;
        if attempts >= self.max_attempts {
            return Failed::Dead { attempts };
        }
        if of_key.failures >= HOLD_AFTER {
            return Failed::Hold { attempts };
        }
        of_key.due = now + backoff(of_key.failures);
        of_key.on_the_way = false;
        self.on_the_way -= 1;
        self.due.insert((of_key.due, key));
        Failed::Again
    }

    /// The events of the key of `sequence`, in their order: they leave the window.
    pub(super) fn remove_key_of(&mut self, sequence: u64) -> Vec<(u64, T)> {
        let Some(key) = self.events.get(&sequence).map(|entry| entry.key) else { return Vec::new() };
        let Some(of_key) = self.keys.remove(&key) else { return Vec::new() };
        self.due.remove(&(of_key.due, key));
        self.on_the_way -= usize::from(of_key.on_the_way);
        let mut removed = Vec::new();
        for sequence in of_key.waiting {
            if let Some(entry) = self.events.remove(&sequence) {
                self.bytes -= entry.size;
                self.note_settled(sequence);
                removed.push((sequence, entry.event));
            }
        }
        removed
    }
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng, rngs::StdRng};

    use super::*;

    fn queue(max_attempts: u32) -> (Queue<u64>, Circuit, Instant) {
        (Queue::new(1, [], max_attempts), Circuit::default(), Instant::now())
    }

    fn take(queue: &mut Queue<u64>, circuit: &Circuit, now: Instant) -> Option<u64> {
        queue.take(circuit, now).map(|(sequence, _)| sequence)
    }

    #[test]
    fn events_of_one_key_come_one_after_the_other_and_others_beside_them() {
        let (mut queue, circuit, now) = queue(5);
        for (sequence, key) in [(1, 7), (2, 7), (4, 8)] {
            queue.push(sequence, key, 1, sequence, now);
        }
        assert_eq!([(); 3].map(|()| take(&mut queue, &circuit, now)), [Some(1), Some(4), None]);
        queue.settle(4, now);
        assert_eq!(queue.floor(), 1, "what is behind an open event may not be recorded");
        assert_eq!(queue.settled().collect::<Vec<_>>(), [4], "and need not come again");
        queue.settle(1, now);
        assert_eq!((take(&mut queue, &circuit, now), queue.floor()), (Some(2), 2));
        queue.settle(2, now);
        assert_eq!((queue.floor(), queue.len(), queue.bytes, queue.on_the_way), (5, 0, 0, 0));
        assert!(queue.settled.is_empty() && !queue.is_settled(4));
        assert!(Queue::<()>::new(3, [5], 1).is_settled(5));
        queue.received(9);
        assert_eq!(queue.floor(), 10);
    }

    /// A former life left one event open, and a full window behind it settled: nothing but reading on brings the open one.
    #[test]
    fn a_queue_that_begins_with_a_full_window_reads_on() {
        let (now, last) = (Instant::now(), 2 + MAX_EVENTS as u64);
        let mut queue = Queue::new(1, 2..=last, 5);
        assert!(queue.has_room(), "the open event is never read");
        queue.push(1, 7, 1, 1, now);
        queue.received(last);
        assert!(!queue.has_room(), "the window is full until its oldest event is settled");
        assert_eq!(take(&mut queue, &Circuit::default(), now), Some(1));
        queue.settle(1, now);
        assert_eq!((queue.has_room(), queue.floor(), queue.settled().count()), (true, last + 1, 0));
    }

    #[test]
    fn a_failure_counts_only_if_another_event_was_handled() {
        let (mut queue, mut circuit, mut now) = queue(2);
        queue.push(1, 7, 1, 1, now);
        let mut fail = |circuit: &mut Circuit| {
            now += BACKOFF.1;
            assert_eq!(take(&mut queue, circuit, now), Some(1));
            circuit.failed(now);
            queue.fail(1, circuit, now)
        };
        assert_eq!(fail(&mut circuit), Failed::Again);
        circuit.succeeded();
        assert_eq!(fail(&mut circuit), Failed::Again, "one attempt counts");
        assert_eq!(fail(&mut circuit), Failed::Again);
        circuit.succeeded();
        assert_eq!(fail(&mut circuit), Failed::Dead { attempts: 2 });
    }

    #[test]
    fn what_fails_again_and_again_is_held_with_what_is_behind_it() {
        let (mut queue, mut circuit, mut now) = queue(99);
        for (sequence, key) in [(1, 7), (2, 7), (3, 8)] {
            queue.push(sequence, key, 1, sequence, now);
        }
        for failure in 1..=HOLD_AFTER {
            while take(&mut queue, &circuit, now) != Some(1) {}
            circuit.failed(now);
            let expected = if failure == HOLD_AFTER { Failed::Hold { attempts: 0 } } else { Failed::Again };
            assert_eq!(queue.fail(1, &circuit, now), expected);
            now += BACKOFF.1;
        }
        assert_eq!(queue.remove_key_of(1), [(1, 1), (2, 2)]);
        assert_eq!((queue.floor(), queue.on_the_way(), queue.is_idle(7)), (3, 1, true));
    }

    #[test]
    fn a_service_that_fails_at_everything_is_tried_with_one_event_at_a_time() {
        let (mut circuit, mut now) = (Circuit::default(), Instant::now());
        for _ in 1..FAILURES {
            circuit.failed(now);
        }
        assert!(!circuit.is_open() && circuit.admits(60, now));
        for pause in [500, 1_000, 2_000, 4_000, 8_000, 10_000, 10_000].map(Duration::from_millis) {
            circuit.failed(now);
            assert!(circuit.is_open() && !circuit.admits(0, now + pause / 2));
            now += pause;
            assert!(circuit.admits(0, now) && !circuit.admits(1, now));
        }
        circuit.succeeded();
        assert!(!circuit.is_open() && circuit.admits(60, now));
    }

    /// Every event is settled once, those of a key in their order, whatever fails; the floor never passes an open one.
    #[test]
    fn no_event_is_forgotten_or_overtaken_whatever_fails() {
        for seed in 0..400 {
            let mut random = StdRng::seed_from_u64(seed);
            let (mut queue, mut circuit, mut now) = queue(random.random_range(1..6));
            let (mut open, mut last, mut on_the_way) = (BTreeSet::new(), HashMap::new(), Vec::new());
            let mut sequence = 0;
            let key_of = |sequence: u64| sequence.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 61;
            let mut settled = |sequence: u64, open: &mut BTreeSet<u64>| {
                assert!(open.remove(&sequence), "seed {seed}: {sequence} is settled twice");
                let before = last.insert(key_of(sequence), sequence).unwrap_or_default();
                assert!(before < sequence, "seed {seed}: {sequence} after {before}");
            };
            while sequence < 200 || !open.is_empty() {
                now += Duration::from_millis(random.random_range(0..800));
                if sequence < 200 && random.random_bool(0.4) {
                    sequence += random.random_range(1..3);
                    queue.push(sequence, key_of(sequence), 10, sequence, now);
                    open.insert(sequence);
                }
                if circuit.admits(queue.on_the_way(), now)
                    && let Some(taken) = take(&mut queue, &circuit, now)
                {
                    assert!(open.contains(&taken), "seed {seed}");
                    on_the_way.push(taken);
                }
                if on_the_way.is_empty() || random.random_bool(0.5) {
                    continue;
                }
                let ended = on_the_way.swap_remove(random.random_range(0..on_the_way.len()));
                if random.random_bool(0.6) {
                    circuit.succeeded();
                    assert!(queue.settle(ended, now).is_some(), "seed {seed}");
                    settled(ended, &mut open);
                } else {
                    circuit.failed(now);
                    match queue.fail(ended, &circuit, now) {
                        Failed::Again => {}
                        Failed::Dead { .. } => {
                            queue.settle(ended, now);
                            settled(ended, &mut open);
                        }
                        Failed::Hold { .. } => {
                            for (held, _) in queue.remove_key_of(ended) {
                                settled(held, &mut open);
                            }
                        }
                    }
                }
                let floor = open.first().copied().unwrap_or(sequence + 1);
                assert!(queue.floor() == floor, "seed {seed}: {} is not {floor}", queue.floor());
                assert_eq!(queue.on_the_way(), on_the_way.len(), "seed {seed}");
                assert!(queue.settled().all(|settled| settled > floor && !open.contains(&settled)), "seed {seed}");
            }
            assert_eq!((queue.len(), queue.bytes), (0, 0), "seed {seed}");
        }
    }
}
