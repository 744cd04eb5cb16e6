//! Children in the store, grouped by their owner.

use std::collections::{BTreeMap, HashSet};

use super::{
    Requeue, Scope, Store,
    live::ChildSeen,
    packed::{Packed, SmallMap},
};
use crate::{
    controllers::resources::{
        child::{ChildKind, ChildRef},
        key::{Key, ObjectId, ObjectKind},
        labels::{Component, SECRETS_ANNOTATION, SET_UP_ANNOTATION},
        observed::{DatabaseObserved, JobOutcome, JobState, Problem, SecretsObserved, Workload},
        reason::Reason,
    },
    domain::names,
};

/// A child as the store keeps it.
#[derive(Debug)]
pub struct KeptChild {
    version: u64,
    seen: Packed<ChildSeen>,
}

impl KeptChild {
    fn new(seen: &ChildSeen) -> Self {
        Self { version: seen.version, seen: Packed::new(seen) }
    }

    fn seen(&self) -> Option<ChildSeen> {
        Some(ChildSeen { version: self.version, ..self.seen.unpack()? })
    }
}

impl Store {
    /// A new or changed child, from a watch or as the answer to a write of our own. An older one than is known is ignored.
    pub fn set_child(&mut self, owner: &Key, child: ChildRef, seen: ChildSeen) -> Requeue {
        if self.removed.has(&seen.uid, seen.version) {
            return Requeue::default();
        }
        let children = self.children.entry(owner.clone()).or_default();
        self.newest_child = self.newest_child.max(seen.version);
        let (known, new) = (children.get(&child), KeptChild::new(&seen));
        if known.is_some_and(|known| known.version > new.version) {
            return Requeue::default();
        }
        let same = known.is_some_and(|known| known.seen == new.seen);
        let kind = child.kind;
        children.insert(child, new);
        if same { Requeue::default() } else { self.affected_by_child(owner, kind) }
    }

    /// `uid` is that of the object that is gone; one that was made since under the same name stays. `version`: the newest of its
    /// versions that counts no more.
    pub fn remove_child(&mut self, owner: &Key, child: &ChildRef, uid: &str, version: u64) -> Requeue {
        self.removed.add(uid, version);
        let Some(children) = self.children.get_mut(owner) else { return Requeue::default() };
        if children.get(child).and_then(KeptChild::seen).is_none_or(|known| known.uid != uid) {
            return Requeue::default();
        }
        children.remove(child);
        if children.is_empty() {
            self.children.remove(owner);
        }
        self.affected_by_child(owner, child.kind)
    }

    /// The newest version of any child that is known.
    pub fn newest_child(&self) -> u64 {
        self.newest_child
    }

    /// After a re-list: forgets the children of this kind and `scope` that are not in `seen`, but for those that were made since
    /// it began, when `newest` was the newest version. What is known of one may come again.
    pub fn retain_children(
        &mut self,
        kind: ChildKind,
        scope: &Scope,
        seen: &HashSet<ObjectId>,
        newest: u64,
    ) -> Requeue {
        let mut gone = Vec::new();
        for (owner, children) in self.children.iter().filter(|(owner, _)| scope.holds(&owner.id)) {
            let judged = children.iter().filter(|(child, known)| child.kind == kind && known.version <= newest);
            for (child, known) in judged {
                if !seen.contains(&ObjectId::new(&owner.id.namespace, &child.name)) {
                    let uid = known.seen().map(|seen| seen.uid).unwrap_or_default();
                    gone.push((owner.clone(), child.clone(), uid, known.version.saturating_sub(1)));
                }
            }
        }
        gone.iter().map(|(owner, child, uid, version)| self.remove_child(owner, child, uid, *version)).collect()
    }

    pub fn children(&self, owner: &Key) -> BTreeMap<ChildRef, ChildSeen> {
        let children = self.children.get(owner).into_iter().flat_map(SmallMap::iter);
        children.filter_map(|(child, known)| Some((child.clone(), known.seen()?))).collect()
    }

    pub fn child(&self, owner: &Key, child: &ChildRef) -> Option<ChildSeen> {
        self.children.get(owner)?.get(child)?.seen()
    }

    /// A Deployment or StatefulSet and what is wrong with its pods.
    pub fn workload(&self, owner: &Key, kind: ChildKind, name: &str) -> Option<Workload> {
        let seen = self.child(owner, &ChildRef::new(kind, name))?;
        let database = Component::Database.as_str();
        let is_ours = |component: &str, job: Option<&str>| {
            job.is_none() && (component == database) == (kind == ChildKind::StatefulSet)
        };
        let missing_images = self.missing_images(owner, is_ours);
        let mut problems = self.problems(owner, is_ours);
        problems.extend(self.refused_pods(owner, &ChildRef::new(kind, name)));
        Some(Workload { missing_images, ..seen.workload(problems) })
    }

    /// The Jobs of an owner, by name.
    fn jobs(&self, owner: &Key) -> BTreeMap<String, JobState> {
        let children = self.children.get(owner).into_iter().flat_map(SmallMap::iter);
        children
            .filter(|(child, _)| child.kind == ChildKind::Job)
            .filter_map(|(child, known)| Some((child, known.seen()?)))
            .map(|(child, seen)| {
                let of_job = |_: &str, job: Option<&str>| job == Some(child.name.as_str());
                let pods = || self.pods_of(owner).map(|(_, pod)| pod).filter(|pod| of_job("", pod.job.as_deref()));
                let last_failure = pods().filter_map(|pod| pod.last_failure.clone()).max();
                let report = pods().find_map(|pod| pod.report.as_deref().cloned());
                let missing_images = self.missing_images(owner, of_job);
                let mut problems = self.problems(owner, of_job);
                problems.extend(self.refused_pods(owner, child));
                let mut state = JobState { missing_images, report, ..seen.job(problems, last_failure) };
                // the Job's own status follows
                if state.outcome == JobOutcome::Running && pods().any(|pod| pod.succeeded) {
                    state.outcome = JobOutcome::Succeeded;
                }
                (child.name.clone(), state)
            })
            .collect()
    }

