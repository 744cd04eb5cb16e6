//! Whatever is killed while events are written and the consumer is scaled up and down, each event has its effect in the consumer once, in
//! the order of its aggregate.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use weft::api::v1alpha1::{Microservice, OutboxRelay};

use crate::harness::{Company, Kill, Release, Scenario, Victim, merged, microservice, progress, relay, scenario, seed};

const EVENTS: usize = 10_000;
const RATE: usize = 300;
const PUBLISHER: &str = "things";
const CONSUMER: &str = "counter";

#[tokio::test]
async fn inbox_delivers_once() {
    scenario("inbox_delivers_once", Company::Others, delivers_once).await;
}

async fn delivers_once(world: &Scenario) -> Result<()> {
    world.install(&Release { nats: true, ..world.release() }).await?;
    let consumes = json!([{"from": PUBLISHER, "http": {"path": "/consume"}}]);
    let consumer = merged(&microservice(CONSUMER), &json!({"spec": {"consumes": consumes}}));
    world.apply_service(&consumer).await?;
    // what is not there yet is waited for
    let waits = world.says::<Microservice>(CONSUMER, "Consuming", "False", 60).await?;
    ensure!(waits.reason == "MicroserviceNotFound", "{waits:?}");
    world.apply_service(&microservice(PUBLISHER)).await?;
    world.apply(&relay(PUBLISHER, "LogTailing")).await?;
    for service in [PUBLISHER, CONSUMER] {
        world.ready::<Microservice>(service).await?;
    }
    world.ready::<OutboxRelay>(PUBLISHER).await?;

    let seed = seed();
    let env = json!([
        {"name": "WRITE_EVENTS", "value": EVENTS.to_string()},
        {"name": "WRITE_RATE", "value": RATE.to_string()},
        {"name": "WRITE_SEED", "value": seed.to_string()},
    ]);
    world.apply(&merged(&microservice(PUBLISHER), &json!({"spec": {"env": env}}))).await?;
    let scaled = async {
        for (replicas, share) in [(1, 4), (3, 2), (1, 1)] {
            let spec = json!({"spec": {"replicas": replicas}});
            world.merge::<Microservice>(CONSUMER, &spec).await?;
            world
                .until("events have effects", Duration::from_mins(6), async || {
                    let rows = world.psql(CONSUMER, "select count(*) from consumed").await?;
                    let count: usize = rows.join("").parse()?;
                    Ok((count >= EVENTS / share).then_some(()))
                })
                .await?;
        }
        Ok(())
    };
    world
        .while_killing(&victims(), Duration::from_secs(3), seed, scaled)
        .await
        .with_context(|| format!("repeat it with WEFT_SEED={seed}"))?;

    let rows = world.psql(CONSUMER, "select aggregate, n from consumed order by position").await?;
    let mut effects: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for row in &rows {
        let (aggregate, n) = row.split_once('|').with_context(|| format!("a row is {row}"))?;
        effects.entry(aggregate).or_default().push(n.parse()?);
    }
    for (aggregate, numbers) in &effects {
        let wanted: Vec<u64> = (1..=numbers.len() as u64).collect();
        ensure!(*numbers == wanted, "{aggregate} has {numbers:?}; repeat it with WEFT_SEED={seed}");
    }
    ensure!(rows.len() == EVENTS, "{} effects of {EVENTS} events; repeat it with WEFT_SEED={seed}", rows.len());
    progress(&format!("{}: {EVENTS} events have their effect once, in order", world.name));
    let consuming = world.says::<Microservice>(CONSUMER, "Consuming", "True", 60).await?;
    ensure!(consuming.reason == "Consuming", "{consuming:?}");
    world
        .until("the columns count every event", Duration::from_mins(1), async || {
            let status = world.get::<Microservice>(CONSUMER).await?.and_then(|service| service.status);
            let summary = status.and_then(|status| status.summary).unwrap_or_default();
            ensure!(summary.waiting == Some(0), "{summary:?}");
            ensure!(summary.consumed >= Some(i64::try_from(EVENTS)?), "{summary:?}");
            Ok(Some(()))
        })
        .await
}

fn victims() -> Vec<Victim> {
    let broker = Victim {
        labels: "app.kubernetes.io/component=broker".to_owned(),
        container: "nats",
        kill: Kill::ProcessThenPod,
    };
    vec![
        Victim::new(CONSUMER, "inbox", "weft-inbox", Kill::ProcessOrPod),
        Victim::new(CONSUMER, "inbox", "weft-inbox", Kill::ProcessOrPod),
        Victim::new(CONSUMER, "service", "service", Kill::ProcessOrPod),
        Victim::new(CONSUMER, "database", "postgres", Kill::ProcessOrPod),
        broker,
    ]
}
