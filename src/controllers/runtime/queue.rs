//! The queue of what is to be reconciled: each key at most once, never twice at the same time, each at its time.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::{sync::Notify, time::Instant};

use crate::controllers::resources::key::Key;

/// Keys with the time at which each is due.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Mutex<Waiting>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    by_time: BTreeSet<(Instant, Key)>,
    due: HashMap<Key, Instant>,
    running: HashSet<Key>,
    /// Asked for while running.
    again: HashMap<Key, Instant>,
}

impl Queue {
    /// Asks for `key` to be reconciled at `at`. If it waits already, the earlier time counts.
    pub fn add(&self, key: Key, at: Instant) {
        self.lock().add(key, at);
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
        if let Some(at) = waiting.again.remove(key) {
            waiting.add(key.clone(), at);
            self.changed.notify_one();
        }
    }

    /// How many keys wait or run.
    pub fn len(&self) -> usize {
        let waiting = self.lock();
        waiting.due.len() + waiting.running.len()
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
    fn add(&mut self, key: Key, at: Instant) {
        if self.running.contains(&key) {
            let asked = self.again.entry(key).or_insert(at);
            *asked = (*asked).min(at);
            return;
        }
        if let Some(known) = self.due.get(&key).copied() {
            if known <= at {
                return;
            }
            self.by_time.remove(&(known, key.clone()));
        }
        self.by_time.insert((at, key.clone()));
        self.due.insert(key, at);
    }

    fn take(&mut self, now: Instant) -> Next {
        let Some((at, key)) = self.by_time.first().cloned() else { return Next::Nothing };
        if at > now {
            return Next::At(at);
        }
        self.by_time.pop_first();
        self.due.remove(&key);
        self.running.insert(key.clone());
        Next::Due(key)
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

    #[tokio::test(start_paused = true)]
    async fn keys_come_when_they_are_due_and_once() {
        let (queue, start) = (Queue::default(), Instant::now());
        queue.add(key("late"), start + Duration::from_secs(5));
        queue.add(key("soon"), start + Duration::from_secs(1));
        queue.add(key("late"), start + Duration::from_secs(2));
        queue.add(key("soon"), start + Duration::from_secs(9));
        assert_eq!((queue.next().await, start.elapsed()), (key("soon"), Duration::from_secs(1)));
        assert_eq!((queue.next().await, start.elapsed()), (key("late"), Duration::from_secs(2)));
        queue.done(&key("soon"));
        queue.done(&key("late"));
        assert_eq!(queue.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_key_never_runs_twice_at_the_same_time() {
        let (queue, start) = (Queue::default(), Instant::now());
        queue.add(key("orders"), start);
        assert_eq!(queue.next().await, key("orders"));
        queue.add(key("orders"), start);
        queue.add(key("other"), start + Duration::from_secs(1));
        assert_eq!(queue.next().await, key("other"));
        queue.done(&key("orders"));
        assert_eq!(queue.next().await, key("orders"));
    }
}
