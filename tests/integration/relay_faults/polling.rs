//! Polling does without notifications while rows come.

use std::time::{Duration, Instant};

use futures::StreamExt;
use tokio_postgres::AsyncMessage;
use weft::contract::{database_setup::Purpose, relay::Mode};

use super::{SOON, insert, numbers, started, stored};
use crate::{
    database::{DATABASE, Database},
    relay_harness::{Setting, Writers},
    servers::{Postgres, SUPERUSER, SUPERUSER_PASSWORD, within},
};

#[tokio::test]
async fn a_transaction_that_wrote_an_event_can_be_prepared_while_events_flow() {
    let server = Postgres::start_with(&["max_prepared_transactions=50"]);
    let setting = Setting::with(Mode::Polling, Database::on(server, Purpose::Service).await);
    let relay = started(&setting).await;
    let writers = Writers::paced(&setting.url(), 1, 4, Duration::from_millis(10));
    relay.until("events flow", |status| status.published > 100).await;
    let superuser = setting.database.superuser().await;
    for number in 1..=20 {
        superuser.batch_execute("begin").await.unwrap();
        insert(&superuser, "order", "prepared", [number]).await;
        let prepared = superuser.batch_execute(&format!("prepare transaction 'number {number}'")).await;
        assert!(prepared.is_ok(), "number {number}: {prepared:?}");
        superuser.batch_execute(&format!("commit prepared 'number {number}'")).await.unwrap();
    }
    writers.stop().await;
    setting.drained().await;
    assert!(numbers(&setting, "prepared").await.into_iter().eq(1..=20));
}

/// Counts the notifications of the outbox from now on.
async fn notifications(setting: &Setting) -> tokio::sync::watch::Receiver<usize> {
    let url = setting.database.server.url(SUPERUSER, SUPERUSER_PASSWORD, DATABASE);
    let (client, mut connection) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await.unwrap();
    let (sender, receiver) = tokio::sync::watch::channel(0);
    let mut messages = futures::stream::poll_fn(move |context| connection.poll_message(context));
    tokio::spawn(async move {
        while let Some(Ok(message)) = messages.next().await {
            if matches!(message, AsyncMessage::Notification(_)) {
                sender.send_modify(|count| *count += 1);
            }
        }
    });
    client.batch_execute("listen weft_outbox").await.unwrap();
    // the connection lives as long as the process
    std::mem::forget(client);
    receiver
}

#[tokio::test]
async fn few_commits_notify_while_events_flow() {
    let setting = Setting::new(Mode::Polling).await;
    let relay = started(&setting).await;
    let writers = Writers::paced(&setting.url(), 1, 8, Duration::from_millis(20));
    relay.until("events flow", |status| status.published > 100).await;
    let notified = notifications(&setting).await;
    let before = relay.until("leading", |status| status.leading).await.published;
    let after = relay.until("more events", |status| status.published > before + 1000).await.published;
    let (events, notified) = (after - before, *notified.borrow());
    writers.stop().await;
    assert!(notified as u64 * 20 < events, "{notified} notifications of {events} events");
}

#[tokio::test]
async fn an_event_after_a_pause_is_published_at_once() {
    let setting = Setting::new(Mode::Polling).await;
    let _relay = started(&setting).await;
    let app = setting.database.app().await;
    let superuser = setting.database.superuser().await;
    let mut delays = Vec::new();
    for number in 1..=5 {
        // it has nothing to do, and sleeps
        let idle = "select not exists (select from pg_stat_activity where usename = 'relay' and state <> 'idle') \
             and (select max(state_change) < clock_timestamp() - interval '300 ms' from pg_stat_activity where usename = 'relay')";
        within(SOON, "the relay is idle", async || superuser.query_one(idle, &[]).await.unwrap().get(0)).await;
        let begun = Instant::now();
        insert(&app, "order", "a", [number]).await;
        stored(&setting, SOON, number.unsigned_abs()).await;
        delays.push(begun.elapsed());
    }
    delays.sort_unstable();
    assert!(delays[2] < Duration::from_millis(300), "{delays:?}");
}
