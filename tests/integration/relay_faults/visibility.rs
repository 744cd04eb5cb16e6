//! A commit is in the log before other sessions see it: with a synchronous standby for as long as that takes.

use std::time::{Duration, Instant};

use tokio_postgres::Client;
use weft::contract::{problem::ProblemReason, relay::Mode};

use super::{SOON, drop_slot, has, insert, numbers, started, stored, streaming, taking};
use crate::{
    database,
    relay_harness::{Setting, Tap},
    servers::{self, Proxy, within},
};

/// Longer than any grace after which a row could be given up.
const HELD: Duration = Duration::from_secs(7);

/// The relay's own commits do not wait for a standby: this is about the rows of others.
async fn setting() -> (Setting, Client) {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    superuser.batch_execute("alter role relay set synchronous_commit = local").await.unwrap();
    superuser.batch_execute("set synchronous_commit = local").await.unwrap();
    (setting, superuser)
}

/// Begins an insert whose commit waits for a standby that is not there, and waits until it does.
async fn hang(setting: &Setting, kind: &'static str, aggregate: &'static str) -> tokio::task::JoinHandle<()> {
    setting.database.server.set_synchronous_standbys("nobody").await;
    let app = setting.database.app().await;
    let inserted = tokio::spawn(async move { insert(&app, kind, aggregate, [1]).await });
    let waits = "select exists (select from pg_stat_activity where wait_event = 'SyncRep' and usename = 'app')";
    database::until(&setting.database.superuser().await, waits).await;
    inserted
}

/// A transaction with an id; returns the id.
async fn begin(client: &Client) -> String {
    client.batch_execute("begin").await.unwrap();
    client.query_one("select pg_current_xact_id()::text", &[]).await.unwrap().get(0)
}

/// Waits until the making of the slot waits for this transaction.
async fn waited_for(superuser: &Client, transaction: &str) {
    let waits = format!(
        "select exists (select from pg_locks where locktype = 'transactionid' and not granted and transactionid = '{transaction}'::xid)"
    );
    database::until(superuser, &waits).await;
}

async fn slot_made(superuser: &Client) {
    database::until(
        superuser,
        "select exists (select from pg_replication_slots where confirmed_flush_lsn is not null)",
    )
    .await;
}

#[tokio::test]
async fn a_row_that_was_committed_and_is_not_visible_when_the_slot_is_made_is_published() {
    let (setting, superuser) = setting().await;
    let (first, second) = (setting.database.app().await, setting.database.app().await);
    let first_id = begin(&first).await;
    let relay = setting.start_relay();
    waited_for(&superuser, &first_id).await;
    let second_id = begin(&second).await;
    first.batch_execute("rollback").await.unwrap();
    waited_for(&superuser, &second_id).await;
    // its commit comes before the slot's consistent point, so it is not streamed
    let inserted = hang(&setting, "order", "1").await;
    second.batch_execute("rollback").await.unwrap();
    slot_made(&superuser).await;
    // either the relay goes on without the row, which is what must not happen, or it waits for it
    let begun = Instant::now();
    servers::until("the relay streams, or has waited", async || {
        superuser.query_one(database::STREAMING, &[]).await.unwrap().get::<_, bool>(0)
            || begun.elapsed() > Duration::from_secs(3)
    })
    .await;
    setting.database.server.set_synchronous_standbys("").await;
    inserted.await.unwrap();
    streaming(&superuser).await;
    insert(&superuser, "order", "2", [1]).await;
    stored(&setting, SOON, 2).await;
    assert_eq!(numbers(&setting, "1").await, [1]);
    setting.drained().await;
    relay.until("ready", |status| status.ready && status.problems.is_empty() && status.published == 2).await;
}

#[tokio::test]
async fn a_row_that_becomes_visible_long_after_its_event_was_published_is_deleted_then() {
    let (setting, superuser) = setting().await;
    let mut relay = started(&setting).await;
    let inserted = hang(&setting, "order", "late").await;
    stored(&setting, SOON, 1).await;
    let (begun, mut others) = (Instant::now(), 0);
    while begun.elapsed() < HELD {
        insert(&superuser, "order", "other", [others + 1]).await;
        others += 1;
        stored(&setting, SOON, others.unsigned_abs() + 1).await;
    }
    relay.kill9();
    let relay = setting.start_relay();
    insert(&superuser, "order", "other", [others + 1]).await;
    stored(&setting, SOON, others.unsigned_abs() + 2).await;
    setting.database.server.set_synchronous_standbys("").await;
    inserted.await.unwrap();
    setting.drained().await;
    relay.until("ready", |status| status.ready && status.problems.is_empty() && status.pending == 0).await;
    assert_eq!(numbers(&setting, "late").await, [1]);
}

