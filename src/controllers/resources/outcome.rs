//! What applying a plan resulted in.

use super::child::ChildRef;

/// The result of applying a plan. Empty when every child is as planned, when there was nothing to apply, and when the object
/// is suspended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Children that could not be written (or pruned), in the order of the plan; the children after a failed one are tried too.
    pub failures: Vec<Failure>,
    /// Digest of all that is applied now, for the object's status; `None` unless every child is as planned.
    pub digest: Option<String>,
}

/// A request that the API server refused, or that did not get through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub child: ChildRef,
    pub class: Class,
    /// PascalCase, context by condition, event, metric and log: `ChildRefused`, `ChildConflict`, `NamespaceTerminating`,
    /// `ApiUnavailable`, `Forbidden`.
    pub reason: &'static str,
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
