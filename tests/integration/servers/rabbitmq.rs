//! A RabbitMQ server, with the daemon of its own that Erlang's nodes find each other by.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use serde_json::json;
use tempfile::TempDir;

use super::{
    certificates,
    files::{accessible_folder, installed_under},
    free_port,
    process::{Process, answers},
};

/// Largest message that a test's server accepts.
pub const MAX_MESSAGE: usize = 65_536;
const CONFIG: &str = "\
listeners.tcp.1 = 127.0.0.1:{port}
listeners.ssl.1 = 127.0.0.1:{tls_port}
ssl_options.cacertfile = {home}/ca.crt
ssl_options.certfile = {home}/tls.crt
ssl_options.keyfile = {home}/tls.key
ssl_options.verify = verify_peer
ssl_options.fail_if_no_peer_cert = true
ssl_cert_login_from = common_name
auth_mechanisms.1 = PLAIN
auth_mechanisms.2 = EXTERNAL
max_message_size = 65536
load_definitions = {home}/definitions.json
log.console = true
log.file = false
";
/// A user beside `guest`, whose name is also that in the client's certificate.
pub const LOGIN: (&str, &str) = ("relay", "a right password");

/// A RabbitMQ server with the virtual hosts `1` to `9`.
#[derive(Debug)]
pub struct RabbitMq {
    scripts: PathBuf,
    home: TempDir,
    port: u16,
    tls_port: u16,
    /// Of the names daemon and of the node to other nodes.
    ports: [u16; 2],
    names: Option<Process>,
    process: Option<Process>,
}

impl RabbitMq {
    /// Starts a server; panics with one sentence that says what is missing when it can't.
    pub fn start() -> Self {
        let home = accessible_folder("weft-rabbitmq-", None);
        certificates::make(home.path());
        let (port, tls_port, ports) = (free_port(), free_port(), [free_port(), free_port()]);
        let config = CONFIG.replace("{home}", &home.path().display().to_string());
        let config = config.replace("{port}", &port.to_string()).replace("{tls_port}", &tls_port.to_string());
        fs::write(home.path().join("rabbitmq.conf"), config).expect("the configuration is written");
        fs::write(home.path().join("definitions.json"), definitions()).expect("the definitions are written");
        fs::write(home.path().join("plugins"), "[rabbitmq_auth_mechanism_ssl].").expect("the plugins are written");
        // names are found without the system's resolver, which takes up to half a minute on a busy machine
        let names = "{lookup, [file]}.\n{host, {127,0,0,1}, [\"localhost\"]}.\n";
        fs::write(home.path().join("inetrc"), names).expect("the names are written");
        let mut server = Self { scripts: scripts(), home, port, tls_port, ports, names: None, process: None };
        server.names = Some(server.start_names());
        server.restart();
        server
    }

    /// As [`RabbitMq::start`], for tests that share it: its folder is deleted when the test process is no more.
    pub fn start_shared() -> Self {
        let server = Self::start();
        let mut sweeper = Command::new("sh");
        // `read` ends when the pipe closes; then the server is killed as well
        sweeper.args(["-c", "read -r _; sleep 2; rm -rf \"$0\""]).arg(server.home.path());
        let sweeper = sweeper.stdin(Stdio::piped()).process_group(0).spawn().expect("sh is started");
        std::mem::forget(sweeper);
        server
    }

