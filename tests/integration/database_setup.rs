//! `weft database setup` against a real server.

use std::{fs, thread};

use tokio_postgres::error::SqlState;
use weft::contract::database_setup::{Outcome, Purpose};

use crate::{
    database::{APP_PASSWORD, DATABASE, Database, RELAY_PASSWORD, until},
    servers,
};

async fn count(client: &tokio_postgres::Client, table: &str) -> i64 {
    client.query_one(&format!("select count(*) from {table}"), &[]).await.unwrap().get(0)
}

async fn denied(client: &tokio_postgres::Client, sql: &str) {
    let error = client.batch_execute(sql).await.expect_err(sql);
    assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{sql}: {error:?}");
}

#[tokio::test]
async fn setting_up_twice_changes_nothing() {
    let database = Database::empty().await;
    database.write_migration("001_orders.sql", "create table orders (id bigint primary key);");
    database.set_up_well();
    let superuser = database.superuser().await;
    let picture = "select string_agg(c::text, e'\\n' order by c.oid) from (
        select oid, relname, relacl::text, relowner from pg_class where relnamespace in ('weft'::regnamespace, 'public'::regnamespace)
    ) c";
    let before: String = superuser.query_one(picture, &[]).await.unwrap().get(0);
    database.set_up_well();
    let after: String = superuser.query_one(picture, &[]).await.unwrap().get(0);
    assert_eq!(before, after);
    assert_eq!(count(&superuser, "weft.migration").await, 1);
}

/// Kubernetes restarts a container whatever it failed for.
#[tokio::test]
async fn a_definite_error_is_repeated_without_trying_again_until_its_file_is_another() {
    let mut database = Database::empty().await;
    let state = tempfile::tempdir().unwrap();
    database.state = Some(state.path().to_owned());
    let file = "do $$ begin if to_regrole('late') is null then raise 'too early'; end if; end $$;";
    database.write_migration("001.sql", file);
    let sentence = database.set_up_refused();
    assert!(sentence.contains("001.sql") && sentence.contains("too early"), "{sentence}");
    database.superuser().await.batch_execute("create role late").await.unwrap();
    assert_eq!(database.set_up_refused(), sentence, "it would succeed by now");
    database.write_migration("001.sql", &format!("{file}\n-- corrected"));
    database.set_up_well();
}

#[tokio::test]
async fn a_database_of_an_older_version_is_brought_up_to_date() {
    let database = Database::ready().await;
    let superuser = database.superuser().await;
    let fingerprint = "select string_agg(t::text, e'\\n' order by t::text) from (
        select attrelid::regclass::text, attname, atttypid::regtype::text from pg_attribute join pg_class c on c.oid = attrelid
         where relnamespace = 'weft'::regnamespace and attnum > 0
        union all
        select 'function', proname, md5(prosrc) from pg_proc where pronamespace = 'weft'::regnamespace
    ) t";
    let newest: String = superuser.query_one(fingerprint, &[]).await.unwrap().get(0);
    let layout: i32 =
        superuser.query_one("select version from weft.layout where part = 'service'", &[]).await.unwrap().get(0);
    let first = include_str!("../../src/database/sql/service.sql");
    let first = first.replace("{app}", "app").replace("{owner}", "owner").replace("{relay}", "relay");
    let back = format!(
        "drop schema weft cascade; drop publication if exists weft_outbox; create schema weft;
         create table weft.layout (part text primary key, version integer not null, applied_at timestamptz not null default now());
         insert into weft.layout values ('service', 1); {first}"
    );
    superuser.batch_execute(&back).await.unwrap();
    superuser
        .batch_execute(
            "insert into weft.inbox values ('c', 'm'); insert into weft.saga_barrier (saga_id, step, op, result) values ('s', 'a', 'do', 'done')",
        )
        .await
        .unwrap();
    database.set_up_well();
    let upgraded: String = superuser.query_one(fingerprint, &[]).await.unwrap().get(0);
    assert_eq!(upgraded, newest);
    let now: i32 =
        superuser.query_one("select version from weft.layout where part = 'service'", &[]).await.unwrap().get(0);
    assert_eq!(now, layout);
    assert_eq!((count(&superuser, "weft.inbox").await, count(&superuser, "weft.saga_barrier").await), (1, 1));
    database.app().await.batch_execute("select receive('c', 's', 'n'), enter('s', 'b', 'do')").await.unwrap();
}

