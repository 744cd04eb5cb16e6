//! Where the operator works: what each watch covers, which lists are complete, and which namespaces opted in.

use std::{
    collections::{BTreeSet, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
};

use super::{Custom, Requeue, Store};
use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga},
    controllers::resources::{
        key::{Key, ObjectId},
        plan::Rejection,
        reason::Reason,
    },
};

/// What one watch covers: a namespace, or all of them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Scope(pub Option<String>);

impl Scope {
    pub fn holds(&self, id: &ObjectId) -> bool {
        self.holds_namespace(&id.namespace)
    }

    fn holds_namespace(&self, namespace: &str) -> bool {
        self.0.as_ref().is_none_or(|own| own == namespace)
    }
}

/// Without an entry, everything is complete and every namespace takes part.
#[derive(Debug, Default)]
pub(super) struct Scopes {
    /// Scopes whose first lists are not complete.
    incomplete: BTreeSet<Scope>,
    opted_in: Option<OptedIn>,
}

#[derive(Debug)]
struct OptedIn {
    /// `KEY=VALUE`.
    label: String,
    namespaces: BTreeSet<String>,
}

impl Store {
    /// The first lists of `scope` are to come: until [`Store::complete`], nothing is concluded about what lies in it.
    pub fn expect(&mut self, scope: Scope) {
        self.scopes.incomplete.insert(scope);
    }

    pub fn complete(&mut self, scope: &Scope) -> Requeue {
        if self.scopes.incomplete.remove(scope) { Requeue::now(self.keys_in(scope)) } else { Requeue::default() }
    }

    pub fn is_complete(&self, namespace: &str) -> bool {
        !self.scopes.incomplete.iter().any(|scope| scope.holds_namespace(namespace))
    }

    /// From now on only namespaces with `label` (`KEY=VALUE`) take part.
    pub fn require_label(&mut self, label: String) {
        self.scopes.opted_in = Some(OptedIn { label, namespaces: BTreeSet::new() });
    }

    /// `namespace` has the label.
    pub fn opt_in(&mut self, namespace: String) -> Requeue {
        let Some(opted_in) = &mut self.scopes.opted_in else { return Requeue::default() };
        if !opted_in.namespaces.insert(namespace.clone()) {
            return Requeue::default();
        }
        Requeue::now(self.keys_in(&Scope(Some(namespace))))
    }

    /// `namespace` is gone, or has lost the label.
    pub fn opt_out(&mut self, namespace: &str) -> Requeue {
        let Some(opted_in) = &mut self.scopes.opted_in else { return Requeue::default() };
        if !opted_in.namespaces.remove(namespace) {
            return Requeue::default();
        }
        Requeue::now(self.keys_in(&Scope(Some(namespace.to_owned()))))
    }

    /// After a re-list: only the namespaces in `seen` have the label.
    pub fn retain_opted_in(&mut self, seen: &HashSet<ObjectId>) -> Requeue {
        let known = self.scopes.opted_in.iter().flat_map(|opted_in| &opted_in.namespaces);
        let gone: Vec<_> = known.filter(|known| !seen.iter().any(|seen| seen.name == **known)).cloned().collect();
        gone.iter().map(|namespace| self.opt_out(namespace)).collect()
    }

    /// Why nothing may be written in `namespace`; `None` when it takes part.
    pub fn not_opted_in(&self, namespace: &str) -> Option<Rejection> {
        let opted_in = self.scopes.opted_in.as_ref().filter(|opted_in| !opted_in.namespaces.contains(namespace))?;
        let label = &opted_in.label;
        Some(Rejection {
            reason: Reason::NamespaceNotEnabled,
            message: format!(
                "Weft does not work in namespace {namespace}: enable it by `kubectl label namespace {namespace} {label}`"
            ),
        })
    }

    /// Every key of `scope` that has a reconcile of its own.
    pub fn keys_in(&self, scope: &Scope) -> Vec<Key> {
        let mut keys: Vec<_> = self.ids::<Microservice>(scope).collect();
        keys.extend(self.ids::<OutboxRelay>(scope));
        keys.extend(self.ids::<Saga>(scope));
        let orchestrators: BTreeSet<_> = keys.iter().filter_map(|key| self.orchestrator_of(key)).collect();
        keys.extend(orchestrators);
        keys
    }

    /// The `slot`-th of `slots` parts of all keys; which one a key is in is chosen by its hash.
    pub fn part_of_keys(&self, slot: u64, slots: u64) -> Vec<Key> {
        let mut keys = self.keys_in(&Scope(None));
        keys.retain(|key| {
            let mut hasher = DefaultHasher::new();
            key.hash(&mut hasher);
            hasher.finish().checked_rem(slots) == Some(slot)
        });
        keys
    }

    fn ids<K: Custom>(&self, scope: &Scope) -> impl Iterator<Item = Key> {
        K::objects(self).keys().filter(|id| scope.holds(id)).map(|id| Key::of(K::KIND, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::{fixtures, resources::key::ObjectKind};

    fn store() -> Store {
        let mut store = Store::default();
        store.set(fixtures::microservice("orders", "image: i"));
        store.set(fixtures::saga("create-order", "{steps: [{name: a, do: {service: orders, command: Act}}]}"));
        store
    }

    fn shop() -> Scope {
        Scope(Some("shop".to_owned()))
    }

    #[test]
    fn nothing_is_concluded_about_a_scope_before_its_lists_are_complete() {
        let mut store = store();
        assert!(store.is_complete("shop"));
        store.expect(shop());
        store.expect(Scope(Some("gone".to_owned())));
        assert!(!store.is_complete("shop"));
        let requeued = store.complete(&shop()).now;
        assert!(requeued.contains(&Key::new(ObjectKind::Microservice, "shop", "orders")));
        assert!(requeued.contains(&Key::new(ObjectKind::Orchestrator, "shop", "default")));
        assert!(store.is_complete("shop") && !store.is_complete("gone"), "each scope by itself");
        assert_eq!(store.complete(&shop()), Requeue::default());
    }

    #[test]
    fn a_namespace_takes_part_while_it_has_the_label() {
        let mut store = store();
        assert_eq!(store.not_opted_in("shop"), None, "no label is required");
        store.require_label("weft.dev/enabled=true".to_owned());
        let why = store.not_opted_in("shop").unwrap();
        assert!(why.message.ends_with("`kubectl label namespace shop weft.dev/enabled=true`"), "{}", why.message);
        assert_eq!(store.opt_in("shop".to_owned()).now.len(), 3, "everything in it is reconciled");
        assert_eq!(store.opt_in("shop".to_owned()), Requeue::default());
        assert_eq!(store.not_opted_in("shop"), None);
        assert_eq!(store.retain_opted_in(&HashSet::from([ObjectId::new("", "shop")])), Requeue::default());
        assert_eq!(store.retain_opted_in(&HashSet::new()).now.len(), 3);
        assert!(store.not_opted_in("shop").is_some());
    }

    #[test]
    fn the_parts_of_a_resync_hold_every_key_once() {
        let store = store();
        let mut keys: Vec<_> = (0..7).flat_map(|slot| store.part_of_keys(slot, 7)).collect();
        keys.sort();
        let mut all = store.keys_in(&Scope(None));
        all.sort();
        assert_eq!(keys, all);
        assert_eq!(keys.len(), 3);
    }
}
