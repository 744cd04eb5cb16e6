//! A child that somebody changes as often as Weft puts it back: repairs come with growing pauses, and after three rounds the
//! contest is reported. What admission makes of a write is reported at once: whether it still does, only the next write shows.

use std::{collections::BTreeSet, time::Duration};

use serde_json::Value;
use tokio::time::Instant;

use super::memory::Memory;
use crate::controllers::{
    resources::{
        child::{ChildKind, ChildRef},
        fields::{FieldPath, ForeignField},
        key::Key,
        outcome::{ADMISSION, ForeignChange},
    },
    store::live::ChildSeen,
};

/// Before the second repair, the third, and each after that. As long without a change ends a contest.
const PAUSES: [Duration; 3] = [Duration::from_mins(1), Duration::from_mins(5), Duration::from_mins(15)];
/// How often a child is found changed until that is a contest.
const ROUNDS: u32 = 3;
/// What somebody changed when it is not under `spec`, or was removed.
const UNNAMED: &str = "a field that Weft had set";
/// An author that left no name: a removed field has none, and an admission policy's changes count as the writer's.
const NOBODY: &str = "somebody, or an admission policy";

/// What somebody else did to a child.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    pub fields: BTreeSet<String>,
    pub author: String,
}

impl Change {
    /// Of the fields that `planned` sets, those that others own.
    pub fn of(seen: &ChildSeen, planned: &Value) -> Self {
        Self::from_fields(seen.foreign.iter().filter(|field| field.path.is_in(planned)))
    }

    fn from_fields<'a>(fields: impl Iterator<Item = &'a ForeignField>) -> Self {
        let (mut paths, mut authors) = (BTreeSet::new(), BTreeSet::new());
        for field in fields {
            paths.insert(field.path.to_string());
            authors.insert(field.manager.as_str());
        }
        if paths.is_empty() {
            return Self { fields: [UNNAMED.to_owned()].into(), author: NOBODY.to_owned() };
        }
        Self { fields: paths, author: authors.into_iter().collect::<Vec<_>>().join(", ") }
    }

    /// `spec.replicas by kubectl-scale`.
    pub fn sentence(&self) -> String {
        let fields = self.fields.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
        format!("{fields} by {}", self.author)
    }

    pub fn of_child(self, child: ChildRef) -> ForeignChange {
        ForeignChange { child, fields: self.fields.into_iter().collect(), author: self.author }
    }
}

/// What others added to the spec of a workload, of a Service (such as `type: LoadBalancer`) or of a NetworkPolicy: server-side apply
/// leaves it there. Not `replicas`, which a plan leaves out for an autoscaler, and not the pods' annotations, by which `kubectl rollout
/// restart` works.
pub fn added(child: &ChildRef, seen: &ChildSeen, planned: &Value) -> Option<ForeignChange> {
    use ChildKind::{Deployment, NetworkPolicy, Service, StatefulSet};
    if !matches!(child.kind, Deployment | StatefulSet | Service | NetworkPolicy) {
        return None;
    }
    let theirs =
        [FieldPath::of(&["spec", "replicas"]), FieldPath::of(&["spec", "template", "metadata", "annotations"])];
    let is_allowed = |field: &ForeignField| theirs.iter().any(|path| field.path.starts_with(path));
    let mut fields = seen.foreign.iter().filter(|field| !field.path.is_in(planned) && !is_allowed(field)).peekable();
    fields.peek()?;
    Some(Change::from_fields(fields).of_child(child.clone()))
}

/// The rounds over one child.
#[derive(Clone, Debug)]
pub struct Contest {
    change: Change,
    /// How often it was found changed, and how often it was repaired.
    found: u32,
    repairs: u32,
    last_repair: Instant,
    /// It is changed, and not repaired yet.
    open: bool,
    /// Of what admission made something else in the last write.
    rewritten: BTreeSet<String>,
}

impl Contest {
    pub fn new(change: Change, now: Instant) -> Self {
        Self { change, found: 1, repairs: 0, last_repair: now, open: true, rewritten: BTreeSet::new() }
    }

    /// Nobody changed the child, but admission the write of it.
    fn of_a_write(now: Instant) -> Self {
        let nothing = Change { fields: BTreeSet::new(), author: String::new() };
        Self { found: 0, repairs: 1, open: false, ..Self::new(nothing, now) }
    }

    /// The child is found changed. `Some`: it is not repaired before then. A field that was not among those contested is
    /// repaired at once.
    pub fn found(&mut self, change: &Change, now: Instant) -> Option<Instant> {
        if self.rewritten.is_superset(&change.fields) {
            // whether it still is, the next write shows
            return Some(self.next()).filter(|next| now < *next);
        }
        let is_known = self.change.fields.is_superset(&change.fields);
        if !self.open || !is_known {
            self.found = self.found.saturating_add(1);
            self.open = true;
        }
        self.change.fields.extend(change.fields.iter().cloned());
        self.change.author.clone_from(&change.author);
        Some(self.next()).filter(|next| is_known && now < *next)
    }

    pub fn repaired(&mut self, now: Instant) {
        self.repairs = self.repairs.saturating_add(1);
        self.last_repair = now;
        self.open = false;
    }

    /// When the child may be repaired again, and the contest ends if it needs no repair.
    pub fn next(&self) -> Instant {
        let last = PAUSES.len() - 1;
        let pause =
            self.repairs.checked_sub(1).map(|index| (index as usize).min(last)).and_then(|index| PAUSES.get(index));
        self.last_repair + pause.copied().unwrap_or_default()
    }

