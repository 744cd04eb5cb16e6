//! Whether the writer gets on. What the database refuses for ever cannot be written again and again without an end: after a
//! while the process says that it is dead, and its successor goes on from what is durable.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Longer than an administrator's slip of the hand, and than a fail-over.
const PATIENCE: Duration = Duration::from_mins(1);

/// For `/livez`.
#[derive(Debug, Default)]
pub(super) struct Pulse(Mutex<Option<Instant>>);

impl Pulse {
    /// A commit was refused for a reason that does not pass by itself.
    pub(super) fn refused(&self, now: Instant) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(now);
    }

    /// A commit took place.
    pub(super) fn committed(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) fn check(&self, now: Instant) -> Result<(), String> {
        let since = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match since {
            Some(since) if now.saturating_duration_since(since) > PATIENCE => {
                Err("the database has refused the same commit for more than a minute; see the status".to_owned())
            }
            Some(_) | None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commit_that_is_refused_for_long_is_the_end() {
        let pulse = Pulse::default();
        let (begin, late) = (Instant::now(), Instant::now() + PATIENCE + Duration::from_secs(1));
        assert!(pulse.check(late).is_ok());
        pulse.refused(begin);
        pulse.refused(late);
        assert!(pulse.check(begin).is_ok());
        assert!(pulse.check(late).is_err());
        pulse.committed();
        assert!(pulse.check(late).is_ok());
    }
}
