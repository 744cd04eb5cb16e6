//! A backlog costs neither temporary files nor old snapshots, and an old transaction stops nobody's events.

use std::time::Duration;

use super::{MODES, insert, numbers, started, stored};
use crate::{
    database::{self, DATABASE, Database},
    relay_harness::Setting,
    servers::{Postgres, within},
};
use weft::contract::{database_setup::Purpose, relay::Mode};

#[tokio::test]
async fn a_backlog_is_read_without_being_sorted_and_without_an_old_snapshot() {
    const ROWS: u64 = 30_000;
    for mode in MODES {
        // what 64 kB of memory cannot hold goes into a temporary file
        let server = Postgres::start_with(&["work_mem=64kB"]);
        let mut setting = Setting::with(mode, Database::on(server, Purpose::Service).await);
        let superuser = setting.database.superuser().await;
        let rows = format!(
            "set work_mem = '16MB'; insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
             select 'order', (n % 100)::text, 'Changed', jsonb_build_object('n', n, 'x', repeat('x', 200)) \
               from generate_series(1, {ROWS}) n"
        );
        superuser.batch_execute(&rows).await.unwrap();
        superuser.batch_execute("analyze weft.outbox; select pg_stat_reset()").await.unwrap();
        let (_database, broker) = setting.add_proxies();
        let relay = setting.start_relay();
        relay.until("it has begun", |status| status.published > 100).await;
        // the broker is away for a while in the middle of it, and that must not keep a snapshot open
        broker.set_silent(true);
        let held = "select not exists (select from pg_stat_activity where application_name like 'weft relay%' \
             and coalesce(backend_xmin, backend_xid) is not null and clock_timestamp() - xact_start > interval '3 s')";
        let begun = std::time::Instant::now();
        within(Duration::from_secs(20), "no snapshot was old for five seconds", async || {
            let young: bool = superuser.query_one(held, &[]).await.unwrap().get(0);
            assert!(young || begun.elapsed() < Duration::from_secs(4), "{mode:?}: a snapshot is older than 3 s");
            begun.elapsed() > Duration::from_secs(8)
        })
        .await;
        broker.set_silent(false);
        stored(&setting, Duration::from_mins(1), ROWS).await;
        setting.drained().await;
        drop(relay);
        // statistics are sent when a session ends, at the latest
        database::until(&superuser, "select not exists (select from pg_stat_activity where usename = 'relay')").await;
        let temporary = format!("select temp_bytes from pg_stat_database where datname = '{DATABASE}'");
        let bytes: i64 = superuser.query_one(&temporary, &[]).await.unwrap().get(0);
        assert_eq!(bytes, 0, "{mode:?}: bytes of temporary files");
    }
}

#[tokio::test]
async fn events_flow_while_an_old_transaction_keeps_the_slot_from_being_made() {
    let setting = Setting::new(Mode::LogTailing).await;
    let old = setting.database.app().await;
    old.batch_execute("begin").await.unwrap();
    insert(&old, "order", "old", [1]).await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading).await;
    let app = setting.database.app().await;
    for number in 1..=5 {
        insert(&app, "order", "new", [number]).await;
        // a second or two on a quiet machine
        stored(&setting, Duration::from_secs(4), number.unsigned_abs()).await;
    }
    old.batch_execute("commit").await.unwrap();
    stored(&setting, Duration::from_secs(15), 6).await;
    super::streaming(&setting.database.superuser().await).await;
    insert(&app, "order", "new", [6]).await;
    setting.drained().await;
    assert_eq!(numbers(&setting, "old").await, [1]);
    assert_eq!(numbers(&setting, "new").await, [1, 2, 3, 4, 5, 6]);
    relay.until("ready", |status| status.ready && status.problems.is_empty() && status.published == 7).await;
}

#[tokio::test]
async fn events_flow_while_an_old_transaction_keeps_a_lost_slot_from_being_made_again() {
    let setting = Setting::new(Mode::LogTailing).await;
    let (app, superuser) = (setting.database.app().await, setting.database.superuser().await);
    let mut relay = started(&setting).await;
    insert(&app, "order", "a", [1]).await;
    setting.drained().await;
    relay.kill9();
    super::drop_slot(&superuser).await;
    let old = setting.database.app().await;
    old.batch_execute("begin; select pg_current_xact_id()").await.unwrap();
    let _relay = setting.start_relay();
    insert(&app, "order", "a", [2]).await;
    stored(&setting, Duration::from_secs(6), 2).await;
    old.batch_execute("rollback").await.unwrap();
    super::streaming(&superuser).await;
    insert(&app, "order", "a", [3]).await;
    setting.drained().await;
    assert_eq!(numbers(&setting, "a").await, [1, 2, 3]);
}
