//! Shared by everything that uses NATS: connecting, and detecting within five seconds that the server does not answer.
//!
//! The driver sends a ping when it has received nothing for [`PING_INTERVAL`], and gives the connection up when three
//! intervals have passed without a byte. A lost connection is not re-established by the driver but replaced by its user,
//! who must know what was in flight.

pub mod accounts;

use std::{io, sync::Arc, time::Duration};

use async_nats::{
    Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr, Statistics,
    jetstream::context::{RequestError, RequestErrorKind},
};
use jiff::Timestamp;
use tokio::time::{Interval, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::{
    contract::relay::NatsSink,
    outage::{self, Failure, Outage},
    secret::{self, SecretFolder},
};

/// Deadline of connecting, and default deadline of requests.
pub const TIMEOUT: Duration = Duration::from_secs(4);
/// Silence after which the driver sends a ping; after three times as long the connection is lost.
const PING_INTERVAL: Duration = Duration::from_millis(1200);
/// How often it is recorded that something was received.
const RECEIVE_CHECK: Duration = Duration::from_millis(500);

/// `HOST:PORT` of each URL, for messages: without the user and password that a URL may contain.
pub fn address(urls: &[String]) -> String {
    let address = |url: &String| {
        url.parse::<ServerAddr>()
            .map_or_else(|_| "its URL".to_owned(), |server| outage::address(server.host(), server.port()))
    };
    urls.iter().map(address).collect::<Vec<_>>().join(", ")
}

/// Where a server is, and as whom one connects.
#[derive(Clone, Debug)]
pub struct Server {
    /// `nats://HOST:PORT` or `tls://HOST:PORT`, of one cluster.
    pub urls: Vec<String>,
    pub credentials: Credentials,
    /// Prefix of the subjects on which requests are answered; the driver's own when `None`.
    pub inbox: Option<String>,
}

#[derive(Clone)]
pub enum Credentials {
    /// None but what the URL may contain.
    None,
    /// A credentials file, a user and password, or a token; and certificates. Read for each connection.
    Secret(SecretFolder),
    /// Of the form of a credentials file: <https://docs.nats.io/using-nats/developer/connecting/creds>.
    Text(String),
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Secret(_) => "Secret",
            Self::Text(_) => "Text",
        })
    }
}

impl From<&NatsSink> for Server {
    fn from(sink: &NatsSink) -> Self {
        let folder = sink.secret_folder.clone();
        Self {
            urls: sink.servers.clone(),
            credentials: folder
                .map_or(Credentials::None, |folder| Credentials::Secret(SecretFolder::new(Some(folder)))),
            inbox: None,
        }
    }
}

impl Credentials {
    /// The error has nothing of what is in the credentials.
    async fn options(&self) -> Result<ConnectOptions, String> {
        let options = ConnectOptions::new();
        let unusable = |_: io::Error| format!("{} is no credentials file of NATS", secret::NATS_CREDENTIALS);
        let secret = match self {
            Self::None => return Ok(options),
            Self::Text(text) => return options.credentials(text).map_err(unusable),
            Self::Secret(secret) => secret,
        };
        let failed = |error: secret::SecretError| error.to_string();
        let options = options.tls_client_config(secret.tls().await.map_err(failed)?);
        if let Some(text) = secret.text(secret::NATS_CREDENTIALS).await.map_err(failed)? {
            // the form has a line break at its end
            return options.credentials(&format!("{text}\n")).map_err(unusable);
        }
        if let Some((user, password)) = secret.login().await.map_err(failed)? {
            return Ok(options.user_and_password(user, password));
        }
        Ok(match secret.text(secret::TOKEN).await.map_err(failed)? {
            Some(token) => options.token(token),
            None => options,
        })
    }

    /// What is to be checked when the server refuses them.
    fn remedy(&self) -> String {
        match self {
            Self::None => {
                "name a Secret with credentials; those who leave the servers out get the credentials of the broker that is installed with Weft"
                    .to_owned()
            }
            Self::Secret(_) => {
                "check the Secret; at the broker that is installed with Weft, the operator makes the account of this namespace, and its log says why it could not"
                    .to_owned()
            }
            Self::Text(_) => "it was started with other keys, or has not been given this account yet".to_owned(),
        }
    }
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
    pub async fn open(server: &Server, name: &str) -> Result<Self, Outage> {
        let Server { urls, credentials, inbox } = server;
        let address = address(urls);
        let started = Timestamp::now();
        let lost = CancellationToken::new();
        let disconnected = lost.clone();
        let options = credentials
            .options()
            .await
            .map_err(|why| {
                outage(&address, started, Failure::Refused(format!("the credentials cannot be used: {why}")))
            })?
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
        let options = match inbox {
            Some(prefix) => options.custom_inbox_prefix(prefix),
            None => options,
        };
        let failure = match timeout(TIMEOUT, options.connect(urls)).await {
            Ok(Ok(client)) => {
                let statistics = client.statistics();
                let checks = interval(RECEIVE_CHECK);
                return Ok(Self { client, address, lost, statistics, received_bytes: 0, received_at: started, checks });
            }
            Ok(Err(error)) => failure(&error, credentials),
            Err(_elapsed) => Failure::Silent,
        };
        Err(outage(&address, started, failure))
    }

    /// `HOST:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// When the server's last byte is known to have been received.
    pub fn received_at(&self) -> Timestamp {
        self.received_at
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

fn failure(error: &ConnectError, credentials: &Credentials) -> Failure {
    let cause = std::error::Error::source(error);
    match error.kind() {
        ConnectErrorKind::TimedOut => Failure::Silent,
        ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
            Failure::Refused(format!("{error}; {}", credentials.remedy()))
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
        let address = |url: &str| address(&[url.to_owned()]);
        assert_eq!(address("nats://user:secret@nats.shop:4222"), "nats.shop:4222");
        assert_eq!(address("nats://[::1]:4223"), "[::1]:4223");
        assert_eq!(address("nats.shop"), "nats.shop:4222");
        assert_eq!(super::address(&["tls://a".to_owned(), "tls://b:1".to_owned()]), "a:4222, b:1");
    }

    #[tokio::test]
    async fn a_secret_has_a_credentials_file_with_or_without_its_last_line_break() {
        let text =
            accounts::Accounts::new("a seed".to_owned()).credentials("shop", "person", accounts::Access::Consume);
        for text in [text.clone(), text.trim_end().to_owned()] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(secret::NATS_CREDENTIALS), text).unwrap();
            let credentials = Credentials::Secret(SecretFolder::new(Some(folder.path().to_owned())));
            assert!(credentials.options().await.is_ok());
            std::fs::write(folder.path().join(secret::NATS_CREDENTIALS), "secret").unwrap();
            assert_eq!(credentials.options().await.unwrap_err(), "nats.creds is no credentials file of NATS");
        }
    }

    #[tokio::test]
    async fn a_server_that_refuses_connections_and_one_that_is_silent_are_distinguished() {
        let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = silent.local_addr().unwrap();
        let started = std::time::Instant::now();
        let server = Server { urls: vec![format!("nats://{address}")], credentials: Credentials::None, inbox: None };
        let error = Connection::open(&server, "test").await.unwrap_err();
        assert_eq!(error.failure, Failure::Silent);
        assert!(started.elapsed() < Duration::from_secs(5));
        drop(silent);
        let error = Connection::open(&server, "test").await.unwrap_err();
        assert_eq!(error.failure, Failure::Disconnected("connection refused".to_owned()));
    }
}
