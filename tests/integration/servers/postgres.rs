//! A PostgreSQL server.

use std::{fs, path::Path, process::Command};

use tempfile::TempDir;

use super::{
    SUPERUSER, SUPERUSER_PASSWORD, certificates, connect,
    files::{accessible_folder, copy_folder, give},
    free_port,
    installation::Installation,
    process::{Process, answers, children_of, send},
};

/// A PostgreSQL server with `wal_level = logical`, SCRAM passwords and an empty database `postgres`.
#[derive(Debug)]
pub struct Postgres {
    pub(super) installation: Installation,
    pub(super) home: TempDir,
    pub(super) parameters: Vec<String>,
    pub(super) port: u16,
    pub(super) process: Option<Process>,
}

impl Postgres {
    /// Starts a server; panics with one sentence that says what is missing when it can't.
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// As [`Postgres::start`], with further parameters, each `name=value`; the last one of a name wins.
    pub fn start_with(parameters: &[&str]) -> Self {
        let installation = Installation::newest();
        let home = accessible_folder("weft-postgres-", installation.user.as_ref());
        let data = home.path().join("data");
        copy_folder(&installation.template(), &data, installation.user.as_ref());
        let mut server = Self {
            installation,
            home,
            parameters: parameters.iter().map(|&parameter| parameter.to_owned()).collect(),
            port: free_port(),
            process: None,
        };
        server.restart();
        server
    }

    /// As [`Postgres::start`], with TLS. [`Postgres::folder`] has `ca.crt`.
    pub fn start_with_tls(parameters: &[&str]) -> Self {
        let mut server = Self::start_with(parameters);
        let (home, user) = (server.home.path(), server.installation.user.as_ref());
        certificates::make(home);
        let secret = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o600);
        fs::set_permissions(home.join("tls.key"), secret).expect("the key is made secret");
        for file in ["tls.key", "tls.crt"] {
            give(&home.join(file), user);
        }
        let file = |parameter: &str, name: &str| format!("{parameter}={}", home.join(name).display());
        let files = [file("ssl_cert_file", "tls.crt"), file("ssl_key_file", "tls.key"), "ssl=on".to_owned()];
        server.parameters.extend(files);
        server.restart();
        server
    }

    pub fn folder(&self) -> &Path {
        self.home.path()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Major version, such as 17.
    pub fn version(&self) -> u32 {
        self.installation.version
    }

    /// `postgres://…` of the superuser to the database `postgres`.
    pub fn superuser_url(&self) -> String {
        self.url(SUPERUSER, SUPERUSER_PASSWORD, "postgres")
    }

    /// `postgres://…` of any role to any database.
    pub fn url(&self, role: &str, password: &str, database: &str) -> String {
        format!("postgres://{role}:{password}@127.0.0.1:{}/{database}", self.port)
    }

    /// A superuser's connection to `database`, driven in the background.
    pub async fn superuser(&self, database: &str) -> tokio_postgres::Client {
        connect(&self.url(SUPERUSER, SUPERUSER_PASSWORD, database)).await.expect("the superuser logs in")
    }

    /// Kills postmaster and backends at once, as a power failure would (the page cache survives).
    pub fn kill9(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill9();
        }
    }

    /// Stops postmaster and backends (`-STOP`), so that the server is silent, or continues them (`-CONT`).
    pub fn signal(&self, signal: &str) {
        let process = self.process.as_ref().expect("the server runs");
        process.signal(signal);
        for backend in children_of(process.child.id()) {
            send(signal, backend);
        }
    }

    /// Starts the server again on the same data and port; kills it first if it runs.
    pub fn restart(&mut self) {
        self.kill9();
        let log = self.home.path().join("log");
        let mut command = self.installation.command("postgres");
        command.arg("-D").arg(self.home.path().join("data"));
        for parameter in self.default_parameters().iter().chain(&self.parameters) {
            command.arg("-c").arg(parameter);
        }
        let process = Process::spawn(command, &log);
        process.wait_until(|| asks_for_password(self.port), "PostgreSQL", &log);
        self.process = Some(process);
    }

    /// Runs the script by which Weft starts servers, on the data of this one, which does not run: up to the image's own entry
    /// point, which is replaced by a program that does nothing.
    pub fn run_start_script(&self, script: &str, password: &str) -> std::process::Output {
        let (user, home) = (self.installation.user.as_ref(), self.home.path());
        let (secret, programs) = (home.join("password"), home.join("programs"));
        fs::create_dir_all(&programs).expect("the folder is made");
        fs::write(&secret, password).expect("the password is written");
        let entry_point = programs.join("docker-entrypoint.sh");
        fs::write(&entry_point, "#!/bin/sh\n").expect("the entry point is written");
        let executable = <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755);
        fs::set_permissions(&entry_point, executable).expect("the entry point is executable");
        for path in [&secret, &programs, &entry_point] {
            give(path, user);
        }
        let path = format!("{}:{}:/usr/bin:/bin", programs.display(), self.installation.bin.display());
        let mut command = self.installation.command("/bin/sh");
        command.arg("-c").arg(script).arg(home).args([
            "postgres",
            "-c",
            "wal_level=logical",
            "-c",
            "log_statement=all",
        ]);
        command.env("PATH", path).env("PGDATA", home.join("data")).env("POSTGRES_PASSWORD_FILE", &secret);
        command.output().expect("the script is started")
    }

    /// One of the client programs (`pg_dump`), as the superuser of this server.
    pub fn tool(&self, program: &str) -> Command {
        let mut command = self.installation.command(program);
        command.env("PGPASSWORD", SUPERUSER_PASSWORD);
        command.args(["--host=127.0.0.1", &format!("--port={}", self.port), "--username", SUPERUSER]);
        command
    }

    fn default_parameters(&self) -> Vec<String> {
        [
            &format!("port={}", self.port),
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "wal_level=logical",
            "max_connections=200",
            "shared_buffers=32MB",
            // a killed process loses nothing that it wrote; only a killed machine would
            "fsync=off",
            "log_min_messages=warning",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    /// What the server has logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.home.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Postgres {
    /// By an immediate shutdown, which gives its shared memory back; a killed server leaves it behind for good.
    fn drop(&mut self) {
        if let Some(process) = self.process.take() {
            process.end("-QUIT");
        }
    }
}

/// The answer to a start-up message is an authentication request (`R`) once the server accepts logins, and an error (`E`)
/// while it starts or recovers.
fn asks_for_password(port: u16) -> bool {
    let parameters = format!("user\0{SUPERUSER}\0database\0postgres\0\0");
    let length = u32::try_from(8 + parameters.len()).expect("it is short");
    let message = [&length.to_be_bytes(), &[0, 3, 0, 0], parameters.as_bytes()].concat();
    answers("127.0.0.1", port, &message, b"R")
}
