//! What applying a plan resulted in.

use super::{child::ChildRef, reason::Reason};

/// The result of applying a plan. Empty when every child is as planned, when there was nothing to apply, and when the object
/// is suspended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Children that could not be written (or pruned), in the order of the plan; the children after a failed one are tried too.
    pub failures: Vec<Failure>,
    /// Digest of all that is applied now, for the object's status; `None` unless every child is as planned.
    pub digest: Option<String>,
    /// Fields that somebody sets as often as Weft puts them back.
    pub contested: Vec<ForeignChange>,
    /// Fields that somebody added to a workload, and that server-side apply leaves there.
    pub added: Vec<ForeignChange>,
}

/// Author of what the cluster's admission makes of a write: it leaves no name.
pub const ADMISSION: &str = "an admission policy or webhook";

/// Fields of a child that are somebody else's, and whose: names of field managers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForeignChange {
    pub child: ChildRef,
    pub fields: Vec<String>,
    pub author: String,
}

/// A request that the API server refused, or that did not get through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub child: ChildRef,
    /// Its [`Reason::class`] is how it is handled.
    pub reason: Reason,
    /// One sentence, with the API server's message.
    pub message: String,
}

/// How an error is handled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Goes away by itself: retried with growing pauses.
    Retry,
    /// The input must change: retried only when it does (or, rarely, in case the cluster changed).
    Invalid,
    /// A person must repair the installation (a missing right): retried with the longest pause.
    Fatal,
}
