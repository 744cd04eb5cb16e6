//! Whose children are made: a Microservice, an OutboxRelay, or the Sagas that share an orchestrator.

use std::collections::BTreeMap;

use k8s_openapi::{
    NamespaceResourceScope,
    apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference},
};
use kube::{Resource, ResourceExt};

use crate::controllers::resources::labels::{self, Component};

/// The owner of children: it gives them their names, their labels and their owner references.
#[derive(Clone, Debug)]
pub struct Owner {
    /// Value of `weft.dev/owner-kind`.
    pub kind: &'static str,
    /// Children are named after it, and labelled with it.
    pub name: String,
    pub namespace: String,
    references: Vec<OwnerReference>,
}

impl Owner {
    /// One object that owns its children alone.
    pub fn of<K>(object: &K, kind: &'static str) -> Self
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        let reference = OwnerReference { controller: Some(true), ..reference(object) };
        Self {
            kind,
            name: object.name_any(),
            namespace: object.namespace().unwrap_or_default(),
            references: vec![reference],
        }
    }

    /// Several objects that own the children together: the children go when the last of them goes.
    pub fn shared(kind: &'static str, name: String, namespace: String, mut references: Vec<OwnerReference>) -> Self {
        references.sort_by(|a, b| (&a.name, &a.uid).cmp(&(&b.name, &b.uid)));
        Self { kind, name, namespace, references }
    }

    /// The same with others that need the children too, and are no controllers of theirs: as long as one of them is there,
    /// Kubernetes leaves the children where they are.
    #[must_use]
    pub fn and(&self, others: impl Iterator<Item = OwnerReference>) -> Self {
        let references = self.references.iter().cloned().chain(others).collect();
        Self { references, ..self.clone() }
    }

    /// The uid of an owner that is alone.
    pub fn uid(&self) -> Option<String> {
        self.references.first().map(|reference| reference.uid.clone())
    }

    /// Metadata of a child that goes when its owner goes, though another of its kind and name may be there to stay.
    pub fn ending_metadata(&self, name: String, component: Component) -> ObjectMeta {
        ObjectMeta { owner_references: Some(self.references.clone()), ..self.lasting_metadata(name, component) }
    }

    /// Metadata of a child that goes when its owner goes.
    pub fn metadata(&self, name: String, component: Component) -> ObjectMeta {
        ObjectMeta {
            owner_references: Some(self.references.clone()),
            labels: Some(self.labels(component)),
            ..self.lasting_metadata(name, component)
        }
    }

    /// Metadata of a child that outlives its owner, and is adopted by the next owner of the name.
    pub fn lasting_metadata(&self, name: String, component: Component) -> ObjectMeta {
        ObjectMeta {
            name: Some(name),
            namespace: Some(self.namespace.clone()),
            labels: Some(self.lasting_labels(component)),
            ..ObjectMeta::default()
        }
    }

    /// Labels of what outlives its owner.
    pub fn lasting_labels(&self, component: Component) -> BTreeMap<String, String> {
        labels::lasting(self.kind, &self.name, component)
    }

    /// All labels of a child that goes with its owner.
    pub fn labels(&self, component: Component) -> BTreeMap<String, String> {
        labels::labels(self.kind, &self.name, component)
    }

    /// The labels by which its pods of one component are found.
    pub fn selector(&self, component: Component) -> BTreeMap<String, String> {
        labels::selector(self.kind, &self.name, component)
    }

    /// The same in the form of workloads, NetworkPolicies and disruption budgets.
    pub fn pods(&self, component: Component) -> LabelSelector {
        LabelSelector { match_labels: Some(self.selector(component)), ..LabelSelector::default() }
    }
}

/// A reference that is not a controller's.
///
/// `blockOwnerDeletion` stays away: it would need the right to change finalizers, and nothing here needs the order.
pub fn reference<K>(object: &K) -> OwnerReference
where
    K: Resource<DynamicType = ()>,
{
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: object.name_any(),
        uid: object.uid().unwrap_or_default(),
        ..OwnerReference::default()
    }
}
