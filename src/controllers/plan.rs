//! What a controller wants to exist: the pure result of `plan`, the input of `apply`.

use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    batch::v1::Job,
    core::v1::{ConfigMap, Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};

/// One object that Weft makes. A closed list: a new kind of child must be handled wherever children are.
#[derive(Clone, Debug, PartialEq)]
pub enum Child {
    ServiceAccount(ServiceAccount),
    /// Created when missing, never read, never changed: the operator has no right to. Its name is its identity.
    Secret(Secret),
    ConfigMap(ConfigMap),
    Service(Service),
    StatefulSet(StatefulSet),
    /// Created when missing, never changed (a Job's template is immutable): whatever matters is in the hash in its name.
    Job(Job),
    Deployment(Deployment),
    NetworkPolicy(NetworkPolicy),
    PodDisruptionBudget(PodDisruptionBudget),
}

/// Everything that should exist because of one object, in the order in which it is applied.
///
/// A child of the object that exists, is not in `children` and not in `retained`, is pruned.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    pub children: Vec<Child>,
    /// Children that are not to be written now and not to be pruned either: the old Deployment while a migration fails.
    pub retained: Vec<ChildRef>,
}

/// Names a child within its namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChildRef {
    /// Kubernetes kind, such as `Deployment`.
    pub kind: &'static str,
    pub name: String,
}

/// Why an object cannot be planned: `Accepted=False`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    /// PascalCase, shared by condition, event, metric and log.
    pub reason: &'static str,
    /// One sentence that names the field, its value, and the remedy.
    pub message: String,
}
