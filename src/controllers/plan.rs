//! What a controller wants to exist: the pure result of `plan`, the input of `apply`.

use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    batch::v1::Job,
    core::v1::{ConfigMap, Secret, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::ApiResource;

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

impl Rejection {
    /// `field` names a Microservice that does not exist.
    pub fn microservice_not_found(field: &str, name: &str) -> Self {
        Self {
            reason: "MicroserviceNotFound",
            message: format!(
                "{field}: there is no Microservice `{name}` in this namespace yet: apply it, or correct the name"
            ),
        }
    }

    /// It ends by itself, once what the object names is applied too.
    pub fn is_waited_for(&self) -> bool {
        matches!(self.reason, "MicroserviceNotFound" | "OutboxRelayNotFound")
    }
}

impl Child {
    /// Its kind and name.
    pub fn reference(&self) -> ChildRef {
        ChildRef { kind: self.kind().as_str(), name: self.metadata().name.clone().unwrap_or_default() }
    }

    pub fn metadata(&self) -> &ObjectMeta {
        match self {
            Self::ServiceAccount(child) => &child.metadata,
            Self::Secret(child) => &child.metadata,
            Self::ConfigMap(child) => &child.metadata,
            Self::Service(child) => &child.metadata,
            Self::StatefulSet(child) => &child.metadata,
            Self::Job(child) => &child.metadata,
            Self::Deployment(child) => &child.metadata,
            Self::NetworkPolicy(child) => &child.metadata,
            Self::PodDisruptionBudget(child) => &child.metadata,
        }
    }

    pub fn kind(&self) -> ChildKind {
        match self {
            Self::ServiceAccount(_) => ChildKind::ServiceAccount,
            Self::Secret(_) => ChildKind::Secret,
            Self::ConfigMap(_) => ChildKind::ConfigMap,
            Self::Service(_) => ChildKind::Service,
            Self::StatefulSet(_) => ChildKind::StatefulSet,
            Self::Job(_) => ChildKind::Job,
            Self::Deployment(_) => ChildKind::Deployment,
            Self::NetworkPolicy(_) => ChildKind::NetworkPolicy,
            Self::PodDisruptionBudget(_) => ChildKind::PodDisruptionBudget,
        }
    }

    /// The object as JSON, with `apiVersion` and `kind`.
    pub fn to_json(&self) -> serde_json::Result<serde_json::Value> {
        match self {
            Self::ServiceAccount(child) => serde_json::to_value(child),
            Self::Secret(child) => serde_json::to_value(child),
            Self::ConfigMap(child) => serde_json::to_value(child),
            Self::Service(child) => serde_json::to_value(child),
            Self::StatefulSet(child) => serde_json::to_value(child),
            Self::Job(child) => serde_json::to_value(child),
            Self::Deployment(child) => serde_json::to_value(child),
            Self::NetworkPolicy(child) => serde_json::to_value(child),
            Self::PodDisruptionBudget(child) => serde_json::to_value(child),
        }
    }
}

/// The kinds of [`Child`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ChildKind {
    ServiceAccount,
    Secret,
    ConfigMap,
    Service,
    StatefulSet,
    Job,
    Deployment,
    NetworkPolicy,
    PodDisruptionBudget,
}

impl ChildKind {
    pub const ALL: [Self; 9] = [
        Self::ServiceAccount,
        Self::Secret,
        Self::ConfigMap,
        Self::Service,
        Self::StatefulSet,
        Self::Job,
        Self::Deployment,
        Self::NetworkPolicy,
        Self::PodDisruptionBudget,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::ServiceAccount => "ServiceAccount",
            Self::Secret => "Secret",
            Self::ConfigMap => "ConfigMap",
            Self::Service => "Service",
            Self::StatefulSet => "StatefulSet",
            Self::Job => "Job",
            Self::Deployment => "Deployment",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::PodDisruptionBudget => "PodDisruptionBudget",
        }
    }

    pub fn parse(kind: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|known| known.as_str() == kind)
    }

    /// Group, version and plural, for requests.
    pub fn resource(self) -> ApiResource {
        match self {
            Self::ServiceAccount => ApiResource::erase::<ServiceAccount>(&()),
            Self::Secret => ApiResource::erase::<Secret>(&()),
            Self::ConfigMap => ApiResource::erase::<ConfigMap>(&()),
            Self::Service => ApiResource::erase::<Service>(&()),
            Self::StatefulSet => ApiResource::erase::<StatefulSet>(&()),
            Self::Job => ApiResource::erase::<Job>(&()),
            Self::Deployment => ApiResource::erase::<Deployment>(&()),
            Self::NetworkPolicy => ApiResource::erase::<NetworkPolicy>(&()),
            Self::PodDisruptionBudget => ApiResource::erase::<PodDisruptionBudget>(&()),
        }
    }
}
