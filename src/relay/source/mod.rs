//! Where events come from: batches of events with marks between them.
//!
//! # The contract
//! - Events come in the order in which their transactions became visible, and within a transaction in the order of
//!   `seq`.
//! - A mark is a position that may be recorded once every event before it is acknowledged, and not earlier.
//! - After a restart the source starts at the last *recorded* mark or earlier, so an event that was not acknowledged
//!   comes again, under the same id.

pub mod poll;
pub mod row;
pub mod snapshot;
pub mod table;
pub mod wal;

use std::time::Duration;

use tokio::{sync::mpsc, time::timeout};

use crate::{
    domain::event::Event,
    outage::Failure,
    postgres::{
        self,
        replication::{Lsn, ReplicationError},
    },
};

/// Approximate size of a batch, in events and in bytes.
pub const BATCH_EVENTS: usize = 256;
pub const BATCH_BYTES: usize = 256 * 1024;

#[derive(Debug)]
pub enum Item {
    Event(Event),
    Mark(Mark),
}

/// A position between events. Serials of a source grow by one from mark to mark.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    pub serial: u64,
    pub point: Point,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Point {
    /// All rows that are older than the slot; the LSN is the slot's consistent point.
    Copied(Lsn),
    /// The end of a transaction; the LSN is the end of its commit record.
    Committed(Lsn),
    /// A window of rows that were polled; the LSN is the WAL's insert position at that time.
    Seen(Lsn),
}

impl Point {
    pub fn lsn(&self) -> Lsn {
        match self {
            Self::Copied(lsn) | Self::Committed(lsn) | Self::Seen(lsn) => *lsn,
        }
    }
}

pub type Batch = Vec<Item>;

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
    #[error("the database did not answer within {0} s")]
    Timeout(u64),
    #[error("the database creates the replication slot when all older transactions have ended: {0}")]
    SlotPending(String),
    #[error("the publisher has ended")]
    Ended,
}

impl SourceError {
    /// How the database failed: it refused, is silent, or there is no connection.
    pub(crate) fn failure(&self) -> Failure {
        let failure = match self {
            Self::Query { source, .. } => postgres::failure(source),
            Self::Login(error) => error.failure(),
            Self::Replication(error) => error.failure(),
            Self::Layout(_) | Self::SlotPending(_) => Failure::Refused(self.to_string()),
            Self::Timeout(_) => Failure::Silent,
            Self::Ended => Failure::Disconnected(self.to_string()),
        };
        match (self, failure) {
            (Self::Query { action, .. }, Failure::Refused(cause)) => Failure::Refused(format!("{action}: {cause}")),
            (Self::Replication(_), Failure::Refused(cause)) => Failure::Refused(format!("{self}: {cause}")),
            (_, failure) => failure,
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

/// Awaits a query's result, for `deadline` at the longest. `action` names the query in the error.
pub(crate) async fn within<T>(
    deadline: Duration,
    action: &'static str,
    query: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, SourceError> {
    let answer = timeout(deadline, query).await.map_err(|_elapsed| SourceError::Timeout(deadline.as_secs()))?;
    answer.map_err(SourceError::query(action))
}
