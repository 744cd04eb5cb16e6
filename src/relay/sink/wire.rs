//! A connection to a broker whose protocol is spoken here: bytes out, bytes in, and the time since the last ones.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use bytes::BytesMut;
use futures::{FutureExt, StreamExt, stream::FuturesUnordered};
use jiff::Timestamp;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split},
    net::TcpStream,
    time::{Instant, sleep_until, timeout},
};
use tokio_rustls::TlsConnector;
use url::Url;

use super::SinkError;
use crate::outage::{self, Failure, Outage};

/// Deadline of connecting and logging in.
pub const TIMEOUT: Duration = Duration::from_secs(4);
/// A server from which nothing has come for so long is lost.
const SILENT: Duration = Duration::from_secs(4);
/// When nothing was sent for so long, something is, so that a living server answers before [`SILENT`].
const IDLE: Duration = Duration::from_secs(1);
/// Bytes that wait to be sent, beyond which no more events are accepted.
const FULL: usize = 256 * 1024;
/// Room to read into.
const READ: usize = 16 * 1024;

/// A server's address that cannot be used. Without the URL, which may contain a password.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum AddressError {
    #[error("an address of the servers is not usable: give {0}://HOST:PORT, or {1}://HOST:PORT with TLS")]
    NoUrl(&'static str, &'static str),
    #[error("an address of the servers has a user or a password: they belong into the Secret")]
    HasCredentials,
}

/// Where a server is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    host: String,
    port: u16,
    tls: bool,
}

