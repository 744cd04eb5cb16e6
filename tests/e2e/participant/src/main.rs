//! A service for the end-to-end tests, in one image for all its parts:
//!
//! - `serve`: a saga participant whose commands leave their effects in a table, and, when asked, a writer of outbox
//!   events. Its tables are `schema.sql`, given to the `Microservice` as a migration.
//! - `start-sagas`: starts sagas over HTTP, from inside the cluster, until the orchestrator has accepted all of them.
//! - `connect`, `log-in`: say whether a database can be reached over the network, and entered with a login.
//!
//! The tests read the tables afterwards: `effect` has a row for each effect of a command, `ledger` a row for each event
//! that was written to the outbox, made in the same transaction.

mod commands;
mod probe;
mod starter;
mod writer;

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::Context;
use clap::{Parser, Subcommand};
use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use tokio::signal::unix::{SignalKind, signal};
use tokio_postgres::NoTls;

#[derive(Parser)]
#[command(name = "weft-e2e")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Serve(Serve),
    StartSagas(starter::Args),
    Connect(probe::Connect),
    LogIn(probe::LogIn),
}

#[derive(clap::Args)]
struct Serve {
    #[arg(long, env, hide_env_values = true)]
    database_url: Option<String>,
    #[arg(long, env, default_value_t = 8080)]
    port: u16,
    /// Answered at `/version`, to tell one roll-out from another
    #[arg(long, env, default_value = "1")]
    version: String,
    /// Demanded of those that send events
    #[arg(long, env, hide_env_values = true)]
    events_token: Option<String>,
    #[command(flatten)]
    writer: writer::Args,
}

#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_ansi(false).with_max_level(tracing::Level::INFO).init();
    // an error means that a provider is installed already
    let _ = rustls::crypto::ring::default_provider().install_default();
    match Cli::parse().command {
        Command::Serve(args) => serve(args).await,
        Command::StartSagas(args) => starter::run(args).await,
        Command::Connect(args) => probe::connect(args).await,
        Command::LogIn(args) => probe::log_in(args).await,
    }
}

async fn serve(Serve { database_url, port, version, events_token, writer }: Serve) -> anyhow::Result<()> {
    let pool = database_url.map(|url| pool(&url)).transpose()?;
    if let (Some(pool), true) = (&pool, writer.is_wanted()) {
        writer::start(pool.clone(), writer);
    }
    let listener = listen(port).await.context("opening the port")?;
    let mut terminate = signal(SignalKind::terminate()).context("waiting for SIGTERM")?;
    tokio::select! {
        served = async { axum::serve(listener, commands::router(pool, version, events_token)).await } => Ok(served?),
        _ = terminate.recv() => Ok(()),
    }
}

/// `[::]` accepts IPv4 too; a machine without IPv6 has only `0.0.0.0`.
async fn listen(port: u16) -> std::io::Result<tokio::net::TcpListener> {
    match tokio::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => tokio::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await,
    }
}

/// Connections are checked before use, because the tests kill the server; every wait has an end.
fn pool(url: &str) -> anyhow::Result<Pool> {
    let mut config: tokio_postgres::Config = url.parse().context("reading DATABASE_URL")?;
    config.connect_timeout(Duration::from_secs(2)).tcp_user_timeout(Duration::from_secs(3));
    let manager = Manager::from_config(config, NoTls, ManagerConfig { recycling_method: RecyclingMethod::Verified });
    let pool = Pool::builder(manager)
        .max_size(8)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(Duration::from_secs(3)))
        .create_timeout(Some(Duration::from_secs(3)))
        .recycle_timeout(Some(Duration::from_secs(3)))
        .build()?;
    Ok(pool)
}
