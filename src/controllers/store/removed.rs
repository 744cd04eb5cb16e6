//! What was removed last, and how old that news is.
//!
//! The answer to a write of our own may come after the watch has reported that the object is gone: it must not bring it back. But
//! an object can also leave a watch without being gone, when it loses the label that the watch asks for, or when a list was
//! taken before it was made; then whatever is newer than the news of its end counts again.

use std::collections::{HashMap, VecDeque};

/// An answer is late by a request's deadline at most; so many objects are not deleted meanwhile.
const KEPT: usize = 4096;

/// The end of an object that is certain: no version of it counts any more.
pub const FOR_EVER: u64 = u64::MAX;

#[derive(Debug, Default)]
pub(super) struct Removed {
    /// By uid, the newest `resourceVersion` that counts no more.
    versions: HashMap<String, u64>,
    order: VecDeque<String>,
}

impl Removed {
    pub(super) fn add(&mut self, uid: &str, version: u64) {
        if uid.is_empty() {
            return;
        }
        if let Some(known) = self.versions.get_mut(uid) {
            *known = version.max(*known);
            return;
        }
        self.versions.insert(uid.to_owned(), version);
        self.order.push_back(uid.to_owned());
        if self.order.len() > KEPT
            && let Some(oldest) = self.order.pop_front()
        {
            self.versions.remove(&oldest);
        }
    }

    pub(super) fn has(&self, uid: &str, version: u64) -> bool {
        self.versions.get(uid).is_some_and(|end| version <= *end)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use crate::{
        api::v1alpha1::Microservice,
        controllers::{
            fixtures,
            resources::{
                child::{ChildKind, ChildRef},
                key::{Key, ObjectKind},
            },
            store::{Scope, Store, id_of, live::ChildSeen},
        },
    };

    fn deployment() -> (Key, ChildRef) {
        let child = ChildRef::new(ChildKind::Deployment, "orders");
        (Key::new(ObjectKind::Microservice, "shop", "orders"), child)
    }

    fn seen(version: u64) -> ChildSeen {
        ChildSeen { uid: "1".to_owned(), version, ..ChildSeen::default() }
    }

    #[test]
    fn what_lost_its_label_counts_again_when_it_has_it_again() {
        let (mut store, (owner, child)) = (Store::default(), deployment());
        store.set_child(&owner, child.clone(), seen(5));
        store.remove_child(&owner, &child, "1", 6);
        store.set_child(&owner, child.clone(), seen(5));
        assert!(store.child(&owner, &child).is_none(), "a late answer");
        store.set_child(&owner, child.clone(), seen(7));
        assert!(store.child(&owner, &child).is_some());
    }

    #[test]
    fn what_a_list_did_not_have_yet_comes_with_the_next_event() {
        let (mut store, (owner, child)) = (Store::default(), deployment());
        store.set_child(&owner, child.clone(), seen(101));
        let newest = store.newest_child();
        store.retain_children(ChildKind::Deployment, &Scope(None), &HashSet::new(), newest);
        assert!(store.child(&owner, &child).is_none());
        store.set_child(&owner, child.clone(), seen(101));
        assert!(store.child(&owner, &child).is_some());
    }

    #[test]
    fn what_was_made_while_a_list_lasted_stays() {
        let (mut store, (owner, child)) = (Store::default(), deployment());
        store.set_child(&owner, child.clone(), seen(101));
        let list_begins = store.newest_child();
        let later = ChildRef::new(ChildKind::Deployment, "later");
        store.set_child(&owner, later.clone(), ChildSeen { uid: "2".to_owned(), ..seen(102) });
        let requeue = store.retain_children(ChildKind::Deployment, &Scope(None), &HashSet::new(), list_begins);
        assert!(store.child(&owner, &child).is_none() && store.child(&owner, &later).is_some());
        assert_eq!(requeue.now.len(), 1);
    }

    #[test]
    fn an_object_that_could_not_be_read_for_a_while_counts_again() {
        let mut object = fixtures::microservice("orders", "image: a");
        object.metadata.uid = Some("1".to_owned());
        object.metadata.resource_version = Some("1".to_owned());
        let (mut store, id) = (Store::default(), id_of(&object));
        store.set(object.clone());
        store.set_malformed::<Microservice>(object.metadata.clone(), String::new());
        object.metadata.resource_version = Some("3".to_owned());
        store.set(object);
        let key = Key::of(ObjectKind::Microservice, &id);
        assert!(store.get::<Microservice>(&id).is_some() && store.malformed(&key).is_none());
    }
}
