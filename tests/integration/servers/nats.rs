//! A NATS server.

use std::{fs, path::PathBuf, process::Command};

use tempfile::TempDir;
use weft::nats::accounts::Accounts;

use super::{
    files::{accessible_folder, weft_cache},
    free_port,
    process::{Process, answers},
};

/// A NATS server with JetStream and its own store.
#[derive(Debug)]
pub struct Nats {
    program: PathBuf,
    home: TempDir,
    host: &'static str,
    port: u16,
    /// More of its configuration; `{home}` is a folder of its own.
    config: String,
    /// The user and password that it demands.
    login: Option<(String, String)>,
    process: Option<Process>,
}

impl Nats {
    /// Starts a server; panics with one sentence that says what is missing when it can't.
    pub fn start() -> Self {
        Self::start_on("127.0.0.1")
    }

    /// One that trusts these accounts and no others, as the chart's.
    pub fn with_accounts(accounts: &Accounts) -> Self {
        Self::configured("127.0.0.1", accounts.server_config("{home}/accounts"))
    }

    /// As [`Nats::start`], listening on a loopback address of one's choice, such as `::1`.
    pub fn start_on(host: &'static str) -> Self {
        Self::configured(host, String::new())
    }

    fn configured(host: &'static str, config: String) -> Self {
        let mut server = Self {
            program: nats_server(),
            home: accessible_folder("weft-nats-", None),
            host,
            port: free_port(),
            config,
            login: None,
            process: None,
        };
        server.restart();
        server
    }

    /// Starts again, and demands a login from now on.
    pub fn demand_login(&mut self, user: &str, password: &str) {
        self.config = format!("authorization {{ user: {user:?}, password: {password:?} }}");
        self.login = Some((user.to_owned(), password.to_owned()));
        self.restart();
    }

    pub fn login(&self) -> Option<(String, String)> {
        self.login.clone()
    }

    /// `nats://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        format!("nats://{}", self.address())
    }

    /// `127.0.0.1:PORT`
    pub fn address(&self) -> String {
        weft::outage::address(self.host, self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Stops the process (`-STOP`), so that it is silent, or continues it (`-CONT`).
    pub fn signal(&self, signal: &str) {
        self.process.as_ref().expect("the server runs").signal(signal);
    }

    pub fn kill9(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill9();
        }
    }

    /// Starts the server again on the same store and port; kills it first if it runs.
    pub fn restart(&mut self) {
        self.kill9();
        let log = self.home.path().join("log");
        let mut command = Command::new(&self.program);
        command.args(["--addr", self.host, "--port", &self.port.to_string(), "--jetstream", "--store_dir"]);
        command.arg(self.home.path().join("store"));
        let config = self.home.path().join("nats.conf");
        let text = self.config.replace("{home}", &self.home.path().display().to_string());
        fs::write(&config, text).expect("the configuration is written");
        command.arg("--config").arg(config);
        let process = Process::spawn(command, &log);
        // it speaks first: `INFO {…}`
        process.wait_until(|| answers(self.host, self.port, b"", b"INFO "), "nats-server", &log);
        self.process = Some(process);
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.kill9();
    }
}

fn nats_server() -> PathBuf {
    let cache = weft_cache().map(|cache| cache.join("bin"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = cache.into_iter().chain(std::env::split_paths(&path)).map(|folder| folder.join("nats-server"));
    found.into_iter().find(|program| program.is_file()).unwrap_or_else(|| {
        panic!("nats-server is missing: `go install github.com/nats-io/nats-server/v2@v2.15.2` and put it in PATH")
    })
}
