//! Throw-away servers on free loopback ports: PostgreSQL, NATS, Kafka, RabbitMQ and Redis.
//!
//! Each server belongs to one test (or several that agree to share it) and dies with it, also when the test process is
//! killed: a guard process holds the other end of a pipe and kills the server when the pipe closes. `kill9` is a crash:
//! nothing is flushed, nothing is said; `restart` brings the same data back on the same port.
//!
//! PostgreSQL: the newest of `$WEFT_TEST_POSTGRES` (a folder with `bin/postgres`), Weft's cache (`postgresql-*`) and
//! `/usr/lib/postgresql/*`; run as the user `postgres` when the tests run as root, since it refuses root. NATS:
//! `nats-server` in Weft's cache or in `PATH`. Kafka: the jars that `hack/kafka` puts into the cache, and `java`. RabbitMQ and
//! Redis: Debian's. A [`Proxy`] stands between a client and any of them.

#![allow(dead_code, reason = "each test uses what it needs")]

mod certificates;
mod files;
mod installation;
mod kafka;
mod nats;
mod postgres;
mod process;
mod program;
mod proxy;
pub mod rabbitmq;
pub mod redis;
mod standby;

use std::{
    collections::BTreeSet,
    net::{Ipv4Addr, TcpListener},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tokio_postgres::NoTls;

#[allow(unused_imports, reason = "each test binary and benchmark uses what it needs")]
pub use self::{
    kafka::{Kafka, LOGIN as KAFKA_LOGIN, Options as KafkaOptions},
    nats::Nats,
    postgres::Postgres,
    process::send,
    program::Program,
    proxy::Proxy,
    rabbitmq::RabbitMq,
    redis::Redis,
};

/// A server that isn't up by then is broken.
pub const START_DEADLINE: Duration = Duration::from_mins(2);
pub const POLL: Duration = Duration::from_millis(10);

/// The superuser of every test server, and its password.
pub const SUPERUSER: &str = "postgres";
pub const SUPERUSER_PASSWORD: &str = "integration-tests-only";

/// Connects with a URL and drives the connection in the background.
pub async fn connect(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// Polls until the condition holds; a test that waits in vain fails with `what`.
pub async fn until(what: &str, holds: impl AsyncFnMut() -> bool) {
    within(START_DEADLINE, what, holds).await;
}

/// As [`until`], with a deadline of the test's.
pub async fn within(limit: Duration, what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !holds().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(POLL).await;
    }
}

/// A port below the range that outgoing connections are given, so that a killed server finds its port free again; never
/// given twice, as whoever has it may not listen yet.
pub fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    (0..1000)
        .map(|_| rand::random_range(12_000..32_000))
        .find(|&port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() && given.insert(port))
        .expect("one of a thousand ports is free")
}

#[tokio::test]
async fn a_killed_postgres_comes_back_with_its_committed_rows() {
    let mut server = Postgres::start();
    let client = server.superuser("postgres").await;
    client.batch_execute("create table kept (n int); insert into kept values (7)").await.unwrap();
    server.kill9();
    assert!(connect(&server.superuser_url()).await.is_err());
    server.restart();
    let client = server.superuser("postgres").await;
    let row = client.query_one("select n, current_setting('wal_level') from kept", &[]).await.unwrap();
    assert_eq!((row.get::<_, i32>(0), row.get::<_, &str>(1)), (7, "logical"));
}

#[tokio::test]
async fn a_killed_nats_comes_back_with_its_stream() {
    let mut server = Nats::start();
    let jetstream = |url| async { async_nats::jetstream::new(async_nats::connect::<String>(url).await.unwrap()) };
    let config = async_nats::jetstream::stream::Config { name: "kept".into(), ..Default::default() };
    jetstream(server.url()).await.create_stream(config).await.unwrap();
    server.kill9();
    server.restart();
    jetstream(server.url()).await.get_stream("kept").await.unwrap();
}
