//! Custom resources that do not have the form of their type.
//!
//! The last form of each that could be read stays in force: the store keeps it, and whoever depends on it finds it. After a
//! restart there may be none. Then what was made from it stays as it is: the Deployment names the OutboxRelay whose sidecar it
//! carries, and the contract of an orchestrator names the Sagas that it defines.

use std::{collections::BTreeSet, sync::Arc};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::{
    Custom, Requeue, Store,
    custom::{Kept, prune},
    live::version,
};
use crate::{
    api::v1alpha1::Microservice,
    controllers::resources::{
        child::{ChildKind, ChildRef},
        key::{Key, ObjectId, ObjectKind},
        labels::{GUESTS_ANNOTATION, RELAY_ANNOTATION, RELAY_SECRET_ANNOTATION, SAGAS_ANNOTATION},
    },
    domain::names,
};

/// What is known of a custom resource that does not have the form of its type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    pub uid: String,
    pub generation: Option<i64>,
    pub error: String,
}

impl Store {
    /// An object that does not have its type's form. What could be read of it before stays in force.
    pub fn set_malformed<K: Custom>(&mut self, mut metadata: ObjectMeta, error: String) -> Requeue {
        let id =
            ObjectId::new(metadata.namespace.clone().unwrap_or_default(), metadata.name.clone().unwrap_or_default());
        let key = Key::of(K::KIND, &id);
        let uid = metadata.uid.clone().unwrap_or_default();
        if self.removed.has(&uid, version(&metadata)) {
            return Requeue::default();
        }
        let malformed = Malformed { uid, generation: metadata.generation, error };
        let mut replaced = Requeue::default();
        let mut same = self.malformed.get(&key) == Some(&malformed);
        match self.get::<K>(&id) {
            // it is still the same object: that it is being deleted, for one, counts
            Some(known) if known.meta().uid == metadata.uid => {
                same &= known.meta().deletion_timestamp == metadata.deletion_timestamp;
                prune(&mut metadata);
                let mut object = Arc::unwrap_or_clone(known);
                *object.meta_mut() = metadata;
                let kept = Kept::new(&object, &mut self.dictionary);
                K::objects_mut(self).insert(id, kept);
            }
            Some(_) => replaced = self.forget::<K>(&id),
            None => {}
        }
        self.malformed.insert(key.clone(), malformed);
        if same {
            return Requeue::default();
        }
        [replaced, self.affected_by(&key), Requeue::now(self.carriers_of(&key))].into_iter().collect()
    }

    pub fn malformed(&self, key: &Key) -> Option<Malformed> {
        self.malformed.get(key).cloned()
    }

    /// The status of a malformed object was written: the API server's answer cannot be kept, so the last good form gets it.
    pub fn set_reported<K: Custom>(&mut self, id: &ObjectId, status: K::Status) {
        if let Some(known) = self.get::<K>(id) {
            let mut object = Arc::unwrap_or_clone(known);
            *object.status_mut() = Some(status);
            let kept = Kept::new(&object, &mut self.dictionary);
            K::objects_mut(self).insert(id.clone(), kept);
        }
    }

    /// It exists, and no form of it could be read since the operator started.
    pub fn is_unreadable(&self, key: &Key) -> bool {
        let known = match key.kind {
            ObjectKind::Microservice => self.microservices.contains_key(&key.id),
            ObjectKind::OutboxRelay => self.relays.contains_key(&key.id),
            ObjectKind::Saga => self.sagas.contains_key(&key.id),
            ObjectKind::Orchestrator => true,
        };
        !known && self.malformed.contains_key(key)
    }

