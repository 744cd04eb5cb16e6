//! Sagas that are started by events of a real NATS JetStream.

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
    let subject = format!("events{}.order.{kind}", source.replace('/', "."));
    stream.publish_with_headers(subject, headers, data.to_owned().into()).await.unwrap().await.unwrap();
}

async fn make_stream(context: &jetstream::Context) -> jetstream::stream::Stream {
    let config =
        jetstream::stream::Config { name: "events".into(), subjects: vec!["events.>".into()], ..Default::default() };
    context.create_stream(config).await.unwrap()
}

fn order_created(nats: &Nats, since: Option<jiff::Timestamp>) -> Start {
    let sink = NatsSink {
        url: nats.url(),
        credentials_file: None,
        stream: "events".into(),
        subject: "events.{namespace}.{service}.{aggregate_type}.{type}".into(),
        max_age_seconds: 0,
    };
    Start {
        saga: "order".into(),
        service: "orders".into(),
        event_type: "OrderCreated".into(),
        since,
        from: Sink::Nats(sink),
    }
}

fn order_data(order: &str) -> String {
    json!({"orderId": order, "total": 1}).to_string()
}

/// The orders for which a saga has called its first step, in order of their names.
fn reserved(world: &World) -> Vec<String> {
    let calls = world.participant.calls("reserve");
    let mut orders: Vec<_> = calls.iter().map(|(body, _)| body["order"].as_str().unwrap().to_owned()).collect();
    orders.sort();
    orders
}

const CONSUMER: &str = "weft-saga_shop_default_order_OrderCreated";

#[tokio::test(flavor = "multi_thread")]
async fn events_older_than_the_saga_start_nothing() {
    let world = World::new().await;
    let nats = Nats::start();
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    let stream = make_stream(&context).await;
    for number in 0..20 {
        publish(&context, "/shop/orders", "OrderCreated", &format!("old-{number}"), &order_data("old")).await;
    }
    let since = jiff::Timestamp::now();
    let contract = world.contract(vec![world.definition("order")], vec![order_created(&nats, Some(since))]);
    let orchestrator = world.run(contract).await;
    publish(&context, "/shop/orders", "OrderPaid", "p-1", &order_data("paid")).await;
    publish(&context, "/delivery/orders", "OrderCreated", "d-1", &order_data("another namespace's")).await;
    publish(&context, "/shop/orders", "OrderCreated", "e-1", &order_data("o-1")).await;
    orchestrator.until_counts("order", &[("completed", 1), ("running", 0)]).await;
    publish(&context, "/shop/orders", "OrderCreated", "e-2", &order_data("o-2")).await;
    orchestrator.until_counts("order", &[("completed", 2), ("running", 0)]).await;
    assert_eq!(reserved(&world), ["o-1", "o-2"]);
    let info = stream.consumer_info(CONSUMER).await.unwrap();
    assert_eq!(info.config.filter_subject, "events.shop.orders.*.OrderCreated");
    assert_eq!(info.delivered.consumer_sequence, 2, "nothing else was read");
}

