//! `weft relay` as a separate process between a real database and a real broker, and writers with many aggregates.

#![allow(dead_code, reason = "each test uses what it needs")]

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::jetstream::{self, consumer::pull};
use futures::StreamExt;
use rand::{Rng, SeedableRng, rngs::StdRng};
use tempfile::TempDir;
use tokio::{sync::watch, time::MissedTickBehavior};
use weft::{
    contract::{
        Contract,
        relay::{Format, Mode, NatsSink, Relay, Sink},
        status::RelayStatus,
    },
    domain::event::decode,
};

use crate::{
    checker::Delivered,
    database::{DATABASE, Database, address},
    servers::{self, Nats, Program, Proxy, SUPERUSER, SUPERUSER_PASSWORD},
};

pub const STREAM: &str = "events";
pub const RELAY: &str = "orders";
pub const MODES: [Mode; 2] = [Mode::LogTailing, Mode::Polling];

const AGGREGATES: &str = "create table aggregates (id text primary key, n bigint not null default 0)";

/// Database, broker and contract.
#[derive(Debug)]
pub struct Setting {
    pub database: Database,
    pub nats: Nats,
    folder: TempDir,
    pub contract: Relay,
}

impl Setting {
    pub async fn new(mode: Mode) -> Self {
        Self::with(mode, Database::empty().await)
    }

    pub fn with(mode: Mode, database: Database) -> Self {
        database.write_migration("001_aggregates.sql", AGGREGATES);
        database.set_up_well();
        let nats = Nats::start();
        let contract = Relay {
            name: RELAY.to_owned(),
            namespace: "shop".to_owned(),
            service: "orders".to_owned(),
            mode,
            source: database.login("relay"),
            sink: Sink::Nats(NatsSink {
                servers: vec![nats.url()],
                secret_folder: None,
                inbox_prefix: None,
                stream: STREAM.to_owned(),
                subject: "events.{namespace}.{service}.{aggregate_type}.{type}".to_owned(),
                max_age_seconds: 3600,
            }),
            format: Format::CloudEvents,
            keep_published_ms: 0,
            dead_letter: None,
            paused: false,
            version: String::new(),
        };
        let setting = Self { database, nats, folder: tempfile::tempdir().unwrap(), contract };
        setting.write_contract();
        setting
    }

    pub fn contract_file(&self) -> PathBuf {
        self.folder.path().join("relay.yaml")
    }

    /// Replaces the file atomically, as a ConfigMap's volume does.
    pub fn write_contract(&self) {
        let new = self.folder.path().join("relay.yaml.new");
        fs::write(&new, self.contract.clone().seal().to_yaml().unwrap()).unwrap();
        fs::rename(new, self.contract_file()).unwrap();
    }

    /// Puts a proxy between the relay and the database, and another one between it and the broker.
    pub fn add_proxies(&mut self) -> (Proxy, Proxy) {
        let database = Proxy::before(self.database.server.port());
        let broker = Proxy::before(self.nats.port());
        self.contract.source.server = address(database.port(), DATABASE);
        self.nats_sink().servers = vec![format!("nats://127.0.0.1:{}", broker.port())];
        self.write_contract();
        (database, broker)
    }

    pub fn nats_sink(&mut self) -> &mut NatsSink {
        let Sink::Nats(sink) = &mut self.contract.sink else { panic!("the harness publishes to NATS") };
        sink
    }

    /// A connection to the broker, as an administrator's.
    pub async fn jetstream(&self) -> jetstream::Context {
        jetstream::new(async_nats::connect(self.nats.url()).await.unwrap())
    }

    /// The superuser's URL, for writers.
    pub fn url(&self) -> String {
        self.database.server.url(SUPERUSER, SUPERUSER_PASSWORD, crate::database::DATABASE)
    }

    pub fn start_relay(&self) -> RelayProcess {
        run_relay(&self.contract_file())
    }

    /// Starts a relay under another name, as after the OutboxRelay was replaced by another one.
    pub fn start_relay_as(&self, name: &str) -> RelayProcess {
        let file = self.folder.path().join(format!("{name}.yaml"));
        let contract = Relay { name: name.to_owned(), ..self.contract.clone() };
        fs::write(&file, contract.to_yaml().unwrap()).unwrap();
        run_relay(&file)
    }

    /// Waits until the outbox is empty.
    pub async fn drained(&self) {
        let client = self.database.superuser().await;
        crate::database::until(&client, "select not exists (select from weft.outbox)").await;
    }

