//! `weft relay` in both modes: what it publishes, from where it continues, what it reports.

use weft::contract::{
    problem::ProblemReason,
    relay::{Format, Mode},
    status::RelayStatus,
};

use crate::{
    checker::check,
    relay_harness::{MODES, RELAY, Setting, Writers, confirmed, wal_position},
    servers::{SUPERUSER, SUPERUSER_PASSWORD},
};

fn url(setting: &Setting) -> String {
    setting.database.server.url(SUPERUSER, SUPERUSER_PASSWORD, crate::database::DATABASE)
}

#[tokio::test]
async fn an_event_carries_what_its_transaction_handled() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        let _relay = setting.start_relay();
        let app = setting.database.app().await;
        let insert = "insert into weft.outbox (id, aggregate_type, aggregate_id, type, payload) values";
        let receive = "select weft.receive('orders', '/shop/customers', '7', '5', '00-ab-cd-01')";
        let event = |id: &str| format!("{insert} ('{id}', 'order', '1', 'OrderApproved', '{{}}')");
        app.batch_execute(&format!("begin; {receive}; {}; commit; {}", event("a"), event("b"))).await.unwrap();
        setting.drained().await;
        let messages = setting.messages().await;
        let carried = messages.iter().map(|message| {
            let headers = message.headers.as_ref().unwrap();
            ["ce-correlationid", "ce-causationid", "ce-traceparent"]
                .map(|name| headers.get(name).map_or("", async_nats::HeaderValue::as_str))
        });
        let expected = [["5", "/shop/customers/7", "00-ab-cd-01"], ["b", "", ""]];
        assert_eq!(carried.collect::<Vec<_>>(), expected, "{mode:?}");
    }
}

#[tokio::test]
async fn a_row_becomes_a_cloud_event_in_both_modes() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        let relay = setting.start_relay();
        relay.until("leading", |status| status.leading && status.ready).await;
        let app = setting.database.app().await;
        let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload, headers) values \
             ('order', 'o 1', 'Order.Created', '{\"n\": 1}', '{\"correlationid\": \"s-1\", \"traceparent\": \"00-ab-cd-01\"}') \
             returning id::text";
        let id: String = app.query_one(insert, &[]).await.unwrap().get(0);
        setting.drained().await;
        let messages = setting.messages().await;
        assert_eq!(messages.len(), 1, "{mode:?}");
        let (message, headers) = (&messages[0], messages[0].headers.as_ref().unwrap());
        assert_eq!(message.subject.as_str(), "events.shop.orders.order.Order%2ECreated");
        assert_eq!(&message.payload[..], b"{\"n\": 1}");
        for (name, value) in [
            ("Nats-Msg-Id", &*format!("/shop/orders {id} 1")),
            ("ce-id", &id),
            ("ce-specversion", "1.0"),
            ("ce-source", "/shop/orders"),
            ("ce-type", "Order.Created"),
            ("ce-subject", "o%201"),
            ("ce-partitionkey", "order/o%201"),
            ("ce-correlationid", "s-1"),
            ("ce-traceparent", "00-ab-cd-01"),
            ("ce-datacontenttype", "application/json"),
            ("content-type", "application/json"),
        ] {
            assert_eq!(headers.get(name).map(async_nats::HeaderValue::as_str), Some(value), "{mode:?} {name}");
        }
        assert_eq!(headers.get("ce-sequence").unwrap().as_str().len(), 33);
        assert!(headers.get("ce-time").unwrap().as_str().ends_with('Z'));
        let status = relay.until("published", |status| status.published == 1 && status.pending == 0).await;
        assert!(status.problems.is_empty(), "{status:?}");
        assert_eq!(status.relay, RELAY);
        assert_eq!(relay.get("/readyz").await.unwrap().0, 200);
        assert_eq!(relay.get("/livez").await.unwrap().0, 200);
        let metrics = relay.get("/metrics").await.unwrap().1;
        assert!(metrics.contains("weft_relay_published_total 1"), "{metrics}");
        assert!(metrics.contains("weft_relay_leading 1"), "{metrics}");
    }
}

