//! Events in a table of the team's own, in Debezium's layout, reach an HTTP endpoint that demands a token, by a relay in a pod of
//! its own; what the endpoint refuses is given up, and a person sees it.

use std::time::Duration;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use serde_json::{Value, json};
use weft::api::v1alpha1::{Microservice, OutboxRelay};

use crate::harness::{Company, SCHEMA, Scenario, configmap, kubectl, microservice, scenario};

const OUTBOX: &str = "create table outbox (id uuid primary key default gen_random_uuid(), aggregatetype text not null, \
     aggregateid text not null, type text not null, payload jsonb, tenant text)";
const EVENTS: i64 = 20;
const SOON: Duration = Duration::from_mins(1);

#[tokio::test]
async fn an_outbox_of_its_own() {
    scenario("an_outbox_of_its_own", Company::Others, async |world| {
        world.install(&world.release()).await?;
        let mut receiver = microservice("receiver");
        receiver["spec"]["env"] = json!([{"name": "EVENTS_TOKEN", "value": "a token of the receiver"}]);
        world.apply_service(&receiver).await?;
        for (name, token) in [("wrong-token", "another token"), ("right-token", "a token of the receiver")] {
            let metadata = json!({"name": name});
            let secret =
                json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"token": token}});
            world.apply(&secret).await?;
        }
        let files = [("001_tables.sql", SCHEMA), ("002_outbox.sql", OUTBOX)];
        world.apply(&configmap("invoices-migrations", &files)).await?;
        world.apply(&microservice("invoices")).await?;
        world.apply(&relay(world, "wrong-token")).await?;
        for service in ["receiver", "invoices"] {
            world.ready::<Microservice>(service).await?;
        }
        let pods = world.pods("invoices", "service").await?;
        let text = serde_json::to_string(&pods[0].spec)?;
        ensure!(!text.contains("weft-relay"), "a pod of the service has the relay: {text}");
        world.ready::<OutboxRelay>("invoices").await?;
        let insert = format!(
            "set role app; insert into outbox (aggregatetype, aggregateid, type, payload, tenant) \
             select 'invoice', (n % 4)::text, 'InvoiceSent', jsonb_build_object('n', n, 'refuse', n = 7), 'weavers' \
               from generate_series(1, {EVENTS}) n"
        );
        world.psql("invoices", &insert).await?;
        world.says::<OutboxRelay>("invoices", "Ready", "False", 60).await?;
        let condition = world.now_says::<OutboxRelay>("invoices", "Ready").await?;
        ensure!(condition.message.contains("401") && condition.message.contains("Secret"), "{}", condition.message);
        world.apply(&relay(world, "right-token")).await?;
        received(world).await?;
        a_person_sees_it(world).await?;
        deleted(world).await
    })
    .await;
}

fn relay(world: &Scenario, secret: &str) -> Value {
    json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "OutboxRelay", "metadata": {"name": "invoices"},
        "spec": {
            "microservice": "invoices",
            "placement": "Standalone",
            "outbox": {"layout": "Debezium"},
            "deadLetter": {"maxAttempts": 2},
            "sink": {"http": {
                "url": format!("http://receiver.{}.svc:8080/events/{{type}}", world.namespace),
                "secret": secret,
            }},
        },
    })
}

async fn received(world: &Scenario) -> Result<()> {
    world
        .until("all but the refused event are received", Duration::from_mins(2), async || {
            let rows =
                world.psql("receiver", "select count(distinct id) from received where kind = 'InvoiceSent'").await?;
            ensure!(rows == [(EVENTS - 1).to_string()], "{} are", rows.join(""));
            Ok(Some(()))
        })
        .await?;
    // first deliveries, in the order of each aggregate
    let reordered = "with first as (select distinct on (id) position, subject, (body::jsonb->>'n')::int as n \
                       from received order by id, position) \
         select count(*) from first a join first b using (subject) where a.n < b.n and a.position > b.position";
    let of_others = "select count(*) from received where tenant <> 'weavers' or subject not in ('0', '1', '2', '3')";
    for sql in [reordered, of_others] {
        let rows = world.psql("receiver", sql).await?;
        ensure!(rows == ["0"], "{sql}: {}", rows.join(""));
    }
    let left = world.psql("invoices", "select count(*) from weft.outbox").await?;
    ensure!(left == ["0"], "{} rows wait in the outbox", left.join(""));
    Ok(())
}

async fn a_person_sees_it(world: &Scenario) -> Result<()> {
    let weft = async |args: &[&str]| {
        let exec = ["exec", "--namespace", &world.namespace, "deployment/invoices-relay", "--", "weft", "relay"];
        kubectl(&[&exec, args].concat()).await
    };
    let listed = weft(&["list"]).await?;
    ensure!(listed.lines().count() == 2 && listed.contains("Dead") && listed.contains("422"), "{listed}");
    dead_letters(world, 1).await?;
    let purged = weft(&["purge", "--all"]).await?;
    ensure!(purged.trim() == "1 event is deleted", "{purged}");
    dead_letters(world, 0).await
}

/// With its OutboxRelay goes the replication slot, so that the server keeps no log for it, and nothing of the service.
async fn deleted(world: &Scenario) -> Result<()> {
    let slots = "select count(*) from pg_replication_slots";
    ensure!(world.psql("invoices", slots).await? == ["1"], "the relay reads the transaction log");
    let pods = world.pods("invoices", "service").await?;
    kubectl(&["delete", "outboxrelay", "invoices", "--namespace", &world.namespace]).await?;
    world
        .until("the replication slot is removed", Duration::from_mins(2), async || {
            let rows = world.psql("invoices", slots).await?;
            ensure!(rows == ["0"], "{} slots are there", rows.join(""));
            Ok(Some(()))
        })
        .await?;
    let names = |pods: &[Pod]| pods.iter().map(ResourceExt::name_any).collect::<Vec<_>>();
    ensure!(names(&pods) == names(&world.pods("invoices", "service").await?), "the service's pods were replaced");
    world.ready::<Microservice>("invoices").await
}

async fn dead_letters(world: &Scenario, count: i64) -> Result<()> {
    world
        .until("the status counts dead letters", SOON, async || {
            let status = world.get::<OutboxRelay>("invoices").await?.and_then(|relay| relay.status).unwrap_or_default();
            ensure!(status.dead_letters == count, "status.deadLetters is {}", status.dead_letters);
            ensure!(status.sink.as_deref() == Some("http"), "status.sink is {:?}", status.sink);
            Ok(Some(()))
        })
        .await
}
