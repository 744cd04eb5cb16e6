//! Leader election by a Lease, on the protocol of client-go's `leaderelection`.
//!
//! Clocks are never compared: another's lease has expired when its record has not been seen to change for its duration, by
//! our own clock. Our own is lost when it could not be renewed until `RENEW_DEADLINE` after the last successful request was
//! *begun*; as that is shorter than the lease's duration, we have stopped before anybody else can start.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::MicroTime,
};
use kube::{
    Api,
    api::{ObjectMeta, PostParams},
};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::controllers::resources::labels::FIELD_MANAGER;

/// For how long a lease that is not renewed keeps others out.
const LEASE_SECONDS: i32 = 15;
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between two renewals, and between two reads of another's lease.
const RETRY: Duration = Duration::from_secs(2);
/// Longest that giving the lease back may take.
const RELEASE_DEADLINE: Duration = Duration::from_secs(2);

/// One candidate.
#[derive(Debug)]
pub struct Elector {
    api: Api<Lease>,
    name: String,
    identity: String,
    /// The record as last seen, and since when it has been so.
    seen: Option<(Lease, Instant)>,
}

/// What an attempt came to.
#[derive(Debug, PartialEq, Eq)]
enum Attempt {
    Ours,
    Theirs,
}

impl Elector {
    pub fn new(api: Api<Lease>, name: impl Into<String>, identity: impl Into<String>) -> Self {
        Self { api, name: name.into(), identity: identity.into(), seen: None }
    }

    /// Waits until the lease is ours. The answer is the moment at which the request that got it was begun.
    pub async fn acquire(&mut self) -> Instant {
        loop {
            let begun = Instant::now();
            match timeout(RENEW_DEADLINE, self.attempt()).await {
                Ok(Ok(Attempt::Ours)) => return begun,
                Ok(Ok(Attempt::Theirs)) => {}
                Ok(Err(error)) => tracing::warn!(error = %error, lease = self.name, "cannot get the lease"),
                Err(_) => tracing::warn!(lease = self.name, "cannot get the lease in time"),
            }
            sleep(RETRY + RETRY.mul_f64(rand::random::<f64>() / 5.0)).await;
        }
    }

    /// Renews until that is no longer possible, or until `stop`. `renewed`: when the last successful request was begun.
    pub async fn keep(&mut self, renewed: Instant, stop: &CancellationToken) {
        let mut deadline = renewed + RENEW_DEADLINE;
        loop {
            let pause = sleep(RETRY);
            tokio::select! { () = stop.cancelled() => return, () = pause => {} }
            let begun = Instant::now();
            match timeout_at(deadline, self.attempt()).await {
                Ok(Ok(Attempt::Ours)) => deadline = begun + RENEW_DEADLINE,
                Ok(Ok(Attempt::Theirs)) => return,
                Ok(Err(error)) => tracing::warn!(error = %error, lease = self.name, "cannot renew the lease"),
                Err(_) => {}
            }
            if Instant::now() >= deadline {
                tracing::error!(lease = self.name, "the lease could not be renewed in time: no longer leading");
                return;
            }
        }
    }

    /// Gives the lease back, so that the next leader need not wait for it to expire.
    pub async fn release(&mut self) {
        let Some((mut lease, _)) = self.seen.take().filter(|(lease, _)| self.is_ours(lease)) else { return };
        let spec = lease.spec.get_or_insert_default();
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        spec.renew_time = Some(MicroTime(Timestamp::now()));
        if !matches!(timeout(RELEASE_DEADLINE, self.replace(&lease)).await, Ok(Ok(_))) {
            tracing::warn!(lease = self.name, "the lease could not be given back; it expires by itself");
        }
    }

    async fn attempt(&mut self) -> kube::Result<Attempt> {
        // the holder renews from memory; a conflict means that somebody else wrote, and then it is read again
        if let Some((lease, _)) = self.seen.clone()
            && self.is_ours(&lease)
        {
            match self.replace(&self.renewed(lease)).await {
                Ok(lease) => return Ok(self.note(lease)),
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => self.seen = None,
                Err(error) => return Err(error),
            }
        }
        let Some(lease) = self.api.get_opt(&self.name).await? else {
            let made = self.api.create(&post_params(), &self.fresh()).await;
            return self.unless_conflict(made);
        };
        if self.is_free(&lease) {
            let taken = self.replace(&self.renewed(lease)).await;
            return self.unless_conflict(taken);
        }
        Ok(self.note(lease))
    }

    /// Nobody holds it, we do, or it has not changed for as long as it lasts.
    fn is_free(&self, lease: &Lease) -> bool {
        let spec = lease.spec.clone().unwrap_or_default();
        if spec.holder_identity.as_deref().unwrap_or_default().is_empty() || self.is_ours(lease) {
            return true;
        }
        let lasts = Duration::from_secs(spec.lease_duration_seconds.and_then(|s| s.try_into().ok()).unwrap_or(15));
        self.seen.as_ref().is_some_and(|(seen, since)| seen.spec == lease.spec && since.elapsed() >= lasts)
    }

    fn is_ours(&self, lease: &Lease) -> bool {
        lease.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref()) == Some(self.identity.as_str())
    }

    fn note(&mut self, lease: Lease) -> Attempt {
        let attempt = if self.is_ours(&lease) { Attempt::Ours } else { Attempt::Theirs };
        match &mut self.seen {
            Some((seen, _)) if seen.spec == lease.spec => *seen = lease,
            _ => self.seen = Some((lease, Instant::now())),
        }
        attempt
    }

    /// Somebody else was faster: not an error, and what they wrote is read next time.
    fn unless_conflict(&mut self, written: kube::Result<Lease>) -> kube::Result<Attempt> {
        match written {
            Ok(lease) => Ok(self.note(lease)),
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(Attempt::Theirs),
            Err(error) => Err(error),
        }
    }

    fn fresh(&self) -> Lease {
        let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
        self.renewed(Lease { metadata, spec: None })
    }

    fn renewed(&self, mut lease: Lease) -> Lease {
        let (now, ours) = (MicroTime(Timestamp::now()), self.is_ours(&lease));
        let old = lease.spec.take().unwrap_or_default();
        let transitions = old.lease_transitions.unwrap_or_default();
        lease.spec = Some(LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            acquire_time: old.acquire_time.filter(|_| ours).or_else(|| Some(now.clone())),
            renew_time: Some(now),
            lease_transitions: Some(if ours { transitions } else { transitions.saturating_add(1) }),
            ..LeaseSpec::default()
        });
        lease
    }

    /// Fails with a conflict if the lease changed since it was read.
    async fn replace(&self, lease: &Lease) -> kube::Result<Lease> {
        self.api.replace(&self.name, &post_params(), lease).await
    }
}

fn post_params() -> PostParams {
    PostParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PostParams::default() }
}
