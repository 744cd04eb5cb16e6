//! Where events go.
//!
//! # The delivery contract
//! - [`Session::publish`] hands one event to the connection and does not wait for the broker. `Ok` means no more than that
//!   an answer may come.
//! - [`Answer::Stored`] comes only after the broker holds the event as durably as it was told to (a JetStream stream: on its
//!   file, by a quorum of its replicas). It may come twice, late, or never.
//! - An event is published again under the same id. A sink may rely on the id to drop the copy; the relay does not rely
//!   on the sink's doing so, and no order is asked of the sink (see [`super::window`]).
//! - After an error the session is gone. What was on the way is unknown.

pub mod nats;
pub mod subject;

use crate::{domain::event::Event, relay::window::Ticket};

#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    #[error("the subject template {template:?} is not usable: {why}")]
    Template { template: String, why: &'static str },
    #[error("cannot connect to NATS at {url}: {cause}")]
    Connect { url: String, cause: String },
    #[error("the connection to NATS at {url} is lost")]
    Lost { url: String },
    #[error("NATS at {url} does not answer for JetStream: {cause}")]
    JetStream { url: String, cause: String },
    #[error("the stream {stream} is missing on NATS at {url}; it will be made again")]
    StreamMissing { url: String, stream: String },
    #[error("NATS at {url} took events but acknowledged none for {seconds} s")]
    Silent { url: String, seconds: u64 },
}

impl SinkError {
    /// A [`crate::contract::status::Problem`]'s reason.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Template { .. } => "ContractInvalid",
            Self::StreamMissing { .. } => "StreamMissing",
            Self::Connect { .. } | Self::Lost { .. } | Self::JetStream { .. } | Self::Silent { .. } => {
                "BrokerUnreachable"
            }
        }
    }
}

/// What the broker says of one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Stored,
    /// Not stored now; it may be later. The text is the broker's.
    Failed(String),
    /// Not stored, and not until a person changes something: what, in a sentence.
    Refused(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub ticket: Ticket,
    pub answer: Answer,
}

/// A broker that can be connected to, again and again.
pub trait Sink: Send + Sync {
    type Session: Session;

    /// Connects and makes sure that there is something to publish into.
    fn connect(&self) -> impl Future<Output = Result<Self::Session, SinkError>> + Send;
}

/// One connection to the broker.
pub trait Session: Send {
    /// Sends an event, without waiting for its answer. An answer that needs no broker is given back at once.
    fn publish(
        &mut self,
        ticket: Ticket,
        event: &Event,
    ) -> impl Future<Output = Result<Option<Answer>, SinkError>> + Send;

    /// Waits for answers and appends those that have come. Nothing is lost when the future is dropped.
    fn replies(&mut self, replies: &mut Vec<Reply>) -> impl Future<Output = Result<(), SinkError>> + Send;

    /// The error to report when nothing was acknowledged for so long.
    fn silent(&self, seconds: u64) -> SinkError;
}
