//! Errors of the stream that last: each ends in a copy and a new slot, or is reported; none is repeated for ever in silence.

use std::time::Duration;

use weft::contract::{relay::Mode, status::RelayStatus};

use super::{drop_slot, insert, not_streaming, numbers, settled, started, streaming};
use crate::{
    database::Database,
    relay_harness::{RelayProcess, Setting},
    servers,
};

const HEALS: Duration = Duration::from_secs(30);

/// Waits until the outbox is empty and no problem is left; the stream then has exactly these events of the aggregate.
async fn heals(setting: &Setting, relay: &RelayProcess, aggregate: &str, expected: &[u64]) {
    setting.drained().await;
    assert_eq!(numbers(setting, aggregate).await, expected);
    relay.within(HEALS, "no problem is left", |status| status.ready && status.problems.is_empty()).await;
}

#[tokio::test]
async fn a_publication_that_was_dropped_and_made_again_heals() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let relay = started(&setting).await;
    insert(&superuser, "order", "a", [1]).await;
    settled(&setting, &superuser).await;
    superuser.batch_execute("drop publication weft_outbox").await.unwrap();
    insert(&superuser, "order", "a", [2]).await;
    relay.within(HEALS, "an error or an event", |status| !status.problems.is_empty() || status.published > 1).await;
    superuser
        .batch_execute("create publication weft_outbox for table weft.outbox with (publish = 'insert')")
        .await
        .unwrap();
    insert(&superuser, "order", "a", [3]).await;
    heals(&setting, &relay, "a", &[1, 2, 3]).await;
}

#[tokio::test]
async fn a_slot_that_is_dropped_under_a_running_relay_is_made_again() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let relay = started(&setting).await;
    insert(&superuser, "order", "a", [1]).await;
    settled(&setting, &superuser).await;
    let end = "select pg_terminate_backend(active_pid), pg_drop_replication_slot(slot_name) from pg_replication_slots";
    servers::until("the slot is dropped", async || {
        let _in_use = superuser.execute(end, &[]).await;
        let dropped = "select not exists (select from pg_replication_slots)";
        superuser.query_one(dropped, &[]).await.unwrap().get::<_, bool>(0) || superuser.execute(end, &[]).await.is_ok()
    })
    .await;
    insert(&superuser, "order", "a", [2, 3]).await;
    heals(&setting, &relay, "a", &[1, 2, 3]).await;
    streaming(&superuser).await;
}

#[tokio::test]
async fn a_slot_that_somebody_made_by_hand_skips_no_row() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let mut relay = started(&setting).await;
    insert(&superuser, "order", "a", [1]).await;
    settled(&setting, &superuser).await;
    relay.kill9();
    not_streaming(&superuser).await;
    insert(&superuser, "order", "a", [2]).await;
    drop_slot(&superuser).await;
    superuser.batch_execute("select pg_create_logical_replication_slot('weft_outbox', 'pgoutput')").await.unwrap();
    insert(&superuser, "order", "a", [3]).await;
    let relay = setting.start_relay();
    heals(&setting, &relay, "a", &[1, 2, 3]).await;
}

#[tokio::test]
async fn a_slot_that_was_advanced_by_hand_skips_no_row() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let mut relay = started(&setting).await;
    insert(&superuser, "order", "a", [1]).await;
    settled(&setting, &superuser).await;
    relay.kill9();
    not_streaming(&superuser).await;
    insert(&superuser, "order", "a", [2]).await;
    superuser.batch_execute("select pg_replication_slot_advance('weft_outbox', pg_current_wal_lsn())").await.unwrap();
    insert(&superuser, "order", "a", [3]).await;
    let relay = setting.start_relay();
    heals(&setting, &relay, "a", &[1, 2, 3]).await;
}

