//! A long-running program of Weft's as a process of its own, asked by its admin endpoints.

use std::{
    fs,
    marker::PhantomData,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde::de::DeserializeOwned;
use tempfile::NamedTempFile;

use super::{POLL, free_port, send, until};

/// `weft NAME run` with a contract, whose `/status` is an `S`; killed when dropped.
#[derive(Debug)]
pub struct Program<S> {
    child: Child,
    port: u16,
    log: NamedTempFile,
    /// For how long [`Program::until`] waits.
    patience: Duration,
    status: PhantomData<fn() -> S>,
}

impl<S: Clone + std::fmt::Debug + DeserializeOwned> Program<S> {
    pub fn run(name: &str, contract: &Path, patience: Duration) -> Self {
        // for the HTTP client below; an error means that it is installed already
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (port, log) = (free_port(), NamedTempFile::new().unwrap());
        // a benchmark may measure a binary that was built elsewhere
        let program = std::env::var_os("WEFT_TEST_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_weft").into());
        let child = Command::new(program)
            .args([name, "run", "--admin", &format!("127.0.0.1:{port}"), "--config"])
            .arg(contract)
            .stdout(Stdio::null())
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        Self { child, port, log, patience, status: PhantomData }
    }

    pub async fn get(&self, path: &str) -> Option<(u16, String)> {
        let answer = reqwest::get(format!("http://127.0.0.1:{}{path}", self.port)).await.ok()?;
        let status = answer.status().as_u16();
        Some((status, answer.text().await.ok()?))
    }

    pub async fn status(&self) -> Option<S> {
        serde_json::from_str(&self.get("/status").await?.1).ok()
    }

    /// Waits until the status fulfils a condition.
    pub async fn until(&self, what: &str, holds: impl Fn(&S) -> bool) -> S {
        self.within(self.patience, what, holds).await
    }

    /// As [`Program::until`], with a deadline of the test's.
    pub async fn within(&self, limit: Duration, what: &str, holds: impl Fn(&S) -> bool) -> S {
        let (mut found, mut last) = (None, None);
        let deadline = Instant::now() + limit;
        while found.is_none() {
            let log = || self.log();
            assert!(Instant::now() < deadline, "in vain: {what}; the last status is {last:?}; the log: {}", log());
            tokio::time::sleep(POLL).await;
            last = self.status().await;
            found = last.clone().filter(&holds);
        }
        found.unwrap()
    }

    /// The value of a metric without labels.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let text = self.get("/metrics").await?.1;
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }
}

impl<S> Program<S> {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log.path()).unwrap()
    }

    pub fn kill9(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Asks it to end (SIGTERM), as a pod that is deleted is, and waits until it has.
    pub async fn terminate(&mut self) {
        send("-TERM", self.pid());
        until("it ends when it is asked to", async || matches!(self.child.try_wait(), Ok(Some(_)))).await;
    }
}

impl<S> Drop for Program<S> {
    fn drop(&mut self) {
        self.kill9();
        if std::env::var_os("WEFT_TEST_LOG").is_some() {
            eprintln!("{}", self.log());
        }
    }
}
