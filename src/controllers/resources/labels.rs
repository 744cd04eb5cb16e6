//! Labels on everything that Weft makes. Fixed: never copies of the custom resource's own.

use std::collections::BTreeMap;

use kube::ResourceExt;

/// `app.kubernetes.io/managed-by` of every child; the operator's watches select on it.
pub const MANAGED_BY: &str = "weft";
pub const MANAGED_BY_LABEL: &str = "app.kubernetes.io/managed-by";
pub const NAME_LABEL: &str = "app.kubernetes.io/name";
pub const INSTANCE_LABEL: &str = "app.kubernetes.io/instance";
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// On pods that may reach the database `NAME-db`: the value is the owner, `NAME`.
pub const DATABASE_CLIENT_LABEL: &str = "weft.dev/database-client";
/// On every child and every pod: the kind (`Microservice`, `OutboxRelay`, `Orchestrator`) and the name of its owner; for an
/// orchestrator the name is `names::orchestrator(NAME)`.
pub const OWNER_KIND_LABEL: &str = "weft.dev/owner-kind";
pub const OWNER_NAME_LABEL: &str = "weft.dev/owner";

/// The same as [`COMPONENT_LABEL`], for selectors.
pub const OWN_COMPONENT_LABEL: &str = "weft.dev/component";

/// Prefix of every label and annotation of Weft's own.
pub const WEFT_PREFIX: &str = "weft.dev/";
/// Field manager of everything that is applied.
pub const FIELD_MANAGER: &str = "weft";
/// Field manager of the custom resources' status.
pub const STATUS_MANAGER: &str = "weft-status";
/// On a Deployment, StatefulSet or Job, written by its plan: the [`Defaults`](super::settings::Defaults) that its pods were made
/// with, as JSON.
pub const DEFAULTS_ANNOTATION: &str = "weft.dev/defaults";
/// On a Deployment or StatefulSet, written by its plan: hash of the pod template with those defaults left out. While it stays the
/// same, the workload keeps those of [`DEFAULTS_ANNOTATION`], so that a new operator restarts nothing.
pub const TEMPLATE_HASH_ANNOTATION: &str = "weft.dev/template-hash";
/// On a database's StatefulSet, written by its plan: `spec.database.postgres.storage` as JSON, since a claim cannot change.
pub const STORAGE_ANNOTATION: &str = "weft.dev/storage";
/// On a database's StatefulSet, written by its plan, under `retention: Delete` alone: the uid of the Microservice with which it
/// goes, and the volume with it.
pub const DELETED_WITH_ANNOTATION: &str = "weft.dev/deleted-with";
/// On a server: the Microservices whose databases are in it, by name, as a JSON list. It counts for those that cannot be read.
pub const GUESTS_ANNOTATION: &str = "weft.dev/guests";
/// On a Microservice's Deployment, written by its plan: the addresses of `spec.dependsOn` as JSON, so that one that is gone
/// for a while keeps its variable and restarts nothing.
pub const DEPENDENCIES_ANNOTATION: &str = "weft.dev/dependencies";
/// On a Microservice's Deployment, written by its plan: the OutboxRelay whose sidecar its pods carry, so that one that cannot be
/// read keeps it.
pub const RELAY_ANNOTATION: &str = "weft.dev/relay";
/// On the same: `Sidecar` where the pods have the relay.
pub const RELAY_PLACEMENT_ANNOTATION: &str = "weft.dev/relay-placement";
/// The Secret that it mounts for its broker.
pub const RELAY_SECRET_ANNOTATION: &str = "weft.dev/relay-secret";
/// On an orchestrator's contract, written by its plan: the Sagas that it defines, as a JSON list, so that one that cannot be read
/// stays defined.
pub const SAGAS_ANNOTATION: &str = "weft.dev/sagas";
/// On the pods of a set-up's Job, written by its plan: the contract, which they read as a file.
pub const CONTRACT_ANNOTATION: &str = "weft.dev/contract";
/// On a set-up's ConfigMap, written by its plan: how often each Secret of the database was made again, as JSON. On a StatefulSet
/// and in a pod template: the same of those Secrets that its pods read, so that they roll when one is made again.
pub const SECRETS_ANNOTATION: &str = "weft.dev/secrets";
/// On a set-up's ConfigMap, written by its plan: the last set-up that succeeded, as JSON.
pub const SET_UP_ANNOTATION: &str = "weft.dev/set-up";
/// On a set-up's ConfigMap, written by its plan: hash of the released pod template that the ConfigMap holds.
pub const RELEASED_ANNOTATION: &str = "weft.dev/released";
/// On a custom resource: `now` asks for the operator's own data-plane image at once.
pub const UPGRADE_ANNOTATION: &str = "weft.dev/upgrade";
/// On a Saga: `true` deletes it although it has instances that have not ended.
pub const FORCE_DELETE_ANNOTATION: &str = "weft.dev/force-delete";
/// Finalizer of a Saga: its instances have not ended.
pub const DRAIN_FINALIZER: &str = "weft.dev/drain";

