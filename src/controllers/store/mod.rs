//! What the operator knows of the cluster: fed by the watches and by the answers to its own writes, read by `observe`.
//!
//! Pure data: every change answers with the keys that it concerns. A change of a status alone, or of something that nothing
//! here depends on, concerns nobody, so that the operator never wakes itself.

mod children;
mod custom;
pub mod live;
pub mod live_pod;
mod malformed;
mod packed;
mod pods;
pub mod policies;
pub mod references;
mod removed;
mod scopes;
mod waits;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::Arc,
};

use smol_str::SmolStr;

pub use custom::{Custom, id_of};
pub use malformed::Malformed;
pub use packed::SmallMap;
pub use removed::FOR_EVER;
pub use scopes::Scope;
pub use waits::Waiting;

use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga},
    contract::status::{InboxStatus, OrchestratorStatus, RelayStatus},
    controllers::{
        resources::{
            key::{Key, ObjectId, ObjectKind},
            observed::Problem,
        },
        store::{
            children::Children,
            custom::Kept,
            live_pod::PodSeen,
            policies::ForeignPolicy,
            references::{Named, References},
        },
    },
};
use packed::Dictionary;
use removed::Removed;
use scopes::Scopes;

/// Keys that a change concerns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Requeue {
    /// To be reconciled at once.
    pub now: Vec<Key>,
    /// Only numbers moved: within the pace of status writes.
    pub paced: Vec<Key>,
}

impl Requeue {
    fn now(keys: impl IntoIterator<Item = Key>) -> Self {
        Self { now: keys.into_iter().collect(), paced: Vec::new() }
    }
}

/// The newest `/status` of a pod.
#[derive(Clone, Debug, PartialEq)]
pub enum DataPlaneStatus {
    Relay(RelayStatus),
    Inbox(InboxStatus),
    Orchestrator(OrchestratorStatus),
}

#[derive(Debug, Default)]
pub struct Store {
    microservices: HashMap<ObjectId, Kept<Microservice>>,
    relays: HashMap<ObjectId, Kept<OutboxRelay>>,
    sagas: HashMap<ObjectId, Kept<Saga>>,
    /// By which objects and children are packed.
    dictionary: Dictionary,
    malformed: HashMap<Key, Malformed>,
    references: References,
    children: Children,
    /// Owners of Jobs that have not ended.
    with_jobs: HashSet<Key>,
    /// The newest version of any of them.
    newest_child: u64,
    pods: HashMap<Arc<Key>, SmallMap<SmolStr, PodSeen>>,
    /// Which pod is whose, for deletions seen only by a re-list.
    pod_owners: HashMap<ObjectId, Arc<Key>>,
    /// NetworkPolicies that are not ours.
    policies: BTreeMap<ObjectId, ForeignPolicy>,
    /// `resourceVersion` of each ConfigMap that is not ours.
    config_maps: HashMap<ObjectId, u64>,
    statuses: HashMap<ObjectId, DataPlaneStatus>,
    /// What keeps things from getting further, as their Events have it.
    waits: HashMap<Waiting, Problem>,
    removed: Removed,
    scopes: Scopes,
}

impl Store {
    /// A ConfigMap of somebody else: migrations, maybe.
    pub fn set_config_map(&mut self, id: ObjectId, version: u64) -> Requeue {
        if self.config_maps.insert(id.clone(), version) == Some(version) {
            return Requeue::default();
        }
        Requeue::now(self.references.to(&Named::ConfigMap(id)).cloned())
    }

    pub fn remove_config_map(&mut self, id: &ObjectId) -> Requeue {
        match self.config_maps.remove(id) {
            Some(_) => Requeue::now(self.references.to(&Named::ConfigMap(id.clone())).cloned()),
            None => Requeue::default(),
        }
    }

    /// After a re-list: forgets the ConfigMaps of `scope` that are not in `seen`.
    pub fn retain_config_maps(&mut self, scope: &Scope, seen: &HashSet<ObjectId>) -> Requeue {
        let gone: Vec<_> =
            self.config_maps.keys().filter(|id| scope.holds(id) && !seen.contains(id)).cloned().collect();
        gone.iter().map(|id| self.remove_config_map(id)).collect()
    }

    /// `resourceVersion` of a ConfigMap that is not ours.
    pub fn config_map(&self, id: &ObjectId) -> Option<u64> {
        self.config_maps.get(id).copied()
    }
}

impl FromIterator<Requeue> for Requeue {
    fn from_iter<I: IntoIterator<Item = Requeue>>(changes: I) -> Self {
        let mut all = Self::default();
        for change in changes {
            all.now.extend(change.now);
            all.paced.extend(change.paced);
        }
        all
    }
}

/// Objects of one kind that are `Ready`, not ready, or not yet known to be either.
pub type ReadyCounts = BTreeMap<(ObjectKind, String), i64>;