impl Address {
    /// Parses `SCHEME://HOST[:PORT]`. `schemes` are the one without TLS and the one with it, each with its default port.
    pub fn parse(url: &str, schemes: [(&'static str, u16); 2]) -> Result<Self, AddressError> {
        let [(plain, _), (secure, _)] = schemes;
        let unusable = || AddressError::NoUrl(plain, secure);
        let parsed = Url::parse(url).map_err(|_| unusable())?;
        let (scheme, port) = schemes.into_iter().find(|(scheme, _)| *scheme == parsed.scheme()).ok_or_else(unusable)?;
        let host = parsed.host_str().filter(|host| !host.is_empty()).ok_or_else(unusable)?;
        if !parsed.username().is_empty() || parsed.password().is_some() {
            return Err(AddressError::HasCredentials);
        }
        Ok(Self {
            host: host.trim_start_matches('[').trim_end_matches(']').to_owned(),
            port: parsed.port().unwrap_or(port),
            tls: scheme == secure,
        })
    }

    pub fn parse_all(urls: &[String], schemes: [(&'static str, u16); 2]) -> Result<Vec<Self>, AddressError> {
        urls.iter().map(|url| Self::parse(url, schemes)).collect()
    }

    pub async fn connect(&self) -> std::io::Result<TcpStream> {
        TcpStream::connect((self.host.as_str(), self.port)).await
    }

    pub fn is_tls(&self) -> bool {
        self.tls
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&outage::address(&self.host, self.port))
    }
}

/// Opens a session with the first of the servers that gives one. All are asked at once, so that one that is silent delays
/// nobody. The error is that of the servers which said most about why not.
pub async fn first<T, F: Future<Output = Result<T, Failure>>>(
    server: &'static str,
    addresses: &[Address],
    open: impl Fn(Address) -> F,
) -> Result<T, SinkError> {
    let since = Timestamp::now();
    let attempt = |address: &Address| {
        let opened = timeout(TIMEOUT, open(address.clone()));
        async move { opened.await.unwrap_or(Err(Failure::Silent)) }
    };
    let mut attempts: FuturesUnordered<_> =
        addresses.iter().enumerate().map(|(at, address)| attempt(address).map(move |ended| (at, ended))).collect();
    let mut failures = BTreeMap::new();
    while let Some((at, ended)) = attempts.next().await {
        match ended {
            Ok(session) => return Ok(session),
            Err(failure) => failures.insert(at, failure),
        };
    }
    // the first in the list of those that say the same, so that each attempt reports the same
    let failure = failures.values().rev().max_by_key(|failure| said(failure)).cloned();
    let failure = failure.unwrap_or_else(|| Failure::Refused("no server is named".to_owned()));
    let same = addresses.iter().enumerate().filter(|(at, _)| failures.get(at) == Some(&failure));
    let address = same.map(|(_, address)| address.to_string()).collect::<Vec<_>>().join(", ");
    Err(SinkError::Unreachable(Outage { server, address, since, failure }))
}

fn said(failure: &Failure) -> u8 {
    match failure {
        Failure::Silent => 0,
        Failure::Disconnected(_) => 1,
        Failure::Refused(_) => 2,
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// What [`Wire::exchange`] waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Bytes came.
    Received,
    /// There is room for more events again.
    Room,
    /// Nothing was sent for a while: something is to be sent that the server answers, or that says that the client lives.
    Idle,
}

/// One connection to a server.
pub struct Wire {
    reader: ReadHalf<Box<dyn Stream>>,
    writer: WriteHalf<Box<dyn Stream>>,
    pub input: BytesMut,
    pub output: BytesMut,
    /// Written into the TLS layer and not yet into the socket.
    unflushed: bool,
    /// The other side reads no more; what it said last may still be read.
    closed: Option<Failure>,
    received: Instant,
    sent: Instant,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("to send", &self.output.len()).finish_non_exhaustive()
    }
}

impl Wire {
    /// Connects; the caller has a deadline.
    pub async fn open(address: &Address, tls: Option<ClientConfig>) -> Result<Self, Failure> {
        let failed = |error| Failure::of_io(&error);
        let tcp = address.connect().await.map_err(failed)?;
        tcp.set_nodelay(true).map_err(failed)?;
        let stream: Box<dyn Stream> = match tls {
            None => Box::new(tcp),
            Some(config) => {
                let name = ServerName::try_from(address.host.clone())
                    .map_err(|_| Failure::Refused("its name cannot be in a certificate".to_owned()))?;
                let connector = TlsConnector::from(Arc::new(config));
                let connected = connector.connect(name, tcp).await;
                Box::new(connected.map_err(|error| Failure::Disconnected(format!("TLS failed: {error}")))?)
            }
        };
        let (reader, writer) = split(stream);
        let now = Instant::now();
        Ok(Self {
            reader,
            writer,
            input: BytesMut::new(),
            output: BytesMut::new(),
            unflushed: false,
            closed: None,
            received: now,
            sent: now,
        })
    }

    pub fn has_room(&self) -> bool {
        self.output.len() < FULL
    }

    /// The error of a connection that is lost: a silent server has been so since its last byte.
    pub fn lost(&self, server: &'static str, address: &str, failure: Failure) -> SinkError {
        let now = Timestamp::now();
        let since = if failure == Failure::Silent { now - self.received.elapsed() } else { now };
        SinkError::Unreachable(Outage { server, address: address.to_owned(), since, failure })
    }

    /// Sends the output and waits until something is to be done. Dropping the future loses nothing.
    pub async fn exchange(&mut self) -> Result<Progress, Failure> {
        loop {
            self.input.reserve(READ);
            let (full, idle) = (!self.has_room(), self.sent + IDLE);
            let open = self.closed.is_none();
            tokio::select! {
                biased; // what was read makes room for what is to be written
                read = self.reader.read_buf(&mut self.input) => {
                    let failure = match read {
                        Ok(0) => Failure::Disconnected("the connection was closed".to_owned()),
                        Ok(_) => {
                            self.received = Instant::now();
                            return Ok(Progress::Received);
                        }
                        Err(error) => Failure::of_io(&error),
                    };
                    return Err(self.closed.take().unwrap_or(failure));
                }
                written = write(&mut self.writer, &mut self.output), if open && (self.unflushed || !self.output.is_empty()) => {
                    self.sent = Instant::now();
                    self.unflushed = matches!(written, Ok(1..));
                    self.closed = written.err().map(|error| Failure::of_io(&error));
                    if full && self.has_room() {
                        return Ok(Progress::Room);
                    }
                }
                () = sleep_until(idle), if open && self.output.is_empty() => {
                    self.sent = Instant::now();
                    return Ok(Progress::Idle);
                }
                () = sleep_until(self.received + SILENT) => return Err(Failure::Silent),
            }
        }
    }
}

/// Writes some bytes, or flushes when there are none. Dropping the future loses nothing.
async fn write(writer: &mut WriteHalf<Box<dyn Stream>>, output: &mut BytesMut) -> std::io::Result<usize> {
    if output.is_empty() {
        return writer.flush().await.map(|()| 0);
    }
    writer.write_buf(output).await
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    const SCHEMES: [(&str, u16); 2] = [("redis", 6379), ("rediss", 6380)];

    fn address(url: &str) -> Result<Address, AddressError> {
        Address::parse(url, SCHEMES)
    }

    #[test]
    fn an_address_has_a_scheme_a_host_and_a_port() {
        for (url, expected, tls) in [
            ("redis://redis.shop", "redis.shop:6379", false),
            ("rediss://redis.shop", "redis.shop:6380", true),
            ("rediss://[::1]:7000", "[::1]:7000", true),
        ] {
            let address = address(url).unwrap();
            assert_eq!((address.to_string().as_str(), address.is_tls()), (expected, tls));
        }
        for url in ["", "redis.shop", "redis://", "http://redis.shop", "redis://relay:secret@redis.shop"] {
            let error = address(url).unwrap_err().to_string();
            assert!(!error.contains("secret"), "{error}");
        }
    }

    async fn open(address: Address) -> Result<Wire, Failure> {
        Wire::open(&address, None).await
    }

    #[tokio::test]
    async fn one_server_of_several_is_enough_and_the_one_that_says_most_is_reported() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = address(&format!("redis://{}", listener.local_addr().unwrap())).unwrap();
        let gone = address("redis://127.0.0.1:9").unwrap();
        assert!(first("Redis", &[gone.clone(), there.clone()], open).await.is_ok());
        let refuse = async |address: Address| match address.port {
            9 => Err::<Wire, _>(Failure::Disconnected("connection refused".to_owned())),
            _ => Err(Failure::Refused("WRONGPASS".to_owned())),
        };
        let reported = async |addresses: &[Address]| match first("Redis", addresses, refuse).await {
            Err(SinkError::Unreachable(outage)) => (outage.address, outage.failure),
            other => panic!("{other:?}"),
        };
        let refused = (there.to_string(), Failure::Refused("WRONGPASS".to_owned()));
        assert_eq!(reported(&[gone.clone(), there.clone()]).await, refused);
        assert_eq!(reported(&[there, gone.clone()]).await, refused);
        let (both, _) = reported(&[gone.clone(), gone]).await;
        assert_eq!(both, "127.0.0.1:9, 127.0.0.1:9");
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_is_asked_when_it_is_quiet_and_lost_when_it_stays_silent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut wire = open(address(&format!("redis://{}", listener.local_addr().unwrap())).unwrap()).await.unwrap();
        let _silent = listener.accept().await.unwrap();
        let started = Instant::now();
        let mut asked = 0;
        let failure = loop {
            match wire.exchange().await {
                Ok(progress) => assert_eq!(progress, Progress::Idle),
                Err(failure) => break failure,
            }
            asked += 1;
            wire.output.extend_from_slice(b"PING\r\n");
        };
        assert_eq!((failure, asked >= 2), (Failure::Silent, true));
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn what_a_server_says_before_it_closes_is_read() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut wire = open(address(&format!("redis://{}", listener.local_addr().unwrap())).unwrap()).await.unwrap();
        let (mut server, _) = listener.accept().await.unwrap();
        server.write_all(b"-ERR no\r\n").await.unwrap();
        drop(server);
        wire.output.extend_from_slice(&[0; 1024]);
        assert_eq!(wire.exchange().await, Ok(Progress::Received));
        assert_eq!(&wire.input[..], b"-ERR no\r\n");
        assert!(matches!(wire.exchange().await, Err(Failure::Disconnected(_))));
    }
}
