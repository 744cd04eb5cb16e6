//! Pods in the store, and what they report.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use smol_str::SmolStr;

use super::{DataPlaneStatus, Requeue, Scope, Store, Waiting, live_pod::PodSeen, packed::SmallMap};
use crate::{
    api::v1alpha1::OutboxRelay,
    contract::{
        problem::{Problem as Reported, ProblemReason},
        status::{InboxStatus, OrchestratorStatus, RelayStatus},
    },
    controllers::resources::{
        key::{Key, ObjectId, ObjectKind},
        labels::Component,
        observed::Problem,
    },
};

impl Store {
    pub fn set_pod(&mut self, owner: &Key, name: impl AsRef<str>, seen: PodSeen) -> Requeue {
        let id = ObjectId::new(&owner.id.namespace, name);
        let name = id.name.clone();
        // the object of a dead pod may stay for long
        if seen.admin_address.is_none() {
            self.statuses.remove(&id);
        }
        let key = self.pods.get_key_value(owner).map_or_else(|| Arc::new(owner.clone()), |(key, _)| Arc::clone(key));
        self.pod_owners.insert(id, Arc::clone(&key));
        let known = self.pods.entry(key).or_default().insert(name, seen.clone());
        // a new pod matters only by what it reports; the workload's counts come with the workload
        let known = known.unwrap_or_default();
        if known.problems == seen.problems
            && known.last_failure == seen.last_failure
            && known.report == seen.report
            && known.succeeded == seen.succeeded
            && known.waiting == seen.waiting
            && known.claim == seen.claim
            && known.admin_address.is_some() == seen.admin_address.is_some()
        {
            return Requeue::default();
        }
        self.affected_by_pod(owner)
    }

    pub fn remove_pod(&mut self, pod: &ObjectId) -> Requeue {
        self.statuses.remove(pod);
        let Some(owner) = self.pod_owners.remove(pod) else { return Requeue::default() };
        if let Some(pods) = self.pods.get_mut(&owner) {
            pods.remove(pod.name.as_str());
            if pods.is_empty() {
                self.pods.remove(&owner);
            }
        }
        self.affected_by_pod(&owner)
    }

    pub fn retain_pods(&mut self, scope: &Scope, seen: &HashSet<ObjectId>) -> Requeue {
        let gone: Vec<_> =
            self.pod_owners.keys().filter(|pod| scope.holds(pod) && !seen.contains(pod)).cloned().collect();
        gone.iter().map(|pod| self.remove_pod(pod)).collect()
    }

