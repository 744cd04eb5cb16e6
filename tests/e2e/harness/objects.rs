//! Reading and writing objects.

use std::{collections::BTreeMap, fmt::Debug, time::Duration};

use anyhow::{Context, Result, anyhow};
use k8s_openapi::{NamespaceResourceScope, api::core::v1::Pod};
use kube::{
    Api, Resource,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, ValidationDirective,
    },
};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Scenario;

impl Scenario {
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// As `kubectl apply --server-side` does: unknown fields are refused.
    pub async fn apply(&self, object: &Value) -> Result<DynamicObject, kube::Error> {
        self.server_side_apply(object, false).await
    }

    /// What the API server says to it, without doing it.
    pub async fn dry_run(&self, object: &Value) -> Result<DynamicObject, kube::Error> {
        self.server_side_apply(object, true).await
    }

    async fn server_side_apply(&self, object: &Value, dry_run: bool) -> Result<DynamicObject, kube::Error> {
        let text = |path: &str| object.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (group, version) = match text("/apiVersion").split_once('/') {
            Some((group, version)) => (group.to_owned(), version.to_owned()),
            None => (String::new(), text("/apiVersion")),
        };
        let kind = ApiResource::from_gvk(&GroupVersionKind { group, version, kind: text("/kind") });
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &self.namespace, &kind);
        let mut params = PatchParams::apply("e2e").force();
        params.field_validation = Some(ValidationDirective::Strict);
        params.dry_run = dry_run;
        api.patch(&text("/metadata/name"), &params, &Patch::Apply(object)).await
    }

    /// A change as a person would make it by hand.
    pub async fn merge<K>(&self, name: &str, patch: &Value) -> Result<K>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
        K::DynamicType: Default,
    {
        let patched = self.api::<K>().patch(name, &PatchParams::default(), &Patch::Merge(patch)).await;
        patched.with_context(|| format!("changing {name}"))
    }

    pub async fn get<K>(&self, name: &str) -> Result<Option<K>>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
        K::DynamicType: Default,
    {
        Ok(self.api::<K>().get_opt(name).await?)
    }

    /// Deletes it and waits for its end.
    pub async fn delete<K>(&self, name: &str) -> Result<()>
    where
        K: Resource<Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
        K::DynamicType: Default,
    {
        self.api::<K>().delete(name, &DeleteParams::default()).await.with_context(|| format!("deleting {name}"))?;
        self.until(&format!("{name} is deleted"), Duration::from_mins(1), async || {
            Ok(self.get::<K>(name).await?.is_none().then_some(()))
        })
        .await
    }

    /// Pods of `component` (`service`, `database`, `orchestrator`) of `owner`, those that are going left out.
    pub async fn pods(&self, owner: &str, component: &str) -> Result<Vec<Pod>> {
        let labels = format!("app.kubernetes.io/instance={owner},app.kubernetes.io/component={component}");
        let pods = self.api::<Pod>().list(&ListParams::default().labels(&labels)).await?;
        Ok(pods.items.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).collect())
    }

    /// The one pod of `component` of `owner`, once it is ready.
    pub async fn ready_pod(&self, owner: &str, component: &str) -> Result<String> {
        self.until(&format!("the {component} pod of {owner} is ready"), Duration::from_mins(2), async || {
            let pods = self.pods(owner, component).await?;
            Ok(pods.into_iter().find(is_ready).and_then(|pod| pod.metadata.name))
        })
        .await
    }

    /// Every pod of the namespace but the operator's own, with its containers' images and restarts: what must not change
    /// while nothing is asked for.
    pub async fn operands(&self) -> Result<BTreeMap<String, Vec<String>>> {
        let managed = ListParams::default().labels("app.kubernetes.io/managed-by=weft");
        let mut operands = BTreeMap::new();
        for pod in self.api::<Pod>().list(&managed).await? {
            let status = pod.status.ok_or_else(|| anyhow!("a pod without status"))?;
            if status.phase.as_deref() != Some("Running") {
                continue;
            }
            let containers = status.container_statuses.into_iter().chain(status.init_container_statuses).flatten();
            let mut lines: Vec<String> = containers
                .map(|c| format!("{} {} restarts {}", c.name, c.container_id.unwrap_or_default(), c.restart_count))
                .collect();
            lines.push(pod.metadata.uid.unwrap_or_default());
            operands.insert(pod.metadata.name.unwrap_or_default(), lines);
        }
        Ok(operands)
    }
}

pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default();
    conditions.iter().any(|condition| condition.type_ == "Ready" && condition.status == "True")
}
