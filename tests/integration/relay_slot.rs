//! The replication slot that a deleted OutboxRelay leaves, and the set-up that removes it.

use weft::contract::relay::Mode;

use crate::{
    checker::check,
    database::{DATABASE, STREAMING, until},
    relay_harness::{Setting, Writers},
    servers::{SUPERUSER, SUPERUSER_PASSWORD},
};

const THERE: &str = "select exists (select from pg_replication_slots)";

#[tokio::test]
async fn the_slot_of_a_relay_that_is_gone_is_removed_and_the_next_relay_loses_nothing() {
    let mut setting = Setting::new(Mode::LogTailing).await;
    let superuser = setting.database.superuser().await;
    let url = setting.database.server.url(SUPERUSER, SUPERUSER_PASSWORD, DATABASE);
    let mut relay = setting.start_relay();
    Writers::start(&url, 31, 2, 20).finished().await;
    until(&superuser, STREAMING).await;
    setting.database.setup.remove_slot = true;
    setting.database.write_contract();

    setting.database.patience = 1;
    let sentence = setting.database.set_up_given_up();
    assert!(sentence.contains("remove the replication slot") && sentence.contains("is active"), "{sentence}");
    assert!(superuser.query_one(THERE, &[]).await.unwrap().get::<_, bool>(0), "a relay that reads it keeps it");

    relay.kill9();
    setting.database.patience = 30;
    setting.database.set_up_well();
    assert!(!superuser.query_one(THERE, &[]).await.unwrap().get::<_, bool>(0));
    setting.database.set_up_well();

    Writers::start(&url, 32, 2, 20).finished().await;
    let relay = setting.start_relay();
    setting.drained().await;
    let status = relay.until("ready", |status| status.ready).await;
    assert!(status.problems.is_empty(), "nothing was lost: {status:?}");
    let verdict = check(&setting.committed().await, &setting.delivered().await);
    assert!(verdict.is_kept(), "{verdict}");
}
