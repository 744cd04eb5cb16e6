//! The functions that `weft database setup` gives a service: what each answers, and what it makes wait.

use tokio_postgres::Client;

use crate::database::{Database, until};

async fn enter(client: &Client, saga: &str, op: &str) -> bool {
    client.query_one("select weft.enter($1, 'reserve', $2)", &[&saga, &op]).await.unwrap().get(0)
}

async fn receive(client: &Client, message: &str) -> bool {
    client.query_one("select weft.receive('customers', $1)", &[&message]).await.unwrap().get(0)
}

#[tokio::test]
async fn enter_answers_by_its_truth_table() {
    let database = Database::ready().await;
    let app = database.app().await;
    for (saga, calls) in [
        ("once", &[("do", true)][..]),
        ("repeated do", &[("do", true), ("do", false), ("do", false)]),
        ("do, undo", &[("do", true), ("undo", true)]),
        ("repeated undo", &[("do", true), ("undo", true), ("undo", false), ("do", false)]),
        ("undo without do", &[("undo", false), ("undo", false)]),
        ("do after its undo", &[("undo", false), ("do", false), ("undo", false), ("do", false)]),
    ] {
        for (place, &(op, expected)) in calls.iter().enumerate() {
            assert_eq!(enter(&app, saga, op).await, expected, "{saga}: call {place}, {op}");
        }
    }
    let error = app.execute("select weft.enter('s', 'reserve', 'redo')", &[]).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "23514", "an operation is do or undo");
}

#[tokio::test]
async fn a_rolled_back_do_may_be_done_again_and_is_nothing_to_undo() {
    let database = Database::ready().await;
    let mut app = database.app().await;
    let transaction = app.transaction().await.unwrap();
    assert!(enter(transaction.client(), "s", "do").await);
    transaction.rollback().await.unwrap();
    assert!(enter(&app, "s", "do").await);
    let transaction = app.transaction().await.unwrap();
    assert!(enter(transaction.client(), "t", "do").await);
    transaction.rollback().await.unwrap();
    assert!(!enter(&app, "t", "undo").await);
}

/// Runs `second` on a connection of its own while `first` is in an open transaction that it has to wait for; ends that
/// transaction by `end`, and gives the second one's answer.
async fn second_waits(database: &Database, first: &str, second: &str, end: &str) -> bool {
    let (one, two, superuser) = (database.app().await, database.app().await, database.superuser().await);
    one.batch_execute("begin").await.unwrap();
    let entered: bool = one.query_one(first, &[]).await.unwrap().get(0);
    assert!(entered || first.contains("undo"));
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
    let call = |saga: &str, op: &str| format!("select weft.enter('{saga}', 'reserve', '{op}')");
    assert!(second_waits(&database, &call("a", "do"), &call("a", "undo"), "commit").await, "the do happened: undo it");
    assert!(!second_waits(&database, &call("b", "do"), &call("b", "undo"), "rollback").await, "the do did not happen");
    assert!(!second_waits(&database, &call("c", "do"), &call("c", "do"), "commit").await, "the other has done it");
    assert!(second_waits(&database, &call("d", "do"), &call("d", "do"), "rollback").await, "the other has not");
    assert!(!second_waits(&database, &call("e", "undo"), &call("e", "do"), "commit").await, "the undo came first");
    assert!(second_waits(&database, &call("f", "undo"), &call("f", "do"), "rollback").await, "the undo was not");
}

#[tokio::test]
async fn a_message_is_received_once_per_consumer() {
    let database = Database::ready().await;
    let app = database.app().await;
    assert!(receive(&app, "m1").await);
    assert!(!receive(&app, "m1").await);
    assert!(receive(&app, "m2").await);
    let other = app.query_one("select weft.receive('orders', 'm1')", &[]).await.unwrap();
    assert!(other.get::<_, bool>(0));
    let call = |message: &str| format!("select weft.receive('customers', '{message}')");
    assert!(!second_waits(&database, &call("m3"), &call("m3"), "commit").await);
    assert!(second_waits(&database, &call("m4"), &call("m4"), "rollback").await);
}

#[tokio::test]
async fn a_reply_is_remembered_for_a_repeated_call() {
    let database = Database::ready().await;
    let app = database.app().await;
    let recall = async || -> Option<serde_json::Value> {
        app.query_one("select weft.recall('s', 'reserve', 'do')", &[]).await.unwrap().get(0)
    };
    assert_eq!(recall().await, None);
    let remember = r#"select weft.remember('s', 'reserve', 'do', '{"status": 201}')"#;
    let error = app.batch_execute(remember).await.unwrap_err();
    assert_eq!(error.code().unwrap().code(), "55000", "what was not entered is not remembered");
    assert!(enter(&app, "s", "do").await);
    app.batch_execute(remember).await.unwrap();
    assert!(!enter(&app, "s", "do").await);
    assert_eq!(recall().await, Some(serde_json::json!({"status": 201})));
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
