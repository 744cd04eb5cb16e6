//! What `weft database setup` does about what cannot pass, about others at work beside it, and about files that it waits for.

use std::{fs, net::TcpListener, time::Instant};

use weft::contract::{Server, database_setup::Purpose};

use crate::{
    database::{DATABASE, Database, address, until},
    servers::Postgres,
};

#[tokio::test]
async fn a_files_own_time_out_is_reported_within_a_minute() {
    let database = Database::empty().await;
    database.write_migration("001.sql", "create table t (id int);");
    database.set_up_well();
    database.write_migration(
        "002.sql",
        "set local statement_timeout='1s'; lock table t in access exclusive mode; select pg_sleep(5);",
    );
    let started = Instant::now();
    let sentence = database.set_up_given_up();
    assert!(started.elapsed().as_secs() < 45, "{:?}", started.elapsed());
    assert_eq!(
        sentence,
        "cannot apply migration 002.sql: canceling statement due to statement timeout (57014); it is tried again, with growing pauses"
    );
}

#[tokio::test]
async fn a_limit_of_the_server_is_reported_with_its_words_and_the_file() {
    let mut database =
        Database::on(Postgres::start_with(&["temp_file_limit=1MB", "work_mem=64kB"]), Purpose::Service).await;
    database.patience = 2;
    database.write_migration(
        "001_big.sql",
        "create table big as select n from generate_series(1, 500000) as n order by -n;",
    );
    let sentence = database.set_up_given_up();
    assert!(sentence.starts_with("cannot apply migration 001_big.sql: temporary file size exceeds"), "{sentence}");
    assert!(sentence.contains("(53400)"), "{sentence}");
}

#[tokio::test]
async fn a_server_without_room_for_a_session_is_reported() {
    let server = Postgres::start_with(&["max_connections=4", "superuser_reserved_connections=3", "max_wal_senders=0"]);
    let mut database = Database::on(server, Purpose::Service).await;
    database.patience = 2;
    database.set_up_well();
    let _only = database.app().await;
    database.write_migration("001.sql", "select 1;");
    let sentence = database.set_up_given_up();
    let expected = "cannot open the session for migrations: ";
    assert!(sentence.starts_with(expected) && sentence.contains("(53300)"), "{sentence}");
}

#[tokio::test]
async fn a_server_that_cannot_be_reached_is_reported_by_name() {
    let mut database = Database::empty().await;
    database.patience = 2;
    database.server.kill9();
    let port = database.server.port();
    let refused = database.set_up_given_up();
    let expected = format!("cannot log in to the database server 127.0.0.1:{port}: ");
    assert!(refused.starts_with(&expected) && refused.contains("Connection refused"), "{refused}");

    // as where a network policy drops packets: nobody ever answers
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    database.setup.admin.server = address(silent.local_addr().unwrap().port(), DATABASE);
    database.write_contract();
    let dropped = database.set_up_given_up();
    assert!(dropped.contains("no answer from 127.0.0.1:") && dropped.contains("network policy"), "{dropped}");

    let host = "no-such-host.invalid".into();
    database.setup.admin.server = Server::Address { host, port: 5432, database: DATABASE.into() };
    database.write_contract();
    let unknown = database.set_up_given_up();
    assert!(unknown.starts_with("cannot log in to the database server no-such-host.invalid:"), "{unknown}");
}

#[tokio::test]
async fn a_lock_is_not_waited_for_for_ever_whatever_the_file_says() {
    let database = Database::empty().await;
    database.write_migration("001.sql", "create table orders (id int);");
    database.set_up_well();
    let app = database.app().await;
    app.batch_execute("set application_name = 'a long report'; begin; select from orders").await.unwrap();
    database.write_migration("002.sql", "set lock_timeout = 0; alter table orders add column total bigint;");
    let started = Instant::now();
    let sentence = database.set_up_given_up();
    assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
    assert!(sentence.starts_with("migration 002.sql waits for a lock: process "), "{sentence}");
    assert!(sentence.contains("'a long report'"), "{sentence}");
    let superuser = database.superuser().await;
    until(
        &superuser,
        "select not exists (select from pg_stat_activity where application_name = 'weft database setup')",
    )
    .await;
}

