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
/// The login that the listener with TLS accepts, by each mechanism.
pub const LOGIN: (&str, &str) = ("relay", "a right password");
/// Of every server: its folder is a copy.
const CLUSTER_ID: &str = "d2VmdC1pbnRlZ3JhdGlvbg";
const KEYSTORE_PASSWORD: &str = "integration-tests-only";

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
    tls: u16,
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
        copy_folder(&template().join("."), home.path(), None);
        fs::write(home.path().join("log4j2.properties"), LOG4J).expect("the logger's settings are written");
        let mut server =
            Self { home, options, plain: free_port(), tls: free_port(), controller: free_port(), process: None };
        server.restart();
        server
    }

    /// `127.0.0.1:PORT`, without login.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.plain)
    }

    /// `127.0.0.1:PORT`, with TLS and [`LOGIN`].
    pub fn tls_address(&self) -> String {
        format!("127.0.0.1:{}", self.tls)
    }

    /// The certificate by which it is trusted.
    pub fn ca(&self) -> String {
        fs::read_to_string(self.home.path().join("ca.crt")).expect("the certificate is there")
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
        // ApiVersions, version 0; the answer begins with its length
        let request = b"\0\0\0\x0d\0\x12\0\0\0\0\0\x01\0\x03wft";
        let up = || answers("127.0.0.1", self.plain, request, b"\0\0");
        process.wait_until(up, "Kafka", &log);
        self.process = Some(process);
    }

    /// A broker that was killed may come back only after its session, of nine seconds by default.
    fn settings(&self) -> String {
        let Self { home, options, plain, tls, controller, process: _ } = self;
        let (user, password) = LOGIN;
        let listeners = format!("PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{tls}");
        let jaas = "org.apache.kafka.common.security";
        format!(
            "process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listeners={listeners},CONTROLLER://127.0.0.1:{controller}
advertised.listeners={listeners}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-256,SCRAM-SHA-512
listener.name.sasl_ssl.plain.sasl.jaas.config={jaas}.plain.PlainLoginModule required user_{user}=\"{password}\";
listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config={jaas}.scram.ScramLoginModule required;
listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config={jaas}.scram.ScramLoginModule required;
ssl.keystore.type=PKCS12
ssl.keystore.location={home}/server.p12
ssl.keystore.password={KEYSTORE_PASSWORD}
log.dirs={home}/data
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=300
auto.create.topics.enable={creates}
num.partitions=3
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
",
            home = home.path().display(),
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

/// A formatted data folder with the login, and a certificate; made once for this machine.
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
    let folder = making.path().join("folder");
    fs::create_dir(&folder).expect("a folder is made");
    let settings = making.path().join("server.properties");
    let text = format!(
        "process.roles=broker,controller\nnode.id=1\ncontroller.quorum.voters=1@127.0.0.1:1\n\
         controller.listener.names=CONTROLLER\nlisteners=PLAINTEXT://127.0.0.1:2,CONTROLLER://127.0.0.1:1\nlog.dirs={}/data\n",
        folder.display()
    );
    fs::write(&settings, text).expect("the settings are written");
    let mut format = java("-Dlog4j2.level=WARN");
    format.args(["kafka.tools.StorageTool", "format", "--cluster-id", CLUSTER_ID, "--config"]).arg(&settings);
    for mechanism in ["SCRAM-SHA-256", "SCRAM-SHA-512"] {
        let (user, password) = LOGIN;
        format.arg("--add-scram").arg(format!("{mechanism}=[name={user},password={password}]"));
    }
    run(format);
    let keytool = |arguments: &[&str]| {
        let mut command = Command::new("keytool");
        command.current_dir(&folder).args(arguments);
        command.args(["-keystore", "server.p12", "-storepass", KEYSTORE_PASSWORD, "-alias", "server"]);
        run(command);
    };
    keytool(&["-genkeypair", "-keyalg", "EC", "-dname", "CN=kafka", "-ext", "san=ip:127.0.0.1", "-validity", "3650"]);
    keytool(&["-exportcert", "-rfc", "-file", "ca.crt"]);
    // another test process may have been faster, which is fine
    let _ = fs::rename(&folder, &path);
    assert!(path.exists(), "the template {} is there", path.display());
    path
}

fn run(mut command: Command) {
    let output = command.output().expect("Java's programs are there");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
