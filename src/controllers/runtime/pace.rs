//! How often an object's status may be written: what a person waits for at once, numbers that move every 10 s.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::controllers::resources::key::Key;

/// Shortest time between two writes of numbers; and the time in which one more immediate write is earned.
pub const PACE: Duration = Duration::from_secs(10);
/// Immediate writes (a condition moved) in a row, so that a rollout is reported as it proceeds but a flapping pod is not.
const BURST: u32 = 6;

/// What a new status brings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum News {
    /// The first status of a spec: whoever applied it waits for it, and it comes no more often than they apply.
    Answer,
    /// A condition moved.
    Condition,
    Numbers,
}

#[derive(Debug, Default)]
pub struct StatusPace(Mutex<HashMap<Key, Spent>>);

#[derive(Clone, Copy, Debug)]
struct Spent {
    last: Instant,
    /// Immediate writes used up, as of `last`.
    used: f64,
}

impl StatusPace {
    /// `Ok`: write now (and it counts as written). `Err`: not before that time.
    pub fn enter(&self, key: &Key, news: News, now: Instant) -> Result<(), Instant> {
        let mut spent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = spent.get(key).copied().filter(|_| news != News::Answer);
        let used = match known {
            None => 0.0,
            Some(Spent { last, used }) => {
                let earned = now.duration_since(last).as_secs_f64() / PACE.as_secs_f64();
                let used = (used - earned).max(0.0);
                let may = if news == News::Numbers { earned >= 1.0 } else { used + 1.0 <= f64::from(BURST) };
                if !may {
                    return Err(last + PACE);
                }
                used
            }
        };
        spent.insert(key.clone(), Spent { last: now, used: used + 1.0 });
        Ok(())
    }

    /// When numbers may be written next.
    pub fn next(&self, key: &Key, now: Instant) -> Instant {
        let spent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        spent.get(key).map_or(now, |known| (known.last + PACE).max(now))
    }

    pub fn forget(&self, key: &Key) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::resources::key::ObjectKind;

    #[tokio::test(start_paused = true)]
    async fn numbers_are_written_at_their_pace_and_conditions_at_once_within_bounds() {
        let (gate, key, start) = (StatusPace::default(), Key::new(ObjectKind::Saga, "shop", "s"), Instant::now());
        let at = |second| start + Duration::from_secs(second);
        assert_eq!(gate.enter(&key, News::Numbers, start), Ok(()));
        assert_eq!(gate.enter(&key, News::Numbers, at(9)), Err(start + PACE));
        for second in 1..6 {
            assert_eq!(gate.enter(&key, News::Condition, at(second)), Ok(()), "{second}");
        }
        let flapping = (6..60).filter(|second| gate.enter(&key, News::Condition, at(*second)).is_ok());
        assert!(flapping.count() <= 6);
    }

    #[tokio::test(start_paused = true)]
    async fn every_spec_gets_its_answer_at_once() {
        let (gate, key, start) = (StatusPace::default(), Key::new(ObjectKind::Saga, "shop", "s"), Instant::now());
        while gate.enter(&key, News::Condition, start).is_ok() {}
        for _ in 0..20 {
            assert_eq!(gate.enter(&key, News::Answer, start), Ok(()));
        }
        assert_eq!(
            gate.enter(&key, News::Condition, start),
            Ok(()),
            "the roll-out of the new spec is reported as it proceeds"
        );
        assert_eq!(gate.enter(&key, News::Numbers, start), Err(start + PACE));
    }
}