    /// Those of these Microservices of a namespace that are unreadable.
    pub fn unreadable<'a>(
        &self,
        namespace: &str,
        microservices: impl IntoIterator<Item = &'a str>,
    ) -> BTreeSet<String> {
        let unreadable = |name: &&str| self.is_unreadable(&Key::new(ObjectKind::Microservice, namespace, *name));
        microservices.into_iter().filter(unreadable).map(str::to_owned).collect()
    }

    /// The unreadable OutboxRelay whose sidecar the pods of a Microservice carry.
    pub fn kept_relay(&self, microservice: &ObjectId) -> Option<String> {
        let key = Key::of(ObjectKind::Microservice, microservice);
        let relay = self.carried_relay(&key)?;
        self.is_unreadable(&Key::new(ObjectKind::OutboxRelay, &microservice.namespace, &relay)).then_some(relay)
    }

    /// The Secret that the sidecar in the pods of a Microservice mounts for its broker.
    pub fn carried_secret(&self, microservice: &ObjectId) -> Option<String> {
        self.carried(&Key::of(ObjectKind::Microservice, microservice), RELAY_SECRET_ANNOTATION)
    }

    /// The Sagas that the contract of an orchestrator defines.
    pub fn defined_sagas(&self, orchestrator: &Key) -> Vec<String> {
        let contract = ChildRef::new(ChildKind::ConfigMap, names::orchestrator(&orchestrator.id.name));
        let names = self.child(orchestrator, &contract).and_then(|mut seen| seen.annotations.remove(SAGAS_ANNOTATION));
        names.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }

    /// The Microservices whose databases are in that of `host`, as its server has it.
    fn recorded_guests(&self, host: &Key) -> Vec<String> {
        let server = ChildRef::new(ChildKind::StatefulSet, names::database(&host.id.name));
        let names = self.child(host, &server).and_then(|mut seen| seen.annotations.remove(GUESTS_ANNOTATION));
        names.and_then(|text| serde_json::from_str(&text).ok()).unwrap_or_default()
    }

    /// Those of them that are unreadable, as owners of that server.
    pub fn unreadable_guests(&self, host: &Key) -> Vec<OwnerReference> {
        let guests = self.recorded_guests(host).into_iter();
        guests
            .filter_map(|name| self.unreadable_owner::<Microservice>(&ObjectId::new(&host.id.namespace, name)))
            .collect()
    }

    /// How an object that is unreadable owns children.
    pub fn unreadable_owner<K: Custom>(&self, id: &ObjectId) -> Option<OwnerReference> {
        let key = Key::of(K::KIND, id);
        let malformed = self.malformed(&key).filter(|_| self.is_unreadable(&key))?;
        Some(OwnerReference {
            api_version: K::api_version(&()).into_owned(),
            kind: K::kind(&()).into_owned(),
            name: id.name.to_string(),
            uid: malformed.uid,
            ..OwnerReference::default()
        })
    }

    /// Whose children hold something that was made from this object.
    pub(super) fn carriers_of(&self, key: &Key) -> Vec<Key> {
        let carries = |owner: &&Key| match (key.kind, owner.kind) {
            (ObjectKind::OutboxRelay, ObjectKind::Microservice) => {
                self.carried_relay(owner).is_some_and(|relay| relay == key.id.name)
            }
            (ObjectKind::Microservice, ObjectKind::Microservice) => {
                self.recorded_guests(owner).iter().any(|name| *name == key.id.name)
            }
            (ObjectKind::Saga, ObjectKind::Orchestrator) => {
                self.defined_sagas(owner).iter().any(|name| *name == key.id.name)
            }
            _ => false,
        };
        let neighbours = self.children.keys().filter(|owner| owner.id.namespace == key.id.namespace);
        neighbours.filter(carries).cloned().collect()
    }

    fn carried_relay(&self, microservice: &Key) -> Option<String> {
        self.carried(microservice, RELAY_ANNOTATION)
    }

    fn carried(&self, microservice: &Key, annotation: &str) -> Option<String> {
        let deployment = ChildRef::new(ChildKind::Deployment, microservice.id.name.clone());
        self.child(microservice, &deployment)?.annotations.remove(annotation)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;
    use crate::{
        api::v1alpha1::{OutboxRelay, Saga},
        controllers::{
            fixtures::{self, relay_of},
            store::live::ChildSeen,
        },
    };

    fn orders() -> ObjectId {
        ObjectId::new("shop", "orders")
    }

    fn set_malformed<K: Custom>(store: &mut Store, object: &K) -> Requeue {
        store.set_malformed::<K>(object.meta().clone(), "microservice: not a string".to_owned())
    }

    /// A child with an annotation, as it is found after a restart.
    fn set_child(store: &mut Store, owner: &Key, kind: ChildKind, name: &str, annotation: (&str, &str)) {
        let annotations = [(annotation.0.to_owned(), annotation.1.to_owned())].into();
        let seen = ChildSeen { uid: name.to_owned(), annotations, ..ChildSeen::default() };
        store.set_child(owner, ChildRef::new(kind, name), seen);
    }

    #[test]
    fn a_guest_that_was_never_read_is_known_by_its_hosts_server() {
        let (mut store, host) = (Store::default(), Key::of(ObjectKind::Microservice, &orders()));
        let guests = (GUESTS_ANNOTATION, r#"["reports", "deleted"]"#);
        set_child(&mut store, &host, ChildKind::StatefulSet, "orders-db", guests);
        let reports = fixtures::microservice("reports", "{image: i}");
        let requeue = set_malformed(&mut store, &reports);
        assert!(requeue.now.contains(&host));
        let owners = store.unreadable_guests(&host);
        assert_eq!(owners.iter().map(|owner| owner.name.as_str()).collect::<Vec<_>>(), ["reports"]);
        assert_eq!(Some(&owners[0].uid), reports.metadata.uid.as_ref());
        store.set(reports);
        assert_eq!(store.unreadable_guests(&host), []);
    }

    #[test]
    fn the_last_form_that_could_be_read_stays_in_force() {
        let (mut store, relay) = (Store::default(), relay_of("orders"));
        store.set(relay.as_ref().clone());
        let requeue = set_malformed(&mut store, relay.as_ref());
        let service = Key::of(ObjectKind::Microservice, &orders());
        assert!(requeue.now.contains(&service) && requeue.now.contains(&Key::of(ObjectKind::OutboxRelay, &orders())));
        assert_eq!(store.relays_of(&orders()).len(), 1);
        assert!(set_malformed(&mut store, relay.as_ref()).now.is_empty(), "the same again is no news");

        let mut ending = relay.as_ref().clone();
        ending.metadata.deletion_timestamp = Some(Time(fixtures::now()));
        assert!(!set_malformed(&mut store, &ending).now.is_empty());
        assert_eq!(store.relays_of(&orders()).len(), 0, "it is being deleted");

        let mut other = relay.as_ref().clone();
        other.metadata.uid = Some("another".to_owned());
        set_malformed(&mut store, &other);
        assert!(store.get::<OutboxRelay>(&orders()).is_none(), "it is another object of this name");
    }

    #[test]
    fn a_relay_that_was_never_read_is_known_by_the_deployment_that_carries_it() {
        let (mut store, relay) = (Store::default(), relay_of("orders"));
        let service = Key::of(ObjectKind::Microservice, &orders());
        set_child(&mut store, &service, ChildKind::Deployment, "orders", (RELAY_ANNOTATION, "orders"));
        assert_eq!(store.kept_relay(&orders()), None, "there is none");
        assert!(set_malformed(&mut store, relay.as_ref()).now.contains(&service));
        assert_eq!(store.kept_relay(&orders()).as_deref(), Some("orders"));
        let requeue = store.remove::<OutboxRelay>(&orders(), 9);
        assert!(requeue.now.contains(&service), "its sidecar goes with it");
        assert_eq!(store.kept_relay(&orders()), None);
    }

    #[test]
    fn a_list_without_it_forgets_it() {
        let (mut store, relay) = (Store::default(), relay_of("orders"));
        set_malformed(&mut store, relay.as_ref());
        store.retain::<OutboxRelay>(&super::super::Scope(None), &std::collections::HashSet::new());
        assert!(store.malformed(&Key::of(ObjectKind::OutboxRelay, &orders())).is_none());
    }

    #[test]
    fn a_saga_that_was_never_read_is_known_by_the_contract_that_defines_it() {
        let (mut store, saga) = (Store::default(), fixtures::saga("create-order", "{steps: []}"));
        let orchestrator = Key::new(ObjectKind::Orchestrator, "shop", "default");
        let contract = (SAGAS_ANNOTATION, r#"["create-order"]"#);
        set_child(&mut store, &orchestrator, ChildKind::ConfigMap, "default-orchestrator", contract);
        assert!(set_malformed::<Saga>(&mut store, &saga).now.contains(&orchestrator));
        assert_eq!(store.defined_sagas(&orchestrator), ["create-order"]);
        assert!(store.set(saga).now.contains(&orchestrator), "and once it can be read");
    }
}
