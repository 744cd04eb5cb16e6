//! A server that a program needs and cannot use: what, where, since when, why.

use std::{error::Error, fmt, io};

use jiff::Timestamp;

/// A server that cannot be used at present. Displays as a sentence without its full stop:
/// `NATS at nats.shop:4222 has not answered since 12:04:05 UTC`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outage {
    /// What it is: `NATS`, `PostgreSQL`.
    pub server: &'static str,
    /// `HOST:PORT`, an IPv6 literal in brackets. Never a URL, which may contain a password.
    pub address: String,
    pub since: Timestamp,
    pub failure: Failure,
}

/// Why a server cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It sends nothing: its process is stopped, or the network drops the packets.
    Silent,
    /// There is no connection: `connection refused`.
    Disconnected(String),
    /// It answers, and refuses: `password authentication failed for user "relay" (SQLSTATE 28P01)`.
    Refused(String),
}

impl fmt::Display for Outage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { server, address, since, failure } = self;
        let since = since.strftime("%H:%M:%S UTC");
        match failure {
            Failure::Silent => write!(f, "{server} at {address} has not answered since {since}"),
            Failure::Disconnected(cause) => {
                write!(f, "{server} at {address} has not accepted connections since {since}: {cause}")
            }
            Failure::Refused(cause) => write!(f, "{server} at {address} has refused requests since {since}: {cause}"),
        }
    }
}

impl Outage {
    /// Keeps the start of the first failure, so that every attempt during one outage reports the same time.
    #[must_use]
    pub fn continued(mut self, since: &mut Option<Timestamp>) -> Self {
        self.since = *since.get_or_insert(self.since);
        self
    }
}

impl Failure {
    pub fn of_io(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::TimedOut => Self::Silent,
            // the kind's text has no `(os error 111)`
            io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof => Self::Disconnected(error.kind().to_string()),
            _ => Self::Disconnected(error.to_string()),
        }
    }
}

/// `HOST:PORT`, an IPv6 literal in brackets, as in a URL.
pub fn address(host: &str, port: u16) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

/// An error with its causes, on one line. A cause that the text contains already is left out.
pub fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// The innermost cause of an error, which says what happened: those around it say that a request failed.
pub fn innermost_cause(error: &(dyn Error + 'static)) -> String {
    let mut cause = error;
    while let Some(next) = cause.source() {
        if let Some(error) = next.downcast_ref::<io::Error>()
            && let Failure::Disconnected(text) = Failure::of_io(error)
        {
            return text;
        }
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outage(failure: Failure) -> Outage {
        let since = "2026-01-02T12:04:05.678Z".parse().unwrap();
        Outage { server: "NATS", address: address("nats.shop", 4222), since, failure }
    }

    #[test]
    fn an_outage_has_what_where_since_when_and_why() {
        assert_eq!(outage(Failure::Silent).to_string(), "NATS at nats.shop:4222 has not answered since 12:04:05 UTC");
        let refused = Failure::of_io(&io::Error::from(io::ErrorKind::ConnectionRefused));
        assert_eq!(
            outage(refused).to_string(),
            "NATS at nats.shop:4222 has not accepted connections since 12:04:05 UTC: connection refused"
        );
    }

    #[test]
    fn every_attempt_of_an_outage_reports_the_same_time() {
        let mut since = None;
        let first = outage(Failure::Silent).continued(&mut since);
        let mut second = outage(Failure::Disconnected("connection refused".to_owned()));
        second.since = Timestamp::now();
        assert_eq!(second.continued(&mut since).since, first.since);
    }

    #[test]
    fn an_ipv6_literal_is_in_brackets() {
        assert_eq!((address("::1", 5432).as_str(), address("db", 5432).as_str()), ("[::1]:5432", "db:5432"));
    }
}
