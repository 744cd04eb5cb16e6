//! What the events of an instance amount to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{
    definition::{Definition, Kind, Reaction},
    instance::{Instance, Seen},
};
use crate::domain::saga::state::Status;

/// A definition with what is computed from it once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Graph {
    pub definition: Definition,
    /// The kinds after which the saga ends undone.
    failures: BTreeSet<Kind>,
}

impl Graph {
    pub fn new(definition: Definition) -> Self {
        let mut failures = definition.failures();
        failures.extend(definition.compensates.iter().cloned());
        Self { definition, failures }
    }
}

/// What an event is in its instance. A cause is an index into [`Instance::events`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// The instance begins with it.
    Start,
    /// A declared reaction; late by so many milliseconds, if it is late.
    Reaction { to: usize, late_ms: Option<u64> },
    /// Its cause is an event that was not seen (yet).
    CauseUnseen,
    /// No reaction of the definition is like this. The cause, if the event names one.
    Undeclared { to: Option<usize> },
    /// A declared reaction to what was reacted to already, or another start.
    Repeated { to: Option<usize> },
}

/// A reaction that has not been seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owed {
    /// Index into [`Definition::reactions`].
    pub reaction: usize,
    /// The event that it is owed to: an index into [`Instance::events`].
    pub to: usize,
    /// When that occurred, in milliseconds since 1970.
    pub since: i64,
    pub due: i64,
}

/// How an instance ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// [`Status::Completed`] or [`Status::Compensated`].
    pub status: Status,
    /// Milliseconds since 1970.
    pub at: i64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assessment {
    /// Of each event, in their order.
    pub verdicts: Vec<Verdict>,
    /// When the instance began; `None`: its start was not seen (yet).
    pub started_at: Option<i64>,
    /// The most urgent first.
    pub owed: Vec<Owed>,
    /// It can only end undone.
    pub compensating: bool,
    pub end: Option<End>,
}

/// What is worth counting about an event, besides declared reactions in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Finding {
    Undeclared,
    Repeated,
    Late,
}

impl Finding {
    pub const ALL: [Self; 3] = [Self::Undeclared, Self::Repeated, Self::Late];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Undeclared => "undeclared",
            Self::Repeated => "repeated",
            Self::Late => "late",
        }
    }
}

impl Assessment {
    /// What is owed at `now` although its time is over.
    pub fn overdue(&self, now: i64) -> impl Iterator<Item = &Owed> {
        self.owed.iter().filter(move |owed| owed.due < now)
    }

    pub fn status(&self, now: i64) -> Status {
        match self.end {
            Some(end) => end.status,
            None if self.overdue(now).next().is_some() => Status::Stuck,
            None if self.compensating => Status::Compensating,
            None => Status::Running,
        }
    }

    /// The findings, each with the event and its cause.
    pub fn findings<'a>(&self, instance: &'a Instance) -> impl Iterator<Item = (Finding, &'a Seen, Option<&'a Seen>)> {
        self.verdicts.iter().zip(instance.events()).filter_map(|(verdict, event)| {
            let (finding, to) = match *verdict {
                Verdict::Undeclared { to } => (Finding::Undeclared, to),
                Verdict::Repeated { to } => (Finding::Repeated, to),
                Verdict::Reaction { to, late_ms: Some(_) } => (Finding::Late, Some(to)),
                Verdict::Start | Verdict::Reaction { late_ms: None, .. } | Verdict::CauseUnseen => return None,
            };
            Some((finding, event, to.and_then(|to| instance.events().get(to))))
        })
    }
}

/// Computes the state of an instance from the set of its events.
///
/// From the start on, each declared reaction to an event that belongs to the instance is owed: it is the first event of the
/// right service and type that names the owing event as its cause, or names no cause and is not taken otherwise. What is found
/// belongs to the instance, too. An instance has ended when nothing is owed and an ending event belongs to it. As nothing is
/// owed then, no later event reopens it, unless a service contradicts itself and its events arrive out of their order.
pub fn assess(graph: &Graph, instance: &Instance) -> Assessment {
    let Graph { definition, failures } = graph;
    let mut search = Search::new(definition, instance.events());
    let started_at = search.start();
    if started_at.is_some() {
        search.follow();
    }
    let Search { events, verdicts, mut owed, members, .. } = search;
    let mut verdicts_of_all = Vec::with_capacity(events.len());
    for (index, verdict) in verdicts.iter().enumerate() {
        verdicts_of_all.push(verdict.unwrap_or_else(|| remaining(definition, events, &verdicts, index)));
    }
    if let Some(skipped_at) = instance.skipped_at {
        owed.retain(|owed| owed.since > skipped_at);
    }
    owed.sort_by_key(|owed| (owed.due, owed.to, owed.reaction));
    let of_members = || members.iter().filter_map(|&index| events.get(index));
    let compensating = of_members().any(|event| failures.contains(&event.kind));
    let is_ending = |kind: &Kind| definition.completes.contains(kind) || definition.compensates.contains(kind);
    let ended_by_event = of_members().any(|event| is_ending(&event.kind));
    let last = of_members().map(|event| event.at).max();
    let at = last.max(instance.skipped_at.filter(|_| !ended_by_event));
    let is_end = started_at.is_some() && owed.is_empty() && (ended_by_event || instance.skipped_at.is_some());
    let status = if compensating { Status::Compensated } else { Status::Completed };
    let end = at.filter(|_| is_end).map(|at| End { status, at });
    Assessment { verdicts: verdicts_of_all, started_at, owed, compensating, end }
}

