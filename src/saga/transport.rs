//! Calls participants over HTTP/1.1, with pooled connections and a concurrency limit for each service.
//!
//! hyper's connections are used directly: a pool of idle connections for each address is all that is needed, and a
//! client with redirects, proxies and cookies costs more than the rest of a step.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response, Uri,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    sync::{OwnedSemaphorePermit, Semaphore},
};

use super::{
    answer::{self, Answer, MAX_BODY, Raw},
    lease::Lease,
};
use crate::outage::with_causes;

/// Maximum number of concurrent requests to one service; further ones wait for a [`Permit`] before their time-out
/// begins.
const MAX_IN_FLIGHT: usize = 256;
/// Maximum number of idle connections for each address.
const IDLE: usize = 256;
/// A connection is closed after this time, so that new pods of the service get requests.
const MAX_AGE: Duration = Duration::from_mins(1);
/// Shortest and longest pause between two polls of a 202's `Location`.
const POLL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// One call, ready to be sent.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub service: &'a str,
    pub method: &'a str,
    pub url: &'a str,
    pub body: String,
    /// A header value that the engine makes, of visible ASCII characters.
    pub idempotency_key: String,
    pub traceparent: String,
    pub correlation_id: String,
    pub timeout: Duration,
    /// The outcome of an earlier attempt is unknown.
    pub doubtful: bool,
    /// Must be young when the command is sent.
    pub lease: &'a Lease,
}

#[derive(Debug, thiserror::Error)]
enum TransportError {
    #[error("the lease is too old for a call")]
    LeaseTooOld,
    #[error("`{0}` is not an absolute http:// URL")]
    Address(String),
    #[error("connecting to {0}")]
    Connect(String, #[source] std::io::Error),
    #[error("sending the request")]
    Send(#[source] hyper::Error),
    #[error("reading the answer")]
    Read(#[source] hyper::Error),
    #[error("making the request")]
    Request(#[source] hyper::http::Error),
}

type Sender = SendRequest<Full<Bytes>>;

#[derive(Debug, Default)]
pub(super) struct Transport {
    semaphores: Mutex<HashMap<String, Arc<Semaphore>>>,
    idle: Mutex<HashMap<String, Vec<Connection>>>,
}

#[derive(Debug)]
struct Connection {
    sender: Sender,
    since: Instant,
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

    /// Makes the call and classifies its outcome; every error is an outcome too. `None`: nothing was sent, because the
    /// lease was too old.
    pub(super) async fn call(&self, call: &Call<'_>, permit: Permit) -> Option<Answer> {
        match tokio::time::timeout(call.timeout, self.exchange(call, permit)).await {
            Ok(Ok(answer)) => Some(answer),
            Ok(Err(TransportError::LeaseTooOld)) => None,
            Ok(Err(error)) => Some(answer::unknown(&format!("calling {}: {}", call.service, with_causes(&error)))),
            Err(_elapsed) => {
                let milliseconds = call.timeout.as_millis();
                Some(answer::unknown(&format!("{} did not answer within {milliseconds} ms", call.service)))
            }
        }
    }

    fn semaphore(&self, service: &str) -> Arc<Semaphore> {
        let mut semaphores = self.semaphores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(semaphore) = semaphores.get(service) {
            return Arc::clone(semaphore);
        }
        Arc::clone(semaphores.entry(service.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(MAX_IN_FLIGHT))))
    }

    async fn exchange(&self, call: &Call<'_>, permit: Permit) -> Result<Answer, TransportError> {
        let url: Uri = call.url.parse().map_err(|_| TransportError::Address(call.url.to_owned()))?;
        let host = authority(&url)?;
        let request = || {
            Request::builder()
                .method(call.method)
                .uri(path(&url))
                .header(header::HOST, url.authority().map_or("", hyper::http::uri::Authority::as_str))
                .header(header::CONTENT_TYPE, "application/json")
                .header(header::ACCEPT, "application/json, application/problem+json")
                .header("idempotency-key", &call.idempotency_key)
                .header("traceparent", &call.traceparent)
                .header("correlationid", &call.correlation_id)
                .body(Full::new(Bytes::from(call.body.clone())))
                .map_err(TransportError::Request)
        };
        let raw = self.send(&host, request, || call.lease.is_young()).await?;
        match raw.location.as_deref() {
            Some(location) if raw.status == 202 => self.poll(&url, &host, location, call, permit).await,
            _ => Ok(answer::classify(call.service, raw, call.doubtful)),
        }
    }

    /// Polls the `Location` of a 202 until the answer is not 202; the attempt's time-out ends it. Between two polls the
    /// permit is released, so that long jobs do not block other calls.
    async fn poll(
        &self,
        url: &Uri,
        host: &str,
        location: &str,
        call: &Call<'_>,
        mut permit: Permit,
    ) -> Result<Answer, TransportError> {
        let Some(path) = same_origin(url, location) else {
            let service = call.service;
            return Ok(answer::unknown(&format!("{service} answered HTTP 202 with a Location on another host")));
        };
        let mut pause = POLL.0;
        loop {
            permit.release();
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(POLL.1);
            permit.acquire().await;
            let request = || {
                Request::get(&path)
                    .header(header::HOST, url.authority().map_or("", hyper::http::uri::Authority::as_str))
                    .header("traceparent", &call.traceparent)
                    .header("correlationid", &call.correlation_id)
                    .body(Full::new(Bytes::new()))
                    .map_err(TransportError::Request)
            };
            let raw = self.send(host, request, || true).await?;
            if raw.status != 202 {
                return Ok(answer::classify(call.service, raw, true));
            }
        }
    }

    async fn send(
        &self,
        host: &str,
        request: impl Fn() -> Result<Request<Full<Bytes>>, TransportError>,
        may_send: impl Fn() -> bool,
    ) -> Result<Raw, TransportError> {
        let mut request = request()?;
        loop {
            let (mut connection, fresh) = match self.idle(host) {
                Some(connection) => (connection, false),
                None => (connect(host).await?, true),
            };
            if !may_send() {
                return Err(TransportError::LeaseTooOld);
            }
            match connection.sender.try_send_request(request).await {
                Ok(response) => return self.receive(host, connection, response).await,
                Err(mut error) => match error.take_message() {
                    // an idle connection that the service had closed: the request was not sent
                    Some(unsent) if !fresh => request = unsent,
                    _ => return Err(TransportError::Send(error.into_error())),
                },
            }
        }
    }

    async fn receive(
        &self,
        host: &str,
        connection: Connection,
        response: Response<Incoming>,
    ) -> Result<Raw, TransportError> {
        let (parts, body) = response.into_parts();
        let header = |name| parts.headers.get(name).and_then(|value| value.to_str().ok()).map(ToOwned::to_owned);
        let (location, retry_after) = (header(header::LOCATION), header(header::RETRY_AFTER));
        let content_type = header(header::CONTENT_TYPE);
        let (body, complete) = read(body).await.map_err(TransportError::Read)?;
        if complete {
            self.keep(host, connection);
        }
        Ok(Raw { status: parts.status.as_u16(), body, complete, content_type, location, retry_after })
    }

    fn idle(&self, host: &str) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = idle.get_mut(host)?;
        while let Some(connection) = connections.pop() {
            if connection.sender.is_ready() && connection.since.elapsed() < MAX_AGE {
                return Some(connection);
            }
        }
        None
    }

    fn keep(&self, host: &str, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        match idle.get_mut(host) {
            Some(connections) if connections.len() >= IDLE => {}
            Some(connections) => connections.push(connection),
            None => {
                idle.insert(host.to_owned(), vec![connection]);
            }
        }
    }
}

async fn connect(host: &str) -> Result<Connection, TransportError> {
    let failed = |error| TransportError::Connect(host.to_owned(), error);
    let stream = TcpStream::connect(host).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(TransportError::Send)?;
    // the task ends when the service closes the connection, or when its sender is dropped
    tokio::spawn(connection);
    Ok(Connection { sender, since: Instant::now() })
}

/// At most [`MAX_BODY`] bytes, and whether that is all.
async fn read(mut body: Incoming) -> Result<(Bytes, bool), hyper::Error> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            let room = MAX_BODY - bytes.len();
            bytes.extend_from_slice(data.get(..room).unwrap_or(&data));
            if data.len() > room {
                return Ok((bytes.freeze(), false));
            }
        }
    }
    Ok((bytes.freeze(), true))
}

