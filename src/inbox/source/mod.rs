//! Where events come from: a broker's stream, read in its order from a position.
//!
//! # The contract
//! - Messages come in the order of the stream, each with its sequence, which only grows. None is left out between two that come: a
//!   source that cannot be sure of that ends with an error.
//! - Nothing is acknowledged at the broker. How far the events are handled is recorded in the service's database, in the
//!   terms of the stream ([`Position`]), and a source that is opened begins there. So order survives whatever ends, since
//!   what was read and not handled comes again, before everything behind it.
//! - A position of a stream that was made again since then says nothing: everything in the new one counts.

mod nats;

use bytes::Bytes;
use jiff::Timestamp;

pub(super) use self::nats::{Nats, NatsSession};
use crate::outage::Outage;

/// How far a subscription is in its stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub stream: String,
    /// When the stream was made, as the broker writes it.
    pub stream_created: String,
    /// The first sequence that is not settled.
    pub next: u64,
    /// Sequences behind it that are settled.
    pub settled: Vec<u64>,
}

/// What was read.
#[derive(Debug)]
pub(super) struct Message {
    pub sequence: u64,
    /// When the broker stored it.
    pub stored_at: Timestamp,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    /// Messages that wait behind it at the broker.
    pub behind: u64,
}

/// A source that was opened.
#[derive(Debug)]
pub(super) struct Opened<T> {
    pub session: T,
    /// Where it begins.
    pub position: Position,
    /// Messages that the broker had removed before they were read, at most.
    pub expired: u64,
    /// Messages that wait at the broker.
    pub behind: u64,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum SourceError {
    #[error("{0}")]
    Unreachable(Outage),
    #[error("the stream {stream} does not exist on {address}")]
    StreamMissing { stream: String, address: String },
    #[error("{0}")]
    Unusable(String),
}