    /// What is contested, once it is: by whom changes the child, and by admission.
    pub fn contested(&self, child: &ChildRef) -> Vec<ForeignChange> {
        let changed = (self.found >= ROUNDS).then(|| self.change.clone());
        changed.into_iter().chain(self.rewritten()).map(|change| change.of_child(child.clone())).collect()
    }

    /// What admission made of the last write.
    pub fn rewritten(&self) -> Option<Change> {
        let fields = self.rewritten.clone();
        (!fields.is_empty()).then(|| Change { fields, author: ADMISSION.to_owned() })
    }
}

impl Memory {
    /// Somebody changed the child. `Some`: it is repaired then, and not before.
    pub(super) fn found_changed(
        &self,
        owner: &Key,
        child: &ChildRef,
        change: &Change,
        now: Instant,
    ) -> Option<Instant> {
        let mut remembered = self.lock();
        let contests = remembered.contests.entry(owner.clone()).or_default();
        contests.entry(child.clone()).or_insert_with(|| Contest::new(change.clone(), now)).found(change, now)
    }

    pub(super) fn repaired(&self, owner: &Key, child: &ChildRef, now: Instant) {
        if let Some(contest) = self.lock().contests.get_mut(owner).and_then(|contests| contests.get_mut(child)) {
            contest.repaired(now);
        }
    }

    /// The child needs no repair. `Some`: when its contest ends, if it needs none until then.
    pub(super) fn is_as_applied(&self, owner: &Key, child: &ChildRef, now: Instant) -> Option<Instant> {
        let end = self.lock().contests.get(owner)?.get(child)?.next();
        if now < end { Some(end) } else { self.forget_contest(owner, child) }
    }

    /// Always `None`: there is nothing to wait for.
    pub(super) fn forget_contest(&self, owner: &Key, child: &ChildRef) -> Option<Instant> {
        let mut remembered = self.lock();
        let contests = remembered.contests.get_mut(owner)?;
        contests.remove(child);
        if contests.is_empty() {
            remembered.contests.remove(owner);
        }
        None
    }

    /// What admission made of the last write of the child.
    pub(super) fn rewritten(&self, owner: &Key, child: &ChildRef) -> Option<Change> {
        self.lock().contests.get(owner)?.get(child)?.rewritten()
    }

    /// The child was written, and these fields were answered otherwise than they were sent.
    pub(super) fn set_rewritten(&self, owner: &Key, child: &ChildRef, fields: BTreeSet<String>, now: Instant) {
        let mut remembered = self.lock();
        let known = remembered.contests.get_mut(owner).and_then(|contests| contests.get_mut(child));
        match known {
            Some(contest) if fields.is_empty() && contest.found == 0 => {
                drop(remembered);
                self.forget_contest(owner, child);
            }
            Some(contest) => contest.rewritten = fields,
            None if fields.is_empty() => {}
            None => {
                let contest = Contest { rewritten: fields, ..Contest::of_a_write(now) };
                remembered.contests.entry(owner.clone()).or_default().insert(child.clone(), contest);
            }
        }
    }

    pub(super) fn contested(&self, owner: &Key) -> Vec<ForeignChange> {
        let remembered = self.lock();
        let contests = remembered.contests.get(owner).into_iter().flatten();
        contests.flat_map(|(child, contest)| contest.contested(child)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change(field: &str) -> Change {
        Change { fields: [field.to_owned()].into(), author: "hpa".to_owned() }
    }

    #[tokio::test(start_paused = true)]
    async fn repairs_come_with_growing_pauses_and_the_third_round_is_a_contest() {
        let (start, replicas) = (Instant::now(), change("spec.replicas"));
        let mut contest = Contest::new(replicas.clone(), start);
        let mut repaired = Vec::new();
        // changed again 15 s after each repair, as an autoscaler does
        let mut changed_at = Some(start);
        for second in 0..1800 {
            let now = start + Duration::from_secs(second);
            if changed_at.is_some_and(|at| now >= at) && contest.found(&replicas, now).is_none() {
                contest.repaired(now);
                repaired.push(second);
                changed_at = Some(now + Duration::from_secs(15));
            }
            let child = ChildRef::new(ChildKind::Deployment, "orders");
            assert_eq!(!contest.contested(&child).is_empty(), second >= 75, "{second}");
        }
        assert_eq!(repaired, [0, 60, 360, 1260]);
    }

    #[tokio::test(start_paused = true)]
    async fn what_admission_rewrites_hides_no_contest_and_defers_it_no_less() {
        let (start, replicas) = (Instant::now(), change("spec.replicas"));
        let mut contest = Contest { rewritten: ["spec.image".to_owned()].into(), ..Contest::of_a_write(start) };
        let mut repaired = Vec::new();
        for second in (0..1800).step_by(15) {
            let now = start + Duration::from_secs(second);
            if contest.found(&replicas, now).is_none() {
                contest.repaired(now);
                // the write of a repair is rewritten again
                contest.rewritten = ["spec.image".to_owned()].into();
                repaired.push(second);
            }
        }
        assert!(repaired.len() <= 4, "{repaired:?}");
        let child = ChildRef::new(ChildKind::Deployment, "orders");
        let authors: Vec<_> = contest.contested(&child).into_iter().map(|change| change.author).collect();
        assert_eq!(authors, ["hpa", ADMISSION]);
    }

    #[tokio::test(start_paused = true)]
    async fn another_field_is_repaired_at_once() {
        let now = Instant::now();
        let mut contest = Contest::new(change("spec.replicas"), now);
        contest.repaired(now);
        assert!(contest.found(&change("spec.replicas"), now).is_some());
        assert_eq!(contest.found(&change("spec.paused"), now), None);
    }
}