#[tokio::test]
async fn set_ups_at_the_same_time_take_turns() {
    let database = Database::empty().await;
    for n in 1..=5 {
        database
            .write_migration(&format!("{n:03}.sql"), &format!("create table t{n} (id int); select pg_sleep(0.05);"));
    }
    let runs: Vec<_> = (0..4).map(|_| database.start_set_up()).collect();
    let outputs: Vec<_> =
        runs.into_iter().map(|run| thread::spawn(|| run.wait_with_output().unwrap())).collect::<Vec<_>>();
    let mut applied = 0;
    for output in outputs {
        let output = output.join().unwrap();
        let log = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{log}");
        assert!(!log.contains("trying again"), "nobody stumbled over another: {log}");
        applied += log.matches(r#""message":"applied""#).count();
    }
    assert_eq!(applied, 5);
    assert_eq!(count(&database.superuser().await, "weft.migration").await, 5);
}

#[tokio::test]
async fn a_set_up_that_is_killed_in_a_migration_is_finished_by_the_next() {
    let database = Database::empty().await;
    database.write_migration("001.sql", "create table first (id int);");
    // long enough to be killed in, yet only the first time: the lock's holder is this test
    database.write_migration(
        "002.sql",
        "create table second (id int); select pg_advisory_lock(42); select pg_advisory_unlock(42);",
    );
    let superuser = database.superuser().await;
    superuser.batch_execute("select pg_advisory_lock(42)").await.unwrap();
    let mut run = database.start_set_up();
    let waiting = "select exists (select from pg_locks where locktype = 'advisory' and objid = 42 and not granted)";
    until(&superuser, waiting).await;
    run.kill().unwrap();
    run.wait().unwrap();
    // the server notices that its client is gone (client_connection_check_interval) and rolls back
    until(
        &superuser,
        "select not exists (select from pg_stat_activity where application_name = 'weft database setup')",
    )
    .await;
    assert_eq!(count(&superuser, "weft.migration").await, 1);
    let second = superuser.query_one("select to_regclass('public.second') is null", &[]).await.unwrap();
    assert!(second.get::<_, bool>(0), "nothing of the second migration is left");

    superuser.batch_execute("select pg_advisory_unlock(42)").await.unwrap();
    database.set_up_well();
    assert_eq!(count(&superuser, "weft.migration").await, 2);
    assert_eq!(count(&superuser, "second").await, 0);
}

#[tokio::test]
async fn a_server_that_dies_in_a_migration_is_waited_for() {
    let mut database = Database::empty().await;
    database.write_migration(
        "001.sql",
        "create table first (id int); select pg_advisory_lock(42); select pg_advisory_unlock(42);",
    );
    let superuser = database.superuser().await;
    superuser.batch_execute("select pg_advisory_lock(42)").await.unwrap();
    let run = database.start_set_up();
    until(
        &superuser,
        "select exists (select from pg_locks where locktype = 'advisory' and objid = 42 and not granted)",
    )
    .await;
    database.server.kill9();
    database.server.restart();
    let output = run.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && log.contains("trying again"), "{log}");
    assert_eq!(count(&database.superuser().await, "weft.migration").await, 1);
}

const ORDERS: &str = "create table orders (id int);";
/// Whether the set-up waits for a lock on the table.
const WAITS: &str = "select exists (select from pg_locks where relation = 'orders'::regclass and not granted)";

/// A database whose first migration has made the table `orders`.
async fn with_orders() -> Database {
    let database = Database::empty().await;
    database.write_migration("001.sql", ORDERS);
    database.set_up_well();
    database
}