#[tokio::test]
async fn latency_is_measured_from_the_commit_in_the_log_and_from_created_at_in_the_table() {
    for (mode, is_old) in [(Mode::LogTailing, false), (Mode::Polling, true)] {
        let setting = Setting::new(mode).await;
        let relay = setting.start_relay();
        let client = setting.database.superuser().await;
        let reads_as_wished = match mode {
            Mode::LogTailing => "select exists (select from weft.relay_ledger where lsn is not null)",
            Mode::Polling => "select true",
        };
        crate::database::until(&client, reads_as_wished).await;
        assert_eq!(relay.until("leading", |status| status.leading && status.ready).await.latency, None);
        let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload, created_at) \
             values ('order', '1', 'New', '{}', now() - interval '2 hours')";
        client.batch_execute(insert).await.unwrap();
        let latency = relay.until("a latency", |status| status.latency.is_some()).await.latency.unwrap();
        assert!((latency.p50_seconds - latency.p99_seconds).abs() < f64::EPSILON, "of one event: {latency:?}");
        assert_eq!(latency.p50_seconds >= 7200.0, is_old, "{mode:?}: {latency:?}");
        let metrics = relay.get("/metrics").await.unwrap().1;
        assert!(metrics.contains("weft_relay_latency_seconds_count 1"), "{metrics}");
    }
}

#[tokio::test]
async fn the_format_of_messages_can_be_chosen_and_changed() {
    let mut setting = Setting::new(Mode::Polling).await;
    let relay = setting.start_relay();
    let formats = [Format::CloudEvents, Format::CloudEventsStructured, Format::Raw];
    for format in formats {
        setting.contract.format = format;
        setting.write_contract();
        let version = setting.contract.clone().seal().version;
        relay.until("the contract", |status| status.leading && status.ready && status.contract == version).await;
        let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) values ('order', '1', 'New', '{\"n\": 1}')";
        setting.database.app().await.batch_execute(insert).await.unwrap();
        setting.drained().await;
    }
    let messages = setting.messages().await;
    assert_eq!(messages.len(), formats.len());
    let header = |index: usize, name: &str| {
        messages[index].headers.as_ref().unwrap().get(name).map(|value| value.as_str().to_owned())
    };
    assert_eq!((&messages[0].payload[..], &messages[2].payload[..]), (&b"{\"n\": 1}"[..], &b"{\"n\": 1}"[..]));
    let structured: serde_json::Value = serde_json::from_slice(&messages[1].payload).unwrap();
    assert_eq!(
        (&structured["data"]["n"], &structured["source"], &structured["type"]),
        (&1.into(), &"/shop/orders".into(), &"New".into())
    );
    let content_types: Vec<String> = (0..3).filter_map(|index| header(index, "content-type")).collect();
    assert_eq!(content_types, ["application/json", "application/cloudevents+json", "application/json"]);
    assert_eq!(
        (header(1, "ce-id"), header(2, "ce-id"), header(2, "event-key")),
        (None, None, Some("order/1".to_owned()))
    );
    for (index, id) in [header(0, "ce-id"), structured["id"].as_str().map(str::to_owned), header(2, "event-id")]
        .into_iter()
        .enumerate()
    {
        let identity = format!("/shop/orders {} {}", id.unwrap(), index + 1);
        assert_eq!(header(index, "Nats-Msg-Id"), Some(identity));
    }
}

#[tokio::test]
async fn services_of_one_name_in_two_namespaces_share_a_stream_but_no_event_and_may_give_the_same_id() {
    let (shop, mut delivery) = (Setting::new(Mode::LogTailing).await, Setting::new(Mode::Polling).await);
    delivery.contract.namespace = "delivery".to_owned();
    delivery.contract.sink = shop.contract.sink.clone();
    delivery.write_contract();
    let insert = "insert into weft.outbox (id, aggregate_type, aggregate_id, type, payload) \
         values ('5f0c3b1e-0000-4000-8000-000000000001', 'order', '1', 'Changed', '{\"n\": 1}')";
    for setting in [&shop, &delivery] {
        let _relay = setting.start_relay();
        setting.database.app().await.batch_execute(insert).await.unwrap();
        setting.drained().await;
    }
    let sources = |messages: Vec<async_nats::Message>| -> Vec<String> {
        let source =
            |message: &async_nats::Message| message.headers.as_ref().unwrap().get("ce-source").unwrap().to_string();
        messages.iter().map(source).collect()
    };
    assert_eq!(sources(shop.messages().await), ["/shop/orders", "/delivery/orders"]);
    for (namespace, source) in [("shop", "/shop/orders"), ("delivery", "/delivery/orders")] {
        let filter = format!("events.{namespace}.orders.order.Changed");
        assert_eq!(sources(shop.messages_of(&filter).await), [source]);
    }
}

