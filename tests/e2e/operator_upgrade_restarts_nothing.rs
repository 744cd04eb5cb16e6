//! A new version of the operator restarts no operand, until a custom resource asks for it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use kube::{ResourceExt, api::ListParams};
use serde_json::json;
use weft::api::v1alpha1::Microservice;

use crate::harness::{self, Company, Release, Scenario, microservice, same, scenario};

#[tokio::test]
async fn operator_upgrade_restarts_nothing() {
    scenario("operator_upgrade_restarts_nothing", Company::Others, async |world| {
        world.install_one_of_each().await?;
        let before = (world.operands().await?, templates(world).await?);

        harness::make_image_next().await?;
        world.install(&Release { tag: "next", nats: true, ..world.release() }).await?;
        // whatever it does to what it finds, it has done once it has made something new
        world.apply_service(&microservice("later")).await?;
        world.ready::<Microservice>("later").await?;
        let mut after = (world.operands().await?, templates(world).await?);
        after.0.retain(|pod, _| !pod.starts_with("later"));
        after.1.retain(|(name, _)| !name.starts_with("later"));
        same("the pods", &before.0, &after.0)?;
        same("the pod templates", &before.1, &after.1)?;

        world
            .merge::<Microservice>("stock", &json!({"metadata": {"annotations": {"weft.dev/upgrade": "now"}}}))
            .await?;
        world
            .until("the relay of stock runs the new image", Duration::from_mins(1), async || {
                let stock = world.get::<Deployment>("stock").await?.context("no Deployment")?;
                Ok(serde_json::to_string(&stock.spec)?.contains("localhost/weft:next").then_some(()))
            })
            .await?;
        world.ready::<Microservice>("stock").await?;
        let orchestrator = world.get::<Deployment>("default-orchestrator").await?.context("no Deployment")?;
        let untouched = !serde_json::to_string(&orchestrator.spec)?.contains("localhost/weft:next");
        ensure!(untouched, "the orchestrator was upgraded too, and nobody had asked for it");
        Ok(())
    })
    .await;
}

/// Name, and pod template as JSON, of everything that has one.
async fn templates(world: &Scenario) -> Result<Vec<(String, String)>> {
    let own = ListParams::default().labels("app.kubernetes.io/managed-by=weft");
    let mut templates = Vec::new();
    for deployment in world.api::<Deployment>().list(&own).await? {
        templates.push((deployment.name_any(), serde_json::to_string(&deployment.spec.map(|spec| spec.template))?));
    }
    for database in world.api::<StatefulSet>().list(&own).await? {
        templates.push((database.name_any(), serde_json::to_string(&database.spec.map(|spec| spec.template))?));
    }
    templates.sort();
    Ok(templates)
}
