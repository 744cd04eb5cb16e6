//! One stream of `/status` per pod of ours that has one, instead of polling.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use tokio::time::{Instant, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    contract::ADMIN_PORT,
    controllers::{
        resources::key::{ObjectId, ObjectKind},
        runtime::Context,
        store::DataPlaneStatus,
    },
};

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// The data plane sends an empty line every 30 s.
const SILENCE: Duration = Duration::from_secs(45);
/// A pod that has not been heard of for so long has no status any more.
const FORGOTTEN: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// Longest line: a status has at most ten stuck instances per saga, and lists are short.
const MAX_LINE: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("asking for the status")]
    Request(#[source] reqwest::Error),
    #[error("the status was refused with {0}")]
    Refused(reqwest::StatusCode),
    #[error("nothing was heard for {} s", SILENCE.as_secs())]
    Silent,
    #[error("reading the status")]
    Read(#[source] reqwest::Error),
    #[error("the status is not the JSON of its kind")]
    Parse(#[source] serde_json::Error),
    #[error("the status is longer than {MAX_LINE} bytes")]
    TooLong,
}

/// Keeps a stream to each pod that has one, until `stop`.
pub async fn run(context: Arc<Context>, stop: CancellationToken) {
    let http = match reqwest::Client::builder().connect_timeout(CONNECT_DEADLINE).no_proxy().build() {
        Ok(http) => http,
        Err(error) => {
            tracing::error!(error = %error, "no HTTP client: the data plane's status stays unknown");
            return;
        }
    };
    let mut streams: HashMap<ObjectId, (String, DropGuard)> = HashMap::new();
    loop {
        let wanted = context.store().admin_addresses();
        streams.retain(|pod, (address, _)| wanted.get(pod).is_some_and(|(_, wanted)| wanted == address));
        for (pod, (kind, address)) in wanted {
            if let Entry::Vacant(new) = streams.entry(pod) {
                let token = stop.child_token();
                let (ended, guard) = (token.clone(), token.drop_guard());
                let follow = follow(Arc::clone(&context), http.clone(), new.key().clone(), kind, address.clone());
                tokio::spawn(async move {
                    tokio::select! { () = ended.cancelled() => {} () = follow => {} }
                });
                new.insert((address, guard));
            }
        }
        tokio::select! { () = stop.cancelled() => return, () = context.on_pods_changed() => {} }
    }
}

async fn follow(context: Arc<Context>, http: reqwest::Client, pod: ObjectId, kind: ObjectKind, address: String) {
    let host = if address.contains(':') { format!("[{address}]") } else { address };
    let url = format!("http://{host}:{ADMIN_PORT}/status?watch=true");
    let (mut pause, mut heard) = (FIRST_PAUSE, Instant::now());
    loop {
        let before = heard;
        let error = read(&context, &http, &url, &pod, kind, &mut heard).await;
        // a stream that delivered something and then broke was alive until now, however old its last message is
        if heard != before && !matches!(error, Err(StreamError::Silent)) {
            (pause, heard) = (FIRST_PAUSE, Instant::now());
        }
        tracing::debug!(
            pod = pod.name,
            namespace = pod.namespace,
            error = error.as_ref().err().map(ToString::to_string),
            "status stream ended"
        );
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
        if heard.elapsed() > FORGOTTEN {
            let requeue = context.store().set_status(&pod, None);
            context.enqueue(requeue);
        }
    }
}

/// Reads until the stream ends or breaks.
async fn read(
    context: &Context,
    http: &reqwest::Client,
    url: &str,
    pod: &ObjectId,
    kind: ObjectKind,
    heard: &mut Instant,
) -> Result<(), StreamError> {
    let answer = timeout(CONNECT_DEADLINE, http.get(url).send()).await.map_err(|_| StreamError::Silent)?;
    let answer = answer.map_err(StreamError::Request)?;
    if !answer.status().is_success() {
        return Err(StreamError::Refused(answer.status()));
    }
    let mut bytes = answer.bytes_stream();
    let mut line = Vec::new();
    while let Some(chunk) = timeout(SILENCE, bytes.next()).await.map_err(|_| StreamError::Silent)? {
        let chunk = chunk.map_err(StreamError::Read)?;
        let mut parts = chunk.split(|byte| *byte == b'\n');
        if let Some(first) = parts.next() {
            line.extend_from_slice(first);
        }
        for next in parts {
            let status = parse(kind, &line).map_err(StreamError::Parse)?;
            *heard = Instant::now();
            let requeue = context.store().set_status(pod, Some(status));
            context.enqueue(requeue);
            line = next.to_vec();
        }
        if line.len() > MAX_LINE {
            return Err(StreamError::TooLong);
        }
    }
    Ok(())
}

/// An orchestrator's pod reports on sagas, any other on a relay.
fn parse(kind: ObjectKind, line: &[u8]) -> serde_json::Result<DataPlaneStatus> {
    match kind {
        ObjectKind::Orchestrator => serde_json::from_slice(line).map(DataPlaneStatus::Orchestrator),
        ObjectKind::Microservice | ObjectKind::OutboxRelay | ObjectKind::Saga => {
            serde_json::from_slice(line).map(DataPlaneStatus::Relay)
        }
    }
}
