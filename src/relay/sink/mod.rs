//! Where events go.
//!
//! # The delivery contract
//! - [`Session::publish`] hands one event to the connection and does not wait for the broker. `Ok` only means that an
//!   answer may come.
//! - [`Answer::Stored`] comes only after the broker has stored the event as durably as it is configured to (a JetStream
//!   stream: in its file, on a quorum of its replicas). It may come twice, late, or never.
//! - [`Session::publish_run`] hands over consecutive events of one key, which have one answer. `Stored` says that the broker has
//!   all of them. Of each copy of a run that arrives, the broker stores the events in their order and none behind one that it did
//!   not store: a sink that cannot promise this has no runs. Any other answer leaves open which of the first ones are stored; the relay then sends
//!   each event alone.
//! - An event may be published again. A sink may drop the duplicate by [`Message::identity`]. The relay does not rely on that,
//!   and requires no order from the sink (see [`super::window`]).
//! - After an error the session is unusable, and the outcome of the events in flight is unknown.

pub mod http;
pub mod kafka;
pub mod nats;
pub mod rabbitmq;
pub mod redis;
mod wire;

pub use self::wire::AddressError;

use jiff::Timestamp;

use super::problem::RelayProblem;
use crate::{
    outage::Outage,
    relay::{encode::Message, window::Ticket},
};

#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    #[error("{0}")]
    Unreachable(Outage),
    #[error("the stream {stream} is missing on NATS at {address}")]
    StreamMissing { address: String, stream: String },
}

impl SinkError {
    /// The problem to report.
    pub fn problem(&self) -> RelayProblem {
        match self {
            Self::StreamMissing { address, stream } => {
                RelayProblem::StreamMissing { address: address.clone(), stream: stream.clone() }
            }
            Self::Unreachable(outage) => RelayProblem::BrokerUnreachable(outage.clone()),
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
    /// What the server is, for messages: `NATS`.
    const SERVER: &'static str;
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
        message: &Message,
    ) -> impl Future<Output = Result<Option<Answer>, SinkError>> + Send;

    /// Events that [`Self::publish_run`] would take now. A sink without runs keeps the default, and publishes each event when all
    /// before it in its key are stored.
    fn longest_run(&mut self) -> usize {
        1
    }

    /// Sends consecutive events of one key without waiting for their one answer. Called only for as many as
    /// [`Self::longest_run`] has said.
    fn publish_run(
        &mut self,
        _ticket: Ticket,
        _run: &[Message],
    ) -> impl Future<Output = Result<Option<Answer>, SinkError>> + Send {
        std::future::ready(Ok(Some(Answer::Failed("events are sent one by one".to_owned()))))
    }

    /// Whether one more event may be handed over now. `false` only while answers are to come, which make room.
    fn has_room(&self) -> bool {
        true
    }

    /// Waits for answers and appends them to `replies`. Dropping the future loses nothing.
    fn replies(&mut self, replies: &mut Vec<Reply>) -> impl Future<Output = Result<(), SinkError>> + Send;

    /// Why the broker accepts no events for the time being, although it is there; `None`: it accepts them. Meanwhile no answer is
    /// overdue, and the session has no room.
    fn blocked(&self) -> Option<&str> {
        None
    }

    /// The error to report when nothing was acknowledged since `since`, although events are in flight.
    fn silent(&self, since: Timestamp) -> SinkError;

    /// Where the broker is, for messages.
    fn address(&self) -> &str;
}
