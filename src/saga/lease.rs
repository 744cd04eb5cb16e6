//! How long calls may be sent: while the lease is young enough that nobody can have taken the partitions over.
//!
//! A process that was stopped for longer than its lease (SIGSTOP, a paused machine) continues in the middle of whatever it
//! did, and finds out only later that it is fenced. Its rows are refused by the server; a call cannot be taken back. So
//! the age of the lease is read right before each request is sent (M. Kleppmann, "How to do distributed locking", 2016:
//! what is left is the time between this and the arrival, for which the participant's barrier is there).

use std::time::Duration;

use tokio::{sync::watch, time::Instant};

use super::session::{LEASE, RENEW_INTERVAL};

/// Of the lease's time what calls may use; the rest is for the request's way and for clocks that run at another speed.
const YOUNG: Duration = LEASE.saturating_sub(RENEW_INTERVAL);

#[derive(Debug)]
pub(super) struct Lease(watch::Sender<Option<Instant>>);

impl Default for Lease {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Lease {
    /// The lease was renewed by a statement that was sent at `sent`; the database's clock counts from a later moment.
    pub(super) fn renewed(&self, sent: Instant) {
        self.0.send_replace(Some(sent));
    }

    pub(super) fn is_young(&self) -> bool {
        young(*self.0.borrow())
    }

    pub(super) async fn until_young(&self) {
        // the sender is part of `self`, so it is not closed
        let _ = self.0.subscribe().wait_for(|renewed| young(*renewed)).await;
    }
}

fn young(renewed: Option<Instant>) -> bool {
    renewed.is_some_and(|renewed| renewed.elapsed() < YOUNG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn calls_are_sent_until_the_lease_has_aged_and_again_when_it_is_renewed() {
        let lease = Lease::default();
        assert!(!lease.is_young());
        lease.renewed(Instant::now());
        tokio::time::advance(YOUNG.saturating_sub(Duration::from_millis(1))).await;
        assert!(lease.is_young());
        lease.until_young().await;
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(!lease.is_young());
        // a renewal that took too long is none
        lease.renewed(Instant::now() - YOUNG);
        assert!(!lease.is_young());
        let waiting = lease.until_young();
        lease.renewed(Instant::now());
        waiting.await;
    }
}
