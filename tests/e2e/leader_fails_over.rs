//! Of two operators one works. When it dies the other takes over within the lease's time, and never do two write.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use k8s_openapi::api::{apps::v1::Deployment, coordination::v1::Lease};
use serde_json::json;
use weft::api::v1alpha1::Microservice;

use crate::harness::{Company, Release, Scenario, microservice, progress, scenario};

#[tokio::test]
async fn leader_fails_over() {
    scenario("leader_fails_over", Company::Others, async |world| {
        let begun = Timestamp::now();
        world.install(&Release { replicas: 2, ..world.release() }).await?;
        world.apply_service(&microservice("orders")).await?;
        world.ready::<Microservice>("orders").await?;
        let mut leaders = vec![leader(world).await?.0];
        for replicas in [2, 1] {
            let (pod, seconds) = leader(world).await?;
            world.kill_operator(&pod).await?;
            let killed = Timestamp::now();
            world.merge::<Microservice>("orders", &json!({"spec": {"replicas": replicas}})).await?;
            // the lease's time, a retry's, and a new pod's start on a busy node
            let limit = Duration::from_secs(seconds + 30);
            world
                .promptly("another operator works", limit, async || {
                    let orders = world.get::<Deployment>("orders").await?.context("no Deployment")?;
                    Ok((orders.spec.and_then(|spec| spec.replicas) == Some(replicas)).then_some(()))
                })
                .await?;
            let took = Timestamp::now().duration_since(killed).as_secs();
            progress(&format!("{}: taken over after {took} s of a lease of {seconds} s", world.name));
            let next = leader(world).await?.0;
            ensure!(next != pod, "the lease is still held by the dead {pod}");
            leaders.push(next);
        }
        world.ready::<Microservice>("orders").await?;
        one_writer_at_a_time(world, begun, &leaders).await
    })
    .await;
}

/// The pod that holds the lease, and the lease's seconds.
async fn leader(world: &Scenario) -> Result<(String, u64)> {
    world
        .until("the lease has a holder", Duration::from_mins(1), async || {
            let lease = world.get::<Lease>("weft").await?.and_then(|lease| lease.spec).context("no Lease weft")?;
            let holder = lease.holder_identity.filter(|holder| !holder.is_empty());
            let seconds = u64::try_from(lease.lease_duration_seconds.unwrap_or(15))?;
            Ok(holder.map(|holder| (holder.split(['_', '/']).next().unwrap_or_default().to_owned(), seconds)))
        })
        .await
}

/// Each leader's writes are before those of the next.
async fn one_writer_at_a_time(world: &Scenario, begun: Timestamp, leaders: &[String]) -> Result<()> {
    let requests = world
        .requests_since(begun)
        .await?
        .into_iter()
        .filter(|request| request.is_write() && request.resource != "events");
    let mut writers: Vec<String> = Vec::new();
    for write in requests {
        ensure!(!write.pod.is_empty(), "the audit log does not say which pod sent {} {}", write.verb, write.uri);
        if writers.last() != Some(&write.pod) {
            writers.push(write.pod);
        }
    }
    ensure!(writers == leaders, "the leaders were {leaders:?}; the writers, in the order of their writes: {writers:?}");
    Ok(())
}
