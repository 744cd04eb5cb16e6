//! `make bench ONLY=saga`: what the saga orchestrator does per second and per CPU-second, and how long a saga takes.
//!
//! Real PostgreSQL with `fsync` and `synchronous_commit` on, the release build of `weft saga` as a process of its own, no-op
//! HTTP participants in another. 256 clients start sagas of three steps and wait for the end of each; a tenth is refused by
//! the last step and undone. Everything shares the machine. `WEFT_BENCH_SECONDS` and `WEFT_BENCH_CLIENTS` change that.

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

#[path = "../tests/integration/database.rs"]
mod database;
#[path = "../tests/integration/servers/mod.rs"]
mod servers;

use std::{
    fs,
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
};
use weft::{
    contract::{Contract, database_setup::Purpose, orchestrator::Orchestrator},
    domain::saga::definition::{Call, Definition, Step, Task, Transaction, Undo},
};

use crate::{database::Database, servers::Postgres};

/// Set in the process that plays the participants: its port.
const PARTICIPANT: &str = "WEFT_BENCH_PARTICIPANT";
const WARM_UP: Duration = Duration::from_secs(3);

fn main() {
    if let Ok(port) = std::env::var(PARTICIPANT) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        return runtime.block_on(participate(port.parse().unwrap()));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(measure());
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |text| text.parse().unwrap())
}

/// Ends with the benchmark.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn measure() {
    let (seconds, clients) = (number("WEFT_BENCH_SECONDS", 20), number("WEFT_BENCH_CLIENTS", 256));
    let server =
        Postgres::start_with(&["fsync=on", "synchronous_commit=on", "shared_buffers=256MB", "max_wal_size=4GB"]);
    let database = Database::on(server, Purpose::Orchestrator).await;
    database.set_up_well();
    let (port, api_port, admin_port) = (servers::free_port(), servers::free_port(), servers::free_port());
    let participant =
        Process(Command::new(std::env::current_exe().unwrap()).env(PARTICIPANT, port.to_string()).spawn().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("orchestrator.yaml");
    let contract = Orchestrator {
        name: "bench".into(),
        namespace: "bench".into(),
        api_port,
        database: database.login("app"),
        retention_ms: 3_600_000,
        sagas: vec![definition(port)],
        draining: Vec::new(),
        starts: Vec::new(),
        choreographies: Vec::new(),
    };
    fs::write(&config, contract.to_yaml().unwrap()).unwrap();
    // it may measure a binary that was built elsewhere
    let program = std::env::var_os("WEFT_TEST_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_weft").into());
    let mut command = Command::new(program);
    command.args(["saga", "run", "--config"]).arg(&config).env("WEFT_ADMIN_PORT", admin_port.to_string());
    let engine = Process(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
    let api = SocketAddr::from(([127, 0, 0, 1], api_port));
    servers::until("the first saga ends", async || {
        let Ok(mut client) = Client::connect(api).await else { return false };
        client.saga(0).await.contains("Completed")
    })
    .await;

    let watched = database.superuser().await;
    let tally = Arc::new(Tally::default());
    let running: Vec<_> = (0..clients).map(|client| tokio::spawn(run(api, client, Arc::clone(&tally)))).collect();
    tokio::time::sleep(WARM_UP).await;
    let before = Sample::take(&engine, &participant, database.server.port(), &watched, &tally).await;
    tally.measuring.store(1, Relaxed);
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let after = Sample::take(&engine, &participant, database.server.port(), &watched, &tally).await;
    tally.measuring.store(0, Relaxed);
    running.iter().for_each(tokio::task::JoinHandle::abort);
    report(&before, &after, &tally, clients);
}

