//! Events in tables of the team's own: what is published of them, and how set-ups make, replace and drop the trigger.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::Deserialize;
use tokio_postgres::Client;
use weft::{
    api::v1alpha1::{Microservice, OutboxRelay},
    contract::{Contract, database_setup::DatabaseSetup, outbox::Outbox, relay::Mode},
    controllers::{
        kinds::microservice,
        resources::{
            child::Child,
            labels::CONTRACT_ANNOTATION,
            observed::{Migrations, Workload},
        },
        runtime::driver::Kind,
    },
};

use crate::{
    database::Database,
    relay_harness::Setting,
    servers::{self, SUPERUSER, SUPERUSER_PASSWORD},
    settings::settings,
};

const TABLES: &str = r#"
create type kind as enum ('Created', 'Paid');
create domain aggregate as varchar(255);
create table outbox (
    id uuid primary key, aggregatetype aggregate not null, aggregateid varchar(255) not null, type kind not null,
    payload jsonb, tenant text, attempt integer, dry boolean, "happenedAt" timestamptz, note text
);
create table "Out Box" (
    id bigint not null, aggregatetype text not null, aggregateid text not null, type text not null, payload bytea,
    region text not null
) partition by list (region);
create table "Out Box: eu" partition of "Out Box" for values in ('eu');
create schema eventuate;
create table eventuate.message (
    id varchar(767) primary key, destination varchar(1000) not null, headers varchar(1000) not null,
    payload text not null, published smallint default 0, message_partition smallint, creation_time bigint
);
create schema sales;
create table sales."the ""outbox""" (
    "No" bigint generated always as identity primary key, "order" text, what text not null, data text, meta text,
    media text, at timestamp
);
"#;

fn outbox(contract: &str) -> Outbox {
    serde_yaml::from_str(contract).unwrap()
}

fn debezium(rest: &str) -> Outbox {
    outbox(&format!("{{layout: Debezium, table: {{schema: public, {rest}}}}}"))
}

fn custom(existing: &str) -> Outbox {
    outbox(&format!(
        r#"{{layout: Custom, table: {{schema: sales, name: 'the "outbox"', existing: {existing}}},
            columns: {{id: No, aggregateType: {{value: order}}, aggregateId: order, type: what, payload: data,
                headers: meta, contentType: media, createdAt: at}}}}"#
    ))
}

/// Has the set-up run with this layout.
fn follow(database: &mut Database, outbox: Outbox) {
    database.setup.outbox = Some(outbox);
    database.write_contract();
    database.set_up_well();
}

type Headers = Vec<(&'static str, &'static str)>;

