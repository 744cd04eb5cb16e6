//! The participants' databases, with the barrier of `weft.enter`.

use std::collections::{BTreeMap, BTreeSet};

use crate::domain::saga::state::{At, Place};

/// A call: the place (`None` for `onCompensated`), and whether it is an undo.
pub(super) type Operation = (Option<Place>, bool);

pub(super) fn operation(at: At) -> Operation {
    (at.place(), matches!(at, At::Undo(_)))
}

/// A request: the operation, and whether it is a redo.
pub(super) type Request = (Operation, bool);

/// What the barrier has of an operation: the column `result`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entered {
    Done,
    Refused,
    Undone,
    Nothing,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Participants {
    pub entered: BTreeMap<Operation, Entered>,
    pub effects: Vec<Operation>,
    /// Operations that are refused, without effect, until they are repaired.
    pub refusing: BTreeSet<Operation>,
    /// A refused do is rolled back, so that the barrier has no record of it, and not committed by `weft.refuse`.
    pub rolls_back: bool,
    /// Steps whose repeated do is refused ("exists already") although the first one took effect.
    pub forgetful: BTreeSet<Place>,
    pub pivot: Option<Place>,
}

impl Participants {
    /// Handles a request; returns whether the answer is success.
    pub(super) fn handle(&mut self, ((place, undo), redo): Request) -> bool {
        if undo { self.undo(place) } else { self.act(place, redo) }
    }

    fn act(&mut self, place: Option<Place>, redo: bool) -> bool {
        match self.entered.get(&(place, false)) {
            Some(Entered::Done) => return !place.is_some_and(|place| self.forgetful.contains(&place)),
            Some(Entered::Refused) if redo => {}
            Some(_) => return false,
            None => {}
        }
        if self.refusing.contains(&(place, false)) {
            if !self.rolls_back {
                self.entered.insert((place, false), Entered::Refused);
            }
            return false;
        }
        self.entered.insert((place, false), Entered::Done);
        self.effects.push((place, false));
        true
    }

    fn undo(&mut self, place: Option<Place>) -> bool {
        if self.entered.contains_key(&(place, true)) {
            return true;
        }
        if self.entered.get(&(place, false)) != Some(&Entered::Done) {
            self.entered.entry((place, false)).or_insert(Entered::Undone);
            self.entered.insert((place, true), Entered::Nothing);
            return true;
        }
        // a pivot that happened cannot be undone
        if self.pivot == place || self.refusing.contains(&(place, true)) {
            return false;
        }
        self.entered.insert((place, true), Entered::Done);
        self.effects.push((place, true));
        true
    }
}
