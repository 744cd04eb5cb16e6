//! Custom resources in the store.

use std::{
    collections::{HashMap, HashSet},
    fmt::Debug,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use k8s_openapi::{
    NamespaceResourceScope,
    apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta},
};
use kube::{Resource, ResourceExt, core::object::HasStatus};
use serde::{Serialize, de::DeserializeOwned};

use super::{
    ReadyCounts, Requeue, Scope, Store,
    live::version,
    packed::{Dictionary, Packed},
    references::{Named, of_microservice, of_relay, of_saga},
};
use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga},
    controllers::{
        resources::{
            key::{Key, ObjectId, ObjectKind},
            labels::has_drain_finalizer,
        },
        status::conditions::{READY, Truth, status_of},
    },
};

/// A custom resource of Weft's.
pub trait Custom:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + HasStatus<Status: Clone + Debug + Default + PartialEq + Serialize + DeserializeOwned + Send + Sync>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    const KIND: ObjectKind;

    fn references(id: &ObjectId, object: &Self) -> Vec<Named>;
    fn objects(store: &Store) -> &HashMap<ObjectId, Kept<Self>>;
    fn objects_mut(store: &mut Store) -> &mut HashMap<ObjectId, Kept<Self>>;
    fn conditions(status: &Self::Status) -> &[Condition];
    fn observed_generation(status: &Self::Status) -> Option<i64>;
    fn set_conditions(status: &mut Self::Status, conditions: Vec<Condition>, observed_generation: Option<i64>);
}

macro_rules! custom {
    ($kind:ident, $objects:ident, $references:path) => {
        impl Custom for $kind {
            const KIND: ObjectKind = ObjectKind::$kind;

            fn references(id: &ObjectId, object: &Self) -> Vec<Named> {
                $references(id, object)
            }

            fn objects(store: &Store) -> &HashMap<ObjectId, Kept<Self>> {
                &store.$objects
            }

            fn objects_mut(store: &mut Store) -> &mut HashMap<ObjectId, Kept<Self>> {
                &mut store.$objects
            }

            fn conditions(status: &Self::Status) -> &[Condition] {
                &status.conditions
            }

            fn observed_generation(status: &Self::Status) -> Option<i64> {
                status.observed_generation
            }

            fn set_conditions(status: &mut Self::Status, conditions: Vec<Condition>, generation: Option<i64>) {
                status.conditions = conditions;
                status.observed_generation = generation;
            }
        }
    };
}

custom!(Microservice, microservices, of_microservice);
custom!(OutboxRelay, relays, of_relay);
custom!(Saga, sagas, of_saga);

/// A custom resource as the store keeps it, with what is asked for often.
#[derive(Debug)]
pub struct Kept<K> {
    object: Packed<K>,
    /// Hash of the uid.
    uid: u64,
    version: u64,
    /// Hash of everything but the status and bookkeeping.
    intent: u64,
    ready: Truth,
}

impl<K: Custom> Kept<K> {
    pub(super) fn new(object: &K, dictionary: &mut Dictionary) -> Self {
        let conditions = object.status().map(K::conditions).unwrap_or_default();
        Self {
            object: Packed::new(object, dictionary),
            uid: hash(&object.meta().uid),
            version: version(object.meta()),
            intent: intent(object.meta()),
            ready: match status_of(conditions, READY) {
                Some("True") => Truth::True,
                Some("False") => Truth::False,
                Some(_) | None => Truth::Unknown,
            },
        }
    }
}

impl<K> Kept<K> {
    pub(super) fn is_ready(&self) -> bool {
        self.ready == Truth::True
    }
}