#[tokio::test]
async fn a_refused_event_whose_row_is_not_visible_yet_is_not_taken_for_one_that_was_deleted() {
    let (setting, superuser) = setting().await;
    setting.jetstream().await.create_stream(taking(&["events.*.*.customer.>"])).await.unwrap();
    let relay = started(&setting).await;
    let inserted = hang(&setting, "order", "1").await;
    relay.until("refused", |status| has(status, ProblemReason::EventRefused)).await;
    let (begun, mut others) = (Instant::now(), 0);
    while begun.elapsed() < HELD {
        others += 1;
        insert(&superuser, "customer", "other", [others]).await;
        stored(&setting, SOON, others.unsigned_abs()).await;
    }
    setting.database.server.set_synchronous_standbys("").await;
    inserted.await.unwrap();
    let subjects = taking(&["events.*.*.customer.>", "events.*.*.order.>"]);
    setting.jetstream().await.update_stream(subjects).await.unwrap();
    setting.drained().await;
    assert_eq!(numbers(&setting, "1").await, [1]);
}

#[tokio::test]
async fn a_synchronous_standby_that_is_slow_does_not_keep_the_slot_from_moving_on() {
    const WRITERS: usize = 32;
    let (setting, superuser) = setting().await;
    let relay = started(&setting).await;
    let proxy = Proxy::before(setting.database.server.port());
    let _standby = setting.database.server.standby("other", proxy.port());
    // a commit takes 20 ms, so that there is always a row that is not visible yet, whenever one asks
    proxy.delay(Duration::from_millis(10));
    setting.database.server.set_synchronous_standbys("other").await;
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let app = setting.database.app().await;
        writers.spawn(async move { insert(&app, "order", &writer.to_string(), 1..).await });
    }
    relay.until("events flow", |status| status.published > 500).await;
    let position = async || wal(&superuser).await;
    for _ in 0..6 {
        let (written, _) = position().await;
        // the slot comes to where the log is now while more is written all the time
        let slot = "select confirmed_flush_lsn - '0/0'::pg_lsn >= $1::text::numeric from pg_replication_slots";
        within(SOON, "the slot moves on under load", async || {
            let row = superuser.query_one(slot, &[&written.to_string()]).await.unwrap();
            row.get::<_, Option<bool>>(0) == Some(true)
        })
        .await;
    }
    println!("{:?}", relay.status().await);
    writers.shutdown().await;
    setting.drained().await;
}

/// Bytes of log that were written, and those of them that the slot keeps.
async fn wal(superuser: &Client) -> (u64, u64) {
    let query = "select (pg_current_wal_lsn() - '0/0')::bigint, \
         (pg_current_wal_lsn() - confirmed_flush_lsn)::bigint from pg_replication_slots";
    let row = superuser.query_one(query, &[]).await.unwrap();
    (row.get::<_, i64>(0).unsigned_abs(), row.get::<_, i64>(1).unsigned_abs())
}

#[tokio::test]
async fn log_that_the_slot_keeps_because_of_a_row_that_is_not_visible_is_reported() {
    let (setting, superuser) = setting().await;
    let relay = started(&setting).await;
    let _inserted = hang(&setting, "order", "1").await;
    stored(&setting, SOON, 1).await;
    superuser
        .batch_execute("create table noise as select repeat('x', 1000) from generate_series(1, 20000)")
        .await
        .unwrap();
    insert(&superuser, "order", "2", [1]).await;
    stored(&setting, SOON, 2).await;
    let begun = Instant::now();
    servers::until("the report of the log that is kept was watched for a while", async || {
        let (_, kept) = wal(&superuser).await;
        let reported = relay.status().await.unwrap().lag_bytes.unwrap_or_default();
        // the slot confirms now and then, the report is a few seconds old: only a lasting difference is wrong
        let settled = begun.elapsed() > Duration::from_secs(3);
        assert!(
            !settled || kept < 1_000_000 || reported > kept / 4,
            "{kept} bytes are kept and {reported} are reported"
        );
        begun.elapsed() > Duration::from_secs(14)
    })
    .await;
    setting.database.server.set_synchronous_standbys("").await;
}

#[tokio::test]
async fn the_second_making_of_a_slot_misses_no_row_either() {
    let (setting, superuser) = setting().await;
    let mut relay = started(&setting).await;
    insert(&superuser, "order", "0", [1]).await;
    setting.drained().await;
    let tap = Tap::start(&setting).await;
    relay.kill9();
    drop_slot(&superuser).await;
    let inserted = hang(&setting, "order", "1").await;
    // the slot is made when the transaction ends, whatever happened to its row
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading).await;
    setting.database.server.set_synchronous_standbys("").await;
    inserted.await.unwrap();
    streaming(&superuser).await;
    setting.drained().await;
    assert_eq!(numbers(&setting, "1").await, [1]);
    assert_eq!((tap.count(), tap.duplicates()), (1, 0));
}

#[tokio::test]
async fn rows_from_before_the_slot_that_wait_to_be_published_are_published_by_the_next_term() {
    let mut setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    insert(&superuser, "order", "1", 1..=20).await;
    setting.contract.paused = true;
    setting.write_contract();
    let mut relay = setting.start_relay();
    slot_made(&superuser).await;
    // every few seconds the relay reads a snapshot for its ledger: one sees these rows, and the slot is beyond it
    tokio::time::sleep(Duration::from_secs(8)).await;
    relay.kill9();
    setting.contract.paused = false;
    setting.write_contract();
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    setting.drained().await;
    assert_eq!(numbers(&setting, "1").await, (1..=20).collect::<Vec<u64>>());
}
