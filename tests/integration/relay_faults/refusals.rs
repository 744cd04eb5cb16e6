//! An event that the broker refuses stops its own key and nothing else.

use async_nats::jetstream::stream::DiscardPolicy;
use weft::contract::{problem::ProblemReason, relay::Mode, status::RelayStatus};

use super::{MODES, SOON, confirmed, has, insert, numbers, started, stored, taking, wal_position};
use crate::{
    database,
    relay_harness::{Setting, Tap},
};

/// An event of `bytes`, which is more than NATS accepts.
async fn insert_large(client: &tokio_postgres::Client, aggregate: &str, bytes: i32) {
    let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         values ('order', $1, 'Changed', jsonb_build_object('n', 0, 'x', repeat('x', $2)))";
    client.execute(insert, &[&aggregate, &bytes]).await.unwrap();
}

#[tokio::test]
async fn an_event_that_is_larger_than_all_buffers_stops_its_aggregate_only() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        let app = setting.database.app().await;
        let relay = started(&setting).await;
        insert_large(&app, "a", 17 << 20).await;
        insert(&app, "order", "a", [1]).await;
        insert(&app, "order", "b", [1]).await;
        stored(&setting, SOON, 1).await;
        assert_eq!(numbers(&setting, "b").await, [1], "{mode:?}");
        relay.within(SOON, "refused by name", |status| has(status, ProblemReason::EventRefused)).await;
        let superuser = setting.database.superuser().await;
        superuser.batch_execute("delete from weft.outbox where pg_column_size(payload) > 100000").await.unwrap();
        setting.drained().await;
        assert_eq!(numbers(&setting, "a").await, [1], "{mode:?}");
        relay.until("resolved", |status| status.problems.is_empty()).await;
    }
}

#[tokio::test]
async fn nine_thousand_refused_events_stop_no_other_subject_and_come_in_order_once_the_stream_takes_them() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        let context = setting.jetstream().await;
        let mut config = taking(&["events.>"]);
        config.discard = DiscardPolicy::New;
        config.discard_new_per_subject = true;
        config.max_messages_per_subject = 1;
        context.create_stream(config.clone()).await.unwrap();
        let relay = started(&setting).await;
        let superuser = setting.database.superuser().await;
        let many = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
             select 'order', (n % 3000)::text, 'Changed', jsonb_build_object('n', n) from generate_series(1, 9001) n";
        superuser.batch_execute(many).await.unwrap();
        stored(&setting, SOON, 1).await;
        insert(&superuser, "customer", "b", [1]).await;
        stored(&setting, SOON, 2).await;
        relay.within(SOON, "refused", |status| has(status, ProblemReason::EventRefused) && status.ready).await;
        config.max_messages_per_subject = -1;
        config.discard_new_per_subject = false;
        config.discard = DiscardPolicy::Old;
        context.update_stream(config).await.unwrap();
        setting.drained().await;
        let delivered = setting.delivered().await;
        assert_eq!(delivered.len(), 9002, "{mode:?}");
        let of_one: Vec<u64> =
            delivered.iter().filter(|event| event.aggregate == "7").map(|event| event.number).collect();
        assert_eq!(of_one, [7, 3007, 6007], "{mode:?}");
    }
}

#[tokio::test]
async fn twenty_thousand_events_behind_a_refused_one_stop_no_other_aggregate() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        let superuser = setting.database.superuser().await;
        let relay = started(&setting).await;
        insert_large(&superuser, "hot", 2_000_000).await;
        relay.until("refused", |status| has(status, ProblemReason::EventRefused)).await;
        let behind = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
             select 'order', 'hot', 'Changed', jsonb_build_object('n', n) from generate_series(1, 20000) n";
        superuser.batch_execute(behind).await.unwrap();
        insert(&superuser, "order", "b", [1]).await;
        stored(&setting, SOON, 1).await;
        relay.within(SOON, "they are counted", |status| status.pending == 20_001 && status.ready).await;
        superuser.batch_execute("delete from weft.outbox where pg_column_size(payload) > 10000").await.unwrap();
        setting.drained().await;
        assert!(numbers(&setting, "hot").await.into_iter().eq(1..=20_000), "{mode:?}");
    }
}

#[tokio::test]
async fn a_full_stream_stops_everybody_and_so_the_relay_is_not_ready() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        let context = setting.jetstream().await;
        let mut config = taking(&["events.>"]);
        (config.discard, config.max_messages) = (DiscardPolicy::New, 1);
        context.create_stream(config.clone()).await.unwrap();
        let relay = started(&setting).await;
        let app = setting.database.app().await;
        for aggregate in ["a", "b", "c"] {
            insert(&app, "order", aggregate, [1, 2]).await;
        }
        relay.within(SOON, "not ready", |status| !status.ready && has(status, ProblemReason::PublishFailing)).await;
        assert_eq!(relay.get("/readyz").await.unwrap().0, 503, "{mode:?}");
        config.max_messages = -1;
        context.update_stream(config).await.unwrap();
        setting.drained().await;
        relay.until("resolved", |status| status.ready && status.problems.is_empty()).await;
        for aggregate in ["a", "b", "c"] {
            assert_eq!(numbers(&setting, aggregate).await, [1, 2], "{mode:?}");
        }
    }
}

