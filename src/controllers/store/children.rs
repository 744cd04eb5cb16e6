//! Children in the store, grouped by their owner.

use std::collections::{BTreeMap, HashMap, HashSet};

use serde_json::value::{RawValue, to_raw_value};

use super::{Requeue, Scope, Store, live::ChildSeen, packed::Packed, references::Named};
use crate::{
    api::v1alpha1::SetUp,
    controllers::resources::{
        child::{ChildKind, ChildRef},
        key::{Key, ObjectId, ObjectKind},
        labels::{Component, SECRETS_ANNOTATION, SET_UP_ANNOTATION},
        observed::{DatabaseObserved, JobOutcome, JobState, Problem, SecretsObserved, Workload},
        reason::Reason,
    },
    domain::names,
};

/// The children of one owner as the store keeps them, sorted. Each is parsed by itself.
type Entries = Vec<(ChildRef, Box<RawValue>)>;

/// All children, by owner.
pub(super) type Children = HashMap<Key, Packed<Entries>>;

fn parse(entry: &RawValue) -> Option<ChildSeen> {
    // it is the JSON of one
    serde_json::from_str(entry.get()).ok()
}

fn get(entries: &Entries, child: &ChildRef) -> Option<ChildSeen> {
    let place = entries.binary_search_by(|(known, _)| known.cmp(child)).ok()?;
    parse(&entries.get(place)?.1)
}

impl Store {
    /// A new or changed child, from a watch or as the answer to a write of our own. An older one than is known is ignored.
    pub fn set_child(&mut self, owner: &Key, child: ChildRef, seen: ChildSeen) -> Requeue {
        if self.removed.has(&seen.uid, seen.version) {
            return Requeue::default();
        }
        self.newest_child = self.newest_child.max(seen.version);
        let mut entries = self.entries(owner);
        let known = get(&entries, &child);
        if known.as_ref().is_some_and(|known| known.version > seen.version || *known == seen) {
            return Requeue::default();
        }
        // a struct of strings, numbers and lists always has a form in JSON
        let Ok(json) = to_raw_value(&seen) else { return Requeue::default() };
        let kind = child.kind;
        match entries.binary_search_by(|(known, _)| known.cmp(&child)) {
            Ok(place) => entries.splice(place..=place, [(child, json)]).for_each(drop),
            Err(place) => entries.insert(place, (child, json)),
        }
        self.keep(owner, &entries);
        let same = known.is_some_and(|known| ChildSeen { version: seen.version, ..known } == seen);
        if same { Requeue::default() } else { self.affected_by_child(owner, kind) }
    }

    /// `uid` is that of the object that is gone; one that was made since under the same name stays. `version`: the newest of its
    /// versions that counts no more.
    pub fn remove_child(&mut self, owner: &Key, child: &ChildRef, uid: &str, version: u64) -> Requeue {
        self.removed.add(uid, version);
        let mut entries = self.entries(owner);
        if get(&entries, child).is_none_or(|known| known.uid != uid) {
            return Requeue::default();
        }
        entries.retain(|(known, _)| known != child);
        self.keep(owner, &entries);
        self.affected_by_child(owner, child.kind)
    }

    pub(super) fn entries(&self, owner: &Key) -> Entries {
        self.children.get(owner).and_then(|children| children.unpack(&self.dictionary)).unwrap_or_default()
    }

    fn keep(&mut self, owner: &Key, entries: &Entries) {
        let mut jobs = entries.iter().filter(|(child, _)| child.kind == ChildKind::Job);
        if jobs.any(|(_, job)| parse(job).is_some_and(|job| !job.has_ended())) {
            self.with_jobs.insert(owner.clone());
        } else {
            self.with_jobs.remove(owner);
        }
        if entries.is_empty() {
            self.children.remove(owner);
            return;
        }
        let packed = Packed::new(entries, &mut self.dictionary);
        match self.children.get_mut(owner) {
            Some(children) => *children = packed,
            None => drop(self.children.insert(owner.clone(), packed)),
        }
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
        for owner in self.children.keys().filter(|owner| scope.holds(&owner.id)) {
            for (child, _) in self.entries(owner).iter().filter(|(child, _)| child.kind == kind) {
                if !seen.contains(&ObjectId::new(&owner.id.namespace, &child.name))
                    && let Some(known) = self.child(owner, child).filter(|known| known.version <= newest)
                {
                    gone.push((owner.clone(), child.clone(), known.uid, known.version.saturating_sub(1)));
                }
            }
        }
        gone.iter().map(|(owner, child, uid, version)| self.remove_child(owner, child, uid, *version)).collect()
    }

    pub fn children(&self, owner: &Key) -> BTreeMap<ChildRef, ChildSeen> {
        self.entries(owner).into_iter().filter_map(|(child, entry)| Some((child, parse(&entry)?))).collect()
    }

    pub fn child(&self, owner: &Key, child: &ChildRef) -> Option<ChildSeen> {
        get(&self.entries(owner), child)
    }

