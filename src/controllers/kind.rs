//! What the runtime asks of each kind, and what it tells the pure parts.

use std::{collections::BTreeMap, fmt};

use jiff::Timestamp;

use super::plan::{ChildRef, Rejection};
use crate::api::v1alpha1::Storage;

/// The pure half of a controller. `observe` and `apply` are the runtime's; nothing here does IO.
pub trait Kind {
    /// The custom resource (or, for an orchestrator, what its sagas amount to).
    type Object;
    /// Everything that the plan and the status depend on besides the object itself.
    type Observed;
    /// What should be: a `Plan` of children, or a saga's definition.
    type Planned;
    type Status;

    /// What should exist, or a sentence why that cannot be said.
    fn plan(object: &Self::Object, observed: &Self::Observed, settings: &Settings) -> Result<Self::Planned, Rejection>;

    /// The whole status. The previous one is in `object`; conditions that did not change keep their transition time.
    fn status(
        object: &Self::Object,
        observed: &Self::Observed,
        planned: &Result<Self::Planned, Rejection>,
        applied: &Applied,
        now: Timestamp,
    ) -> Self::Status;
}

/// The operator's own configuration, as far as plans depend on it.
#[derive(Clone)]
pub struct Settings {
    /// Image of `weft` for the data plane. A workload that runs already may keep another one: see
    /// [`Workload::annotations`](super::observed::Workload::annotations).
    pub image: String,
    /// `imagePullPolicy` of the data plane's and the database's containers; Kubernetes' default when `None`.
    pub image_pull_policy: Option<String>,
    /// Image of PostgreSQL; `{version}` is replaced by the major version.
    pub postgres_image: String,
    /// Volume of the database of an orchestrator that is made from now on.
    pub orchestrator_storage: Storage,
    /// Namespace that the operator runs in.
    pub namespace: String,
    /// Labels of the operator's own pods, for NetworkPolicies that let it read `/status`.
    pub pod_labels: BTreeMap<String, String>,
    /// Makes a password: 32 letters and digits from the OS's randomness (a constant in tests). Called while planning; the
    /// result is used only if the Secret does not exist yet.
    pub password: fn() -> String,
}

impl Settings {
    /// The image of PostgreSQL `version`.
    pub fn postgres_image(&self, version: &str) -> String {
        self.postgres_image.replace("{version}", version)
    }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings").field("image", &self.image).finish_non_exhaustive()
    }
}

/// What applying a plan came to. Empty when every child is as planned, when there was nothing to apply, and when the object
/// is suspended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// Children that could not be written (or pruned), in the order of the plan; the children after a failed one are tried too.
    pub failures: Vec<Failure>,
}

/// A request that the API server refused, or that did not get through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub child: ChildRef,
    pub class: Class,
    /// PascalCase, shared by condition, event, metric and log: `ChildRefused`, `ChildConflict`, `NamespaceTerminating`,
    /// `ApiUnavailable`, `Forbidden`.
    pub reason: &'static str,
    /// One sentence, with what the API server said.
    pub message: String,
}

/// What is to be done about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Class {
    /// Goes away by itself: tried again with growing pauses.
    Retry,
    /// The input must change: tried again only when it does (or, rarely, to see whether the world changed).
    Invalid,
    /// A person must mend the installation (a missing right): tried again with the longest pause.
    Fatal,
}
