//! A seeded simulation: random choreographies are played by services that lose events, are late, answer twice, and emit what
//! nobody declared. An oracle notes what each event is when it is made. The events are delivered in any order and several times;
//! in the end the assessment must be the oracle's, whatever the order. Where each service's events arrive in their order, an
//! instance that has ended stays ended meanwhile.
//!
//! `WEFT_SEEDS=N` runs N schedules (default 1,000), `WEFT_SEED=S` runs one again.

use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

use super::{
    assessment::{Assessment, Graph, Verdict, assess},
    definition::{Definition, Kind, Reaction},
    instance::{Instance, Seen},
    lint::lint,
};
use crate::domain::saga::state::Status;

const SERVICES: [&str; 4] = ["orders", "customers", "stock", "shipping"];
const MAX_KINDS: usize = 14;

/// What the oracle expects of an event, with the ids of causes instead of indices.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Expected {
    Start,
    Reaction { to: String, late: bool },
    CauseUnseen,
    Undeclared { to: String },
    Repeated { to: String },
}

struct World {
    random: StdRng,
    definition: Definition,
    events: Vec<Seen>,
    expected: BTreeMap<String, Expected>,
    /// Reaction and the id of what it is owed to.
    owed: BTreeSet<(usize, String)>,
    /// Members that occurred, by kind, and reactions to several events that were followed.
    members: BTreeMap<Kind, Seen>,
    joined: BTreeSet<usize>,
}

fn definition(random: &mut StdRng) -> Definition {
    let start = Kind::new("orders", "E0");
    let mut definition = Definition { name: "random".to_owned(), start: start.clone(), ..Definition::default() };
    let (mut open, mut count) = (vec![start], 1);
    while let Some(kind) = open.pop() {
        let is_leaf = kind != definition.start && (count >= MAX_KINDS || random.random_bool(0.3));
        if is_leaf {
            let compensates = !definition.completes.is_empty() && random.random_bool(0.5);
            if compensates { &mut definition.compensates } else { &mut definition.completes }.push(kind);
            continue;
        }
        let mut services = SERVICES;
        services.shuffle(random);
        let (mut single, reactions) = (Vec::new(), random.random_range(1..=2));
        for service in services.iter().take(reactions) {
            let emits: Vec<_> = (0..random.random_range(1..=2)).map(|n| format!("E{}", count + n)).collect();
            count += emits.len();
            let outcomes: Vec<_> = emits.iter().map(|event| Kind::new(service, event)).collect();
            match outcomes.as_slice() {
                [one] => single.push(one.clone()),
                more => open.extend_from_slice(more),
            }
            let within_ms = random.random_range(100..1_000);
            definition.reactions.push(Reaction {
                to: kind.clone(),
                and: Vec::new(),
                service: (*service).to_owned(),
                emits,
                within_ms,
            });
        }
        match single.as_slice() {
            [one, other] if random.random_bool(0.5) => {
                let event = format!("E{count}");
                count += 1;
                open.push(Kind::new("orders", &event));
                definition.reactions.push(Reaction {
                    to: one.clone(),
                    and: vec![other.clone()],
                    service: "orders".to_owned(),
                    emits: vec![event],
                    within_ms: 500,
                });
            }
            _ => open.extend(single),
        }
    }
    definition.seal()
}

impl World {
    fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let definition = definition(&mut random);
        assert_eq!(lint(&definition), [], "seed {seed}");
        let mut world = Self {
            random,
            definition,
            events: Vec::new(),
            expected: BTreeMap::new(),
            owed: BTreeSet::new(),
            members: BTreeMap::new(),
            joined: BTreeSet::new(),
        };
        let start = world.definition.start.clone();
        let first = world.emit(start, None, 1_000_000, Expected::Start);
        world.occur(first);
        world
    }

    fn emit(&mut self, kind: Kind, cause: Option<&str>, at: i64, expected: Expected) -> Seen {
        let id = format!("id-{}", self.events.len());
        let event = Seen { kind, id: id.clone(), cause: cause.map(ToOwned::to_owned), at };
        self.events.push(event.clone());
        self.expected.insert(id, expected);
        event
    }

    /// A member occurs: the services react to it.
    fn occur(&mut self, event: Seen) {
        self.members.insert(event.kind.clone(), event.clone());
        for (index, reaction) in self.definition.reactions.clone().iter().enumerate() {
            if reaction.and.is_empty() && reaction.to == event.kind {
                self.react(index, reaction, &event, &event.id);
            }
        }
        for (index, reaction) in self.definition.reactions.clone().iter().enumerate() {
            let causes: Option<Vec<_>> = reaction.causes().map(|kind| self.members.get(kind).cloned()).collect();
            let Some(causes) = causes.filter(|causes| causes.len() > 1) else { continue };
            if self.joined.insert(index) {
                // of causes at the same time the one that sorts later
                let last = causes.iter().max_by_key(|cause| (cause.at, cause.kind.clone(), cause.id.clone())).unwrap();
                // the service may name any of them
                let named = causes[self.random.random_range(0..causes.len())].id.clone();
                self.react(index, reaction, last, &named);
            }
        }
        if self.random.random_bool(0.05) {
            let expected = Expected::Undeclared { to: event.id.clone() };
            self.emit(Kind::new("stock", "Unheard"), Some(&event.id), event.at + 3, expected);
        }
        if self.random.random_bool(0.05) {
            self.emit(Kind::new("stock", "E1"), Some("elsewhere"), event.at + 5, Expected::CauseUnseen);
        }
    }

    fn react(&mut self, index: usize, reaction: &Reaction, to: &Seen, named: &str) {
        let within = i64::try_from(reaction.within_ms).unwrap();
        let chance = self.random.random_range(0..100);
        if chance < 6 {
            self.owed.insert((index, to.id.clone()));
            return;
        }
        let late = (6..14).contains(&chance);
        // a service's clock may be behind that of the one that it reacts to
        let delay =
            if late { within + self.random.random_range(1..9_000) } else { self.random.random_range(-50..=within) };
        let kind = self.outcome(reaction);
        let expected = Expected::Reaction { to: to.id.clone(), late };
        let event = self.emit(kind, Some(named), to.at + delay, expected);
        if (14..20).contains(&chance) {
            let kind = self.outcome(reaction);
            let again = self.emit(kind.clone(), Some(named), event.at + 7, Expected::Repeated { to: named.to_owned() });
            if let Some(follower) = self.definition.reactions.iter().find(|reaction| reaction.to == kind).cloned() {
                let kind = self.outcome(&follower);
                self.emit(kind, Some(&again.id), again.at + 1, Expected::Undeclared { to: again.id.clone() });
            }
        }
        self.occur(event);
    }

    fn outcome(&mut self, reaction: &Reaction) -> Kind {
        let outcomes: Vec<_> = reaction.outcomes().collect();
        outcomes[self.random.random_range(0..outcomes.len())].clone()
    }

    fn end(&self) -> Option<Status> {
        let ended = |ends: &[Kind]| ends.iter().any(|kind| self.members.contains_key(kind));
        let failed = self.members.keys().any(|kind| {
            // by another way than `Definition::failures`: every walk from here
            let (mut open, mut reached) = (vec![kind.clone()], BTreeSet::new());
            while let Some(kind) = open.pop() {
                let follow = self.definition.reactions.iter().filter(|r| r.causes().any(|cause| *cause == kind));
                open.extend(follow.flat_map(Reaction::outcomes));
                reached.insert(kind);
            }
            let reaches = |ends: &[Kind]| ends.iter().any(|kind| reached.contains(kind));
            reaches(&self.definition.compensates) && !reaches(&self.definition.completes)
        });
        let any = ended(&self.definition.completes) || ended(&self.definition.compensates);
        let status = if failed { Status::Compensated } else { Status::Completed };
        (self.owed.is_empty() && any).then_some(status)
    }
}

