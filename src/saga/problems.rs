//! What is wrong at the moment, in words, for the status. A problem goes away by itself when mended.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use crate::contract::status::Problem;

/// Current problems, at most one per source.
#[derive(Debug, Default)]
pub(super) struct Problems(Mutex<BTreeMap<String, Problem>>);

impl Problems {
    /// `source` identifies the part that says so, and takes it back with [`Self::mended`].
    pub(super) fn say(&self, source: &str, reason: &str, message: String) {
        let problem = Problem { reason: reason.to_owned(), message };
        let mut problems = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if problems.get(source) != Some(&problem) {
            tracing::warn!(source, reason, message = problem.message, "a problem");
            problems.insert(source.to_owned(), problem);
        }
    }

    pub(super) fn mended(&self, source: &str) {
        if self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(source).is_some() {
            tracing::info!(source, "mended");
        }
    }

    pub(super) fn all(&self) -> Vec<Problem> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}

/// An error with its causes, on one line.
pub(super) fn in_words(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