#[tokio::test]
async fn a_migration_waits_for_a_lock_for_a_while_and_holds_nobody_up_meanwhile() {
    let database = with_orders().await;
    let superuser = database.superuser().await;
    let app = database.app().await;
    app.batch_execute("begin; select from orders").await.unwrap();
    database.write_migration("002.sql", "alter table orders add column total bigint;");
    let run = database.start_set_up();
    until(&superuser, WAITS).await;
    // stands behind the migration until that gives way
    superuser.batch_execute("select from orders").await.unwrap();
    app.batch_execute("commit").await.unwrap();
    let output = run.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && log.contains("trying again"), "{log}");
    assert_eq!(count(&superuser, "weft.migration").await, 2);
}

#[tokio::test]
async fn a_lock_that_is_never_given_up_is_said_with_its_holder() {
    let database = with_orders().await;
    let app = database.app().await;
    app.batch_execute("set application_name = 'a long report'; begin; select from orders").await.unwrap();
    let process: i32 = app.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
    database.write_migration("002_total.sql", "alter table orders add column total bigint;");
    let sentence = database.set_up_given_up();
    let beginning = format!(
        "migration 002_total.sql waits for a lock: process {process} (role app, 'a long report'), whose transaction is open since "
    );
    assert!(sentence.starts_with(&beginning) && sentence.contains("holds the table public.orders"), "{sentence}");
    app.batch_execute("commit").await.unwrap();
    database.set_up_well();
}

#[tokio::test]
async fn a_migration_may_say_how_long_it_waits_for_a_lock() {
    let database = with_orders().await;
    let superuser = database.superuser().await;
    let app = database.app().await;
    app.batch_execute("begin; select from orders").await.unwrap();
    database.write_migration("002.sql", "set local lock_timeout = '1min'; alter table orders add column total bigint;");
    let run = database.start_set_up();
    until(&superuser, WAITS).await;
    let long = "select now() - query_start > '6 s' from pg_stat_activity where application_name = 'weft database setup' and wait_event_type = 'Lock'";
    until(&superuser, &format!("select coalesce(bool_or(long), false) from ({long}) as w (long)")).await;
    app.batch_execute("commit").await.unwrap();
    let output = run.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !log.contains("trying again"), "{log}");
}

#[tokio::test]
async fn a_changed_migration_is_refused_by_name() {
    let database = Database::empty().await;
    database.write_migration("001_orders.sql", "create table orders (id int);");
    database.set_up_well();
    database.write_migration("001_orders.sql", "create table orders (id bigint);");
    let sentence = database.set_up_refused();
    assert!(sentence.starts_with("migration 001_orders.sql was changed after it was applied"), "{sentence}");
}

#[tokio::test]
async fn a_new_migration_before_the_last_one_is_refused() {
    let database = Database::empty().await;
    database.write_migration("002.sql", "select 2;");
    database.set_up_well();
    database.write_migration("001.sql", "select 1;");
    let sentence = database.set_up_refused();
    assert_eq!(
        sentence,
        "migration 001.sql comes before 002.sql, which is applied already; give it a name that sorts after 002.sql"
    );
}

#[tokio::test]
async fn a_failing_migration_leaves_the_earlier_ones_and_says_where() {
    let database = Database::empty().await;
    database.write_migration("001.sql", "create table orders (id int);");
    database.write_migration(
        "002_add_limit.sql",
        "create table gone (id int);\n\nalter table orders drop column foo;\ninsert into orders values (1);",
    );
    database.write_migration("003.sql", "create table never (id int);");
    let sentence = database.set_up_refused();
    // a utility statement's error has no position
    assert_eq!(
        sentence,
        r#"migration 002_add_limit.sql failed: column "foo" of relation "orders" does not exist (42703); it was rolled back, correct the file"#
    );
    database.write_migration("002_add_limit.sql", "create table gone (id int);\n\nselect foo\nfrom orders;");
    let sentence = database.set_up_refused();
    assert_eq!(
        sentence,
        r#"migration 002_add_limit.sql failed at line 3: column "foo" does not exist (42703); it was rolled back, correct the file"#
    );
    let superuser = database.superuser().await;
    assert_eq!(count(&superuser, "weft.migration").await, 1);
    let row = superuser.query_one(
        "select to_regclass('orders') is not null, to_regclass('gone') is null, to_regclass('never') is null",
        &[],
    );
    let row = row.await.unwrap();
    assert_eq!((row.get(0), row.get(1), row.get(2)), (true, true, true));

    database.write_migration("002_add_limit.sql", "create table gone (id int);");
    let outcome = database.set_up_outcome();
    assert_eq!((outcome.files, outcome.applied, outcome.last.as_deref()), (3, 2, Some("003.sql")));
    assert_eq!(count(&superuser, "weft.migration").await, 3);
    let again = database.set_up_outcome();
    assert_eq!(again, Outcome { applied: 0, ..outcome }, "the proof is in the database");
}

