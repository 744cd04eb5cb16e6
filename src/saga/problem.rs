//! The problems that an orchestrator reports in its status: every sentence that a person can meet there, and what is
//! reported at present.

use std::{
    collections::BTreeMap,
    fmt,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use jiff::Timestamp;

use crate::{
    contract::problem::{Problem, ProblemReason},
    outage::{Failure, Outage},
    postgres,
};

/// A problem. Displays as one sentence without its full stop: what, where, since when, and how to fix it if that is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SagaProblem {
    ContractUnreadable {
        path: PathBuf,
        cause: String,
    },
    ContractInvalid(String),
    /// The database refuses to store the definitions.
    DefinitionsNotStored {
        address: String,
        cause: String,
    },
    DefinitionInvalid {
        saga: String,
    },
    DatabaseUnreachable(Outage),
    /// The database answers with an error.
    DatabaseFails {
        address: String,
        cause: String,
    },
    RecoveryFailed {
        partition: i16,
        address: String,
        cause: String,
    },
    /// The first few errors, and how many more instances there are.
    InstanceUnreadable {
        errors: Vec<String>,
        more: usize,
    },
    /// Another process holds all partitions.
    Standby,
    BrokerUnreachable(Outage),
    StreamMissing {
        saga: String,
        address: String,
        stream: String,
    },
    /// The stream of a service of a choreographed saga does not exist.
    NothingToWatch {
        saga: String,
        service: String,
        address: String,
        stream: String,
    },
}

impl SagaProblem {
    /// The database failed during the last `waited`; `refused` is the problem when it answered with an error.
    pub fn of_database(
        address: &str,
        failure: Failure,
        waited: Duration,
        refused: impl FnOnce(String, String) -> Self,
    ) -> Self {
        let address = address.to_owned();
        match failure {
            Failure::Refused(cause) => refused(address, cause),
            failure => {
                let since = Timestamp::now() - waited;
                Self::DatabaseUnreachable(Outage { server: postgres::SERVER, address, since, failure })
            }
        }
    }

    pub fn database_fails(address: String, cause: String) -> Self {
        Self::DatabaseFails { address, cause }
    }

    pub fn reason(&self) -> ProblemReason {
        match self {
            Self::ContractUnreadable { .. } => ProblemReason::ContractUnreadable,
            Self::ContractInvalid(_) => ProblemReason::ContractInvalid,
            Self::DefinitionsNotStored { .. } => ProblemReason::DefinitionsNotStored,
            Self::DefinitionInvalid { .. } => ProblemReason::DefinitionInvalid,
            Self::DatabaseUnreachable(_) => ProblemReason::DatabaseUnreachable,
            Self::DatabaseFails { .. } => ProblemReason::DatabaseFails,
            Self::RecoveryFailed { .. } => ProblemReason::RecoveryFailed,
            Self::InstanceUnreadable { .. } => ProblemReason::InstanceUnreadable,
            Self::Standby => ProblemReason::Standby,
            Self::BrokerUnreachable(_) => ProblemReason::BrokerUnreachable,
            Self::StreamMissing { .. } | Self::NothingToWatch { .. } => ProblemReason::StreamMissing,
        }
    }

    /// The problem with the start of the present outage, which `since` remembers.
    fn continued(self, since: &mut Option<Timestamp>) -> Self {
        match self {
            Self::DatabaseUnreachable(outage) => Self::DatabaseUnreachable(outage.continued(since)),
            Self::BrokerUnreachable(outage) => Self::BrokerUnreachable(outage.continued(since)),
            other => {
                *since = None;
                other
            }
        }
    }
}

impl fmt::Display for SagaProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ContractUnreadable { path, cause } => write!(
                f,
                "the contract file {} cannot be read: {cause}; the last valid contract stays in force",
                path.display()
            ),
            Self::ContractInvalid(cause) => write!(f, "{cause}; the last valid contract stays in force"),
            Self::DefinitionsNotStored { address, cause } => write!(
                f,
                "the definitions of sagas cannot be stored in PostgreSQL at {address}: {cause}; new instances use the earlier ones"
            ),
            Self::DefinitionInvalid { saga } => {
                write!(f, "saga `{saga}` has no steps and is not run; add at least one step")
            }
            Self::DatabaseUnreachable(outage) | Self::BrokerUnreachable(outage) => outage.fmt(f),
            Self::DatabaseFails { address, cause } => {
                write!(f, "PostgreSQL at {address} cannot be used: {cause}")
            }
            Self::RecoveryFailed { partition, address, cause } => write!(
                f,
                "the instances of partition {partition} cannot be read from PostgreSQL at {address}: {cause}; this is retried"
            ),
            Self::InstanceUnreadable { errors, more } => {
                let them = if errors.len() + more == 1 { "it is" } else { "they are" };
                f.write_str(&errors.join("; "))?;
                if *more > 0 {
                    write!(f, "; and {more} more")?;
                }
                write!(
                    f,
                    "; {them} not run, all others are; run the version of weft that wrote the log, or repair its rows, and restart the orchestrator"
                )
            }
            Self::Standby => f.write_str("another orchestrator holds all partitions; this one is a standby"),
            Self::StreamMissing { saga, address, stream } => write!(
                f,
                "no event can start saga `{saga}`: the stream `{stream}` does not exist on NATS at {address} yet; the relay of the service that publishes the event creates it"
            ),
            Self::NothingToWatch { saga, service, address, stream } => write!(
                f,
                "nothing of service `{service}` is seen for saga `{saga}`: the stream `{stream}` does not exist on NATS at {address} yet; the relay of the service creates it"
            ),
        }
    }
}

/// The problems at present, at most one per source.
#[derive(Debug, Default)]
pub(super) struct Problems(Mutex<BTreeMap<String, Reported>>);

#[derive(Debug)]
struct Reported {
    problem: Problem,
    outage_since: Option<Timestamp>,
}

impl Problems {
    /// Reports a problem. `source` identifies the part that reports it, and that resolves it with [`Self::resolve`].
    pub(super) fn report(&self, source: &str, problem: SagaProblem) {
        let mut problems = self.lock();
        let earlier = problems.get(source);
        let mut outage_since = earlier.and_then(|earlier| earlier.outage_since);
        let problem = problem.continued(&mut outage_since);
        let problem = Problem::new(problem.reason(), problem.to_string());
        if earlier.map(|earlier| &earlier.problem) != Some(&problem) {
            tracing::warn!(source, reason = problem.reason.as_str(), message = problem.message, "a problem was found");
        }
        problems.insert(source.to_owned(), Reported { problem, outage_since });
    }

    pub(super) fn resolve(&self, source: &str) {
        if self.lock().remove(source).is_some() {
            tracing::info!(source, "the problem is resolved");
        }
    }

    pub(super) fn all(&self) -> Vec<Problem> {
        self.lock().values().map(|reported| reported.problem.clone()).collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Reported>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
