//! Where events go.
//!
//! # The delivery contract
//! - [`Session::publish`] hands one event to the connection and does not wait for the broker. `Ok` only means that an
//!   answer may come.
//! - [`Answer::Stored`] comes only after the broker has stored the event as durably as it is configured to (a JetStream
//!   stream: in its file, on a quorum of its replicas). It may come twice, late, or never.
//! - An event may be published again under the same id. A sink may rely on the id to drop the duplicate; the relay does
//!   not rely on that, and requires no order from the sink (see [`super::window`]).
//! - After an error the session is unusable, and the outcome of the events in flight is unknown.

pub mod nats;
pub mod subject;

use crate::{domain::event::Event, relay::window::Ticket};

#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    #[error("the subject template {template:?} is not usable: {why}")]
    Template { template: String, why: &'static str },
    #[error("cannot connect to NATS at {url}: {cause}")]
    Connect { url: String, cause: String },
    #[error("the connection to NATS at {url} was lost")]
    Lost { url: String },
    #[error("NATS at {url} does not answer for JetStream: {cause}")]
    JetStream { url: String, cause: String },
    #[error("the stream {stream} is missing on NATS at {url}; the relay creates it again")]
    StreamMissing { url: String, stream: String },
    #[error("NATS at {url} has not acknowledged any of the events sent to it for {seconds} s")]
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

/// The broker's answer to one event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Stored,
    /// Not stored, but a later attempt may succeed. The text is the broker's.
    Failed(String),
    /// Not stored, and repeating cannot help until a person changes something: the sentence that explains what.
    Refused(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub ticket: Ticket,
    pub answer: Answer,
}

/// A broker.
pub trait Sink: Send + Sync {
    type Session: Session;

    /// Connects, and creates what is published into if it is missing.
    fn connect(&self) -> impl Future<Output = Result<Self::Session, SinkError>> + Send;
}

/// One connection to the broker.
pub trait Session: Send {
    /// Sends an event without waiting for its answer. An answer that does not need the broker is returned at once.
    fn publish(
        &mut self,
        ticket: Ticket,
        event: &Event,
    ) -> impl Future<Output = Result<Option<Answer>, SinkError>> + Send;

    /// Waits for answers and appends them to `replies`. Dropping the future loses nothing.
    fn replies(&mut self, replies: &mut Vec<Reply>) -> impl Future<Output = Result<(), SinkError>> + Send;

    /// The error to report when nothing was acknowledged for `seconds`.
    fn silent(&self, seconds: u64) -> SinkError;
}
