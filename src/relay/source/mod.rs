//! Where events come from: batches of events with marks between them.
//!
//! # The contract
//! - Events come in the order in which their transactions became visible, and within a transaction in the order of
//!   their rows.
//! - A mark is a position that may be recorded once every event before it is settled (published or held), and not
//!   earlier. It is opaque to everyone but its source.
//! - After a restart the source starts at the last *recorded* mark or earlier, so an event that was not settled comes
//!   again, under the same id.
//! - A held event is not read again by the source but from the record ([`Again`]), until it is published.

pub mod postgres;

use std::time::Duration;

use tokio::sync::{mpsc, watch};

use self::postgres::snapshot::Snapshot;
use crate::{
    domain::event::{Event, Position},
    outage::Failure,
    postgres::{
        self as server,
        replication::{Lsn, ReplicationError},
        session::{self, SessionError},
    },
};

/// Approximate size of a batch, in events and in bytes.
pub const BATCH_EVENTS: usize = 256;
pub const BATCH_BYTES: usize = 256 * 1024;

/// An event and where its row is.
#[derive(Debug)]
pub struct Row {
    pub event: Event,
    pub place: Place,
    /// When its transaction committed, in microseconds since 1970 by the database's clock. The log says it; of a row of the table
    /// it is `created_at`.
    pub committed_at: Option<i64>,
}

/// The row of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub seq: i64,
    /// The transaction that has inserted it; `None` when the row was visible as it was read.
    pub transaction: Option<u64>,
}

#[derive(Debug)]
#[allow(
    clippy::large_enum_variant,
    reason = "nearly all are events, and a box would be an allocation for each of them"
)]
pub enum Item {
    Event(Row),
    Mark(Mark),
}

/// A position between events. Serials of a source grow by one from mark to mark. Only the last one of several that are
/// passed is recorded, so each says all that there is to record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    pub serial: u64,
    pub point: Point,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Point {
    /// Everything from before the slot, which begins here, and all rows that the snapshot sees; for `floor` see `Seen`.
    Slot { begins: Lsn, snapshot: Option<Snapshot>, floor: Lsn },
    /// The end of a transaction; the LSN is the end of its commit record.
    Committed(Lsn),
    /// All rows that the snapshot sees; no later event may have a lower position than `floor`.
    Seen { snapshot: Snapshot, floor: Lsn },
}

impl Point {
    pub fn lsn(&self) -> Lsn {
        match self {
            Self::Slot { begins: lsn, .. } | Self::Committed(lsn) | Self::Seen { floor: lsn, .. } => *lsn,
        }
    }
}

pub type Batch = Vec<Item>;

/// What the publisher hands over to be recorded: what has become of events, and the last mark before which all are
/// settled.
#[derive(Debug, Default)]
pub struct Done {
    /// Acknowledged by the broker.
    pub published: Vec<Place>,
    /// Of these, the ones that were held, with their keys.
    pub freed: Vec<(u64, i64)>,
    /// Newly held, in the order in which they are to be published.
    pub held: Vec<Held>,
    /// Held, published again, and refused again: `seq` and why.
    pub refused: Vec<(i64, String)>,
    /// The broker refuses the events of everybody: none of these is to be given up.
    pub everybody: bool,
    pub mark: Option<Mark>,
}

impl Done {
    pub fn is_empty(&self) -> bool {
        self.published.is_empty() && self.held.is_empty() && self.refused.is_empty() && self.mark.is_none()
    }
}

/// An event that leaves the window unpublished.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    pub place: Place,
    pub key: u64,
    pub position: Position,
    /// Why it is refused; `None`: it waits behind another one of its key.
    pub cause: Option<String>,
}

/// What comes back from the record of held events.
#[derive(Debug)]
pub enum Again {
    /// To be published now. Events of one key come in their order.
    Event(Box<Row>),
    /// No event of `key` is held any more, when the publisher has handed over this many of it.
    Free { key: u64, handed: u64 },
}

#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("{action}")]
    Query {
        action: &'static str,
        #[source]
        source: tokio_postgres::Error,
    },
    #[error("streaming the outbox")]
    Replication(#[from] ReplicationError),
    #[error(transparent)]
    Login(#[from] crate::postgres::login::LoginError),
    #[error("weft.outbox is not as `weft database setup` creates it: {0}")]
    Layout(&'static str),
    #[error(
        "the publication of the outbox has the table {table}, which is not the outbox: take it out with `alter publication`"
    )]
    NotTheOutbox { table: String },
    #[error("weft.relay_ledger is another server's, or another relay writes it")]
    LedgerReplaced,
    #[error("the database did not answer within {0} s")]
    Timeout(u64),
    #[error("the publisher has ended")]
    Ended,
}

impl From<SessionError> for SourceError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Login(error) => Self::Login(error),
            SessionError::Query { action, source } => Self::Query { action, source },
            SessionError::Timeout(seconds) => Self::Timeout(seconds),
            SessionError::Lost => Self::Ended,
        }
    }
}

impl SourceError {
    /// How the database failed: it refused, is silent, or there is no connection.
    pub(crate) fn failure(&self) -> Failure {
        let failure = match self {
            Self::Query { source, .. } => server::failure(source),
            Self::Login(error) => error.failure(),
            Self::Replication(error) => error.failure(),
            Self::Layout(_) | Self::NotTheOutbox { .. } => Failure::Refused(self.to_string()),
            Self::Timeout(_) => Failure::Silent,
            Self::LedgerReplaced | Self::Ended => Failure::Disconnected(self.to_string()),
        };
        match (self, failure) {
            (Self::Query { action, .. }, Failure::Refused(cause)) => Failure::Refused(format!("{action}: {cause}")),
            (Self::Replication(_), Failure::Refused(cause)) => Failure::Refused(format!("{self}: {cause}")),
            (_, failure) => failure,
        }
    }

    /// The slot, or what it still has to send, cannot be read, and will not be when it is tried again.
    pub(crate) fn is_of_the_slot(&self) -> bool {
        match self {
            Self::Replication(error) => error.is_of_the_slot(),
            Self::Layout(_) | Self::NotTheOutbox { .. } => true,
            _ => false,
        }
    }

    pub(crate) fn query(action: &'static str) -> impl Fn(tokio_postgres::Error) -> Self {
        move |source| Self::Query { action, source }
    }
}

pub(crate) async fn send(batches: &mpsc::Sender<Batch>, batch: Batch) -> Result<(), SourceError> {
    if batch.is_empty() {
        return Ok(());
    }
    batches.send(batch).await.map_err(|_closed| SourceError::Ended)
}

/// Runs a source until an error, or until nothing is recorded any more.
pub(crate) async fn stopped(
    recorded: watch::Receiver<Option<Mark>>,
    source: impl Future<Output = Result<(), SourceError>>,
) -> Result<(), SourceError> {
    tokio::select! {
        ended = source => ended,
        () = ended(recorded) => Ok(()),
    }
}

/// Returns when nothing is recorded any more.
pub(crate) async fn ended(mut recorded: watch::Receiver<Option<Mark>>) {
    while recorded.changed().await.is_ok() {}
}

/// Awaits a query's result, for `deadline` at the longest. `action` names the query in the error.
pub(crate) async fn within<T>(
    deadline: Duration,
    action: &'static str,
    query: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, SourceError> {
    Ok(session::within(deadline, action, query).await?)
}
