//! What must be true of an instance that has ended, also after every late request has arrived.

use std::collections::BTreeSet;

use super::world::World;
use crate::domain::saga::{
    event::{Event, Record},
    state::{At, Place, Stage},
    tree::{Kind, NodeId, ROOT, Tree},
};

/// Every effect happened exactly once and was undone in reverse order of completion; nothing happened that was not decided.
pub(super) fn check(world: &World) {
    let World { tree, participants, state, .. } = world;
    let effects = &participants.effects;
    let of = |undone: bool| effects.iter().filter(move |(_, undo)| *undo == undone).filter_map(|(place, _)| *place);
    let (done, undone): (Vec<Place>, Vec<Place>) = (of(false).collect(), of(true).collect());
    let notified = effects.iter().filter(|(place, _)| place.is_none()).count();
    let once = done.iter().collect::<BTreeSet<_>>().len();
    assert_eq!(once, done.len(), "done once each: {effects:?}");
    for (index, later) in done.iter().enumerate() {
        let earlier = done.iter().take(index);
        assert!(!earlier.clone().any(|earlier| is_before(tree, *later, *earlier)), "done in order: {effects:?}");
    }
    if state.stage == Stage::Completed {
        let mut expected = BTreeSet::new();
        expect(world, Place { node: ROOT, item: None }, &mut expected);
        assert_eq!(done.iter().copied().collect::<BTreeSet<_>>(), expected, "everything is done, and nothing else");
        assert!(undone.is_empty() && notified == 0, "nothing is undone: {effects:?}");
        return;
    }
    assert_eq!(state.stage, Stage::Compensated, "it has ended");
    let undoable: BTreeSet<Place> = done.iter().copied().filter(|place| tree.has_undo(place.node)).collect();
    assert_eq!(
        undone.iter().copied().collect::<BTreeSet<_>>(),
        undoable,
        "undone is exactly what was done: {effects:?}"
    );
    assert_eq!(undone.len(), undoable.len(), "undone once each: {effects:?}");
    for (index, later) in undone.iter().enumerate() {
        let earlier = undone.iter().take(index);
        assert!(!earlier.clone().any(|earlier| is_before(tree, *earlier, *later)), "undone in reverse: {effects:?}");
    }
    let recorded: Vec<Place> = world.recorded().into_iter().filter(|place| undoable.contains(place)).collect();
    let of_recorded: Vec<Place> = undone.iter().copied().filter(|place| recorded.contains(place)).collect();
    let reverse: Vec<Place> = recorded.iter().rev().copied().collect();
    assert_eq!(of_recorded, reverse, "in reverse order of completion: {effects:?}");
    assert!(undone.ends_with(&reverse), "what was in doubt is undone first: {effects:?}");
    if let Some(pivot) = tree.pivot() {
        assert!(done.iter().all(|place| place.node < pivot), "compensated past the pivot: {effects:?}");
    }
    assert_eq!(notified, usize::from(tree.has_notify()), "notified once: {effects:?}");
}

/// The calls that a completed instance has made, by what was chosen and listed.
fn expect(world: &World, place: Place, expected: &mut BTreeSet<Place>) {
    let at = |node| Place { node, item: place.item };
    match world.tree.kind(place.node).unwrap() {
        Kind::Call(_) => {
            expected.insert(place);
        }
        Kind::Wait { .. } | Kind::WaitUntil(_) | Kind::Signal { .. } => {}
        Kind::Output(_) => {
            let produced = find(world, |event| match event {
                Event::Produced { output, .. } => Some(output.clone()),
                _ => None,
            });
            assert_eq!(produced, Some(world.state.output.clone()), "it is the recorded one");
        }
        Kind::Sequence(children) | Kind::All(children) => {
            for child in children {
                expect(world, at(*child), expected);
            }
        }
        Kind::Choice { then, otherwise, .. } => {
            let chosen = find(world, |event| match event {
                Event::Chosen { at: At::Do(chosen), value } if *chosen == place => Some(*value),
                _ => None,
            });
            match chosen {
                Some(true) => expect(world, at(*then), expected),
                Some(false) => {
                    if let Some(other) = otherwise {
                        expect(world, at(*other), expected);
                    }
                }
                None => panic!("completed without a choice at {place:?}"),
            }
        }
        Kind::Each { body, .. } => {
            let listed = find(world, |event| match event {
                Event::Listed { at: At::Do(listed), items } if *listed == place => Some(items.len()),
                _ => None,
            });
            for item in 0..u32::try_from(listed.expect("completed without a list")).unwrap() {
                expect(world, Place { node: *body, item: Some(item) }, expected);
            }
        }
    }
}

fn find<T>(world: &World, of: impl Fn(&Event) -> Option<T>) -> Option<T> {
    let mut found = world.log.iter().filter_map(|Record { event, .. }| of(event));
    let first = found.next();
    assert!(found.next().is_none(), "it is evaluated once");
    first
}

/// Whether the saga does `first` only before it begins `second`.
fn is_before(tree: &Tree, first: Place, second: Place) -> bool {
    let ancestors = |place: Place| {
        let mut ancestors: Vec<NodeId> = vec![place.node];
        while let Some(parent) = ancestors.last().and_then(|last| tree.node(*last)).and_then(|node| node.parent) {
            ancestors.push(parent);
        }
        ancestors.reverse();
        ancestors
    };
    let (one, other) = (ancestors(first), ancestors(second));
    let common = one.iter().zip(&other).take_while(|(one, other)| one == other).count();
    let each = one.iter().take(common).find(|node| matches!(tree.kind(**node), Some(Kind::Each { .. })));
    if each.is_some() && first.item != second.item {
        let concurrency = each.and_then(|each| tree.kind(*each));
        return matches!(concurrency, Some(Kind::Each { concurrency: 1, .. })) && first.item < second.item;
    }
    let Some(shared) = common.checked_sub(1).and_then(|last| one.get(last)) else { return false };
    let in_order = one.get(common) < other.get(common);
    matches!(tree.kind(*shared), Some(Kind::Sequence(_))) && one.get(common).is_some() && in_order
}
