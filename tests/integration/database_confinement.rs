//! What a migration may do: what the owner may, and nothing more. Nothing in a file leaves its session.

use tokio_postgres::Client;

use crate::database::{DATABASE, Database};

const MIGRATOR: &str = "weft_migrator_orders";

async fn text(client: &Client, query: &str) -> String {
    client.query_one(query, &[]).await.unwrap().get(0)
}

/// Roles, what each may, of which others it is a member, and settings of the server: all that a file might have changed.
const SERVER: &str = "
    select string_agg(line, e'\\n' order by line) from (
        select to_jsonb(r)::text from pg_roles as r where rolname !~ '^pg_'
        union all select format('%s in %s', member::regrole, roleid::regrole) from pg_auth_members
        union all select format('%s owns database %s: %s', datdba::regrole, datname, datacl) from pg_database
        union all select format('%s is a setting of %s in %s', setconfig, setrole, setdatabase) from pg_db_role_setting
        union all select format('password of %s: %s', rolname, rolpassword is not null) from pg_authid
    ) as lines (line)";

/// Weft's own objects in the database.
const OBJECTS: &str = "
    select string_agg(line, e'\\n' order by line) from (
        select format('%s %s %s %s', oid, relname, relowner::regrole, relacl) from pg_class where relnamespace = 'weft'::regnamespace
        union all select format('%s %s %s', oid::regprocedure, md5(prosrc), proacl) from pg_proc where pronamespace = 'weft'::regnamespace
        union all select format('%s %s %s', p.pubname, p.pubowner::regrole, t.tablename) from pg_publication as p join pg_publication_tables as t using (pubname)
        union all select format('event trigger %s', evtname) from pg_event_trigger
        union all select format('%s of %s', tgname, tgrelid::regclass) from pg_trigger where tgrelid::regclass::text ~ '^weft'
        union all select format('migration %s', name) from weft.migration
    ) as lines (line)";

const OUT_OF_BOUNDS: [&str; 46] = [
    "reset role; create role intruder;",
    "set role none; create role intruder superuser;",
    "set role none; alter role owner login superuser;",
    "reset session authorization; alter role app superuser;",
    "set session authorization default; set role none; alter role app superuser;",
    "set session authorization postgres; alter role app superuser;",
    "discard all; alter role app superuser;",
    "alter role owner login superuser;",
    "alter role owner createrole;",
    "alter role owner replication;",
    "alter role weft_migrator_orders superuser;",
    "set role none; alter role weft_migrator_orders login;",
    "set role none; alter role weft_migrator_orders valid until 'infinity';",
    "set role none; create table public.b (id int);",
    "set role none; create temporary table b (id int);",
    "set role postgres;",
    "set role relay;",
    "set role pg_write_server_files;",
    "grant owner to app;",
    "set role none; grant owner to app;",
    "grant pg_execute_server_program to owner;",
    "alter system set log_statement = 'all';",
    "set session_replication_role = replica;",
    "set log_statement = 'all';",
    "alter database orders set search_path = x;",
    "alter database orders owner to owner;",
    "create database intruder;",
    "copy (select 1) to program 'true';",
    "copy (select 1) to '/tmp/weft-intruder';",
    "select pg_read_file('/etc/passwd');",
    "create function f() returns event_trigger language plpgsql as 'begin end'; create event trigger e on ddl_command_end execute function f();",
    "create function f() returns int language sql security definer as 'select 1'; alter function f() owner to postgres;",
    "create table b (id int); alter table b owner to app;",
    "create publication everything for all tables;",
    "drop table weft.outbox;",
    "alter table weft.outbox add column x int;",
    "create trigger t after insert on weft.outbox execute function suppress_redundant_updates_trigger();",
    "drop schema weft cascade;",
    "create table weft.b (id int);",
    "drop function weft.receive(text, text, text, text, text);",
    "alter publication weft_outbox drop table weft.outbox;",
    "drop publication weft_outbox;",
    "insert into weft.migration (name, sha256) values ('999.sql', 'x');",
    "select token from weft.migration_attempt;",
    "delete from weft.migration_attempt;",
    "create language c2 handler plpgsql_call_handler;",
];

#[tokio::test]
async fn nothing_in_a_file_does_more_than_the_owner_may() {
    let database = Database::ready().await;
    let superuser = database.superuser().await;
    let before = (text(&superuser, SERVER).await, text(&superuser, OBJECTS).await);
    for sql in OUT_OF_BOUNDS {
        database.write_migration("001_out.sql", &format!("create table a (id int);\n{sql}"));
        println!("{sql}");
        let sentence = database.set_up_refused();
        let is_refused = sentence.starts_with("migration 001_out.sql failed") || sentence.contains("in a transaction");
        assert!(is_refused, "{sql}: {sentence}");
        assert_eq!((text(&superuser, SERVER).await, text(&superuser, OBJECTS).await), before, "{sql}");
        // nor without a transaction
        database.write_migration("001_out.sql", &format!("-- weft: no transaction\n{sql}"));
        let sentence = database.set_up_refused();
        assert!(sentence.starts_with("migration 001_out.sql"), "{sql}: {sentence}");
        assert_eq!((text(&superuser, SERVER).await, text(&superuser, OBJECTS).await), before, "{sql}");
    }
    let left = "select count(*)::text from pg_class where relnamespace = 'public'::regnamespace";
    assert_eq!(text(&superuser, left).await, "0", "every file was rolled back");
}

