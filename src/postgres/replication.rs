//! A thin client of PostgreSQL's streaming replication protocol, for logical slots read through `pgoutput`.
//!
//! The query driver has no replication mode (no CopyBoth), so start-up, authentication and framing are implemented here
//! on `postgres-protocol`. Data is returned as slices of the receive buffer; a caller that keeps data copies it.
//! Source: PostgreSQL documentation, "Streaming Replication Protocol" and "Logical Streaming Replication Protocol".

#[cfg(test)]
mod fuzz;
pub mod pgoutput;
mod stream;

use std::{fmt, io, str::FromStr, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use fallible_iterator::FallibleIterator;
use postgres_protocol::{
    authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
    message::{
        backend::{DataRowBody, ErrorResponseBody, Header, Message},
        frontend,
    },
};
use secrecy::ExposeSecret;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

use self::stream::Stream;
use super::login::{self, CONNECT_TIMEOUT, LoginError, Prepared};
use crate::{contract::DatabaseLogin, outage::Failure};

/// Size in which the receive buffer is allocated; it is reused when no frame of it is left.
const CHUNK: usize = 64 * 1024;
/// Deadline of a command's answer.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest message that a server sends (`MaxAllocSize` of PostgreSQL).
const MAX_MESSAGE: usize = 1 << 30;
/// `CopyBothResponse`, which `postgres-protocol` does not know.
const COPY_BOTH_RESPONSE: u8 = b'W';
/// SQLSTATE `object_in_use`: another process streams from the slot.
const OBJECT_IN_USE: &str = "55006";
/// Microseconds from 1970 to 2000, where PostgreSQL's clock begins.
pub const POSTGRES_EPOCH: i64 = 946_684_800_000_000;

#[derive(Debug, thiserror::Error)]
pub enum ReplicationError {
    #[error(transparent)]
    Login(#[from] LoginError),
    #[error("connecting to {host}:{port} for replication")]
    Connect {
        host: String,
        port: u16,
        #[source]
        source: io::Error,
    },
    #[error("exchanging data with the replication server")]
    Io(#[from] io::Error),
    #[error("the replication server did not answer within {} s", .0.as_secs())]
    Timeout(Duration),
    #[error("the replication server closed the connection")]
    Closed,
    #[error("the server refused replication: {message} (SQLSTATE {code})")]
    Server { code: String, message: String },
    #[error("unexpected replication message: {0}")]
    Protocol(&'static str),
}

impl ReplicationError {
    /// How the server failed.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Login(error) => error.failure(),
            Self::Connect { source, .. } | Self::Io(source) => Failure::of_io(source),
            Self::Timeout(_) => Failure::Silent,
            Self::Closed => Failure::Disconnected("the connection was closed".to_owned()),
            Self::Server { code, message } => super::refusal(code, message),
            Self::Protocol(_) => Failure::Refused(self.to_string()),
        }
    }

    /// The slot, or what it still has to send, cannot be read, and will not be when it is tried again: the publication did
    /// not exist when it was written, the log is gone, what it has cannot be decoded.
    pub fn is_of_the_slot(&self) -> bool {
        match self {
            // 08, 53, 57: connection, resources, operator intervention; 28: login; 55006: in use
            Self::Server { code, .. } => {
                code != OBJECT_IN_USE && !["08", "28", "53", "57"].iter().any(|class| code.starts_with(class))
            }
            Self::Protocol(_) => true,
            Self::Login(_) | Self::Connect { .. } | Self::Io(_) | Self::Timeout(_) | Self::Closed => false,
        }
    }

    /// Another process streams from the slot.
    pub fn is_slot_in_use(&self) -> bool {
        matches!(self, Self::Server { code, .. } if code == OBJECT_IN_USE)
    }
}

/// A position in the write-ahead log, written `16/B374D848`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

impl FromStr for Lsn {
    type Err = ReplicationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = ReplicationError::Protocol("an LSN that is not X/X");
        let Some((high, low)) = text.split_once('/') else { return Err(bad) };
        match (u32::from_str_radix(high, 16), u32::from_str_radix(low, 16)) {
            (Ok(high), Ok(low)) => Ok(Self(u64::from(high) << 32 | u64::from(low))),
            _ => Err(bad),
        }
    }
}

/// A slot that was just created; `snapshot` can be imported until the next command on the same connection.
#[derive(Debug)]
pub struct CreatedSlot {
    /// Every transaction that committed before it is in the snapshot, every later one will be streamed.
    pub consistent_point: Lsn,
    pub snapshot: String,
}

/// A connection in replication mode that is not streaming.
#[derive(Debug)]
pub struct Replication {
    wire: Wire,
    process: i32,
}

impl Replication {
    /// Connects and logs in with `replication=database`.
    pub async fn connect(login: &DatabaseLogin, application: &str) -> Result<Self, ReplicationError> {
        let login = login::prepare(login, application).await?;
        let stream = timeout(CONNECT_TIMEOUT, stream::open(&login.address))
            .await
            .map_err(|_elapsed| ReplicationError::Timeout(CONNECT_TIMEOUT))??;
        let mut wire = Wire { stream, input: BytesMut::with_capacity(CHUNK), output: BytesMut::new() };
        let started = wire.start_up(&login, application);
        let process = timeout(CONNECT_TIMEOUT, started)
            .await
            .map_err(|_elapsed| ReplicationError::Timeout(CONNECT_TIMEOUT))??;
        Ok(Self { wire, process })
    }

    /// The server's process, as in `pg_stat_activity.pid`.
    pub fn process(&self) -> i32 {
        self.process
    }

    /// Creates a logical slot and exports the snapshot at which it begins. Has no deadline: the server waits for the
    /// end of every transaction that was running when it began, so the caller sets one.
    pub async fn create_slot(&mut self, slot: &str) -> Result<CreatedSlot, ReplicationError> {
        let command = format!("CREATE_REPLICATION_SLOT {} LOGICAL pgoutput (SNAPSHOT 'export')", quote(slot));
        let rows = self.wire.query(&command).await?;
        let mut columns = rows.into_iter().next().unwrap_or_default().into_iter().skip(1);
        match (columns.next().flatten(), columns.next().flatten()) {
            (Some(point), Some(snapshot)) => Ok(CreatedSlot { consistent_point: point.parse()?, snapshot }),
            _ => Err(ReplicationError::Protocol("a created slot without position and snapshot")),
        }
    }

    /// Releases the exported snapshot, which keeps the server from removing dead rows. Any command on the connection
    /// releases it.
    pub async fn release_snapshot(&mut self) -> Result<(), ReplicationError> {
        timeout(COMMAND_TIMEOUT, self.wire.query("IDENTIFY_SYSTEM"))
            .await
            .map_err(|_elapsed| ReplicationError::Timeout(COMMAND_TIMEOUT))??;
        Ok(())
    }

    /// Starts streaming from `start`, or from the slot's confirmed position if that is later.
    pub async fn stream(mut self, slot: &str, publication: &str, start: Lsn) -> Result<WalStream, ReplicationError> {
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL {start} (proto_version '1', publication_names '{}', binary 'true')",
            quote(slot),
            quote(publication).replace('\'', "''"),
        );
        timeout(COMMAND_TIMEOUT, self.wire.start_copy(&command))
            .await
            .map_err(|_elapsed| ReplicationError::Timeout(COMMAND_TIMEOUT))??;
        Ok(WalStream { wire: self.wire })
    }
}