fn definition(port: u16) -> Definition {
    let call = |command: &str| Call {
        service: "bench".into(),
        command: command.into(),
        method: "POST".into(),
        url: format!("http://127.0.0.1:{port}/{command}"),
        with: [("order", "input.orderId"), ("refuse", "input.refuse")]
            .map(|(k, v)| (k.to_owned(), v.to_owned()))
            .into(),
        ..Call::default()
    };
    let step = |name: &str, undo: bool| Step {
        name: name.into(),
        task: Task::call(Transaction {
            action: call(name),
            undo: if undo { Undo::Call(call(&format!("undo-{name}"))) } else { Undo::Nothing },
            timeout_ms: 10_000,
            failures: [("Refused".to_owned(), "NO".to_owned())].into(),
            ..Transaction::default()
        }),
        ..Step::default()
    };
    Definition {
        name: "order".into(),
        deadline_ms: 300_000,
        steps: vec![step("reserve", true), step("pack", true), step("charge", false)],
        ..Definition::default()
    }
    .seal()
}

#[derive(Default)]
struct Tally {
    completed: AtomicU64,
    compensated: AtomicU64,
    measuring: AtomicU64,
    /// Microseconds of each saga while measuring.
    latencies: std::sync::Mutex<Vec<u64>>,
}

async fn run(api: SocketAddr, client: u64, tally: Arc<Tally>) {
    let mut connection = Client::connect(api).await.unwrap();
    let mut latencies = 0_u64;
    for number in client.. {
        let began = Instant::now();
        let answer = connection.saga(number).await;
        let ended = if answer.contains("\"Completed\"") { &tally.completed } else { &tally.compensated };
        assert!(answer.contains("\"Completed\"") || answer.contains("\"Compensated\""), "{answer}");
        ended.fetch_add(1, Relaxed);
        if tally.measuring.load(Relaxed) == 1 {
            latencies += 1;
            tally.latencies.lock().unwrap().push(began.elapsed().as_micros() as u64);
        }
    }
    assert!(latencies > 0);
}

/// The least that an HTTP client can be, so that its share of the CPU is small.
struct Client {
    stream: TcpStream,
    buffer: Vec<u8>,
}

