//! Migrations that are executed without a transaction.

use crate::database::{Database, until};

const INDEX: &str =
    "-- weft: no transaction\ncreate unique index concurrently if not exists orders_by_number on orders (number)";
const VALID: &str =
    "select coalesce((select indisvalid from pg_index where indexrelid = to_regclass('orders_by_number')), false)";

async fn with_orders(rows: &str) -> Database {
    let database = Database::empty().await;
    let table = format!("create table orders (number int); insert into orders {rows};");
    database.write_migration("001.sql", &table);
    database.set_up_well();
    database
}

async fn is(client: &tokio_postgres::Client, question: &str) -> bool {
    client.query_one(question, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn an_index_is_created_concurrently_by_the_owner_and_recorded() {
    let database = with_orders("values (1), (2)").await;
    database.write_migration("002.sql", INDEX);
    database.write_migration("003.sql", "-- weft: no transaction\nvacuum analyze orders;");
    database.write_migration(
        "004.sql",
        "create procedure backfill() language plpgsql as $$ begin
            insert into orders values (3); commit; insert into orders values (4); commit; end $$;",
    );
    database.write_migration("005.sql", "-- weft: no transaction\ncall backfill()");
    database.write_migration("006.sql", "create table later (id int)");
    database.set_up_well();
    let superuser = database.superuser().await;
    assert!(is(&superuser, VALID).await);
    assert!(is(&superuser, "select array_agg(name order by name) = array['001.sql', '002.sql', '003.sql', '004.sql', '005.sql', '006.sql'] from weft.migration").await);
    assert!(is(&superuser, "select array_agg(number order by number) = array[1, 2, 3, 4] from orders").await);
    let owner = "select relowner = 'owner'::regrole from pg_class where relname = 'orders_by_number'";
    assert!(is(&superuser, owner).await);
    database.set_up_well();
}

#[tokio::test]
async fn what_a_failure_left_invalid_is_dropped_and_the_corrected_file_is_applied() {
    let database = with_orders("values (1), (1)").await;
    database.write_migration("002.sql", INDEX);
    let sentence = database.set_up_refused();
    assert!(sentence.contains("002.sql failed") && sentence.contains("could not create unique index"), "{sentence}");
    assert!(sentence.contains("no transaction that could be rolled back"), "{sentence}");
    assert!(!sentence.contains("(1)"), "a row is quoted: {sentence}");
    let superuser = database.superuser().await;
    assert!(is(&superuser, "select to_regclass('orders_by_number') is null").await, "the invalid index is left");
    superuser.batch_execute("delete from orders where ctid = (select min(ctid) from orders)").await.unwrap();
    database.write_migration("002.sql", &format!("{INDEX};"));
    database.set_up_well();
    assert!(is(&superuser, VALID).await);
}

#[tokio::test]
async fn one_that_is_killed_while_it_waits_for_an_old_transaction_is_finished_by_the_next() {
    let database = with_orders("values (1)").await;
    database.write_migration("002.sql", INDEX);
    let (old, superuser) = (database.superuser().await, database.superuser().await);
    old.batch_execute("begin; insert into orders values (2)").await.unwrap();
    let mut run = database.start_set_up();
    until(&superuser, "select exists (select from pg_locks where locktype = 'virtualxid' and not granted)").await;
    run.kill().unwrap();
    run.wait().unwrap();
    let next = database.start_set_up();
    // it waits for the server's process of the one that was killed, if that is still there, and then for the transaction
    until(
        &superuser,
        "select exists (select from pg_locks l join pg_stat_activity a using (pid)
                         where l.locktype = 'virtualxid' and not l.granted and a.query like '%orders_by_number%')",
    )
    .await;
    assert!(!is(&superuser, VALID).await);
    old.batch_execute("commit").await.unwrap();
    let output = next.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(is(&superuser, VALID).await);
}

#[tokio::test]
async fn what_cannot_be_executed_so_is_refused_with_a_remedy() {
    let database = with_orders("values (1)").await;
    for (file, words) in [
        (
            "create index concurrently if not exists a on orders (number)",
            "whose first line is `-- weft: no transaction`",
        ),
        ("-- weft: no transaction\nselect 1; select 2", "more than one statement"),
        ("-- weft: no transaction\ncreate index concurrently a on orders (number)", "write `if not exists`"),
        ("select 1;\n-- weft: no transaction", "make it the first line"),
        ("-- weft: no transaction\ncreate role stranger", "permission denied to create role"),
        ("-- weft: no transaction\ninsert into weft.migration values ('x', 'y')", "permission denied"),
    ] {
        database.write_migration("002.sql", file);
        let sentence = database.set_up_refused();
        assert!(sentence.contains("002.sql") && sentence.contains(words), "{file}: {sentence}");
    }
}