/// The verdict on an event that does not belong to the instance.
fn remaining(definition: &Definition, events: &[Seen], verdicts: &[Option<Verdict>], index: usize) -> Verdict {
    let Some(event) = events.get(index) else { return Verdict::CauseUnseen };
    let Some(cause) = &event.cause else {
        let is_started = verdicts.iter().any(Option::is_some);
        return match (definition.declares(&event.kind), is_started) {
            (true, true) => Verdict::Repeated { to: None },
            (true, false) => Verdict::CauseUnseen,
            (false, _) => Verdict::Undeclared { to: None },
        };
    };
    let Some(to) = events.iter().position(|event| event.id == *cause) else { return Verdict::CauseUnseen };
    let answers = |reaction: &Reaction| {
        reaction.emits(&event.kind) && events.get(to).is_some_and(|to| reaction.causes().any(|cause| *cause == to.kind))
    };
    // a reaction to what does not belong to the instance itself is as little declared as that
    let is_member = verdicts.get(to).is_some_and(Option::is_some);
    if definition.start == event.kind || (is_member && definition.reactions.iter().any(answers)) {
        return Verdict::Repeated { to: Some(to) };
    }
    Verdict::Undeclared { to: Some(to) }
}

/// Follows the declared reactions from the start on.
struct Search<'a> {
    definition: &'a Definition,
    events: &'a [Seen],
    /// The events that name each id as their cause.
    effects: BTreeMap<&'a str, Vec<usize>>,
    /// Of the events that belong to the instance.
    verdicts: Vec<Option<Verdict>>,
    members: Vec<usize>,
    owed: Vec<Owed>,
}

impl<'a> Search<'a> {
    fn new(definition: &'a Definition, events: &'a [Seen]) -> Self {
        let mut effects: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (index, event) in events.iter().enumerate() {
            if let Some(cause) = &event.cause {
                effects.entry(cause).or_default().push(index);
            }
        }
        let (verdicts, members, owed) = (vec![None; events.len()], Vec::new(), Vec::new());
        Self { definition, events, effects, verdicts, members, owed }
    }

    /// Finds the earliest event of the starting kind; returns its time.
    fn start(&mut self) -> Option<i64> {
        let index = self.events.iter().position(|event| event.kind == self.definition.start)?;
        self.adopt(index, Verdict::Start);
        self.events.get(index).map(|event| event.at)
    }

    fn adopt(&mut self, index: usize, verdict: Verdict) {
        if let Some(place) = self.verdicts.get_mut(index) {
            *place = Some(verdict);
            self.members.push(index);
        }
    }

    fn follow(&mut self) {
        let mut next: VecDeque<usize> = self.members.iter().copied().collect();
        // reactions that wait for several events, each followed once
        let mut joins: Vec<usize> = (0..self.definition.reactions.len()).collect();
        joins.retain(|&index| self.definition.reactions.get(index).is_some_and(|reaction| !reaction.and.is_empty()));
        loop {
            while let Some(to) = next.pop_front() {
                let Some(event) = self.events.get(to) else { continue };
                for (index, reaction) in self.definition.reactions.iter().enumerate() {
                    if reaction.and.is_empty() && reaction.to == event.kind {
                        next.extend(self.react(index, reaction, &[to]));
                    }
                }
            }
            let ready = joins.iter().find_map(|&index| {
                let reaction = self.definition.reactions.get(index)?;
                let causes: Option<Vec<_>> = reaction.causes().map(|kind| self.member(kind)).collect();
                Some((index, reaction, causes?))
            });
            let Some((index, reaction, causes)) = ready else { return };
            joins.retain(|&join| join != index);
            next.extend(self.react(index, reaction, &causes));
        }
    }

    /// The first event of a kind that belongs to the instance.
    fn member(&self, kind: &Kind) -> Option<usize> {
        self.members
            .iter()
            .copied()
            .filter(|&index| self.events.get(index).is_some_and(|event| event.kind == *kind))
            .min()
    }

    /// Finds the reaction to `causes`, or records that it is owed.
    fn react(&mut self, index: usize, reaction: &Reaction, causes: &[usize]) -> Option<usize> {
        // events are in the order of their times
        let to = causes.iter().copied().max()?;
        let since = self.events.get(to)?.at;
        let due = since.saturating_add_unsigned(reaction.within_ms);
        let is_free = |&found: &usize| {
            let free = self.verdicts.get(found).is_some_and(Option::is_none);
            free && self.events.get(found).is_some_and(|event| reaction.emits(&event.kind))
        };
        let direct = causes.iter().filter_map(|&cause| self.effects.get(self.events.get(cause)?.id.as_str())).flatten();
        let without_cause =
            || (0..self.events.len()).filter(|&at| self.events.get(at).is_some_and(|e| e.cause.is_none()));
        let found = direct.copied().filter(is_free).min().or_else(|| without_cause().find(is_free));
        let Some(found) = found else {
            self.owed.push(Owed { reaction: index, to, since, due });
            return None;
        };
        let late = self.events.get(found).map_or(0, |event| event.at.saturating_sub(due));
        let late_ms = u64::try_from(late).ok().filter(|late| *late > 0);
        self.adopt(found, Verdict::Reaction { to, late_ms });
        Some(found)
    }
}

#[cfg(test)]
#[path = "assessment_tests.rs"]
mod tests;
