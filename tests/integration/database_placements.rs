//! Set-up and relay of a database that is not the service's own: on a server of somebody else's, and in that of another service.

use std::{fs, path::Path};

use tokio_postgres::{Client, error::SqlState};
use weft::contract::{
    DatabaseLogin, Role, RoleName, Server,
    database_setup::{Outcome, Purpose},
    relay::Mode,
};

use crate::{
    database::{DATABASE, Database, address},
    relay_harness::Setting,
    servers::{Postgres, SUPERUSER, SUPERUSER_PASSWORD},
};

/// A database whose set-up has what is mounted of a Secret. The service's login is `shop`.
struct External {
    database: Database,
    /// As the Secret is mounted: `server`, `admin` and `app`.
    secret: tempfile::TempDir,
}

impl External {
    async fn on(server: Postgres) -> Self {
        let mut database = Database::on(server, Purpose::Service).await;
        let secret = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let folder = secret.path().join(name);
            fs::create_dir(&folder).unwrap();
            folder
        };
        let (server, admin, app) = (folder("server"), folder("admin"), folder("app"));
        let login = |folder: &Path, name: &str, password: &str| {
            fs::write(folder.join("username"), name).unwrap();
            fs::write(folder.join("password"), password).unwrap();
            Role { name: RoleName::File { file: folder.join("username") }, password_file: folder.join("password") }
        };
        let of_the_database = |prefix: &str| RoleName::Prefix { prefix: prefix.to_owned() };
        let relay = Role { name: of_the_database("weft_relay_"), ..database.setup.relay.clone().unwrap() };
        database.setup.admin = DatabaseLogin {
            server: Server::Folder { server },
            role: login(&admin, SUPERUSER, SUPERUSER_PASSWORD),
            schema: None,
        };
        database.setup.app = login(&app, "shop", "the shop's");
        database.setup.relay = Some(relay);
        database.setup.owner = of_the_database("weft_owner_");
        database.patience = 2;
        database.write_contract();
        let external = Self { database, secret };
        external.key("server/host", "127.0.0.1\n");
        external.key("server/port", &external.database.server.port().to_string());
        external.key("server/database", DATABASE);
        external
    }

    fn key(&self, file: &str, text: &str) {
        fs::write(self.secret.path().join(file), text).unwrap();
    }

    fn without(&self, file: &str) {
        fs::remove_file(self.secret.path().join(file)).unwrap();
    }

    fn trusts_the_server(&self) {
        fs::copy(self.database.server.folder().join("ca.crt"), self.secret.path().join("server/ca.crt")).unwrap();
    }

    async fn app(&self) -> Client {
        self.database.try_login("shop", "the shop's").await.unwrap()
    }
}

async fn sessions_by_tls(client: &Client, application: &str) -> (i64, i64) {
    let count = "select count(*) filter (where ssl), count(*) from pg_stat_ssl join pg_stat_activity using (pid)
        where application_name like $1";
    let row = client.query_one(count, &[&application]).await.unwrap();
    (row.get(0), row.get(1))
}

#[tokio::test]
async fn a_server_of_somebody_elses_is_set_up_and_what_others_may_do_there_stays() {
    let external = External::on(Postgres::start()).await;
    let superuser = external.database.superuser().await;
    let before = "create role owner superuser; create role bi login password 'bi'; create table old (id int);";
    superuser.batch_execute(before).await.unwrap();
    external.database.write_migration("001.sql", "create table orders (id bigint primary key, payload text)");
    external.database.set_up_well();
    external.database.set_up_well();

    let app = external.app().await;
    app.batch_execute("insert into orders values (1, 'a'); select receive('c', 's', 'm')").await.unwrap();
    let refused = app.batch_execute("create table mine (id int)").await.unwrap_err();
    assert_eq!(refused.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE));
    external.database.try_login("bi", "bi").await.expect("whoever could connect still can");
    let roles = "select string_agg(rolname, ' ' order by rolname), bool_or(rolname = 'owner' and rolsuper)
        from pg_roles where rolname ~ '^(weft_.*|owner|shop)$'";
    let row = superuser.query_one(roles, &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "owner shop weft_migrator_orders weft_owner_orders weft_relay_orders");
    assert!(row.get::<_, bool>(1), "a role of somebody else's with a common name is left alone");
}

