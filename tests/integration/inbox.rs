//! `weft inbox`: what a service gets, and what becomes of what it does not handle.

use std::{
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

use serde_json::Value;
use weft::contract::problem::ProblemReason;

use crate::{
    inbox_harness::{World, of},
    servers,
};

fn pairs(effects: &[(&str, u64)]) -> Vec<(String, u64)> {
    effects.iter().map(|(aggregate, number)| ((*aggregate).to_owned(), *number)).collect()
}

#[tokio::test]
async fn an_event_is_a_cloud_event_over_http() {
    let mut world = World::new(1).await;
    world.subscribe("events");
    let (_relay, inbox) = (world.publisher.start_relay(), world.start_inbox());
    world.publish(&[("ä b", r#"{"n": 1}"#), ("ä b", r#"{"n": 2}"#)]).await;
    assert_eq!(world.until_effects("events", 2).await, pairs(&[("ä b", 1), ("ä b", 2)]));
    let headers = world.behaviour.headers.lock().unwrap().clone();
    for (name, value) in [
        ("ce-id", "%C3%A4%20b-2"),
        ("ce-specversion", "1.0"),
        ("ce-source", "/shop/orders"),
        ("ce-type", "OrderChanged"),
        ("ce-subject", "%C3%A4%20b"),
        ("ce-correlationid", "%C3%A4%20b-2"),
        ("content-type", "application/json"),
    ] {
        assert_eq!(headers.get(name).map(|value| value.to_str().unwrap()), Some(value), "{name}");
    }
    assert!(!headers.contains_key("ce-datacontenttype"));
    let is_done = |status: &weft::contract::status::InboxStatus| {
        status.ready && of(status, "events").is_some_and(|numbers| numbers.consumed == 2 && numbers.waiting == 0)
    };
    let status = inbox.until("two events are consumed", is_done).await;
    assert!(status.leading && status.problems.is_empty(), "{status:?}");
}

#[tokio::test]
async fn a_function_handles_an_event_in_one_transaction_with_its_receipt() {
    let mut world = World::new(1).await;
    world.subscribe_function("orders", "on_order");
    let (_relay, inbox) = (world.publisher.start_relay(), world.start_inbox());
    world.publish(&[("1", r#"{"n": 1}"#), ("2", r#"{"n": 1, "refuse": true}"#)]).await;
    inbox
        .until("one is handled, one is refused", |status| {
            of(status, "orders").is_some_and(|numbers| (numbers.consumed, numbers.dead_letters) == (1, 1))
        })
        .await;
    let client = world.database.superuser().await;
    let row = client.query_one("select consumer, message_id from weft.inbox", &[]).await.unwrap();
    assert_eq!((row.get::<_, &str>(0), row.get::<_, &str>(1)), ("orders", "/shop/orders 1-1"));
    let context: Value = client.query_one("select context from weft.outbox", &[]).await.unwrap().get(0);
    assert_eq!(context, serde_json::json!({"correlationid": "1-1", "causationid": "/shop/orders/1-1"}));
    let listed = world.dead(&["list"]).unwrap();
    assert!(listed.contains("no such customer") && listed.contains("2-1"), "{listed}");
}

#[tokio::test]
async fn an_event_that_always_fails_holds_its_aggregate_only_and_becomes_a_dead_letter() {
    let mut world = World::new(1).await;
    world.subscribe("events").max_attempts = 6;
    world.behaviour.answers.lock().unwrap().insert("poison".to_owned(), 500);
    let (_relay, inbox) = (world.publisher.start_relay(), world.start_inbox());
    let poison: Vec<String> = (1..=3).map(|n| format!(r#"{{"n": {n}}}"#)).collect();
    world.publish(&poison.iter().map(|payload| ("poison", payload.as_str())).collect::<Vec<_>>()).await;
    // others are handled meanwhile, so its failures count
    let mut other = 0;
    let dead = async || {
        other += 1;
        world.publish(&[("other", &format!(r#"{{"n": {other}}}"#))]).await;
        inbox
            .status()
            .await
            .is_some_and(|status| of(&status, "events").is_some_and(|numbers| numbers.dead_letters >= 1))
    };
    servers::within(Duration::from_mins(1), "the event is given up", dead).await;
    world.until_effects("events", 1).await;
    let status = inbox.status().await.unwrap();
    let of_reason = |reason| status.problems.iter().find(|problem| problem.reason == reason);
    assert!(of_reason(ProblemReason::DeadLetters).unwrap().message.contains("poison-1"), "{status:?}");
    assert!(status.ready, "others are handled: {status:?}");

    // a person lists it, the service is corrected, and it is delivered behind those that wait
    let listed: Vec<Value> = serde_json::from_str(&world.dead(&["list", "-o", "json"]).unwrap()).unwrap();
    let dead = listed.iter().find(|event| event["state"] == "Dead").unwrap();
    assert_eq!((&dead["id"], &dead["attempts"]), (&"poison-1".into(), &6.into()), "{listed:?}");
    assert!(dead["cause"].as_str().unwrap().starts_with("HTTP 500"), "{dead}");
    let shown: Value = serde_json::from_str(&world.dead(&["show", "poison-1", "-o", "json"]).unwrap()).unwrap();
    assert_eq!((&shown["data"]["n"], &shown["attributes"]["subject"]), (&1.into(), &"poison".into()));
    world.behaviour.answers.lock().unwrap().clear();
    assert_eq!(world.dead(&["retry", "poison-1"]).unwrap(), "1 event is to be delivered again\n");
    let of_poison = async || {
        let effects = world.effects("events").await;
        let numbers: Vec<_> = effects.iter().filter(|(aggregate, _)| aggregate == "poison").map(|(_, n)| *n).collect();
        numbers == [2, 3, 1]
    };
    servers::within(Duration::from_mins(1), "the retried event comes behind those that waited", of_poison).await;
    inbox
        .until("nothing is held", |status| {
            of(status, "events").is_some_and(|numbers| (numbers.held, numbers.dead_letters) == (0, 0))
                && status.problems.is_empty()
        })
        .await;
    assert!(world.dead(&["retry", "poison-1"]).unwrap_err().contains("there is no such event"));
}

#[tokio::test]
async fn what_a_service_refuses_for_good_is_a_dead_letter_at_once_and_can_be_purged() {
    let mut world = World::new(1).await;
    world.subscribe("events");
    world.behaviour.answers.lock().unwrap().insert("bad".to_owned(), 422);
    let (_relay, inbox) = (world.publisher.start_relay(), world.start_inbox());
    world.publish(&[("bad", r#"{"n": 1}"#), ("bad", r#"{"n": 2}"#), ("good", r#"{"n": 1}"#)]).await;
    world.until_effects("events", 1).await;
    inbox
        .until("both are given up", |status| of(status, "events").is_some_and(|numbers| numbers.dead_letters == 2))
        .await;
    assert_eq!(world.behaviour.requests.lock().unwrap()["events"], 3, "none is repeated");
    assert_eq!(world.dead(&["purge", "--all"]).unwrap(), "2 events are deleted\n");
    assert!(world.dead(&["list"]).unwrap().starts_with("no event is refused"));
}

#[tokio::test]
async fn a_path_that_does_not_exist_stops_its_subscription_and_no_other() {
    let mut world = World::new(1).await;
    world.subscribe("events").max_attempts = 2;
    world.subscribe("missing").max_attempts = 2;
    world.behaviour.answers.lock().unwrap().insert("missing".to_owned(), 404);
    let (_relay, inbox) = (world.publisher.start_relay(), world.start_inbox());
    let events: Vec<(String, String)> = (0..40).map(|n| (format!("a{n}"), r#"{"n": 1}"#.to_owned())).collect();
    world.publish(&events.iter().map(|(a, p)| (a.as_str(), p.as_str())).collect::<Vec<_>>()).await;
    world.until_effects("events", 40).await;
    let status = inbox.until("the problem is reported", |status| !status.problems.is_empty() && !status.ready).await;
    let problem = &status.problems[0];
    assert_eq!(problem.reason, ProblemReason::DeliveryFailing);
    assert!(problem.message.contains("subscription missing") && problem.message.contains("404"), "{problem:?}");
    tokio::time::sleep(Duration::from_secs(3)).await;
    let requests = world.behaviour.requests.lock().unwrap()["missing"];
    assert!(requests < 100, "{requests} requests to a path that does not exist");
    let numbers = of(&inbox.status().await.unwrap(), "missing").unwrap().clone();
    assert_eq!(numbers.dead_letters, 0, "it is no event's fault");
    world.behaviour.answers.lock().unwrap().clear();
    world.until_effects("missing", 40).await;
    inbox.until("it is resolved", |status| status.ready && status.problems.is_empty()).await;
}

#[tokio::test]
async fn a_stream_that_does_not_exist_yet_is_waited_for_and_read_from_its_begin() {
    let mut world = World::new(1).await;
    world.subscribe("events");
    let inbox = world.start_inbox();
    let status = inbox.until("it waits", |status| !status.problems.is_empty()).await;
    assert_eq!(status.problems[0].reason, ProblemReason::StreamMissing);
    assert!(status.ready, "nothing is wrong: {status:?}");
    let _relay = world.publisher.start_relay();
    world.publish(&[("1", r#"{"n": 1}"#)]).await;
    world.until_effects("events", 1).await;
    inbox.until("it is resolved", |status| status.problems.is_empty()).await;
}

#[tokio::test]
async fn what_is_no_event_is_a_dead_letter_with_that_sentence() {
    let mut world = World::new(1).await;
    world.subscribe("events");
    let (_relay, inbox) = (world.publisher.start_relay(), world.start_inbox());
    world.publish(&[("1", r#"{"n": 1}"#)]).await;
    world.until_effects("events", 1).await;
    let jetstream = world.publisher.jetstream().await;
    jetstream.publish("events.shop.orders.order.Odd", "{}".into()).await.unwrap().await.unwrap();
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("ce-specversion", "2.0");
    headers.insert("ce-id", "new");
    jetstream.publish_with_headers("events.shop.orders.order.New", headers, "{}".into()).await.unwrap().await.unwrap();
    // another service's event on the same stream is nobody's business
    jetstream.publish("events.shop.customers.customer.Odd", "{}".into()).await.unwrap().await.unwrap();
    world.publish(&[("1", r#"{"n": 2}"#)]).await;
    world.until_effects("events", 2).await;
    inbox
        .until("both are given up", |status| of(status, "events").is_some_and(|numbers| numbers.dead_letters == 2))
        .await;
    let listed = world.dead(&["list"]).unwrap();
    assert!(listed.contains("it is no CloudEvent: it has no specversion"), "{listed}");
    assert!(listed.contains("it is a CloudEvent of version 2.0, and this version of weft reads 1.0"), "{listed}");
}

#[tokio::test]
async fn events_from_before_the_subscription_are_not_delivered_and_its_position_outlives_it() {
    let mut world = World::new(1).await;
    let _relay = world.publisher.start_relay();
    world.publish(&[("1", r#"{"n": 1}"#)]).await;
    world.publisher.drained().await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    world.subscribe("events").since = Some(jiff::Timestamp::now());
    world.publish(&[("1", r#"{"n": 2}"#)]).await;
    let mut inbox = world.start_inbox();
    assert_eq!(world.until_effects("events", 1).await, pairs(&[("1", 2)]));
    inbox.terminate().await;
    world.publish(&[("1", r#"{"n": 3}"#)]).await;
    let _inbox = world.start_inbox();
    assert_eq!(world.until_effects("events", 2).await, pairs(&[("1", 2), ("1", 3)]));
    assert_eq!(world.behaviour.requests.lock().unwrap()["events"], 2, "nothing came twice");
}

#[tokio::test]
async fn the_next_inbox_goes_on_at_once_and_waits_for_what_is_under_way() {
    let mut world = World::new(1).await;
    world.subscribe("events");
    let _relay = world.publisher.start_relay();
    let mut first = world.start_inbox();
    first.until("leading", |status| status.leading).await;
    let second = world.start_inbox();
    second.until("standing by", |status| status.ready && !status.leading).await;
    world.publish(&[("1", r#"{"n": 1}"#)]).await;
    world.until_effects("events", 1).await;
    world.behaviour.slow.store(true, Relaxed);
    let app = world.publisher.database.app().await;
    let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload)
        select 'order', (n % 20)::text, 'OrderChanged', jsonb_build_object('n', n) from generate_series(1, 400) as n";
    app.batch_execute(insert).await.unwrap();
    world.until_effects("events", 50).await;
    let began = Instant::now();
    first.terminate().await;
    let ended = Instant::now();
    second.until("leading", |status| status.leading).await;
    println!("ended after {:?}, the next one leads {:?} later", ended - began, ended.elapsed());
    world.until_effects("events", 401).await;
    let requests = world.behaviour.requests.lock().unwrap()["events"];
    assert_eq!(requests, 401, "nothing came twice");
}
