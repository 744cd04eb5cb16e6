//! Where events come from: batches of events with marks between them.
//!
//! # The contract
//! - Events come in the order in which their transactions became visible, and of one transaction in the order of `seq`.
//! - A mark tells what may be recorded once every event before it is acknowledged; before that nothing of it may be.
//! - After a restart the source begins at the last *recorded* mark or earlier, so an event that was not acknowledged comes
//!   again, under the same id.

pub mod poll;
pub mod row;
pub mod snapshot;
pub mod table;
pub mod wal;

use std::time::Duration;

use tokio::{sync::mpsc, time::timeout};

use crate::{
    domain::event::Event,
    postgres::replication::{Lsn, ReplicationError},
};

/// Events of a batch, and their bytes, about.
pub const BATCH_EVENTS: usize = 256;
pub const BATCH_BYTES: usize = 256 * 1024;

#[derive(Debug)]
pub enum Item {
    Event(Event),
    Mark(Mark),
}

/// A point between events. Serials grow by one from mark to mark of a source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    pub serial: u64,
    pub point: Point,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Point {
    /// All rows that were there before the slot; its consistent point.
    Copied(Lsn),
    /// The end of a transaction in the WAL.
    Committed(Lsn),
    /// A window of rows; where the WAL was when it was looked at.
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
    #[error("{doing}")]
    Query {
        doing: &'static str,
        #[source]
        source: tokio_postgres::Error,
    },
    #[error("streaming the outbox")]
    Replication(#[from] ReplicationError),
    #[error(transparent)]
    Login(#[from] crate::postgres::login::LoginError),
    #[error("weft.outbox is not as `weft database setup` makes it: {0}")]
    Layout(&'static str),
    #[error("the database did not answer within {0} s")]
    Timeout(u64),
    #[error("the database makes the replication slot after all older transactions have ended: {0}")]
    SlotPending(String),
    #[error("the publisher has ended")]
    Ended,
}

impl SourceError {
    pub(crate) fn query(doing: &'static str) -> impl Fn(tokio_postgres::Error) -> Self {
        move |source| Self::Query { doing, source }
    }
}

pub(crate) async fn send(batches: &mpsc::Sender<Batch>, batch: Batch) -> Result<(), SourceError> {
    if batch.is_empty() {
        return Ok(());
    }
    batches.send(batch).await.map_err(|_closed| SourceError::Ended)
}

/// Awaits an answer of the database.
pub(crate) async fn within<T>(
    deadline: Duration,
    doing: &'static str,
    asked: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, SourceError> {
    let answered = timeout(deadline, asked).await.map_err(|_elapsed| SourceError::Timeout(deadline.as_secs()))?;
    answered.map_err(SourceError::query(doing))
}
