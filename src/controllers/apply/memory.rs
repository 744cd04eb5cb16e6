//! What was applied, and which Secrets are known to exist.
//!
//! It lives in the process. The custom resource's status keeps a digest of it, so that an operator that starts, or becomes the
//! leader, continues where the last one ended: children that are just as they were left need no request.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
};

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
    domain::version::short_hash,
};

/// What this process applied, or found applied when it started, by owner.
#[derive(Debug, Default)]
pub struct Memory(Mutex<Remembered>);

#[derive(Debug, Default)]
pub(super) struct Remembered {
    applied: HashMap<Key, SmallMap<ChildRef, Record>>,
    secrets: HashSet<(Key, ChildRef)>,
    pub(super) contests: HashMap<Key, BTreeMap<ChildRef, Contest>>,
}

/// How a child was just after our write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) hash: String,
    pub(super) uid: String,
    /// [`ChildSeen::ours`].
    pub(super) ours: u64,
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
        if self.lock().applied.contains_key(owner) {
            return;
        }
        let records: Option<SmallMap<_, _>> = applied_children(plan)
            .map(|child| {
                let seen = present.get(&child).filter(|seen| !seen.deleting)?;
                let record = Record { hash: seen.applied_hash.clone()?, uid: seen.uid.clone(), ours: seen.ours };
                Some((child, record))
            })
            .collect();
        let Some(records) = records.filter(|records| is_recorded(&digest(records, plan))) else { return };
        let mut remembered = self.lock();
        remembered.secrets.extend(secrets(plan).map(|secret| (owner.clone(), secret)));
        remembered.applied.insert(owner.clone(), records);
    }

    /// Digest of everything that was applied for `owner`, for its status. To be asked once all of `plan` was applied. `None`: not
    /// all is there as it was applied, which only a write shows, so an operator that starts has to write it once more.
    pub fn digest(&self, owner: &Key, plan: &Plan) -> Option<String> {
        let remembered = self.lock();
        let mut contests = remembered.contests.get(owner).into_iter().flatten();
        if contests.any(|(_, contest)| contest.rewritten().is_some()) {
            return None;
        }
        let known = remembered.applied.get(owner);
        let planned = applied_children(plan).filter_map(|child| {
            let record = known?.get(&child)?.clone();
            Some((child, record))
        });
        Some(digest(&planned.collect(), plan))
    }

    pub(super) fn record(&self, owner: &Key, child: &ChildRef) -> Option<Record> {
        self.lock().applied.get(owner)?.get(child).cloned()
    }

    pub(super) fn remember(&self, owner: &Key, child: ChildRef, record: Record) {
        self.lock().applied.entry(owner.clone()).or_default().insert(child, record);
    }

    pub(super) fn forget_child(&self, owner: &Key, child: &ChildRef) {
        if let Some(children) = self.lock().applied.get_mut(owner) {
            children.remove(child);
        }
        self.forget_contest(owner, child);
    }

    pub(super) fn knows_secret(&self, owner: &Key, secret: &ChildRef) -> bool {
        self.lock().secrets.contains(&(owner.clone(), secret.clone()))
    }

    pub(super) fn remember_secret(&self, owner: &Key, secret: ChildRef) {
        self.lock().secrets.insert((owner.clone(), secret));
    }

    /// The Secret is gone.
    pub fn forget_secret(&self, owner: &Key, secret: &ChildRef) {
        self.lock().secrets.remove(&(owner.clone(), secret.clone()));
    }

    /// The object is gone.
    pub fn forget(&self, owner: &Key) {
        let mut remembered = self.lock();
        remembered.contests.remove(owner);
        remembered.applied.remove(owner);
        remembered.secrets.retain(|(known, _)| known != owner);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Remembered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
    for (child, Record { hash, uid, ours }) in records.iter() {
        // writing to a String cannot fail
        let _ = writeln!(text, "{child} {uid} {hash} {ours:016x}");
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
        memory.remember(&orders(), service(), Record { hash: "a".to_owned(), uid: "1".to_owned(), ours: 7 });
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