/// A frame of the CopyBoth stream.
#[derive(Debug)]
pub enum Frame {
    /// One `pgoutput` message.
    Data(Bytes),
    /// Everything that committed before `wal_end` has been sent.
    Keepalive { wal_end: Lsn, reply_requested: bool },
}

/// A connection that streams a slot's changes.
#[derive(Debug)]
pub struct WalStream {
    wire: Wire,
}

impl WalStream {
    /// The next frame; nothing is lost when the future is dropped.
    pub async fn next(&mut self) -> Result<Frame, ReplicationError> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(frame);
            }
            self.wire.fill().await?;
        }
    }

    /// The next frame, if it has been received already.
    pub fn buffered(&mut self) -> Result<Option<Frame>, ReplicationError> {
        loop {
            match self.wire.parse()? {
                None => return Ok(None),
                Some(Message::CopyData(body)) => return frame(body.into_bytes()).map(Some),
                Some(Message::ErrorResponse(body)) => return Err(refused(&body)),
                Some(Message::CopyDone) => return Err(ReplicationError::Closed),
                Some(Message::NoticeResponse(_) | Message::ParameterStatus(_)) => {}
                Some(_) => return Err(ReplicationError::Protocol("a message that does not belong in a stream")),
            }
        }
    }

    /// Confirms to the server that everything before `flushed` may be removed: the slot's `confirmed_flush_lsn` becomes
    /// `flushed`. With `reply_requested` the server answers with a keepalive.
    pub async fn confirm(&mut self, flushed: Lsn, reply_requested: bool) -> Result<(), ReplicationError> {
        let output = &mut self.wire.output;
        output.put_u8(b'd');
        output.put_i32(4 + 34);
        output.put_u8(b'r');
        for _written_flushed_applied in 0..3 {
            output.put_u64(flushed.0);
        }
        output.put_i64(jiff::Timestamp::now().as_microsecond() - POSTGRES_EPOCH);
        output.put_u8(u8::from(reply_requested));
        self.wire.send().await
    }
}