#[tokio::test]
async fn a_slot_whose_log_was_removed_heals() {
    let server =
        servers::Postgres::start_with(&["max_slot_wal_keep_size=1MB", "min_wal_size=32MB", "max_wal_size=32MB"]);
    let database = Database::on(server, weft::contract::database_setup::Purpose::Service).await;
    let setting = Setting::with(Mode::LogTailing, database);
    let superuser = setting.database.superuser().await;
    let mut relay = started(&setting).await;
    insert(&superuser, "order", "a", [1]).await;
    settled(&setting, &superuser).await;
    relay.kill9();
    not_streaming(&superuser).await;
    insert(&superuser, "order", "a", [2]).await;
    servers::until("the slot is lost", async || {
        superuser.batch_execute("create table if not exists noise (x text); insert into noise select repeat('x', 1000) from generate_series(1, 5000)").await.unwrap();
        superuser.batch_execute("select pg_switch_wal()").await.unwrap();
        superuser.batch_execute("checkpoint").await.unwrap();
        let lost = "select wal_status = 'lost' from pg_replication_slots";
        superuser.query_one(lost, &[]).await.unwrap().get::<_, Option<bool>>(0) == Some(true)
    })
    .await;
    insert(&superuser, "order", "a", [3]).await;
    let relay = setting.start_relay();
    heals(&setting, &relay, "a", &[1, 2, 3]).await;
}

#[tokio::test]
async fn an_outbox_that_was_renamed_is_an_error_and_no_silence() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let relay = started(&setting).await;
    superuser.batch_execute("alter table weft.outbox rename to other").await.unwrap();
    let insert_there = "insert into weft.other (aggregate_type, aggregate_id, type, payload) values ('order', 'a', 'Changed', '{\"n\": 1}')";
    superuser.batch_execute(insert_there).await.unwrap();
    let reported = |status: &RelayStatus| !status.ready && !status.problems.is_empty();
    relay.within(HEALS, "the relay reports what is wrong", reported).await;
    superuser.batch_execute("alter table weft.other rename to outbox").await.unwrap();
    insert(&superuser, "order", "a", [2]).await;
    heals(&setting, &relay, "a", &[1, 2]).await;
}

#[tokio::test]
async fn a_table_that_somebody_added_to_the_publication_is_an_error_and_no_silence() {
    let setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let relay = started(&setting).await;
    let add = "create table more (like weft.outbox); alter publication weft_outbox add table more";
    superuser.batch_execute(add).await.unwrap();
    let insert_there = "insert into more (aggregate_type, aggregate_id, type, payload, seq, id, headers, created_at, txid) \
         values ('order', 'a', 'Changed', '{\"n\": 1}', 1, gen_random_uuid(), '{}', now(), '1')";
    superuser.batch_execute(insert_there).await.unwrap();
    relay.within(HEALS, "the relay reports what is wrong", |status| !status.problems.is_empty()).await;
    superuser.batch_execute("alter publication weft_outbox drop table more").await.unwrap();
    insert(&superuser, "order", "a", [2]).await;
    heals(&setting, &relay, "a", &[2]).await;
}

#[tokio::test]
async fn a_dump_that_is_restored_into_a_fresh_database_is_published() {
    let old = Setting::new(Mode::LogTailing).await;
    let superuser = old.database.superuser().await;
    // a relay has been there, and then rows wait
    let mut relay = started(&old).await;
    insert(&superuser, "order", "published", [1]).await;
    settled(&old, &superuser).await;
    relay.kill9();
    insert(&superuser, "order", "restored", [1, 2, 3]).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("dump");
    let dump =
        old.database.server.tool("pg_dump").args(["-Fc", "--dbname", crate::database::DATABASE]).output().unwrap();
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    std::fs::write(&file, dump.stdout).unwrap();
    for mode in super::MODES {
        let setting = Setting::new(mode).await;
        let relay = started(&setting).await;
        let superuser = setting.database.superuser().await;
        insert(&superuser, "order", "before", [1]).await;
        match mode {
            Mode::LogTailing => settled(&setting, &superuser).await,
            Mode::Polling => setting.drained().await,
        }
        let mut restore = setting.database.server.tool("pg_restore");
        restore.args(["--clean", "--if-exists", "--dbname", crate::database::DATABASE]);
        restore.stdin(std::fs::File::open(&file).unwrap());
        // it counts what could not be dropped as errors, and goes on
        let output = tokio::process::Command::from(restore).output().await.unwrap();
        println!("{mode:?}: {}", String::from_utf8_lossy(&output.stderr));
        heals(&setting, &relay, "restored", &[1, 2, 3]).await;
        insert(&superuser, "order", "after", [1]).await;
        heals(&setting, &relay, "after", &[1]).await;
    }
}
