//! How often an object's status may be written: what a person waits for at once, numbers that move every 10 s.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use super::key::Key;

/// Shortest time between two writes of numbers; and the time in which one more immediate write is earned.
pub const PACE: Duration = Duration::from_secs(10);
/// Immediate writes (a condition moved) in a row, so that a rollout is told as it goes but a flapping pod is not.
const BURST: u32 = 6;

#[derive(Debug, Default)]
pub struct StatusGate(Mutex<HashMap<Key, Spent>>);

#[derive(Clone, Copy, Debug)]
struct Spent {
    last: Instant,
    /// Immediate writes used up, as of `last`.
    used: f64,
}

impl StatusGate {
    /// `Ok`: write now (and it counts as written). `Err`: not before that time.
    pub fn enter(&self, key: &Key, condition_moved: bool, now: Instant) -> Result<(), Instant> {
        let mut spent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = spent.get_mut(key) else {
            spent.insert(key.clone(), Spent { last: now, used: 1.0 });
            return Ok(());
        };
        let earned = now.duration_since(known.last).as_secs_f64() / PACE.as_secs_f64();
        let used = (known.used - earned).max(0.0);
        let may = if condition_moved { used + 1.0 <= f64::from(BURST) } else { earned >= 1.0 };
        if !may {
            return Err(known.last + PACE);
        }
        *known = Spent { last: now, used: used + 1.0 };
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
    use crate::controllers::key::ObjectKind;

    #[tokio::test(start_paused = true)]
    async fn numbers_are_written_at_their_pace_and_conditions_at_once_within_bounds() {
        let (gate, key, start) = (StatusGate::default(), Key::new(ObjectKind::Saga, "shop", "s"), Instant::now());
        assert_eq!(gate.enter(&key, false, start), Ok(()));
        assert_eq!(gate.enter(&key, false, start + Duration::from_secs(9)), Err(start + PACE));
        for second in 1..6 {
            assert_eq!(gate.enter(&key, true, start + Duration::from_secs(second)), Ok(()), "{second}");
        }
        let flapping = (6..60).filter(|second| gate.enter(&key, true, start + Duration::from_secs(*second)).is_ok());
        assert!(flapping.count() <= 6);
    }
}
