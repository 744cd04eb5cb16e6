//! Growing pauses per object, forgotten on success.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use crate::controllers::resources::{key::Key, outcome::Class};

const FIRST: Duration = Duration::from_millis(500);
/// What may resolve itself is retried within a minute, what a person must repair within five.
const LONGEST_RETRY: Duration = Duration::from_mins(1);
const LONGEST_OTHER: Duration = Duration::from_mins(5);

/// How often each object has failed in a row.
#[derive(Debug, Default)]
pub struct Backoff(Mutex<HashMap<Key, u32>>);

impl Backoff {
    /// The pause after one more failure of `key`; `jitter` in 0..1 takes away up to a quarter of it.
    pub fn failed(&self, key: &Key, class: Class, jitter: f64) -> Duration {
        let mut failures = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = failures.entry(key.clone()).or_default();
        *count = count.saturating_add(1);
        let (first, longest) = match class {
            Class::Retry => (FIRST, LONGEST_RETRY),
            Class::Invalid => (FIRST * 8, LONGEST_OTHER),
            Class::Fatal => (LONGEST_RETRY, LONGEST_OTHER),
        };
        let pause = first.saturating_mul(2_u32.saturating_pow((*count - 1).min(16))).min(longest);
        pause.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 4.0)
    }

    pub fn succeeded(&self, key: &Key) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::resources::key::ObjectKind;

    #[test]
    fn pauses_double_to_a_limit_and_start_again_after_success() {
        let (backoff, key) = (Backoff::default(), Key::new(ObjectKind::Saga, "shop", "create-order"));
        let pauses: Vec<_> = (0..12).map(|_| backoff.failed(&key, Class::Retry, 0.0)).collect();
        assert_eq!(pauses[..3], [FIRST, FIRST * 2, FIRST * 4]);
        assert_eq!(pauses[11], LONGEST_RETRY);
        backoff.succeeded(&key);
        assert_eq!(backoff.failed(&key, Class::Retry, 1.0), FIRST.mul_f64(0.75));
    }
}