#[tokio::test]
async fn a_failing_migration_does_not_quote_rows() {
    let database = Database::empty().await;
    database.write_migration(
        "001.sql",
        "create table cards (number text); insert into cards values ('4111-1111'), ('4111-1111');",
    );
    database.set_up_well();
    database.write_migration("002.sql", "alter table cards alter column number type bigint using number::bigint;");
    let output = database.set_up();
    assert_eq!(output.status.code(), Some(65));
    assert!(!String::from_utf8_lossy(&output.stderr).contains("4111"), "a value of class 22 is cut off");
    database.write_migration("002.sql", "alter table cards add unique (number);");
    let output = database.set_up();
    assert_eq!(output.status.code(), Some(65));
    assert!(!String::from_utf8_lossy(&output.stderr).contains("4111"), "DETAIL is left out");
}

#[tokio::test]
async fn a_migration_that_copies_from_its_client_is_refused() {
    let database = Database::empty().await;
    database.write_migration("001.sql", "create table c (id int);\ncopy c from stdin;\n1\n\\.\n");
    let sentence = database.set_up_refused();
    assert!(sentence.starts_with("migration 001.sql"), "{sentence}");
}

#[tokio::test]
async fn what_a_migration_sets_does_not_reach_the_next() {
    let database = Database::empty().await;
    // what pg_dump writes at its top
    database.write_migration(
        "001.sql",
        "select pg_catalog.set_config('search_path', '', false); set lock_timeout = 0;\n create table public.a (id int);",
    );
    database.write_migration("002.sql", "create table b (id int);");
    database.set_up_well();
    let superuser = database.superuser().await;
    let owner = superuser.query_one("select tableowner from pg_tables where tablename = 'b'", &[]).await.unwrap();
    assert_eq!(owner.get::<_, &str>(0), "owner");
}

#[tokio::test]
async fn the_app_can_use_what_migrations_make_and_nothing_more() {
    let database = Database::empty().await;
    database.write_migration(
        "001.sql",
        "create table orders (id bigint generated always as identity, state text);
         create schema reports; create table reports.daily (day date, n int);
         create function twice(n int) returns int language sql as 'select n * 2';",
    );
    database.set_up_well();
    let app = database.app().await;
    app.batch_execute(
        "insert into orders (state) values ('new'); update orders set state = 'old'; select twice(2); delete from orders;
         insert into reports.daily values (now(), 1);
         select setval('orders_id_seq', 7), lastval(); truncate orders;
         insert into outbox (aggregate_type, aggregate_id, type, payload) values ('order', '1', 'OrderCreated', '{}') returning id;
         select receive('me', 's', '1'); begin; select enter('s', 'a', 'do'), remember('s', 'a', 'do', '{}'), refuse('s', 'b', 'No', 'd'); commit;",
    )
    .await
    .unwrap();
    for sql in [
        "select * from weft.relay_ledger",
        "insert into weft.relay_ledger (relay, system, timeline) values ('x', '1', 1)",
        "update weft.relay_wake set asleep = true",
        "delete from weft.outbox",
        "update weft.outbox set type = 'x'",
        "insert into weft.outbox (aggregate_type, aggregate_id, type, payload, txid) values ('order', '1', 'x', '{}', '3')",
        "select * from weft.saga_barrier",
        "delete from weft.inbox",
        "select * from weft.migration",
        "drop table orders",
        "truncate orders restart identity",
        "create trigger mine before insert on orders for each row execute function suppress_redundant_updates_trigger()",
        "create table mine (id int)",
        "create table weft.mine (id int)",
        "set role owner",
        "set role postgres",
        "create role another",
        "copy orders to program 'cat'",
    ] {
        denied(&app, sql).await;
    }
    let relay = database.relay().await;
    relay.batch_execute("select * from weft.outbox; delete from weft.outbox; insert into weft.relay_ledger (relay, system, timeline) values ('r', '1', 1)").await.unwrap();
    denied(&relay, "select * from public.orders").await;
    // a dead letter that is retried is a new row, whose place the relay cannot choose either
    for sql in [
        "insert into weft.outbox (aggregate_type, aggregate_id, type, payload, txid) values ('order', '1', 'x', '{}', '3')",
        "update weft.outbox set type = 'x'",
        "update weft.relay_dead set cause = 'x'",
        "delete from weft.relay_published",
        "truncate weft.outbox",
    ] {
        denied(&relay, sql).await;
    }
    for sql in ["select * from weft.relay_dead", "select * from weft.relay_published"] {
        denied(&app, sql).await;
    }
}

