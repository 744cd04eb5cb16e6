//! Shared by everything that uses NATS: connecting, and detecting within five seconds that the server does not answer.
//!
//! The driver sends a ping when it has received nothing for [`PING_INTERVAL`], and gives the connection up when three
//! intervals have passed without a byte. A lost connection is not re-established by the driver but replaced by its user,
//! who must know what was in flight.

use std::{sync::Arc, time::Duration};

use async_nats::{
    Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr, Statistics,
    jetstream::context::{RequestError, RequestErrorKind},
};
use jiff::Timestamp;
use tokio::time::{Interval, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::outage::{self, Failure, Outage};

/// Deadline of connecting, and default deadline of requests.
pub const TIMEOUT: Duration = Duration::from_secs(4);
/// Silence after which the driver sends a ping; after three times as long the connection is lost.
const PING_INTERVAL: Duration = Duration::from_millis(1200);
/// How often it is recorded that something was received.
const RECEIVE_CHECK: Duration = Duration::from_millis(500);

/// `HOST:PORT` of a URL, for messages: without the user and password that a URL may contain.
pub fn address(url: &str) -> String {
    url.parse::<ServerAddr>()
        .map_or_else(|_| "its URL".to_owned(), |server| outage::address(server.host(), server.port()))
}

/// One connection, until it is lost.
#[derive(Debug)]
pub struct Connection {
    pub client: Client,
    address: String,
    lost: CancellationToken,
    statistics: Arc<Statistics>,
    received_bytes: u64,
    received_at: Timestamp,
    checks: Interval,
}

impl Connection {
    /// Connects within [`TIMEOUT`]; `name` is shown in the server's list of connections.
    pub async fn open(url: &str, name: &str) -> Result<Self, Outage> {
        let address = address(url);
        let started = Timestamp::now();
        let lost = CancellationToken::new();
        let disconnected = lost.clone();
        let options = ConnectOptions::new()
            .name(name)
            .connection_timeout(TIMEOUT)
            .request_timeout(Some(TIMEOUT))
            .ping_interval(PING_INTERVAL)
            .event_callback(move |event| {
                if matches!(event, Event::Disconnected | Event::Closed) {
                    disconnected.cancel();
                }
                std::future::ready(())
            });
        let failure = match timeout(TIMEOUT, options.connect(url)).await {
            Ok(Ok(client)) => {
                let statistics = client.statistics();
                let checks = interval(RECEIVE_CHECK);
                return Ok(Self { client, address, lost, statistics, received_bytes: 0, received_at: started, checks });
            }
            Ok(Err(error)) => failure(&error),
            Err(_elapsed) => Failure::Silent,
        };
        Err(outage(&address, started, failure))
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Resolves when the connection is lost. Dropping the future loses nothing.
    pub async fn lost(&mut self) -> Outage {
        loop {
            tokio::select! {
                () = self.lost.cancelled() => return self.outage(),
                _ = self.checks.tick() => self.check_received(),
            }
        }
    }

    /// The outage: the server has been silent since the last byte that was received, or has just closed the connection.
    pub fn outage(&mut self) -> Outage {
        self.check_received();
        let now = Timestamp::now();
        // the driver pings after one interval, so a server that answers is never silent for two
        if now.duration_since(self.received_at).unsigned_abs() > 2 * PING_INTERVAL {
            return outage(&self.address, self.received_at, Failure::Silent);
        }
        outage(&self.address, now, Failure::Disconnected("the connection was closed".to_owned()))
    }

    fn check_received(&mut self) {
        let bytes = self.statistics.in_bytes.load(std::sync::atomic::Ordering::Relaxed);
        if std::mem::replace(&mut self.received_bytes, bytes) != bytes {
            self.received_at = Timestamp::now();
        }
    }
}

/// The outage when a request to JetStream failed, on a connection that works otherwise.
pub fn jetstream_outage(address: &str, since: Timestamp, error: &(dyn std::error::Error + 'static)) -> Outage {
    Outage { server: "JetStream on NATS", address: address.to_owned(), since, failure: jetstream_failure(error) }
}

fn jetstream_failure(error: &(dyn std::error::Error + 'static)) -> Failure {
    let causes = std::iter::successors(Some(error), |error| error.source());
    let kinds = causes.filter_map(|cause| cause.downcast_ref::<RequestError>()).map(RequestError::kind);
    match kinds.last() {
        Some(RequestErrorKind::TimedOut) => Failure::Silent,
        Some(RequestErrorKind::NoResponders) => {
            Failure::Refused("JetStream is not enabled on the server, or not for this account".to_owned())
        }
        _ => Failure::Refused(outage::with_causes(error)),
    }
}

fn outage(address: &str, since: Timestamp, failure: Failure) -> Outage {
    Outage { server: "NATS", address: address.to_owned(), since, failure }
}

fn failure(error: &ConnectError) -> Failure {
    let cause = std::error::Error::source(error);
    match error.kind() {
        ConnectErrorKind::TimedOut => Failure::Silent,
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            Failure::Refused(format!("{error}; check the user and password of the URL"))
        }
        _ => match cause.and_then(|cause| cause.downcast_ref::<std::io::Error>()) {
            Some(error) => Failure::of_io(error),
            None => Failure::Disconnected(error.to_string()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_no_credentials() {
        assert_eq!(address("nats://user:secret@nats.shop:4222"), "nats.shop:4222");
        assert_eq!(address("nats://[::1]:4223"), "[::1]:4223");
        assert_eq!(address("nats.shop"), "nats.shop:4222");
    }

    #[tokio::test]
    async fn a_server_that_refuses_connections_and_one_that_is_silent_are_distinguished() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = silent.local_addr().unwrap();
        let started = std::time::Instant::now();
        let error = Connection::open(&format!("nats://{address}"), "test").await.unwrap_err();
        assert_eq!(error.failure, Failure::Silent);
        assert!(started.elapsed() < Duration::from_secs(5));
        drop(silent);
        let error = Connection::open(&format!("nats://{address}"), "test").await.unwrap_err();
        assert_eq!(error.failure, Failure::Disconnected("connection refused".to_owned()));
    }
}