#[tokio::test]
async fn an_id_that_a_service_gives_twice_is_published_twice() {
    let setting = Setting::new(Mode::LogTailing).await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    for number in 1..=2 {
        let insert = format!(
            "insert into weft.outbox (id, aggregate_type, aggregate_id, type, payload) \
             values ('5f0c3b1e-0000-4000-8000-000000000001', 'order', '1', 'Changed', '{{\"n\": {number}}}')"
        );
        setting.database.app().await.batch_execute(&insert).await.unwrap();
        setting.drained().await;
    }
    let numbers: Vec<u64> = setting.delivered().await.iter().map(|event| event.number).collect();
    assert_eq!(numbers, [1, 2]);
}

#[tokio::test]
async fn a_stream_that_the_relay_makes_keeps_events_for_a_while_and_another_is_left_alone() {
    use async_nats::jetstream::{self, stream};

    let mut setting = Setting::new(Mode::Polling).await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    let context = jetstream::new(async_nats::connect(setting.nats.url()).await.unwrap());
    let made = context.get_stream("events").await.unwrap().cached_info().config.clone();
    assert_eq!((made.max_age.as_secs(), made.duplicate_window.as_secs()), (3600, 120));
    let subjects = vec!["events.>".to_owned()];
    context.delete_stream("events").await.unwrap();
    let theirs = stream::Config { name: "theirs".to_owned(), subjects, ..stream::Config::default() };
    context.create_stream(theirs).await.unwrap();
    let sink = setting.nats_sink();
    (sink.stream, sink.max_age_seconds) = ("theirs".to_owned(), 60);
    setting.write_contract();
    let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) values ('o', '1', 'x', '{}')";
    setting.database.app().await.batch_execute(insert).await.unwrap();
    setting.drained().await;
    let theirs = context.get_stream("theirs").await.unwrap().cached_info().clone();
    assert_eq!((theirs.config.max_age.as_secs(), theirs.state.messages), (0, 1));
}

#[tokio::test]
async fn a_row_that_would_break_the_connection_blocks_its_aggregate_only() {
    let setting = Setting::new(Mode::LogTailing).await;
    let app = setting.database.app().await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload, headers) \
         select 'order', $1, repeat('x', $2), '{\"n\": 1}', jsonb_build_object('note', repeat('y', $3)) returning id::text";
    for (aggregate, kind, header, expected) in [
        ("long type", 5000_i32, 1_i32, "its subject has 5025 bytes: shorten the values that its template uses"),
        ("long header", 1, 70_000, "bytes and JetStream accepts 65535: shorten the row's headers"),
    ] {
        let id: String = app.query_one(insert, &[&aggregate, &kind, &header]).await.unwrap().get(0);
        app.query_one(insert, &[&format!("after {aggregate}"), &1_i32, &1_i32]).await.unwrap();
        let named = |status: &RelayStatus| {
            let of_event = |message: &str| message.contains(&id) && message.contains(expected);
            status
                .problems
                .iter()
                .any(|problem| problem.reason == ProblemReason::EventRefused && of_event(&problem.message))
        };
        let status = relay.until("refused by name", named).await;
        assert!(status.ready && status.problems.len() == 1, "{status:?}");
        crate::database::until(
            &setting.database.superuser().await,
            "select count(*) = 1 and bool_and(aggregate_id like 'long%') from weft.outbox",
        )
        .await;
        let skip =
            |status: &RelayStatus| status.problems.iter().any(|problem| problem.message.contains("weft relay skip"));
        relay.until("the problem explains how to skip it", skip).await;
        setting.database.superuser().await.batch_execute("delete from weft.outbox").await.unwrap();
        relay.until("skipped", |status| status.problems.is_empty()).await;
    }
}

#[tokio::test]
async fn rows_from_before_the_relay_are_published_first() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        Writers::start(&url(&setting), 1, 4, 50).finished().await;
        let relay = setting.start_relay();
        relay.until("leading", |status| status.leading).await;
        Writers::start(&url(&setting), 2, 4, 50).finished().await;
        setting.drained().await;
        let verdict = check(&setting.committed().await, &setting.delivered().await);
        assert!(verdict.is_kept() && verdict.duplicates == 0, "{mode:?}: {verdict}");
        relay.until("all counted", |status| status.published == verdict.events).await;
    }
}

