//! Reads the `/status` of one pod.

use std::time::Duration;

use futures::StreamExt;
use tokio::time::timeout;

use crate::{
    contract::ADMIN_PORT,
    controllers::{resources::key::ObjectKind, store::DataPlaneStatus},
};

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// The data plane sends its status again every 30 s.
pub const SILENCE: Duration = Duration::from_secs(45);
/// Longest line: a status has at most ten stuck instances per saga, and lists are short.
const MAX_LINE: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    #[error("requesting the status")]
    Request(#[source] reqwest::Error),
    #[error("the request for the status was not answered within {} s", CONNECT_DEADLINE.as_secs())]
    Unanswered,
    #[error("the status was refused with {0}")]
    Refused(reqwest::StatusCode),
    #[error("nothing was received for {} s", SILENCE.as_secs())]
    Silent,
    #[error("reading the status")]
    Read(#[source] reqwest::Error),
    #[error("the status is not the JSON of its kind")]
    Parse(#[source] serde_json::Error),
    #[error("the status is longer than {MAX_LINE} bytes")]
    TooLong,
}

/// A client that keeps no connection once its answer is read.
pub fn client() -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder().connect_timeout(CONNECT_DEADLINE).pool_max_idle_per_host(0).no_proxy().build()
}

/// Calls `set` with the status; with `follow` also with each that comes after it, until the stream ends or breaks.
pub async fn read(
    http: &reqwest::Client,
    address: &str,
    kind: ObjectKind,
    follow: bool,
    mut set: impl FnMut(DataPlaneStatus),
) -> Result<(), StatusError> {
    let host = if address.contains(':') { format!("[{address}]") } else { address.to_owned() };
    let watch = if follow { "?watch=true" } else { "" };
    let request = http.get(format!("http://{host}:{ADMIN_PORT}/status{watch}")).send();
    let answer = timeout(CONNECT_DEADLINE, request).await.map_err(|_| StatusError::Unanswered)?;
    let answer = answer.map_err(StatusError::Request)?;
    if !answer.status().is_success() {
        return Err(StatusError::Refused(answer.status()));
    }
    let mut bytes = answer.bytes_stream();
    let mut line = Vec::new();
    while let Some(chunk) = timeout(SILENCE, bytes.next()).await.map_err(|_| StatusError::Silent)? {
        let chunk = chunk.map_err(StatusError::Read)?;
        let mut parts = chunk.split(|byte| *byte == b'\n');
        if let Some(first) = parts.next() {
            line.extend_from_slice(first);
        }
        for next in parts {
            set(parse(kind, &line)?);
            line = next.to_vec();
        }
        if line.len() > MAX_LINE {
            return Err(StatusError::TooLong);
        }
    }
    // a single document needs no line's end; half a line of a stream that broke is none
    if !follow && !line.is_empty() {
        set(parse(kind, &line)?);
    }
    Ok(())
}

/// An orchestrator's pod reports on sagas; any other on a relay or on an inbox, of which only the latter has subscriptions.
fn parse(kind: ObjectKind, line: &[u8]) -> Result<DataPlaneStatus, StatusError> {
    let status = match kind {
        ObjectKind::Orchestrator => serde_json::from_slice(line).map(DataPlaneStatus::Orchestrator),
        ObjectKind::Microservice | ObjectKind::OutboxRelay | ObjectKind::Saga => serde_json::from_slice(line)
            .map(DataPlaneStatus::Inbox)
            .or_else(|_no_inbox| serde_json::from_slice(line).map(DataPlaneStatus::Relay)),
    };
    status.map_err(StatusError::Parse)
}
