//! What the operator costs per Microservice: requests, CPU and memory, against an API server that answers at once.
//!
//! Everything but the network and the real server: 2,000 Microservices with a database are created, looked at again with
//! nothing changed, and changed. `WEFT_BENCH_OBJECTS` says another number.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_precision_loss
)]

#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/operator/server/mod.rs"]
mod server;
#[path = "../tests/support/settings.rs"]
mod settings;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use server::{Asked, Server};
use settings::settings;
use tokio_util::sync::CancellationToken;
use weft::{
    api::v1alpha1::Microservice,
    controllers::{
        kinds::reconcile,
        resources::key::{Key, ObjectKind},
        runtime::{Context, StatusPace, events::Events, metrics::OperatorMetrics},
    },
};

fn context(server: &Server) -> Arc<Context> {
    let settings = settings();
    let (events, _) = Events::new(server.client(), "bench".to_owned(), CancellationToken::new());
    let mut context =
        Context::new(server.client(), settings, events, OperatorMetrics::register(&mut Registry::default()));
    // what one object costs is measured, not how many statuses a second there may be
    context.pace = StatusPace::with_rate(1e9);
    Arc::new(context)
}

fn object(number: usize, generation: usize) -> Value {
    json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "Microservice",
        "metadata": {"name": format!("service-{number}"), "namespace": "shop", "uid": format!("uid-{number}"),
            "generation": generation, "resourceVersion": generation.to_string()},
        "spec": {"image": format!("shop/service:{generation}"), "replicas": 2, "ports": [{"name": "http", "port": 8080}],
            "database": {"postgres": {"version": "17", "parameters": {"work_mem": format!("{generation}MB")}}}},
    })
}

/// A status is answered with the whole object, as by the real server.
fn server() -> Server {
    let server = Server::default();
    server.rule(|asked: &Asked| {
        let number =
            asked.line().strip_prefix("PATCH microservices/service-")?.strip_suffix("/status")?.parse().ok()?;
        let generation = asked.body["status"]["observedGeneration"].as_u64()?;
        let mut answer = object(number, usize::try_from(generation).ok()?);
        answer["status"] = asked.body["status"].clone();
        Some((200, answer))
    });
    server
}

/// A status is written so often at most.
const PACE: Duration = Duration::from_secs(10);

async fn pass(name: &str, context: &Arc<Context>, server: &Server, objects: usize) {
    tokio::time::sleep(PACE).await;
    let (started, cpu_before) = (Instant::now(), cpu());
    let (mut requests, mut seconds) = (0, Vec::with_capacity(objects));
    for number in 0..objects {
        let one = Instant::now();
        reconcile(context, &Key::new(ObjectKind::Microservice, "shop", format!("service-{number}"))).await;
        seconds.push(one.elapsed().as_secs_f64());
        requests += server.lines().len();
    }
    seconds.sort_by(f64::total_cmp);
    println!(
        "{name}: {:.2} requests an object, {:.2} CPU-s per 1,000 objects, p50 {:.2} ms, p99 {:.2} ms, {:.1} s in all, RSS {} MiB",
        requests as f64 / objects as f64,
        (cpu() - cpu_before) * 1000.0 / objects as f64,
        seconds[objects / 2] * 1e3,
        seconds[objects * 99 / 100] * 1e3,
        started.elapsed().as_secs_f64(),
        resident() / 1024,
    );
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let objects: usize = std::env::var("WEFT_BENCH_OBJECTS").ok().map_or(2000, |count| count.parse().unwrap());
    let server = server();
    let first = context(&server);
    let set = |context: &Context, generation| {
        for number in 0..objects {
            let object: Microservice = serde_json::from_value(object(number, generation)).unwrap();
            context.store().set(object);
        }
    };
    println!("{objects} Microservices with a database; the scripted API server's own cost and memory are included");
    set(&first, 1);
    pass("created, until the database is made", &first, &server, objects).await;
    server.settle(&first, 1_000_000_000);
    pass("its set-up has succeeded", &first, &server, objects).await;
    server.settle(&first, 2_000_000_000);
    pass("its pods are ready", &first, &server, objects).await;
    pass("unchanged", &first, &server, objects).await;
    set(&first, 2);
    pass("database parameter and image changed", &first, &server, objects).await;
}

/// User and system seconds of this process.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = |field: &str| field.parse::<f64>().unwrap();
    (ticks(fields[11]) + ticks(fields[12])) / 100.0
}

/// Resident memory in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}