#[tokio::test]
async fn a_role_of_another_database_cannot_connect() {
    let database = Database::ready().await;
    let superuser = database.superuser().await;
    superuser.batch_execute("create role stranger login password 'stranger'").await.unwrap();
    let error = database.try_login("stranger", "stranger").await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{error:?}");
    let error = database.try_login("owner", "").await.unwrap_err();
    assert!(error.code().is_some(), "the owner cannot log in: {error:?}");
}

#[tokio::test]
async fn a_new_password_is_taken_by_the_next_run_and_the_clear_one_is_nowhere() {
    let database = Database::on(servers::Postgres::start_with(&["log_statement=all"]), Purpose::Service).await;
    database.set_up_well();
    database.set_password("app", "brand-new-secret");
    let output = database.set_up();
    assert!(output.status.success());
    database.try_login("app", "brand-new-secret").await.unwrap();
    let error = database.try_login("app", APP_PASSWORD).await.unwrap_err();
    assert_eq!(error.code(), Some(&SqlState::INVALID_PASSWORD));
    let log = database.server.log() + &String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("SCRAM-SHA-256$"), "the server logs statements");
    for clear in [APP_PASSWORD, RELAY_PASSWORD, "brand-new-secret"] {
        assert!(!log.contains(clear) && !log.contains(&clear.replace('\'', "''")), "{clear} is in a log");
    }
}

#[tokio::test]
async fn a_wrong_superuser_password_is_said_at_once() {
    let database = Database::empty().await;
    database.set_password("postgres", "wrong");
    let sentence = database.set_up_refused();
    assert!(sentence.contains("does not let role postgres in: password authentication failed"), "{sentence}");
    assert!(!sentence.contains("wrong"));
}

#[tokio::test]
async fn a_set_up_ends_when_it_is_asked_to() {
    let mut database = Database::empty().await;
    database.server.kill9();
    let run = database.start_set_up();
    let term = || std::process::Command::new("kill").args(["-TERM", &run.id().to_string()]).status().unwrap();
    servers::until("the program handles SIGTERM", async || {
        let status = fs::read_to_string(format!("/proc/{}/status", run.id())).unwrap();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap();
        u64::from_str_radix(caught.trim(), 16).unwrap() & (1 << 14) != 0
    })
    .await;
    assert!(term().success());
    let output = run.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn an_orchestrators_database_has_an_app_and_no_outbox() {
    let database = Database::with_purpose(Purpose::Orchestrator).await;
    database.set_up_well();
    database.set_up_well();
    let superuser = database.superuser().await;
    let row = superuser.query_one("select to_regclass('weft.outbox') is null, current_database()", &[]).await.unwrap();
    assert_eq!((row.get::<_, bool>(0), row.get::<_, &str>(1)), (true, DATABASE));
    database.app().await;
}
