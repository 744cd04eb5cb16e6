//! What the operator sees of its children: small, pruned states, not the objects.

use std::collections::{BTreeMap, BTreeSet};

use crate::contract::status::Problem;

/// A Deployment or StatefulSet that exists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Workload {
    /// Its annotations under `weft.dev/`, as the last plan wrote them: the plan remembers there which data-plane image it
    /// used ([`IMAGE_ANNOTATION`](super::labels::IMAGE_ANNOTATION)) and for which pod template.
    pub annotations: BTreeMap<String, String>,
    pub generation: i64,
    /// The controller-manager has seen this generation; the counts are about it.
    pub observed_generation: i64,
    /// `spec.replicas`.
    pub wanted: i32,
    /// Pods that exist, old ones included.
    pub replicas: i32,
    /// Pods of the newest template.
    pub updated: i32,
    pub ready: i32,
    pub available: i32,
    /// The problems of its pods, worst first: `ImagePullFailed`, `CrashLooping`, `SecretMissing`,
    /// `Unschedulable`, `OutOfMemory`, `QuotaExceeded`, …
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
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum JobOutcome {
    Running,
    Succeeded,
    /// The Job has given up; `message` is the last pod's termination message, or else the Job's own message.
    Failed {
        message: String,
    },
}

/// A database, whoever owns it: a Microservice or an orchestrator.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DatabaseObserved {
    /// The StatefulSet `NAME-db`.
    pub server: Option<Workload>,
    /// Set-up Jobs that exist, by name.
    pub jobs: BTreeMap<String, JobState>,
    /// The ConfigMap of migrations that the object names; `None` when it names none.
    pub migrations: Option<Migrations>,
    pub secrets: SecretsObserved,
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
        /// SHA-256 in hex of its keys and contents, in the order of the keys.
        hash: String,
        /// Its keys, sorted. Those that end in `.sql` are migrations.
        keys: Vec<String>,
    },
}
