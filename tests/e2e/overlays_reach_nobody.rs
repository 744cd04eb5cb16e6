//! Nothing in a Microservice's spec gives its pods the Secrets, volumes or identity of another, and those it has go on.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::{ResourceExt, api::ListParams};
use serde_json::{Value, json};
use weft::api::v1alpha1::Microservice;

use crate::harness::{Company, Scenario, merged, microservice, scenario};

#[tokio::test]
async fn overlays_reach_nobody() {
    scenario("overlays_reach_nobody", Company::Others, async |world| {
        world.install(&world.release()).await?;
        for service in ["orders", "customers"] {
            world.apply_service(&microservice(service)).await?;
        }
        for service in ["orders", "customers"] {
            world.ready::<Microservice>(service).await?;
        }
        let before = pods(world).await?;
        for (field, change) in attempts() {
            refused(world, field, &change).await?;
        }
        ensure!(pods(world).await? == before, "a refused spec changed the pods");
        world.apply(&microservice("orders")).await?;
        world.ready::<Microservice>("orders").await
    })
    .await;
}

/// Each way, with the field that the message names.
fn attempts() -> Vec<(&'static str, Value)> {
    let pod = |spec: Value| json!({"podTemplate": {"spec": spec}});
    let volume = |source: Value| pod(json!({"volumes": [merged(&json!({"name": "theirs"}), &source)]}));
    let variable =
        json!({"name": "A", "valueFrom": {"secretKeyRef": {"name": "customers-db-admin", "key": "password"}}});
    vec![
        ("volumes[0].secret.secretName", volume(json!({"secret": {"secretName": "customers-db-admin"}}))),
        ("volumes[0].secret.secretName", volume(json!({"secret": {"secretName": "orders-db-admin"}}))),
        (
            "volumes[0].projected.sources[0].secret.name",
            volume(json!({"projected": {"sources": [{"secret": {"name": "customers-db"}}]}})),
        ),
        (
            "volumes[0].persistentVolumeClaim.claimName",
            volume(json!({"persistentVolumeClaim": {"claimName": "data-customers-db-0"}})),
        ),
        ("spec.serviceAccountName", pod(json!({"serviceAccountName": "customers"}))),
        ("imagePullSecrets[0].name", pod(json!({"imagePullSecrets": [{"name": "customers-db"}]}))),
        (
            "containers[0].env[0].valueFrom.secretKeyRef.name",
            pod(json!({"containers": [{"name": "service", "env": [variable.clone()]}]})),
        ),
        ("spec.env[0].valueFrom.secretKeyRef.name", json!({"env": [variable]})),
        ("spec.envFrom[0].secretRef.name", json!({"envFrom": [{"secretRef": {"name": "customers-db-relay"}}]})),
    ]
}

async fn refused(world: &Scenario, field: &str, change: &Value) -> Result<()> {
    world.apply(&merged(&microservice("orders"), &json!({"spec": change}))).await?;
    let accepted = world.says::<Microservice>("orders", "Accepted", "False", 30).await?;
    ensure!(accepted.reason == "NotItsOwn", "{}: {}", accepted.reason, accepted.message);
    ensure!(accepted.message.contains(field), "{field} is not named: {}", accepted.message);
    Ok(())
}

/// The service's pods.
async fn pods(world: &Scenario) -> Result<Vec<String>> {
    let own = ListParams::default().labels("weft.dev/owner=orders,app.kubernetes.io/component=service");
    let mut pods: Vec<_> = world.api::<Pod>().list(&own).await?.iter().map(ResourceExt::name_any).collect();
    pods.sort();
    Ok(pods)
}