fn frame(mut body: Bytes) -> Result<Frame, ReplicationError> {
    let short = |_| ReplicationError::Protocol("a frame that ends early");
    match body.try_get_u8().map_err(short)? {
        b'w' if body.len() >= 24 => {
            // skips start and end of the data in the WAL, and the server's clock
            body.advance(24);
            Ok(Frame::Data(body))
        }
        b'k' => {
            let wal_end = Lsn(body.try_get_u64().map_err(short)?);
            let _clock = body.try_get_i64().map_err(short)?;
            Ok(Frame::Keepalive { wal_end, reply_requested: body.try_get_u8().map_err(short)? != 0 })
        }
        _ => Err(ReplicationError::Protocol("a frame of unknown kind")),
    }
}

fn quote(identifier: &str) -> String {
    format!("\"{}\"", identifier.replace('"', "\"\""))
}

fn refused(body: &ErrorResponseBody) -> ReplicationError {
    let (mut code, mut message) = (String::new(), String::new());
    let mut fields = body.fields();
    while let Ok(Some(field)) = fields.next() {
        let value = || String::from_utf8_lossy(field.value_bytes()).into_owned();
        match field.type_() {
            b'C' => code = value(),
            b'M' => message = value(),
            _ => {}
        }
    }
    ReplicationError::Server { code, message }
}

#[derive(Debug)]
struct Wire {
    stream: Stream,
    input: BytesMut,
    output: BytesMut,
}

impl Wire {
    /// The next message, if it has been received as a whole. `Message::parse` alone would reserve what the server says that a
    /// message has, before a byte of it is there.
    fn parse(&mut self) -> Result<Option<Message>, ReplicationError> {
        let Some(header) = Header::parse(&self.input)? else { return Ok(None) };
        let length = usize::try_from(header.len()).ok().filter(|&length| length <= MAX_MESSAGE);
        let length = length.ok_or(ReplicationError::Protocol("a message longer than 1 GiB"))?;
        if self.input.len() <= length {
            return Ok(None);
        }
        Ok(Message::parse(&mut self.input)?)
    }

    async fn fill(&mut self) -> Result<(), ReplicationError> {
        if self.input.capacity() - self.input.len() < 4096 {
            self.input.reserve(CHUNK);
        }
        match self.stream.read_buf(&mut self.input).await? {
            0 => Err(ReplicationError::Closed),
            _ => Ok(()),
        }
    }

    async fn send(&mut self) -> Result<(), ReplicationError> {
        let written = async {
            self.stream.write_all(&self.output).await?;
            // TLS holds back what does not fill a record
            self.stream.flush().await
        };
        let written = timeout(WRITE_TIMEOUT, written).await;
        self.output.clear();
        written.map_err(|_elapsed| ReplicationError::Timeout(WRITE_TIMEOUT))??;
        Ok(())
    }

    async fn receive(&mut self) -> Result<Message, ReplicationError> {
        loop {
            match self.parse()? {
                Some(Message::ErrorResponse(body)) => return Err(refused(&body)),
                Some(Message::NoticeResponse(_) | Message::ParameterStatus(_)) => {}
                Some(message) => return Ok(message),
                None => self.fill().await?,
            }
        }
    }

