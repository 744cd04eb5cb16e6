//! Whether the writer makes progress. Writing again what the database refuses permanently cannot help: after a while
//! `/livez` fails, and the restarted process continues from what is durable.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Longer than a mistake of an administrator that is corrected at once, and longer than a fail-over.
const REFUSAL_LIMIT: Duration = Duration::from_mins(1);

/// The time since which commits are refused, for `/livez`.
#[derive(Debug, Default)]
pub(super) struct Liveness(Mutex<Option<Instant>>);

impl Liveness {
    /// A commit was refused permanently.
    pub(super) fn commit_refused(&self, now: Instant) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(now);
    }

    /// A commit succeeded.
    pub(super) fn commit_succeeded(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn check(&self, now: Instant) -> Result<(), String> {
        let since = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match since {
            Some(since) if now.saturating_duration_since(since) > REFUSAL_LIMIT => {
                Err("the database has refused the same commit for more than a minute; /status has its error".to_owned())
            }
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_not_live_after_a_commit_was_refused_for_a_minute() {
        let liveness = Liveness::default();
        let (begin, late) = (Instant::now(), Instant::now() + REFUSAL_LIMIT + Duration::from_secs(1));
        assert!(liveness.check(late).is_ok());
        liveness.commit_refused(begin);
        liveness.commit_refused(late);
        assert!(liveness.check(begin).is_ok());
        assert!(liveness.check(late).is_err());
        liveness.commit_succeeded();
        assert!(liveness.check(late).is_ok());
    }
}
