//! A Kafka server: one node that is broker and controller (KRaft).

use std::{
    fs,
    path::PathBuf,
    process::{Command, Stdio},
    sync::OnceLock,
};

use tempfile::TempDir;

use super::{
    files::{accessible_folder, cached, copy_folder},
    free_port,
    process::{Process, answers},
};

/// Enough for a test's server, which then starts in two seconds.
const JAVA: [&str; 4] = ["-Xmx256m", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xshare:auto"];
/// The login that the listener with SASL accepts, by each mechanism.
pub const LOGIN: (&str, &str) = ("relay", "a right password");
/// Of every server: its data folder is a copy.
const CLUSTER_ID: &str = "d2VmdC1pbnRlZ3JhdGlvbg";

const LOG4J: &str = "
rootLogger.level = WARN
rootLogger.appenderRef.out.ref = out
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d %p %c{1} %m%n
";

/// What a server has of its own.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Whether a topic is made by being published to.
    pub creates_topics: bool,
}

/// A Kafka server with listeners for each way to connect.
#[derive(Debug)]
pub struct Kafka {
    home: TempDir,
    options: Options,
    plain: u16,
    sasl: u16,
    controller: u16,
    process: Option<Process>,
}

impl Kafka {
    /// Why no server can be started here, as one sentence.
    pub fn missing() -> Option<&'static str> {
        if jars().is_none() {
            Some("no Kafka in Weft's cache: `hack/kafka` downloads it")
        } else if Command::new("java").arg("-version").stderr(Stdio::null()).status().is_err() {
            Some("no Java: install the package `default-jre-headless`")
        } else {
            None
        }
    }

    pub fn start(options: Options) -> Self {
        let home = accessible_folder("weft-kafka-", None);
        copy_folder(&template(), &home.path().join("data"), None);
        fs::write(home.path().join("log4j2.properties"), LOG4J).expect("the logger's settings are written");
        let mut server =
            Self { home, options, plain: free_port(), sasl: free_port(), controller: free_port(), process: None };
        server.restart();
        server
    }

    /// `127.0.0.1:PORT`, without login.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.plain)
    }

    /// `127.0.0.1:PORT`, with [`LOGIN`].
    pub fn sasl_address(&self) -> String {
        format!("127.0.0.1:{}", self.sasl)
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

    /// Starts the server again on the same data and ports; kills it first if it runs.
    pub fn restart(&mut self) {
        self.kill9();
        let (folder, log) = (self.home.path(), self.home.path().join("log"));
        let settings = folder.join("server.properties");
        fs::write(&settings, self.settings()).expect("the settings are written");
        let mut command = java(&format!("-Dlog4j2.configurationFile={}", folder.join("log4j2.properties").display()));
        command.arg("kafka.Kafka").arg(settings);
        let process = Process::spawn(command, &log);
        // ApiVersions, version 0, correlation 1; the answer has a length, the correlation, and no error
        let request = b"\0\0\0\x0d\0\x12\0\0\0\0\0\x01\0\x03wft";
        let up = || [self.plain, self.sasl].iter().all(|&port| answers("127.0.0.1", port, request, b"\0\0"));
        process.wait_until(up, "Kafka", &log);
        self.process = Some(process);
    }

    fn settings(&self) -> String {
        let Self { home, options, plain, sasl, controller, process: _ } = self;
        let (user, password) = LOGIN;
        let listeners = format!("PLAINTEXT://127.0.0.1:{plain},SASL_PLAINTEXT://127.0.0.1:{sasl}");
        let jaas = "org.apache.kafka.common.security";
        format!(
            "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listeners={listeners},CONTROLLER://127.0.0.1:{controller}
advertised.listeners={listeners}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.sasl_plaintext.plain.sasl.jaas.config={jaas}.plain.PlainLoginModule required user_{user}=\"{password}\";
listener.name.sasl_plaintext.scram-sha-256.sasl.jaas.config={jaas}.scram.ScramLoginModule required;
listener.name.sasl_plaintext.scram-sha-512.sasl.jaas.config={jaas}.scram.ScramLoginModule required;
log.dirs={data}
auto.create.topics.enable={creates}
num.partitions=3
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
",
            data = home.path().join("data").display(),
            creates = options.creates_topics,
        )
    }
}

impl Drop for Kafka {
    fn drop(&mut self) {
        self.kill9();
    }
}

fn jars() -> Option<PathBuf> {
    cached("kafka-").into_iter().max()
}

fn java(option: &str) -> Command {
    let jars = jars().expect("Kafka is in Weft's cache");
    let mut command = Command::new("java");
    command.args(JAVA).arg(option).arg("-cp").arg(jars.join("*"));
    command
}

/// A formatted data folder with the login, made once for this machine.
fn template() -> PathBuf {
    static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
    TEMPLATE.get_or_init(make_template).clone()
}

fn make_template() -> PathBuf {
    let version = jars().and_then(|jars| Some(jars.file_name()?.to_string_lossy().into_owned())).unwrap_or_default();
    let path = std::env::temp_dir().join(format!("weft-{version}-template"));
    if path.exists() {
        return path;
    }
    let making = accessible_folder("weft-kafka-format-", None);
    let (settings, data) = (making.path().join("server.properties"), making.path().join("data"));
    let text = format!(
        "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:1\n\
         controller.listener.names=CONTROLLER\nlisteners=PLAINTEXT://127.0.0.1:2,CONTROLLER://127.0.0.1:1\nlog.dirs={}\n",
        data.display()
    );
    fs::write(&settings, text).expect("the settings are written");
    let mut command = java("-Dlog4j2.level=WARN");
    command.args(["kafka.tools.StorageTool", "format", "--cluster-id", CLUSTER_ID, "--config"]).arg(&settings);
    for mechanism in ["SCRAM-SHA-256", "SCRAM-SHA-512"] {
        let (user, password) = LOGIN;
        command.arg("--add-scram").arg(format!("{mechanism}=[name={user},password={password}]"));
    }
    let output = command.output().expect("java is started");
    assert!(output.status.success(), "Kafka's folder: {}", String::from_utf8_lossy(&output.stderr));
    // another test process may have been faster, which is fine
    let _ = fs::rename(&data, &path);
    assert!(path.exists(), "the template {} is there", path.display());
    path
}
