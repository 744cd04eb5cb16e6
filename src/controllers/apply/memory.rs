//! What was applied, and which Secrets are known to exist.
//!
//! It lives in the process. The custom resource's status keeps a digest of it, so that an operator that starts, or becomes the
//! leader, continues where the last one ended: children that are just as they were left need no request.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

use smol_str::SmolStr;

use super::contest::Contest;
use crate::{
    controllers::{
        resources::{
            child::{Child, ChildRef, Write},
            key::Key,
            plan::Plan,
        },
        store::{SmallMap, live::ChildSeen},
    },
    domain::version::{hash64, short_hash},
};

/// What this process applied, or found applied when it started, by owner.
#[derive(Debug, Default)]
pub struct Memory(Mutex<Remembered>);

#[derive(Debug, Default)]
pub(super) struct Remembered {
    owners: HashMap<Key, Made>,
    pub(super) contests: HashMap<Key, BTreeMap<ChildRef, Contest>>,
}

/// What one owner has.
#[derive(Debug, Default)]
struct Made {
    /// `None`: nothing was applied, nor taken over.
    applied: Option<SmallMap<ChildRef, Record>>,
    /// Secrets that exist, by name.
    secrets: SmallMap<SmolStr, ()>,
}

/// How a child was just after our write, in two hashes: there are many of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    applied: u64,
    left: u64,
}

impl Record {
    /// `hash`: of what was applied. `uid` and `ours`: [`ChildSeen`]'s.
    pub(super) fn new(hash: &str, uid: &str, ours: u64) -> Self {
        Self { applied: hash64(hash.as_bytes()), left: hash64(format!("{uid} {ours:016x}").as_bytes()) }
    }

    /// Another plan was applied.
    pub(super) fn differs_from(&self, hash: &str) -> bool {
        self.applied != hash64(hash.as_bytes())
    }

    /// It is the same child, and what was applied to it is still on it.
    pub(super) fn describes(&self, seen: &ChildSeen) -> bool {
        seen.applied_hash.as_deref().is_some_and(|hash| *self == Self::new(hash, &seen.uid, seen.ours))
    }
}

impl Memory {
    /// Takes over what an earlier operator applied. `is_recorded` compares with the digest that it left: only if all children
    /// of the plan exist and are just as they were then, nothing can have drifted while nobody watched. (Whether the plan is
    /// still the same is another question, which each child's own hash answers.)
    pub fn adopt(
        &self,
        owner: &Key,
        present: &BTreeMap<ChildRef, ChildSeen>,
        plan: &Plan,
        is_recorded: impl Fn(&str) -> bool,
    ) {
        if self.lock().owners.get(owner).is_some_and(|made| made.applied.is_some()) {
            return;
        }
        let records: Option<SmallMap<_, _>> = applied_children(plan)
            .map(|child| {
                let seen = present.get(&child).filter(|seen| !seen.deleting)?;
                Some((child, Record::new(seen.applied_hash.as_deref()?, &seen.uid, seen.ours)))
            })
            .collect();
        let Some(records) = records.filter(|records| is_recorded(&digest(records, plan))) else { return };
        let mut remembered = self.lock();
        let made = remembered.made(owner);
        made.secrets = secrets(plan).map(|secret| (secret.name, ())).collect();
        made.applied = Some(records);
    }

    /// Digest of everything that was applied for `owner`, for its status. To be asked once all of `plan` was applied. `None`: not
    /// all is there as it was applied, which only a write shows, so an operator that starts has to write it once more.
    pub fn digest(&self, owner: &Key, plan: &Plan) -> Option<String> {
        let remembered = self.lock();
        let mut contests = remembered.contests.get(owner).into_iter().flatten();
        if contests.any(|(_, contest)| contest.rewritten().is_some()) {
            return None;
        }
        let known = remembered.applied(owner);
        let planned = applied_children(plan).filter_map(|child| {
            let record = *known?.get(&child)?;
            Some((child, record))
        });
        Some(digest(&planned.collect(), plan))
    }

    pub(super) fn record(&self, owner: &Key, child: &ChildRef) -> Option<Record> {
        self.lock().applied(owner)?.get(child).copied()
    }

    pub(super) fn remember(&self, owner: &Key, child: ChildRef, record: Record) {
        self.lock().made(owner).applied.get_or_insert_default().insert(child, record);
    }

    pub(super) fn forget_child(&self, owner: &Key, child: &ChildRef) {
        if let Some(children) = self.lock().owners.get_mut(owner).and_then(|made| made.applied.as_mut()) {
            children.remove(child);
        }
        self.forget_contest(owner, child);
    }

    pub(super) fn knows_secret(&self, owner: &Key, secret: &ChildRef) -> bool {
        self.lock().owners.get(owner).is_some_and(|made| made.secrets.get(&secret.name).is_some())
    }

    pub(super) fn remember_secret(&self, owner: &Key, secret: ChildRef) {
        self.lock().made(owner).secrets.insert(secret.name, ());
    }

