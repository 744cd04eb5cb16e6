//! The admin port of every long-running program: `/livez`, `/readyz`, `/metrics`, `/status`.

use std::{
    convert::Infallible,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{Query, State},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use prometheus_client::registry::Registry;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};
use tokio::{net::TcpListener, sync::watch, time::Instant};

use crate::shutdown::Shutdown;

/// Connections that wait to be accepted, at most.
const BACKLOG: i32 = 1024;
/// A watched status is sent at most this often…
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// …and at least this often, so that a reader can detect a dead stream.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// A health check. `Ok(())` is 200; `Err` is 503 with the sentence.
pub type Check = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The admin endpoints of one program; `S` is its `/status` document.
#[derive(Clone)]
pub struct Admin<S> {
    pub live: Check,
    pub ready: Check,
    pub status: watch::Receiver<S>,
    pub registry: Arc<Registry>,
}

impl<S> std::fmt::Debug for Admin<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Admin").finish_non_exhaustive()
    }
}

impl<S: Serialize + Clone + PartialEq + Send + Sync + 'static> Admin<S> {
    /// The routes, to be served alone or merged into a program's API.
    pub fn router(self) -> Router {
        Router::new()
            .route("/livez", get(|State(admin): State<Self>| async move { answer(&admin.live) }))
            .route("/readyz", get(|State(admin): State<Self>| async move { answer(&admin.ready) }))
            .route("/metrics", get(metrics))
            .route("/status", get(status))
            .with_state(self)
    }
}

/// The unspecified address with `port`: all interfaces, IPv4 and IPv6.
pub fn any(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))
}

/// Listens on `address`. `[::]` accepts IPv4 too, whatever the kernel's default is; on a machine without IPv6 it is
/// `0.0.0.0`.
pub fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    match listen(address) {
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && error.kind() != std::io::ErrorKind::AddrInUse => {
            listen(SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port())))
        }
        listening => listening,
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // a restarted process must not wait for the connections of its predecessor to time out
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Serves `router` until the process is to shut down.
pub async fn serve(router: Router, address: SocketAddr, shutdown: Shutdown) -> std::io::Result<()> {
    let listener = bind(address)?;
    tracing::info!(address = %listener.local_addr()?, "serving");
    let ended = async move { shutdown.requested().await };
    tokio::select! {
        served = async { axum::serve(listener, router).await } => served,
        // open streams of `/status?watch=true` never end, so do not wait for them
        () = ended => Ok(()),
    }
}

fn answer(check: &Check) -> Response {
    match check() {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

async fn metrics<S>(State(admin): State<Admin<S>>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &admin.registry) {
        Ok(()) => ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text)
            .into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("encoding the metrics: {error}\n")).into_response(),
    }
}

#[derive(Deserialize)]
struct StatusQuery {
    #[serde(default)]
    watch: bool,
}

async fn status<S>(State(admin): State<Admin<S>>, Query(query): Query<StatusQuery>) -> Response
where
    S: Serialize + Clone + PartialEq + Send + Sync + 'static,
{
    if !query.watch {
        return axum::Json(admin.status.borrow().clone()).into_response();
    }
    let lines = futures::stream::unfold((admin.status, None::<(S, Instant)>), next_line);
    ([(header::CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response()
}

type Watching<S> = (watch::Receiver<S>, Option<(S, Instant)>);

/// The next line of a watched status: the first one at once, then on change, within the two intervals.
async fn next_line<S>((mut status, sent): Watching<S>) -> Option<(Result<Bytes, Infallible>, Watching<S>)>
where
    S: Serialize + Clone + PartialEq,
{
    if let Some((last, at)) = &sent {
        tokio::time::sleep_until(*at + MIN_INTERVAL).await;
        let changed = async { status.wait_for(|now| now != last).await.map(|_| ()) };
        if let Ok(Err(_closed)) = tokio::time::timeout_at(*at + KEEPALIVE, changed).await {
            return None;
        }
    }
    let now = status.borrow_and_update().clone();
    let mut line = serde_json::to_vec(&now).ok()?;
    line.push(b'\n');
    Some((Ok(Bytes::from(line)), (status, Some((now, Instant::now())))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_unspecified_address_accepts_ipv4_and_ipv6() {
        let listener = bind(any(0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        for client in ["127.0.0.1", "::1"] {
            let (connected, accepted) = tokio::join!(tokio::net::TcpStream::connect((client, port)), listener.accept());
            assert!(connected.is_ok() && accepted.is_ok(), "{client}");
        }
    }

    #[tokio::test]
    async fn a_port_that_is_used_is_an_error() {
        let first = bind(any(0)).unwrap();
        assert!(bind(any(first.local_addr().unwrap().port())).is_err());
    }
}
