//! The functions that `weft database setup` gives a service: what each answers, and what it makes wait.

use serde_json::{Value, json};
use tokio_postgres::Client;

use weft::contract::database_setup::DuplicateWindow;

use crate::database::{Database, until};

async fn enter(client: &Client, saga: &str, op: &str) -> String {
    answer(client, &format!("select * from weft.enter('{saga}', 'reserve', '{op}')")).await.0
}

/// The outcome and the reply.
async fn answer(client: &Client, call: &str) -> (String, Option<Value>) {
    let row = client.query_one(call, &[]).await.unwrap();
    (row.get(0), row.get(1))
}

async fn receive(client: &Client, message: &str) -> bool {
    client.query_one("select weft.receive('customers', '/shop/orders', $1)", &[&message]).await.unwrap().get(0)
}

const DO_IT: &str = "do it";
const DONE: &str = "done before";
const NOTHING: &str = "nothing to do";
const REFUSED: &str = "refused before";

#[tokio::test]
async fn enter_answers_by_its_truth_table() {
    let database = Database::ready().await;
    let app = database.app().await;
    for (saga, calls) in [
        ("once", &[("do", DO_IT)][..]),
        ("repeated do", &[("do", DO_IT), ("do", DONE), ("redo", DONE)]),
        ("do, undo", &[("do", DO_IT), ("undo", DO_IT)]),
        ("repeated undo", &[("do", DO_IT), ("undo", DO_IT), ("undo", DONE), ("do", DONE), ("undo", DONE)]),
        ("undo without do", &[("undo", NOTHING), ("undo", NOTHING)]),
        ("do after its undo", &[("undo", NOTHING), ("do", REFUSED), ("redo", REFUSED), ("undo", NOTHING)]),
        ("refused", &[("do", DO_IT), ("refuse", REFUSED), ("do", REFUSED), ("undo", NOTHING), ("do", REFUSED)]),
        ("refused at once", &[("refuse", REFUSED), ("refuse", REFUSED), ("undo", NOTHING), ("undo", NOTHING)]),
        ("refused, redone", &[("refuse", REFUSED), ("redo", DO_IT), ("redo", DONE), ("do", DONE), ("undo", DO_IT)]),
        ("refused, undone", &[("refuse", REFUSED), ("undo", NOTHING), ("do", REFUSED)]),
        ("redone alone", &[("redo", DO_IT), ("do", DONE), ("undo", DO_IT)]),
        ("refused after it was done", &[("do", DO_IT), ("commit", ""), ("refuse", DONE), ("undo", DO_IT)]),
        ("refused after its undo", &[("undo", NOTHING), ("refuse", REFUSED), ("undo", NOTHING)]),
    ] {
        app.batch_execute("begin").await.unwrap();
        for (place, &(op, expected)) in calls.iter().enumerate() {
            let outcome = match op {
                "commit" => {
                    app.batch_execute("commit; begin").await.unwrap();
                    continue;
                }
                "refuse" => answer(&app, &format!("select * from weft.refuse('{saga}', 'reserve', 'No', 'd')")).await.0,
                op => enter(&app, saga, op).await,
            };
            assert_eq!(outcome, expected, "{saga}: call {place}, {op}");
        }
        app.batch_execute("commit").await.unwrap();
    }
    let error = app.execute("select weft.enter('s', 'reserve', 'again')", &[]).await.unwrap_err();
    assert!(error.as_db_error().unwrap().message().contains("not do, undo or redo"), "{error:?}");
}

#[tokio::test]
async fn a_rolled_back_do_may_be_done_again_and_is_nothing_to_undo() {
    let database = Database::ready().await;
    let mut app = database.app().await;
    let transaction = app.transaction().await.unwrap();
    assert_eq!(enter(transaction.client(), "s", "do").await, DO_IT);
    transaction.rollback().await.unwrap();
    assert_eq!(enter(&app, "s", "do").await, DO_IT);
    let transaction = app.transaction().await.unwrap();
    assert_eq!(enter(transaction.client(), "t", "do").await, DO_IT);
    transaction.rollback().await.unwrap();
    assert_eq!(enter(&app, "t", "undo").await, NOTHING);
}

/// Runs `second` on a connection of its own while `first` is in an open transaction that it has to wait for; ends that
/// transaction by `end`, and gives the second one's answer.
async fn second_waits<T>(database: &Database, first: &str, second: &str, end: &str) -> T
where
    T: for<'a> tokio_postgres::types::FromSql<'a> + Send + 'static,
{
    let (one, two, superuser) = (database.app().await, database.app().await, database.superuser().await);
    one.batch_execute("begin").await.unwrap();
    one.query_one(first, &[]).await.unwrap();
    let second = second.to_owned();
    let answer = tokio::spawn(async move { two.query_one(&second, &[]).await.unwrap().get(0) });
    until(
        &superuser,
        "select exists (select from pg_stat_activity where usename = 'app' and wait_event_type = 'Lock')",
    )
    .await;
    assert!(!answer.is_finished());
    one.batch_execute(end).await.unwrap();
    answer.await.unwrap()
}

