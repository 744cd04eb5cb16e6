//! The queue of what is to be reconciled: each key at most once, never twice at the same time, each at its time, and of those
//! that are due the ones first that a person waits for.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::Notify, time::Instant};

use crate::controllers::resources::key::Key;

/// Why a key is to be reconciled. Of the keys that are due, those of the highest priority come first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Nothing is known to have changed: the first list of a watch, a periodic resync.
    Resync,
    /// A child, a pod or another object changed, or the time has come that an earlier reconcile asked for.
    Event,
    /// Somebody made, changed or deleted the object itself, and waits for the answer.
    SpecChange,
}

/// Every so many keys the lowest priority that has a due key gets a turn, so that none of them waits for ever.
const TURN_OF_THE_LAST: u32 = 8;

/// Keys with the time at which each is due.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Mutex<Waiting>,
    changed: Notify,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Asked {
    at: Instant,
    priority: Priority,
}

impl Asked {
    /// Both in one: the earlier time and the higher priority.
    fn and(self, other: Self) -> Self {
        Self { at: self.at.min(other.at), priority: self.priority.max(other.priority) }
    }
}

#[derive(Debug, Default)]
struct Waiting {
    /// Not yet due.
    later: BTreeSet<(Instant, Key)>,
    /// Due: of each priority that has such keys, in the order in which they became so.
    due: BTreeMap<Priority, BTreeSet<(Instant, Key)>>,
    asked: HashMap<Key, Asked>,
    running: HashSet<Key>,
    /// Asked for while running.
    again: HashMap<Key, Asked>,
    turns: u32,
}

impl Queue {
    /// Asks for `key` to be reconciled at `at`. If it waits already, the earlier time and the higher priority count.
    pub fn add(&self, key: Key, at: Instant, priority: Priority) {
        self.lock().add(key, Asked { at, priority });
        self.changed.notify_one();
    }

    /// The next key, once one is due. It counts as running until [`Queue::done`].
    ///
    /// One caller at a time.
    pub async fn next(&self) -> Key {
        loop {
            let changed = self.changed.notified();
            let wake = match self.lock().take(Instant::now()) {
                Next::Due(key) => return key,
                Next::At(instant) => Some(instant),
                Next::Nothing => None,
            };
            match wake {
                Some(instant) => tokio::select! { () = changed => {} () = tokio::time::sleep_until(instant) => {} },
                None => changed.await,
            }
        }
    }

    /// `key` is no longer running; what was asked for meanwhile waits from now on.
    pub fn done(&self, key: &Key) {
        let mut waiting = self.lock();
        waiting.running.remove(key);
        if let Some(asked) = waiting.again.remove(key) {
            waiting.add(key.clone(), asked);
            self.changed.notify_one();
        }
    }