fn found(instance: &Instance, assessment: &Assessment) -> BTreeMap<String, Expected> {
    let id = |index: usize| instance.events()[index].id.clone();
    let expected = |verdict: Verdict| match verdict {
        Verdict::Start => Expected::Start,
        Verdict::Reaction { to, late_ms } => Expected::Reaction { to: id(to), late: late_ms.is_some() },
        Verdict::CauseUnseen => Expected::CauseUnseen,
        Verdict::Undeclared { to } => Expected::Undeclared { to: id(to.unwrap()) },
        Verdict::Repeated { to } => Expected::Repeated { to: id(to.unwrap()) },
    };
    instance.events().iter().zip(&assessment.verdicts).map(|(event, v)| (event.id.clone(), expected(*v))).collect()
}

/// All events in any order, some of them several times.
fn shuffled(world: &mut World) -> Vec<Seen> {
    let mut deliveries = world.events.clone();
    for event in &world.events {
        while world.random.random_bool(0.3) {
            deliveries.push(event.clone());
        }
    }
    deliveries.shuffle(&mut world.random);
    deliveries
}

/// The first deliveries of each service's events are in their order, as its relay publishes them; services overtake each other.
fn in_order_of_each_service(world: &mut World) -> Vec<Seen> {
    let mut deliveries = shuffled(world);
    let mut ordered = world.events.clone();
    ordered.sort_by_key(|event| event.at);
    let mut first: BTreeMap<&str, Vec<&Seen>> = BTreeMap::new();
    for event in ordered.iter().rev() {
        first.entry(&event.kind.service).or_default().push(event);
    }
    let mut delivered = BTreeSet::new();
    for place in &mut deliveries {
        let next = first.get_mut(place.kind.service.as_str()).and_then(Vec::pop);
        match next {
            Some(next) => *place = next.clone(),
            None => assert!(delivered.contains(&place.id)),
        }
        delivered.insert(place.id.clone());
    }
    deliveries
}

fn check(seed: u64, world: &World, graph: &Graph, instance: &Instance) {
    let assessment = assess(graph, instance);
    assert_eq!(found(instance, &assessment), world.expected, "seed {seed}");
    let owed: BTreeSet<_> =
        assessment.owed.iter().map(|owed| (owed.reaction, instance.events()[owed.to].id.clone())).collect();
    assert_eq!(owed, world.owed, "seed {seed}");
    assert_eq!(assessment.end.map(|end| end.status), world.end(), "seed {seed}");
    assert_eq!(assessment.status(i64::MAX) == Status::Stuck, !world.owed.is_empty(), "seed {seed}");
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    let graph = Graph::new(world.definition.clone());
    let mut instance = Instance::default();
    for event in shuffled(&mut world) {
        instance.observe(event);
    }
    check(seed, &world, &graph, &instance);
    let text = serde_json::to_string(&instance).unwrap();
    assert_eq!(serde_json::from_str::<Instance>(&text).unwrap(), instance, "seed {seed}: it is stored as it is");

    let (mut instance, mut ended) = (Instance::default(), None);
    for event in in_order_of_each_service(&mut world) {
        instance.observe(event);
        let end = assess(&graph, &instance).end;
        assert!(ended.is_none() || end == ended, "seed {seed}: {end:?} after {ended:?}");
        ended = end;
    }
    check(seed, &world, &graph, &instance);
}

#[test]
fn duplicated_reordered_and_delayed_deliveries_end_in_the_oracle_s_state() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    match number("WEFT_SEED") {
        Some(seed) => run(seed),
        None => (0..number("WEFT_SEEDS").unwrap_or(1_000)).for_each(run),
    }
}
