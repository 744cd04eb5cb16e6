//! An orchestrator as a separate process, with a database of its own and a participant in the test's process.

#![allow(dead_code, reason = "each test uses what it needs")]

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;
use weft::{
    contract::{
        Contract,
        database_setup::Purpose,
        orchestrator::{Orchestrator, Start},
    },
    domain::saga::definition::{Call, Definition, RetryPolicy, Step, Task, Transaction, Undo},
};

use crate::{database::Database, saga_participant::Participant, servers};

pub struct World {
    pub database: Database,
    pub participant: Participant,
    pub client: reqwest::Client,
    folder: TempDir,
}

impl World {
    pub async fn new() -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let database = Database::with_purpose(Purpose::Orchestrator).await;
        database.set_up_well();
        let participant = Participant::start().await;
        Self { database, participant, client: reqwest::Client::new(), folder: tempfile::tempdir().unwrap() }
    }

    pub fn call(&self, command: &str, with: &[(&str, &str)]) -> Call {
        Call {
            service: "customers".into(),
            command: command.into(),
            method: "POST".into(),
            url: self.participant.url(command),
            with: with.iter().map(|(name, source)| ((*name).to_owned(), (*source).to_owned())).collect(),
            ..Call::default()
        }
    }

    pub fn step(&self, name: &str, undo: bool) -> Step {
        let with: &[(&str, &str)] = &[("order", "input.orderId")];
        let undo =
            undo.then(|| self.call(&format!("undo-{name}"), &[("order", "input.orderId"), ("why", "failure.reason")]));
        let transaction = Transaction {
            pivot: false,
            action: self.call(name, with),
            undo: undo.map_or(Undo::Nothing, Undo::Call),
            timeout_ms: 2_000,
            retry: RetryPolicy { max_attempts: 3, initial_backoff_ms: 10, max_backoff_ms: 100 },
            failures: [("CreditLimitExceeded".to_owned(), "INSUFFICIENT_CREDIT".to_owned())].into(),
        };
        group(name, Task::call(transaction))
    }

    /// `reserve` and `pack` can be undone, `charge` is the pivot, `ship` uses a reply; `notify` is called after a
    /// compensation.
    pub fn definition(&self, name: &str) -> Definition {
        let mut charge = self.step("charge", false);
        charge.transaction_mut().unwrap().pivot = true;
        let mut ship = self.step("ship", false);
        let shipping = ship.transaction_mut().unwrap();
        shipping.failures.clear();
        shipping.action = self.call("ship", &[("reserved", "steps.reserve.reply.step"), ("twice", "input.total * 2")]);
        Definition {
            name: name.into(),
            version: String::new(),
            deadline_ms: 60_000,
            input: None,
            steps: vec![self.step("reserve", true), self.step("pack", true), charge, ship],
            on_compensated: Some(self.call("notify", &[("reason", "failure.reason"), ("at", "failure.step")])),
            ..Definition::default()
        }
        .seal()
    }

    pub fn contract(&self, sagas: Vec<Definition>, starts: Vec<Start>) -> Orchestrator {
        Orchestrator {
            name: "default".into(),
            namespace: "shop".into(),
            api_port: servers::free_port(),
            database: self.database.login("app"),
            retention_ms: 3_600_000,
            sagas,
            draining: Vec::new(),
            starts,
            choreographies: Vec::new(),
        }
    }

    /// Starts an orchestrator and waits until it holds its partitions.
    pub async fn orchestrator(&self) -> Running {
        self.orchestrator_of(|_| {}).await
    }

    /// As [`World::orchestrator`], with a changed saga.
    pub async fn orchestrator_of(&self, change: impl FnOnce(&mut Definition)) -> Running {
        let mut definition = self.definition("order");
        change(&mut definition);
        self.run(self.contract(vec![definition.seal()], Vec::new())).await
    }

    pub async fn run(&self, contract: Orchestrator) -> Running {
        let running = self.spawn(contract);
        running.until_ready().await;
        running
    }

    pub fn spawn(&self, contract: Orchestrator) -> Running {
        let config = self.folder.path().join(format!("{}.yaml", contract.api_port));
        fs::write(&config, contract.to_yaml().unwrap()).unwrap();
        let mut running = Running {
            config,
            contract,
            admin_port: servers::free_port(),
            process: None,
            client: self.client.clone(),
            memory_limit: None,
        };
        running.start();
        running
    }
}

/// A process that dies with the test.
pub struct Running {
    config: PathBuf,
    pub contract: Orchestrator,
    admin_port: u16,
    process: Option<Child>,
    client: reqwest::Client,
    /// Of the process, from its next start on.
    pub memory_limit: Option<usize>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill9();
    }
}

