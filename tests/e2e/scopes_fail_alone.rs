//! One of an operator's namespaces loses its rights, and then goes away: that is said, the other one is worked in as before, also
//! by an operator that starts then, the release can be upgraded, and what comes back heals.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Namespace, events::v1::Event, rbac::v1::RoleBinding};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams},
};
use serde_json::{Value, json};
use weft::api::v1alpha1::Microservice;

use crate::harness::{Company, Release, Scenario, merged, microservice, scenario};

#[tokio::test]
async fn scopes_fail_alone() {
    scenario("scopes_fail_alone", Company::Others, async |world| {
        let kept = world.within(&world.another_namespace("kept").await?);
        let lost = world.within(&world.another_namespace("lost").await?);
        let release = Release { namespaces: vec![lost.namespace.clone(), kept.namespace.clone()], ..world.release() };
        world.install(&release).await?;
        for space in [&kept, &lost] {
            space.apply_service(&service()).await?;
            space.ready::<Microservice>("orders").await?;
        }

        let bindings: Api<RoleBinding> = lost.api();
        for binding in bindings.list(&ListParams::default()).await? {
            bindings.delete(&binding.name_any(), &DeleteParams::default()).await?;
        }
        scale(&lost, 2).await?;
        goes_on(&kept, 2).await.context("the other namespace has no rights any more")?;
        restart(world).await?;
        is_named(world, &lost).await.context("without rights")?;
        goes_on(&kept, 1).await.context("the other namespace has no rights any more, after a restart")?;
        ensure!(replicas(&lost).await? == Some(1), "the operator writes where it has no rights");
        world.install(&release).await.context("upgrading the release, which brings the rights back")?;
        has_pods(&lost, 2).await.context("the rights are back")?;
        is_available_again(world, &lost).await?;

        let namespaces: Api<Namespace> = Api::all(world.client.clone());
        namespaces.delete(&lost.namespace, &DeleteParams::default()).await?;
        world
            .until("the namespace is gone", Duration::from_mins(3), async || {
                Ok(namespaces.get_opt(&lost.namespace).await?.is_none().then_some(()))
            })
            .await?;
        goes_on(&kept, 2).await.context("the other namespace is gone")?;
        restart(world).await?;
        is_named(world, &lost).await.context("the namespace is gone")?;
        goes_on(&kept, 1).await.context("the other namespace is gone, after a restart")?;
        world.install(&release).await.context("upgrading the release while the namespace is gone")?;
        goes_on(&kept, 2).await.context("the other namespace is gone, after an upgrade")?;

        world.another_namespace("lost").await?;
        world.install(&release).await.context("upgrading the release when the namespace is there again")?;
        lost.apply_service(&service()).await?;
        lost.ready::<Microservice>("orders").await?;
        is_available_again(world, &lost).await?;
        goes_on(&kept, 1).await
    })
    .await;
}

/// Without a database: what is tried here is whether it is reconciled at all.
fn service() -> Value {
    merged(&microservice("orders"), &json!({"spec": {"database": null}}))
}

async fn replicas(space: &Scenario) -> Result<Option<i32>> {
    let deployment = space.get::<Deployment>("orders").await?.context("no Deployment")?;
    Ok(deployment.spec.and_then(|spec| spec.replicas))
}

async fn scale(space: &Scenario, pods: i32) -> Result<()> {
    space.merge::<Microservice>("orders", &json!({"spec": {"replicas": pods}})).await?;
    Ok(())
}

/// A change is reconciled, and reported.
async fn goes_on(space: &Scenario, pods: i32) -> Result<()> {
    scale(space, pods).await?;
    has_pods(space, pods).await
}

async fn has_pods(space: &Scenario, pods: i32) -> Result<()> {
    // a scope that was refused is tried again within a minute
    space
        .until(&format!("orders has {pods} pods"), Duration::from_secs(90), async || {
            Ok((replicas(space).await? == Some(pods)).then_some(()))
        })
        .await?;
    space.ready::<Microservice>("orders").await
}

async fn operator(world: &Scenario) -> Result<String> {
    world.ready_pod("weft", "operator").await
}

async fn restart(world: &Scenario) -> Result<()> {
    let before = operator(world).await?;
    world.delete_by_force(&before).await?;
    let now = operator(world).await?;
    ensure!(now != before, "{before} is still there");
    Ok(())
}

/// The Event and the metric of docs/runbook.md.
async fn is_named(world: &Scenario, lost: &Scenario) -> Result<()> {
    let message = reported(world, lost, "ScopeUnavailable").await?;
    ensure!(message.contains("upgrade the release"), "no remedy is named: {message}");
    is_counted(world, lost, 1).await
}

async fn is_available_again(world: &Scenario, lost: &Scenario) -> Result<()> {
    reported(world, lost, "ScopeAvailable").await?;
    is_counted(world, lost, 0).await
}

/// What an Event with that reason about the operator that works now says of the namespace.
async fn reported(world: &Scenario, lost: &Scenario, reason: &str) -> Result<String> {
    let operator = operator(world).await?;
    world
        .until(&format!("an Event {reason} about {operator}"), Duration::from_secs(90), async || {
            let events = world.api::<Event>().list(&ListParams::default()).await?;
            let mut notes = events.items.into_iter().filter(|event| {
                let about = event.regarding.as_ref().and_then(|about| about.name.as_deref());
                event.reason.as_deref() == Some(reason) && about == Some(operator.as_str())
            });
            Ok(notes.find_map(|event| event.note.filter(|note| note.contains(&lost.namespace))))
        })
        .await
}

async fn is_counted(world: &Scenario, lost: &Scenario, refused: u8) -> Result<()> {
    let operator = operator(world).await?;
    let line = format!("weft_scope_refused{{namespace=\"{}\"}} {refused}", lost.namespace);
    world
        .until(&format!("the metrics say {line}"), Duration::from_secs(30), async || {
            let metrics = world.get_text(&format!("pods/{operator}:9464"), "/metrics").await?;
            Ok(metrics.lines().any(|known| known == line).then_some(()))
        })
        .await
}
