//! Pods of ours: their problems, each in a sentence, and where their `/status` is.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{api::ApiResource, core::Object};
use serde::Deserialize;
use smol_str::SmolStr;

use super::live::{LastFailure, null_is_default, version};
use crate::{
    contract::{ADMIN_PORT, database_setup::Outcome},
    controllers::{
        database,
        resources::{
            labels::{COMPONENT_LABEL, Component},
            observed::Problem,
            reason::Reason,
        },
    },
};

/// A pod, parsed no further than needed.
pub type LivePod = Object<PodSpec, PodStatus>;

/// Group, version and plural of [`LivePod`].
pub fn resource() -> ApiResource {
    ApiResource::erase::<Pod>(&())
}

const JOB_LABEL: &str = "batch.kubernetes.io/job-name";
/// Restarts from which a container that is not ready counts as crash-looping, also between two crashes.
const MANY_RESTARTS: i32 = 2;
const MAX_MESSAGE: usize = 512;
/// The message of `ENOSPC`: a volume is full.
const FULL: &str = "No space left on device";

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    #[serde(deserialize_with = "null_is_default")]
    containers: Vec<Container>,
    #[serde(deserialize_with = "null_is_default")]
    init_containers: Vec<Container>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Container {
    #[serde(deserialize_with = "null_is_default")]
    ports: Vec<Port>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Port {
    container_port: u16,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    #[serde(deserialize_with = "null_is_default")]
    phase: String,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(deserialize_with = "null_is_default")]
    conditions: Vec<PodCondition>,
    #[serde(deserialize_with = "null_is_default")]
    init_container_statuses: Vec<ContainerStatus>,
    #[serde(deserialize_with = "null_is_default")]
    container_statuses: Vec<ContainerStatus>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct PodCondition {
    #[serde(rename = "type")]
    type_: String,
    status: String,
    #[serde(deserialize_with = "null_is_default")]
    reason: String,
    #[serde(deserialize_with = "null_is_default")]
    message: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ContainerStatus {
    name: String,
    image: String,
    ready: bool,
    restart_count: i32,
    state: ContainerState,
    last_state: ContainerState,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct ContainerState {
    waiting: Option<Waiting>,
    terminated: Option<Terminated>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Waiting {
    #[serde(deserialize_with = "null_is_default")]
    reason: String,
    #[serde(deserialize_with = "null_is_default")]
    message: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Terminated {
    #[serde(deserialize_with = "null_is_default")]
    reason: String,
    exit_code: i32,
    #[serde(deserialize_with = "null_is_default")]
    message: String,
    #[serde(deserialize_with = "null_is_default")]
    finished_at: String,
}

/// How a container ended that the runtime could not start: a memory limit below what its first process needs, an unknown program.
const NEVER_RAN: [&str; 2] = ["StartError", "ContainerCannotRun"];

/// Why a container waits whose image cannot be had.
const NO_IMAGE: [&str; 5] =
    ["ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"];

/// What the store keeps of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSeen {
    pub version: u64,
    pub component: SmolStr,
    /// The Job that it is an attempt of.
    pub job: Option<SmolStr>,
    pub deleting: bool,
    /// Its uid, while it is not ready and its status does not say why: its volumes, an image or a probe may be the cause.
    pub waiting: Option<String>,
    /// The claim of a database's pod, while no node is found for it: that may be the cause.
    pub claim: Option<String>,
    /// Where its `/status` is, while it runs.
    pub admin_address: Option<SmolStr>,
    pub problems: Vec<Problem>,
    /// Images that cannot be pulled.
    pub missing_images: Vec<String>,
    pub last_failure: Option<Box<LastFailure>>,
    /// Of a set-up's pod: what its own container reported at its success, whatever other containers do.
    pub report: Option<Box<Outcome>>,
    /// It succeeded, with all its containers.
    pub succeeded: bool,
}

impl From<LivePod> for PodSeen {
    fn from(pod: LivePod) -> Self {
        let LivePod { metadata, spec, status, .. } = pod;
        let status = status.unwrap_or_default();
        let labels = metadata.labels.as_ref();
        let deleting = metadata.deletion_timestamp.is_some();
        let lives = !deleting && status.is_going();
        let job = label(labels, JOB_LABEL);
        let admin = spec.init_containers.iter().chain(&spec.containers).flat_map(|container| &container.ports);
        let has_admin = admin.into_iter().any(|port| port.container_port == ADMIN_PORT);
        let component = label(labels, COMPONENT_LABEL).unwrap_or_default();
        let is_database = component == Component::Database.as_str();
        let problems = if lives { status.problems(&metadata, job.is_some()) } else { Vec::new() };
        let last_failure = status.last_failure(job.is_some());
        let says_why = !problems.is_empty() || (job.is_some() && last_failure.is_some());
        // a server that recovers may take long, and its probes fail meanwhile
        let waits = lives && !says_why && (status.is_creating() || (!is_database && status.is_unready()));
        let nowhere = is_database && problems.iter().any(|problem| problem.reason == Reason::Unschedulable);
        Self {
            version: version(&metadata),
            deleting,
            waiting: metadata.uid.clone().filter(|_| waits),
            claim: metadata.name.as_deref().filter(|_| nowhere).map(database::claim),
            admin_address: status.pod_ip.as_deref().filter(|_| has_admin && lives).map(SmolStr::new),
            problems,
            component,
            missing_images: if lives { status.missing_images() } else { Vec::new() },
            last_failure: last_failure.map(Box::new),
            report: job.as_ref().and_then(|_| status.report()),
            succeeded: status.phase == "Succeeded",
            job,
        }
    }
}

fn label(labels: Option<&BTreeMap<String, String>>, name: &str) -> Option<SmolStr> {
    labels?.get(name).map(SmolStr::new)
}

impl PodStatus {
    /// It has not ended: with a sidecar that runs, a pod may still be `Pending`.
    fn is_going(&self) -> bool {
        self.phase == "Running" || self.phase == "Pending"
    }

    fn is_creating(&self) -> bool {
        let waits = |container: &ContainerStatus| {
            let waiting = container.state.waiting.as_ref().map(|waiting| waiting.reason.as_str());
            matches!(waiting, Some("ContainerCreating" | "PodInitializing"))
        };
        self.phase == "Pending" && self.statuses().next().is_some() && self.statuses().all(waits)
    }

    /// Its containers run, or wait for each other, and are not ready.
    fn is_unready(&self) -> bool {
        let ready = self.conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True");
        self.statuses().next().is_some() && !ready
    }

    fn statuses(&self) -> impl Iterator<Item = &ContainerStatus> {
        self.init_container_statuses.iter().chain(&self.container_statuses)
    }

    fn problems(&self, metadata: &ObjectMeta, of_setup: bool) -> Vec<Problem> {
        let pod = metadata.name.as_deref().unwrap_or_default();
        let namespace = metadata.namespace.as_deref().unwrap_or_default();
        let unschedulable = self
            .conditions
            .iter()
            .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False")
            .filter(|condition| condition.reason == "Unschedulable")
            .map(|condition| Problem {
                reason: Reason::Unschedulable,
                message: format!("pod {pod} finds no node: {}", condition.message),
            });
        unschedulable
            .into_iter()
            .chain(self.statuses().filter_map(|container| container.problem(namespace, pod, of_setup)))
            .collect()
    }

    fn missing_images(&self) -> Vec<String> {
        let missing = self.statuses().filter(|container| {
            let waiting = container.state.waiting.as_ref();
            waiting.is_some_and(|waiting| NO_IMAGE.contains(&waiting.reason.as_str()))
        });
        missing.map(|container| container.image.clone()).collect()
    }

    /// Of a set-up's pod, only its own container's counts.
    fn last_failure(&self, of_setup: bool) -> Option<LastFailure> {
        self.statuses()
            .filter(|container| !of_setup || container.name == database::SETUP_CONTAINER)
            .filter_map(|container| container.state.terminated.as_ref().or(container.last_state.terminated.as_ref()))
            .filter(|terminated| terminated.exit_code != 0 && !terminated.message.trim().is_empty())
            .map(|terminated| LastFailure {
                finished_at: terminated.finished_at.clone(),
                exit_code: terminated.exit_code,
                message: tail(&terminated.message),
            })
            .max()
    }

    fn report(&self) -> Option<Box<Outcome>> {
        let setup = self.container_statuses.iter().find(|container| container.name == database::SETUP_CONTAINER)?;
        let ended = setup.state.terminated.as_ref().filter(|ended| ended.exit_code == 0)?;
        Outcome::from_message(&ended.message).map(Box::new)
    }
}

impl ContainerStatus {
    fn problem(&self, namespace: &str, pod: &str, of_setup: bool) -> Option<Problem> {
        self.cannot_start(pod).or_else(|| self.keeps_ending(namespace, pod, of_setup))
    }

    fn cannot_start(&self, pod: &str) -> Option<Problem> {
        let (container, waiting) = (&self.name, self.state.waiting.as_ref()?);
        let message = &waiting.message;
        match waiting.reason.as_str() {
            reason if NO_IMAGE.contains(&reason) => problem(
                Reason::ImagePullFailed,
                format!("the image of container {container} cannot be pulled: {}", image_message(message)),
            ),
            "CreateContainerConfigError" if message.starts_with("secret ") => {
                problem(Reason::SecretMissing, format!("container {container} of pod {pod} waits: {message}"))
            }
            "CreateContainerConfigError" if message.starts_with("configmap ") => {
                problem(Reason::ConfigMapMissing, format!("container {container} of pod {pod} waits: {message}"))
            }
            "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
                problem(Reason::ContainerRefused, format!("container {container} of pod {pod} cannot start: {message}"))
            }
            _ => None,
        }
    }

    fn keeps_ending(&self, namespace: &str, pod: &str, of_setup: bool) -> Option<Problem> {
        let container = &self.name;
        let last = self.state.terminated.as_ref().or(self.last_state.terminated.as_ref())?;
        if self.ready || self.restart_count == 0 || last.exit_code == 0 {
            return None;
        }
        // one crash is proof; and PostgreSQL's message may be passed on, unlike that of a service
        if container == database::CONTAINER
            && let Some(line) = last.message.lines().find(|line| line.contains(FULL))
        {
            return problem(
                Reason::VolumeFull,
                format!(
                    "pod {pod} has no room left on its volume: make room on it, or enlarge its claim if the StorageClass can (the server said: {})",
                    tail(line)
                ),
            );
        }
        // it never ran: the runtime's own words are the cause, and there is no log
        if NEVER_RAN.contains(&last.reason.as_str()) {
            let why = tail(&last.message);
            return problem(
                Reason::ContainerRefused,
                format!("container {container} of pod {pod} cannot start: {why}"),
            );
        }
        if self.restart_count < MANY_RESTARTS {
            return None;
        }
        if last.reason == "OOMKilled" {
            return problem(
                Reason::OutOfMemory,
                format!(
                    "container {container} of pod {pod} needs more memory than its limit allows and is killed again and again"
                ),
            );
        }
        // its message is the cause, and is passed on
        if of_setup && container == database::SETUP_CONTAINER && !last.message.trim().is_empty() {
            return None;
        }
        problem(
            Reason::CrashLooping,
            format!(
                "container {container} of pod {pod} ends again and again with exit code {}: see `kubectl logs -n {namespace} {pod} -c {container} --previous`",
                last.exit_code
            ),
        )
    }
}

#[expect(clippy::unnecessary_wraps, reason = "its callers give one problem or none")]
fn problem(reason: Reason, message: String) -> Option<Problem> {
    Some(Problem { reason, message })
}

/// `Back-off pulling image "x"` and `failed to pull image "x": …` alternate while the kubelet tries: only what both have is passed on.
fn image_message(message: &str) -> String {
    let image = message.split('"').nth(1).filter(|image| !image.is_empty());
    image.map_or_else(|| tail(message), |image| format!("\"{image}\" does not exist, or the node may not pull it"))
}

pub fn tail(text: &str) -> String {
    let text = text.trim();
    let skip = text.chars().count().saturating_sub(MAX_MESSAGE);
    text.chars().skip(skip).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(status: Value) -> PodSeen {
        serde_json::from_value::<LivePod>(json!({
            "metadata": {"name": "orders-1", "namespace": "shop", "resourceVersion": "5",
                "labels": {"app.kubernetes.io/component": "service"}},
            "spec": {"containers": [{"name": "service"}],
                "initContainers": [{"name": "relay", "ports": [{"containerPort": 9464}]}]},
            "status": status,
        }))
        .unwrap()
        .into()
    }

    fn reasons(pod: &PodSeen) -> Vec<Reason> {
        pod.problems.iter().map(|problem| problem.reason).collect()
    }

    #[test]
    fn a_missing_secret_is_named() {
        let pod = pod(json!({"phase": "Pending", "containerStatuses": [{"name": "service", "state": {"waiting":
            {"reason": "CreateContainerConfigError", "message": "secret \"stripe\" not found"}}}]}));
        assert_eq!(reasons(&pod), [Reason::SecretMissing]);
        assert!(pod.problems[0].message.contains("\"stripe\""));
    }

    #[test]
    fn a_full_volume_is_called_so() {
        let crashed = |message: &str| {
            json!({"phase": "Running", "containerStatuses": [{"name": "postgres", "restartCount": 1,
                "state": {"terminated": {"exitCode": 1, "message": message}}}]})
        };
        let panic = "PANIC:  could not write to file \"pg_wal/xlogtemp.7\": No space left on device";
        let full = pod(crashed(&format!("LOG:  redo done\n{panic}\nLOG:  database system is shut down\n")));
        assert_eq!(reasons(&full), [Reason::VolumeFull]);
        assert!(full.problems[0].message.contains(panic), "{}", full.problems[0].message);
        assert!(pod(crashed("FATAL:  could not open a file")).problems.is_empty());
    }

    #[test]
    fn a_pod_waits_while_it_is_not_ready_and_does_not_say_why() {
        let waiting = |reason: &str| json!({"name": "service", "state": {"waiting": {"reason": reason}}});
        let of = |component: &str, status: Value| {
            let labels = json!({"app.kubernetes.io/component": component});
            let object = json!({"metadata": {"name": "a", "uid": "u", "labels": labels}, "spec": {}, "status": status});
            PodSeen::from(serde_json::from_value::<LivePod>(object).unwrap()).waiting
        };
        let created = json!({"phase": "Pending", "containerStatuses": [waiting("ContainerCreating")]});
        assert_eq!(of("service", created.clone()).as_deref(), Some("u"));
        assert_eq!(of("database", created).as_deref(), Some("u"));
        let refused = json!({"phase": "Pending", "containerStatuses": [waiting("ErrImagePull")]});
        assert_eq!(of("service", refused), None, "its status says why");
        let runs = |ready: &str| {
            json!({"phase": "Running", "conditions": [{"type": "Ready", "status": ready}],
                "containerStatuses": [{"name": "service", "state": {"running": {}}}]})
        };
        assert_eq!(of("service", runs("False")).as_deref(), Some("u"), "a probe fails");
        assert_eq!(of("service", runs("True")), None);
        assert_eq!(of("database", runs("False")), None, "it may recover for hours");
    }

    #[test]
    fn a_container_that_never_ran_has_the_runtimes_words() {
        let failed = json!({"exitCode": 128, "reason": "StartError",
            "message": "failed to create containerd task: container init was OOM-killed (memory limit too low?)"});
        let pod = pod(json!({"phase": "Running", "containerStatuses": [{"name": "service", "restartCount": 1,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": failed}}]}));
        assert_eq!(reasons(&pod), [Reason::ContainerRefused]);
        assert!(pod.problems[0].message.contains("memory limit too low"), "{}", pod.problems[0].message);
    }

    #[test]
    fn a_databases_pod_without_a_node_names_its_claim() {
        let object = json!({"metadata": {"name": "orders-db-0", "labels": {"app.kubernetes.io/component": "database"}},
            "spec": {}, "status": {"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False",
                "reason": "Unschedulable", "message": "pod has unbound immediate PersistentVolumeClaims"}]}});
        let pod = PodSeen::from(serde_json::from_value::<LivePod>(object).unwrap());
        assert_eq!(pod.claim.as_deref(), Some("data-orders-db-0"));
    }

    #[test]
    fn a_crash_loop_is_one_between_two_crashes_too() {
        let crashed =
            json!({"exitCode": 3, "reason": "Error", "message": "boom\n", "finishedAt": "2026-01-01T00:00:00Z"});
        let waiting = pod(
            json!({"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [{"name": "service", "restartCount": 4,
            "state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": crashed}}]}),
        );
        let running = pod(
            json!({"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [{"name": "service", "restartCount": 4,
            "state": {"running": {}}, "lastState": {"terminated": crashed}}]}),
        );
        assert_eq!(reasons(&waiting), [Reason::CrashLooping]);
        assert_eq!(waiting.problems, running.problems);
        let failure =
            LastFailure { finished_at: "2026-01-01T00:00:00Z".to_owned(), exit_code: 3, message: "boom".to_owned() };
        assert_eq!(waiting.last_failure.as_deref(), Some(&failure));
        assert_eq!(waiting.admin_address.as_deref(), Some("10.0.0.1"));
        let ready =
            pod(json!({"phase": "Running", "containerStatuses": [{"name": "service", "restartCount": 4, "ready": true,
            "lastState": {"terminated": crashed}}]}));
        assert!(ready.problems.is_empty());
    }

    #[test]
    fn a_pod_that_has_ended_has_no_problem_any_more() {
        let crashed = |phase: &str| {
            pod(json!({"phase": phase, "containerStatuses": [{"name": "service", "restartCount": 5,
                "state": {"terminated": {"exitCode": 3, "reason": "Error", "finishedAt": "2026-01-01T00:00:00Z"}}}]}))
        };
        assert_eq!(crashed("Running").problems.len(), 1);
        assert!(crashed("Failed").problems.is_empty(), "evicted, it stays as an object");
    }

    #[test]
    fn a_container_that_was_never_found_again_has_no_times() {
        let pod = pod(
            json!({"phase": "Failed", "containerStatuses": [{"name": "service", "lastState": {}, "state": {"terminated":
            {"exitCode": 137, "startedAt": null, "finishedAt": null, "message": "could not be located"}}}]}),
        );
        let failure = pod.last_failure.unwrap();
        assert_eq!((failure.finished_at.as_str(), failure.message.as_str()), ("", "could not be located"));
    }

    #[test]
    fn of_a_set_ups_pod_its_own_container_counts() {
        let ended = |name: &str, code: i32, message: &str| json!({"name": name, "state": {"terminated": {"exitCode": code, "message": message, "finishedAt": "2026-01-01T00:00:00Z"}}});
        let pod = |statuses: Value| -> PodSeen {
            let labels = json!({"batch.kubernetes.io/job-name": "orders-db-setup-1"});
            let pod = json!({"metadata": {"name": "a", "labels": labels}, "spec": {}, "status": {"phase": "Running", "containerStatuses": statuses}});
            serde_json::from_value::<LivePod>(pod).unwrap().into()
        };
        let report = r#"{"files":1,"applied":1,"last":"001.sql","hash":"abc"}"#;
        let done = pod(json!([ended("mesh", 1, "no"), ended("setup", 0, report)]));
        assert_eq!(done.report.unwrap().last.as_deref(), Some("001.sql"));
        assert_eq!(done.last_failure, None);
        let failed = pod(json!([ended("mesh", 1, "no"), ended("setup", 65, "002.sql failed")]));
        let last = failed.last_failure.unwrap();
        assert_eq!((failed.report, last.exit_code, last.message.as_str()), (None, 65, "002.sql failed"));
    }

    #[test]
    fn a_set_up_that_is_restarted_says_why_in_its_own_words() {
        let restarted = |reason: &str, message: &str| -> PodSeen {
            let last =
                json!({"exitCode": 1, "reason": reason, "message": message, "finishedAt": "2026-01-01T00:00:00Z"});
            let setup = json!({"name": "setup", "restartCount": 4, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": last}});
            let labels = json!({"batch.kubernetes.io/job-name": "orders-db-setup-1"});
            let pod = json!({"metadata": {"name": "a", "uid": "u", "labels": labels}, "spec": {},
                "status": {"phase": "Running", "containerStatuses": [setup]}});
            serde_json::from_value::<LivePod>(pod).unwrap().into()
        };
        let failed = restarted("Error", "002.sql waits for a lock");
        assert_eq!((reasons(&failed), failed.waiting.as_deref()), (vec![], None));
        assert_eq!(failed.last_failure.unwrap().message, "002.sql waits for a lock");
        assert_eq!(reasons(&restarted("OOMKilled", "applying")), [Reason::OutOfMemory]);
        assert_eq!(reasons(&restarted("Error", "")), [Reason::CrashLooping], "there is nothing but its log");
    }

    #[test]
    fn an_image_that_cannot_be_pulled_gives_one_sentence() {
        let message_of = |reason: &str, message: &str| {
            pod(json!({"phase": "Pending", "containerStatuses": [{"name": "service",
                "state": {"waiting": {"reason": reason, "message": message}}}]}))
            .problems
        };
        assert_eq!(
            message_of("ErrImagePull", "failed to pull and unpack image \"shop/orders:9\": not found"),
            message_of("ImagePullBackOff", "Back-off pulling image \"shop/orders:9\""),
        );
    }

    #[test]
    fn a_pod_without_a_node_says_why() {
        let pod = pod(json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False",
            "reason": "Unschedulable", "message": "0/1 nodes are available"}]}));
        assert_eq!(reasons(&pod), [Reason::Unschedulable]);
    }
}
