//! What does not get further, and why: only Events carry some causes, so whoever lists those asks here about what, and puts here
//! what they say.

use std::collections::BTreeSet;

use super::{Requeue, Store, custom::Kept};
use crate::controllers::resources::{
    child::{ChildKind, ChildRef},
    key::{Key, ObjectId, ObjectKind},
    observed::Problem,
};

/// Something that does not get further.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Waiting {
    /// A pod whose containers cannot be made, or are not ready.
    Pod { pod: ObjectId, uid: String },
    /// A StatefulSet or a Job without a pod.
    Controller { owner: Key, child: ChildRef, uid: String },
    /// The claim of a pod that finds no node.
    Claim { pod: ObjectId, claim: String },
}

impl Waiting {
    pub fn namespace(&self) -> &str {
        match self {
            Self::Pod { pod, .. } | Self::Claim { pod, .. } => &pod.namespace,
            Self::Controller { owner, .. } => &owner.id.namespace,
        }
    }
}

impl Store {
    /// Everything that does not get further now.
    pub fn waiting(&self) -> BTreeSet<Waiting> {
        let pods = self.pods.iter().flat_map(|(owner, pods)| pods.iter().map(move |(name, pod)| (owner, name, pod)));
        let pods = pods.flat_map(|(owner, name, pod)| {
            let id = ObjectId::new(&owner.id.namespace, name);
            let claim = pod.claim.clone().map(|claim| Waiting::Claim { pod: id.clone(), claim });
            pod.waiting.clone().map(|uid| Waiting::Pod { pod: id, uid }).into_iter().chain(claim)
        });
        // one that is ready may still have a Job, which removes a replication slot
        let owners = self.children.keys().filter(|owner| !self.is_ready(owner) || self.with_jobs.contains(*owner));
        let controllers = owners.flat_map(|owner| {
            self.entries(owner).into_iter().filter_map(move |(child, _)| self.without_pods(owner, &child))
        });
        pods.chain(controllers).collect()
    }

    /// Why it does not get further, as its Events have it.
    pub fn set_wait(&mut self, waiting: &Waiting, problem: Option<Problem>) -> Requeue {
        let known = match problem.clone() {
            Some(problem) => self.waits.insert(waiting.clone(), problem),
            None => self.waits.remove(waiting),
        };
        if known == problem { Requeue::default() } else { self.affected_by_wait(waiting) }
    }

    /// Forgets about what got further.
    pub fn retain_waits(&mut self, waiting: &BTreeSet<Waiting>) {
        self.waits.retain(|known, _| waiting.contains(known));
    }

    /// A StatefulSet or Job that should have a pod and has none.
    pub(super) fn without_pods(&self, owner: &Key, child: &ChildRef) -> Option<Waiting> {
        if !matches!(child.kind, ChildKind::StatefulSet | ChildKind::Job) {
            return None;
        }
        let seen = self.child(owner, child)?;
        let waits = if child.kind == ChildKind::StatefulSet {
            seen.has_too_few_pods()
        } else {
            let mut pods = self.pods_of(owner);
            !seen.has_ended() && !pods.any(|(_, pod)| pod.job.as_deref() == Some(child.name.as_str()))
        };
        let waits = waits && !seen.deleting;
        waits.then(|| Waiting::Controller { owner: owner.clone(), child: child.clone(), uid: seen.uid.clone() })
    }

    fn is_ready(&self, owner: &Key) -> bool {
        owner.kind == ObjectKind::Microservice && self.microservices.get(&owner.id).is_some_and(Kept::is_ready)
    }

    pub(super) fn wait(&self, waiting: &Waiting) -> Option<&Problem> {
        self.waits.get(waiting)
    }

    fn affected_by_wait(&self, waiting: &Waiting) -> Requeue {
        match waiting {
            Waiting::Pod { pod, .. } | Waiting::Claim { pod, .. } => match self.pod_owners.get(pod) {
                Some(owner) => self.affected_by_pod(owner),
                None => Requeue::default(),
            },
            Waiting::Controller { owner, .. } => self.affected_by_pod(owner),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::{
        resources::reason::Reason,
        store::live::{ChildSeen, Live},
    };

    #[test]
    fn a_job_of_a_ready_service_waits_too() {
        let (mut store, owner) = (Store::default(), Key::new(ObjectKind::Microservice, "shop", "orders"));
        let mut object = crate::controllers::fixtures::microservice("orders", "{image: i}");
        object.status = serde_json::from_value(serde_json::json!({"conditions": [{"type": "Ready", "status": "True",
            "reason": "Ready", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}))
        .unwrap();
        store.set(object);
        assert!(store.is_ready(&owner));
        let child = ChildRef::new(ChildKind::Job, "orders-db-setup-1");
        let seen = |version: u64, status: serde_json::Value| {
            let live =
                serde_json::json!({"metadata": {"uid": "1", "resourceVersion": version.to_string()}, "status": status});
            ChildSeen::from(serde_json::from_value::<Live>(live).unwrap())
        };
        store.set_child(&owner, child.clone(), seen(1, serde_json::json!({})));
        assert_eq!(store.waiting().len(), 1);
        let complete = serde_json::json!({"conditions": [{"type": "Complete", "status": "True"}]});
        store.set_child(&owner, child, seen(2, complete));
        assert_eq!(store.waiting().len(), 0);
    }

    #[test]
    fn a_statefulset_without_its_pod_waits_until_it_has_it() {
        let (mut store, owner) = (Store::default(), Key::new(ObjectKind::Microservice, "shop", "orders"));
        let child = ChildRef::new(ChildKind::StatefulSet, "orders-db");
        let seen = |replicas: i32, version: &str| {
            let live: Live =
                serde_json::from_value(serde_json::json!({"metadata": {"uid": "1", "resourceVersion": version},
                "spec": {"replicas": 1}, "status": {"replicas": replicas}}))
                .unwrap();
            ChildSeen::from(live)
        };
        store.set_child(&owner, child.clone(), seen(0, "1"));
        let waiting = Waiting::Controller { owner: owner.clone(), child: child.clone(), uid: "1".to_owned() };
        assert_eq!(store.waiting(), [waiting.clone()].into());
        let problem = Problem::new(Reason::QuotaExceeded, "no");
        assert_eq!(store.set_wait(&waiting, Some(problem.clone())).now, std::slice::from_ref(&owner));
        assert!(store.set_wait(&waiting, Some(problem.clone())).now.is_empty(), "the same is no news");
        let problems = |store: &Store| store.workload(&owner, ChildKind::StatefulSet, "orders-db").unwrap().problems;
        assert_eq!(problems(&store), [problem]);
        store.set_child(&owner, child, seen(1, "2"));
        assert_eq!((store.waiting(), problems(&store)), (BTreeSet::new(), Vec::new()));
    }
}