impl Running {
    pub fn start(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
        command.args(["saga", "run", "--config"]).arg(&self.config);
        command.env("WEFT_ADMIN_PORT", self.admin_port.to_string()).stdin(Stdio::null());
        command.envs(self.memory_limit.map(|bytes| ("WEFT_MEMORY_LIMIT", bytes.to_string())));
        self.process = Some(command.spawn().unwrap());
    }

    pub fn kill9(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    pub fn signal(&self, signal: &str) {
        let id = self.process.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// Sends SIGTERM and waits until the process has ended.
    pub async fn terminate(&mut self) {
        self.signal("-TERM");
        let mut process = self.process.take().unwrap();
        let status = tokio::task::spawn_blocking(move || process.wait().unwrap()).await.unwrap();
        assert!(status.success(), "{status}");
    }

    /// Replaces the contract's file, as the kubelet does.
    pub fn rewrite(&mut self, contract: Orchestrator) {
        let fresh = self.config.with_extension("new");
        fs::write(&fresh, contract.to_yaml().unwrap()).unwrap();
        fs::rename(fresh, &self.config).unwrap();
        self.contract = contract;
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.contract.api_port)
    }

    async fn admin(&self, path: &str) -> Option<(u16, String)> {
        let url = format!("http://127.0.0.1:{}{path}", self.admin_port);
        let response = self.client.get(url).send().await.ok()?;
        Some((response.status().as_u16(), response.text().await.ok()?))
    }

    pub async fn is_ready(&self) -> bool {
        matches!(self.admin("/readyz").await, Some((200, _)))
    }

    pub async fn until_ready(&self) {
        servers::until("the orchestrator is ready", async || {
            self.is_ready().await && self.status().await["sagas"].as_object().is_some_and(|sagas| !sagas.is_empty())
        })
        .await;
    }

    pub async fn status(&self) -> Value {
        let text = self.admin("/status").await.map(|(_, text)| text).unwrap_or_default();
        serde_json::from_str(&text).unwrap_or_default()
    }

    pub async fn metrics(&self) -> String {
        self.admin("/metrics").await.unwrap().1
    }

    /// Polls the status until one saga's counts are these.
    pub async fn until_counts(&self, saga: &str, counts: &[(&str, u64)]) {
        servers::until(&format!("{saga} counts {counts:?}"), async || {
            let status = self.status().await;
            counts.iter().all(|(name, count)| status["sagas"][saga][name] == *count)
        })
        .await;
    }

    /// Starts an instance; returns the HTTP status and the document.
    pub async fn start_saga(&self, saga: &str, input: &Value, query: &str, key: Option<&str>) -> (u16, Value) {
        let mut request = self.client.post(self.url(&format!("/sagas/{saga}{query}"))).json(input);
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    /// Starts an instance and waits for its end.
    pub async fn to_its_end(&self, saga: &str, input: &Value) -> Value {
        let (status, view) = self.start_saga(saga, input, "?wait=30s", None).await;
        assert_eq!(status, 201, "{view}");
        view
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        match self.client.get(self.url(path)).send().await {
            Ok(response) => (response.status().as_u16(), response.json().await.unwrap_or_default()),
            Err(_unreachable) => (0, Value::Null),
        }
    }

    pub async fn verb(&self, saga: &str, id: &str, verb: &str) -> (u16, Value) {
        let response = self.client.post(self.url(&format!("/sagas/{saga}/{id}/{verb}"))).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub async fn until_state(&self, saga: &str, id: &str, state: &str) -> Value {
        let ended = ["Completed", "Compensated"];
        let mut last = Value::Null;
        servers::until(&format!("{saga} {id} is {state}"), async || {
            last = self.get(&format!("/sagas/{saga}/{id}")).await.1;
            last["state"] == state || last["state"].as_str().is_some_and(|state| ended.contains(&state))
        })
        .await;
        assert_eq!(last["state"], state, "{last}");
        last
    }

    /// Runs `weft saga …`.
    pub async fn cli(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
        command.arg("saga").args(arguments).env("WEFT_ORCHESTRATOR_URL", self.url(""));
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
    }
}

/// A step of any kind.
pub fn group(name: &str, task: Task) -> Step {
    Step { name: name.into(), task, ..Step::default() }
}

pub fn id(view: &Value) -> String {
    view["id"].as_str().unwrap_or_else(|| panic!("no id in {view}")).to_owned()
}

/// The history as `step operation outcome`, in order.
pub fn history_lines(detail: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let line =
        |t: &Value| format!("{} {} {}", text(&t["step"]), text(&t["operation"]), text(&t["outcome"])).trim().to_owned();
    detail["history"].as_array().unwrap_or_else(|| panic!("no history in {detail}")).iter().map(line).collect()
}