fn intent(metadata: &ObjectMeta) -> u64 {
    let ObjectMeta { uid, generation, deletion_timestamp, annotations, finalizers, .. } = metadata;
    let deleted = deletion_timestamp.as_ref().map(|time| time.0);
    // an empty list is as good as none
    let finalizers: Vec<_> = finalizers.iter().flatten().collect();
    hash(&(uid, generation, deleted, annotations.iter().flatten().collect::<Vec<_>>(), finalizers))
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// An object's identity from its metadata.
pub fn id_of(object: &impl ResourceExt) -> ObjectId {
    ObjectId::new(object.namespace().unwrap_or_default(), object.name_any())
}

impl Store {
    pub fn get<K: Custom>(&self, id: &ObjectId) -> Option<Arc<K>> {
        K::objects(self).get(id)?.object.unpack(&self.dictionary).map(Arc::new)
    }

    /// A new or changed object, from a watch or as the answer to a write of our own. An older one than is known is ignored.
    pub fn set<K: Custom>(&mut self, mut object: K) -> Requeue {
        let (id, key) = (id_of(&object), Key::of(K::KIND, &id_of(&object)));
        prune(object.meta_mut());
        if object.uid().is_some_and(|uid| self.removed.has(&uid, version(object.meta()))) {
            return Requeue::default();
        }
        let new = Kept::new(&object, &mut self.dictionary);
        let known = K::objects(self).get(&id);
        if known.is_some_and(|known| known.version > new.version && known.uid == new.uid) {
            return Requeue::default();
        }
        let same = known.is_some_and(|known| known.intent == new.intent);
        let was_malformed = self.malformed.remove(&key).is_some();
        self.references.set(&key, K::references(&id, &object));
        K::objects_mut(self).insert(id, new);
        match (same, was_malformed) {
            (true, false) => Requeue::default(),
            (false, false) => self.affected_by(&key),
            (_, true) => [self.affected_by(&key), Requeue::now(self.carriers_of(&key))].into_iter().collect(),
        }
    }

    /// `version`: the newest of the object's versions that counts no more.
    pub fn remove<K: Custom>(&mut self, id: &ObjectId, version: u64) -> Requeue {
        let key = Key::of(K::KIND, id);
        let malformed = self.malformed.remove(&key);
        let uid = self.get::<K>(id).and_then(|known| known.uid());
        if let Some(uid) = uid.or_else(|| malformed.as_ref().map(|malformed| malformed.uid.clone())) {
            self.removed.add(&uid, version);
        }
        let requeue = self.forget::<K>(id);
        if malformed.is_none() {
            return requeue;
        }
        let carriers = std::iter::once(key.clone()).chain(self.carriers_of(&key));
        [requeue, Requeue::now(carriers)].into_iter().collect()
    }

    pub(super) fn forget<K: Custom>(&mut self, id: &ObjectId) -> Requeue {
        let key = Key::of(K::KIND, id);
        let requeue = self.affected_by(&key);
        if K::objects_mut(self).remove(id).is_none() {
            return Requeue::default();
        }
        self.references.set(&key, Vec::new());
        requeue
    }

    /// After a re-list: forgets the objects of `scope` that are not in `seen`.
    pub fn retain<K: Custom>(&mut self, scope: &Scope, seen: &HashSet<ObjectId>) -> Requeue {
        let gone: Vec<_> = K::objects(self)
            .iter()
            .filter(|(id, _)| scope.holds(id) && !seen.contains(id))
            .map(|(id, known)| (id.clone(), known.version.saturating_sub(1)))
            .collect();
        let unreadable = self.malformed.keys().filter(|key| key.kind == K::KIND && self.is_unreadable(key));
        let unreadable = unreadable.filter(|key| scope.holds(&key.id) && !seen.contains(&key.id));
        let gone: Vec<_> = unreadable.map(|key| (key.id.clone(), 0)).chain(gone).collect();
        gone.iter().map(|(id, version)| self.remove::<K>(id, *version)).collect()
    }

    /// OutboxRelays that name a Microservice and are not being deleted, oldest first.
    pub fn relays_of(&self, microservice: &ObjectId) -> Vec<Arc<OutboxRelay>> {
        let named = Named::Microservice(microservice.clone());
        let mut relays: Vec<_> = self
            .references
            .of_kind(&named, ObjectKind::OutboxRelay)
            .filter_map(|id| self.get::<OutboxRelay>(id))
            .filter(|relay| relay.metadata.deletion_timestamp.is_none())
            .collect();
        relays.sort_by_key(|relay| (relay.creation_timestamp(), relay.name_any()));
        relays
    }

    /// Sagas that name an orchestrator, by name. One that is being deleted counts while it drains.
    pub fn members_of(&self, orchestrator: &ObjectId) -> Vec<Arc<Saga>> {
        self.references
            .of_kind(&Named::Orchestrator(orchestrator.clone()), ObjectKind::Saga)
            .filter_map(|id| self.get::<Saga>(id))
            .filter(|saga| saga.metadata.deletion_timestamp.is_none() || has_drain_finalizer(saga.as_ref()))
            .collect()
    }

    /// Everything that is to be reconciled when `key` changes.
    pub(super) fn affected_by(&self, key: &Key) -> Requeue {
        let mut keys = vec![key.clone()];
        match key.kind {
            ObjectKind::Microservice => {
                keys.extend(self.references.to(&Named::Microservice(key.id.clone())).cloned());
                keys.extend(self.host_of(key));
            }
            ObjectKind::OutboxRelay => {
                for named in self.references.named_by(key) {
                    if let Named::Microservice(service) = named {
                        keys.push(Key::of(ObjectKind::Microservice, service));
                        keys.extend(self.references.to(&Named::Publisher(service.clone())).cloned());
                    }
                    let others = self.references.to(named).filter(|key| key.kind != ObjectKind::Microservice);
                    keys.extend(others.cloned());
                }
            }
            ObjectKind::Saga => {}
            ObjectKind::Orchestrator => keys.extend(self.references.to(&Named::Orchestrator(key.id.clone())).cloned()),
        }
        let orchestrators: Vec<_> = keys.iter().filter_map(|key| self.orchestrator_of(key)).collect();
        keys.extend(orchestrators);
        keys.sort();
        keys.dedup();
        Requeue::now(keys)
    }

    /// The Microservice in whose database that of `key` is.
    pub(super) fn host_of(&self, key: &Key) -> Option<Key> {
        self.references.named_by(key).iter().find_map(|named| match named {
            Named::Database(host) => Some(Key::of(ObjectKind::Microservice, host)),
            Named::Microservice(_) | Named::Publisher(_) | Named::ConfigMap(_) | Named::Orchestrator(_) => None,
        })
    }

    /// The Microservices whose databases are in that of `host`, by name.
    pub fn guests_of(&self, host: &ObjectId) -> Vec<Arc<Microservice>> {
        self.references.to(&Named::Database(host.clone())).filter_map(|key| self.get::<Microservice>(&key.id)).collect()
    }

    pub(super) fn orchestrator_of(&self, key: &Key) -> Option<Key> {
        self.references.named_by(key).iter().find_map(|named| match named {
            Named::Orchestrator(orchestrator) => Some(Key::of(ObjectKind::Orchestrator, orchestrator)),
            Named::Microservice(_) | Named::Publisher(_) | Named::ConfigMap(_) | Named::Database(_) => None,
        })
    }

    /// How many objects of each kind are ready.
    pub fn ready_counts(&self) -> ReadyCounts {
        let mut counts = ReadyCounts::new();
        count::<Microservice>(self, &mut counts);
        count::<OutboxRelay>(self, &mut counts);
        count::<Saga>(self, &mut counts);
        counts
    }
}

fn count<K: Custom>(store: &Store, counts: &mut ReadyCounts) {
    for known in K::objects(store).values() {
        *counts.entry((K::KIND, known.ready.as_str().to_owned())).or_default() += 1;
    }
}

/// Drops what is large and not needed.
pub(super) fn prune(metadata: &mut ObjectMeta) {
    metadata.managed_fields = None;
    if let Some(annotations) = &mut metadata.annotations {
        annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
    }
}
