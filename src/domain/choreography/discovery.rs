//! Mining: from the events of a running system, the choreographies that they show.

use std::collections::{BTreeMap, BTreeSet, HashMap, hash_map::Entry};

use super::{
    definition::{Definition, Kind, Reaction},
    instance::Seen,
};

/// Parts of an event's type that say that something is undone or refused, in lower case.
const FAILURES: [&str; 16] = [
    "abort",
    "cancel",
    "compensat",
    "declin",
    "denied",
    "exceeded",
    "expired",
    "fail",
    "refund",
    "refus",
    "reject",
    "releas",
    "revers",
    "rollback",
    "timedout",
    "undone",
];

/// A choreography that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovered {
    pub definition: Definition,
    /// How many instances began.
    pub starts: u64,
    /// Of each reaction of the definition.
    pub reactions: Vec<Counted>,
    /// How many events of each kind there were.
    pub events: BTreeMap<Kind, u64>,
}

/// How often a reaction was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Events that were reacted to.
    pub reacted: u64,
    /// Events of the kind that is reacted to.
    pub causes: u64,
    /// Of each type that was emitted.
    pub outcomes: BTreeMap<String, u64>,
    /// The longest time that a reaction took, in milliseconds.
    pub longest_ms: u64,
}

/// Collects events, and keeps of each its kind and cause only.
#[derive(Debug, Default)]
pub struct Miner {
    kinds: Vec<Kind>,
    numbers: HashMap<Kind, u32>,
    /// By id: the kind and the time.
    events: HashMap<String, (u32, i64)>,
    /// Effects, as they were read: the cause's id, the kind of the effect, its time.
    effects: Vec<(String, u32, i64)>,
}

impl Miner {
    pub fn observe(&mut self, event: Seen) {
        let number = *self.numbers.entry(event.kind.clone()).or_insert_with(|| {
            self.kinds.push(event.kind.clone());
            u32::try_from(self.kinds.len() - 1).unwrap_or(u32::MAX)
        });
        // a duplicate; that two services give the same id is as good as impossible
        let Entry::Vacant(place) = self.events.entry(event.id) else { return };
        place.insert((number, event.at));
        if let Some(cause) = event.cause {
            self.effects.push((cause, number, event.at));
        }
    }

    /// How many events were collected.
    pub fn events(&self) -> usize {
        self.events.len()
    }

    fn kind(&self, number: u32) -> Kind {
        usize::try_from(number).ok().and_then(|number| self.kinds.get(number)).cloned().unwrap_or_default()
    }

    /// A choreography for each kind that was reacted to and is no reaction itself, the most frequent first.
    pub fn discover(&self) -> Vec<Discovered> {
        let mut counts: BTreeMap<Kind, u64> = BTreeMap::new();
        for (kind, _) in self.events.values() {
            *counts.entry(self.kind(*kind)).or_default() += 1;
        }
        // by cause and reacting service
        let mut reactions: BTreeMap<(Kind, String), Counted> = BTreeMap::new();
        let mut reacted: BTreeSet<(&str, String)> = BTreeSet::new();
        let mut caused: BTreeSet<Kind> = BTreeSet::new();
        for (cause, effect, at) in &self.effects {
            let Some((of, since)) = self.events.get(cause) else { continue };
            let (cause_kind, effect) = (self.kind(*of), self.kind(*effect));
            let causes = counts.get(&cause_kind).copied().unwrap_or_default();
            let counted = reactions.entry((cause_kind, effect.service.clone())).or_default();
            counted.causes = causes;
            counted.reacted += u64::from(reacted.insert((cause, effect.service.clone())));
            *counted.outcomes.entry(effect.event.clone()).or_default() += 1;
            counted.longest_ms = counted.longest_ms.max(u64::try_from(at - since).unwrap_or(0));
            caused.insert(effect);
        }
        let starts: BTreeSet<_> =
            reactions.keys().map(|(on, _)| on.clone()).filter(|on| !caused.contains(on)).collect();
        let mut found: Vec<_> = starts.into_iter().map(|start| discovered(start, &reactions, &counts)).collect();
        found.sort_by_key(|discovered| std::cmp::Reverse(discovered.starts));
        found
    }
}

