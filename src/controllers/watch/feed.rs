//! How each kind of object enters the store.

use std::{
    collections::HashSet,
    sync::atomic::{AtomicU64, Ordering},
};

use kube::{Resource, core::DeserializeGuard};

use super::definitions;
use crate::controllers::{
    resources::{
        child::{ChildKind, ChildRef},
        key::{Key, ObjectId},
        labels::{MANAGED_BY, MANAGED_BY_LABEL},
    },
    runtime::{Context, Priority},
    store::{
        Custom, Requeue, Scope, Store,
        live::{ChildSeen, Live, version},
        live_pod::{LivePod, PodSeen},
        policies::ForeignPolicy,
    },
};

/// How a kind of object enters the store. One value per watch, so that a re-list knows what it has seen.
pub(super) trait Feed: Send + Sync + 'static {
    type Object: Send;
    /// Of the reconciles that a change leads to.
    const PRIORITY: Priority = Priority::Event;

    /// The custom resource definition that it lives from, and where it watches.
    fn definition(&self) -> Option<(String, &Scope)> {
        None
    }
    /// A list begins: it has everything that was made before.
    fn list_begins(&self, _context: &Context) {}
    fn id(object: &Self::Object) -> ObjectId;
    fn set(&self, context: &Context, object: Self::Object) -> Requeue;
    fn remove(&self, context: &Context, object: Self::Object) -> Requeue;
    fn retain(&self, context: &Context, seen: &HashSet<ObjectId>) -> Requeue;
}

fn id(object: &impl Resource) -> ObjectId {
    let meta = object.meta();
    ObjectId::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

pub(super) struct CustomFeed<K> {
    scope: Scope,
    kind: std::marker::PhantomData<fn() -> K>,
}

impl<K> CustomFeed<K> {
    pub(super) fn new(scope: Scope) -> Self {
        Self { scope, kind: std::marker::PhantomData }
    }
}

impl<K: Custom> Feed for CustomFeed<K> {
    type Object = DeserializeGuard<K>;
    const PRIORITY: Priority = Priority::SpecChange;

    fn definition(&self) -> Option<(String, &Scope)> {
        Some((definitions::name(&K::plural(&())), &self.scope))
    }

    fn id(object: &Self::Object) -> ObjectId {
        id(object)
    }

    fn set(&self, context: &Context, object: Self::Object) -> Requeue {
        match object.0 {
            Ok(object) => context.store().set(object),
            Err(invalid) => context.store().set_malformed::<K>(invalid.metadata, invalid.error),
        }
    }

    fn remove(&self, context: &Context, object: Self::Object) -> Requeue {
        context.store().remove::<K>(&Self::id(&object), version(object.meta()))
    }

    fn retain(&self, context: &Context, seen: &HashSet<ObjectId>) -> Requeue {
        context.store().retain::<K>(&self.scope, seen)
    }
}

pub(super) struct ChildFeed {
    scope: Scope,
    kind: ChildKind,
    /// The newest version that was known when the present list began: the operator makes children while it lasts.
    newest: AtomicU64,
}

impl ChildFeed {
    pub(super) fn new(scope: Scope, kind: ChildKind) -> Self {
        Self { scope, kind, newest: AtomicU64::default() }
    }

    fn owner_and_child(&self, object: &Live) -> Option<(Key, ChildRef)> {
        let id = id(object);
        let owner = Key::of_owner(&id.namespace, object.metadata.labels.as_ref()?)?;
        Some((owner, ChildRef::new(self.kind, id.name)))
    }
}

impl Feed for ChildFeed {
    type Object = Live;

    fn list_begins(&self, context: &Context) {
        self.newest.store(context.store().newest_child(), Ordering::Relaxed);
    }

    fn id(object: &Live) -> ObjectId {
        id(object)
    }

    fn set(&self, context: &Context, object: Live) -> Requeue {
        let Some((owner, child)) = self.owner_and_child(&object) else { return Requeue::default() };
        context.store().set_child(&owner, child, ChildSeen::from(object))
    }

    fn remove(&self, context: &Context, object: Live) -> Requeue {
        let Some((owner, child)) = self.owner_and_child(&object) else { return Requeue::default() };
        let uid = object.metadata.uid.as_deref().unwrap_or_default();
        context.store().remove_child(&owner, &child, uid, version(&object.metadata))
    }

    fn retain(&self, context: &Context, seen: &HashSet<ObjectId>) -> Requeue {
        context.store().retain_children(self.kind, &self.scope, seen, self.newest.load(Ordering::Relaxed))
    }
}

/// A kind of which some objects are ours, by their label, and those of others matter too.
pub(super) struct SharedFeed<F> {
    ours: ChildFeed,
    theirs: std::marker::PhantomData<fn() -> F>,
}

/// What becomes of the objects of others in a [`SharedFeed`].
pub(super) trait Foreign: 'static {
    fn set(store: &mut Store, id: ObjectId, object: &Live) -> Requeue;
    fn remove(store: &mut Store, id: &ObjectId) -> Requeue;
    fn retain(store: &mut Store, scope: &Scope, seen: &HashSet<ObjectId>) -> Requeue;
}