#[tokio::test]
async fn an_undo_waits_for_an_unfinished_do() {
    let database = Database::ready().await;
    let call = |saga: &str, op: &str| match op {
        "refuse" => format!("select outcome from weft.refuse('{saga}', 'reserve', 'No', 'd')"),
        op => format!("select outcome from weft.enter('{saga}', 'reserve', '{op}')"),
    };
    for (saga, first, second, end, expected) in [
        ("a", "do", "undo", "commit", DO_IT),
        ("b", "do", "undo", "rollback", NOTHING),
        ("c", "do", "do", "commit", DONE),
        ("d", "do", "do", "rollback", DO_IT),
        ("e", "undo", "do", "commit", REFUSED),
        ("f", "undo", "do", "rollback", DO_IT),
        ("g", "refuse", "undo", "commit", NOTHING),
        ("h", "refuse", "do", "rollback", DO_IT),
        ("i", "do", "refuse", "commit", DONE),
        ("j", "undo", "undo", "commit", NOTHING),
    ] {
        let answer: String = second_waits(&database, &call(saga, first), &call(saga, second), end).await;
        assert_eq!(answer, expected, "{second} while {first} is open, which ends by {end}");
    }
}

#[tokio::test]
async fn a_message_is_received_once_per_consumer() {
    let database = Database::ready().await;
    let app = database.app().await;
    assert!(receive(&app, "m1").await);
    assert!(!receive(&app, "m1").await);
    assert!(receive(&app, "m2").await);
    let other = app.query_one("select weft.receive('orders', '/shop/orders', 'm1')", &[]).await.unwrap();
    assert!(other.get::<_, bool>(0));
    let call = |message: &str| format!("select weft.receive('customers', '/shop/orders', '{message}')");
    assert!(!second_waits::<bool>(&database, &call("m3"), &call("m3"), "commit").await);
    assert!(second_waits::<bool>(&database, &call("m4"), &call("m4"), "rollback").await);
}

#[tokio::test]
async fn a_reply_is_kept_for_a_repeated_call() {
    let database = Database::ready().await;
    let app = database.app().await;
    let again = "select * from weft.enter('s', 'reserve', 'do')";
    let remember = r#"select weft.remember('s', 'reserve', 'do', '{"status": 201}')"#;
    let error = app.batch_execute(remember).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "55000", "what was not entered is not remembered");
    app.batch_execute("begin").await.unwrap();
    assert_eq!(answer(&app, again).await, (DO_IT.to_owned(), None));
    app.batch_execute(remember).await.unwrap();
    app.batch_execute("commit").await.unwrap();
    assert_eq!(answer(&app, again).await, (DONE.to_owned(), Some(json!({"status": 201}))));
    let error = app.batch_execute(remember).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "55000", "the reply of another transaction stays");
}

#[tokio::test]
async fn a_refusal_is_kept_with_its_code() {
    let database = Database::ready().await;
    let app = database.app().await;
    let refusal = (REFUSED.to_owned(), Some(json!({"code": "NoCredit", "detail": "40 are left"})));
    let refuse = "select * from weft.refuse('s', 'reserve', 'NoCredit', '40 are left')";
    app.batch_execute("begin").await.unwrap();
    assert_eq!(enter(&app, "s", "do").await, DO_IT);
    assert_eq!(answer(&app, refuse).await, refusal);
    app.batch_execute("commit").await.unwrap();
    assert_eq!(answer(&app, "select * from weft.enter('s', 'reserve', 'do')").await, refusal);
    // the first refusal counts, also against a later one
    assert_eq!(answer(&app, "select * from weft.refuse('s', 'reserve', 'Other', 'd')").await, refusal);
    assert_eq!(enter(&app, "t", "undo").await, NOTHING);
    let (outcome, reply) = answer(&app, "select * from weft.enter('t', 'reserve', 'do')").await;
    assert_eq!((outcome.as_str(), &reply.unwrap()["code"]), (REFUSED, &json!("AlreadyUndone")));
}

#[tokio::test]
async fn what_is_older_than_the_duplicate_window_is_purged_by_the_calls_that_follow() {
    let mut database = Database::ready().await;
    let (app, superuser) = (database.app().await, database.superuser().await);
    let count = async |table: &str| -> i64 {
        superuser.query_one(&format!("select count(*) from weft.{table}"), &[]).await.unwrap().get(0)
    };
    let calls = async |round: usize| {
        let receive = format!("select weft.receive('c', 's', '{round} ' || n) from generate_series(1, 200) as n");
        let enter = format!("select weft.enter('{round} ' || n, 'a', 'do') from generate_series(1, 200) as n");
        app.batch_execute(&format!("{receive}; {enter}")).await.unwrap();
    };
    for round in 0..10 {
        calls(round).await;
    }
    assert_eq!((count("inbox").await, count("saga_barrier").await), (2_000, 2_000), "within the window all stays");
    database.setup.duplicate_window = Some(DuplicateWindow { messages_ms: 1, commands_ms: 3_600_000 });
    database.write_contract();
    database.set_up_well();
    for round in 10..40 {
        calls(round).await;
    }
    // each call purges 2.5 rows on average: that 30 rounds leave as many by chance is as good as impossible
    let left = count("inbox").await;
    assert!(left < 4_000, "{left} of 8000");
    assert_eq!(count("saga_barrier").await, 8_000, "each part has its own window");
    let again =
        app.query_one("select weft.receive('c', 's', '0 1'), weft.receive('c', 's', '39 200')", &[]).await.unwrap();
    assert_eq!((again.get::<_, bool>(0), again.get::<_, bool>(1)), (true, false), "the oldest go first");
    database.setup.duplicate_window = Some(DuplicateWindow { messages_ms: 3_600_000, commands_ms: 1 });
    database.write_contract();
    database.set_up_well();
    let received = count("inbox").await;
    for round in 40..70 {
        calls(round).await;
    }
    let left = count("saga_barrier").await;
    assert!(left < 10_000, "{left} of 14000");
    assert_eq!(count("inbox").await, received + 6_000);
}