/// What is inserted into a table, and the messages that it becomes: for each its body and headers.
struct Case {
    layout: Outbox,
    insert: &'static str,
    messages: Vec<(&'static [u8], Headers)>,
}

fn cases() -> [Case; 4] {
    [
        Case {
            layout: debezium("name: outbox, existing: Skip"),
            insert: r#"insert into outbox values
                ('8b6f2c1e-0d4a-4d83-9a43-9a4a8b6f2c1e', 'order', 'o 1', 'Created', '{"n": 1}', 'acme', 3, true,
                 '2026-01-02 03:04:05.5+02', null),
                ('8b6f2c1e-0d4a-4d83-9a43-9a4a8b6f2c1f', 'order', 'o 1', 'Paid', null, null, null, null, null,
                 null)"#,
            messages: vec![
                (
                    br#"{"n": 1}"#,
                    vec![
                        ("ce-id", "8b6f2c1e-0d4a-4d83-9a43-9a4a8b6f2c1e"),
                        ("ce-type", "Created"),
                        ("ce-subject", "o%201"),
                        ("ce-partitionkey", "order/o%201"),
                        ("ce-datacontenttype", "application/json"),
                        ("ce-tenant", "acme"),
                        ("ce-attempt", "3"),
                        ("ce-dry", "true"),
                        ("ce-happenedat", "2026-01-02T01:04:05.5+00:00"),
                        ("ce-note", ""),
                    ],
                ),
                (b"", vec![("ce-type", "Paid"), ("ce-tenant", ""), ("ce-partitionkey", "order/o%201")]),
            ],
        },
        Case {
            layout: debezium("name: Out Box, contentType: application/avro, existing: Skip"),
            insert: r#"insert into "Out Box" values (1, 'order', '1', 'Created', '\x00ff7b', 'eu');
                insert into "Out Box: eu" values (2, 'order', '1', 'Paid', '\x', 'eu')"#,
            messages: vec![
                (
                    b"\x00\xff\x7b",
                    vec![("ce-id", "1"), ("ce-datacontenttype", "application/avro"), ("ce-region", "eu")],
                ),
                (b"", vec![("ce-id", "2"), ("ce-datacontenttype", "application/avro"), ("ce-type", "Paid")]),
            ],
        },
        Case {
            layout: outbox("{layout: Eventuate, table: {schema: eventuate, name: message, existing: Skip}}"),
            insert: r#"insert into eventuate.message (id, destination, headers, payload, creation_time) values
                ('m-1', 'shop.Order', '{"event-aggregate-type": "shop.Order", "event-aggregate-id": "7",
                  "event-type": "shop.OrderCreated", "PARTITION_ID": "7", "X-Tenant": "acme"}', '{"n":  1}', 1767225600000),
                ('m-2', 'commands', '{"PARTITION_ID": "8"}', '{}', 9223372036854775807),
                ('m-3', 'replies', 'no JSON', 'ok', null)"#,
            messages: vec![
                (
                    br#"{"n":  1}"#,
                    vec![
                        ("ce-id", "m-1"),
                        ("ce-type", "shop.OrderCreated"),
                        ("ce-partitionkey", "shop.Order/7"),
                        ("ce-time", "2026-01-01T00:00:00Z"),
                        ("ce-xtenant", "acme"),
                        ("ce-datacontenttype", "application/json"),
                    ],
                ),
                (b"{}", vec![("ce-id", "m-2"), ("ce-type", "commands"), ("ce-partitionkey", "commands/8")]),
                (b"ok", vec![("ce-type", "replies"), ("ce-subject", ""), ("ce-datacontenttype", "text/plain")]),
            ],
        },
        Case {
            layout: custom("Skip"),
            insert: r#"insert into sales."the ""outbox""" ("order", what, data, meta, media, at) values
                ('9', 'Created', '  { "n" : 1 }', '{"correlationId": "c"}', null, '2026-01-02 03:04:05'),
                ('9', 'Noted', e'caf\u00e9\n', '["no object"]', '', null),
                ('9', 'Signed', '<a/>', null, 'application/xml', null)"#,
            messages: vec![
                (
                    br#"  { "n" : 1 }"#,
                    vec![
                        ("ce-id", "1"),
                        ("ce-type", "Created"),
                        ("ce-partitionkey", "order/9"),
                        ("ce-correlationid", "c"),
                        ("ce-time", "2026-01-02T03:04:05Z"),
                        ("ce-datacontenttype", "application/json"),
                    ],
                ),
                ("caf\u{e9}\n".as_bytes(), vec![("ce-id", "2"), ("ce-datacontenttype", "text/plain")]),
                (b"<a/>", vec![("ce-id", "3"), ("ce-datacontenttype", "application/xml")]),
            ],
        },
    ]
}

#[tokio::test]
async fn events_in_a_table_of_the_teams_are_published_in_both_modes() {
    for mode in [Mode::LogTailing, Mode::Polling] {
        let database = Database::empty().await;
        database.write_migration("002_outboxes.sql", TABLES);
        let mut setting = Setting::with(mode, database);
        let relay = setting.start_relay();
        relay.until("leading", |status| status.leading && status.ready).await;
        let app = setting.database.app().await;
        // whatever a session sets must not change an event
        app.batch_execute("set datestyle = 'German'; set timezone = 'Asia/Tokyo'; set bytea_output = 'escape'")
            .await
            .unwrap();
        let mut seen = 0;
        for Case { layout, insert, messages } in cases() {
            follow(&mut setting.database, layout.clone());
            app.batch_execute(insert).await.unwrap();
            setting.drained().await;
            let found = setting.messages().await.split_off(seen);
            seen += found.len();
            assert_eq!(found.len(), messages.len(), "{mode:?} {layout:?}");
            for (found, (body, expected)) in found.iter().zip(messages) {
                assert_eq!(&found.payload[..], body, "{mode:?} {layout:?}");
                let headers = found.headers.as_ref().unwrap();
                for (name, value) in expected {
                    let found = headers.get(name).map_or("", |value| value.as_str());
                    assert_eq!(found, value, "{mode:?} {layout:?}: {name}");
                }
            }
        }
        let marked = "select string_agg(published::text, ' ') from eventuate.message";
        let marked: String = setting.database.superuser().await.query_one(marked, &[]).await.unwrap().get(0);
        assert_eq!(marked, "1 1 1", "as Eventuate's own publisher does");
    }
}

/// Ids in `weft.outbox`, in the order in which they are published.
async fn copied(client: &Client) -> String {
    let ids = "select coalesce(string_agg(id, ' ' order by seq), '') from weft.outbox";
    client.query_one(ids, &[]).await.unwrap().get(0)
}

/// Triggers and functions, and the transactions that wrote them last.
async fn picture(client: &Client) -> String {
    let picture = "select string_agg(what, e'\n' order by what) from (
        select tgrelid::regclass || ' ' || tgname || ' ' || xmin from pg_trigger where tgname like 'weft\\_outbox%'
        union all select proname || ' ' || xmin from pg_proc where pronamespace = 'weft'::regnamespace) as all_of (what)";
    client.query_one(picture, &[]).await.unwrap().get::<_, Option<String>>(0).unwrap()
}