#[tokio::test]
async fn a_file_that_ends_its_transaction_is_refused_and_leaves_nothing() {
    let database = Database::ready().await;
    let superuser = database.superuser().await;
    let before = text(&superuser, SERVER).await;
    for sql in [
        "commit; alter role app superuser;",
        "create table a (id int); commit; create table b (id int);",
        "begin; create table a (id int); commit;",
        "create table a (id int); end; select 1;",
        "create table a (id int); commit and chain; create table b (id int);",
        "create table a (id int); rollback; create table b (id int);",
        "create table a (id int); abort;",
        "create table a (id int); set constraints all immediate;",
    ] {
        database.write_migration("001_end.sql", sql);
        let sentence = database.set_up_refused();
        assert!(sentence.starts_with("migration 001_end.sql ends its transaction itself"), "{sql}: {sentence}");
        let left = "select count(*)::text from pg_class where relnamespace = 'public'::regnamespace";
        assert_eq!(text(&superuser, left).await, "0", "{sql}");
        assert_eq!(text(&superuser, "select count(*)::text from weft.migration").await, "0", "{sql}");
    }
    // whoever goes out of his way can commit, and has gained nothing but what the owner may
    database.write_migration("001_end.sql", "rollback; begin read write; create table a (id int); commit; select 1;");
    assert!(database.set_up_refused().contains("001_end.sql"));
    assert_eq!(text(&superuser, SERVER).await, before);
    assert_eq!(text(&superuser, "select tableowner::text from pg_tables where tablename = 'a'").await, "owner");
}

#[tokio::test]
async fn every_way_back_is_to_the_owner() {
    let database = Database::ready().await;
    for (number, back) in
        ["reset role", "reset session authorization", "set role none; reset role", "reset all"].iter().enumerate()
    {
        database.write_migration(
            &format!("00{number}.sql"),
            &format!("create table a{number} (id int); {back}; create table public.b{number} as select current_user::text as now, session_user::text as login;"),
        );
    }
    database.set_up_well();
    let superuser = database.superuser().await;
    let owners =
        "select string_agg(distinct tableowner::text, ',') || count(*) from pg_tables where schemaname = 'public'";
    assert_eq!(text(&superuser, owners).await, "owner8");
    for number in 0..4 {
        let roles = text(&superuser, &format!("select now || ' ' || login from b{number}")).await;
        assert_eq!(roles, format!("owner {MIGRATOR}"));
    }
}

#[tokio::test]
async fn what_would_not_belong_to_the_owner_is_refused_by_name() {
    let database = Database::ready().await;
    database.write_migration("001_blob.sql", "set role none; select lo_create(4711);");
    let sentence = database.set_up_refused();
    let expected = "migration 001_blob.sql leaves large object 4711 to the login that executes it, not to the owner";
    assert!(sentence.starts_with(expected), "{sentence}");
    let superuser = database.superuser().await;
    assert_eq!(text(&superuser, "select count(*)::text from pg_largeobject_metadata").await, "0");
}

#[tokio::test]
async fn no_login_is_left_behind_that_can_become_the_owner() {
    let database = Database::ready().await;
    let superuser = database.superuser().await;
    let login = format!("select format('%s %s', rolcanlogin, rolpassword) from pg_authid where rolname = '{MIGRATOR}'");
    assert_eq!(text(&superuser, &login).await, "f ");
    // while the file is at work, no more than afterwards
    let own = "set role none; alter role weft_migrator_orders password 'known'; reset role; select pg_sleep(0);";
    database.write_migration("001.sql", own);
    database.set_up_well();
    database.write_migration("002.sql", "select nonsense;");
    database.set_up_refused();
    assert!(text(&superuser, &login).await.starts_with('f'));
    for role in [MIGRATOR, "owner"] {
        let error = database.try_login(role, "known").await.unwrap_err();
        assert!(error.code().is_some(), "{role} is refused: {error:?}");
    }
    database.write_migration("002.sql", "select 1;");
    database.set_up_well();
    assert_eq!(text(&superuser, &login).await, "f ");
}

#[tokio::test]
async fn roles_that_became_too_powerful_are_brought_back() {
    let database = Database::ready().await;
    let superuser = database.superuser().await;
    let before = text(&superuser, SERVER).await;
    let more = format!(
        "alter role owner login superuser createrole createdb replication bypassrls password 'x';
         alter role app superuser replication bypassrls;
         alter role relay createrole;
         alter role {MIGRATOR} login superuser inherit password 'x';
         alter role {MIGRATOR} set search_path = 'elsewhere';
         alter role {MIGRATOR} in database {DATABASE} set role = none;
         grant pg_execute_server_program to app; grant pg_read_all_data to relay; grant pg_write_server_files to owner;
         grant owner to app with admin option; grant relay to {MIGRATOR}; grant {MIGRATOR} to app;
         grant owner to {MIGRATOR} with admin option;
         set role app; grant owner to relay; reset role;"
    );
    superuser.batch_execute(&more).await.unwrap();
    assert_ne!(text(&superuser, SERVER).await, before);
    database.set_up_well();
    assert_eq!(text(&superuser, SERVER).await, before);
    let options = "select bool_or(admin_option)::text from pg_auth_members where member::regrole::text !~ '^pg_'";
    assert_eq!(text(&superuser, options).await, "false");
}
