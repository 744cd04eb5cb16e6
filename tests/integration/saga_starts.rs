//! Sagas that are started by events of a real NATS JetStream.

use async_nats::{HeaderMap, jetstream};
use futures::StreamExt;
use serde_json::json;
use weft::contract::{orchestrator::Start, relay::NatsSink};

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

/// Where the relays of the tests publish.
pub fn published(nats: &Nats) -> NatsSink {
    NatsSink {
        servers: vec![nats.url()],
        secret_folder: None,
        inbox_prefix: None,
        stream: "events".into(),
        subject: "events.{namespace}.{service}.{aggregate_type}.{type}".into(),
        max_age_seconds: 0,
    }
}

fn order_created(nats: &Nats, since: Option<jiff::Timestamp>) -> Start {
    let from = published(nats);
    Start { saga: "order".into(), service: "orders".into(), event_type: "OrderCreated".into(), since, from }
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

/// The consumers of the stream, by name.
async fn consumers(stream: &jetstream::stream::Stream) -> Vec<jetstream::consumer::Info> {
    let mut all: Vec<_> = stream.consumers().map(Result::unwrap).collect().await;
    all.sort_by(|a, b| a.name.cmp(&b.name));
    all
}

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
    let consumers = consumers(&stream).await;
    assert_eq!(consumers.len(), 1);
    assert_eq!(consumers[0].config.filter_subject, "events.shop.orders.*.OrderCreated");
    assert_eq!(consumers[0].delivered.consumer_sequence, 2, "nothing else was read");
    assert_eq!(consumers[0].config.metadata["weft.dev/namespace"], "shop");
}

/// The events that waited meanwhile start it, whatever its new creation time and whatever its consumer.
#[tokio::test(flavor = "multi_thread")]
async fn a_saga_that_is_deleted_and_applied_again_continues_where_it_was() {
    let world = World::new().await;
    let nats = Nats::start();
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    let stream = make_stream(&context).await;
    publish(&context, "/shop/orders", "OrderCreated", "old", &order_data("old")).await;
    let since = jiff::Timestamp::now();
    let contract = world.contract(vec![world.definition("order")], vec![order_created(&nats, Some(since))]);
    let mut orchestrator = world.run(contract.clone()).await;
    publish(&context, "/shop/orders", "OrderCreated", "e-1", &order_data("o-1")).await;
    orchestrator.until_counts("order", &[("completed", 1), ("running", 0)]).await;
    let mut draining = contract.clone();
    draining.draining = vec!["order".to_owned()];
    orchestrator.rewrite(draining);
    servers::until("its consumer is deleted", async || consumers(&stream).await.is_empty()).await;
    publish(&context, "/shop/orders", "OrderCreated", "e-2", &order_data("o-2")).await;
    let mut again = contract.clone();
    again.starts[0].since = Some(jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1));
    orchestrator.rewrite(again.clone());
    orchestrator.until_counts("order", &[("completed", 2), ("running", 0)]).await;
    assert_eq!(reserved(&world), ["o-1", "o-2"]);

    // another event starts it now: the consumer of the first is swept
    let first = consumers(&stream).await.remove(0).name;
    again.starts[0].event_type = "OrderPaid".to_owned();
    orchestrator.rewrite(again);
    servers::until("the other consumer is alone", async || {
        let names: Vec<_> = consumers(&stream).await.into_iter().map(|consumer| consumer.name).collect();
        names.len() == 1 && names[0] != first
    })
    .await;

    // a stream that is made again counts from 1 again
    orchestrator.kill9();
    context.delete_stream("events").await.unwrap();
    make_stream(&context).await;
    publish(&context, "/shop/orders", "OrderCreated", "e-3", &order_data("o-3")).await;
    orchestrator.rewrite(contract);
    orchestrator.start();
    orchestrator.until_counts("order", &[("completed", 3), ("running", 0)]).await;
    assert_eq!(reserved(&world), ["o-1", "o-2", "o-3"]);
}