const ORDERS: &str =
    "create table orders (id text primary key, aggregatetype text, aggregateid text, type text, payload json)";

#[tokio::test]
async fn a_row_is_an_event_exactly_when_it_is_committed() {
    let mut database = Database::empty().await;
    database.write_migration("001.sql", ORDERS);
    database.write_migration(
        "002.sql",
        "insert into orders select n, 'order', '1', 'T', '{}' from generate_series(1, 3) as n",
    );
    follow(&mut database, debezium("name: orders, existing: Skip"));
    let (app, superuser) = (database.app().await, database.superuser().await);
    assert_eq!(copied(&superuser).await, "", "what was there is left");
    let row = |id: &str| format!("insert into orders values ('{id}', 'order', '1', 'T', '{{}}')");
    app.batch_execute(&row("4")).await.unwrap();
    app.batch_execute(&format!("begin; {}; rollback", row("never"))).await.unwrap();
    app.batch_execute(&format!("{} on conflict do nothing", row("4"))).await.unwrap();
    app.batch_execute(&format!("{} on conflict (id) do update set type = 'U'", row("4"))).await.unwrap();
    let copy = app.copy_in::<_, bytes::Bytes>("copy orders from stdin").await.unwrap();
    let rows = bytes::Bytes::from_static(b"5\torder\t1\tT\t{}\n6\torder\t1\tT\t\\N\n7\t\\N\t\\N\t\\N\t{}\n");
    let mut copy = std::pin::pin!(copy);
    futures::SinkExt::send(&mut copy, rows).await.unwrap();
    copy.as_mut().finish().await.unwrap();
    app.batch_execute("delete from orders").await.unwrap();
    assert_eq!(copied(&superuser).await, "4 5 6 7");

    // a set-up that finds everything as it is writes nothing, and waits for nobody
    let before = picture(&superuser).await;
    superuser.batch_execute("begin; lock table orders in access share mode").await.unwrap();
    database.set_up_well();
    assert_eq!(picture(&superuser).await, before);
    superuser.batch_execute("commit").await.unwrap();
    database.write_migration("003.sql", "alter table orders add tenant text");
    database.set_up_well();
    app.batch_execute("insert into orders values ('8', 'order', '1', 'T', '{}', 'acme')").await.unwrap();
    let headers = "select headers ->> 'tenant' from weft.outbox where id = '8'";
    assert_eq!(superuser.query_one(headers, &[]).await.unwrap().get::<_, String>(0), "acme");

    database.write_migration("004.sql", "alter table orders drop tenant");
    database.set_up_well();

    // without a relay the trigger stays; another layout drops it
    database.setup.outbox = None;
    database.write_contract();
    database.set_up_well();
    app.batch_execute(&row("9")).await.unwrap();
    assert!(copied(&superuser).await.ends_with(" 9"));
    follow(&mut database, Outbox::Weft);
    assert!(!picture(&superuser).await.contains("orders"));
    app.batch_execute("insert into orders (id) values ('unseen')").await.unwrap();
    assert!(copied(&superuser).await.ends_with(" 9"));
}

/// Ids in a table of the team's.
async fn ids(client: &Client, table: &str) -> String {
    let ids = format!("select string_agg(id::text, ' ' order by id) from {table}");
    client.query_one(&ids, &[]).await.unwrap().get(0)
}

/// Writes two rows of `orders` in each of its transactions.
struct Writer {
    task: tokio::task::JoinHandle<()>,
    ended: Arc<AtomicBool>,
}

impl Writer {
    fn start(database: &Database) -> Self {
        let url = database.server.url(SUPERUSER, SUPERUSER_PASSWORD, crate::database::DATABASE);
        let ended = Arc::new(AtomicBool::new(false));
        let end = ended.clone();
        let task = tokio::spawn(async move {
            let client = servers::connect(&url).await.unwrap();
            while !end.load(Ordering::Relaxed) {
                let row = "insert into orders (aggregateid) values ('a')";
                client.batch_execute(&format!("begin; {row}; {row}; commit")).await.unwrap();
            }
        });
        Self { task, ended }
    }

