//! Whatever is changed or deleted by hand is put right.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{
    apps::v1::{Deployment, StatefulSet},
    core::v1::{ConfigMap, Service, ServiceAccount},
    networking::v1::NetworkPolicy,
    policy::v1::PodDisruptionBudget,
};
use kube::{Resource, ResourceExt, api::ListParams};
use serde_json::json;
use weft::api::v1alpha1::{Microservice, OutboxRelay, Saga};

use crate::harness::{Company, Scenario, same, scenario};

/// The promise: on an idle machine it takes a second.
const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn drift_is_repaired() {
    scenario("drift_is_repaired", Company::Others, async |world| {
        world.install_one_of_each().await?;
        world.merge::<Microservice>("stock", &json!({"spec": {"replicas": 2}})).await?;
        world.ready::<Microservice>("stock").await?;
        let corrected = corrections(world).await?;
        changes_are_undone(world).await?;
        let more = corrections(world).await?;
        ensure!(more >= corrected + 4.0, "the metric of corrections rose from {corrected} to {more} only");
        deletions_are_made_good::<Deployment>(world).await?;
        deletions_are_made_good::<StatefulSet>(world).await?;
        deletions_are_made_good::<Service>(world).await?;
        deletions_are_made_good::<ServiceAccount>(world).await?;
        deletions_are_made_good::<ConfigMap>(world).await?;
        deletions_are_made_good::<NetworkPolicy>(world).await?;
        deletions_are_made_good::<PodDisruptionBudget>(world).await?;
        world.ready::<Microservice>("stock").await?;
        world.ready::<OutboxRelay>("stock").await?;
        world.ready::<Saga>("trip").await
    })
    .await;
}

async fn changes_are_undone(world: &Scenario) -> Result<()> {
    let before = world.get::<Deployment>("stock").await?.context("no Deployment")?;
    world.merge::<Deployment>("stock", &json!({"spec": {"replicas": 3}})).await?;
    let image =
        json!([{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "localhost/else:1"}]);
    let patch = kube::api::Patch::Json::<()>(serde_json::from_value(image)?);
    world.api::<Deployment>().patch("stock", &kube::api::PatchParams::default(), &patch).await?;
    world
        .promptly("the Deployment is as it was", SOON, async || {
            let now = world.get::<Deployment>("stock").await?.context("no Deployment")?;
            let form = |deployment: &Deployment| {
                let spec = deployment.spec.clone().unwrap_or_default();
                (spec.replicas, spec.template.spec.map(|pod| pod.containers))
            };
            same("the Deployment", &form(&before), &form(&now))?;
            Ok(Some(()))
        })
        .await?;

    world.merge::<Service>("stock", &json!({"spec": {"selector": {"weft.dev/owner": "other"}}})).await?;
    world
        .promptly("the Service selects the pods again", SOON, async || {
            let selector = world.get::<Service>("stock").await?.and_then(|service| service.spec?.selector);
            let instance = selector.unwrap_or_default().remove("weft.dev/owner");
            Ok((instance.as_deref() == Some("stock")).then_some(()))
        })
        .await?;

    let opened = json!({"spec": {"ingress": [{}]}});
    world.merge::<NetworkPolicy>("stock-db", &opened).await?;
    world
        .promptly("the database is closed to others again", SOON, async || {
            let policy = world.get::<NetworkPolicy>("stock-db").await?.and_then(|policy| policy.spec?.ingress);
            Ok(policy.unwrap_or_default().iter().all(|rule| rule.from.is_some()).then_some(()))
        })
        .await?;

    // without the label the operator's watches do not see it
    let label = json!({"metadata": {"labels": {"app.kubernetes.io/managed-by": null}}});
    world.merge::<Service>("stock-db", &label).await?;
    world.merge::<Deployment>("stock", &label).await?;
    world
        .promptly("the labels are back", SOON, async || {
            let service = world.get::<Service>("stock-db").await?.context("no Service")?;
            let deployment = world.get::<Deployment>("stock").await?.context("no Deployment")?;
            let labels = [service.labels(), deployment.labels()];
            Ok(labels.iter().all(|labels| labels.contains_key("app.kubernetes.io/managed-by")).then_some(()))
        })
        .await?;
    world.ready::<Microservice>("stock").await
}

/// Of every object of the kind that the operator made.
async fn deletions_are_made_good<K>(world: &Scenario) -> Result<()>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + serde::de::DeserializeOwned
        + std::fmt::Debug,
{
    let own = ListParams::default().labels("app.kubernetes.io/managed-by=weft");
    let before = world.api::<K>().list(&own).await?;
    for object in &before {
        world.api::<K>().delete(&object.name_any(), &kube::api::DeleteParams::default()).await?;
    }
    ensure!(!before.items.is_empty(), "there is no {}", K::kind(&()));
    for object in before {
        let what = format!("{} {} is there again", K::kind(&()), object.name_any());
        world
            .promptly(&what, SOON, async || {
                let now = world.get::<K>(&object.name_any()).await?;
                Ok(now.filter(|now| now.uid() != object.uid()).map(drop))
            })
            .await?;
    }
    Ok(())
}

/// The operator's metric of corrected drift, all kinds together.
async fn corrections(world: &Scenario) -> Result<f64> {
    let labels = ListParams::default().labels("app.kubernetes.io/component=operator");
    let operators = world.api::<k8s_openapi::api::core::v1::Pod>().list(&labels).await?;
    let operator = operators.items.first().context("no operator")?.name_any();
    let metrics = world.get_text(&format!("pods/{operator}:9464"), "/metrics").await?;
    let lines = metrics.lines().filter(|line| line.contains("drift") && !line.starts_with('#'));
    Ok(lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}
