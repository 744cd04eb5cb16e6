//! Children as the API server has them, pruned while they are parsed: what is not in these structs is never kept.

use std::{borrow::Cow, collections::BTreeMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{Resource, api::ApiResource, core::DynamicResourceScope};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::{
    contract::database_setup::EXIT_DEFINITE,
    controllers::resources::{
        fields::{self, FieldPath, ForeignField},
        labels::{APPLIED_HASH_ANNOTATION, FIELD_MANAGER, WEFT_PREFIX},
        observed::{JobOutcome, JobState, Problem, Workload},
        reason::Reason,
    },
    domain::version::hash64,
};

/// Any child: its metadata, and of its spec and status the few numbers that conditions are made of.
#[derive(Clone, Debug, Default, Deserialize)]
pub struct Live {
    #[serde(default)]
    pub metadata: ObjectMeta,
    #[serde(default)]
    pub spec: LiveSpec,
    #[serde(default)]
    pub status: LiveStatus,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LiveSpec {
    replicas: Option<i32>,
    /// Of a NetworkPolicy, and kept only of those that are not ours.
    pub(super) pod_selector: Option<Value>,
    pub(super) policy_types: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LiveStatus {
    observed_generation: i64,
    replicas: i32,
    updated_replicas: i32,
    ready_replicas: i32,
    available_replicas: i32,
    #[serde(deserialize_with = "null_is_default")]
    conditions: Vec<LiveCondition>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct LiveCondition {
    #[serde(rename = "type")]
    type_: String,
    status: String,
    reason: String,
    message: String,
}

impl Resource for Live {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn api_version(resource: &ApiResource) -> Cow<'_, str> {
        resource.api_version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// What the store keeps of a child, packed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ChildSeen {
    pub uid: String,
    /// `metadata.resourceVersion`, which API servers hand out in ascending order (KEP-5504).
    pub version: u64,
    #[serde(skip_serializing_if = "is_default")]
    pub deleting: bool,
    /// Hash of the fields that our field manager owns. Whoever changes or removes a field that we applied takes it from us,
    /// so this moves exactly when the child drifts from what was applied, and never for a status or a stranger's label.
    pub ours: u64,
    /// Fields under `spec` that others own and we do not.
    #[serde(skip_serializing_if = "is_default")]
    pub foreign: Vec<ForeignField>,
    /// Our field manager wrote some of it. What merely carries our labels, as `kubectl expose` copies them, is not ours.
    pub managed: bool,
    /// [`APPLIED_HASH_ANNOTATION`].
    pub applied_hash: Option<String>,
    /// Annotations under `weft.dev/`.
    #[serde(skip_serializing_if = "is_default")]
    pub annotations: BTreeMap<String, String>,
    #[serde(skip_serializing_if = "is_default")]
    pub generation: i64,
    #[serde(skip_serializing_if = "is_default")]
    pub(in crate::controllers) replicas: Option<i32>,
    #[serde(skip_serializing_if = "is_default")]
    pub(in crate::controllers) status: LiveStatus,
}

/// How a container failed last; the newest is the greatest.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct LastFailure {
    /// RFC 3339, so that texts sort like times.
    pub finished_at: String,
    pub exit_code: i32,
    /// Its termination message, which is not empty.
    pub message: String,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl From<Live> for ChildSeen {
    fn from(live: Live) -> Self {
        let Live { mut metadata, spec: LiveSpec { replicas, pod_selector: _, policy_types: _ }, status } = live;
        let mut annotations = metadata.annotations.take().unwrap_or_default();
        annotations.retain(|name, _| name.starts_with(WEFT_PREFIX));
        Self {
            ours: owned_fields(&metadata),
            foreign: fields::foreign(metadata.managed_fields.as_deref().unwrap_or_default()),
            managed: metadata
                .managed_fields
                .iter()
                .flatten()
                .any(|entry| entry.manager.as_deref() == Some(FIELD_MANAGER)),
            version: version(&metadata),
            uid: metadata.uid.unwrap_or_default(),
            deleting: metadata.deletion_timestamp.is_some(),
            applied_hash: annotations.remove(APPLIED_HASH_ANNOTATION),
            annotations,
            generation: metadata.generation.unwrap_or_default(),
            replicas,
            status,
        }
    }
}

impl ChildSeen {
    /// Its controller has observed the present spec.
    pub fn is_observed(&self) -> bool {
        self.status.observed_generation >= self.generation
    }

    /// As a StatefulSet: pods are missing.
    pub fn has_too_few_pods(&self) -> bool {
        self.status.replicas < self.replicas.unwrap_or(1)
    }

    /// As a Job: it succeeded, or gave up.
    pub fn has_ended(&self) -> bool {
        self.condition("Complete").is_some() || self.condition("Failed").is_some()
    }

    /// As a Deployment or StatefulSet.
    pub fn workload(&self, mut problems: Vec<Problem>) -> Workload {
        problems.extend(self.failing_replicas());
        problems.extend(self.stopped_rollout());
        Workload {
            uid: self.uid.clone(),
            annotations: self.annotations.clone(),
            generation: self.generation,
            observed_generation: self.status.observed_generation,
            wanted: self.replicas.unwrap_or(1),
            scaled_by_others: self.foreign.iter().any(|field| field.path == FieldPath::of(&["spec", "replicas"])),
            replicas: self.status.replicas,
            updated: self.status.updated_replicas,
            ready: self.status.ready_replicas,
            available: self.status.available_replicas,
            problems,
            missing_images: Vec::new(),
        }
    }

    /// As a Job; `last` is how the newest of its attempts that failed ended.
    pub fn job(&self, mut problems: Vec<Problem>, last: Option<LastFailure>) -> JobState {
        let is_definite = last.as_ref().is_some_and(|last| last.exit_code == i32::from(EXIT_DEFINITE));
        let message = last.map(|last| last.message);
        let outcome = if self.condition("Complete").is_some() {
            JobOutcome::Succeeded
        } else if let Some(failed) = self.condition("Failed") {
            JobOutcome::Failed { message: message.unwrap_or_else(|| failed.message.clone()) }
        } else if let Some(message) = message.clone().filter(|_| is_definite) {
            // its container is restarted all the same, and repeats the sentence
            JobOutcome::Failed { message }
        } else {
            // what the next attempt will meet again, as far as anyone knows
            let again = |message| Problem { reason: Reason::SetupFailed, message };
            problems.extend(message.map(again));
            JobOutcome::Running
        };
        JobState { annotations: self.annotations.clone(), outcome, problems, missing_images: Vec::new(), report: None }
    }

    /// Pods that cannot even be made: a quota, a policy, an admission webhook.
    fn failing_replicas(&self) -> Option<Problem> {
        self.condition("ReplicaFailure").map(|failure| pods_refused(&failure.message))
    }

    /// Nothing moves any more, and no pod says why.
    fn stopped_rollout(&self) -> Option<Problem> {
        let stopped =
            |condition: &&LiveCondition| condition.status == "False" && condition.reason == "ProgressDeadlineExceeded";
        let condition = self.status.conditions.iter().find(stopped)?;
        let message = format!(
            "the rollout has not moved for as long as it may (progressDeadlineSeconds, 10 minutes unless set): {}",
            condition.message
        );
        Some(Problem { reason: Reason::ProgressDeadlineExceeded, message })
    }

    fn condition(&self, type_: &str) -> Option<&LiveCondition> {
        self.status.conditions.iter().find(|condition| condition.type_ == type_ && condition.status == "True")
    }
}

/// Pods that cannot even be made, in the words of whoever refuses them.
pub fn pods_refused(why: &str) -> Problem {
    let reason = if why.contains("exceeded quota") { Reason::QuotaExceeded } else { Reason::PodsRefused };
    Problem { reason, message: format!("pods cannot be created: {why}") }
}

/// `metadata.resourceVersion` as a number; zero when the server's are not numbers.
pub fn version(metadata: &ObjectMeta) -> u64 {
    metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or_default()
}

/// Go writes an absent list or time as `null`.
pub fn null_is_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(input: D) -> Result<T, D::Error> {
    Option::<T>::deserialize(input).map(Option::unwrap_or_default)
}

/// First 8 bytes of the SHA-256 of the fields that we own, as JSON; zero if there are none. It is recorded, so it is the same
/// in every version of the operator.
fn owned_fields(metadata: &ObjectMeta) -> u64 {
    let by = |operation: &'static str| {
        metadata.managed_fields.iter().flatten().find(move |entry| {
            entry.manager.as_deref() == Some(FIELD_MANAGER)
                && entry.operation.as_deref() == Some(operation)
                && entry.subresource.as_deref().unwrap_or_default().is_empty()
        })
    };
    // what was created and never applied since is owned by that creation
    let ours = by("Apply").or_else(|| by("Update"));
    let fields = ours.and_then(|entry| entry.fields_v1.as_ref()).map(|fields| fields.0.to_string());
    fields.map_or(0, |fields| hash64(fields.as_bytes()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn failure(exit_code: i32, message: &str) -> LastFailure {
        LastFailure { finished_at: "2026-01-01T00:00:00Z".to_owned(), exit_code, message: message.to_owned() }
    }

    fn seen(value: serde_json::Value) -> ChildSeen {
        serde_json::from_value::<Live>(value).unwrap().into()
    }

    fn with_fields(ours: serde_json::Value, label: &str) -> ChildSeen {
        seen(
            json!({"metadata": {"name": "orders", "uid": "1", "resourceVersion": "7", "labels": {"a": label}, "managedFields": [
                {"manager": "kubectl-edit", "operation": "Update", "fieldsV1": {"f:metadata": {}}},
                {"manager": "weft", "operation": "Apply", "fieldsV1": ours},
            ]}}),
        )
    }

    #[test]
    fn drift_is_the_loss_of_a_field_that_we_own() {
        let applied = with_fields(json!({"f:spec": {"f:replicas": {}, "f:image": {}}}), "x");
        let touched = with_fields(json!({"f:spec": {"f:replicas": {}, "f:image": {}}}), "y");
        let drifted = with_fields(json!({"f:spec": {"f:image": {}}}), "x");
        assert_eq!(applied.ours, touched.ours);
        assert_ne!(applied.ours, drifted.ours);
    }

    #[test]
    fn a_failed_job_says_the_last_words_of_its_pod() {
        let job = seen(json!({"metadata": {}, "status": {"conditions": [
            {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "message": "Job has reached the limit"}]}}));
        let failed = |message: &str| JobOutcome::Failed { message: message.to_owned() };
        assert_eq!(job.job(vec![], Some(failure(1, "0002.sql: no"))).outcome, failed("0002.sql: no"));
        assert_eq!(job.job(vec![], None).outcome, failed("Job has reached the limit"));
    }

    #[test]
    fn a_job_that_tries_again_says_why_and_a_definite_error_is_one_at_once() {
        let seen = seen(json!({"metadata": {}, "status": {"failed": 1}}));
        let refused = seen.job(vec![], Some(failure(65, "0002.sql: no")));
        assert_eq!(refused.outcome, JobOutcome::Failed { message: "0002.sql: no".to_owned() });
        assert_eq!(refused.problems, []);
        let job = seen.job(vec![], Some(failure(1, "0002.sql waits")));
        assert_eq!(job.outcome, JobOutcome::Running);
        let problems = job.problems.iter().map(|problem| (problem.reason, problem.message.as_str()));
        assert_eq!(problems.collect::<Vec<_>>(), [(Reason::SetupFailed, "0002.sql waits")]);
    }

    #[test]
    fn a_rollout_that_stopped_is_called_so_after_everything_else() {
        let deployment = seen(json!({"metadata": {}, "spec": {"replicas": 2}, "status": {"conditions": [
            {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "ReplicaSet \"a\" has timed out progressing."}]}}));
        let probe = Problem::new(Reason::ProbeFailing, "404");
        let reasons = |problems| {
            let workload = deployment.workload(problems);
            workload.problems.into_iter().map(|problem| problem.reason).collect::<Vec<_>>()
        };
        assert_eq!(reasons(vec![]), [Reason::ProgressDeadlineExceeded]);
        assert_eq!(reasons(vec![probe]), [Reason::ProbeFailing, Reason::ProgressDeadlineExceeded]);
    }

    #[test]
    fn a_quota_is_said_in_words() {
        let deployment = seen(json!({"metadata": {}, "spec": {"replicas": 2}, "status": {"conditions": [
            {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": "pods \"a\" is forbidden: exceeded quota: small"}]}}));
        let workload = deployment.workload(vec![]);
        assert_eq!((workload.wanted, workload.problems[0].reason), (2, Reason::QuotaExceeded));
    }
}
