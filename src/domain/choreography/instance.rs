//! What is known of one instance: a set of events. Everything else is computed from it, so that neither duplicates nor the order
//! in which events of several services arrive make a difference.

use serde::{Deserialize, Serialize};

use super::definition::Kind;

/// At most so many events of one instance are kept. A correlation with more is none of a business transaction.
pub const MAX_EVENTS: usize = 256;

/// An event as far as the tracker needs it: never its data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Seen {
    #[serde(flatten)]
    pub kind: Kind,
    /// Unique in its service.
    pub id: String,
    /// The id of the event that it is a reaction to (`causationid`), if it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<String>,
    /// Milliseconds since 1970, as its service recorded it.
    pub at: i64,
}

impl Seen {
    /// The order of events, whatever the order of their arrival.
    fn key(&self) -> (i64, &Kind, &str) {
        (self.at, &self.kind, &self.id)
    }

    fn is_same(&self, other: &Self) -> bool {
        self.kind.service == other.kind.service && self.id == other.id
    }
}

/// The events of one correlation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    /// In the order of their times; each once.
    events: Vec<Seen>,
    /// A person has given up what was owed until then, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped_at: Option<i64>,
}

impl Instance {
    pub fn events(&self) -> &[Seen] {
        &self.events
    }

    /// Adds an event; false when nothing changes, since it is known already or there are [`MAX_EVENTS`].
    pub fn observe(&mut self, event: Seen) -> bool {
        if self.events.len() >= MAX_EVENTS || self.events.iter().any(|known| known.is_same(&event)) {
            return false;
        }
        let place = self.events.partition_point(|known| known.key() < event.key());
        self.events.insert(place, event);
        true
    }
}