fn authority(url: &Uri) -> Result<String, TransportError> {
    match (url.scheme_str(), url.host()) {
        (Some("http"), Some(host)) => Ok(format!("{host}:{}", url.port_u16().unwrap_or(80))),
        _ => Err(TransportError::Address(url.to_string())),
    }
}

fn path(url: &Uri) -> &str {
    url.path_and_query().map_or("/", hyper::http::uri::PathAndQuery::as_str)
}

/// The path of `location` (absolute, or relative to the root) if it is on the host that answered.
fn same_origin(url: &Uri, location: &str) -> Option<String> {
    let target: Uri = location.parse().ok()?;
    let same = target.authority().is_none_or(|authority| Some(authority) == url.authority());
    (same && target.path().starts_with('/')).then(|| path(&target).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_location_is_followed_on_the_same_host_only() {
        let url: Uri = "http://orders.shop.svc:8080/commands/x".parse().unwrap();
        assert_eq!(same_origin(&url, "/jobs/7?x=1").as_deref(), Some("/jobs/7?x=1"));
        assert_eq!(same_origin(&url, "http://orders.shop.svc:8080/jobs/7").as_deref(), Some("/jobs/7"));
        assert_eq!(same_origin(&url, "http://169.254.169.254/latest"), None);
    }

    #[test]
    fn only_absolute_http_addresses_are_called() {
        assert_eq!(authority(&"http://a/b".parse().unwrap()).unwrap(), "a:80");
        assert_eq!(authority(&"http://[::1]:8080/b".parse().unwrap()).unwrap(), "[::1]:8080");
        assert!(authority(&"/b".parse().unwrap()).is_err());
        assert!(authority(&"https://a/b".parse().unwrap()).is_err());
    }
}