    /// A Deployment or StatefulSet and what is wrong with its pods.
    pub fn workload(&self, owner: &Key, kind: ChildKind, name: &str) -> Option<Workload> {
        let seen = self.child(owner, &ChildRef::new(kind, name))?;
        let database = Component::Database.as_str();
        // what runs in a pod of its own beside the service
        let beside = [(Component::Relay, names::relay as fn(&str) -> String), (Component::Inbox, names::inbox)];
        let own = beside.into_iter().filter(|_| owner.kind == ObjectKind::Microservice);
        let own =
            own.filter(|(_, name_of)| name == name_of(&owner.id.name)).map(|(component, _)| component.as_str()).next();
        let is_ours = |component: &str, job: Option<&str>| {
            job.is_none()
                && match kind {
                    ChildKind::StatefulSet => component == database,
                    _ => match own {
                        Some(own) => component == own,
                        None => component != database && beside.iter().all(|(other, _)| component != other.as_str()),
                    },
                }
        };
        let missing_images = self.missing_images(owner, is_ours);
        let mut problems = self.problems(owner, is_ours);
        problems.extend(self.refused_pods(owner, &ChildRef::new(kind, name)));
        Some(Workload { missing_images, ..seen.workload(problems) })
    }

    /// The Jobs of an owner, by name.
    fn jobs(&self, owner: &Key) -> BTreeMap<String, JobState> {
        self.entries(owner)
            .into_iter()
            .filter(|(child, _)| child.kind == ChildKind::Job)
            .filter_map(|(child, entry)| Some((child, parse(&entry)?)))
            .map(|(child, seen)| {
                let of_job = |_: &str, job: Option<&str>| job == Some(child.name.as_str());
                let pods = || self.pods_of(owner).map(|(_, pod)| pod).filter(|pod| of_job("", pod.job.as_deref()));
                let last_failure = pods().filter_map(|pod| pod.last_failure.as_deref().cloned()).max();
                let report = pods().find_map(|pod| pod.report.as_deref().cloned());
                let missing_images = self.missing_images(owner, of_job);
                let mut problems = self.problems(owner, of_job);
                problems.extend(self.refused_pods(owner, &child));
                let mut state = JobState { missing_images, report, ..seen.job(problems, last_failure) };
                // the Job's own status follows
                if state.outcome == JobOutcome::Running && pods().any(|pod| pod.succeeded) {
                    state.outcome = JobOutcome::Succeeded;
                }
                (child.name.to_string(), state)
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
            recorded: self.recorded_set_up(owner, name),
            relay_runs: self.runs_relay(owner),
            secrets: SecretsObserved { replaced: replaced.unwrap_or_default(), ..SecretsObserved::default() },
            ..DatabaseObserved::default()
        }
    }

    /// The last set-up that succeeded, as recorded.
    pub fn recorded_set_up(&self, owner: &Key, name: &str) -> Option<SetUp> {
        serde_json::from_str(&self.set_up_annotation(owner, name, SET_UP_ANNOTATION)?).ok()
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

    /// Of its pods, and of those of the Microservices whose databases are in its own: their set-ups mount its superuser's Secret.
    fn missing_secrets(&self, owner: &Key) -> impl Iterator<Item = &Problem> + use<'_> {
        let guests: Vec<_> = self.references.to(&Named::Database(owner.id.clone())).collect();
        let own = self.pods.get_key_value(owner).into_iter();
        let owners = own.chain(guests.into_iter().filter_map(|guest| self.pods.get_key_value(guest)));
        let pods = owners.flat_map(|(owner, pods)| pods.iter().map(move |(name, pod)| (owner, name, pod)));
        let problems = pods.flat_map(|(owner, name, pod)| self.problems_of(owner, name, pod));
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
            // a ConfigMap of a Microservice records its set-up
            ObjectKind::Microservice if matches!(kind, ChildKind::Deployment | ChildKind::ConfigMap) => {
                let relays = self.owner_and_relays(owner);
                [relays, self.guests(owner, kind)].into_iter().collect()
            }
            ObjectKind::Microservice if kind == ChildKind::StatefulSet => {
                [Requeue::now([owner.clone()]), self.guests(owner, kind)].into_iter().collect()
            }
            ObjectKind::Orchestrator => self.affected_by(owner),
            ObjectKind::Microservice | ObjectKind::OutboxRelay | ObjectKind::Saga => Requeue::now([owner.clone()]),
        }
    }

    /// The Microservices whose databases are in that of `owner`: they depend on its server and its set-up.
    fn guests(&self, owner: &Key, kind: ChildKind) -> Requeue {
        if kind == ChildKind::Deployment {
            return Requeue::default();
        }
        Requeue::now(self.references.to(&Named::Database(owner.id.clone())).cloned())
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
            let requeue = store.set_pod(&owner, "orders-db-setup-1-a", pod);
            assert_eq!(requeue.now.is_empty(), !succeeded, "it is reconciled once that is so");
            assert_eq!(store.jobs(&owner)[job.name.as_str()].outcome, expected);
        }
    }
}
