//! How a server is started: with the superuser's password of the Secret, whichever it had before.

use crate::servers::{Postgres, SUPERUSER, connect};

const SCRIPT: &str = include_str!("../../src/controllers/database/start.sh");

#[tokio::test]
async fn a_server_starts_with_the_password_of_the_secret() {
    let new = "it's-new";
    let mut server = Postgres::start();
    let slot = "select pg_create_logical_replication_slot('weft_outbox', 'pgoutput')";
    server.superuser("postgres").await.execute(slot, &[]).await.unwrap();
    server.kill9();

    let first = server.run_start_script(SCRIPT, new);
    let log = String::from_utf8_lossy(&first.stderr);
    assert!(first.status.success(), "{log}");
    assert!(log.contains("redo") && !log.contains("-new") && !log.contains("alter role"), "{log}");
    assert!(first.stdout.is_empty(), "{}", String::from_utf8_lossy(&first.stdout));
    let second = server.run_start_script(SCRIPT, new);
    assert!(second.status.success() && second.stderr.is_empty(), "once: {}", String::from_utf8_lossy(&second.stderr));

    server.restart();
    assert!(connect(&server.superuser_url()).await.is_err(), "the old password is void");
    let client = connect(&server.url(SUPERUSER, new, "postgres")).await.unwrap();
    let slots: i64 = client.query_one("select count(*) from pg_replication_slots", &[]).await.unwrap().get(0);
    assert_eq!(slots, 1, "the slot of a relay survives it");
}