    /// The aggregates' committed counters.
    pub async fn committed(&self) -> BTreeMap<String, u64> {
        let client = self.database.superuser().await;
        let rows = client.query("select id, n from aggregates where n > 0", &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get::<_, i64>(1).unsigned_abs())).collect()
    }

    /// All messages of the stream, as a consumer reads them.
    pub async fn delivered(&self) -> Vec<Delivered> {
        self.messages().await.iter().map(delivered).collect()
    }

    /// Number of messages in the stream; `None` while it cannot be queried.
    pub async fn count(&self) -> Option<u64> {
        let client = async_nats::connect(self.nats.url()).await.ok()?;
        let mut stream = jetstream::new(client).get_stream(STREAM).await.ok()?;
        Some(stream.info().await.ok()?.state.messages)
    }

    pub async fn messages(&self) -> Vec<async_nats::Message> {
        self.messages_of("").await
    }

    /// The messages whose subject matches `filter`, in their order.
    pub async fn messages_of(&self, filter: &str) -> Vec<async_nats::Message> {
        let stream = self.jetstream().await.get_stream(STREAM).await.unwrap();
        let config = pull::OrderedConfig { filter_subject: filter.to_owned(), ..pull::OrderedConfig::default() };
        let consumer = stream.create_consumer(config).await.unwrap();
        let count = consumer.cached_info().num_pending;
        let mut messages = consumer.messages().await.unwrap();
        let mut all = Vec::new();
        while all.len() as u64 != count {
            let message =
                tokio::time::timeout(Duration::from_secs(30), messages.next()).await.unwrap().unwrap().unwrap();
            let (message, _acker) = message.split();
            all.push(message);
        }
        all
    }
}

fn delivered(message: &async_nats::Message) -> Delivered {
    let headers = message.headers.as_ref().unwrap();
    let header = |name: &str| headers.get(name).unwrap().as_str().to_owned();
    let payload: serde_json::Value = serde_json::from_slice(&message.payload).unwrap();
    assert!(header("Nats-Msg-Id").starts_with(&format!("{} {} ", header("ce-source"), header("ce-id"))));
    Delivered {
        id: header("ce-id"),
        aggregate: decode(&header("ce-subject")).into_owned(),
        number: payload["n"].as_u64().unwrap(),
        sequence: header("ce-sequence"),
    }
}

/// A running `weft relay`; killed when dropped.
pub type RelayProcess = Program<RelayStatus>;

pub fn run_relay(contract: &std::path::Path) -> RelayProcess {
    Program::run("relay", contract, servers::START_DEADLINE)
}

/// Everything that is published, as it passes, also what the stream drops as a duplicate.
#[derive(Debug)]
pub struct Tap {
    passed: watch::Receiver<Vec<Passed>>,
    reader: tokio::task::JoinHandle<()>,
}

/// A publish that passed.
#[derive(Clone, Debug)]
pub struct Passed {
    pub at: Instant,
    pub event: Delivered,
    /// Whether an event with this id passed before.
    pub again: bool,
}

impl Tap {
    /// Begins to watch what `setting`'s broker is sent.
    pub async fn start(setting: &Setting) -> Self {
        let client = async_nats::connect(setting.nats.url()).await.unwrap();
        let mut messages = client.subscribe("events.>").await.unwrap();
        client.flush().await.unwrap();
        let (sender, passed) = watch::channel(Vec::new());
        let reader = tokio::spawn(async move {
            let _connected = client;
            let mut ids = HashSet::new();
            while let Some(message) = messages.next().await {
                let event = delivered(&message);
                let again = !ids.insert(event.id.clone());
                sender.send_modify(|passed: &mut Vec<Passed>| passed.push(Passed { at: Instant::now(), event, again }));
            }
        });
        Self { passed, reader }
    }

    pub fn all(&self) -> Vec<Passed> {
        self.passed.borrow().clone()
    }

    pub fn count(&self) -> usize {
        self.passed.borrow().len()
    }

    /// Publishes of an event that had been published before.
    pub fn duplicates(&self) -> usize {
        self.passed.borrow().iter().filter(|passed| passed.again).count()
    }