#[tokio::test]
async fn rows_that_were_restored_from_another_server_are_published() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        let superuser = setting.database.superuser().await;
        let mut relay = setting.start_relay();
        Writers::start(&url(&setting), 9, 1, 5).finished().await;
        setting.drained().await;
        relay.kill9();
        // a log-tailing relay reads the table only when it creates its slot
        crate::database::until(&superuser, "select not exists (select from pg_replication_slots where active)").await;
        let drop = "select pg_drop_replication_slot(slot_name) from pg_replication_slots";
        superuser.batch_execute(drop).await.unwrap();
        // as pg_restore does: transaction ids of another server, lower and higher ones than here
        let restored = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload, txid) \
             select 'order', 'restored', 'x', jsonb_build_object('n', n), t::xid8 \
               from (values (1, '3'), (2, '4000000000'), (3, '4000000001')) as r (n, t)";
        superuser.batch_execute(restored).await.unwrap();
        let _relay = setting.start_relay();
        setting.drained().await;
        let delivered = setting.delivered().await;
        let numbers = delivered.iter().filter(|event| event.aggregate == "restored").map(|event| event.number);
        assert_eq!(numbers.collect::<Vec<_>>(), [1, 2, 3], "{mode:?}");
    }
}

#[tokio::test]
async fn a_change_of_the_mode_loses_nothing_and_leaves_no_slot() {
    let mut setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let relay = setting.start_relay();
    let writers = Writers::start(&url(&setting), 3, 4, usize::MAX);
    relay.until("published some", |status| status.published > 20).await;
    setting.contract.mode = Mode::Polling;
    setting.write_contract();
    crate::database::until(&superuser, "select not exists (select from pg_replication_slots)").await;
    let version = setting.contract.clone().seal().version;
    let by_the_new_one = |status: &RelayStatus| status.leading && status.contract == version;
    let published = relay.until("leading by the changed contract", by_the_new_one).await.published;
    relay.until("published more", |status| status.published > published).await;
    setting.contract.mode = Mode::LogTailing;
    setting.write_contract();
    crate::database::until(&superuser, crate::database::STREAMING).await;
    writers.stop().await;
    setting.drained().await;
    let verdict = check(&setting.committed().await, &setting.delivered().await);
    assert!(verdict.is_kept(), "{verdict}");
}

#[tokio::test]
async fn only_a_sleeping_relay_is_notified_and_it_finds_rows_without_notifications() {
    let mut setting = Setting::new(Mode::Polling).await;
    let superuser = setting.database.superuser().await;
    let relay = setting.start_relay();
    crate::database::until(&superuser, "select asleep from weft.relay_wake").await;
    let writers = Writers::start(&url(&setting), 8, 4, usize::MAX);
    crate::database::until(&superuser, "select not asleep from weft.relay_wake").await;
    writers.stop().await;
    crate::database::until(&superuser, "select asleep from weft.relay_wake").await;
    superuser.batch_execute("update weft.relay_wake set asleep = false").await.unwrap();
    Writers::start(&url(&setting), 18, 2, 5).finished().await;
    setting.drained().await;
    setting.contract.mode = Mode::LogTailing;
    setting.write_contract();
    superuser.batch_execute("update weft.relay_wake set asleep = true").await.unwrap();
    crate::database::until(&superuser, "select not asleep from weft.relay_wake").await;
    relay.until("leading", |status| status.leading && status.ready).await;
    let verdict = check(&setting.committed().await, &setting.delivered().await);
    assert!(verdict.is_kept() && verdict.duplicates == 0, "{verdict}");
}

#[tokio::test]
async fn a_pause_keeps_the_leadership_and_publishes_nothing() {
    for mode in MODES {
        let mut setting = Setting::new(mode).await;
        setting.contract.paused = true;
        setting.write_contract();
        let relay = setting.start_relay();
        relay.until("leading, paused", |status| status.leading && status.paused && status.ready).await;
        Writers::start(&url(&setting), 4, 2, 20).finished().await;
        relay.until("rows are seen", |status| status.pending > 0).await;
        assert!(setting.messages().await.is_empty(), "{mode:?}");
        setting.contract.paused = false;
        setting.write_contract();
        setting.drained().await;
        let verdict = check(&setting.committed().await, &setting.delivered().await);
        assert!(verdict.is_kept() && verdict.duplicates == 0, "{mode:?}: {verdict}");
    }
}