    async fn stop(self) {
        self.ended.store(true, Ordering::Relaxed);
        self.task.await.unwrap();
    }
}

#[tokio::test]
async fn rows_that_are_there_are_published_once_while_others_are_written() {
    let mut database = Database::empty().await;
    database.write_migration("001.sql", TABLES);
    database.write_migration("002.sql", &ORDERS.replace("(id text", "(id bigint generated always as identity"));
    // what a team's own code does, it must not do as the superuser
    database.write_migration(
        "003.sql",
        "create function who() returns trigger language plpgsql as $$ begin
             if (select rolsuper from pg_roles where rolname = current_user) then raise 'as the superuser'; end if;
             return new;
         end $$;
         create trigger who before update on eventuate.message for each row execute function who();
         create function cast_kind(kind) returns text language plpgsql as $$ begin
             if (select rolsuper from pg_roles where rolname = current_user) then raise 'as the superuser'; end if;
             return 'cast';
         end $$;
         create cast (kind as text) with function cast_kind(kind) as implicit;
         create function seen(integer) returns boolean immutable language plpgsql as $$ begin
             if (select rolsuper from pg_roles where rolname = current_user) then raise 'as the superuser'; end if;
             return true;
         end $$;
         create index seen on outbox (id) where seen(1)",
    );
    database.set_up_well();
    let (superuser, app) = (database.superuser().await, database.app().await);
    let writer = Writer::start(&database);
    crate::database::until(&superuser, "select count(*) > 20 from orders").await;
    database.setup.outbox = Some(debezium("name: orders, existing: Publish"));
    database.write_contract();
    database.set_up_in_background().await;
    let after: i64 = superuser.query_one("select max(id) from orders", &[]).await.unwrap().get(0);
    crate::database::until(&superuser, &format!("select max(id) > {after} + 20 from orders")).await;
    writer.stop().await;
    assert_eq!(copied(&superuser).await, ids(&superuser, "orders").await, "each once, in order");

    superuser.batch_execute("truncate weft.outbox").await.unwrap();
    let rows = "insert into eventuate.message (id, destination, headers, payload, published, creation_time) values
        ('3', 'd', '{}', '{}', 0, 30), ('1', 'd', '{}', '{}', 1, 10), ('2', 'd', '{}', '{}', 0, 20);
        insert into outbox values (gen_random_uuid(), 'order', '1', 'Paid', '{}')";
    app.batch_execute(rows).await.unwrap();
    follow(&mut database, outbox("{layout: Eventuate, table: {schema: eventuate, name: message, existing: Publish}}"));
    assert_eq!(copied(&superuser).await, "2 3", "those that Eventuate has not published, the oldest first");
    let marked = "select bool_and(published = 1) from eventuate.message";
    assert!(superuser.query_one(marked, &[]).await.unwrap().get::<_, bool>(0));
    // a type of the team's, whose cast is the team's, and an index that the planner reads
    follow(&mut database, debezium("name: outbox, existing: Publish"));
    let kinds = "select string_agg(type, ' ') from weft.outbox where aggregate_type = 'order'";
    assert_eq!(superuser.query_one(kinds, &[]).await.unwrap().get::<_, String>(0), "cast");
    superuser.batch_execute("truncate weft.outbox").await.unwrap();
    app.batch_execute("insert into orders (aggregateid) values ('unseen')").await.unwrap();
    assert_eq!(copied(&superuser).await, "", "orders has no trigger any more");
    follow(&mut database, debezium("name: orders, existing: Skip"));
    app.batch_execute("insert into orders (aggregateid) values ('seen')").await.unwrap();
    assert_eq!(copied(&superuser).await.split(' ').count(), 1);
}

