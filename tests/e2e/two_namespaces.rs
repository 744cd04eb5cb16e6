//! The same names in two namespaces do not interfere; and an operator that is told which namespaces to work in leaves the
//! others alone.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use weft::api::v1alpha1::{Microservice, OutboxRelay, Saga};

use crate::harness::{Company, Release, Scenario, microservice, relay, saga, same, scenario};

#[tokio::test]
async fn two_namespaces() {
    scenario("two_namespaces", Company::Alone, async |world| {
        let one = world.within(&world.another_namespace("one").await?);
        let two = world.within(&world.another_namespace("two").await?);
        world.install(&Release { namespaces: vec![], nats: true, ..world.release() }).await?;
        for space in [&one, &two] {
            for service in ["stock", "travel"] {
                space.apply_service(&microservice(service)).await?;
            }
            space.apply(&relay("stock", "LogTailing")).await?;
            space.apply(&saga("trip", "stock", "travel")).await?;
        }
        for space in [&one, &two] {
            space.ready::<Microservice>("stock").await?;
            space.ready::<Microservice>("travel").await?;
            space.ready::<OutboxRelay>("stock").await?;
            space.ready::<Saga>("trip").await?;
        }
        each_has_its_own(&one, &two).await?;
        each_has_its_own_events(world, &one, &two).await?;

        one.delete::<Microservice>("stock").await?;
        ensure!(
            two.get::<Deployment>("stock").await?.is_some(),
            "deleting it in one namespace deleted it in the other"
        );
        two.get_text("services/stock:8080", "/healthz").await?;

        world.install(&Release { namespaces: vec![two.namespace.clone()], nats: true, ..world.release() }).await?;
        only_the_named_one(&one, &two).await?;
        // so that deleting what is left finds an operator
        world.install(&Release { namespaces: vec![], nats: true, ..world.release() }).await
    })
    .await;
}

async fn each_has_its_own(one: &Scenario, two: &Scenario) -> Result<()> {
    one.psql("stock", "insert into switch values ('one')").await?;
    ensure!(two.psql("stock", "select name from switch").await?.is_empty(), "a row of one database is in the other");
    let there = format!("stock-db.{}:5432", one.namespace);
    let reached = two.in_service("stock", &["connect", &there]).await?;
    ensure!(reached != "connected", "a service reached the database of its namesake in another namespace");
    two.service_says("stock", &["log-in"], "entered").await
}

/// The streams have one name, and the relays of the namesakes publish at the same time.
async fn each_has_its_own_events(world: &Scenario, one: &Scenario, two: &Scenario) -> Result<()> {
    for space in [one, two] {
        let event = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) values ('order', '1', 'OrderCreated', '{}')";
        space.psql("stock", event).await?;
    }
    for space in [one, two] {
        let events = async || world.weft_broker(&["events", &space.namespace, "--stream", "stock"]).await;
        let line = format!("1\t/{}/stock\tOrderCreated\t{{}}\n", space.namespace);
        world
            .until("the event is in the stream", Duration::from_mins(1), async || {
                // there is no stream before the first event
                Ok(events().await.ok().filter(|events| !events.is_empty()))
            })
            .await?;
        same("the events of the namespace", &line, &events().await?)?;
    }
    let forward = world.forward("service/weft-nats", 4222).await?;
    let anonymous = async_nats::connect(format!("nats://127.0.0.1:{}", forward.port)).await;
    ensure!(anonymous.is_err(), "the broker lets in who has no credentials");
    Ok(())
}

async fn only_the_named_one(one: &Scenario, two: &Scenario) -> Result<()> {
    for space in [one, two] {
        // as `kubectl scale` does
        let scale = Patch::Merge(json!({"spec": {"replicas": 2}}));
        space.api::<Microservice>().patch_scale("travel", &PatchParams::default(), &scale).await?;
    }
    let replicas = async |space: &Scenario| {
        let deployment = space.get::<Deployment>("travel").await?.context("no Deployment")?;
        anyhow::Ok(deployment.spec.and_then(|spec| spec.replicas))
    };
    two.until("the operator scales where it works", Duration::from_mins(1), async || {
        Ok((replicas(two).await? == Some(2)).then_some(()))
    })
    .await?;
    two.ready::<Microservice>("travel").await?;
    ensure!(replicas(one).await? == Some(1), "the operator works in a namespace that it was not told of");
    Ok(())
}