#[tokio::test]
async fn one_of_two_leads_and_the_other_takes_over() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        let mut first = setting.start_relay();
        first.until("leading", |status| status.leading).await;
        let second = setting.start_relay();
        second.until("a standby", |status| status.ready && !status.leading).await;
        let writers = Writers::start(&url(&setting), 5, 4, 200);
        first.until("published some", |status| status.published > 20).await;
        first.kill9();
        second.until("leading", |status| status.leading).await;
        writers.finished().await;
        setting.drained().await;
        let verdict = check(&setting.committed().await, &setting.delivered().await);
        assert!(verdict.is_kept(), "{mode:?}: {verdict}");
    }
}

#[tokio::test]
async fn relays_of_one_outbox_take_turns_whatever_they_are_called() {
    let setting = Setting::new(Mode::LogTailing).await;
    let mut old = setting.start_relay_as("old");
    old.until("leading", |status| status.leading && status.ready).await;
    let new = setting.start_relay_as("new");
    new.until("a standby", |status| status.ready && !status.leading).await;
    old.kill9();
    new.until("leading", |status| status.leading && status.ready).await;
}

#[tokio::test]
async fn a_transaction_that_keeps_the_slot_from_being_made_is_named() {
    let setting = Setting::new(Mode::LogTailing).await;
    let app = setting.database.app().await;
    app.batch_execute("begin; insert into weft.outbox (aggregate_type, aggregate_id, type, payload) values ('o', '1', 'x', '{\"n\": 1}')")
        .await
        .unwrap();
    let process: i32 = app.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    let relay = setting.start_relay();
    let named = format!("process {process} (role app)");
    let expected = |status: &RelayStatus| {
        status
            .problems
            .iter()
            .any(|problem| problem.reason == ProblemReason::SlotPending && problem.message.contains(&named))
    };
    let status = relay.until("the transaction is named", expected).await;
    assert!(status.leading && status.ready && status.problems.len() == 1, "{status:?}");
    Writers::start(&url(&setting), 19, 2, 20).finished().await;
    let others = "select count(*) = 0 from weft.outbox where aggregate_type = 'order'";
    crate::database::until(&setting.database.superuser().await, others).await;
    app.batch_execute("commit").await.unwrap();
    setting.drained().await;
    relay.until("resolved", |status| status.ready && status.problems.is_empty()).await;
    crate::database::until(&setting.database.superuser().await, crate::database::STREAMING).await;
    let delivered = setting.delivered().await;
    assert_eq!(delivered.iter().filter(|event| event.aggregate == "1").count(), 1);
    let orders: Vec<_> = delivered.into_iter().filter(|event| event.aggregate != "1").collect();
    let verdict = check(&setting.committed().await, &orders);
    assert!(verdict.is_kept() && verdict.duplicates == 0, "{verdict}");
}

#[tokio::test]
async fn a_relay_of_another_name_goes_on_where_the_former_one_ended() {
    let mut setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let mut first = setting.start_relay_as("first");
    first.until("leading", |status| status.leading && status.ready).await;
    crate::database::until(
        &superuser,
        "select exists (select from weft.relay_ledger where relay = 'first' and lsn is not null)",
    )
    .await;
    first.kill9();
    setting.nats.kill9();
    Writers::start(&url(&setting), 7, 2, 20).finished().await;
    let mut second = setting.start_relay_as("second");
    second.until("leading, without a broker", |status| status.leading && status.pending > 0).await;
    second.kill9();
    setting.nats.restart();
    let first = setting.start_relay_as("first");
    setting.drained().await;
    let verdict = check(&setting.committed().await, &setting.delivered().await);
    assert!(verdict.is_kept() && verdict.duplicates == 0, "{verdict}");
    first.until("its own count", |status| status.published == verdict.events).await;
}

#[tokio::test]
async fn a_copy_under_traffic_is_recorded_and_the_next_leader_keeps_the_slot() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let writers = Writers::start(&url(&setting), 10, 4, usize::MAX);
    crate::database::until(&superuser, "select count(*) > 20 from weft.outbox").await;
    let mut first = setting.start_relay();
    crate::database::until(&superuser, "select exists (select from weft.relay_ledger where lsn is not null)").await;
    first.kill9();
    let _second = setting.start_relay();
    crate::database::until(&superuser, crate::database::STREAMING).await;
    writers.stop().await;
    setting.drained().await;
    let copied = superuser.query_one("select lsn is not null from weft.relay_ledger", &[]).await.unwrap();
    assert!(copied.get::<_, bool>(0));
    let verdict = check(&setting.committed().await, &setting.delivered().await);
    assert!(verdict.is_kept(), "{verdict}");
}

