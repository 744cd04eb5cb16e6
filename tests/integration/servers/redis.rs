//! A Redis server.

use std::{path::Path, process::Command};

use tempfile::TempDir;

use super::{
    certificates,
    files::accessible_folder,
    free_port,
    process::{Process, answers},
};

/// Largest value that a test's server accepts, the least that can be configured.
pub const MAX_VALUE: usize = 1024 * 1024;

/// A Redis server with a file that every command is in before it is answered.
#[derive(Debug)]
pub struct Redis {
    home: TempDir,
    port: u16,
    tls_port: u16,
    /// The password that it demands of its default user.
    password: Option<String>,
    process: Option<Process>,
}

impl Redis {
    /// Starts a server; panics with one sentence that says what is missing when it can't.
    pub fn start() -> Self {
        let home = accessible_folder("weft-redis-", None);
        certificates::make(home.path());
        let mut server = Self { home, port: free_port(), tls_port: free_port(), password: None, process: None };
        server.restart();
        server
    }

    /// `redis://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// `rediss://127.0.0.1:PORT`: it demands a certificate of the client.
    pub fn tls_url(&self) -> String {
        format!("rediss://127.0.0.1:{}", self.tls_port)
    }

    /// Has `ca.crt`, `tls.crt` and `tls.key`.
    pub fn certificates(&self) -> &Path {
        self.home.path()
    }

    /// Starts again, and demands the password from now on.
    pub fn demand_password(&mut self, password: &str) {
        self.password = Some(password.to_owned());
        self.restart();
    }

    /// Makes it a replica of another one, whose password is its own.
    pub fn follow(&self, primary: &Self) {
        self.command(&["REPLICAOF", "127.0.0.1", &primary.port.to_string()]);
    }

    /// What a command answers, as JSON.
    pub fn command(&self, arguments: &[&str]) -> serde_json::Value {
        let mut command = Command::new("redis-cli");
        command.args(["-p", &self.port.to_string(), "--json"]).args(arguments);
        if let Some(password) = &self.password {
            command.env("REDISCLI_AUTH", password);
        }
        let output = command.output().expect("redis-cli is started");
        let text = String::from_utf8(output.stdout).expect("JSON is text");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments:?} answers {text:?}: {error}"))
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

    /// Starts the server again on the same folder and port; kills it first if it runs.
    pub fn restart(&mut self) {
        self.kill9();
        let mut command = Command::new(program());
        command.args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--dir"]).arg(self.home.path());
        command.args(["--appendonly", "yes", "--appendfsync", "always", "--save", ""]);
        command.args(["--proto-max-bulk-len", &MAX_VALUE.to_string(), "--repl-diskless-sync-delay", "0"]);
        command.args(["--tls-port", &self.tls_port.to_string(), "--tls-ca-cert-file", "ca.crt"]);
        command.args(["--tls-cert-file", "tls.crt", "--tls-key-file", "tls.key"]).current_dir(self.home.path());
        if let Some(password) = &self.password {
            command.args(["--requirepass", password]);
        }
        let log = self.home.path().join("log");
        let process = Process::spawn(command, &log);
        let up = || {
            let answer: &[u8] = if self.password.is_some() { b"-NOAUTH" } else { b"+PONG" };
            answers("127.0.0.1", self.port, b"PING\r\n", answer)
        };
        process.wait_until(up, "redis-server", &log);
        self.process = Some(process);
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.kill9();
    }
}

fn program() -> &'static str {
    const PROGRAM: &str = "/usr/bin/redis-server";
    assert!(Path::new(PROGRAM).exists(), "redis-server is missing: install the package `redis-server`");
    PROGRAM
}
