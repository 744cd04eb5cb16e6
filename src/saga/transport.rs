//! Calls participants over HTTP/1.1, with a concurrency limit for each service, and polls the jobs that they accept.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body_util::Full;
use hyper::{
    Request, Uri, header,
    http::{
        request,
        uri::{Authority, PathAndQuery},
    },
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::error::Elapsed,
};
use tokio_util::sync::CancellationToken;

use super::{
    answer::{self, Answer, Raw},
    connections::{Connections, SendError},
    job::Job,
    lease::Lease,
};
use crate::{domain::saga, outage::with_causes};

/// Maximum number of concurrent requests to one service; further ones wait for a [`Permit`] before their time-out
/// begins.
const MAX_IN_FLIGHT: usize = 256;

/// One call, ready to be sent.
pub(super) struct Call<'a> {
    pub service: &'a str,
    /// Upper case.
    pub method: &'a str,
    pub request: saga::request::Request,
    /// A header value that the engine makes, of visible ASCII characters.
    pub idempotency_key: String,
    pub traceparent: String,
    pub correlation_id: String,
    /// Of each request.
    pub timeout: Duration,
    /// How long a job that the service has accepted is polled.
    pub job_timeout: Duration,
    /// The outcome of an earlier attempt is unknown.
    pub doubtful: bool,
    /// Must be young when the command is sent.
    pub lease: &'a Lease,
    /// Whether the outcome still matters. A job is polled only for so long.
    pub is_current: &'a (dyn Fn() -> bool + Send + Sync),
    /// When cancelled, jobs are polled no longer.
    pub stopping: &'a CancellationToken,
}

