//! Requests to pods and Services: through the API server, which needs no way into the cluster's network; and a port
//! forwarded for what is not HTTP.

use std::{process::Stdio, time::Duration};

use anyhow::{Context, Result, anyhow, bail};
use axum::http::{Method, Request, StatusCode};
use kube::client::Body;
use tokio::io::{AsyncBufReadExt, BufReader};

use super::{Scenario, shell};

/// An answer to a request.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub text: String,
}

impl Answer {
    /// The text, if it is a success.
    pub fn ok(self) -> Result<String> {
        if !self.status.is_success() {
            bail!("answered {}: {}", self.status, self.text);
        }
        Ok(self.text)
    }
}

impl Scenario {
    /// `target` is `services/NAME:PORT` or `pods/NAME:PORT`.
    pub async fn http(
        &self,
        method: Method,
        target: &str,
        path: &str,
        json: Option<serde_json::Value>,
    ) -> Result<Answer> {
        let uri = format!("/api/v1/namespaces/{}/{target}/proxy{path}", self.namespace);
        let body = json.as_ref().map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let mut request = Request::builder().method(method).uri(&uri);
        if json.is_some() {
            request = request.header("content-type", "application/json");
        }
        let sending = self.client.send(request.body(Body::from(body))?);
        let response = tokio::time::timeout(Duration::from_secs(20), sending)
            .await
            .with_context(|| format!("no answer from {uri}"))??;
        let status = response.status();
        let body = response.into_body().collect_bytes().await?;
        Ok(Answer { status, text: String::from_utf8_lossy(&body).into_owned() })
    }

    pub async fn get_text(&self, target: &str, path: &str) -> Result<String> {
        self.http(Method::GET, target, path, None).await?.ok().with_context(|| format!("{target}{path}"))
    }

    /// A local port that leads to `target` (`service/NAME`, `pod/NAME`) while the value lives.
    pub async fn forward(&self, target: &str, port: u16) -> Result<Forward> {
        let mut child = tokio::process::Command::new("kubectl")
            .env("PATH", shell::path())
            .args(["port-forward", "--namespace", &self.namespace, target, &format!(":{port}")])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()?;
        let output = child.stdout.take().ok_or_else(|| anyhow!("no output of kubectl"))?;
        let mut lines = BufReader::new(output).lines();
        let first = tokio::time::timeout(Duration::from_secs(20), lines.next_line()).await??;
        // Forwarding from 127.0.0.1:41234 -> 4222
        let local =
            first.as_deref().and_then(|line| line.split_whitespace().find_map(|word| word.strip_prefix("127.0.0.1:")));
        let local = local.and_then(|port| port.parse().ok());
        let port = local.with_context(|| format!("kubectl port-forward {target} said {first:?}"))?;
        Ok(Forward { port, _child: child, _lines: lines })
    }
}

pub struct Forward {
    pub port: u16,
    _child: tokio::process::Child,
    _lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}
