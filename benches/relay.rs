//! `make bench ONLY=relay`: what the relay does per second and per CPU-second, and how long an event takes.
//!
//! Real PostgreSQL with `fsync` on, a real nats-server with file storage, the release build of `weft relay` as a process of its
//! own. First 500,000 events of 200 bytes (1,000 aggregates, 100 events to a transaction) are drained, deletion of the
//! rows included; then 2,000 events a second are written, each in a transaction of its own, by 16 connections; at last
//! 100,000 events of one aggregate are drained, with 1 ms to the broker and back.
//! `WEFT_BENCH_EVENTS`, `WEFT_BENCH_AGGREGATES`, `WEFT_BENCH_HOT`, `WEFT_BENCH_SECONDS` and `WEFT_BENCH_MODE` change that.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a benchmark"
)]

#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/support/checker.rs"]
mod checker;
#[path = "../tests/integration/database.rs"]
mod database;
#[path = "../tests/integration/relay_harness.rs"]
mod relay_harness;
#[path = "../tests/integration/servers/mod.rs"]
mod servers;

use std::{
    collections::HashMap,
    fs,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_nats::jetstream::{self, consumer::push};
use futures::StreamExt;
use uuid::Uuid;
use weft::contract::{database_setup::Purpose, relay::Mode};

use crate::{
    database::Database,
    relay_harness::{RelayProcess, STREAM, Setting},
    servers::Postgres,
};

const RATE: u32 = 2_000;
const WRITERS: u32 = 16;

#[tokio::main]
async fn main() {
    let hot = number("WEFT_BENCH_HOT", 100_000);
    let events = number("WEFT_BENCH_EVENTS", 500_000);
    let aggregates = number("WEFT_BENCH_AGGREGATES", 1_000);
    let seconds = number("WEFT_BENCH_SECONDS", 20);
    let only = std::env::var("WEFT_BENCH_MODE").unwrap_or_default();
    for mode in [Mode::LogTailing, Mode::Polling] {
        if only.is_empty() || only == format!("{mode:?}") {
            let setting = setting(mode).await;
            drain(&setting, mode, events, aggregates).await;
            pace(&setting, mode, seconds).await;
            let mut one = self::setting(mode).await;
            let (_database, broker) = one.add_proxies();
            broker.delay(Duration::from_micros(500));
            drain(&one, mode, hot, 1).await;
        }
    }
}

fn number(name: &str, or: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(or)
}

async fn setting(mode: Mode) -> Setting {
    let parameters = ["fsync=on", "shared_buffers=256MB", "max_wal_size=4GB", "checkpoint_timeout=30min"];
    let server = Postgres::start_with(&parameters);
    Setting::with(mode, Database::on(server, Purpose::Service).await)
}

/// Everything is there before the relay is; with log tailing so is the slot.
async fn drain(setting: &Setting, mode: Mode, events: u64, aggregates: u64) {
    let client = setting.database.superuser().await;
    {
        let relay = setting.start_relay();
        relay.until("ready", |status| status.leading && status.ready).await;
        if mode == Mode::LogTailing {
            database::until(&client, "select exists (select from weft.relay_ledger where lsn is not null)").await;
        }
    }
    let rows = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         select 'order', (i % $3)::text, 'Changed', jsonb_build_object('n', i / $3 + 1, 'x', repeat('x', 170)) \
           from generate_series($1::bigint, $2::bigint - 1) i order by i";
    let statement = client.prepare(rows).await.unwrap();
    for first in (0..events.cast_signed()).step_by(100) {
        let end = (first + 100).min(events.cast_signed());
        client.execute(&statement, &[&first, &end, &(aggregates.cast_signed())]).await.unwrap();
    }
    client.batch_execute("analyze weft.outbox; checkpoint").await.unwrap();
    let mut stream = stream(setting).await;
    let before = servers_cpu();
    let begun = Instant::now();
    let relay = setting.start_relay();
    while stream.info().await.unwrap().state.messages < events {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let published = begun.elapsed().as_secs_f64();
    database::until(&client, "select not exists (select from weft.outbox)").await;
    let deleted = begun.elapsed().as_secs_f64();
    let usage = Usage::of(&relay);
    let million = events as f64 / 1e6;
    println!("relay {mode:?}: drained {events} events of {aggregates} aggregates");
    println!("  events/s published         {:>10.0}", events as f64 / published);
    println!("  events/s, rows deleted too {:>10.0}", events as f64 / deleted);
    println!("  CPU-s per million, relay   {:>10.2}", usage.cpu / million);
    println!("  CPU-s per million, servers {:>10.2}", (servers_cpu() - before) / million);
    println!("  peak RSS, MiB              {:>10.1}", usage.peak / 1024.0);
    let committed = (0..aggregates.min(events))
        .map(|aggregate| (aggregate.to_string(), (events - aggregate).div_ceil(aggregates)))
        .collect();
    println!("  {}", checker::check(&committed, &setting.delivered().await));
}

async fn stream(setting: &Setting) -> jetstream::stream::Stream {
    let client = async_nats::connect(setting.nats.url()).await.unwrap();
    jetstream::new(client).get_stream(STREAM).await.unwrap()
}

/// From the commit's return to the delivery out of the stream.
async fn pace(setting: &Setting, mode: Mode, seconds: u64) {
    let relay = setting.start_relay();
    relay.until("ready", |status| status.leading && status.ready).await;
    let client = async_nats::connect(setting.nats.url()).await.unwrap();
    let config = push::OrderedConfig {
        deliver_subject: client.new_inbox(),
        deliver_policy: jetstream::consumer::DeliverPolicy::New,
        ..push::OrderedConfig::default()
    };
    let mut messages = stream(setting).await.create_consumer(config).await.unwrap().messages().await.unwrap();
    let total = RATE as usize * seconds as usize;
    let committed: Arc<Mutex<HashMap<Uuid, Instant>>> = Arc::default();
    let reader = tokio::spawn(async move {
        let mut received: HashMap<Uuid, Instant> = HashMap::with_capacity(total);
        while received.len() < total {
            let message = messages.next().await.unwrap().unwrap();
            let id = message.headers.as_ref().unwrap().get("ce-id").unwrap().as_str().parse().unwrap();
            received.entry(id).or_insert_with(Instant::now);
        }
        received
    });
    let before = Usage::of(&relay);
    let begun = Instant::now();
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let url = setting.database.server.url(servers::SUPERUSER, servers::SUPERUSER_PASSWORD, database::DATABASE);
            tokio::spawn(write(url, writer, total / WRITERS as usize, begun, committed.clone()))
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let took = begun.elapsed().as_secs_f64();
    let received = reader.await.unwrap();
    let committed = committed.lock().unwrap();
    let mut latencies: Vec<f64> =
        received.iter().map(|(id, at)| at.saturating_duration_since(committed[id]).as_secs_f64() * 1e3).collect();
    latencies.sort_unstable_by(f64::total_cmp);
    let percentile = |p: f64| latencies[((latencies.len() - 1) as f64 * p) as usize];
    let cpu = Usage::of(&relay).cpu - before.cpu;
    println!("relay {mode:?}: {:.0} events/s for {seconds} s, one to a transaction", total as f64 / took);
    println!(
        "  ms from commit to stream   p50 {:.2}  p90 {:.2}  p99 {:.2}  max {:.2}",
        percentile(0.5),
        percentile(0.9),
        percentile(0.99),
        percentile(1.0)
    );
    println!("  CPU-s per million, relay   {:>10.2}", cpu / (total as f64 / 1e6));
}

async fn write(url: String, writer: u32, count: usize, begun: Instant, committed: Arc<Mutex<HashMap<Uuid, Instant>>>) {
    let client = servers::connect(&url).await.unwrap();
    let insert = "insert into weft.outbox (id, aggregate_type, aggregate_id, type, payload) \
         values ($1::uuid, 'order', $2, 'Changed', jsonb_build_object('x', repeat('x', 180)))";
    let statement = client.prepare(insert).await.unwrap();
    let interval = Duration::from_secs(1) * WRITERS / RATE;
    for turn in 0..count {
        let due = begun + interval * turn as u32 + interval * writer / WRITERS;
        tokio::time::sleep_until(due.into()).await;
        let (id, aggregate) = (Uuid::new_v4(), format!("{writer}-{}", turn % 64));
        client.execute(&statement, &[&id, &aggregate]).await.unwrap();
        committed.lock().unwrap().insert(id, Instant::now());
    }
}

/// CPU-seconds and peak memory of a process, from `/proc`.
struct Usage {
    cpu: f64,
    /// KiB
    peak: f64,
}

impl Usage {
    fn of(relay: &RelayProcess) -> Self {
        let pid = relay.pid();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        Self { cpu: cpu(pid).unwrap(), peak: peak.trim().trim_end_matches(" kB").parse().unwrap() }
    }
}

/// User and system time of a process, in seconds (`/proc/PID/stat` counts hundredths).
fn cpu(pid: u32) -> Option<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let mut ticks = || fields.next()?.parse::<f64>().ok();
    Some((ticks()? + ticks()?) / 100.0)
}

/// Of all PostgreSQL and NATS processes that are alive: meaningful when no others run.
fn servers_cpu() -> f64 {
    let pids = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let is_server = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm"))
            .is_ok_and(|name| matches!(name.trim(), "postgres" | "nats-server"))
    };
    pids.filter(is_server).filter_map(cpu).sum()
}
