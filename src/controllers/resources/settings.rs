//! The operator's own configuration, as far as plans depend on it.

use std::{collections::BTreeMap, fmt};

use k8s_openapi::api::networking::v1::NetworkPolicyPeer;

use crate::{api::v1alpha1::Storage, nats::accounts::Accounts};

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
