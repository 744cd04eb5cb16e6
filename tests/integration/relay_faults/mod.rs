//! What once lost, blocked, doubled or delayed events, one test for each case: `weft relay` as a process, judged by the
//! database's rows, the broker's messages, and what the relay reports.

mod backlog;
mod broker_down;
mod handover;
mod polling;
mod refusals;
mod stream_errors;
mod visibility;

use std::time::Duration;

use async_nats::jetstream::stream;
use tokio_postgres::Client;
use weft::contract::{problem::ProblemReason, relay::Mode, status::RelayStatus};

use crate::{
    database,
    relay_harness::{RelayProcess, STREAM, Setting},
    servers::{self, within},
};

const MODES: [Mode; 2] = [Mode::LogTailing, Mode::Polling];

/// What "within seconds" is here: the debug build, on a machine that runs other tests.
const SOON: Duration = Duration::from_secs(10);

/// Writes events of one aggregate with these numbers, each in a transaction of its own.
async fn insert(client: &Client, kind: &str, aggregate: &str, numbers: impl IntoIterator<Item = i64>) {
    let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         values ($1, $2, 'Changed', jsonb_build_object('n', $3::bigint))";
    for number in numbers {
        client.execute(insert, &[&kind, &aggregate, &number]).await.unwrap();
    }
}

/// A relay that leads and is ready, and streams from its slot if it tails the log.
async fn started(setting: &Setting) -> RelayProcess {
    let relay = setting.start_relay();
    relay.until("leading", |status| status.leading && status.ready).await;
    if setting.contract.mode == Mode::LogTailing {
        streaming(&setting.database.superuser().await).await;
    }
    relay
}

async fn streaming(superuser: &Client) {
    database::until(superuser, database::STREAMING).await;
}

/// Waits until all that was inserted is published and recorded, so that the relay continues after it whatever happens.
async fn settled(setting: &Setting, superuser: &Client) {
    let written = wal_position(superuser).await;
    setting.drained().await;
    confirmed(superuser, SOON * 2, &written).await;
}

/// Waits until nothing streams from the slot.
async fn not_streaming(superuser: &Client) {
    database::until(superuser, "select not exists (select from pg_replication_slots where active)").await;
}

/// Takes the slot away while nothing streams from it.
async fn drop_slot(superuser: &Client) {
    let dropped = "select pg_drop_replication_slot(slot_name) from pg_replication_slots where not active";
    servers::until("the slot is dropped", async || {
        superuser.execute(dropped, &[]).await.is_ok_and(|dropped| dropped > 0)
    })
    .await;
}

/// Waits until the stream has this many messages.
async fn stored(setting: &Setting, limit: Duration, count: u64) {
    within(limit, &format!("{count} events are in the stream"), async || setting.count().await == Some(count)).await;
}

/// The numbers of one aggregate's events, in the order of the stream.
async fn numbers(setting: &Setting, aggregate: &str) -> Vec<u64> {
    let delivered = setting.delivered().await.into_iter();
    delivered.filter(|event| event.aggregate == aggregate).map(|event| event.number).collect()
}

/// A stream that accepts these subjects, as a team's own.
fn taking(subjects: &[&str]) -> stream::Config {
    stream::Config {
        name: STREAM.to_owned(),
        subjects: subjects.iter().map(|&subject| subject.to_owned()).collect(),
        ..stream::Config::default()
    }
}

fn has(status: &RelayStatus, reason: ProblemReason) -> bool {
    status.problems.iter().any(|problem| problem.reason == reason)
}

/// Whether the slot has confirmed this position.
async fn confirmed(superuser: &Client, limit: Duration, position: &str) {
    let query = format!("select exists (select from pg_replication_slots where confirmed_flush_lsn >= '{position}')");
    within(limit, &format!("the slot is confirmed up to {position}"), async || {
        superuser.query_one(&query, &[]).await.unwrap().get(0)
    })
    .await;
}

async fn wal_position(superuser: &Client) -> String {
    superuser.query_one("select pg_current_wal_lsn()::text", &[]).await.unwrap().get(0)
}