    /// How many keys wait or run.
    pub fn len(&self) -> usize {
        let waiting = self.lock();
        waiting.asked.len() + waiting.running.len()
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Next {
    Due(Key),
    At(Instant),
    Nothing,
}

impl Waiting {
    fn add(&mut self, key: Key, asked: Asked) {
        if self.running.contains(&key) {
            let known = self.again.entry(key).or_insert(asked);
            *known = known.and(asked);
            return;
        }
        let Some(known) = self.asked.get(&key).copied() else {
            self.later.insert((asked.at, key.clone()));
            self.asked.insert(key, asked);
            return;
        };
        let both = known.and(asked);
        if both == known {
            return;
        }
        let place = (known.at, key.clone());
        if self.later.remove(&place) {
            self.later.insert((both.at, key.clone()));
        } else {
            self.leave(known.priority, &place);
            self.due.entry(both.priority).or_default().insert((both.at, key.clone()));
        }
        self.asked.insert(key, both);
    }

    fn leave(&mut self, priority: Priority, place: &(Instant, Key)) {
        if let Some(lane) = self.due.get_mut(&priority) {
            lane.remove(place);
            if lane.is_empty() {
                self.due.remove(&priority);
            }
        }
    }

    fn take(&mut self, now: Instant) -> Next {
        self.become_due(now);
        self.turns = self.turns.wrapping_add(1);
        let turn = if self.turns.is_multiple_of(TURN_OF_THE_LAST) {
            self.due.first_key_value()
        } else {
            self.due.last_key_value()
        };
        let Some((priority, place)) = turn.and_then(|(priority, lane)| Some((*priority, lane.first()?.clone()))) else {
            return self.later.first().map_or(Next::Nothing, |(at, _)| Next::At(*at));
        };
        self.leave(priority, &place);
        let (_, key) = place;
        self.asked.remove(&key);
        self.running.insert(key.clone());
        Next::Due(key)
    }

    fn become_due(&mut self, now: Instant) {
        while self.later.first().is_some_and(|(at, _)| *at <= now) {
            let Some((at, key)) = self.later.pop_first() else { return };
            if let Some(asked) = self.asked.get(&key) {
                self.due.entry(asked.priority).or_default().insert((at, key));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::controllers::resources::key::ObjectKind;

    fn key(name: &str) -> Key {
        Key::new(ObjectKind::Microservice, "shop", name)
    }

    async fn next(queue: &Queue) -> String {
        let key = queue.next().await;
        queue.done(&key);
        key.id.name.to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn keys_come_when_they_are_due_and_once() {
        let (queue, start) = (Queue::default(), Instant::now());
        queue.add(key("late"), start + Duration::from_secs(5), Priority::Event);
        queue.add(key("soon"), start + Duration::from_secs(1), Priority::Event);
        queue.add(key("late"), start + Duration::from_secs(2), Priority::Event);
        queue.add(key("soon"), start + Duration::from_secs(9), Priority::Event);
        assert_eq!((queue.next().await, start.elapsed()), (key("soon"), Duration::from_secs(1)));
        assert_eq!((queue.next().await, start.elapsed()), (key("late"), Duration::from_secs(2)));
        queue.done(&key("soon"));
        queue.done(&key("late"));
        assert_eq!(queue.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_never_runs_twice_at_the_same_time() {
        let (queue, start) = (Queue::default(), Instant::now());
        queue.add(key("orders"), start, Priority::Event);
        assert_eq!(queue.next().await, key("orders"));
        queue.add(key("orders"), start, Priority::Event);
        queue.add(key("other"), start + Duration::from_secs(1), Priority::Event);
        assert_eq!(queue.next().await, key("other"));
        queue.done(&key("orders"));
        assert_eq!(queue.next().await, key("orders"));
    }

    #[tokio::test(start_paused = true)]
    async fn an_edit_comes_before_a_backlog_that_was_there_first() {
        let (queue, start) = (Queue::default(), Instant::now());
        for number in 0..10_000 {
            let priority = if number % 2 == 0 { Priority::Event } else { Priority::Resync };
            queue.add(key(&format!("service-{number}")), start, priority);
        }
        assert_eq!(next(&queue).await, "service-0");
        tokio::time::advance(Duration::from_secs(1)).await;
        queue.add(key("edited"), Instant::now(), Priority::SpecChange);
        assert_eq!(next(&queue).await, "edited");
        // one that waits already moves to the front
        queue.add(key("service-9999"), Instant::now(), Priority::SpecChange);
        assert_eq!(next(&queue).await, "service-9999");
        assert_eq!(queue.len(), 9_998);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_waits_for_ever_behind_edits() {
        let (queue, start) = (Queue::default(), Instant::now());
        queue.add(key("resync"), start, Priority::Resync);
        for edit in 0..20 {
            queue.add(key(&format!("edit-{edit:02}")), start, Priority::SpecChange);
        }
        let mut order = Vec::new();
        while queue.len() > 0 {
            order.push(next(&queue).await);
        }
        let place = order.iter().position(|name| name == "resync");
        assert!(place.is_some_and(|place| place < 8), "{order:?}");
        assert_eq!(order.len(), 21);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_asked_for_while_it_runs_keeps_its_priority() {
        let (queue, start) = (Queue::default(), Instant::now());
        queue.add(key("orders"), start, Priority::Event);
        assert_eq!(queue.next().await, key("orders"));
        queue.add(key("backlog"), start, Priority::Event);
        queue.add(key("orders"), start + Duration::from_secs(1), Priority::Event);
        queue.add(key("orders"), start, Priority::SpecChange);
        queue.done(&key("orders"));
        assert_eq!(next(&queue).await, "orders");
    }
}
