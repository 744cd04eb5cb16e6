//! Whatever is killed while events are written, the broker has every committed event, in order within each aggregate,
//! under the id that it was committed with.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, DeliverPolicy, pull},
};
use futures::StreamExt;
use serde::Deserialize;
use serde_json::json;
use weft::api::v1alpha1::{Microservice, OutboxRelay};

use crate::{
    checker::{Delivered, check},
    harness::{Company, Kill, Release, Scenario, Victim, microservice, progress, relay, scenario, seed},
};

const EVENTS: usize = 20_000;
const AGGREGATES: usize = 200;
/// Events a second: the writing has to last for some kills.
const RATE: usize = 500;
const SERVICE: &str = "things";

#[tokio::test]
async fn relay_loses_nothing_log_tailing() {
    scenario("relay_loses_nothing_log_tailing", Company::Others, async |world| {
        loses_nothing(world, "LogTailing", "Sidecar").await
    })
    .await;
}

#[tokio::test]
async fn relay_loses_nothing_polling() {
    scenario("relay_loses_nothing_polling", Company::Others, async |world| {
        loses_nothing(world, "Polling", "Standalone").await
    })
    .await;
}

async fn loses_nothing(world: &Scenario, mode: &str, placement: &str) -> Result<()> {
    world.install(&Release { nats: true, ..world.release() }).await?;
    world.apply_service(&microservice(SERVICE)).await?;
    let mut relay = relay(SERVICE, mode);
    relay["spec"]["placement"] = json!(placement);
    world.apply(&relay).await?;
    world.ready::<Microservice>(SERVICE).await?;
    world.ready::<OutboxRelay>(SERVICE).await?;

    let seed = seed();
    let mut writing = microservice(SERVICE);
    writing["spec"]["env"] = json!([
        {"name": "WRITE_EVENTS", "value": EVENTS.to_string()},
        {"name": "WRITE_AGGREGATES", "value": AGGREGATES.to_string()},
        {"name": "WRITE_RATE", "value": RATE.to_string()},
        {"name": "WRITE_SEED", "value": seed.to_string()},
    ]);
    writing["spec"]["replicas"] = json!(2);
    world.apply(&writing).await?;
    let written = world.until("every event is written", Duration::from_mins(6), async || {
        let rows = world.psql(SERVICE, "select count(*) from ledger").await?;
        Ok((rows == [EVENTS.to_string()]).then_some(()))
    });
    world.while_killing(&victims(placement), Duration::from_secs(3), seed, written).await?;

    world
        .until("the outbox is empty", Duration::from_mins(2), async || {
            let rows = world.psql(SERVICE, "select count(*) from weft.outbox").await?;
            ensure!(rows == ["0"], "{} rows wait in the outbox", rows.join(""));
            Ok(Some(()))
        })
        .await
        .with_context(|| format!("repeat it with WEFT_SEED={seed}"))?;
    let (committed, delivered) = world
        .until("database and stream can be read", Duration::from_mins(1), async || {
            Ok(Some((committed(world).await?, delivered(world).await?)))
        })
        .await
        .with_context(|| format!("repeat it with WEFT_SEED={seed}"))?;
    let counters = committed.iter().fold(BTreeMap::new(), |mut counters, ((aggregate, n), _)| {
        let highest: &mut u64 = counters.entry(aggregate.clone()).or_default();
        *highest = (*highest).max(*n);
        counters
    });
    let verdict = check(&counters, &delivered);
    progress(&format!("{}: {verdict}", world.name));
    ensure!(verdict.is_kept(), "{verdict}; repeat it with WEFT_SEED={seed}");
    for event in &delivered {
        let id = committed.get(&(event.aggregate.clone(), event.number));
        ensure!(id == Some(&event.id), "{event:?} was committed as {id:?}; repeat it with WEFT_SEED={seed}");
    }
    world
        .until("the relay counts every event", Duration::from_mins(1), async || {
            let status = world.get::<OutboxRelay>(SERVICE).await?.and_then(|relay| relay.status).unwrap_or_default();
            ensure!(status.pending == 0, "status.pending is {}", status.pending);
            ensure!(status.published >= i64::try_from(EVENTS)?, "status.published is {}", status.published);
            Ok(Some(()))
        })
        .await
}

fn victims(placement: &str) -> Vec<Victim> {
    let component = if placement == "Standalone" { "relay" } else { "service" };
    let broker = Victim {
        labels: "app.kubernetes.io/component=broker".to_owned(),
        container: "nats",
        kill: Kill::ProcessThenPod,
    };
    vec![
        Victim::new(SERVICE, component, "weft-relay", Kill::ProcessOrPod),
        Victim::new(SERVICE, component, "weft-relay", Kill::ProcessOrPod),
        Victim::new(SERVICE, "database", "postgres", Kill::ProcessOrPod),
        broker,
    ]
}

/// The ids, by aggregate and number.
async fn committed(world: &Scenario) -> Result<BTreeMap<(String, u64), String>> {
    let rows = world.psql(SERVICE, "select aggregate, n, id from ledger").await?;
    let ids = rows.iter().map(|row| {
        let fields: Vec<&str> = row.split('|').collect();
        let [aggregate, n, id] = fields[..] else { anyhow::bail!("a row of the ledger is {row}") };
        Ok(((aggregate.to_owned(), n.parse()?), id.to_owned()))
    });
    ids.collect()
}

#[derive(Deserialize)]
struct Payload {
    aggregate: String,
    n: u64,
}

/// Every message of the stream, in its order.
async fn delivered(world: &Scenario) -> Result<Vec<Delivered>> {
    let forward = world.forward("service/weft-nats", 4222).await?;
    let credentials = world.weft_broker(&["credentials", &world.namespace]).await?;
    let options = async_nats::ConnectOptions::with_credentials(&credentials)?;
    let client = options.connect(format!("nats://127.0.0.1:{}", forward.port)).await?;
    let mut stream = jetstream::new(client).get_stream(SERVICE).await?;
    let total = usize::try_from(stream.info().await?.state.messages)?;
    let consumer = stream
        .create_consumer(pull::Config {
            deliver_policy: DeliverPolicy::All,
            ack_policy: AckPolicy::None,
            ..pull::Config::default()
        })
        .await?;
    let mut messages = consumer.messages().await?;
    let mut events = Vec::with_capacity(total);
    while events.len() < total {
        let message = tokio::time::timeout(Duration::from_secs(20), messages.next()).await;
        let came = || format!("{} of {total} messages came", events.len());
        let message = message.ok().flatten().with_context(came)?.with_context(came)?;
        let headers = message.headers.clone().unwrap_or_default();
        let header = |name: &str| headers.get(name).map(|value| value.as_str().to_owned());
        let payload: Payload = serde_json::from_slice(&message.payload)?;
        let id = header("ce-id").context("a message has no ce-id")?;
        let sequence = header("ce-sequence").context("a message has no ce-sequence")?;
        let source = header("ce-source").context("a message has no ce-source")?;
        let broker = header("Nats-Msg-Id");
        let of_event = broker.as_ref().is_some_and(|broker| broker.starts_with(&format!("{source} {id} ")));
        ensure!(of_event, "the broker's id differs from the event's: {broker:?}");
        events.push(Delivered { id, aggregate: payload.aggregate, number: payload.n, sequence });
    }
    Ok(events)
}
