//! How long calls may be sent: while the lease is young enough that nobody can have taken the partitions over.
//!
//! A process that was stopped for longer than its lease (SIGSTOP, a suspended machine) continues in the middle of whatever it
//! did, and finds out only later that it is fenced. Its rows are refused by the server; a call cannot be taken back. So
//! the age of the lease is read right before each request is sent (M. Kleppmann, "How to do distributed locking", 2016:
//! what is left is the time between this and the arrival, for which the participant's barrier is there). The clock is
//! `CLOCK_BOOTTIME`, which counts the time of a suspended machine; [`std::time::Instant`] does not.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::sync::watch;

use super::session::{LEASE, RENEW_INTERVAL};

/// Of the lease's time what calls may use; the rest is for the request's way and for clocks that run at another speed.
const YOUNG: Duration = LEASE.saturating_sub(RENEW_INTERVAL);

/// Time since the machine has booted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Moment(Duration);

impl Moment {
    pub(super) fn now() -> Self {
        let now = clock_gettime(ClockId::Boottime);
        let part = |part: i64| u64::try_from(part).unwrap_or(0);
        Self(Duration::from_secs(part(now.tv_sec)) + Duration::from_nanos(part(now.tv_nsec)))
    }
}

#[derive(Debug)]
pub(super) struct Lease(watch::Sender<Option<Moment>>);

impl Default for Lease {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Lease {
    /// The lease was renewed by a statement that was sent at `sent`; the database's clock counts from a later moment.
    pub(super) fn renewed(&self, sent: Moment) {
        self.0.send_replace(Some(sent));
    }

    pub(super) fn is_young(&self) -> bool {
        young(*self.0.borrow(), Moment::now())
    }

    pub(super) async fn until_young(&self) {
        // the sender is part of `self`, so it is not closed
        let _ = self.0.subscribe().wait_for(|renewed| young(*renewed, Moment::now())).await;
    }
}

fn young(renewed: Option<Moment>, now: Moment) -> bool {
    renewed.is_some_and(|renewed| now.0.saturating_sub(renewed.0) < YOUNG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_young_until_it_has_aged_and_again_when_it_is_renewed() {
        let renewed = Moment::now();
        let after = |time: Duration| Moment(renewed.0 + time);
        assert!(!young(None, renewed));
        assert!(young(Some(renewed), after(YOUNG.saturating_sub(Duration::from_millis(1)))));
        assert!(!young(Some(renewed), after(YOUNG)));
        assert!(young(Some(after(YOUNG)), after(YOUNG)));
    }

    #[tokio::test]
    async fn calls_wait_for_a_young_lease() {
        let lease = Lease::default();
        assert!(!lease.is_young());
        // a renewal that took too long is none
        let now = Moment::now();
        lease.renewed(Moment(now.0.saturating_sub(YOUNG)));
        assert!(!lease.is_young() || now.0 < YOUNG);
        let waiting = lease.until_young();
        lease.renewed(Moment::now());
        waiting.await;
        assert!(lease.is_young());
    }
}
