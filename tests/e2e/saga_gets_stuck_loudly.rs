//! An undo that always fails: the saga is Stuck in the columns, in an Event and in a metric, and `retry` resolves it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use axum::http::Method;
use k8s_openapi::api::events::v1::Event;
use kube::api::ListParams;
use serde_json::{Value, json};
use weft::api::v1alpha1::{Microservice, Saga, SagaStatus};

use crate::harness::{Company, Scenario, microservice, saga, scenario};

const ORCHESTRATOR: &str = "services/default-orchestrator:8080";

#[tokio::test]
async fn saga_gets_stuck_loudly() {
    scenario("saga_gets_stuck_loudly", Company::Others, async |world| {
        world.install(&world.release()).await?;
        for service in ["stock", "travel"] {
            world.apply_service(&microservice(service)).await?;
        }
        let mut trip = saga("trip", "stock", "travel");
        // Only of the step whose undo will fail. Its `do` has the same attempts: enough of them for a Service that is not
        // everywhere known yet on a slow machine.
        let book = &mut trip["spec"]["steps"][1];
        book["retry"] = json!({"maxAttempts": 4, "initialBackoff": "4s", "maxBackoff": "10m"});
        world.apply(&trip).await?;
        world.ready::<Saga>("trip").await?;
        for service in ["stock", "travel"] {
            world.ready::<Microservice>(service).await?;
        }
        world
            .until("travel's database takes the switch", Duration::from_secs(20), async || {
                world.http(Method::PUT, "services/travel:8080", "/switches/fail-undo", None).await?.ok().map(Some)
            })
            .await?;
        world.http(Method::POST, ORCHESTRATOR, "/sagas/trip", Some(json!({"refuse": true}))).await?.ok()?;

        let status = in_the_columns(world).await?;
        world.says::<Saga>("trip", "Stuck", "True", 30).await?;
        in_an_event(world).await?;
        in_a_metric(world).await?;

        a_mistake_stops_nothing(world, &trip).await?;
        // the stuck call is also made again by itself, some time within ten minutes
        world.http(Method::DELETE, "services/travel:8080", "/switches/fail-undo", None).await?.ok()?;
        let id = &status.stuck_instances.first().context("status.stuckInstances is empty")?.id;
        world.http(Method::POST, ORCHESTRATOR, &format!("/sagas/trip/{id}/retry"), None).await?.ok()?;
        compensated(world, id).await?;
        deleted(world).await
    })
    .await;
}

async fn in_the_columns(world: &Scenario) -> Result<SagaStatus> {
    world
        .until("the saga counts one as stuck", Duration::from_secs(90), async || {
            let status = world.get::<Saga>("trip").await?.and_then(|saga| saga.status).unwrap_or_default();
            ensure!(status.stuck == 1, "stuck is {}, running {}", status.stuck, status.running);
            let instance = status.stuck_instances.first().context("status.stuckInstances is empty")?;
            ensure!((instance.step.as_str(), instance.operation.as_str()) == ("book", "undo"), "{instance:?}");
            Ok(Some(status))
        })
        .await
}

async fn in_an_event(world: &Scenario) -> Result<()> {
    world
        .until("an Event says that a saga is stuck", Duration::from_secs(30), async || {
            let events = world.api::<Event>().list(&ListParams::default()).await?;
            let said = events.iter().any(|event| {
                let regarding = event.regarding.clone().unwrap_or_default();
                let about = (regarding.kind.as_deref(), regarding.name.as_deref()) == (Some("Saga"), Some("trip"));
                about
                    && event.type_.as_deref() == Some("Warning")
                    && event.reason.as_deref().unwrap_or_default().contains("Stuck")
            });
            Ok(said.then_some(()))
        })
        .await
}

/// Of the orchestrator itself, where Prometheus asks.
async fn in_a_metric(world: &Scenario) -> Result<()> {
    world
        .until("a metric counts the stuck saga", Duration::from_secs(30), async || {
            let pod = world.ready_pod("default-orchestrator", "orchestrator").await?;
            let metrics = world.get_text(&format!("pods/{pod}:9464"), "/metrics").await?;
            let line = metrics.lines().find(|line| line.contains("stuck") && !line.starts_with('#'));
            let line = line.context("no metric of the orchestrator is about stuck sagas")?;
            Ok(line.ends_with(" 1").then_some(()))
        })
        .await
}

/// An edit with a mistake in it: new instances start with the last good version.
async fn a_mistake_stops_nothing(world: &Scenario, trip: &Value) -> Result<()> {
    let mut wrong = trip.clone();
    wrong["spec"]["steps"][0]["do"]["command"] = json!("Akt");
    world.apply(&wrong).await?;
    let condition = world.says::<Saga>("trip", "Accepted", "False", 30).await?;
    ensure!(condition.message.contains("start with the last good version"), "{}", condition.message);
    world.http(Method::POST, ORCHESTRATOR, "/sagas/trip", Some(json!({"refuse": false}))).await?.ok()?;
    world.apply(trip).await?;
    world.says::<Saga>("trip", "Accepted", "True", 30).await?;
    Ok(())
}

/// A Saga whose instances have ended goes at once.
async fn deleted(world: &Scenario) -> Result<()> {
    world.delete::<Saga>("trip").await?;
    world
        .until("the Saga is gone", Duration::from_mins(2), async || {
            Ok(world.get::<Saga>("trip").await?.is_none().then_some(()))
        })
        .await
}

async fn compensated(world: &Scenario, id: &str) -> Result<()> {
    world
        .until("the saga is compensated", Duration::from_mins(1), async || {
            let status = world.get::<Saga>("trip").await?.and_then(|saga| saga.status).unwrap_or_default();
            let counts = (status.completed, status.compensated, status.running, status.stuck);
            ensure!(counts == (1, 1, 0, 0), "{status:?}");
            Ok(Some(()))
        })
        .await?;
    world.says::<Saga>("trip", "Stuck", "False", 30).await?;
    for (service, wanted) in [("stock", ["reserve/do", "reserve/undo"]), ("travel", ["book/do", "book/undo"])] {
        let effects = format!("select step || '/' || op from effect where saga = '{id}' order by position");
        let effects = world.psql(service, &effects).await?;
        ensure!(effects == wanted, "the effects at {service} are {effects:?}");
    }
    Ok(())
}
