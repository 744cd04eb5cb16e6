//! What `/readyz` answers for the operator.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::definitions;
use crate::controllers::store::Scope;

/// What keeps the operator from being ready; its clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<Reasons>>);

#[derive(Debug, Default)]
struct Reasons {
    waiting: Option<String>,
    /// Definitions under whose watches the API server answers that it knows none such, and where they watch.
    deleted: BTreeSet<(String, Scope)>,
}

impl Readiness {
    /// What the operator waits for as a whole.
    pub fn waits_for(&self, why: Option<String>) {
        self.lock().waiting = why;
    }

    /// A watch of `definition` does not find it. True when no other watch had reported that.
    pub fn deleted(&self, definition: &str, scope: &Scope) -> bool {
        let mut reasons = self.lock();
        let known = reasons.deleted.iter().any(|(known, _)| known == definition);
        reasons.deleted.insert((definition.to_owned(), scope.clone()));
        !known
    }

    /// A watch of `definition` works. True when it had not, and no other one is left that does not.
    pub fn watched(&self, definition: &str, scope: &Scope) -> bool {
        let mut reasons = self.lock();
        reasons.deleted.remove(&(definition.to_owned(), scope.clone()))
            && !reasons.deleted.iter().any(|(known, _)| known == definition)
    }

    /// Nothing is watched any more: another process leads.
    pub fn unwatched(&self) {
        self.lock().deleted.clear();
    }

    /// Ready, or a sentence why not.
    pub fn verdict(&self) -> Result<(), String> {
        let reasons = self.lock();
        if let Some(why) = &reasons.waiting {
            return Err(why.clone());
        }
        let deleted: BTreeSet<_> = reasons.deleted.iter().map(|(definition, _)| definition.as_str()).collect();
        definitions::not_installed(deleted).map_or(Ok(()), Err)
    }

    fn lock(&self) -> MutexGuard<'_, Reasons> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deleted_definition_is_news_once_and_named_until_every_watch_has_it_again() {
        let (readiness, a, b) = (Readiness::default(), Scope(Some("a".to_owned())), Scope(Some("b".to_owned())));
        assert!(!readiness.watched("sagas.weft.dev", &a), "it was never gone");
        assert!(readiness.deleted("sagas.weft.dev", &a));
        assert!(!readiness.deleted("sagas.weft.dev", &b));
        assert!(!readiness.deleted("sagas.weft.dev", &a));
        assert!(readiness.verdict().unwrap_err().contains("definition sagas.weft.dev in version v1alpha1 is not"));
        assert!(!readiness.watched("sagas.weft.dev", &a));
        assert!(readiness.verdict().is_err());
        assert!(readiness.watched("sagas.weft.dev", &b));
        assert_eq!(readiness.verdict(), Ok(()));
    }

    #[test]
    fn a_process_that_does_not_lead_misses_nothing() {
        let (readiness, everywhere) = (Readiness::default(), Scope(None));
        readiness.deleted("sagas.weft.dev", &everywhere);
        readiness.unwatched();
        assert_eq!(readiness.verdict(), Ok(()));
    }
}
