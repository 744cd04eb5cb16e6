//! A service's database as `weft database setup` makes it, on a server of its own.

#![allow(dead_code, reason = "each test uses what it needs")]

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

use tempfile::TempDir;
use tokio_postgres::Client;
use weft::contract::{
    Contract, DatabaseLogin, Role, Server,
    database_setup::{DatabaseSetup, Outcome, Purpose},
};

use crate::servers::{self, Postgres, SUPERUSER, SUPERUSER_PASSWORD};

pub const DATABASE: &str = "orders";
pub const APP_PASSWORD: &str = "the app's";
pub const RELAY_PASSWORD: &str = "the relay's";

/// Of a database on a server of this machine.
pub fn address(port: u16, database: &str) -> Server {
    Server::Address { host: "127.0.0.1".into(), port, database: database.into() }
}

/// A server with the database `orders`, and what the set-up Job would have mounted.
#[derive(Debug)]
pub struct Database {
    pub server: Postgres,
    folder: TempDir,
    pub setup: DatabaseSetup,
    /// In seconds: what `weft database setup` is started with. As the operator starts it.
    pub patience: u32,
    /// What outlives a run, as a pod's volume does.
    pub state: Option<PathBuf>,
}

impl Database {
    /// An empty database of a service; nothing is set up yet.
    pub async fn empty() -> Self {
        Self::with_purpose(Purpose::Service).await
    }

    /// A service's database after its set-up, without migrations.
    pub async fn ready() -> Self {
        let database = Self::empty().await;
        database.set_up_well();
        database
    }

    pub async fn with_purpose(purpose: Purpose) -> Self {
        Self::on(Postgres::start(), purpose).await
    }

    pub async fn on(server: Postgres, purpose: Purpose) -> Self {
        server.superuser("postgres").await.batch_execute(&format!("create database {DATABASE}")).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let role = |name: &str, password: &str| {
            let password_file = folder.path().join(name);
            fs::write(&password_file, format!("{password}\n")).unwrap();
            Role { name: name.into(), password_file }
        };
        let migrations = folder.path().join("migrations");
        fs::create_dir(&migrations).unwrap();
        let relay = (purpose == Purpose::Service).then(|| role("relay", RELAY_PASSWORD));
        let setup = DatabaseSetup {
            remove_slot: false,
            admin: DatabaseLogin {
                server: address(server.port(), DATABASE),
                role: role(SUPERUSER, SUPERUSER_PASSWORD),
                schema: None,
            },
            owner: "owner".into(),
            schema: None,
            reads: Vec::new(),
            log_tailing: false,
            app: role("app", APP_PASSWORD),
            relay,
            purpose,
            duplicate_window: None,
            migrations: Some(migrations),
            last_migration: None,
            outbox: None,
        };
        let database = Self { server, folder, setup, patience: 30, state: None };
        fs::write(database.termination_log(), "").unwrap();
        database.write_contract();
        database
    }

    pub fn write_contract(&self) {
        fs::write(self.contract(), self.setup.to_yaml().unwrap()).unwrap();
    }

    fn contract(&self) -> PathBuf {
        self.folder.path().join("setup.yaml")
    }

    pub fn termination_log(&self) -> PathBuf {
        self.folder.path().join("termination-log")
    }

    /// A login of a role that the set-up makes, as contracts have it.
    pub fn login(&self, role: &str) -> DatabaseLogin {
        let role = Role { name: role.into(), password_file: self.folder.path().join(role) };
        DatabaseLogin { role, ..self.setup.admin.clone() }
    }

    pub fn set_password(&self, role: &str, password: &str) {
        fs::write(self.folder.path().join(role), password).unwrap();
    }

    pub fn migrations(&self) -> &Path {
        self.setup.migrations.as_deref().unwrap()
    }

    pub fn write_migration(&self, name: &str, sql: &str) {
        fs::write(self.migrations().join(name), sql).unwrap();
    }

