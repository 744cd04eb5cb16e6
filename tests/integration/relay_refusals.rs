//! Events that the broker refuses: what they block, how they are said, and how they are skipped.

use std::collections::BTreeSet;

use weft::contract::{problem::ProblemReason, relay::Mode, status::RelayStatus};

use crate::relay_harness::{MODES, Setting, confirmed, wal_position};

/// Inserts an event that NATS never accepts, and returns the row's id.
async fn insert_too_large(setting: &Setting) -> String {
    let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         values ('order', 'large', 'Changed', jsonb_build_object('n', 1, 'x', repeat('x', 2000000))) returning id::text";
    setting.database.app().await.query_one(insert, &[]).await.unwrap().get(0)
}

fn is_refused(status: &RelayStatus) -> bool {
    status.problems.iter().any(|problem| problem.reason == ProblemReason::EventRefused)
}

#[tokio::test]
async fn a_refused_event_blocks_its_aggregate_only_and_is_skipped_when_its_row_is_deleted() {
    for mode in MODES {
        let setting = Setting::new(mode).await;
        let app = setting.database.app().await;
        let relay = setting.start_relay();
        relay.until("leading", |status| status.leading && status.ready).await;
        let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
             select 'order', $1, 'Changed', jsonb_build_object('n', $2::bigint, 'x', repeat('x', $3)) returning id::text";
        let large = app.query_one(insert, &[&"large", &1_i64, &2_000_000_i32]).await.unwrap();
        let large: String = large.get(0);
        for (aggregate, number) in [("large", 2_i64), ("other", 1), ("other", 2)] {
            app.query_one(insert, &[&aggregate, &number, &1_i32]).await.unwrap();
        }
        let status = relay.until("refused", is_refused).await;
        let message = &status.problems[0].message;
        assert!(message.contains(&large) && message.contains("max_payload"), "{message}");
        assert!(!message.contains("xxx"), "no payload in a message");
        relay.until("the others are published", |status| status.published == 2).await;
        let aggregates: BTreeSet<String> = setting.delivered().await.into_iter().map(|event| event.aggregate).collect();
        assert_eq!(aggregates, BTreeSet::from(["other".to_owned()]), "{mode:?}");
        let explains_skipping =
            |status: &RelayStatus| status.problems.iter().any(|problem| problem.message.contains("weft relay skip"));
        relay.until("the problem explains how to skip it", explains_skipping).await;
        let superuser = setting.database.superuser().await;
        superuser.execute(&format!("delete from weft.outbox where id = '{large}'"), &[]).await.unwrap();
        let is_resolved = |status: &RelayStatus| {
            let names_it = |message: &str| !message.contains("refuses event :");
            assert!(status.problems.iter().all(|problem| names_it(&problem.message)), "{status:?}");
            status.problems.is_empty()
        };
        relay.until("resolved", is_resolved).await;
        setting.drained().await;
        let numbers: Vec<u64> = setting
            .delivered()
            .await
            .into_iter()
            .filter(|event| event.aggregate == "large")
            .map(|event| event.number)
            .collect();
        assert_eq!(numbers, [2], "{mode:?}");
    }
}

#[tokio::test]
async fn a_deleted_row_of_a_refused_event_keeps_no_wal() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    insert_too_large(&setting).await;
    relay.until("refused", is_refused).await;
    let written = wal_position(&superuser).await;
    superuser.batch_execute("delete from weft.outbox").await.unwrap();
    confirmed(&superuser, &written).await;
    relay.until("resolved", |status| status.problems.is_empty()).await;
}

#[tokio::test]
async fn a_refused_event_whose_row_was_deleted_while_no_relay_ran_is_skipped() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let mut first = setting.start_relay();
    crate::database::until(&superuser, "select exists (select from weft.relay_ledger where lsn is not null)").await;
    insert_too_large(&setting).await;
    first.until("refused", is_refused).await;
    first.kill9();
    superuser.batch_execute("delete from weft.outbox").await.unwrap();
    let next = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         values ('order', 'large', 'Changed', '{\"n\": 2}')";
    superuser.batch_execute(next).await.unwrap();
    let _second = setting.start_relay();
    setting.drained().await;
    let numbers: Vec<u64> = setting.delivered().await.iter().map(|event| event.number).collect();
    assert_eq!(numbers, [2]);
}

#[tokio::test]
async fn a_subject_that_is_added_to_the_stream_ends_a_refusal() {
    use async_nats::jetstream::{self, stream};

    let setting = Setting::new(Mode::LogTailing).await;
    let context = jetstream::new(async_nats::connect(setting.nats.url()).await.unwrap());
    let taking = |subjects: &[&str]| stream::Config {
        name: "events".to_owned(),
        subjects: subjects.iter().map(|&subject| subject.to_owned()).collect(),
        ..stream::Config::default()
    };
    context.create_stream(taking(&["events.*.*.customer.>"])).await.unwrap();
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    let insert =
        "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) values ('order', '1', 'x', '{}')";
    setting.database.app().await.batch_execute(insert).await.unwrap();
    relay.until("refused", is_refused).await;
    context.update_stream(taking(&["events.*.*.customer.>", "events.*.*.order.>"])).await.unwrap();
    setting.drained().await;
    relay.until("resolved", |status| status.problems.is_empty() && status.published == 1).await;
}