#[tokio::test]
async fn a_stream_that_takes_nothing_any_more_makes_the_relay_not_ready() {
    let setting = Setting::new(Mode::LogTailing).await;
    let context = setting.jetstream().await;
    let mut config = taking(&["events.>"]);
    context.create_stream(config.clone()).await.unwrap();
    let relay = started(&setting).await;
    config.sealed = true;
    context.update_stream(config).await.unwrap();
    let app = setting.database.app().await;
    for aggregate in ["a", "b", "c"] {
        insert(&app, "order", aggregate, [1]).await;
    }
    relay.within(SOON, "not ready", |status| !status.ready && !status.problems.is_empty()).await;
}

#[tokio::test]
async fn a_stream_that_accepts_no_event_of_anybody_makes_the_relay_not_ready() {
    let setting = Setting::new(Mode::LogTailing).await;
    let context = setting.jetstream().await;
    context.create_stream(taking(&["events.of.others.>"])).await.unwrap();
    let mut relay = started(&setting).await;
    let app = setting.database.app().await;
    for aggregate in ["a", "b", "c", "d"] {
        insert(&app, "order", aggregate, [1]).await;
    }
    let failing = |status: &RelayStatus| !status.ready && has(status, ProblemReason::PublishFailing);
    relay.within(SOON, "not ready", failing).await;
    relay.kill9();
    let relay = setting.start_relay();
    relay.until("not ready after a restart", failing).await;
    context.update_stream(taking(&["events.>"])).await.unwrap();
    setting.drained().await;
    relay.until("resolved", |status| status.ready && status.problems.is_empty()).await;
}

#[tokio::test]
async fn the_position_moves_past_a_refused_event_and_a_restart_publishes_nothing_again() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        setting.jetstream().await.create_stream(taking(&["events.*.*.customer.>"])).await.unwrap();
        let superuser = setting.database.superuser().await;
        let mut relay = started(&setting).await;
        insert(&superuser, "order", "1", 1..=3).await;
        insert(&superuser, "customer", "c", 1..=50).await;
        stored(&setting, SOON, 50).await;
        database::until(&superuser, "select count(*) = 3 from weft.outbox").await;
        if mode == Mode::LogTailing {
            let written = wal_position(&superuser).await;
            confirmed(&superuser, SOON * 2, &written).await;
        }
        let tap = Tap::start(&setting).await;
        relay.kill9();
        let relay = started(&setting).await;
        insert(&superuser, "order", "1", [4]).await;
        insert(&superuser, "customer", "c", 51..=55).await;
        stored(&setting, SOON, 55).await;
        relay.within(SOON, "still refused", |status| has(status, ProblemReason::EventRefused)).await;
        let again = tap.all().into_iter().filter(|passed| passed.event.aggregate == "c" && passed.event.number <= 50);
        assert_eq!(again.count(), 0, "{mode:?}: events that were published before the restart");
        let subjects = taking(&["events.*.*.customer.>", "events.*.*.order.>"]);
        setting.jetstream().await.update_stream(subjects).await.unwrap();
        setting.drained().await;
        assert_eq!(numbers(&setting, "1").await, [1, 2, 3, 4], "{mode:?}");
        relay.until("resolved", |status| status.problems.is_empty() && status.published == 59).await;
    }
}

#[tokio::test]
async fn no_value_of_a_row_is_said_of_events_that_are_refused() {
    let setting = Setting::new(Mode::LogTailing).await;
    setting.jetstream().await.create_stream(taking(&["events.*.*.large.>"])).await.unwrap();
    let relay = started(&setting).await;
    let superuser = setting.database.superuser().await;
    // a subject that the stream does not accept, a long subject, long headers, a large payload
    for (kind, name, header, payload) in
        [("secret-kind", 1, 1, 1), ("large", 5000, 1, 1), ("large", 1, 70_000, 1), ("large", 1, 1, 2_000_000)]
    {
        let insert = format!(
            "insert into weft.outbox (aggregate_type, aggregate_id, type, payload, headers) values \
             ('{kind}', 'secret-aggregate', repeat('secret-type', {name}), \
              jsonb_build_object('secret-payload', repeat('x', {payload})), \
              jsonb_build_object('secretheader', repeat('secret-value', {header})))"
        );
        superuser.batch_execute(&insert).await.unwrap();
        relay.within(SOON, "refused", |status| has(status, ProblemReason::EventRefused)).await;
        for path in ["/status", "/metrics", "/readyz", "/livez"] {
            let (_, text) = relay.get(path).await.unwrap();
            assert!(!text.contains("secret"), "{path}: {text}");
        }
        let log = relay.log();
        assert!(log.contains("EventRefused") && !log.contains("secret"), "{log}");
        superuser.batch_execute("delete from weft.outbox").await.unwrap();
        relay.until("skipped", |status| !has(status, ProblemReason::EventRefused)).await;
    }
}