/// The database is a backup from before the last event: what it does not know is started, what it knows is not.
#[tokio::test(flavor = "multi_thread")]
async fn a_restored_database_starts_what_came_after_its_backup() {
    let world = World::new().await;
    let nats = Nats::start();
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    make_stream(&context).await;
    let contract = world.contract(vec![world.definition("order")], vec![order_created(&nats, None)]);
    let mut orchestrator = world.run(contract).await;
    publish(&context, "/shop/orders", "OrderCreated", "e-1", &order_data("o-1")).await;
    orchestrator.until_counts("order", &[("completed", 1), ("running", 0)]).await;
    let client = world.database.superuser().await;
    let backup =
        "create table kept_instance as table weft.saga_instance; create table kept_event as table weft.saga_event";
    client.batch_execute(backup).await.unwrap();
    publish(&context, "/shop/orders", "OrderCreated", "e-2", &order_data("o-2")).await;
    orchestrator.until_counts("order", &[("completed", 2), ("running", 0)]).await;
    orchestrator.terminate().await;
    let restore = "delete from weft.saga_instance; insert into weft.saga_instance table kept_instance;
         delete from weft.saga_event; insert into weft.saga_event table kept_event;
         update weft.saga_count set completed = 1; update weft.saga_start set next = 2";
    client.batch_execute(restore).await.unwrap();
    orchestrator.start();
    orchestrator.until_counts("order", &[("completed", 2), ("running", 0)]).await;
    assert_eq!(reserved(&world), ["o-1", "o-2", "o-2"]);
    let list = orchestrator.get("/sagas/order?state=completed").await.1;
    for item in list["items"].as_array().unwrap() {
        let effects = world.participant.effects(item["id"].as_str().unwrap());
        assert_eq!(effects, ["reserve do", "pack do", "charge do", "ship do"], "the barriers know the repeated calls");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clusters_at_one_broker_each_see_every_event() {
    let (one, other) = (World::new().await, World::new().await);
    let nats = Nats::start();
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    let stream = make_stream(&context).await;
    let mut running = Vec::new();
    for world in [&one, &other] {
        let contract = world.contract(vec![world.definition("order")], vec![order_created(&nats, None)]);
        running.push(world.run(contract).await);
    }
    for number in 0..10 {
        publish(&context, "/shop/orders", "OrderCreated", &format!("e-{number}"), &order_data("o")).await;
    }
    for orchestrator in &running {
        orchestrator.until_counts("order", &[("completed", 10), ("running", 0)]).await;
    }
    assert_eq!(consumers(&stream).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_consumer_of_another_subject_template_reads_what_was_published_under_that_one() {
    let world = World::new().await;
    let nats = Nats::start();
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    let stream = make_stream(&context).await;
    let mut contract = world.contract(vec![world.definition("order")], vec![order_created(&nats, None)]);
    let sink = &mut contract.starts[0].from;
    let template = std::mem::replace(&mut sink.subject, "events.{header:a}.{header:b}.order.{type}".to_owned());
    let mut orchestrator = world.run(contract.clone()).await;
    let filter = async || consumers(&stream).await.first().map(|consumer| consumer.config.filter_subject.clone());
    servers::until("it reads", async || filter().await.as_deref() == Some("events.*.*.order.OrderCreated")).await;
    orchestrator.kill9();
    publish(&context, "/shop/orders", "OrderCreated", "e-1", &order_data("o-1")).await;
    contract.starts[0].from.subject = template;
    orchestrator.rewrite(contract);
    orchestrator.start();
    orchestrator.until_counts("order", &[("completed", 1), ("running", 0)]).await;
    assert_eq!(filter().await.as_deref(), Some(""), "all subjects, until it has caught up");
    servers::until("it has caught up", async || {
        consumers(&stream).await.iter().all(|info| info.num_pending == 0 && info.num_ack_pending == 0)
    })
    .await;
    orchestrator.kill9();
    orchestrator.start();
    servers::until("it reads its own events only", async || {
        filter().await.as_deref() == Some("events.shop.orders.*.OrderCreated")
    })
    .await;
    publish(&context, "/shop/orders", "OrderCreated", "e-2", &order_data("o-2")).await;
    orchestrator.until_counts("order", &[("completed", 2), ("running", 0)]).await;
    assert_eq!(reserved(&world), ["o-1", "o-2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_was_never_seen_and_one_that_can_start_nothing_are_reported() {
    let world = World::new().await;
    let nats = Nats::start();
    let context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    make_stream(&context).await;
    publish(&context, "/shop/orders", "OrderPaid", "p-1", &order_data("paid")).await;
    let contract = world.contract(vec![world.definition("order")], vec![order_created(&nats, None)]);
    let orchestrator = world.run(contract).await;
    let report = async || orchestrator.status().await["sagas"]["order"]["start"].clone();
    servers::until("the types that there are are reported", async || {
        report().await == json!({"seen": false, "types": ["OrderPaid"], "dead": 0})
    })
    .await;
    publish(&context, "/shop/orders", "OrderCreated", "e-1", "not json").await;
    let subject = "events.shop.orders.order.OrderCreated";
    let plain = json!({"orderId": "o-1", "total": 1}).to_string();
    context.publish(subject, plain.clone().into()).await.unwrap().await.unwrap();
    let mut structured = HeaderMap::new();
    structured.insert("content-type", "application/cloudevents+json");
    context.publish_with_headers(subject, structured, "{".into()).await.unwrap().await.unwrap();
    let mut without_id = HeaderMap::new();
    without_id.insert("ce-source", "/shop/orders");
    without_id.insert("ce-type", "OrderCreated");
    context.publish_with_headers(subject, without_id, plain.into()).await.unwrap().await.unwrap();
    publish(&context, "/shop/orders", "OrderCreated", "e-2", &order_data("o-2")).await;
    orchestrator.until_counts("order", &[("completed", 1), ("running", 0)]).await;
    servers::until("they are counted", async || report().await == json!({"seen": true, "dead": 4})).await;
    assert_eq!(reserved(&world), ["o-2"]);
    assert!(orchestrator.metrics().await.contains("weft_saga_dead_starts{saga=\"order\"} 4"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_starts_one_saga_whatever_is_repeated() {
    let world = World::new().await;
    let mut nats = Nats::start();
    let mut start = order_created(&nats, None);
    // a subject without the namespace: events of others are delivered, and start nothing
    start.from.subject = "events.{header:a}.{header:b}.{aggregate_type}.{type}".to_owned();
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
    let structured = json!({
        "specversion": "1.0", "id": "e-5", "source": "/shop/orders", "type": "OrderCreated",
        "data": {"orderId": "o-5", "total": 1},
    });
    let mut headers = HeaderMap::new();
    headers.insert("content-type", "application/cloudevents+json");
    let subject = "events.shop.orders.order.OrderCreated";
    stream.publish_with_headers(subject, headers, structured.to_string().into()).await.unwrap().await.unwrap();
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