#[tokio::test]
async fn a_migration_that_works_has_no_limit() {
    let mut database = Database::empty().await;
    database.patience = 1;
    database.write_migration("001.sql", "select pg_sleep(3);");
    database.set_up_well();
}

#[tokio::test]
async fn set_ups_of_one_servers_databases_do_not_fail_each_other() {
    let database = Database::empty().await;
    database.write_migration("001.sql", "create table t (id int);");
    let mut contracts = Vec::new();
    for name in ["one", "two", "three", "four", "five"] {
        contracts.push(database.neighbour(name).await);
    }
    for round in 0..6 {
        if round == 3 {
            // roles are made anew, by all of them at once
            let everything =
                ["one", "two", "three", "four", "five"].map(|name| format!("drop database {name} with (force);"));
            let superuser = database.server.superuser("postgres").await;
            for drop in everything {
                superuser.batch_execute(&drop).await.unwrap();
            }
            let roles = "select string_agg(format('drop role %I', rolname), ';') from pg_roles where rolname ~ '^(owner|app|relay|weft_.*)$'";
            let roles: String = superuser.query_one(roles, &[]).await.unwrap().get(0);
            superuser.batch_execute(&roles).await.unwrap();
            for name in ["one", "two", "three", "four", "five"] {
                database.neighbour(name).await;
            }
        }
        database.write_migration(
            &format!("1{round}.sql"),
            "create table if not exists t2 (id int); insert into t2 values (1);",
        );
        let runs: Vec<_> = contracts.iter().map(|contract| database.start_set_up_of(contract)).collect();
        for run in runs {
            let output = tokio::task::spawn_blocking(|| run.wait_with_output().unwrap()).await.unwrap();
            let log = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && !log.contains("trying again"), "round {round}: {log}");
        }
    }
}

#[tokio::test]
async fn a_set_up_with_nothing_to_do_waits_for_no_table() {
    let mut database = Database::empty().await;
    database.patience = 1;
    database.write_migration("001.sql", "create table orders (id int);");
    database.set_up_well();
    let busy = database.superuser().await;
    busy.batch_execute(
        "begin; lock table orders, weft.outbox, weft.inbox, weft.saga_barrier, weft.relay_ledger, weft.relay_wake in access exclusive mode",
    )
    .await
    .unwrap();
    let output = database.set_up();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !log.contains("trying again"), "{log}");
}

#[tokio::test]
async fn a_file_that_is_asked_for_is_waited_for() {
    let mut database = Database::empty().await;
    database.write_migration("001.sql", "create table orders (id int);");
    database.setup.last_migration = Some("002_total.sql".into());
    database.write_contract();
    database.patience = 1;
    let sentence = database.set_up_given_up();
    let expected = "migrations.last asks for 002_total.sql, which is neither among the mounted migrations (the last one is 001.sql) nor applied";
    assert!(sentence.starts_with(expected), "{sentence}");
    let superuser = database.superuser().await;
    assert!(superuser.query_one("select to_regclass('orders') is null", &[]).await.unwrap().get::<_, bool>(0));

    database.patience = 30;
    let run = database.start_set_up();
    database.write_migration("002_total.sql", "alter table orders add column total bigint;");
    assert!(run.wait_with_output().unwrap().status.success());
    // a team that has squashed its old files
    fs::remove_file(database.migrations().join("002_total.sql")).unwrap();
    assert_eq!(database.set_up_outcome().last.as_deref(), Some("002_total.sql"));
}

#[tokio::test]
async fn a_folder_of_another_tool_is_refused_before_anything_is_applied() {
    let database = Database::empty().await;
    database.write_migration("001.sql", "create table orders (id int);");
    database.write_migration(
        "002.sql",
        "-- migrate:up\ncreate table customers (id int);\n\n-- migrate:down\ndrop table customers;\n",
    );
    let sentence = database.set_up_refused();
    assert!(sentence.starts_with("migration 002.sql has at line 1 `-- migrate:up`, which is for dbmate"), "{sentence}");
    let superuser = database.superuser().await;
    let tables = superuser.query("select from pg_tables where schemaname in ('public', 'weft')", &[]).await.unwrap();
    assert_eq!(tables.len(), 0, "in {DATABASE}");
}