    /// Starts the session and returns the server's process id.
    async fn start_up(&mut self, login: &Prepared, application: &str) -> Result<i32, ReplicationError> {
        let parameters = [
            ("user", login.role.as_str()),
            ("database", login.address.database.as_str()),
            ("replication", "database"),
            ("application_name", application),
            ("options", login::UNLIMITED),
            ("client_encoding", "UTF8"),
        ];
        frontend::startup_message(parameters, &mut self.output)?;
        self.send().await?;
        match self.receive().await? {
            Message::AuthenticationOk => {}
            Message::AuthenticationSasl(body) => {
                if !body.mechanisms().any(|mechanism| Ok(mechanism == SCRAM_SHA_256))? {
                    return Err(ReplicationError::Protocol("a server that does not offer SCRAM-SHA-256"));
                }
                self.scram(login.password.expose_secret()).await?;
            }
            _ => return Err(ReplicationError::Protocol("an authentication method other than SCRAM-SHA-256")),
        }
        let mut process = 0;
        loop {
            match self.receive().await? {
                Message::ReadyForQuery(_) => return Ok(process),
                Message::BackendKeyData(key) => process = key.process_id(),
                _ => return Err(ReplicationError::Protocol("a message that does not belong in the start-up")),
            }
        }
    }

    async fn scram(&mut self, password: &str) -> Result<(), ReplicationError> {
        let mut scram = ScramSha256::new(password.as_bytes(), ChannelBinding::unsupported());
        frontend::sasl_initial_response(SCRAM_SHA_256, scram.message(), &mut self.output)?;
        self.send().await?;
        let Message::AuthenticationSaslContinue(body) = self.receive().await? else {
            return Err(ReplicationError::Protocol("no SCRAM challenge"));
        };
        scram.update(body.data())?;
        frontend::sasl_response(scram.message(), &mut self.output)?;
        self.send().await?;
        let Message::AuthenticationSaslFinal(body) = self.receive().await? else {
            return Err(ReplicationError::Protocol("no SCRAM outcome"));
        };
        scram.finish(body.data())?;
        match self.receive().await? {
            Message::AuthenticationOk => Ok(()),
            _ => Err(ReplicationError::Protocol("no end of the authentication")),
        }
    }

    /// Rows of a simple query, as text.
    async fn query(&mut self, command: &str) -> Result<Vec<Vec<Option<String>>>, ReplicationError> {
        frontend::query(command, &mut self.output)?;
        self.send().await?;
        let mut rows = Vec::new();
        loop {
            match self.receive().await? {
                Message::DataRow(body) => rows.push(texts(&body)?),
                Message::ReadyForQuery(_) => return Ok(rows),
                _ => {}
            }
        }
    }

    async fn start_copy(&mut self, command: &str) -> Result<(), ReplicationError> {
        frontend::query(command, &mut self.output)?;
        self.send().await?;
        loop {
            if self.input.first() == Some(&COPY_BOTH_RESPONSE) {
                let length = self.input.get(1..5).and_then(|mut bytes| bytes.try_get_u32().ok());
                let whole = length.and_then(|length| usize::try_from(length).ok()).map(|length| length + 1);
                if let Some(whole) = whole.filter(|&whole| self.input.len() >= whole) {
                    self.input.advance(whole);
                    return Ok(());
                }
                self.fill().await?;
                continue;
            }
            match self.parse()? {
                Some(Message::ErrorResponse(body)) => return Err(refused(&body)),
                Some(_) => {}
                None => self.fill().await?,
            }
        }
    }
}

fn texts(body: &DataRowBody) -> Result<Vec<Option<String>>, ReplicationError> {
    let buffer = body.buffer();
    let text = |range| -> Option<String> { Some(String::from_utf8_lossy(buffer.get(range)?).into_owned()) };
    Ok(body.ranges().map(|range| Ok(range.and_then(text))).collect()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_is_read_as_it_is_written() {
        for text in ["0/0", "0/16B3748", "16/B374D848", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(text.parse::<Lsn>().unwrap().to_string(), text);
        }
        for text in ["", "0", "0/", "x/y", "1/100000000"] {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_frame_that_ends_early_is_an_error() {
        for bytes in [&b""[..], b"w", b"k", b"k12345678", b"x"] {
            assert!(frame(Bytes::copy_from_slice(bytes)).is_err());
        }
    }

    #[test]
    fn keepalives_and_data_are_distinguished() {
        let mut bytes = BytesMut::new();
        bytes.put_u8(b'k');
        bytes.put_u64(0x10);
        bytes.put_i64(0);
        bytes.put_u8(1);
        let frame = frame(bytes.freeze()).unwrap();
        assert!(matches!(frame, Frame::Keepalive { wal_end: Lsn(0x10), reply_requested: true }));
    }
}
