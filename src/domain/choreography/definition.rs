//! A choreography's definition as the tracker follows it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use crate::domain::version;

/// A kind of event: who emits it, and its type. Displays as `orders OrderCreated`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Kind {
    /// The Microservice that emits the event.
    pub service: String,
    /// CloudEvents `type`.
    pub event: String,
}

impl Kind {
    pub fn new(service: &str, event: &str) -> Self {
        Self { service: service.to_owned(), event: event.to_owned() }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.service, self.event)
    }
}

/// One choreographed saga.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Definition {
    /// The `Saga` object's name, unique within its orchestrator.
    pub name: String,
    /// First 16 hex digits of the SHA-256 of the canonical JSON of everything else (see [`Definition::seal`]).
    #[serde(default)]
    pub version: String,
    /// The event with which an instance begins.
    pub start: Kind,
    pub reactions: Vec<Reaction>,
    /// The events with which an instance ends well.
    pub completes: Vec<Kind>,
    /// The events with which an instance ends undone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub compensates: Vec<Kind>,
}

/// A service emits one of several events in reaction to another one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Reaction {
    pub to: Kind,
    /// Further events that are waited for: the reaction is owed once all of them, and `to`, are there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub and: Vec<Kind>,
    pub service: String,
    /// One of these types is emitted.
    pub emits: Vec<String>,
    /// Milliseconds from the event to the reaction, both as their services' databases recorded them.
    pub within_ms: u64,
}

impl Reaction {
    /// The events that it waits for.
    pub fn causes(&self) -> impl Iterator<Item = &Kind> {
        std::iter::once(&self.to).chain(&self.and)
    }

    pub fn emits(&self, kind: &Kind) -> bool {
        self.service == kind.service && self.emits.contains(&kind.event)
    }

    pub fn outcomes(&self) -> impl Iterator<Item = Kind> {
        self.emits.iter().map(|event| Kind::new(&self.service, event))
    }
}

impl Definition {
    /// Sets [`Definition::version`] from the content.
    #[must_use]
    pub fn seal(self) -> Self {
        version::seal(self, |definition| &mut definition.version)
    }

    /// The services whose events are read.
    pub fn services(&self) -> BTreeSet<&str> {
        let reacting = self.reactions.iter().map(|reaction| reaction.service.as_str());
        std::iter::once(self.start.service.as_str()).chain(reacting).collect()
    }

    /// Whether the definition mentions events of this kind.
    pub fn declares(&self, kind: &Kind) -> bool {
        self.start == *kind || self.reactions.iter().any(|reaction| reaction.emits(kind))
    }

    /// The kinds after which the saga can only end undone: from them a compensating event is reached, and no completing one.
    pub fn failures(&self) -> BTreeSet<Kind> {
        let (completing, compensating) = (self.leading_to(&self.completes), self.leading_to(&self.compensates));
        compensating.difference(&completing).cloned().collect()
    }

    /// `ends` and all kinds from which one of them is reached.
    fn leading_to(&self, ends: &[Kind]) -> BTreeSet<Kind> {
        let mut found: BTreeSet<Kind> = ends.iter().cloned().collect();
        loop {
            let leads = |reaction: &&Reaction| reaction.outcomes().any(|kind| found.contains(&kind));
            let causes: Vec<_> = self.reactions.iter().filter(leads).flat_map(Reaction::causes).cloned().collect();
            let before = found.len();
            found.extend(causes);
            if found.len() == before {
                return found;
            }
        }
    }

    /// The kinds that can occur, each with the reactions that can follow it. A reaction that waits for several events can
    /// follow once each of them can occur.
    pub fn reachable(&self) -> BTreeMap<Kind, Vec<usize>> {
        let mut found: BTreeSet<Kind> = [self.start.clone()].into();
        loop {
            let can_follow = |reaction: &&Reaction| reaction.causes().all(|cause| found.contains(cause));
            let outcomes: Vec<_> = self.reactions.iter().filter(can_follow).flat_map(Reaction::outcomes).collect();
            let before = found.len();
            found.extend(outcomes);
            if found.len() == before {
                break;
            }
        }
        let follow = |kind: &Kind| {
            let indexed = self.reactions.iter().enumerate();
            indexed
                .filter(|(_, reaction)| reaction.causes().any(|cause| cause == kind))
                .map(|(index, _)| index)
                .collect()
        };
        found.iter().map(|kind| (kind.clone(), follow(kind))).collect()
    }
}