pub fn has_drain_finalizer(object: &impl ResourceExt) -> bool {
    object.finalizers().iter().any(|finalizer| finalizer == DRAIN_FINALIZER)
}

/// Field manager of the finalizer.
pub const FINALIZER_MANAGER: &str = "weft-finalizer";
/// On a pod of the data plane, written when the contract that it mounts changed: that ConfigMap's `resourceVersion`.
pub const CONTRACT_VERSION_ANNOTATION: &str = "weft.dev/contract-version";
/// On every child but Secrets, written by the runtime: hash of what was applied. Plans do not set it.
pub const APPLIED_HASH_ANNOTATION: &str = "weft.dev/applied-hash";

/// What a child is for; the value of `app.kubernetes.io/component`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    Service,
    Database,
    Setup,
    Relay,
    Inbox,
    Orchestrator,
}

impl Component {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Service => "service",
            Self::Database => "database",
            Self::Setup => "database-setup",
            Self::Relay => "relay",
            Self::Inbox => "inbox",
            Self::Orchestrator => "orchestrator",
        }
    }
}

/// The immutable subset, for selectors. All of them are Weft's own: pods that others label by Kubernetes' recommended labels, as
/// their charts do, are not selected.
pub fn selector(owner_kind: &str, owner: &str, component: Component) -> BTreeMap<String, String> {
    [(OWNER_KIND_LABEL, owner_kind), (OWNER_NAME_LABEL, owner), (OWN_COMPONENT_LABEL, component.as_str())]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into()
}

/// Labels of what outlives its owner, Secrets and claims: none of those by which a GitOps tool tracks, and would prune, what it
/// applied itself.
pub fn lasting(owner_kind: &str, owner: &str, component: Component) -> BTreeMap<String, String> {
    selector(owner_kind, owner, component)
}

/// All labels of a child that goes with its owner.
pub fn labels(owner_kind: &str, owner: &str, component: Component) -> BTreeMap<String, String> {
    let mut labels = lasting(owner_kind, owner, component);
    labels.extend(
        [
            (NAME_LABEL, owner),
            (INSTANCE_LABEL, owner),
            (COMPONENT_LABEL, component.as_str()),
            (MANAGED_BY_LABEL, MANAGED_BY),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned())),
    );
    labels
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Case C07. A StatefulSet puts the labels of its selector on its claims too.
    #[test]
    fn what_outlives_its_owner_has_no_label_that_a_pruner_knows() {
        let lasting = lasting("Microservice", "orders", Component::Database);
        assert!(lasting.keys().all(|label| label.starts_with(WEFT_PREFIX)), "{lasting:?}");
        let selector = selector("Microservice", "orders", Component::Database);
        assert!(selector.iter().all(|(label, value)| lasting.get(label) == Some(value)), "{selector:?}");
    }
}
