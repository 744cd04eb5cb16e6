//! The problems that a relay reports in its status: every sentence that a person can meet there.

use std::{fmt, time::Duration};

use jiff::Timestamp;

use super::{source::SourceError, term::TermError};
use crate::{
    contract::{ContractError, DatabaseLogin, problem::ProblemReason},
    domain::names,
    outage::{Failure, Outage, with_causes},
    postgres::{self, login},
};

/// Problems with which no event can be published at all; the relay is not ready while one of them exists.
pub(crate) const BLOCKING: [ProblemReason; 5] = [
    ProblemReason::BrokerUnreachable,
    ProblemReason::DatabaseNotReady,
    ProblemReason::DatabaseUnreachable,
    ProblemReason::PublishFailing,
    ProblemReason::StreamMissing,
];

/// A problem. Displays as one sentence without its full stop: what, where, since when, and how to fix it if that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayProblem {
    /// The contract file cannot be used.
    ContractInvalid(String),
    DatabaseUnreachable(Outage),
    /// The database answers with an error.
    DatabaseNotReady {
        address: String,
        cause: String,
    },
    BrokerUnreachable(Outage),
    StreamMissing {
        address: String,
        stream: String,
    },
    /// The broker answers with an error instead of storing events.
    PublishFailing {
        server: &'static str,
        address: String,
        cause: String,
    },
    /// The broker refuses `event`, and `others`; `waiting` events wait behind them.
    EventRefused {
        event: String,
        others: u64,
        waiting: u64,
        cause: String,
    },
    /// Events were given up, the latest one for this cause.
    DeadLetters {
        events: u64,
        latest: String,
        cause: String,
    },
    /// The server will remove WAL that the slot needs after `bytes` more.
    SlotAtRisk {
        bytes: u64,
    },
    SlotLost,
    /// The publication has other tables than the outbox, or none: `tables` are those that it has.
    PublicationInvalid {
        /// Of the outbox.
        schema: String,
        tables: String,
    },
    /// The server creates the slot only after older transactions have ended.
    SlotPending {
        blocker: String,
    },
}

impl RelayProblem {
    pub fn reason(&self) -> ProblemReason {
        match self {
            Self::ContractInvalid(_) => ProblemReason::ContractInvalid,
            Self::DatabaseUnreachable(_) => ProblemReason::DatabaseUnreachable,
            Self::DatabaseNotReady { .. } => ProblemReason::DatabaseNotReady,
            Self::BrokerUnreachable(_) => ProblemReason::BrokerUnreachable,
            Self::StreamMissing { .. } => ProblemReason::StreamMissing,
            Self::PublishFailing { .. } => ProblemReason::PublishFailing,
            Self::EventRefused { .. } => ProblemReason::EventRefused,
            Self::DeadLetters { .. } => ProblemReason::DeadLetters,
            Self::SlotAtRisk { .. } => ProblemReason::SlotAtRisk,
            Self::SlotLost => ProblemReason::SlotLost,
            Self::SlotPending { .. } => ProblemReason::SlotPending,
            Self::PublicationInvalid { .. } => ProblemReason::PublicationInvalid,
        }
    }

    /// A contract file that cannot be read or parsed.
    pub fn contract(error: &ContractError) -> Self {
        Self::ContractInvalid(format!("{}; the last valid contract stays in force", with_causes(error)))
    }

    /// The database has sent nothing for `silence`, though it was asked.
    pub(crate) fn silent_database(login: &DatabaseLogin, silence: Duration) -> Self {
        Self::DatabaseUnreachable(Outage {
            server: postgres::SERVER,
            address: login::address(login),
            since: Timestamp::now() - silence,
            failure: Failure::Silent,
        })
    }

    /// The error that ended a term.
    pub(crate) fn term(error: &TermError, login: &DatabaseLogin) -> Self {
        let source = match error {
            TermError::Sink(error) => return error.problem(),
            TermError::Template(error) => return Self::ContractInvalid(error.to_string()),
            TermError::Address(error) => return Self::ContractInvalid(error.to_string()),
            TermError::Source(error) => Some(error),
            TermError::LockLost => None,
        };
        let address = login::address(login);
        let closed = || Failure::Disconnected("the connection was closed".to_owned());
        let failure = match source.map_or_else(closed, SourceError::failure) {
            Failure::Refused(cause) => return Self::DatabaseNotReady { address, cause },
            failure => failure,
        };
        let silence = match source {
            Some(SourceError::Timeout(seconds)) => *seconds,
            _ => 0,
        };
        let since = Timestamp::now() - Duration::from_secs(silence);
        Self::DatabaseUnreachable(Outage { server: postgres::SERVER, address, since, failure })
    }
}

impl fmt::Display for RelayProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ContractInvalid(cause) => f.write_str(cause),
            Self::DatabaseUnreachable(outage) | Self::BrokerUnreachable(outage) => outage.fmt(f),
            Self::DatabaseNotReady { address, cause } => {
                write!(f, "PostgreSQL at {address} cannot be used: {cause}")
            }
            Self::StreamMissing { address, stream } => {
                write!(f, "the stream {stream} was deleted on NATS at {address}; the relay creates it again")
            }
            Self::PublishFailing { server, address, cause } => {
                write!(f, "{server} at {address} does not store events: {cause}")
            }
            Self::EventRefused { event, others, waiting, cause } => {
                write!(f, "the broker refuses event {event}{}: {cause}; ", and_more(*others))?;
                if *waiting > 0 {
                    let (verb, target) = (verb(*waiting), if *others > 0 { "them" } else { "it" });
                    write!(f, "{} {verb} behind {target}; ", events(*waiting))?;
                }
                write!(f, "`weft relay skip` moves an event to the dead letters")
            }
            Self::DeadLetters { events: count, latest, cause } => {
                let (events, are) = (events(*count), if *count == 1 { "is" } else { "are" });
                write!(
                    f,
                    "{events} {are} given up, the latest of them event {latest}: {cause}; `weft relay retry` publishes them again, `weft relay purge` deletes them"
                )
            }
            Self::SlotAtRisk { bytes } => write!(
                f,
                "PostgreSQL removes log that the outbox's replication slot needs after {bytes} more bytes; let the relay catch up, or raise max_slot_wal_keep_size"
            ),
            Self::SlotLost => write!(
                f,
                "PostgreSQL has removed log that was not read yet; the relay publishes what is in the outbox, then continues with a new replication slot"
            ),
            Self::SlotPending { blocker } => write!(
                f,
                "the relay polls the outbox until PostgreSQL has made its replication slot, for which all older transactions must have ended: {blocker}"
            ),
            Self::PublicationInvalid { schema, tables } => write!(
                f,
                "the relay polls the outbox, because the publication {name} has {}: `drop publication if exists {name}; create publication {name} for table {schema}.outbox with (publish = 'insert')` makes it right",
                if tables.is_empty() { "no table" } else { tables },
                name = names::publication(schema),
            ),
        }
    }
}

fn events(count: u64) -> String {
    if count == 1 { "1 event".to_owned() } else { format!("{count} events") }
}

fn verb(count: u64) -> &'static str {
    if count == 1 { "waits" } else { "wait" }
}

fn and_more(count: u64) -> String {
    if count == 0 { String::new() } else { format!(" and {count} more") }
}
