//! `/status` of every simulated pod, by one server: all their addresses are loopback ones.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, Query, State, connect_info::Connected},
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::get,
    serve::IncomingStream,
};
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    runtime::{WatchStreamExt, watcher},
};
use tokio::{net::TcpListener, sync::watch};
use weft::contract::{ADMIN_PORT, status::RelayStatus};

/// A status that does not change is sent again so often, as by the real ones.
const SIGN_OF_LIFE: Duration = Duration::from_secs(30);
const OWNER: &str = "weft.dev/owner";
const COMPONENT: &str = "app.kubernetes.io/component=service";

#[derive(Clone)]
pub struct DataPlane(Arc<Inner>);

struct Inner {
    /// Whose pod has an address.
    owners: RwLock<HashMap<IpAddr, String>>,
    /// Counts seconds while the relays are busy: every status is made of it.
    second: watch::Sender<u64>,
    busy: AtomicBool,
    /// Connections and answers, the whole fleet's.
    connections: AtomicU64,
    answers: AtomicU64,
}

/// The address that was asked: which pod is meant.
#[derive(Clone, Copy)]
struct Asked(SocketAddr);

impl Connected<IncomingStream<'_, TcpListener>> for Asked {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        Self(stream.io().local_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0))))
    }
}

impl DataPlane {
    pub async fn start(client: Client) -> Self {
        let plane = Self(Arc::new(Inner {
            owners: RwLock::default(),
            second: watch::Sender::new(0),
            busy: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            answers: AtomicU64::new(0),
        }));
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, ADMIN_PORT)).await;
        let listener = listener.unwrap_or_else(|error| panic!("port {ADMIN_PORT}, the pods' own, is taken: {error}"));
        let router = Router::new().route("/status", get(status)).with_state(plane.clone());
        let service = router.into_make_service_with_connect_info::<Asked>();
        tokio::spawn(async move { axum::serve(listener, service).await });
        tokio::spawn(follow_pods(client, plane.clone()));
        let clock = plane.clone();
        tokio::spawn(async move {
            let mut tick = tokio::time::interval(Duration::from_secs(1));
            loop {
                tick.tick().await;
                if clock.0.busy.load(Relaxed) {
                    clock.0.second.send_modify(|second| *second += 1);
                }
            }
        });
        plane
    }

    /// From now on every relay's numbers change each second, or stay as they are.
    pub fn busy(&self, busy: bool) {
        self.0.busy.store(busy, Relaxed);
    }

    /// Streams that are open, and statuses that were sent since the start.
    pub fn traffic(&self) -> (u64, u64) {
        (self.0.connections.load(Relaxed), self.0.answers.load(Relaxed))
    }

    fn line(&self, owner: &str) -> Bytes {
        self.0.answers.fetch_add(1, Relaxed);
        let second = *self.0.second.borrow();
        let status = RelayStatus {
            relay: owner.to_owned(),
            leading: true,
            ready: true,
            published: second * 100,
            pending: second % 7,
            lag_bytes: Some(second * 1000),
            position: Some(format!("0/{:X}", second * 1000)),
            last_published: Some(Timestamp::UNIX_EPOCH + jiff::SignedDuration::from_secs(second.cast_signed())),
            ..RelayStatus::default()
        };
        let mut line = serde_json::to_vec(&status).unwrap();
        line.push(b'\n');
        line.into()
    }
}

/// Counts as open while it lives.
struct Open(DataPlane);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.0.connections.fetch_sub(1, Relaxed);
    }
}

async fn status(
    State(plane): State<DataPlane>,
    ConnectInfo(Asked(address)): ConnectInfo<Asked>,
    Query(query): Query<HashMap<String, String>>,
) -> Response {
    if !address.ip().is_loopback() {
        return StatusCode::FORBIDDEN.into_response();
    }
    let owner = plane.0.owners.read().unwrap_or_else(PoisonError::into_inner).get(&address.ip()).cloned();
    let Some(owner) = owner else { return StatusCode::NOT_FOUND.into_response() };
    if query.get("watch").is_none_or(|value| value != "true") {
        return plane.line(&owner).into_response();
    }
    plane.0.connections.fetch_add(1, Relaxed);
    let (open, seconds) = (Open(plane.clone()), plane.0.second.subscribe());
    let lines = futures::stream::unfold((open, seconds, owner, true), |(open, mut seconds, owner, first)| async move {
        if !first {
            let _ = tokio::time::timeout(SIGN_OF_LIFE, seconds.changed()).await;
        }
        seconds.mark_unchanged();
        let line = open.0.line(&owner);
        Some((Ok::<_, std::convert::Infallible>(line), (open, seconds, owner, false)))
    });
    Body::from_stream(lines).into_response()
}

async fn follow_pods(client: Client, plane: DataPlane) {
    let config = watcher::Config::default().labels(COMPONENT).page_size(500);
    let pods = watcher(Api::<Pod>::all(client), config).default_backoff().applied_objects();
    let mut pods = std::pin::pin!(pods.into_stream());
    while let Some(pod) = pods.next().await {
        let Ok(pod) = pod else { continue };
        let address = pod.status.and_then(|status| status.pod_ip).and_then(|address| address.parse().ok());
        let owner = pod.metadata.labels.and_then(|mut labels| labels.remove(OWNER));
        if let (Some(address), Some(owner)) = (address, owner) {
            plane.0.owners.write().unwrap_or_else(PoisonError::into_inner).insert(address, owner);
        }
    }
}
