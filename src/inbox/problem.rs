//! The problems that `weft inbox` reports.

use std::{fmt, time::Duration};

use jiff::Timestamp;

use crate::{
    contract::{ContractError, DatabaseLogin, problem::ProblemReason},
    outage::{Failure, Outage, with_causes},
    postgres::{self, session::SessionError},
};

/// A problem of the inbox, or of one of its subscriptions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InboxProblem {
    ContractInvalid(String),
    DatabaseUnreachable(Outage),
    /// The database answers, and refuses.
    DatabaseNotReady {
        address: String,
        cause: String,
    },
    BrokerUnreachable {
        subscription: String,
        outage: Outage,
    },
    /// Nothing was published yet, or the stream was deleted.
    StreamMissing {
        subscription: String,
        stream: String,
        address: String,
    },
    /// What is published cannot be read.
    SourceUnusable {
        subscription: String,
        cause: String,
    },
    /// The service handles no event of the subscription.
    DeliveryFailing {
        subscription: String,
        cause: String,
    },
    /// The broker has removed up to `events` events before they were read.
    EventsExpired {
        subscription: String,
        events: u64,
    },
    /// Events that are delivered in vain again and again, and hold back those behind them.
    EventRefused {
        subscription: String,
        event: String,
        held: u64,
        cause: String,
    },
    DeadLetters {
        subscription: String,
        events: u64,
        latest: String,
        cause: String,
    },
}

impl InboxProblem {
    pub fn reason(&self) -> ProblemReason {
        match self {
            Self::ContractInvalid(_) => ProblemReason::ContractInvalid,
            Self::DatabaseUnreachable(_) => ProblemReason::DatabaseUnreachable,
            Self::DatabaseNotReady { .. } => ProblemReason::DatabaseNotReady,
            Self::BrokerUnreachable { .. } => ProblemReason::BrokerUnreachable,
            Self::StreamMissing { .. } => ProblemReason::StreamMissing,
            Self::SourceUnusable { .. } => ProblemReason::SourceUnusable,
            Self::DeliveryFailing { .. } => ProblemReason::DeliveryFailing,
            Self::EventsExpired { .. } => ProblemReason::EventsExpired,
            Self::EventRefused { .. } => ProblemReason::EventRefused,
            Self::DeadLetters { .. } => ProblemReason::DeadLetters,
        }
    }

    /// The subscription whose problem it is; empty: the inbox's own.
    pub fn subscription(&self) -> &str {
        match self {
            Self::ContractInvalid(_) | Self::DatabaseUnreachable(_) | Self::DatabaseNotReady { .. } => "",
            Self::BrokerUnreachable { subscription, .. }
            | Self::StreamMissing { subscription, .. }
            | Self::SourceUnusable { subscription, .. }
            | Self::DeliveryFailing { subscription, .. }
            | Self::EventsExpired { subscription, .. }
            | Self::EventRefused { subscription, .. }
            | Self::DeadLetters { subscription, .. } => subscription,
        }
    }

    /// A contract file that cannot be read or parsed.
    pub(super) fn contract(error: &ContractError) -> Self {
        Self::ContractInvalid(format!("{}; the last valid contract stays in force", with_causes(error)))
    }

    /// The database has sent nothing for `silence`, though it was asked.
    pub(super) fn silent_database(login: &DatabaseLogin, silence: Duration) -> Self {
        Self::database(login, Failure::Silent, Timestamp::now() - silence)
    }

    pub(super) fn session(error: &SessionError, login: &DatabaseLogin) -> Self {
        Self::database(login, error.failure(), Timestamp::now())
    }

    fn database(login: &DatabaseLogin, failure: Failure, since: Timestamp) -> Self {
        let address = postgres::login::address(login);
        match failure {
            Failure::Refused(cause) => Self::DatabaseNotReady { address, cause },
            failure => Self::DatabaseUnreachable(Outage { server: postgres::SERVER, address, since, failure }),
        }
    }

    /// The time of an outage's begin, which stays while the outage lasts.
    pub(super) fn outage_mut(&mut self) -> Option<&mut Outage> {
        match self {
            Self::DatabaseUnreachable(outage) | Self::BrokerUnreachable { outage, .. } => Some(outage),
            _ => None,
        }
    }
}

impl fmt::Display for InboxProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ContractInvalid(cause) => f.write_str(cause),
            Self::DatabaseUnreachable(outage) => outage.fmt(f),
            Self::DatabaseNotReady { address, cause } => write!(f, "PostgreSQL at {address} cannot be used: {cause}"),
            Self::BrokerUnreachable { subscription, outage } => write!(f, "subscription {subscription}: {outage}"),
            Self::StreamMissing { subscription, stream, address } => write!(
                f,
                "subscription {subscription} waits for the stream {stream} on NATS at {address}, which the first published event makes"
            ),
            Self::SourceUnusable { subscription, cause } => {
                write!(f, "subscription {subscription} cannot be read: {cause}")
            }
            Self::DeliveryFailing { subscription, cause } => write!(
                f,
                "the service handles no event of subscription {subscription}, so one at a time is tried: {cause}"
            ),
            Self::EventsExpired { subscription, events } => write!(
                f,
                "subscription {subscription} was away for longer than the stream keeps events, and up to {events} were removed unread; keep them for longer by spec.sink.nats.maxAge of the OutboxRelay, and have them published again by `weft relay replay`"
            ),
            Self::EventRefused { subscription, event, held, cause } => write!(
                f,
                "the service does not handle event {event} of subscription {subscription}: {cause}; {held} {} with those behind it, and `weft inbox dead skip` moves an event to the dead letters",
                if *held == 1 { "event is held" } else { "events are held" }
            ),
            Self::DeadLetters { subscription, events, latest, cause } => {
                let are = if *events == 1 { "event is" } else { "events are" };
                write!(
                    f,
                    "{events} {are} given up by subscription {subscription}, the latest of them event {latest}: {cause}; `weft inbox dead retry` delivers them again, `weft inbox dead purge` deletes them"
                )
            }
        }
    }
}
