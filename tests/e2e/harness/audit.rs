//! The API server's audit log: who asked for what.

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::Deserialize;

use super::{Scenario, shell};

/// A request that was answered, or a watch that was begun.
#[derive(Clone, Debug)]
pub struct Request {
    pub at: Timestamp,
    pub verb: String,
    pub resource: String,
    pub uri: String,
    /// Pod that sent it, from its token.
    pub pod: String,
}

impl Request {
    /// Changes something: not a read, not the lease by which the leader is found.
    pub fn is_write(&self) -> bool {
        !matches!(self.verb.as_str(), "get" | "list" | "watch") && self.resource != "leases"
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Line {
    stage: String,
    verb: String,
    #[serde(rename = "requestURI")]
    request_uri: String,
    request_received_timestamp: Timestamp,
    user: User,
    #[serde(default)]
    object_ref: ObjectRef,
}

#[derive(Deserialize)]
struct User {
    #[serde(default)]
    username: String,
    #[serde(default)]
    extra: std::collections::BTreeMap<String, Vec<String>>,
}

#[derive(Default, Deserialize)]
struct ObjectRef {
    #[serde(default)]
    resource: String,
    #[serde(default)]
    subresource: String,
}

impl Scenario {
    /// Requests of this scenario's operator that came since, in order.
    pub async fn requests_since(&self, since: Timestamp) -> Result<Vec<Request>> {
        let path = shell::cluster(&["audit-log"]).await?;
        let path = path.trim().to_owned();
        let text = tokio::fs::read_to_string(&path).await.with_context(|| format!("reading the audit log {path}"))?;
        let user = self.operator_user();
        let mut requests = Vec::new();
        for line in text.lines().filter(|line| line.contains(&user)) {
            // the last line may be half written
            let Ok(line) = serde_json::from_str::<Line>(line) else { continue };
            let begun = line.verb == "watch" && line.stage == "ResponseStarted";
            let answered = line.verb != "watch" && line.stage == "ResponseComplete";
            if line.user.username != user || line.request_received_timestamp < since || !(begun || answered) {
                continue;
            }
            let pod = line.user.extra.get("authentication.kubernetes.io/pod-name").and_then(|names| names.first());
            let ObjectRef { resource, subresource } = line.object_ref;
            requests.push(Request {
                at: line.request_received_timestamp,
                verb: line.verb,
                resource: if subresource.is_empty() { resource } else { format!("{resource}/{subresource}") },
                uri: line.request_uri,
                pod: pod.cloned().unwrap_or_default(),
            });
        }
        requests.sort_by_key(|request| request.at);
        Ok(requests)
    }
}