    /// `amqp://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        format!("amqp://127.0.0.1:{}", self.port)
    }

    /// `amqps://127.0.0.1:PORT`: it demands a certificate of the client, which is a login.
    pub fn tls_url(&self) -> String {
        format!("amqps://127.0.0.1:{}", self.tls_port)
    }

    /// Has `ca.crt`, `tls.crt` and `tls.key`.
    pub fn certificates(&self) -> &Path {
        self.home.path()
    }

    /// Stops the process (`-STOP`), so that it is silent, or continues it (`-CONT`).
    pub fn signal(&self, signal: &str) {
        self.process.as_ref().expect("the server runs").signal(signal);
    }

    /// Runs `rabbitmqctl`.
    pub fn control(&self, arguments: &[&str]) {
        let output = self.script("rabbitmqctl").args(arguments).output().expect("rabbitmqctl is started");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "rabbitmqctl {arguments:?}: {said}");
    }

    pub fn kill9(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill9();
        }
    }

    /// Starts the server again on the same folder and port; kills it first if it runs.
    pub fn restart(&mut self) {
        self.kill9();
        let mut command = self.script("rabbitmq-server");
        // without it a shell stays between, which a signal does not pass
        command.env("RUNNING_UNDER_SYSTEMD", "1");
        let log = self.home.path().join("log");
        let process = Process::spawn(command, &log);
        let greeting = b"AMQP\0\0\x09\x01";
        process.wait_until(|| answers("127.0.0.1", self.port, greeting, b"\x01\0\0"), "rabbitmq-server", &log);
        self.process = Some(process);
    }

    /// One of RabbitMQ's scripts, for this server.
    fn script(&self, name: &str) -> Command {
        let mut command = Command::new(self.scripts.join(name));
        let at = |name: &str| self.home.path().join(name);
        let [names, nodes] = self.ports.map(|port| port.to_string());
        command.current_dir(self.home.path()).env("HOME", self.home.path());
        command.env("ERL_EPMD_PORT", names).env("ERL_EPMD_ADDRESS", "127.0.0.1").env("RABBITMQ_DIST_PORT", nodes);
        command.env("RABBITMQ_NODENAME", "weft@localhost").env("RABBITMQ_CONF_ENV_FILE", "/dev/null");
        command.env("RABBITMQ_CONFIG_FILE", at("rabbitmq")).env("RABBITMQ_ENABLED_PLUGINS_FILE", at("plugins"));
        command.env("RABBITMQ_MNESIA_BASE", at("data")).env("RABBITMQ_LOG_BASE", at("logs")).env("RABBITMQ_LOGS", "-");
        command.env("ERL_INETRC", at("inetrc"));
        // idle threads do not spin, and other nodes are on this machine
        let quiet = "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}";
        command.env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", quiet);
        command
    }

    fn start_names(&self) -> Process {
        let mut command = Command::new("epmd");
        command.args(["-port", &self.ports[0].to_string(), "-address", "127.0.0.1"]);
        let log = self.home.path().join("names.log");
        let process = Process::spawn(command, &log);
        // a request for all names is answered by the daemon's port first
        let port = u32::from(self.ports[0]).to_be_bytes();
        process.wait_until(|| answers("127.0.0.1", self.ports[0], b"\0\x01n", &port), "epmd", &log);
        process
    }
}

impl Drop for RabbitMq {
    fn drop(&mut self) {
        self.kill9();
        if let Some(names) = self.names.take() {
            names.kill9();
        }
    }
}

fn definitions() -> String {
    let hosts: Vec<_> = (1..=9).map(|host| host.to_string()).collect();
    let user = |(name, password)| json!({"name": name, "password": password, "tags": ""});
    let permission =
        |(host, user)| json!({"user": user, "vhost": host, "configure": ".*", "write": ".*", "read": ".*"});
    let pairs = hosts.iter().flat_map(|host| [(host, "guest"), (host, LOGIN.0)]);
    json!({
        "users": [user(("guest", "guest")), user(LOGIN)],
        "vhosts": hosts.iter().map(|host| json!({"name": host})).collect::<Vec<_>>(),
        "permissions": pairs.map(permission).collect::<Vec<_>>(),
    })
    .to_string()
}

fn scripts() -> PathBuf {
    let installed = installed_under("/usr/lib/rabbitmq/lib").into_iter().map(|folder| folder.join("sbin"));
    let found = installed.max().filter(|folder| Path::new(folder).join("rabbitmq-server").exists());
    found.unwrap_or_else(|| panic!("rabbitmq-server is missing: install the package `rabbitmq-server`"))
}
