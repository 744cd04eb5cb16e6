//! Throw-away PostgreSQL and NATS servers on free loopback ports.
//!
//! Each server belongs to one test (or several that agree to share it) and dies with it, also when the test process is
//! killed: a guard process holds the other end of a pipe and kills the server when the pipe closes. `kill9` is a crash:
//! nothing is flushed, nothing is said; `restart` brings the same data back on the same port.
//!
//! PostgreSQL: the newest of `$WEFT_TEST_POSTGRES` (a folder with `bin/postgres`), Weft's cache (`postgresql-*`) and
//! `/usr/lib/postgresql/*`; run as the user `postgres` when the tests run as root, since it refuses root. NATS:
//! `nats-server` in Weft's cache or in `PATH`.

#![allow(dead_code, reason = "each test uses what it needs")]

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio_postgres::NoTls;
use weft::nats::accounts::Accounts;

/// A server that isn't up by then is broken.
const START_DEADLINE: Duration = Duration::from_mins(1);
const POLL: Duration = Duration::from_millis(10);

/// The superuser of every test server, and its password.
pub const SUPERUSER: &str = "postgres";
pub const SUPERUSER_PASSWORD: &str = "integration-tests-only";

// ---------------------------------------------------------------------------------------------------- PostgreSQL

/// A PostgreSQL server with `wal_level = logical`, SCRAM passwords and an empty database `postgres`.
#[derive(Debug)]
pub struct Postgres {
    installation: Installation,
    home: TempDir,
    parameters: Vec<String>,
    port: u16,
    process: Option<Process>,
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

/// Connects with a URL and drives the connection in the background.
pub async fn connect(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// PostgreSQL's programs, and the user that they must run as.
#[derive(Clone, Debug)]
struct Installation {
    version: u32,
    bin: PathBuf,
    user: Option<User>,
}

impl Installation {
    fn newest() -> Self {
        static NEWEST: OnceLock<Option<(u32, PathBuf)>> = OnceLock::new();
        let newest = NEWEST.get_or_init(|| {
            let told = std::env::var_os("WEFT_TEST_POSTGRES").map(PathBuf::from);
            let folders = told.into_iter().chain(installed_under("/usr/lib/postgresql")).chain(cached("postgresql-"));
            folders
                .map(|folder| folder.join("bin"))
                .filter_map(|bin| Some((major_version(&bin.join("postgres"))?, bin)))
                .max_by_key(|(version, _)| *version)
        });
        let Some((version, bin)) = newest.clone() else {
            panic!(
                "PostgreSQL's server is missing: install the package `postgresql`, or set WEFT_TEST_POSTGRES to a folder with bin/postgres"
            );
        };
        let user = is_root().then(|| {
            User::named("postgres").expect(
                "the tests run as root and PostgreSQL refuses to: add a user `postgres` (`useradd --system postgres`)",
            )
        });
        let installation = Self { version, bin, user };
        if installation.command("postgres").arg("--version").stdout(Stdio::null()).status().is_ok() {
            return installation;
        }
        Self { bin: installation.staged().join("bin"), ..installation }
    }

    /// A copy that the user `postgres` may run, of an installation in a folder that is closed to it, such as `/root`.
    fn staged(&self) -> PathBuf {
        static STAGED: OnceLock<PathBuf> = OnceLock::new();
        let stage = || {
            let path = std::env::temp_dir().join(format!("weft-postgres-{}", self.version));
            if !path.exists() {
                let making = accessible_folder("weft-postgres-", None);
                let copy = making.path().join("copy");
                copy_folder(self.bin.parent().expect("bin is in a folder"), &copy, None);
                let _ = Command::new("chmod").args(["-R", "a+rX"]).arg(&copy).status();
                // another test process may have been faster, which is fine
                let _ = fs::rename(&copy, &path);
            }
            path
        };
        STAGED.get_or_init(stage).clone()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.current_dir("/").env("LC_ALL", "C.UTF-8").env("TZ", "UTC");
        if let Some(user) = &self.user {
            command.uid(user.uid).gid(user.gid);
        }
        command
    }

    /// A data folder fresh from `initdb`, made once per version and user on this machine.
    fn template(&self) -> PathBuf {
        static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
        TEMPLATE.get_or_init(|| self.make_template()).clone()
    }

    fn make_template(&self) -> PathBuf {
        let owner = self.user.as_ref().map_or_else(own_uid, |user| user.uid);
        let path = std::env::temp_dir().join(format!("weft-postgres-{}-template-{owner}", self.version));
        if path.join("PG_VERSION").exists() {
            return path;
        }
        let making = accessible_folder("weft-initdb-", self.user.as_ref());
        let (password, data) = (making.path().join("password"), making.path().join("data"));
        fs::write(&password, SUPERUSER_PASSWORD).expect("the password file is written");
        give(&password, self.user.as_ref());
        let mut command = self.command("initdb");
        command.args(["--no-sync", "--encoding=UTF8", "--no-locale", "--auth=scram-sha-256", "--username", SUPERUSER]);
        command.arg("--pwfile").arg(&password).arg("-D").arg(&data);
        let output = command.output().expect("initdb is started");
        assert!(output.status.success(), "initdb failed: {}", String::from_utf8_lossy(&output.stderr));
        // another test process may have been faster: then its folder is there and the rename fails, which is fine
        let _ = fs::rename(&data, &path);
        assert!(path.join("PG_VERSION").exists(), "the template {} is there", path.display());
        path
    }
}

/// `postgres (PostgreSQL) 17.6` → 17; `None` when the program is absent or doesn't run here.
fn major_version(postgres: &Path) -> Option<u32> {
    let output = Command::new(postgres).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let number = text.split_whitespace().nth(2)?;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

// ---------------------------------------------------------------------------------------------------------- NATS

/// A NATS server with JetStream and its own store.
#[derive(Debug)]
pub struct Nats {
    program: PathBuf,
    home: TempDir,
    host: &'static str,
    port: u16,
    /// More of its configuration; `{home}` is a folder of its own.
    config: String,
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
            process: None,
        };
        server.restart();
        server
    }

    /// `nats://127.0.0.1:PORT`
    pub fn url(&self) -> String {
        format!("nats://{}", self.address())
    }

    /// `127.0.0.1:PORT`
    pub fn address(&self) -> String {
        weft::outage::address(self.host, self.port)
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

/// Polls until the condition holds; a test that waits in vain fails with `what`.
pub async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + START_DEADLINE;
    while !holds().await {
        assert!(Instant::now() < deadline, "in vain: {what}");
        tokio::time::sleep(POLL).await;
    }
}

// ----------------------------------------------------------------------------------------------------- processes

/// A server process, and the guard that kills it when this process is gone.
#[derive(Debug)]
struct Process {
    child: Child,
    guard: Child,
}

impl Process {
    fn spawn(mut command: Command, log: &Path) -> Self {
        let log = fs::OpenOptions::new().create(true).append(true).open(log).expect("the log is opened");
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log).process_group(0);
        let program = command.get_program().to_owned();
        let child = command.spawn().unwrap_or_else(|error| panic!("starting {}: {error}", program.display()));
        // `read` ends when the pipe closes: because `kill9` dropped it, or because the test process is no more
        let guard = Command::new("sh")
            .args(["-c", "read -r _; kill -9 \"$0\" 2>/dev/null", &child.id().to_string()])
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("sh is started");
        Self { child, guard }
    }

    fn wait_until(&self, ready: impl Fn() -> bool, what: &str, log: &Path) {
        let deadline = Instant::now() + START_DEADLINE;
        while !ready() {
            let text = || fs::read_to_string(log).unwrap_or_default();
            assert!(is_running(self.child.id()), "{what} ended at once: {}", text());
            assert!(Instant::now() < deadline, "{what} is not up after {START_DEADLINE:?}: {}", text());
            thread::sleep(POLL);
        }
    }

    /// Asks it to end by a signal, and kills it if it does not.
    fn end(mut self, signal: &str) {
        send(signal, self.child.id());
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && matches!(self.child.try_wait(), Ok(None)) {
            thread::sleep(POLL);
        }
        self.kill9();
    }

    fn signal(&self, signal: &str) {
        send(signal, self.child.id());
    }

    fn kill9(mut self) {
        // stopped, it has no more children after they were counted
        send("-STOP", self.child.id());
        let deadline = Instant::now() + START_DEADLINE;
        while is_running(self.child.id()) && stat(self.child.id()).is_some_and(|(state, _)| state != 'T') {
            assert!(Instant::now() < deadline, "a process does not stop");
            thread::sleep(POLL);
        }
        let backends = children_of(self.child.id());
        let _ = self.child.kill();
        let _ = self.child.wait();
        for &backend in &backends {
            send("-KILL", backend);
        }
        let deadline = Instant::now() + START_DEADLINE;
        while backends.iter().any(|&backend| is_running(backend)) {
            assert!(Instant::now() < deadline, "a killed backend is still there");
            thread::sleep(POLL);
        }
        drop(self.guard.stdin.take());
        let _ = self.guard.wait();
    }
}

fn send(signal: &str, pid: u32) {
    let _ = Command::new("kill").args([signal, &pid.to_string()]).stderr(Stdio::null()).status();
}

/// State and parent of a process, from `/proc/PID/stat`: `PID (NAME) STATE PPID …`, where NAME may hold anything.
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text.rsplit_once(") ")?.1.split(' ');
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

fn is_running(pid: u32) -> bool {
    stat(pid).is_some_and(|(state, _)| !matches!(state, 'Z' | 'X'))
}

fn children_of(parent: u32) -> Vec<u32> {
    let entries = fs::read_dir("/proc").expect("/proc is there").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(|&pid| stat(pid).is_some_and(|(_, found)| found == parent)).collect()
}

/// Whether what listens on the port answers `message` by something that begins so.
fn answers(host: &str, port: u16, message: &[u8], beginning: &[u8]) -> bool {
    let address = SocketAddr::new(host.parse().expect("an address"), port);
    let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) else { return false };
    let mut answer = vec![0; beginning.len()];
    stream.set_read_timeout(Some(Duration::from_secs(5))).is_ok()
        && stream.write_all(message).is_ok()
        && stream.read_exact(&mut answer).is_ok()
        && answer == beginning
}