    /// Waits for the first event after this moment that had not passed before.
    pub async fn next_new(&self, after: Instant) -> Passed {
        let mut passed = self.passed.clone();
        let find = |all: &[Passed]| {
            let later = all.iter().rev().take_while(|passed| passed.at > after);
            later.filter(|passed| !passed.again).last().cloned()
        };
        let found = passed.wait_for(|all| find(all).is_some());
        let found = tokio::time::timeout(servers::START_DEADLINE, found).await.expect("an event is published").unwrap();
        find(&found).unwrap()
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Writers that commit, roll back, keep transactions open, and survive crashes of the database.
#[derive(Debug)]
pub struct Writers {
    tasks: Vec<tokio::task::JoinHandle<()>>,
    ended: Arc<AtomicBool>,
}

impl Writers {
    /// `count` writers over 200 aggregates; each makes `transactions` transactions.
    pub fn start(url: &str, seed: u64, count: u64, transactions: usize) -> Self {
        Self::spawn(url, seed, count, transactions, Duration::ZERO)
    }

    /// As [`Writers::start`] without an end; each begins a transaction every `interval`.
    pub fn paced(url: &str, seed: u64, count: u64, interval: Duration) -> Self {
        Self::spawn(url, seed, count, usize::MAX, interval)
    }

    fn spawn(url: &str, seed: u64, count: u64, transactions: usize, interval: Duration) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let task = |writer| {
            let (url, ended) = (url.to_owned(), ended.clone());
            tokio::spawn(async move { write(&url, seed ^ (writer << 32), transactions, interval, &ended).await })
        };
        Self { tasks: (0..count).map(task).collect(), ended: ended.clone() }
    }

    /// Waits for all transactions.
    pub async fn finished(self) {
        for task in self.tasks {
            task.await.unwrap();
        }
    }

    pub fn are_finished(&self) -> bool {
        self.tasks.iter().all(tokio::task::JoinHandle::is_finished)
    }

    pub async fn stop(self) {
        self.ended.store(true, Ordering::Relaxed);
        self.finished().await;
    }
}

async fn write(url: &str, seed: u64, transactions: usize, interval: Duration, ended: &AtomicBool) {
    let mut pace = (!interval.is_zero()).then(|| {
        let mut pace = tokio::time::interval(interval);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        pace
    });
    let mut random = StdRng::seed_from_u64(seed);
    let mut client = None;
    let mut left = transactions;
    while left > 0 && !ended.load(Ordering::Relaxed) {
        let Some(connected) = &mut client else {
            client = servers::connect(url).await.ok();
            if client.is_none() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            continue;
        };
        if let Some(pace) = &mut pace {
            pace.tick().await;
        }
        match transaction(connected, &mut random).await {
            Ok(()) => left -= 1,
            Err(_) => client = None,
        }
    }
}

/// One transaction of one to four events. Aggregates are locked in order, so that writers cannot deadlock; the lock makes the
/// order of an aggregate's numbers the order of its commits.
async fn transaction(client: &mut tokio_postgres::Client, random: &mut StdRng) -> Result<(), tokio_postgres::Error> {
    let mut aggregates: Vec<u32> = (0..random.random_range(1..=4)).map(|_| random.random_range(0..200)).collect();
    aggregates.sort_unstable();
    let outcome: f64 = random.random();
    let transaction = client.transaction().await?;
    if outcome > 0.97 {
        // assigns the transaction id early and commits late: others with higher ids commit before
        transaction.execute("select pg_current_xact_id()", &[]).await?;
        tokio::time::sleep(Duration::from_millis(random.random_range(1..100))).await;
    }
    for aggregate in aggregates {
        let id = format!("order {aggregate}");
        let counted =
            "insert into aggregates values ($1, 1) on conflict (id) do update set n = aggregates.n + 1 returning n";
        let number: i64 = transaction.query_one(counted, &[&id]).await?.get(0);
        let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
             values ('order', $1, 'Changed', jsonb_build_object('n', $2::bigint))";
        transaction.execute(insert, &[&id, &number]).await?;
    }
    if (0.95..0.97).contains(&outcome) {
        // keeps its lower `seq` while others get higher ones and commit
        tokio::time::sleep(Duration::from_millis(random.random_range(1..100))).await;
    }
    if outcome < 0.1 { transaction.rollback().await } else { transaction.commit().await }
}

/// The current position of the WAL.
pub async fn wal_position(superuser: &tokio_postgres::Client) -> String {
    superuser.query_one("select pg_current_wal_lsn()::text", &[]).await.unwrap().get(0)
}

/// Waits until the slot's confirmed position has reached `position`.
pub async fn confirmed(superuser: &tokio_postgres::Client, position: &str) {
    let confirmed =
        format!("select exists (select from pg_replication_slots where confirmed_flush_lsn >= '{position}')");
    crate::database::until(superuser, &confirmed).await;
}