/// Such a consumer may be left by an older version, or by a deleted Saga of the same name.
#[tokio::test(flavor = "multi_thread")]
async fn an_existing_consumer_keeps_its_position_and_skips_past_events() {
    let world = World::new().await;
    let nats = Nats::start();
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    let stream = make_stream(&context).await;
    let config = jetstream::consumer::pull::Config {
        durable_name: Some(CONSUMER.into()),
        filter_subject: "events.*.*.order.>".into(),
        ..Default::default()
    };
    stream.create_consumer(config).await.unwrap();
    publish(&context, "/shop/orders", "OrderCreated", "old", &order_data("old")).await;
    let since = jiff::Timestamp::now();
    let contract = world.contract(vec![world.definition("order")], vec![order_created(&nats, Some(since))]);
    let mut orchestrator = world.run(contract).await;
    publish(&context, "/shop/orders", "OrderCreated", "e-1", &order_data("o-1")).await;
    orchestrator.until_counts("order", &[("completed", 1), ("running", 0)]).await;
    assert_eq!(reserved(&world), ["o-1"]);
    let filter = async || stream.consumer_info(CONSUMER).await.unwrap().config.filter_subject;
    assert_eq!(filter().await, "", "all subjects, until it has caught up");
    servers::until("it has caught up", async || {
        let info = stream.consumer_info(CONSUMER).await.unwrap();
        info.num_pending == 0 && info.num_ack_pending == 0
    })
    .await;
    orchestrator.kill9();
    orchestrator.start();
    orchestrator.until_ready().await;
    servers::until("it reads its own events only", async || filter().await == "events.shop.orders.*.OrderCreated")
        .await;
    publish(&context, "/shop/orders", "OrderPaid", "p-1", &order_data("paid")).await;
    publish(&context, "/shop/orders", "OrderCreated", "e-2", &order_data("o-2")).await;
    orchestrator.until_counts("order", &[("completed", 2), ("running", 0)]).await;
    assert_eq!(reserved(&world), ["o-1", "o-2"]);
    assert_eq!(stream.consumer_info(CONSUMER).await.unwrap().delivered.consumer_sequence, 3, "nothing is read twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_starts_one_saga_whatever_is_repeated() {
    let world = World::new().await;
    let mut nats = Nats::start();
    let mut start = order_created(&nats, None);
    // a subject without the namespace: events of others are delivered, and start nothing
    let Sink::Nats(sink) = &mut start.from;
    sink.subject = "events.{header:a}.{header:b}.{aggregate_type}.{type}".to_owned();
    let contract = world.contract(vec![world.definition("order")], vec![start]);
    let mut orchestrator = world.run(contract).await;
    servers::until("the missing stream is reported", async || {
        orchestrator.status().await["problems"][0]["message"]
            .as_str()
            .is_some_and(|m| m.contains("stream `events` does not exist on NATS"))
    })
    .await;

    let client = async_nats::connect(nats.url()).await.unwrap();
    let stream = jetstream::new(client);
    make_stream(&stream).await;
    publish(&stream, "/shop/orders", "OrderCreated", "e-1", &order_data("o-1")).await;
    publish(&stream, "/shop/orders", "OrderCreated", "e-1", &order_data("o-1")).await;
    publish(&stream, "/other/orders", "OrderCreated", "e-2", &order_data("o-2")).await;
    publish(&stream, "/shop/orders", "OrderCancelled", "e-3", &order_data("o-3")).await;
    publish(&stream, "/shop/orders", "OrderCreated", "e-4", "not json").await;
    publish(&stream, "/shop/orders", "OrderCreated", "e-5", &order_data("o-5")).await;
    orchestrator.until_counts("order", &[("completed", 2), ("running", 0)]).await;
    servers::until("the problem is resolved", async || orchestrator.status().await.get("problems").is_none()).await;

    // events that were published while no orchestrator ran start sagas afterwards, each once
    orchestrator.kill9();
    publish(&stream, "/shop/orders", "OrderCreated", "e-5", &order_data("o-5")).await;
    publish(&stream, "/shop/orders", "OrderCreated", "e-6", &order_data("o-6")).await;
    orchestrator.start();
    orchestrator.until_counts("order", &[("completed", 3), ("running", 0)]).await;

    nats.kill9();
    nats.restart();
    let client = async_nats::connect(nats.url()).await.unwrap();
    publish(&jetstream::new(client), "/shop/orders", "OrderCreated", "e-7", &order_data("o-7")).await;
    orchestrator.until_counts("order", &[("completed", 4), ("running", 0)]).await;
    assert_eq!(reserved(&world), ["o-1", "o-5", "o-6", "o-7"]);
}

/// The start of the problem's message, up to the time, and the rest.
fn broker_problem(status: &serde_json::Value) -> Option<String> {
    let problems = status["problems"].as_array()?;
    let broker = problems.iter().find(|problem| problem["reason"] == "BrokerUnreachable")?;
    Some(broker["message"].as_str()?.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_broker_is_reported_within_five_seconds() {
    let world = World::new().await;
    let mut nats = Nats::start();
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    make_stream(&context).await;
    let contract = world.contract(vec![world.definition("order")], vec![order_created(&nats, None)]);
    let orchestrator = world.run(contract).await;
    publish(&context, "/shop/orders", "OrderCreated", "e-1", &order_data("o-1")).await;
    orchestrator.until_counts("order", &[("completed", 1), ("running", 0)]).await;
    for (signal, text) in [("-STOP", "has not answered since"), ("-KILL", "has not accepted connections since")] {
        let stopped = std::time::Instant::now();
        if signal == "-STOP" {
            nats.signal(signal);
        } else {
            nats.kill9();
        }
        let beginning = format!("NATS at {} {text} ", nats.address());
        servers::until(&beginning, async || {
            broker_problem(&orchestrator.status().await).is_some_and(|message| message.starts_with(&beginning))
        })
        .await;
        assert!(stopped.elapsed().as_secs() < 6, "reported after {:?}", stopped.elapsed());
        if signal == "-STOP" {
            nats.signal("-CONT");
        } else {
            nats.restart();
        }
        servers::until("the problem is resolved", async || orchestrator.status().await.get("problems").is_none()).await;
    }
    publish(&context, "/shop/orders", "OrderCreated", "e-2", &order_data("o-2")).await;
    orchestrator.until_counts("order", &[("completed", 2), ("running", 0)]).await;
}