/// A port below the range that outgoing connections are given, so that a killed server finds its port free again; never
/// given twice, as whoever has it may not listen yet.
pub fn free_port() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    (0..1000)
        .map(|_| rand::random_range(12_000..32_000))
        .find(|&port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() && given.insert(port))
        .expect("one of a thousand ports is free")
}

// ------------------------------------------------------------------------------------------------ users and files

#[derive(Clone, Debug)]
struct User {
    uid: u32,
    gid: u32,
}

impl User {
    fn named(name: &str) -> Option<Self> {
        let users = fs::read_to_string("/etc/passwd").ok()?;
        let line = users.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut ids = line.split(':').skip(2);
        Some(Self { uid: ids.next()?.parse().ok()?, gid: ids.next()?.parse().ok()? })
    }
}

fn own_uid() -> u32 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").expect("/proc is there").uid()
}

fn is_root() -> bool {
    own_uid() == 0
}

/// A folder in the system's temporary folder (a checkout below `/root` is closed to the user `postgres`).
fn accessible_folder(prefix: &str, user: Option<&User>) -> TempDir {
    let folder = tempfile::Builder::new().prefix(prefix).tempdir().expect("a temporary folder is made");
    give(folder.path(), user);
    folder
}

fn give(path: &Path, user: Option<&User>) {
    if let Some(user) = user {
        std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).expect("root may give files away");
    }
}