#[tokio::test]
async fn a_lost_slot_is_recreated() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let mut relay = setting.start_relay();
    let writers = Writers::start(&url(&setting), 6, 4, 100);
    relay.until("published some", |status| status.published > 20).await;
    // until it has its slot it polls
    crate::database::until(&superuser, crate::database::STREAMING).await;
    relay.kill9();
    writers.finished().await;
    crate::database::until(&superuser, "select not exists (select from pg_replication_slots where active)").await;
    superuser.execute("select pg_drop_replication_slot('weft_outbox')", &[]).await.unwrap();
    let relay = setting.start_relay();
    setting.drained().await;
    let verdict = check(&setting.committed().await, &setting.delivered().await);
    assert!(verdict.is_kept(), "{verdict}");
    relay.until("no problem", |status| status.problems.is_empty() && status.ready).await;
}

#[tokio::test]
async fn an_idle_outbox_in_a_busy_database_keeps_no_wal() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    superuser.batch_execute("create table noise as select generate_series(1, 10000) as n").await.unwrap();
    let written = wal_position(&superuser).await;
    confirmed(&superuser, &written).await;
}

#[tokio::test]
async fn rows_that_take_long_to_count_block_nothing() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    Writers::start(&url(&setting), 11, 2, 20).finished().await;
    let slow = "alter table weft.outbox enable row level security; \
         create policy slow on weft.outbox to relay using \
             (case when current_query() like '%limit 1000000%' then pg_sleep(600) is not null else true end)";
    superuser.batch_execute(slow).await.unwrap();
    let _relay = setting.start_relay();
    setting.drained().await;
    let verdict = check(&setting.committed().await, &setting.delivered().await);
    assert!(verdict.is_kept() && verdict.duplicates == 0, "{verdict}");
}

/// Inserts rows of 4 KiB, more than the window and the connection's buffers hold.
async fn insert_backlog(setting: &Setting) {
    let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         select 'order', n, 'Changed', jsonb_build_object('n', 1, 'x', repeat('x', 4096)) from generate_series(1, 10000) as n";
    setting.database.superuser().await.batch_execute(insert).await.unwrap();
}

#[tokio::test]
async fn a_backlog_is_copied_in_one_term_whatever_timeouts_the_database_sets() {
    let setting = Setting::new(Mode::LogTailing).await;
    insert_backlog(&setting).await;
    let superuser = setting.database.superuser().await;
    let timeouts =
        "alter database orders set statement_timeout = '200ms'; alter role postgres set statement_timeout = 0";
    superuser.batch_execute(timeouts).await.unwrap();
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading).await;
    let leader = "select pid from pg_locks where locktype = 'advisory' and granted";
    let leader = async || superuser.query_one(leader, &[]).await.unwrap().get::<_, i32>(0);
    let first = leader().await;
    setting.drained().await;
    assert_eq!(leader().await, first, "no second term");
}

#[tokio::test]
async fn a_paused_copy_lets_the_database_remove_dead_rows() {
    let mut setting = Setting::new(Mode::LogTailing).await;
    setting.contract.paused = true;
    setting.write_contract();
    insert_backlog(&setting).await;
    let _relay = setting.start_relay();
    let released = "select count(*) filter (where query like 'select id, aggregate_type%') = 1 \
             and count(*) filter (where backend_type = 'walsender') = 1 and count(backend_xmin) = 0 \
         from pg_stat_activity where application_name like 'weft relay%'";
    crate::database::until(&setting.database.superuser().await, released).await;
}

#[tokio::test]
async fn an_unreachable_broker_is_reported_until_it_is_back() {
    let mut setting = Setting::new(Mode::LogTailing).await;
    setting.nats.kill9();
    let relay = setting.start_relay();
    relay
        .until("the broker is reported", |status| {
            status.leading
                && !status.ready
                && status.problems.iter().any(|problem| problem.reason == ProblemReason::BrokerUnreachable)
        })
        .await;
    assert_eq!(relay.get("/readyz").await.unwrap().0, 503);
    assert_eq!(relay.get("/livez").await.unwrap().0, 200, "a restart would not help");
    setting.nats.restart();
    relay.until("resolved", |status| status.ready && status.problems.is_empty()).await;
}
