//! What the operator sees of its children: small, pruned states, not the objects.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::core::v1::PodTemplateSpec;
use serde::{Deserialize, Serialize};

use super::reason::Reason;
use crate::{
    api::v1alpha1::{Microservice, SetUp},
    contract::database_setup::Outcome,
};

/// Something that keeps a child from being as wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub reason: Reason,
    /// One sentence.
    pub message: String,
}

impl Problem {
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

/// A Deployment or StatefulSet that exists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    pub uid: String,
    /// Its annotations under `weft.dev/`, as the last plan wrote them: the plan remembers there which defaults it used
    /// ([`DEFAULTS_ANNOTATION`](super::labels::DEFAULTS_ANNOTATION)) and for which pod template.
    pub annotations: BTreeMap<String, String>,
    pub generation: i64,
    /// The controller-manager has seen this generation; the counts are about it.
    pub observed_generation: i64,
    /// `spec.replicas`.
    pub wanted: i32,
    /// `spec.replicas` is somebody else's, such as an autoscaler's, and not Weft's.
    pub scaled_by_others: bool,
    /// Pods that exist, old ones included.
    pub replicas: i32,
    /// Pods of the newest template.
    pub updated: i32,
    pub ready: i32,
    pub available: i32,
    /// The problems of its pods, worst first.
    pub problems: Vec<Problem>,
    /// Images of its pods that cannot be pulled.
    pub missing_images: Vec<String>,
}

impl Workload {
    /// Every wanted pod is of the newest template and ready, and no older one is left.
    pub fn is_rolled_out(&self) -> bool {
        self.observed_generation >= self.generation
            && self.updated >= self.wanted
            && self.ready >= self.wanted
            && self.replicas <= self.wanted
    }
}

/// Other requests and limits might end one of these problems.
pub fn is_about_resources(problems: &[Problem]) -> bool {
    use Reason::{OutOfMemory, PodsRefused, QuotaExceeded, Unschedulable};
    problems.iter().any(|problem| matches!(problem.reason, OutOfMemory | PodsRefused | QuotaExceeded | Unschedulable))
}

/// A Job that exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobState {
    /// Its annotations under `weft.dev/`.
    pub annotations: BTreeMap<String, String>,
    pub outcome: JobOutcome,
    /// The problems of its pods; the last attempt's own message among them (`SetupFailed`).
    pub problems: Vec<Problem>,
    /// Images of its pods that cannot be pulled.
    pub missing_images: Vec<String>,
    /// What the set-up's own container reported when it succeeded. It counts also while another container, which somebody
    /// injected, keeps the pod from ending.
    pub report: Option<Outcome>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobOutcome {
    Running,
    Succeeded,
    /// Trying again cannot help; `message` is the last attempt's termination message, or else the Job's own message.
    Failed {
        message: String,
    },
}

/// A pod template that was released: the set-up that it needs was done. With the annotations that the plan wrote on the
/// Deployment for it, which say what it was made from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Released {
    pub annotations: BTreeMap<String, String>,
    pub template: PodTemplateSpec,
}

/// A database, whoever owns it: a Microservice or an orchestrator.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DatabaseObserved {
    /// The StatefulSet `NAME-db`; the host's, for a database that is in another's.
    pub server: Option<Workload>,
    /// The Microservice in whose database this one is, and the last set-up of that which succeeded.
    pub host: Host,
    pub host_set_up: Option<SetUp>,
    /// Set-up Jobs that exist, by name.
    pub jobs: BTreeMap<String, JobState>,
    /// The ConfigMap of migrations that the object names; `None` when it names none.
    pub migrations: Option<Migrations>,
    pub secrets: SecretsObserved,
    /// The last set-up that succeeded, as recorded.
    pub recorded: Option<SetUp>,
    /// A pod of the owner's runs a relay.
    pub relay_runs: bool,
    /// The pod template that was released last; read only while the present one may have to wait.
    pub released: Option<Box<Released>>,
    /// How long a new pod template still waits for a change of the migrations that may follow its spec.
    pub settles_in: Option<Duration>,
}

/// The Microservice in whose database another's is.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Host {
    /// There is none, or none is named.
    #[default]
    None,
    Unreadable,
    Found(Arc<Microservice>),
}

/// What is known of a database's Secrets, which the operator cannot read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SecretsObserved {
    /// How often each was made again since the database was made; those that never were are left out.
    pub replaced: BTreeMap<String, u32>,
    /// Those that were deleted: the next apply makes them again, with new passwords.
    pub missing: BTreeSet<String>,
}

/// The migrations' ConfigMap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Migrations {
    Missing,
    Found {
        /// [`migrations_hash`](crate::contract::database_setup::migrations_hash) of its keys and contents, as the set-up reports it.
        hash: String,
        /// The keys that are migrations, sorted.
        files: Vec<String>,
    },
}