fn copy_folder(from: &Path, to: &Path, user: Option<&User>) {
    let mut command = Command::new("cp");
    command.arg("-a").arg(from).arg(to);
    if let Some(user) = user {
        command.uid(user.uid).gid(user.gid).current_dir("/");
    }
    assert!(command.status().expect("cp is started").success(), "{} is copied", from.display());
}

fn weft_cache() -> Option<PathBuf> {
    let told = std::env::var_os("WEFT_CACHE").map(PathBuf::from);
    told.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/weft")))
}

/// Folders of Weft's cache whose names begin so.
fn cached(prefix: &str) -> Vec<PathBuf> {
    let folders = weft_cache().map(installed_under).unwrap_or_default();
    let named = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    folders.into_iter().filter(named).collect()
}

fn installed_under(folder: impl AsRef<Path>) -> Vec<PathBuf> {
    fs::read_dir(folder).map(|entries| entries.flatten().map(|entry| entry.path()).collect()).unwrap_or_default()
}

// ---------------------------------------------------------------------------------------------------------- tests

#[tokio::test]
async fn a_killed_postgres_comes_back_with_its_committed_rows() {
    let mut server = Postgres::start();
    let client = server.superuser("postgres").await;
    client.batch_execute("create table kept (n int); insert into kept values (7)").await.unwrap();
    server.kill9();
    assert!(connect(&server.superuser_url()).await.is_err());
    server.restart();
    let client = server.superuser("postgres").await;
    let row = client.query_one("select n, current_setting('wal_level') from kept", &[]).await.unwrap();
    assert_eq!((row.get::<_, i32>(0), row.get::<_, &str>(1)), (7, "logical"));
}

#[tokio::test]
async fn a_killed_nats_comes_back_with_its_stream() {
    let mut server = Nats::start();
    let jetstream = |url| async { async_nats::jetstream::new(async_nats::connect::<String>(url).await.unwrap()) };
    let config = async_nats::jetstream::stream::Config { name: "kept".into(), ..Default::default() };
    jetstream(server.url()).await.create_stream(config).await.unwrap();
    server.kill9();
    server.restart();
    jetstream(server.url()).await.get_stream("kept").await.unwrap();
}