impl Client {
    async fn connect(api: SocketAddr) -> std::io::Result<Self> {
        let stream = TcpStream::connect(api).await?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: Vec::with_capacity(4096) })
    }

    async fn saga(&mut self, number: u64) -> String {
        let refuse = number % 10 == 9;
        let body = format!(r#"{{"orderId":"order-{number}","refuse":{refuse}}}"#);
        let request = format!(
            "POST /sagas/order?wait=true HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.write_all(request.as_bytes()).await.unwrap();
        message(&mut self.stream, &mut self.buffer).await.expect("an answer")
    }
}

/// Reads one HTTP message with a Content-Length; `None` when the other side has closed.
async fn message(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<String> {
    loop {
        if let Some(head) = buffer.windows(4).position(|window| window == b"\r\n\r\n") {
            let text = String::from_utf8_lossy(&buffer[..head]).to_ascii_lowercase();
            let length = text.lines().find_map(|line| line.strip_prefix("content-length:"));
            let end = head + 4 + length.map_or(0, |length| length.trim().parse::<usize>().unwrap());
            if buffer.len() >= end {
                let whole = String::from_utf8_lossy(&buffer[..end]).into_owned();
                buffer.drain(..end);
                return Some(whole);
            }
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

async fn participate(port: u16) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    socket.set_reuseport(true).unwrap();
    socket.bind(SocketAddr::from(([127, 0, 0, 1], port))).unwrap();
    let listener = socket.listen(4096).unwrap();
    loop {
        let (mut stream, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            stream.set_nodelay(true).unwrap();
            let mut buffer = Vec::with_capacity(4096);
            while let Some(request) = message(&mut stream, &mut buffer).await {
                let refused = request.starts_with("POST /charge") && request.ends_with("\"refuse\":true}");
                let answer: &[u8] = if refused {
                    b"HTTP/1.1 409 Conflict\r\ncontent-type: application/problem+json\r\ncontent-length: 18\r\n\r\n{\"type\":\"Refused\"}"
                } else {
                    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 8\r\n\r\n{\"id\":1}"
                };
                if stream.write_all(answer).await.is_err() {
                    return;
                }
            }
        });
    }
}

struct Sample {
    at: Instant,
    engine: f64,
    participant: f64,
    clients: f64,
    postgres: f64,
    wal: i64,
    commits: i64,
    completed: u64,
    compensated: u64,
    rss: u64,
}

impl Sample {
    async fn take(
        engine: &Process,
        participant: &Process,
        port: u16,
        client: &tokio_postgres::Client,
        tally: &Tally,
    ) -> Self {
        let sql = "select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::bigint, xact_commit from pg_stat_database where datname = current_database()";
        let row = client.query_one(sql, &[]).await.unwrap();
        Self {
            at: Instant::now(),
            engine: cpu(engine.0.id()),
            participant: cpu(participant.0.id()),
            clients: cpu(std::process::id()),
            postgres: postgres_cpu(port),
            wal: row.get(0),
            commits: row.get(1),
            completed: tally.completed.load(Relaxed),
            compensated: tally.compensated.load(Relaxed),
            rss: rss(engine.0.id()),
        }
    }
}

/// User and system seconds of a process, by `/proc/PID/stat` in ticks of a hundredth.
fn cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(')').next()?.split_whitespace().nth(1)?.parse().ok()
}

fn processes() -> Vec<u32> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// The postmaster that was started with this port, and all its children.
fn postgres_cpu(port: u16) -> f64 {
    let needle = format!("port={port}");
    let is_postmaster = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).next().is_some_and(|program| program.ends_with(b"postgres"))
            && line.split(|byte| *byte == 0).any(|argument| argument == needle.as_bytes())
    };
    let all = processes();
    let Some(postmaster) = all.iter().copied().find(is_postmaster) else { panic!("no postmaster with {needle}") };
    cpu(postmaster) + all.iter().filter(|pid| parent(**pid) == Some(postmaster)).map(|pid| cpu(*pid)).sum::<f64>()
}

/// KiB.
fn rss(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn report(before: &Sample, after: &Sample, tally: &Tally, clients: u64) {
    let seconds = (after.at - before.at).as_secs_f64();
    let completed = after.completed - before.completed;
    let compensated = after.compensated - before.compensated;
    let sagas = (completed + compensated) as f64;
    // three calls forward, two back when compensated
    let steps = completed as f64 * 3.0 + compensated as f64 * 5.0;
    let mut latencies = tally.latencies.lock().unwrap().clone();
    latencies.sort_unstable();
    let quantile = |q: f64| latencies.get((latencies.len() as f64 * q) as usize).copied().unwrap_or(0) as f64 / 1_000.0;
    let per_thousand = |cpu: f64| cpu / sagas * 1_000.0;
    let [engine, postgres, participant, own] = [
        after.engine - before.engine,
        after.postgres - before.postgres,
        after.participant - before.participant,
        after.clients - before.clients,
    ];
    println!("saga: {clients} clients, {seconds:.0} s, {completed} completed, {compensated} compensated");
    println!("  {:.0} sagas/s, {:.0} steps/s", sagas / seconds, steps / seconds);
    println!("  latency ms: p50 {:.1}, p99 {:.1}, p99.9 {:.1}", quantile(0.5), quantile(0.99), quantile(0.999));
    println!("  CPU-s per 1,000 sagas: engine {:.3}, PostgreSQL {:.3}", per_thousand(engine), per_thousand(postgres));
    println!("  (participants {:.3}, clients {:.3})", per_thousand(participant), per_thousand(own));
    println!("  steps per CPU-s of everything: {:.0}", steps / (engine + postgres + participant + own));
    println!(
        "  WAL bytes per step {:.0}, commits/s {:.0}",
        (after.wal - before.wal) as f64 / steps,
        (after.commits - before.commits) as f64 / seconds
    );
    println!("  engine RSS {} MiB", after.rss / 1024);
}