#[tokio::test]
async fn a_relay_reads_the_log_of_a_server_of_somebody_elses_by_tls() {
    let external = External::on(Postgres::start_with_tls(&[])).await;
    external.trusts_the_server();
    let mut setting = Setting::with(Mode::LogTailing, external.database);
    let relay = setting.database.setup.relay.clone().unwrap();
    setting.contract.source = DatabaseLogin { role: relay, ..setting.database.setup.admin.clone() };
    setting.write_contract();
    let relay = setting.start_relay();
    relay.until("it leads", |status| status.leading && status.ready).await;
    let app = setting.database.try_login("shop", "the shop's").await.unwrap();
    let insert =
        "insert into outbox (aggregate_type, aggregate_id, type, payload) values ('Order', '1', 'Placed', '{}')";
    app.batch_execute(insert).await.unwrap();
    setting.drained().await;
    let superuser = setting.database.superuser().await;
    let (by_tls, all) = sessions_by_tls(&superuser, "weft relay%").await;
    assert!(all >= 2 && by_tls == all, "{by_tls} of {all} sessions use TLS");
    let slot = superuser.query_one("select slot_name::text from pg_replication_slots", &[]).await.unwrap();
    assert!(slot.get::<_, &str>(0).starts_with("weft_outbox_orders_"), "{slot:?}");
}

#[tokio::test]
async fn what_the_certificate_must_prove_is_what_the_secret_says() {
    let external = External::on(Postgres::start_with_tls(&[])).await;
    external.trusts_the_server();
    external.database.set_up_well();
    // the certificate is of 127.0.0.1
    external.key("server/host", "localhost");
    let sentence = external.database.set_up_given_up();
    assert!(sentence.contains("certificate"), "{sentence}");
    for (mode, goes) in [("verify-ca", true), ("require", true), ("disable", true), ("verify-full", false)] {
        external.key("server/sslmode", mode);
        assert_eq!(external.database.set_up().status.success(), goes, "{mode}");
    }
    external.key("server/sslmode", "always");
    let sentence = external.database.set_up_refused();
    assert!(sentence.contains("sslmode of the database's Secret is none"), "{sentence}");
    external.without("server/ca.crt");
    external.key("server/sslmode", "verify-full");
    assert!(external.database.set_up_given_up().contains("certificate"), "the system knows no such authority");
    external.without("server/sslmode");
    external.database.set_up_well();
}

#[tokio::test]
async fn a_server_without_tls_is_refused_where_the_secret_asks_for_it() {
    let external = External::on(Postgres::start()).await;
    external.key("server/sslmode", "require");
    let sentence = external.database.set_up_given_up();
    assert!(sentence.contains("TLS"), "{sentence}");
    external.key("server/sslmode", "prefer");
    external.database.set_up_well();
}

#[tokio::test]
async fn what_is_wrong_with_a_secret_is_one_sentence_and_is_corrected_in_place() {
    let mut external = External::on(Postgres::start()).await;
    let state = tempfile::tempdir().unwrap();
    external.database.state = Some(state.path().to_owned());
    let expect = |external: &External, sentence: &str| {
        let said = external.database.set_up_refused();
        assert!(said.contains(sentence), "{said}");
    };
    for key in ["host", "port", "database"] {
        let file = format!("server/{key}");
        let text = fs::read_to_string(external.secret.path().join(&file)).unwrap();
        external.without(&file);
        expect(&external, &format!("the database's Secret has no `{key}`: add it"));
        external.key(&file, &text);
    }
    external.key("server/port", "postgresql");
    expect(&external, "`port` of the database's Secret is no number from 1 to 65535: correct it");
    external.key("server/port", &external.database.server.port().to_string());
    external.key("admin/password", "wrong");
    let said = external.database.set_up_given_up();
    assert!(said.contains("password authentication failed") && said.contains("correct `admin-username`"), "{said}");
    external.key("admin/password", SUPERUSER_PASSWORD);
    external.key("app/username", SUPERUSER);
    let said = external.database.set_up_given_up();
    assert!(said.contains("are both postgres: give the service a login of its own"), "{said}");
    external.key("app/username", "shop");
    external.database.set_up_well();
}

#[tokio::test]
async fn a_server_that_does_not_fit_is_one_sentence_and_is_tried_again() {
    let mut external = External::on(Postgres::start_with(&["wal_level=replica"])).await;
    external.database.setup.log_tailing = true;
    external.database.write_contract();
    let said = external.database.set_up_given_up();
    assert!(
        said.starts_with("the server has wal_level = replica, and the OutboxRelay reads the transaction log"),
        "{said}"
    );
    external.database.setup.log_tailing = false;
    external.database.write_contract();

    let superuser = external.database.superuser().await;
    superuser.batch_execute("create role dba login createrole password 'dba'").await.unwrap();
    external.key("admin/username", "dba");
    external.key("admin/password", "dba");
    let said = external.database.set_up_given_up();
    assert!(said.starts_with("dba, the `admin-username` of the Secret, is no superuser"), "{said}");
    external.key("admin/username", SUPERUSER);
    external.key("admin/password", SUPERUSER_PASSWORD);
    superuser.batch_execute("create role shop superuser").await.unwrap();
    let said = external.database.set_up_given_up();
    assert!(said.starts_with("shop, the `username` of the Secret, is a superuser"), "{said}");
    superuser.batch_execute("alter role shop nosuperuser").await.unwrap();

    let standby = external.database.server.standby("replica", external.database.server.port());
    external.key("server/port", &standby.port().to_string());
    let said = external.database.set_up_given_up();
    assert!(said.starts_with("the server is a read-only replica: name its primary"), "{said}");
    external.key("server/port", &external.database.server.port().to_string());
    external.database.set_up_well();
}

