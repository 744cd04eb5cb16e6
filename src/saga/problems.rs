//! The current problems, for the status. A problem disappears from the status when it is resolved.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use crate::contract::status::Problem;

/// Current problems, at most one per source.
#[derive(Debug, Default)]
pub(super) struct Problems(Mutex<BTreeMap<String, Problem>>);

impl Problems {
    /// Reports a problem. `source` identifies the part that reports it, and that resolves it with [`Self::resolve`].
    pub(super) fn report(&self, source: &str, reason: &str, message: String) {
        let problem = Problem { reason: reason.to_owned(), message };
        let mut problems = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if problems.get(source) != Some(&problem) {
            tracing::warn!(source, reason, message = problem.message, "a problem was found");
            problems.insert(source.to_owned(), problem);
        }
    }

    pub(super) fn resolve(&self, source: &str) {
        if self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(source).is_some() {
            tracing::info!(source, "the problem is resolved");
        }
    }

    pub(super) fn all(&self) -> Vec<Problem> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// An error with its causes, on one line.
pub(super) fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