impl<F> SharedFeed<F> {
    pub(super) fn new(ours: ChildFeed) -> Self {
        Self { ours, theirs: std::marker::PhantomData }
    }
}

impl<F: Foreign> Feed for SharedFeed<F> {
    type Object = Live;

    fn list_begins(&self, context: &Context) {
        self.ours.list_begins(context);
    }

    fn id(object: &Live) -> ObjectId {
        id(object)
    }

    fn set(&self, context: &Context, object: Live) -> Requeue {
        if is_ours(&object) {
            return self.ours.set(context, object);
        }
        F::set(&mut context.store(), id(&object), &object)
    }

    fn remove(&self, context: &Context, object: Live) -> Requeue {
        if is_ours(&object) {
            return self.ours.remove(context, object);
        }
        F::remove(&mut context.store(), &id(&object))
    }

    fn retain(&self, context: &Context, seen: &HashSet<ObjectId>) -> Requeue {
        let theirs = F::retain(&mut context.store(), &self.ours.scope, seen);
        [theirs, self.ours.retain(context, seen)].into_iter().collect()
    }
}

/// ConfigMaps of others may be somebody's migrations.
pub(super) struct ForeignConfigMaps;

impl Foreign for ForeignConfigMaps {
    fn set(store: &mut Store, id: ObjectId, object: &Live) -> Requeue {
        store.set_config_map(id, version(&object.metadata))
    }

    fn remove(store: &mut Store, id: &ObjectId) -> Requeue {
        store.remove_config_map(id)
    }

    fn retain(store: &mut Store, scope: &Scope, seen: &HashSet<ObjectId>) -> Requeue {
        store.retain_config_maps(scope, seen)
    }
}

/// NetworkPolicies of others may isolate pods of ours.
pub(super) struct ForeignPolicies;

impl Foreign for ForeignPolicies {
    fn set(store: &mut Store, id: ObjectId, object: &Live) -> Requeue {
        store.set_policy(id, ForeignPolicy::of(&object.spec))
    }

    fn remove(store: &mut Store, id: &ObjectId) -> Requeue {
        store.remove_policy(id)
    }

    fn retain(store: &mut Store, scope: &Scope, seen: &HashSet<ObjectId>) -> Requeue {
        store.retain_policies(scope, seen)
    }
}

fn is_ours(object: &Live) -> bool {
    object.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY_LABEL)).is_some_and(|by| by == MANAGED_BY)
}

/// The namespaces that have the label by which they opt in.
pub(super) struct NamespaceFeed;

impl Feed for NamespaceFeed {
    type Object = Live;

    fn id(object: &Live) -> ObjectId {
        id(object)
    }

    fn set(&self, context: &Context, object: Live) -> Requeue {
        context.store().opt_in(id(&object).name.to_string())
    }

    fn remove(&self, context: &Context, object: Live) -> Requeue {
        context.store().opt_out(&id(&object).name)
    }

    fn retain(&self, context: &Context, seen: &HashSet<ObjectId>) -> Requeue {
        context.store().retain_opted_in(seen)
    }
}

pub(super) struct PodFeed {
    pub(super) scope: Scope,
}

impl Feed for PodFeed {
    type Object = LivePod;

    fn id(object: &LivePod) -> ObjectId {
        id(object)
    }

    fn set(&self, context: &Context, object: LivePod) -> Requeue {
        let id = id(&object);
        let owner = object.metadata.labels.as_ref().and_then(|labels| Key::of_owner(&id.namespace, labels));
        let Some(owner) = owner else { return Requeue::default() };
        let requeue = context.store().set_pod(&owner, id.name, PodSeen::from(object));
        context.pods_changed();
        requeue
    }

    fn remove(&self, context: &Context, object: LivePod) -> Requeue {
        let requeue = context.store().remove_pod(&id(&object));
        context.pods_changed();
        requeue
    }

    fn retain(&self, context: &Context, seen: &HashSet<ObjectId>) -> Requeue {
        let requeue = context.store().retain_pods(&self.scope, seen);
        context.pods_changed();
        requeue
    }
}
