//! Conditions in the way of kstatus: one list, in a fixed order, whose transition times move only when a status does.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

use crate::controllers::resources::reason::Reason;

/// Longest message, in characters; API servers refuse more than 32,768 bytes.
const MAX_MESSAGE: usize = 1024;

/// `Ready`: the object is as its spec describes it.
pub const READY: &str = "Ready";
/// kstatus: work goes on. Abnormal when true.
pub const RECONCILING: &str = "Reconciling";
/// kstatus: work cannot go on without a person. Abnormal when true.
pub const STALLED: &str = "Stalled";
/// The spec is valid, and the API server accepts the children that it becomes; else the reason and a sentence.
pub const ACCEPTED: &str = "Accepted";
pub const DATABASE_READY: &str = "DatabaseReady";
pub const MIGRATED: &str = "Migrated";
pub const SLOT_REMAINS: &str = "SlotRemains";
pub const SHARED_DATABASE: &str = "SharedDatabase";
pub const DEPENDENCIES_FOUND: &str = "DependenciesFound";
/// The events of `spec.consumes` are read and handled. There only with it.
pub const CONSUMING: &str = "Consuming";
/// Somebody sets fields of a child as often as Weft puts them back. There only while it is so.
pub const CONTESTED: &str = "Contested";
/// A workload has fields that somebody added. There only while it is so.
pub const DRIFTED: &str = "Drifted";
pub const SLOT_AT_RISK: &str = "SlotAtRisk";
/// Whether an event of the type that starts the Saga was ever published. There only with `startOn`.
pub const START_EVENT_SEEN: &str = "StartEventSeen";
/// Whether the services of a choreographed Saga emit what it declares, and in time.
pub const AS_DECLARED: &str = "AsDeclared";
/// A Saga is being deleted, and what for it is kept until then. There only while it is so.
pub const DELETING: &str = "Deleting";
pub const STUCK: &str = "Stuck";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truth {
    True,
    False,
    Unknown,
}

impl Truth {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::True => "True",
            Self::False => "False",
            Self::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Truth {
    fn from(value: bool) -> Self {
        if value { Self::True } else { Self::False }
    }
}

/// Builds an object's conditions: those that are set, in the order in which they are set.
#[derive(Clone, Debug)]
pub struct Conditions<'a> {
    previous: &'a [Condition],
    generation: Option<i64>,
    now: Timestamp,
    set: Vec<Condition>,
}

impl<'a> Conditions<'a> {
    /// `previous` are the object's present conditions, `generation` its `metadata.generation`.
    pub fn new(previous: &'a [Condition], generation: Option<i64>, now: Timestamp) -> Self {
        Self { previous, generation, now, set: Vec::new() }
    }

    /// `message` is a sentence. Setting a type again replaces it in its place.
    pub fn set(
        &mut self,
        type_: &str,
        status: impl Into<Truth>,
        reason: Reason,
        message: impl AsRef<str>,
    ) -> &mut Self {
        let status = status.into().as_str();
        let since = self
            .previous
            .iter()
            .find(|known| known.type_ == type_ && known.status == status)
            .map_or_else(|| Time(self.now), |known| known.last_transition_time.clone());
        let condition = Condition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: reason.as_str().to_owned(),
            message: message.as_ref().chars().take(MAX_MESSAGE).collect(),
            observed_generation: self.generation,
            last_transition_time: since,
        };
        match self.set.iter_mut().find(|known| known.type_ == type_) {
            Some(known) => *known = condition,
            None => self.set.push(condition),
        }
        self
    }

    pub fn finish(&mut self) -> Vec<Condition> {
        std::mem::take(&mut self.set)
    }
}

/// The status of the condition `type_`, if it is there.
pub fn status_of<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a str> {
    conditions.iter().find(|condition| condition.type_ == type_).map(|condition| condition.status.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transition_time_moves_only_with_the_status() {
        let (early, late) = (Timestamp::from_second(1).unwrap(), Timestamp::from_second(2).unwrap());
        let first = Conditions::new(&[], Some(1), early).set(READY, false, Reason::Starting, "pods start").finish();
        let second = Conditions::new(&first, Some(2), late).set(READY, false, Reason::RollingOut, "pods wait").finish();
        assert_eq!(second[0].last_transition_time, Time(early));
        assert_eq!((second[0].reason.as_str(), second[0].observed_generation), ("RollingOut", Some(2)));
        let third =
            Conditions::new(&second, Some(2), late).set(READY, true, Reason::Ready, "all pods are ready").finish();
        assert_eq!(third[0].last_transition_time, Time(late));
    }
}
