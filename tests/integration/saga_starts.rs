//! Sagas that are started by events, from a real NATS JetStream.

use async_nats::{HeaderMap, jetstream};
use serde_json::json;
use weft::contract::{
    orchestrator::Start,
    relay::{NatsSink, Sink},
};

use crate::{
    saga_world::World,
    servers::{self, Nats},
};

async fn publish(stream: &jetstream::Context, source: &str, kind: &str, id: &str, data: &str) {
    let mut headers = HeaderMap::new();
    headers.insert("ce-specversion", "1.0");
    headers.insert("ce-source", source);
    headers.insert("ce-type", kind);
    headers.insert("ce-id", id);
    let subject = format!("events.order.{kind}");
    stream.publish_with_headers(subject, headers, data.to_owned().into()).await.unwrap().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_starts_one_saga_whatever_is_repeated() {
    let world = World::new().await;
    let mut nats = Nats::start();
    let sink = NatsSink { url: nats.url(), stream: "events".into(), subject: "events.{aggregate_type}.{type}".into() };
    let start = Start {
        saga: "order".into(),
        event_source: "/shop/orders".into(),
        event_type: "OrderCreated".into(),
        from: Sink::Nats(sink),
    };
    let contract = world.contract(vec![world.definition("order")], vec![start]);
    let mut orchestrator = world.run(contract).await;
    servers::until("the missing stream is said in words", async || {
        orchestrator.status().await["problems"][0]["message"]
            .as_str()
            .is_some_and(|m| m.contains("stream `events` is not there yet"))
    })
    .await;

    let client = async_nats::connect(nats.url()).await.unwrap();
    let stream = jetstream::new(client);
    let config =
        jetstream::stream::Config { name: "events".into(), subjects: vec!["events.>".into()], ..Default::default() };
    stream.create_stream(config).await.unwrap();
    let data = |order: &str| json!({"orderId": order, "total": 1}).to_string();
    publish(&stream, "/shop/orders", "OrderCreated", "e-1", &data("o-1")).await;
    publish(&stream, "/shop/orders", "OrderCreated", "e-1", &data("o-1")).await;
    publish(&stream, "/other/orders", "OrderCreated", "e-2", &data("o-2")).await;
    publish(&stream, "/shop/orders", "OrderCancelled", "e-3", &data("o-3")).await;
    publish(&stream, "/shop/orders", "OrderCreated", "e-4", "not json").await;
    publish(&stream, "/shop/orders", "OrderCreated", "e-5", &data("o-5")).await;
    orchestrator.until_counts("order", &[("completed", 2), ("running", 0)]).await;
    servers::until("the problem is gone", async || orchestrator.status().await.get("problems").is_none()).await;

    // what was published while nobody listened is started afterwards, and nothing else again
    orchestrator.kill9();
    publish(&stream, "/shop/orders", "OrderCreated", "e-5", &data("o-5")).await;
    publish(&stream, "/shop/orders", "OrderCreated", "e-6", &data("o-6")).await;
    orchestrator.start();
    orchestrator.until_counts("order", &[("completed", 3), ("running", 0)]).await;

    nats.kill9();
    nats.restart();
    let client = async_nats::connect(nats.url()).await.unwrap();
    publish(&jetstream::new(client), "/shop/orders", "OrderCreated", "e-7", &data("o-7")).await;
    orchestrator.until_counts("order", &[("completed", 4), ("running", 0)]).await;
    let mut orders: Vec<_> = world.participant.calls("reserve").iter().map(|(body, _)| body["order"].clone()).collect();
    orders.sort_by_key(ToString::to_string);
    assert_eq!(orders, ["o-1", "o-5", "o-6", "o-7"]);
}