fn discovered(start: Kind, reactions: &BTreeMap<(Kind, String), Counted>, counts: &BTreeMap<Kind, u64>) -> Discovered {
    let (mut open, mut visited) = (vec![start.clone()], BTreeSet::from([start.clone()]));
    let mut definition = Definition { name: name_of(&start), start: start.clone(), ..Definition::default() };
    let mut counted = Vec::new();
    let mut ends = Vec::new();
    while let Some(on) = open.pop() {
        let follow = || reactions.iter().filter(|((cause, _), _)| *cause == on);
        if follow().next().is_none() {
            ends.push(on.clone());
        }
        for ((_, service), count) in follow() {
            let reaction = Reaction {
                to: on.clone(),
                and: Vec::new(),
                service: service.clone(),
                emits: count.outcomes.keys().cloned().collect(),
                within_ms: within(count.longest_ms),
            };
            open.extend(reaction.outcomes().filter(|kind| visited.insert(kind.clone())));
            definition.reactions.push(reaction);
            counted.push(count.clone());
        }
    }
    ends.sort();
    let is_failure = |kind: &Kind| {
        let name = kind.event.to_lowercase();
        FAILURES.iter().any(|part| name.contains(part))
    };
    (definition.compensates, definition.completes) = ends.into_iter().partition(is_failure);
    let count = |kind: &Kind| counts.get(kind).copied().unwrap_or_default();
    let events = visited.iter().map(|kind| (kind.clone(), count(kind))).collect();
    Discovered { starts: count(&start), definition, reactions: counted, events }
}

/// A round time of at least twice the longest that was seen, and at least a second.
fn within(longest_ms: u64) -> u64 {
    const ROUND: [u64; 12] = [1, 2, 5, 10, 30, 60, 120, 300, 600, 1_800, 3_600, 7_200];
    let seconds = (2 * longest_ms).div_ceil(1_000);
    let round = ROUND.into_iter().find(|round| *round >= seconds);
    round.unwrap_or_else(|| seconds.next_multiple_of(3_600)) * 1_000
}

/// `order-created` of `OrderCreated`: a name that an object may have.
fn name_of(start: &Kind) -> String {
    let mut name = String::new();
    for c in start.event.chars() {
        if c.is_ascii_uppercase() && !name.is_empty() && !name.ends_with('-') {
            name.push('-');
        }
        let c = if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
        if c != '-' || !(name.is_empty() || name.ends_with('-')) {
            name.push(c);
        }
    }
    let name: String = name.trim_start_matches(|c: char| !c.is_ascii_lowercase()).chars().take(63).collect();
    let name = name.trim_end_matches('-');
    if name.is_empty() { "discovered".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::choreography::lint::lint;

    fn seen(service: &str, event: &str, id: &str, cause: Option<&str>, at: i64) -> Seen {
        Seen { kind: Kind::new(service, event), id: id.to_owned(), cause: cause.map(ToOwned::to_owned), at }
    }

    #[test]
    fn what_was_seen_is_a_choreography_that_has_no_findings() {
        let mut miner = Miner::default();
        for order in 0..10 {
            let (created, credit, end) = (format!("c{order}"), format!("r{order}"), format!("e{order}"));
            let (answer, last) =
                if order < 8 { ("CreditReserved", "OrderApproved") } else { ("CreditLimitExceeded", "OrderRejected") };
            // in no order, and twice
            for _ in 0..2 {
                miner.observe(seen("orders", last, &end, Some(&credit), 2_000));
                miner.observe(seen("orders", "OrderCreated", &created, None, 1_000));
                miner.observe(seen("customers", answer, &credit, Some(&created), 1_700));
            }
        }
        miner.observe(seen("orders", "OrderCreated", "lost", None, 1_000));
        miner.observe(seen("orders", "OrderViewed", "v1", None, 1_000));
        let found = miner.discover();
        assert_eq!(found.len(), 1, "what nobody reacts to is none: {found:?}");
        let Discovered { definition, starts, reactions, events } = &found[0];
        assert_eq!(lint(definition), []);
        assert_eq!((definition.name.as_str(), *starts), ("order-created", 11));
        let first = &definition.reactions[0];
        assert_eq!((first.service.as_str(), first.within_ms), ("customers", 2_000));
        assert_eq!(first.emits, ["CreditLimitExceeded", "CreditReserved"]);
        assert_eq!((reactions[0].reacted, reactions[0].causes, reactions[0].longest_ms), (10, 11, 700));
        assert_eq!(reactions[0].outcomes["CreditReserved"], 8);
        assert_eq!(definition.completes, [Kind::new("orders", "OrderApproved")]);
        assert_eq!(definition.compensates, [Kind::new("orders", "OrderRejected")]);
        assert_eq!(events[&Kind::new("orders", "OrderRejected")], 2);
    }

    #[test]
    fn a_name_is_one_that_an_object_may_have() {
        for (event, name) in
            [("OrderCreated", "order-created"), ("order.created_v2", "order-created-v2"), ("7", "discovered")]
        {
            assert_eq!(name_of(&Kind::new("orders", event)), name);
        }
    }
}
