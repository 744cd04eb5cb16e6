//! The operator's own configuration, as far as plans depend on it.

use std::{collections::BTreeMap, fmt};

use k8s_openapi::{
    api::{core::v1::ResourceRequirements, networking::v1::NetworkPolicyPeer},
    apimachinery::pkg::api::resource::Quantity,
};
use serde::{Deserialize, Serialize};

use crate::{api::v1alpha1::Storage, nats::accounts::Accounts};

/// The operator's own configuration, as far as plans depend on it.
#[derive(Clone)]
pub struct Settings {
    /// Image of `weft` for the data plane. A workload that runs already may keep another one: see [`Defaults`].
    pub image: String,
    /// `imagePullPolicy` of the data plane's and the database's containers; Kubernetes' default when `None`.
    pub image_pull_policy: Option<String>,
    /// Image of PostgreSQL; `{version}` is replaced by the major version.
    pub postgres_image: String,
    /// CPU and memory of the data plane's and the database's containers.
    pub resources: Resources,
    /// Volume of the database of an orchestrator that is made from now on.
    pub orchestrator_storage: Storage,
    /// Namespace that the operator runs in.
    pub namespace: String,
    /// Labels of the operator's own pods, for NetworkPolicies that let it read `/status`.
    pub pod_labels: BTreeMap<String, String>,
    /// Who else may read the metrics of relays and orchestrators: nobody when empty.
    pub metrics_clients: Vec<NetworkPolicyPeer>,
    /// Secrets, by name, by which the pods that Weft makes pull their images.
    pub image_pull_secrets: Vec<String>,
    /// Pods have the user and group ids of their images; otherwise the cluster gives them, as OpenShift does.
    pub fixed_user_ids: bool,
    /// The broker that is installed with Weft, if one is.
    pub broker: Option<Broker>,
    /// Makes a password: 32 letters and digits from the OS's randomness (a constant in tests). Called while planning; the
    /// result is used only if the Secret does not exist yet.
    pub password: fn() -> String,
}

/// The broker that is installed with Weft.
#[derive(Clone, Debug)]
pub struct Broker {
    /// `nats://HOST:PORT`, inside the cluster.
    pub url: String,
    pub accounts: Accounts,
}

impl Settings {
    /// For a container of `weft`.
    pub fn defaults(&self, resources: &ResourceRequirements) -> Defaults {
        Defaults {
            image: self.image.clone(),
            image_pull_policy: self.image_pull_policy.clone(),
            resources: resources.clone(),
        }
    }

    /// For a server of PostgreSQL `version`.
    pub fn postgres_defaults(&self, version: &str) -> Defaults {
        Defaults { image: self.postgres_image.replace("{version}", version), ..self.defaults(&self.resources.database) }
    }
}

/// What a container gets from the operator's configuration. A workload keeps what it was made with, as its annotation
/// [`DEFAULTS_ANNOTATION`](super::labels::DEFAULTS_ANNOTATION) has it, so that another configuration restarts nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Defaults {
    pub image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<String>,
    pub resources: ResourceRequirements,
}

/// CPU and memory of the containers that Weft makes. The limits leave room for bursts: they are there because a namespace with a
/// quota admits no pod without.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Resources {
    /// Of a PostgreSQL for which its Microservice does not give any.
    pub database: ResourceRequirements,
    pub orchestrator: ResourceRequirements,
    pub relay: ResourceRequirements,
    pub setup: ResourceRequirements,
}

impl Default for Resources {
    fn default() -> Self {
        Self {
            database: resources(("50m", "128Mi"), ("2", "1Gi")),
            orchestrator: resources(("50m", "64Mi"), ("1", "512Mi")),
            relay: resources(("10m", "32Mi"), ("1", "256Mi")),
            setup: resources(("10m", "32Mi"), ("1", "256Mi")),
        }
    }
}

/// CPU and memory that a container gets in any case, and at most.
fn resources(least: (&str, &str), most: (&str, &str)) -> ResourceRequirements {
    let list = |(cpu, memory): (&str, &str)| {
        Some([("cpu", cpu), ("memory", memory)].map(|(key, value)| (key.to_owned(), Quantity(value.to_owned()))).into())
    };
    ResourceRequirements { requests: list(least), limits: list(most), ..ResourceRequirements::default() }
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings").field("image", &self.image).finish_non_exhaustive()
    }
}
