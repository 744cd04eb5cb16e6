//! What a relay reports while broker or database cannot be used: what, where, since when, within five seconds.

use std::time::{Duration, Instant};

use weft::contract::{problem::ProblemReason, relay::Mode, status::RelayStatus};

use crate::{
    database,
    relay_harness::{RelayProcess, Setting},
    servers::{Nats, until},
};

/// From the outage to its report.
const REPORTED_WITHIN: Duration = Duration::from_secs(5);

const INSERT: &str = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) values ('order', '1', 'Changed', '{\"n\": 1}')";

fn message(status: &RelayStatus, reason: ProblemReason) -> Option<String> {
    status.problems.iter().find(|problem| problem.reason == reason).map(|problem| problem.message.clone())
}

/// Waits for a problem whose message begins so, and checks that it came in time; returns the whole message.
async fn reported_in_time(relay: &RelayProcess, reason: ProblemReason, beginning: &str) -> String {
    let started = Instant::now();
    let begins = |status: &RelayStatus| message(status, reason).is_some_and(|message| message.starts_with(beginning));
    let status = relay.until(beginning, begins).await;
    assert!(started.elapsed() < REPORTED_WITHIN, "{beginning} was reported after {:?}", started.elapsed());
    let message = message(&status, reason).unwrap();
    let time = message.strip_prefix(beginning).unwrap().get(..12).unwrap();
    assert!(time.ends_with(" UTC") && time.matches(':').count() == 2, "{message}");
    message
}

#[tokio::test]
async fn a_silent_broker_is_reported_within_five_seconds_and_events_wait() {
    let setting = Setting::new(Mode::LogTailing).await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    setting.nats.signal("-STOP");
    let beginning = format!("NATS at {} has not answered since ", setting.nats.address());
    let first = reported_in_time(&relay, ProblemReason::BrokerUnreachable, &beginning).await;
    setting.database.app().await.batch_execute(INSERT).await.unwrap();
    let waits = |status: &RelayStatus| status.pending == 1 && status.lag_seconds > 3.0;
    let status = relay.until("pending and lag grow during the outage", waits).await;
    assert_eq!(
        message(&status, ProblemReason::BrokerUnreachable),
        Some(first),
        "each attempt reports the start of the outage"
    );
    assert!(!status.ready, "{status:?}");
    setting.nats.signal("-CONT");
    setting.drained().await;
    relay.until("resolved", |status| status.ready && status.problems.is_empty()).await;
}

#[tokio::test]
async fn a_broker_that_is_silent_in_the_middle_of_publishing_is_reported_within_five_seconds() {
    let setting = Setting::new(Mode::Polling).await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    setting.nats.signal("-STOP");
    let app = setting.database.app().await;
    let many = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         select 'order', n::text, 'Changed', jsonb_build_object('n', 1, 'x', repeat('x', 4096)) from generate_series(1, 3000) n";
    app.batch_execute(many).await.unwrap();
    let beginning = format!("NATS at {} has not answered since ", setting.nats.address());
    reported_in_time(&relay, ProblemReason::BrokerUnreachable, &beginning).await;
    setting.nats.signal("-CONT");
    setting.drained().await;
}

#[tokio::test]
async fn a_killed_broker_is_reported_within_five_seconds() {
    let mut setting = Setting::new(Mode::LogTailing).await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    setting.nats.kill9();
    let beginning = format!("NATS at {} has not accepted connections since ", setting.nats.address());
    let message = reported_in_time(&relay, ProblemReason::BrokerUnreachable, &beginning).await;
    assert!(message.contains(": connection refused") || message.contains(": the connection was closed"), "{message}");
    setting.nats.restart();
    relay.until("resolved", |status| status.ready && status.problems.is_empty()).await;
}

#[tokio::test]
async fn a_killed_database_is_reported_within_five_seconds() {
    let mut setting = Setting::new(Mode::LogTailing).await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    setting.database.server.kill9();
    let address = format!("127.0.0.1:{}", setting.database.server.port());
    let beginning = format!("PostgreSQL at {address} has not accepted connections since ");
    let first = reported_in_time(&relay, ProblemReason::DatabaseUnreachable, &beginning).await;
    let time = |message: &str| message[beginning.len()..].get(..8).unwrap().to_owned();
    let started = Instant::now();
    until("some attempts have failed", async || {
        let status = relay.status().await.unwrap();
        let now = message(&status, ProblemReason::DatabaseUnreachable).expect("the outage lasts");
        assert_eq!(time(&now), time(&first), "each attempt reports the start of the outage");
        started.elapsed() > Duration::from_secs(3)
    })
    .await;
    setting.database.server.restart();
    relay.until("resolved", |status| status.ready && status.problems.is_empty()).await;
}

#[tokio::test]
async fn a_silent_database_is_reported_within_five_seconds() {
    for mode in [Mode::LogTailing, Mode::Polling] {
        let setting = Setting::new(mode).await;
        let relay = setting.start_relay();
        relay.until("leading", |status| status.leading && status.ready).await;
        let beginning = format!("PostgreSQL at 127.0.0.1:{} has not answered since ", setting.database.server.port());
        setting.database.server.signal("-STOP");
        let first = reported_in_time(&relay, ProblemReason::DatabaseUnreachable, &beginning).await;
        // as long as the term lasts, and when its successors cannot connect
        let started = Instant::now();
        until("the outage has lasted", async || {
            let status = relay.status().await.unwrap();
            assert_eq!(message(&status, ProblemReason::DatabaseUnreachable).as_ref(), Some(&first), "{mode:?}");
            assert!(!status.ready, "{mode:?}");
            started.elapsed() > Duration::from_secs(2)
        })
        .await;
        setting.database.server.signal("-CONT");
        setting.database.app().await.batch_execute(INSERT).await.unwrap();
        setting.drained().await;
        relay.until("resolved", |status| status.ready && status.problems.is_empty()).await;
    }
}