    /// Starts `weft database setup`.
    pub fn start_set_up(&self) -> Child {
        self.start_set_up_of(&self.contract())
    }

    /// Starts it with another contract.
    pub fn start_set_up_of(&self, contract: &Path) -> Child {
        Command::new(env!("CARGO_BIN_EXE_weft"))
            .args(["database", "setup", "--config"])
            .arg(contract)
            .args(["--patience", &self.patience.to_string(), "--termination-log"])
            .arg(self.termination_log())
            .args(self.state.iter().flat_map(|state| ["--state".as_ref(), state.as_os_str()]))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// What `weft database setup --print-sql` prints.
    pub fn print_sql(&self) -> String {
        let mut weft = Command::new(env!("CARGO_BIN_EXE_weft"));
        let output = weft.args(["database", "setup", "--print-sql", "--config"]).arg(self.contract()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `weft database setup` to its end.
    pub fn set_up(&self) -> Output {
        self.start_set_up().wait_with_output().unwrap()
    }

    pub fn set_up_well(&self) {
        let output = self.set_up();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// As [`Database::set_up_well`], while the test goes on.
    pub async fn set_up_in_background(&self) {
        let run = self.start_set_up();
        let output = tokio::task::spawn_blocking(|| run.wait_with_output().unwrap()).await.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Another database on the same server, of the same roles: its contract's file.
    pub async fn neighbour(&self, name: &str) -> PathBuf {
        self.server.superuser("postgres").await.batch_execute(&format!("create database {name}")).await.unwrap();
        let admin = DatabaseLogin { server: address(self.server.port(), name), ..self.setup.admin.clone() };
        let contract = self.folder.path().join(format!("{name}.yaml"));
        fs::write(&contract, DatabaseSetup { admin, ..self.setup.clone() }.to_yaml().unwrap()).unwrap();
        contract
    }

    /// Runs `weft database setup`, which must succeed; gives what it reports.
    pub fn set_up_outcome(&self) -> Outcome {
        self.set_up_well();
        Outcome::from_message(&fs::read_to_string(self.termination_log()).unwrap()).unwrap()
    }

    /// Runs `weft database setup`, which must give up although repeating may help; gives its termination message.
    pub fn set_up_given_up(&self) -> String {
        let output = self.set_up();
        assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
        fs::read_to_string(self.termination_log()).unwrap()
    }

    /// Runs `weft database setup`, which must refuse for good; gives its termination message.
    pub fn set_up_refused(&self) -> String {
        let output = self.set_up();
        let log = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(i32::from(weft::database::EXIT_DEFINITE)), "{log}");
        let sentence = fs::read_to_string(self.termination_log()).unwrap();
        assert!(log.contains(&serde_json::to_string(&sentence).unwrap()), "{sentence} is the last thing logged: {log}");
        sentence
    }

    pub async fn superuser(&self) -> Client {
        self.server.superuser(DATABASE).await
    }

    pub async fn app(&self) -> Client {
        self.try_login("app", APP_PASSWORD).await.unwrap()
    }

    pub async fn relay(&self) -> Client {
        self.try_login("relay", RELAY_PASSWORD).await.unwrap()
    }

    pub async fn try_login(&self, role: &str, password: &str) -> Result<Client, tokio_postgres::Error> {
        let mut config = tokio_postgres::Config::new();
        config.host("127.0.0.1").port(self.server.port()).dbname(DATABASE).user(role).password(password);
        let (client, connection) = config.connect(tokio_postgres::NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }
}

/// Polls until the superuser's query answers true.
pub async fn until(client: &Client, query: &str) {
    servers::until(query, async || client.query_one(query, &[]).await.unwrap().get(0)).await;
}

/// Whether a relay streams from its slot. A slot is listed as active while it is still being made, and a relay that is
/// killed then leaves none.
pub const STREAMING: &str = "select exists (select from pg_replication_slots join pg_stat_replication on pid = active_pid \
     where state in ('catchup', 'streaming'))";