/// Runs what `--print-sql` prints, as a person does.
fn run_by_hand(external: &External) -> String {
    let sql = external.database.print_sql();
    let script = external.secret.path().join("setup.sql");
    fs::write(&script, &sql).unwrap();
    fs::set_permissions(
        external.secret.path(),
        <fs::Permissions as std::os::unix::fs::PermissionsExt>::from_mode(0o755),
    )
    .unwrap();
    let mut psql = external.database.server.tool("psql");
    psql.args(["--no-psqlrc", "-d", DATABASE, "-v", "app_password=the shop's", "-v"]);
    psql.arg(format!("relay_password={}", crate::database::RELAY_PASSWORD)).arg("-f").arg(&script);
    let output = psql.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    sql
}

#[tokio::test]
async fn without_a_superusers_login_a_person_runs_what_is_printed_and_the_set_up_says_what_is_missing() {
    let external = External::on(Postgres::start()).await;
    external.without("admin/username");
    external.without("admin/password");
    external.database.write_migration("001.sql", "create table orders (id bigint primary key, at timestamptz)");
    let said = external.database.set_up_given_up();
    assert!(said.contains("the login of role shop at database orders") && said.contains("--print-sql"), "{said}");
    let superuser = external.database.superuser().await;
    superuser.batch_execute("create role shop login password 'the shop''s'").await.unwrap();
    let said = external.database.set_up_given_up();
    let missing = "the role weft_relay_orders, the schema weft, the migration 001.sql is missing";
    assert!(said.contains(missing), "{said}");

    let sql = run_by_hand(&external);
    assert!(!sql.contains("the shop's") && !sql.contains("SCRAM"), "no password is in the script");
    let outcome = external.database.set_up_outcome();
    assert_eq!((outcome.files, outcome.last.as_deref()), (1, Some("001.sql")));
    let app = external.app().await;
    app.batch_execute("insert into orders values (1, now()); select receive('c', 's', 'm'), enter('s', 'a', 'do')")
        .await
        .unwrap();
    let refused = app.batch_execute("create table mine (id int)").await.unwrap_err();
    assert_eq!(refused.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE));

    external.database.write_migration("002.sql", "alter table orders add column total int -- no semicolon");
    let said = external.database.set_up_given_up();
    assert!(said.contains("and the migration 002.sql is missing"), "{said}");
    run_by_hand(&external);
    external.database.set_up_well();
    app.batch_execute("update orders set total = 1").await.unwrap();

    // with a superuser's login the same database is Weft's to set up
    external.key("admin/username", SUPERUSER);
    external.key("admin/password", SUPERUSER_PASSWORD);
    external.database.write_migration("003.sql", "create table more (id int)");
    external.database.set_up_well();
}

/// The database of `orders`, and the service `reports` with the schema `reports` in it.
struct Shared {
    host: Database,
    guest: Database,
}

impl Shared {
    async fn new() -> Self {
        let host = Database::empty().await;
        host.write_migration(
            "001.sql",
            "create table customers (id bigint primary key, name text); create table cards (id bigint)",
        );
        host.set_up_well();
        // another folder with migrations, files and contract; its own server is not used
        let mut guest = Database::empty().await;
        let login = |role: &Role, name: &str| Role { name: name.into(), ..role.clone() };
        guest.setup.admin.server = address(host.server.port(), DATABASE);
        guest.setup.owner = "reports_owner".into();
        guest.setup.app = login(&guest.setup.app, "reports_app");
        guest.setup.relay = guest.setup.relay.as_ref().map(|relay| login(relay, "reports_relay"));
        guest.setup.schema = Some("reports".to_owned());
        guest.setup.reads = vec!["public.customers".to_owned()];
        guest.patience = 2;
        guest.write_contract();
        guest.write_migration("001.sql", "create table totals (id bigint primary key, sum bigint)");
        Self { host, guest }
    }

    async fn app(&self) -> Client {
        self.host.try_login("reports_app", crate::database::APP_PASSWORD).await.unwrap()
    }
}

