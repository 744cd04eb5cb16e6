//! How long a change of a spec waits for a change of what it names: `kubectl apply` of one manifest sends its objects one
//! after the other, in the order of the file.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

use crate::controllers::resources::key::Key;

/// `kubectl apply` sends a manifest of a dozen objects in less than a second.
const SETTLE: Duration = Duration::from_secs(3);

/// When a generation was seen first, for those whose status does not report yet that they have settled.
#[derive(Debug, Default)]
pub struct Settling(Mutex<HashMap<Key, (Option<i64>, Instant)>>);

impl Settling {
    /// `None`: `generation` has settled. One that is new to this process, but `reported` in the status, settled in another.
    pub fn remaining(
        &self,
        key: &Key,
        generation: Option<i64>,
        reported: Option<i64>,
        now: Instant,
    ) -> Option<Duration> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let since = match seen.get(key) {
            Some((known, since)) if *known == generation => *since,
            _ if reported == generation => return None,
            _ => now,
        };
        let left = (since + SETTLE).checked_duration_since(now).filter(|left| !left.is_zero());
        if left.is_none() && reported == generation {
            seen.remove(key);
        } else {
            seen.insert(key.clone(), (generation, since));
        }
        left
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
    async fn a_new_generation_settles_once() {
        let (settling, key) = (Settling::default(), Key::new(ObjectKind::Microservice, "shop", "orders"));
        let start = Instant::now();
        let left = |generation, reported, seconds| {
            settling.remaining(&key, Some(generation), Some(reported), start + Duration::from_secs(seconds))
        };
        assert_eq!(left(2, 1, 0), Some(SETTLE));
        assert_eq!(left(2, 2, 1), Some(Duration::from_secs(2)), "its status was written meanwhile");
        assert_eq!(left(3, 2, 2), Some(SETTLE), "another one begins anew");
        assert_eq!(left(3, 3, 5), None);
        assert_eq!(left(3, 3, 6), None, "what was forgotten has settled");
        assert_eq!(left(4, 3, 7), Some(SETTLE));
    }
}
