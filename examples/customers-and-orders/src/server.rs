//! What both services share: database pool, health check, HTTP server.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use anyhow::Context;
use axum::{Router, extract::State, routing::get};
use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod, Runtime};
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};
use tokio_postgres::NoTls;

use crate::reply::Unavailable;

const TIMEOUT: Duration = Duration::from_secs(5);

/// Connections to the service's own database. They are made when needed, so the service starts without the database.
pub fn pool(database_url: &str) -> anyhow::Result<Pool> {
    let mut config: tokio_postgres::Config = database_url.parse().context("parsing DATABASE_URL")?;
    config.connect_timeout(TIMEOUT).application_name("customers-and-orders");
    let manager = Manager::from_config(config, NoTls, ManagerConfig { recycling_method: RecyclingMethod::Fast });
    let pool = Pool::builder(manager).max_size(16).runtime(Runtime::Tokio1);
    pool.wait_timeout(Some(TIMEOUT)).create_timeout(Some(TIMEOUT)).build().context("making the pool")
}

/// `GET /healthz`: whether the database answers. This is for the readiness probe; an unreachable database is no reason
/// to restart the service.
pub fn health(pool: Pool) -> Router {
    Router::new().route("/healthz", get(healthz)).with_state(pool)
}

async fn healthz(State(pool): State<Pool>) -> Result<&'static str, Unavailable> {
    pool.get().await?.query_one("select 1", &[]).await?;
    Ok("ok\n")
}

/// `[::]` accepts IPv4 too; a machine without IPv6 has only `0.0.0.0`.
async fn listen(port: u16) -> std::io::Result<TcpListener> {
    match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await,
    }
}

/// Serves on `$PORT` until `SIGTERM`, then finishes the requests in progress.
pub async fn serve(routes: Router) -> anyhow::Result<()> {
    let port: u16 = std::env::var("PORT").map_or(Ok(8080), |port| port.parse()).context("parsing PORT")?;
    let listener = listen(port).await.with_context(|| format!("listening on port {port}"))?;
    tracing::info!(port, "serving");
    let mut term = signal(SignalKind::terminate())?;
    let ended = async move {
        term.recv().await;
    };
    axum::serve(listener, routes).with_graceful_shutdown(ended).await.context("serving")
}