async fn denied(client: &Client, sql: &str) {
    let error = client.batch_execute(sql).await.expect_err(sql);
    assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{sql}: {error:?}");
}

#[tokio::test]
async fn a_guest_has_a_schema_and_tables_of_its_own_and_reads_what_is_named() {
    let Shared { host, mut guest } = Shared::new().await;
    guest.set_up_well();
    guest.set_up_well();
    let shared = Shared { host, guest };
    let app = shared.app().await;
    app.batch_execute("insert into totals values (1, 2); select * from public.customers").await.unwrap();
    app.batch_execute("select receive('c', 's', 'm'), enter('s', 'a', 'do')").await.unwrap();
    app.batch_execute(
        "insert into outbox (aggregate_type, aggregate_id, type, payload) values ('T', '1', 'Made', '{}')",
    )
    .await
    .unwrap();
    for sql in [
        "select * from public.cards",
        "insert into public.customers values (1)",
        "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) values ('T', '1', 'Forged', '{}')",
        "select weft.receive('c', 's', 'm')",
        "create table reports.mine (id int)",
    ] {
        denied(&app, sql).await;
    }
    let theirs = shared.host.app().await;
    denied(&theirs, "select * from reports.totals").await;
    denied(&theirs, "select * from weft_reports.outbox").await;
    let counts = "select (select count(*) from weft.outbox), (select count(*) from weft_reports.outbox)";
    let row = shared.host.superuser().await.query_one(counts, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (0, 1));

    // what is named no more is closed
    let Shared { host, guest: database } = shared;
    guest = database;
    guest.setup.reads = vec!["public.cards".to_owned()];
    guest.write_contract();
    guest.set_up_well();
    denied(&app, "select * from public.customers").await;
    app.batch_execute("select * from public.cards").await.unwrap();
    host.set_up_well();
    app.batch_execute("select * from public.cards").await.expect("a set-up of the host takes nothing away");
}

#[tokio::test]
async fn a_guest_is_refused_a_schema_of_somebody_elses_and_tables_that_are_not_there() {
    let Shared { host, mut guest } = Shared::new().await;
    guest.setup.reads.push("public.suppliers".to_owned());
    guest.write_contract();
    let said = guest.set_up_given_up();
    assert!(
        said.starts_with("sharedWith.reads names public.suppliers, and the database orders has no such table"),
        "{said}"
    );
    guest.setup.reads.pop();
    guest.write_contract();
    let superuser = host.superuser().await;
    superuser.batch_execute("create schema reports authorization owner").await.unwrap();
    let said = guest.set_up_given_up();
    assert!(
        said.starts_with("sharedWith.schema is reports, and that schema of the database orders belongs to owner"),
        "{said}"
    );
}

#[tokio::test]
async fn a_table_that_two_services_write_is_named_in_both() {
    let Shared { host, guest } = Shared::new().await;
    guest.set_up_well();
    host.write_migration("002.sql", "grant select, update on customers to reports_app");
    let outcome: Outcome = host.set_up_outcome();
    assert_eq!(outcome.written_by_others, ["public.customers"]);
    assert_eq!(guest.set_up_outcome().written_by_others, ["public.customers"]);
}

#[tokio::test]
async fn the_relays_of_two_services_in_one_database_publish_each_its_own() {
    for mode in [Mode::LogTailing, Mode::Polling] {
        let Shared { host, guest } = Shared::new().await;
        guest.set_up_well();
        let port = host.server.port();
        let hosts = Setting::with(mode, host);
        let mut guests = Setting::with(mode, guest);
        guests.contract.service = "reports".to_owned();
        let relay = guests.database.setup.relay.clone().unwrap();
        guests.contract.source =
            DatabaseLogin { server: address(port, DATABASE), role: relay, schema: Some("weft_reports".to_owned()) };
        guests.write_contract();
        let (first, second) = (hosts.start_relay(), guests.start_relay());
        for relay in [&first, &second] {
            relay.until("each leads", |status| status.leading && status.ready).await;
        }
        let insert = |schema: &str, rows: usize| {
            format!(
                "insert into {schema}.outbox (aggregate_type, aggregate_id, type, payload)
                select 'T', n::text, 'Made', '{{}}' from generate_series(1, {rows}) as n"
            )
        };
        let superuser = hosts.database.superuser().await;
        superuser.batch_execute(&insert("weft", 3)).await.unwrap();
        superuser.batch_execute(&insert("weft_reports", 5)).await.unwrap();
        first.until("the host's", |status| status.published == 3 && status.pending == 0).await;
        second.until("the guest's", |status| status.published == 5 && status.pending == 0).await;
    }
}