/// Whether the relay waits for a lock.
const LOCKED: &str = "select count(*) = 1 from weft.outbox";
const WAITS: &str = "select exists (select from pg_stat_activity \
     where wait_event_type = 'Lock' and application_name = 'weft relay orders')";

/// A relay that has published a row and waits to delete it, on the session by which it leads: the client has locked it.
async fn with_locked_row(mode: Mode) -> (Setting, RelayProcess, tokio_postgres::Client) {
    let mut setting = Setting::new(mode).await;
    // paused, so that the row is locked before it is deleted
    setting.contract.paused = true;
    setting.write_contract();
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready && status.paused).await;
    let somebody = setting.database.superuser().await;
    if mode == Mode::LogTailing {
        // the making of the slot waits for older transactions, as the one below will be
        database::until(&somebody, database::STREAMING).await;
    }
    somebody.batch_execute(INSERT).await.unwrap();
    somebody.batch_execute("begin; select from weft.outbox for update").await.unwrap();
    setting.contract.paused = false;
    setting.write_contract();
    database::until(&somebody, WAITS).await;
    (setting, relay, somebody)
}

#[tokio::test]
async fn a_published_row_that_somebody_has_locked_is_no_outage_and_events_go_on_being_published() {
    for mode in [Mode::LogTailing, Mode::Polling] {
        let (setting, relay, somebody) = with_locked_row(mode).await;
        let app = setting.database.app().await;
        let (started, mut inserted) = (Instant::now(), 1);
        until("the lock was held for 10 s", async || {
            let status = relay.status().await.unwrap();
            assert!(status.ready && status.problems.is_empty(), "{mode:?}: {status:?}");
            if status.published == inserted {
                app.batch_execute(INSERT).await.unwrap();
                inserted += 1;
            }
            // long enough for several events, few enough for the queue of rows to delete
            tokio::time::sleep(Duration::from_millis(500)).await;
            started.elapsed() > Duration::from_secs(10)
        })
        .await;
        assert!(inserted > 2, "{mode:?}: {inserted} events were inserted, each after the one before it was published");
        assert!(
            somebody.query_one(LOCKED, &[]).await.unwrap().get::<_, bool>(0),
            "{mode:?}: only the locked row is left"
        );
        somebody.batch_execute("rollback").await.unwrap();
        setting.drained().await;
        relay.until("published", |status| status.published == inserted && status.problems.is_empty()).await;
        assert_eq!(setting.count().await, Some(inserted), "{mode:?}");
    }
}

#[tokio::test]
async fn a_database_that_falls_silent_while_the_relay_waits_for_a_lock_is_reported_within_five_seconds() {
    let (setting, relay, somebody) = with_locked_row(Mode::LogTailing).await;
    let beginning = format!("PostgreSQL at 127.0.0.1:{} has not answered since ", setting.database.server.port());
    setting.database.server.signal("-STOP");
    reported_in_time(&relay, ProblemReason::DatabaseUnreachable, &beginning).await;
    setting.database.server.signal("-CONT");
    relay.until("resolved", |status| status.ready && status.problems.is_empty()).await;
    assert!(somebody.query_one(LOCKED, &[]).await.unwrap().get::<_, bool>(0), "before the lock is released");
    somebody.batch_execute("rollback").await.unwrap();
    setting.drained().await;
}

#[tokio::test]
async fn a_database_that_is_silent_from_the_start_is_reported_within_five_seconds() {
    let setting = Setting::new(Mode::LogTailing).await;
    setting.database.server.signal("-STOP");
    let relay = setting.start_relay();
    let beginning = format!("PostgreSQL at 127.0.0.1:{} has not answered since ", setting.database.server.port());
    reported_in_time(&relay, ProblemReason::DatabaseUnreachable, &beginning).await;
    setting.database.server.signal("-CONT");
    relay.until("resolved", |status| status.ready && status.problems.is_empty()).await;
}

#[tokio::test]
async fn a_wrong_password_is_reported_with_the_server_s_words() {
    let setting = Setting::new(Mode::Polling).await;
    let superuser = setting.database.superuser().await;
    superuser.batch_execute("alter role relay password 'another one'").await.unwrap();
    let relay = setting.start_relay();
    let refused = |status: &RelayStatus| {
        message(status, ProblemReason::DatabaseNotReady).is_some_and(|message| {
            message.contains("logging in as relay: password authentication failed") && message.contains("28P01")
        })
    };
    relay.until("the password is refused", refused).await;
}

#[tokio::test]
async fn a_broker_at_an_ipv6_address_is_published_to() {
    let mut setting = Setting::new(Mode::LogTailing).await;
    setting.nats = Nats::start_on("::1");
    let url = setting.nats.url();
    assert!(url.contains("[::1]"), "{url}");
    setting.nats_sink().servers = vec![url];
    setting.write_contract();
    let relay = setting.start_relay();
    setting.database.app().await.batch_execute(INSERT).await.unwrap();
    setting.drained().await;
    relay.until("published", |status| status.published == 1 && status.problems.is_empty()).await;
    setting.nats.kill9();
    let beginning = format!("NATS at {} has not accepted connections since ", setting.nats.address());
    reported_in_time(&relay, ProblemReason::BrokerUnreachable, &beginning).await;
}