    /// The database of an owner whose children are named after `name`; its migrations are not in the store.
    pub fn database(&self, owner: &Key, name: &str) -> DatabaseObserved {
        let record = |annotation| self.set_up_annotation(owner, name, annotation);
        let replaced = record(SECRETS_ANNOTATION).and_then(|text| serde_json::from_str(&text).ok());
        DatabaseObserved {
            server: self.workload(owner, ChildKind::StatefulSet, &names::database(name)),
            jobs: self.jobs(owner),
            recorded: record(SET_UP_ANNOTATION).and_then(|text| serde_json::from_str(&text).ok()),
            secrets: SecretsObserved { replaced: replaced.unwrap_or_default(), ..SecretsObserved::default() },
            ..DatabaseObserved::default()
        }
    }

    /// An annotation of the ConfigMap of a set-up.
    pub fn set_up_annotation(&self, owner: &Key, name: &str, annotation: &str) -> Option<String> {
        let config_map = ChildRef::new(ChildKind::ConfigMap, names::setup(name));
        self.child(owner, &config_map)?.annotations.remove(annotation)
    }

    /// A pod of `owner` reports that it misses this Secret.
    pub fn misses_secret(&self, owner: &Key, secret: &str) -> bool {
        let quoted = format!("\"{secret}\"");
        self.missing_secrets(owner).any(|problem| problem.message.contains(&quoted))
    }

    /// A pod of `owner` reports that it misses some Secret.
    pub fn misses_secrets(&self, owner: &Key) -> bool {
        self.missing_secrets(owner).next().is_some()
    }

    fn missing_secrets(&self, owner: &Key) -> impl Iterator<Item = &Problem> {
        let problems = self.pods_of(owner).flat_map(|(name, pod)| self.problems_of(owner, name, pod));
        problems.filter(|problem| problem.reason == Reason::SecretMissing)
    }

    fn missing_images(&self, owner: &Key, is_ours: impl Fn(&str, Option<&str>) -> bool) -> Vec<String> {
        let pods = self.pods_of(owner).filter(|(_, pod)| is_ours(&pod.component, pod.job.as_deref()));
        pods.flat_map(|(_, pod)| pod.missing_images.clone()).collect()
    }

    fn problems(&self, owner: &Key, is_ours: impl Fn(&str, Option<&str>) -> bool) -> Vec<Problem> {
        let mut problems: Vec<Problem> = Vec::new();
        let pods = self.pods_of(owner).filter(|(_, pod)| is_ours(&pod.component, pod.job.as_deref()));
        for problem in pods.flat_map(|(name, pod)| self.problems_of(owner, name, pod)) {
            // one sentence per reason is enough: many pods of one template fail alike
            if !problems.iter().any(|known| known.reason == problem.reason) {
                problems.push(problem.clone());
            }
        }
        problems
    }

    /// Why a StatefulSet or Job has no pod.
    fn refused_pods(&self, owner: &Key, child: &ChildRef) -> Option<Problem> {
        self.without_pods(owner, child).and_then(|waiting| self.wait(&waiting)).cloned()
    }

    fn affected_by_child(&self, owner: &Key, kind: ChildKind) -> Requeue {
        match owner.kind {
            ObjectKind::Microservice if kind == ChildKind::Deployment => self.owner_and_relays(owner),
            ObjectKind::Orchestrator => self.affected_by(owner),
            ObjectKind::Microservice | ObjectKind::OutboxRelay | ObjectKind::Saga => Requeue::now([owner.clone()]),
        }
    }

    /// A Microservice and the OutboxRelays whose sidecar it carries.
    pub(super) fn owner_and_relays(&self, owner: &Key) -> Requeue {
        let relays = self.relays_of(&owner.id);
        let relays = relays.iter().map(|relay| Key::of(ObjectKind::OutboxRelay, &super::id_of(relay.as_ref())));
        Requeue::now(std::iter::once(owner.clone()).chain(relays))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::store::live_pod::PodSeen;

    #[test]
    fn a_job_whose_pod_succeeded_has_succeeded_before_its_own_status_says_so() {
        let (mut store, owner) = (Store::default(), Key::new(ObjectKind::Microservice, "shop", "orders"));
        let job = ChildRef::new(ChildKind::Job, "orders-db-setup-1");
        store.set_child(&owner, job.clone(), ChildSeen { uid: "1".to_owned(), version: 1, ..ChildSeen::default() });
        for (succeeded, expected) in [(false, JobOutcome::Running), (true, JobOutcome::Succeeded)] {
            let pod = PodSeen { job: Some(job.name.clone()), succeeded, ..PodSeen::default() };
            let requeue = store.set_pod(&owner, "orders-db-setup-1-a".to_owned(), pod);
            assert_eq!(requeue.now.is_empty(), !succeeded, "it is reconciled once that is so");
            assert_eq!(store.jobs(&owner)[&job.name].outcome, expected);
        }
    }
}
