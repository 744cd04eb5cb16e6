//! Reading and writing objects.

use std::{collections::BTreeMap, fmt::Debug, time::Duration};

use anyhow::{Context, Result, anyhow};
use axum::http::{Method, Request};
use k8s_openapi::{NamespaceResourceScope, api::core::v1::Pod};
use kube::{
    Api, Resource,
    api::{
        ApiResource, DeleteParams, DynamicObject, GroupVersionKind, ListParams, Patch, PatchParams, ValidationDirective,
    },
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Scenario;

impl Scenario {
    pub fn api<K>(&self) -> Api<K>
    where
        K: Resource<Scope = NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// As `kubectl apply --server-side` does.
    pub async fn apply(&self, object: &Value) -> Result<DynamicObject, kube::Error> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &self.namespace, &resource(object));
        let mut params = PatchParams::apply("e2e").force();
        params.field_validation = Some(ValidationDirective::Strict);
        api.patch(name(object), &params, &Patch::Apply(object)).await
    }

    /// What the API server says to `kubectl create`, without doing it.
    pub async fn create_dry(&self, object: &Value) -> Result<()> {
        self.try_out(Method::POST, object, &format!("{}?", self.collection(object))).await
    }

    /// What the API server says to `kubectl replace`, without doing it.
    pub async fn replace_dry(&self, object: &Value) -> Result<()> {
        let path = format!("{}/{}", self.collection(object), name(object));
        let current: Value = self.client.request(Request::get(&path).body(Vec::new())?).await?;
        let version = json!({"metadata": {"resourceVersion": current["metadata"]["resourceVersion"]}});
        self.try_out(Method::PUT, &merged(object, &version), &format!("{path}?")).await
    }

    async fn try_out(&self, method: Method, object: &Value, path: &str) -> Result<()> {
        let request = Request::builder()
            .method(method)
            .uri(format!("{path}dryRun=All&fieldValidation=Strict"))
            .header("content-type", "application/json");
        self.client.request::<Value>(request.body(serde_json::to_vec(object)?)?).await?;
        Ok(())
    }

    fn collection(&self, object: &Value) -> String {
        let kind = resource(object);
        let root = if kind.group.is_empty() { "api".to_owned() } else { format!("apis/{}", kind.group) };
        format!("/{root}/{}/namespaces/{}/{}", kind.version, self.namespace, kind.plural)
    }

    /// Deletes what was applied and waits for its end.
    pub async fn remove(&self, object: &Value) -> Result<()> {
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), &self.namespace, &resource(object));
        api.delete(name(object), &DeleteParams::default()).await?;
        self.until(&format!("{} is deleted", name(object)), Duration::from_mins(1), async || {
            Ok(api.get_opt(name(object)).await?.is_none().then_some(()))
        })
        .await
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
        let deleted = self.get::<K>(name).await?.and_then(|object| object.meta().uid.clone());
        self.api::<K>().delete(name, &DeleteParams::default()).await.with_context(|| format!("deleting {name}"))?;
        self.until(&format!("{name} is deleted"), Duration::from_mins(1), async || {
            // the operator may have made another one by now
            let present = self.get::<K>(name).await?.and_then(|object| object.meta().uid.clone());
            Ok((present.is_none() || present != deleted).then_some(()))
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

fn resource(object: &Value) -> ApiResource {
    let text = |key: &str| object[key].as_str().unwrap_or_default();
    let (group, version) = text("apiVersion").split_once('/').unwrap_or(("", text("apiVersion")));
    ApiResource::from_gvk(&GroupVersionKind::gvk(group, version, text("kind")))
}

fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// `object` with a merge patch (RFC 7386).
pub fn merged(object: &Value, patch: &Value) -> Value {
    match (object, patch) {
        (Value::Object(object), Value::Object(patch)) => {
            let mut merged = object.clone();
            for (key, change) in patch {
                match change {
                    Value::Null => drop(merged.remove(key)),
                    change => {
                        let before = merged.get(key).cloned().unwrap_or_else(|| json!({}));
                        merged.insert(key.clone(), self::merged(&before, change));
                    }
                }
            }
            Value::Object(merged)
        }
        (_, patch) => patch.clone(),
    }
}
