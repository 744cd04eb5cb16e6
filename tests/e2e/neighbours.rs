//! Weft beside what other people have in a namespace: policies that deny by default, quotas and limits, and an autoscaler that
//! nobody told of Weft.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{apps::v1::Deployment, autoscaling::v2::HorizontalPodAutoscaler, batch::v1::Job};
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};
use weft::api::v1alpha1::{Microservice, OutboxRelay, Saga};

use crate::harness::{Company, Release, SERVICE_IMAGE, Scenario, merged, microservice, relay, saga, scenario};

#[tokio::test]
async fn neighbours() {
    scenario("neighbours", Company::Others, async |world| {
        world.install(&Release { nats: true, ..world.release() }).await?;
        for object in [default_deny(), quota(), limits()] {
            world.apply(&object).await?;
        }
        everything_works(world).await.context("with default-deny, a quota and limits")?;
        an_autoscaler_of_others_is_named(world).await.context("with somebody's autoscaler")?;
        with_autoscaling_nobody_else_writes(world).await.context("with spec.autoscaling")
    })
    .await;
}

fn default_deny() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "default-deny"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    })
}

/// It admits no container without requests and limits.
fn quota() -> Value {
    let hard = json!({"requests.cpu": "8", "requests.memory": "8Gi", "limits.cpu": "64", "limits.memory": "32Gi"});
    json!({
        "apiVersion": "v1", "kind": "ResourceQuota",
        "metadata": {"name": "small"},
        "spec": {"hard": hard},
    })
}

fn limits() -> Value {
    let container =
        json!({"type": "Container", "max": {"cpu": "4", "memory": "2Gi"}, "min": {"cpu": "1m", "memory": "1Mi"}});
    json!({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "sane"}, "spec": {"limits": [container]}})
}

/// A service whose own container fits the quota; that of the database is as Weft makes it.
fn service(name: &str) -> Value {
    let resources = json!({"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "1", "memory": "128Mi"}});
    let spec = json!({"resources": resources, "database": {"postgres": {"resources": null}}});
    merged(&microservice(name), &json!({"spec": spec}))
}

async fn everything_works(world: &Scenario) -> Result<()> {
    for name in ["stock", "travel"] {
        world.apply_service(&service(name)).await?;
    }
    world.apply(&relay("stock", "LogTailing")).await?;
    world.apply(&saga("trip", "stock", "travel")).await?;
    for name in ["stock", "travel"] {
        world.ready::<Microservice>(name).await?;
    }
    // the operator has read their status
    world.ready::<OutboxRelay>("stock").await?;
    world.ready::<Saga>("trip").await?;
    let answer = world.in_service("stock", &["connect", "travel:8080"]).await?;
    ensure!(answer != "connected", "Weft's policies opened a service that the namespace had closed");
    world.apply(&starter(&world.namespace)).await?;
    world
        .until("a saga is accepted and has called both services", Duration::from_mins(2), async || {
            let job: Option<Job> = world.get("starter").await?;
            let started = job.and_then(|job| job.status).is_some_and(|status| status.succeeded == Some(1));
            let status = world.get::<Saga>("trip").await?.and_then(|saga| saga.status).unwrap_or_default();
            Ok((started && status.completed == 1).then_some(()))
        })
        .await
}

fn starter(namespace: &str) -> Value {
    let url = format!("http://default-orchestrator.{namespace}:8080");
    let container = json!({
        "name": "starter",
        "image": SERVICE_IMAGE,
        "command": ["/usr/bin/weft-e2e", "start-sagas", "--url", url, "--saga", "trip", "--count", "1",
            "--refuse-every", "10", "--rate", "1"],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "1", "memory": "128Mi"}},
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
    });
    let pod = json!({
        "restartPolicy": "OnFailure",
        "automountServiceAccountToken": false,
        "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    });
    json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "starter"}, "spec": {"template": {"spec": pod}}})
}

async fn replicas(world: &Scenario) -> Result<(Option<i32>, i64)> {
    let deployment = world.get::<Deployment>("travel").await?.context("no Deployment")?;
    let generation = deployment.metadata.generation.unwrap_or_default();
    Ok((deployment.spec.and_then(|spec| spec.replicas), generation))
}

/// As an autoscaler writes it.
async fn scale(world: &Scenario, pods: i32) -> Result<()> {
    let params = PatchParams { field_manager: Some("keda".to_owned()), ..PatchParams::default() };
    let scale = Patch::Merge(json!({"spec": {"replicas": pods}}));
    world.api::<Deployment>().patch_scale("travel", &params, &scale).await?;
    Ok(())
}

async fn an_autoscaler_of_others_is_named(world: &Scenario) -> Result<()> {
    let (_, before) = replicas(world).await?;
    let mut changes = 0;
    let contested = world
        .until("the contest is reported", Duration::from_mins(3), async || {
            if replicas(world).await?.0 != Some(2) {
                scale(world, 2).await?;
                changes += 1;
            }
            Ok(world.now_says::<Microservice>("travel", "Contested").await.ok())
        })
        .await?;
    let (_, after) = replicas(world).await?;
    ensure!(changes <= 4, "Weft put it back {changes} times within minutes");
    ensure!(after - before <= 2 * changes, "the Deployment changed {} times", after - before);
    for part in ["Deployment travel", "spec.replicas", "keda"] {
        ensure!(contested.message.contains(part), "{part} is not named: {}", contested.message);
    }
    Ok(())
}

async fn with_autoscaling_nobody_else_writes(world: &Scenario) -> Result<()> {
    let scaling = json!({"spec": {"autoscaling": {"min": 1, "max": 3, "cpu": 70}}});
    world.merge::<Microservice>("travel", &scaling).await?;
    world
        .until("the autoscaler is there, and the contest is over", Duration::from_mins(1), async || {
            let there = world.get::<HorizontalPodAutoscaler>("travel").await?.is_some();
            let contested = world.now_says::<Microservice>("travel", "Contested").await.is_ok();
            Ok((there && !contested).then_some(()))
        })
        .await?;
    scale(world, 2).await?;
    world.ready::<Microservice>("travel").await?;
    ensure!(replicas(world).await?.0 == Some(2), "Weft wrote the number of pods beside an autoscaler");
    Ok(())
}