/// The writer waits for the migration, so its next row comes at once after the commit.
#[tokio::test]
async fn a_migration_that_replaces_the_table_misses_no_row() {
    let mut database = Database::empty().await;
    database.write_migration("001.sql", &ORDERS.replace("(id text", "(id bigint generated always as identity"));
    follow(&mut database, debezium("name: orders, existing: Skip"));
    let (superuser, app) = (database.superuser().await, database.app().await);
    app.batch_execute("insert into orders (aggregateid) values ('a')").await.unwrap();
    let replace = "alter table orders rename to former; create table orders (like former including all, tenant text);
        insert into orders (id, aggregateid) overriding system value select id, aggregateid from former;
        select setval(pg_get_serial_sequence('orders', 'id'), max(id)) from orders;";
    database.write_migration("002.sql", replace);
    // whoever waits for it inserts before the set-up has ended
    database.write_migration("003.sql", "select pg_sleep(0.2)");
    let writer = Writer::start(&database);
    crate::database::until(&superuser, "select count(*) > 20 from orders").await;
    database.set_up_in_background().await;
    let after: i64 = superuser.query_one("select max(id) from orders", &[]).await.unwrap().get(0);
    crate::database::until(&superuser, &format!("select max(id) > {after} + 20 from orders")).await;
    writer.stop().await;
    assert_eq!(copied(&superuser).await, ids(&superuser, "orders").await, "each once, in order");
}

#[tokio::test]
async fn the_samples_tables_fit_their_layouts() {
    let mut database = Database::empty().await;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/samples/outboxes");
    for (number, file) in fs::read_dir(folder).unwrap().enumerate() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        let documents =
            serde_yaml::Deserializer::from_str(&text).map(|one| serde_json::Value::deserialize(one).unwrap());
        let [map, service, relay] = <[serde_json::Value; 3]>::try_from(documents.collect::<Vec<_>>()).unwrap();
        let service: Microservice = serde_json::from_value(service).unwrap();
        let relay: OutboxRelay = serde_json::from_value(relay).unwrap();
        for sql in map["data"].as_object().unwrap().values() {
            database.write_migration(&format!("{number}.sql"), sql.as_str().unwrap());
        }
        let mut observed =
            microservice::Observed { relays: vec![Arc::new(relay)], ..microservice::Observed::default() };
        observed.database.server = Some(Workload::default());
        observed.database.migrations = Some(Migrations::Found { hash: String::new(), files: vec!["1.sql".to_owned()] });
        let plan = microservice::Controller::plan(&service, &observed, &settings()).unwrap();
        let contract = plan.children.iter().find_map(|child| match child {
            Child::Job(job) => {
                job.spec.as_ref()?.template.metadata.as_ref()?.annotations.as_ref()?.get(CONTRACT_ANNOTATION)
            }
            _ => None,
        });
        let contract = DatabaseSetup::from_yaml(contract.unwrap(), Path::new("setup.yaml")).unwrap();
        follow(&mut database, contract.outbox.unwrap());
    }
}

#[tokio::test]
async fn all_that_a_table_lacks_is_listed_in_one_sentence() {
    let mut database = Database::empty().await;
    database.write_migration(
        "001.sql",
        "create table orders (id uuid, aggregatetype text[], type text, payload xml); create view seen as select 1 as id",
    );
    let ends = "; change the table in a migration, or correct spec.outbox of the OutboxRelay";
    let cases: BTreeMap<&str, (Outbox, &str)> = [
        (
            "missing",
            (
                custom("Skip"),
                "the outbox layout Custom does not fit the table sales.the \"outbox\": it does not exist, and needs the column No (text, \
                 uuid, a number or an enum), the column order (text, uuid, a number or an enum), the column what (text, uuid, a number \
                 or an enum), the column data (jsonb, json, text or bytea), the column meta (jsonb, json or text), the column media \
                 (text or an enum), the column at (timestamptz, timestamp or bigint (milliseconds since 1970))",
            ),
        ),
        (
            "unfit",
            (
                debezium("name: orders, existing: Publish"),
                "the outbox layout Debezium does not fit the table public.orders: the column aggregatetype is text[] and must be text, \
                 uuid, a number or an enum, the column aggregateid is missing, the column payload is xml and must be jsonb, json, text \
                 or bytea",
            ),
        ),
        (
            "Weft's own",
            (
                outbox("{layout: Debezium, table: {schema: weft, name: outbox, existing: Skip}}"),
                "the outbox layout Debezium does not fit the table weft.outbox: it is Weft's own, which a relay of the layout Weft reads",
            ),
        ),
        (
            "a view",
            (
                debezium("name: seen, existing: Skip"),
                "the outbox layout Debezium does not fit the table public.seen: it is no table, so no trigger can follow its rows",
            ),
        ),
    ]
    .into();
    for (what, (layout, sentence)) in cases {
        database.setup.outbox = Some(layout);
        database.write_contract();
        assert_eq!(database.set_up_refused(), format!("{sentence}{ends}"), "{what}");
    }
    let migrated = "select count(*) from weft.migration";
    assert_eq!(database.superuser().await.query_one(migrated, &[]).await.unwrap().get::<_, i64>(0), 1);
}