    /// The Secret is gone.
    pub fn forget_secret(&self, owner: &Key, secret: &ChildRef) {
        if let Some(made) = self.lock().owners.get_mut(owner) {
            made.secrets.remove(&secret.name);
        }
    }

    /// The object is gone.
    pub fn forget(&self, owner: &Key) {
        let mut remembered = self.lock();
        remembered.contests.remove(owner);
        remembered.owners.remove(owner);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Remembered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Remembered {
    fn applied(&self, owner: &Key) -> Option<&SmallMap<ChildRef, Record>> {
        self.owners.get(owner)?.applied.as_ref()
    }

    fn made(&mut self, owner: &Key) -> &mut Made {
        self.owners.entry(owner.clone()).or_default()
    }
}

/// The children of a plan that are applied again when they differ.
fn applied_children(plan: &Plan) -> impl Iterator<Item = ChildRef> {
    let applied = |child: &&Child| matches!(child.kind().write(), Write::Apply | Write::ApplyUnlessTaken);
    plan.children.iter().filter(applied).map(Child::reference)
}

fn secrets(plan: &Plan) -> impl Iterator<Item = ChildRef> {
    plan.children.iter().filter(|child| child.kind().write() == Write::CreateUnseen).map(Child::reference)
}

/// First 16 hex digits of the SHA-256 of a line for each child and each Secret.
fn digest(records: &SmallMap<ChildRef, Record>, plan: &Plan) -> String {
    let mut text = String::new();
    for (child, Record { applied, left }) in records.iter() {
        // writing to a String cannot fail
        let _ = writeln!(text, "{child} {applied:016x} {left:016x}");
    }
    for secret in secrets(plan) {
        let _ = writeln!(text, "{secret}");
    }
    short_hash(text.as_bytes(), 16)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{Secret, Service};
    use kube::api::ObjectMeta;

    use super::*;
    use crate::controllers::resources::{child::ChildKind, key::ObjectKind};

    fn named(name: &str) -> ObjectMeta {
        ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() }
    }

    fn plan() -> Plan {
        let secret = Secret { metadata: named("orders-db"), ..Secret::default() };
        let service = Service { metadata: named("orders"), ..Service::default() };
        Plan { children: vec![secret.into(), service.into()], ..Plan::default() }
    }

    fn service() -> ChildRef {
        ChildRef::new(ChildKind::Service, "orders")
    }

    fn orders() -> Key {
        Key::new(ObjectKind::Microservice, "shop", "orders")
    }

    /// As it is after a pass: what the process remembers, and what it sees.
    fn applied() -> (Memory, BTreeMap<ChildRef, ChildSeen>) {
        let memory = Memory::default();
        memory.remember(&orders(), service(), Record::new("a", "1", 7));
        memory.remember_secret(&orders(), ChildRef::new(ChildKind::Secret, "orders-db"));
        let seen =
            ChildSeen { uid: "1".to_owned(), ours: 7, applied_hash: Some("a".to_owned()), ..ChildSeen::default() };
        (memory, [(service(), seen)].into())
    }

    /// Whether an operator that starts takes over.
    fn adopts(present: &BTreeMap<ChildRef, ChildSeen>, plan: &Plan, recorded: &str) -> bool {
        let memory = Memory::default();
        memory.adopt(&orders(), present, plan, |digest| digest == recorded);
        let known = memory.record(&orders(), &service()).is_some();
        assert_eq!(known, memory.knows_secret(&orders(), &ChildRef::new(ChildKind::Secret, "orders-db")));
        known
    }

    #[test]
    fn an_operator_that_starts_takes_over_what_is_just_as_it_was_left() {
        let (memory, present) = applied();
        let recorded = memory.digest(&orders(), &plan()).unwrap();
        assert!(adopts(&present, &plan(), &recorded));
        assert!(!adopts(&present, &plan(), "another"), "the record is of another state");
    }

    #[test]
    fn what_changed_while_nobody_watched_is_not_taken_over() {
        let (memory, present) = applied();
        let recorded = memory.digest(&orders(), &plan()).unwrap();
        let changed = |change: fn(&mut ChildSeen)| {
            let mut present = present.clone();
            present.values_mut().for_each(change);
            present
        };
        for (case, present) in [
            ("a field was taken from us", changed(|seen| seen.ours = 8)),
            ("it was deleted and made by somebody else", changed(|seen| seen.uid = "2".to_owned())),
            ("its mark was removed", changed(|seen| seen.applied_hash = None)),
            ("it is being deleted", changed(|seen| seen.deleting = true)),
            ("it was deleted", BTreeMap::new()),
        ] {
            assert!(!adopts(&present, &plan(), &recorded), "{case}");
        }
        let mut larger = plan();
        larger.children.push(Secret { metadata: named("orders-db-relay"), ..Secret::default() }.into());
        assert!(!adopts(&present, &larger, &recorded), "a Secret that is new in the plan has to be made");
    }
}