#[tokio::test]
async fn what_a_transaction_writes_carries_what_it_handles() {
    let database = Database::ready().await;
    let app = database.app().await;
    let written = async |handles: &str| -> Option<Value> {
        let insert = "insert into outbox (aggregate_type, aggregate_id, type, payload) values ('o', '1', 'T', '{}')";
        app.batch_execute(&format!("begin; {handles}; {insert}; commit")).await.unwrap();
        let latest = "select context from weft.outbox order by seq desc limit 1";
        app.query_one(latest, &[]).await.unwrap().get(0)
    };
    let first = "select receive('c', '/shop/orders', '7', null, '00-ab-cd-01')";
    let context = json!({"correlationid": "7", "causationid": "/shop/orders/7", "traceparent": "00-ab-cd-01"});
    assert_eq!(written(first).await, Some(context));
    assert_eq!(written("select 1").await, None, "a transaction's context ends with it");
    let again = written("select receive('c', '/shop/orders', '7', 'x')").await;
    assert_eq!(again, None, "an event that was received before is not what this transaction handles");
    let correlated = json!({"correlationid": "5", "causationid": "/shop/orders/8"});
    assert_eq!(written("select receive('c', '/shop/orders', '8', '5', '')").await, Some(correlated));
    let command = json!({"correlationid": "saga", "causationid": "saga/reserve/do", "traceparent": "00-ab-cd-01"});
    assert_eq!(written("select enter('saga', 'reserve', 'do', '00-ab-cd-01')").await, Some(command));
    let undone = json!({"correlationid": "saga", "causationid": "saga/reserve/undo"});
    assert_eq!(written("select enter('saga', 'reserve', 'undo')").await, Some(undone));
    let error = app.execute(
        "insert into outbox (aggregate_type, aggregate_id, type, payload, context) values ('o', '1', 'T', '{}', '{}')",
        &[],
    );
    assert_eq!(error.await.unwrap_err().code().unwrap().code(), "42501", "the row's own headers are for the service");
}

#[tokio::test]
async fn an_outbox_row_wakes_the_relay_and_carries_its_transaction() {
    let database = Database::ready().await;
    let app = database.app().await;
    let insert = "insert into outbox (aggregate_type, aggregate_id, type, payload)
        select 'order', n::text, 'OrderCreated', '{}' from generate_series(1, 3) as n";
    app.batch_execute(insert).await.unwrap();
    let relay = database.relay().await;
    let row = relay
        .query_one("select count(distinct txid), count(distinct seq), count(*) from weft.outbox", &[])
        .await
        .unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get::<_, i64>(2)), (1, 3, 3));
    let published =
        relay.query_one("select pubinsert and not pubdelete from pg_publication where pubname = 'weft_outbox'", &[]);
    assert!(published.await.unwrap().get::<_, bool>(0));
}

#[tokio::test]
async fn a_relay_is_notified_of_rows_while_it_wants_to_be() {
    use futures::{StreamExt, stream};
    use tokio_postgres::{AsyncMessage, NoTls};

    let database = Database::ready().await;
    let url = database.server.url("relay", "the%20relay's", crate::database::DATABASE);
    let (listener, mut connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
    let mut messages = stream::poll_fn(move |context| connection.poll_message(context)).boxed();
    let notified = tokio::spawn(async move {
        let mut notified = Vec::new();
        while let Some(Ok(message)) = messages.next().await {
            if let AsyncMessage::Notification(notification) = message {
                notified.push(notification.channel().to_owned());
            }
        }
        notified
    });
    listener.batch_execute("listen weft_outbox").await.unwrap();
    let app = database.app().await;
    for wanted in [true, false, false, true] {
        listener.execute("update weft.relay_wake set asleep = $1", &[&wanted]).await.unwrap();
        app.batch_execute(
            "insert into outbox (aggregate_type, aggregate_id, type, payload) values ('order', '1', 'OrderCreated', '{}')",
        )
        .await
        .unwrap();
    }
    // notifications come before the answer to a later question
    listener.batch_execute("select 1").await.unwrap();
    drop(listener);
    assert_eq!(notified.await.unwrap(), ["weft_outbox"; 2]);
}
