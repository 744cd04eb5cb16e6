//! Every schedule of small trees, with at most [`FAULTS`] faults: breadth first over the states of the world.
//!
//! `WEFT_FAULTS=2 cargo test --release saga::simulation::exhaustive` allows more.

use std::{
    collections::{HashSet, VecDeque},
    env,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use super::{
    participants::Participants,
    trees::{Builder, saga, with_output},
    world::{Step, World},
};
use crate::domain::saga::{
    decide::Moment,
    definition::{Definition, ForEach, Signal, Task, Wait},
    state::Place,
    tree::{Kind, Tree},
};

const FAULTS: usize = 1;
const MOMENT: Moment = Moment { now_ms: 0, random: 0.0 };

/// Two branches at once, and a call after them.
fn branches(undo_of_pivot: Option<bool>) -> Definition {
    let mut builder = Builder::new(1);
    let group = vec![builder.call(true), builder.call(true)];
    let last = match undo_of_pivot {
        None => builder.call(true),
        Some(undo) => builder.pivot(undo),
    };
    saga(vec![builder.step(Task::All(group)), last], false)
}

/// What must succeed, at once.
fn branches_after_the_pivot() -> Definition {
    let mut builder = Builder::new(1);
    let pivot = builder.pivot(true);
    let group = vec![builder.call(false), builder.call(false)];
    saga(vec![pivot, builder.step(Task::All(group))], false)
}

fn a_sequence_beside_a_wait(wait: Task) -> Definition {
    let mut builder = Builder::new(1);
    let sequence = vec![builder.call(true), builder.call(true)];
    let group = vec![builder.step(Task::Steps(sequence)), builder.step(wait)];
    saga(vec![builder.step(Task::All(group))], true)
}

fn a_choice() -> Definition {
    let mut builder = Builder::new(1);
    let (mut choice, other) = (builder.call(true), builder.call(true));
    choice.when = Some(String::new());
    choice.otherwise = vec![other];
    saga(vec![choice, builder.call(true)], false)
}

fn items(concurrency: u32) -> Definition {
    let mut builder = Builder::new(1);
    let mut each = builder.call(true);
    each.for_each = Some(ForEach { items: String::new(), concurrency });
    saga(vec![each], false)
}

fn an_output(pivot: Option<bool>) -> Definition {
    let mut builder = Builder::new(1);
    let first = builder.call(true);
    let last = match pivot {
        None => builder.call(true),
        Some(undo) => builder.pivot(undo),
    };
    with_output(saga(vec![first, last], false))
}

fn a_signal(pivot: bool) -> Definition {
    let mut builder = Builder::new(1);
    let first = if pivot { builder.pivot(true) } else { builder.call(true) };
    let signal = builder.step(Task::Signal(Signal { within_ms: Some(1) }));
    saga(vec![first, signal, builder.call(false)], false)
}

/// Visits every state that can be reached and checks each end; returns how many states there are.
fn explore(definition: &Definition, participants: Participants, faults: usize) -> usize {
    let tree = Arc::new(Tree::of(definition));
    let mut seen = HashSet::new();
    let mut queue = VecDeque::from([(World::new(tree, participants), faults)]);
    while let Some((world, faults)) = queue.pop_front() {
        if !seen.insert(identity(&world, faults)) {
            continue;
        }
        if world.has_ended() {
            world.finish();
            continue;
        }
        let mut progress = false;
        for step in world.steps() {
            if step.is_fault() && faults == 0 || step == Step::Resume && !world.state.paused {
                continue;
            }
            progress |= !step.is_fault();
            let mut next = world.clone();
            next.apply(step, MOMENT);
            queue.push_back((next, faults - usize::from(step.is_fault())));
        }
        assert!(progress, "nothing can happen any more: {:?}", world.state);
    }
    seen.len()
}

/// Worlds of the same identity have the same future: what is in memory, what a replay of the log leads to, in which order steps
/// completed, and what is in the network.
fn identity(world: &World, faults: usize) -> u64 {
    let World { state, pending, due, in_flight, participants, .. } = world;
    let replayed = (!world.log.is_empty()).then(|| world.replayed());
    let mut stray = world.stray.clone();
    stray.sort();
    let chosen: Vec<_> = world.log.iter().filter(|record| is_evaluation(record)).collect();
    let network = (due, in_flight, stray, participants);
    let mut hasher = DefaultHasher::new();
    format!("{state:?} {replayed:?} {pending:?} {network:?} {chosen:?} {:?} {faults}", world.recorded())
        .hash(&mut hasher);
    hasher.finish()
}

fn is_evaluation(record: &crate::domain::saga::event::Record) -> bool {
    use crate::domain::saga::event::Event;
    matches!(record.event, Event::Chosen { .. } | Event::Listed { .. } | Event::Produced { .. })
}

/// With each call, do or undo, refused in turn, committed or rolled back.
fn explore_with_refusals(name: &str, definition: &Definition) {
    let faults = env::var("WEFT_FAULTS").map_or(FAULTS, |text| text.parse().unwrap());
    let tree = Tree::of(definition);
    let pivot = tree.pivot().map(|node| Place { node, item: None });
    let calls = tree.nodes().filter(|(_, node)| matches!(node.kind, Kind::Call(_)));
    let item = |each: Option<u32>| each.map(|_| 1);
    let places = calls.map(|(node, found)| Place { node, item: item(found.each) }).collect::<Vec<_>>();
    let mut refusals = vec![None];
    for place in places {
        refusals.push(Some((Some(place), false)));
        if tree.has_undo(place.node) && pivot != Some(place) {
            refusals.push(Some((Some(place), true)));
        }
    }
    let mut states = 0;
    for refusing in refusals {
        for rolls_back in [false, true] {
            if rolls_back && (refusing.is_none_or(|(_, undo)| undo) || tree.final_pivot().is_some()) {
                continue;
            }
            let refusing = refusing.into_iter().collect();
            let participants = Participants { refusing, rolls_back, pivot, ..Participants::default() };
            states += explore(definition, participants, faults);
        }
    }
    println!("{name}: {states} states");
    assert!(states > 500, "{name} has {states} states only");
}

#[test]
fn every_schedule_of_two_branches_is_exact() {
    explore_with_refusals("branches", &branches(None));
}

#[test]
fn every_schedule_of_two_branches_before_a_pivot_is_exact() {
    explore_with_refusals("branches before a pivot that is asked", &branches(Some(true)));
    explore_with_refusals("branches before a final pivot", &branches(Some(false)));
}

#[test]
fn every_schedule_of_two_branches_after_a_pivot_is_exact() {
    explore_with_refusals("branches after a pivot", &branches_after_the_pivot());
}

#[test]
fn every_schedule_of_a_sequence_beside_a_wait_is_exact() {
    let waits = [Task::Wait(Wait { duration_ms: 1 }), Task::WaitUntil(String::new())];
    for wait in waits {
        explore_with_refusals("a sequence beside a wait", &a_sequence_beside_a_wait(wait));
    }
}

#[test]
fn every_schedule_of_a_choice_is_exact() {
    explore_with_refusals("a choice", &a_choice());
}

#[test]
fn every_schedule_of_items_is_exact() {
    explore_with_refusals("items one by one", &items(1));
    explore_with_refusals("items at once", &items(2));
}

#[test]
fn every_schedule_of_a_signal_is_exact() {
    explore_with_refusals("a signal", &a_signal(false));
    explore_with_refusals("a signal after the pivot", &a_signal(true));
}

#[test]
fn every_schedule_of_an_output_is_exact() {
    explore_with_refusals("an output", &an_output(None));
    explore_with_refusals("an output after the pivot", &an_output(Some(true)));
}