    /// The problems of a pod: what its Events say of its claim, those of its containers, or what else its Events say.
    pub(super) fn problems_of<'a>(
        &'a self,
        owner: &Key,
        name: &str,
        pod: &'a PodSeen,
    ) -> impl Iterator<Item = &'a Problem> + use<'a> {
        let id = ObjectId::new(&owner.id.namespace, name);
        let claim = pod.claim.clone().map(|claim| Waiting::Claim { pod: id.clone(), claim });
        let wait = pod.waiting.clone().map(|uid| Waiting::Pod { pod: id, uid });
        let of = |waiting: Option<Waiting>| waiting.and_then(|waiting| self.wait(&waiting));
        of(claim).into_iter().chain(&pod.problems).chain(of(wait))
    }

    /// Pods with a `/status`, and their addresses.
    pub fn admin_addresses(&self) -> BTreeMap<ObjectId, (ObjectKind, SmolStr)> {
        let mut addresses = BTreeMap::new();
        for (owner, pods) in &self.pods {
            for (name, pod) in pods.iter() {
                if let Some(address) = &pod.admin_address {
                    addresses.insert(ObjectId::new(&owner.id.namespace, name), (owner.kind, address.clone()));
                }
            }
        }
        addresses
    }

    /// The newest report of a pod; `None` when it has been silent for a while.
    pub fn set_status(&mut self, pod: &ObjectId, status: Option<DataPlaneStatus>) -> Requeue {
        let Some(owner) = self.pod_owners.get(pod).cloned() else { return Requeue::default() };
        let known = match &status {
            Some(status) => self.statuses.insert(pod.clone(), status.clone()),
            None => self.statuses.remove(pod),
        };
        if known == status {
            return Requeue::default();
        }
        let at_once = essence(known.as_ref()) != essence(status.as_ref());
        let mut keys = self.affected_by_pod(&owner).now;
        let is_inbox =
            matches!((&known, &status), (Some(DataPlaneStatus::Inbox(_)), _) | (_, Some(DataPlaneStatus::Inbox(_))));
        keys.retain(|key| match key.kind {
            ObjectKind::OutboxRelay | ObjectKind::Saga => true,
            ObjectKind::Microservice => is_inbox && *key == *owner,
            ObjectKind::Orchestrator => false,
        });
        if at_once { Requeue::now(keys) } else { Requeue { now: Vec::new(), paced: keys } }
    }

    /// The pods of a Microservice that have a relay, with the report of each.
    pub fn relay_pods(&self, microservice: &Key) -> BTreeMap<String, Option<RelayStatus>> {
        self.admin_pods(microservice, |component| component != Component::Inbox.as_str())
            .map(|(name, status)| match status {
                Some(DataPlaneStatus::Relay(status)) => (name, Some(status.clone())),
                Some(DataPlaneStatus::Orchestrator(_) | DataPlaneStatus::Inbox(_)) | None => (name, None),
            })
            .collect()
    }

    /// A running pod of this owner has a relay (or is an orchestrator).
    pub fn runs_relay(&self, owner: &Key) -> bool {
        self.admin_pods(owner, |component| component != Component::Inbox.as_str()).next().is_some()
    }

    /// The pods of a Microservice's inbox, with the report of each.
    pub fn inbox_pods(&self, microservice: &Key) -> BTreeMap<String, Option<InboxStatus>> {
        self.admin_pods(microservice, |component| component == Component::Inbox.as_str())
            .map(|(name, status)| match status {
                Some(DataPlaneStatus::Inbox(status)) => (name, Some(status.clone())),
                Some(DataPlaneStatus::Orchestrator(_) | DataPlaneStatus::Relay(_)) | None => (name, None),
            })
            .collect()
    }

    /// The running pods that mount the contract of `owner`: an OutboxRelay, an orchestrator, or a Microservice whose inbox reads it.
    pub fn contract_readers(&self, owner: &Key) -> Vec<String> {
        let pods_of = match owner.kind {
            ObjectKind::Saga => return Vec::new(),
            ObjectKind::Microservice => return self.inbox_pods(owner).into_keys().collect(),
            ObjectKind::Orchestrator => owner.clone(),
            ObjectKind::OutboxRelay => match self.get::<OutboxRelay>(&owner.id) {
                Some(relay) => Key::new(ObjectKind::Microservice, &owner.id.namespace, &relay.spec.microservice),
                None => return Vec::new(),
            },
        };
        self.admin_pods(&pods_of, |component| component != Component::Inbox.as_str()).map(|(pod, _)| pod).collect()
    }

    /// The report of an orchestrator: that of the ready one of its pods, if there are two for a moment.
    pub fn orchestrator_status(&self, orchestrator: &Key) -> Option<OrchestratorStatus> {
        self.admin_pods(orchestrator, |_| true)
            .filter_map(|(_, status)| match status {
                Some(DataPlaneStatus::Orchestrator(status)) => Some(status.clone()),
                Some(DataPlaneStatus::Relay(_) | DataPlaneStatus::Inbox(_)) | None => None,
            })
            .max_by_key(|status| status.ready)
    }

    /// Sums over all reports of the data plane.
    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for status in self.statuses.values() {
            match status {
                DataPlaneStatus::Relay(status) if status.leading => {
                    totals.pending += signed(status.pending);
                    totals.published += signed(status.published);
                }
                DataPlaneStatus::Relay(_) | DataPlaneStatus::Inbox(_) => {}
                DataPlaneStatus::Orchestrator(status) => {
                    for counts in status.sagas.values() {
                        totals.running += signed(counts.running);
                        totals.completed += signed(counts.completed);
                        totals.compensated += signed(counts.compensated);
                        totals.stuck += signed(counts.stuck);
                    }
                }
            }
        }
        totals
    }

    /// Pods with a `/status` whose component is wanted.
    fn admin_pods(
        &self,
        owner: &Key,
        is_wanted: impl Fn(&str) -> bool,
    ) -> impl Iterator<Item = (String, Option<&DataPlaneStatus>)> {
        let pods = self.pods_of(owner).filter(move |(_, pod)| pod.admin_address.is_some() && is_wanted(&pod.component));
        pods.map(|(name, _)| {
            let status = self.statuses.get(&ObjectId::new(&owner.id.namespace, name));
            (name.to_string(), status)
        })
    }

    pub(super) fn pods_of(&self, owner: &Key) -> impl Iterator<Item = (&SmolStr, &PodSeen)> {
        self.pods.get(owner).into_iter().flat_map(SmallMap::iter)
    }

    pub(super) fn affected_by_pod(&self, owner: &Key) -> Requeue {
        match owner.kind {
            ObjectKind::Microservice => {
                // a Secret that it misses may be its host's
                let host = self.host_of(owner).filter(|_| self.misses_secrets(owner));
                [self.owner_and_relays(owner), Requeue::now(host)].into_iter().collect()
            }
            ObjectKind::OutboxRelay | ObjectKind::Saga | ObjectKind::Orchestrator => self.affected_by(owner),
        }
    }
}

/// Sums for the operator's metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub running: i64,
    pub completed: i64,
    pub compensated: i64,
    pub stuck: i64,
    pub pending: i64,
    pub published: i64,
}

fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// What makes a condition, as opposed to a number that moves all the time.
#[derive(PartialEq, Eq)]
struct Essence<'a> {
    ready: bool,
    leading: bool,
    paused: bool,
    /// Version of a relay's.
    contract: &'a str,
    problems: Vec<ProblemReason>,
    /// Per saga: stuck instances, and the version of the definition.
    sagas: Vec<(u64, &'a str)>,
}

fn essence(status: Option<&DataPlaneStatus>) -> Option<Essence<'_>> {
    Some(match status? {
        DataPlaneStatus::Relay(RelayStatus { ready, leading, paused, contract, problems, .. }) => Essence {
            ready: *ready,
            leading: *leading,
            paused: *paused,
            contract,
            problems: reasons(problems),
            sagas: Vec::new(),
        },
        DataPlaneStatus::Inbox(InboxStatus { ready, leading, contract, problems, subscriptions: _ }) => Essence {
            ready: *ready,
            leading: *leading,
            paused: false,
            contract,
            problems: reasons(problems),
            sagas: Vec::new(),
        },
        DataPlaneStatus::Orchestrator(OrchestratorStatus { ready, sagas, problems, .. }) => Essence {
            ready: *ready,
            leading: true,
            paused: false,
            contract: "",
            problems: reasons(problems),
            sagas: sagas.values().map(|counts| (counts.stuck, counts.version.as_str())).collect(),
        },
    })
}

fn reasons(problems: &[Reported]) -> Vec<ProblemReason> {
    problems.iter().map(|problem| problem.reason).collect()
}
