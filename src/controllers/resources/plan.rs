//! What a controller wants to exist: the pure result of `plan`, the input of `apply`.

use std::{collections::BTreeSet, time::Duration};

use super::{
    child::{Child, ChildRef},
    reason::Reason,
};
use crate::domain::names;

/// Everything that should exist because of one object, in the order in which it is applied.
///
/// A child of the object that exists, is not in `children` and not in `retained`, is pruned.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    pub children: Vec<Child>,
    /// Children that are not to be written now and not to be pruned either.
    pub retained: Vec<ChildRef>,
    /// The plan will be another one after this time, though nothing else changes.
    pub recheck_in: Option<Duration>,
}

impl Plan {
    /// It has a child that `before` does not have.
    pub fn has_more_than(&self, before: &Self) -> bool {
        let known: BTreeSet<_> = before.children.iter().map(Child::reference).collect();
        self.children.iter().any(|child| !known.contains(&child.reference()))
    }
}

/// Why an object cannot be planned: `Accepted=False`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub reason: Reason,
    /// One sentence that names the field, its value, and the remedy.
    pub message: String,
}

impl Rejection {
    /// `field` names a Microservice that does not exist.
    pub fn microservice_not_found(field: &str, name: &str) -> Self {
        Self {
            reason: Reason::MicroserviceNotFound,
            message: format!(
                "{field}: there is no Microservice `{name}` in this namespace yet: apply it, or correct the name"
            ),
        }
    }

    /// `field` names a Microservice that exists and does not have the form of one.
    pub fn microservice_malformed(field: &str, name: &str) -> Self {
        Self {
            reason: Reason::MicroserviceMalformed,
            message: format!(
                "{field}: Microservice `{name}` cannot be read: correct it; its own conditions say what is wrong"
            ),
        }
    }

    /// A Microservice of this name was deleted with `retention: Delete`: whoever applies it again begins anew.
    pub fn predecessor_ends(name: &str) -> Self {
        Self {
            reason: Reason::PredecessorEnding,
            message: format!(
                "StatefulSet {} of the Microservice `{name}` that was deleted ends first, with its data: spec.database.retention was Delete",
                names::database(name)
            ),
        }
    }
}