#[derive(Debug, thiserror::Error)]
enum TransportError {
    /// It has no URL: that may have arguments in it.
    #[error("its address is not an absolute http:// URL")]
    Address,
    #[error("making the request")]
    Request(#[source] hyper::http::Error),
    #[error(transparent)]
    Send(#[from] SendError),
}

#[derive(Debug, Default)]
pub(super) struct Transport {
    semaphores: Mutex<HashMap<String, Arc<Semaphore>>>,
    connections: Connections,
}

/// Permission to send one request to a service. It is acquired before the engine checks whether the call is still to be
/// made, since the wait for it may be long.
#[derive(Debug)]
pub(super) struct Permit {
    semaphore: Arc<Semaphore>,
    permit: Option<OwnedSemaphorePermit>,
}

impl Permit {
    fn release(&mut self) {
        self.permit = None;
    }

    async fn acquire(&mut self) {
        // acquiring fails only when the semaphore is closed, and it never is
        self.permit = Arc::clone(&self.semaphore).acquire_owned().await.ok();
    }
}

impl Transport {
    /// Waits for a concurrency permit for `service`.
    pub(super) async fn acquire_permit(&self, service: &str) -> Permit {
        let mut permit = Permit { semaphore: self.semaphore(service), permit: None };
        permit.acquire().await;
        permit
    }

    fn semaphore(&self, service: &str) -> Arc<Semaphore> {
        let mut semaphores = self.semaphores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(semaphore) = semaphores.get(service) {
            return Arc::clone(semaphore);
        }
        Arc::clone(semaphores.entry(service.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(MAX_IN_FLIGHT))))
    }

    /// Makes the call and classifies its outcome; every error is an outcome too. `None`: there is none to record, because
    /// the lease was too old and nothing was sent, or because the job need not be polled any longer.
    pub(super) async fn call(&self, mut call: Call<'_>, permit: Permit) -> Option<Answer> {
        let body = call.request.body.take();
        let received = match tokio::time::timeout(call.timeout, self.command(&call, body)).await {
            Ok(Err(TransportError::Send(SendError::LeaseTooOld))) => return None,
            outcome => received(&call, outcome),
        };
        let raw = match received {
            Ok(raw) => raw,
            Err(why) => return Some(answer::unknown(&why, None)),
        };
        match Job::accepted(call.service, &call.request.url, &raw) {
            None => Some(answer::classify(call.service, raw, call.doubtful)),
            Some(Err(answer)) => Some(answer),
            Some(Ok(job)) => call.stopping.run_until_cancelled(self.poll(&call, job, permit)).await.flatten(),
        }
    }

    async fn command(&self, call: &Call<'_>, body: Option<String>) -> Result<Raw, TransportError> {
        let url = parse(&call.request.url)?;
        let mut request = Request::builder()
            .method(call.method)
            .uri(url.path_and_query().map_or("/", PathAndQuery::as_str))
            .header("idempotency-key", &call.idempotency_key);
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        for (name, value) in &call.request.headers {
            request = request.header(name, value);
        }
        self.send(call, &url, request, body, || call.lease.is_young()).await
    }

    async fn send(
        &self,
        call: &Call<'_>,
        url: &Uri,
        request: request::Builder,
        body: Option<String>,
        may_send: impl Fn() -> bool,
    ) -> Result<Raw, TransportError> {
        let request = request
            .header(header::HOST, url.authority().map_or("", Authority::as_str))
            .header(header::ACCEPT, "application/json, application/problem+json")
            .header("traceparent", &call.traceparent)
            .header("correlationid", &call.correlation_id)
            .body(Full::new(body.map(Bytes::from).unwrap_or_default()))
            .map_err(TransportError::Request)?;
        Ok(self.connections.send(&authority(url)?, request, may_send).await?)
    }

    /// Polls until the job has an outcome. Between two polls the permit is released, so that long jobs do not block other
    /// calls.
    async fn poll(&self, call: &Call<'_>, mut job: Job, mut permit: Permit) -> Option<Answer> {
        let began = Instant::now();
        loop {
            permit.release();
            let left = call.job_timeout.saturating_sub(began.elapsed());
            tokio::time::sleep(job.pause.min(left)).await;
            if !(call.is_current)() {
                return None;
            }
            if began.elapsed() >= call.job_timeout {
                let (service, milliseconds) = (call.service, call.job_timeout.as_millis());
                let message = format!("{service} did not finish the job that it accepted within {milliseconds} ms");
                return Some(answer::unknown(&message, None));
            }
            permit.acquire().await;
            let received = received(call, tokio::time::timeout(call.timeout, self.status(call, &job)).await);
            if let Some(answer) = job.polled(call.service, received) {
                return Some(answer);
            }
        }
    }

    async fn status(&self, call: &Call<'_>, job: &Job) -> Result<Raw, TransportError> {
        self.send(call, &parse(&call.request.url)?, Request::get(job.path_and_query()), None, || true).await
    }
}

/// The answer, or a sentence that says why there is none.
fn received(call: &Call<'_>, outcome: Result<Result<Raw, TransportError>, Elapsed>) -> Result<Raw, String> {
    match outcome {
        Ok(Ok(raw)) => Ok(raw),
        Ok(Err(error)) => Err(format!("calling {}: {}", call.service, with_causes(&error))),
        Err(_elapsed) => Err(format!("{} did not answer within {} ms", call.service, call.timeout.as_millis())),
    }
}

fn parse(url: &str) -> Result<Uri, TransportError> {
    url.parse().map_err(|_| TransportError::Address)
}

fn authority(url: &Uri) -> Result<String, TransportError> {
    match (url.scheme_str(), url.host()) {
        (Some("http"), Some(host)) => Ok(format!("{host}:{}", url.port_u16().unwrap_or(80))),
        _ => Err(TransportError::Address),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_absolute_http_addresses_are_called() {
        assert_eq!(authority(&"http://a/b".parse().unwrap()).unwrap(), "a:80");
        assert_eq!(authority(&"http://[::1]:8080/b".parse().unwrap()).unwrap(), "[::1]:8080");
        assert!(authority(&"/b".parse().unwrap()).is_err());
        assert!(authority(&"https://a/b".parse().unwrap()).is_err());
    }
}
