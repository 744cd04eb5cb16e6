//! What a relay reports while the broker is away and rows wait.

use std::time::Duration;

use weft::contract::{problem::ProblemReason, status::RelayStatus};

use super::{MODES, has, insert, started, stored};
use crate::relay_harness::{RelayProcess, Setting};

const WAITS: Duration = Duration::from_secs(25);

async fn reports(relay: &RelayProcess, pending: u64) {
    let all = |status: &RelayStatus| {
        has(status, ProblemReason::BrokerUnreachable)
            && !status.ready
            && status.pending == pending
            && status.lag_seconds > 4.0
    };
    let first = relay.within(WAITS, "pending and lag grow", all).await;
    assert!(
        relay
            .metric("weft_relay_pending")
            .await
            .is_some_and(|metric| (metric - f64::from(u32::try_from(pending).unwrap())).abs() < 0.5)
    );
    assert!(relay.metric("weft_relay_lag_seconds").await.unwrap() > 4.0);
    let later = |status: &RelayStatus| all(status) && status.lag_seconds > first.lag_seconds + 3.0;
    relay.within(WAITS, "lag grows on", later).await;
}

#[tokio::test]
async fn pending_and_lag_grow_while_the_broker_is_down() {
    for mode in MODES {
        let mut setting = Setting::new(mode).await;
        let mut relay = started(&setting).await;
        let app = setting.database.app().await;
        insert(&app, "order", "a", [1]).await;
        stored(&setting, WAITS, 1).await;
        setting.nats.kill9();
        relay
            .within(Duration::from_secs(5), "the broker is named", |status| {
                has(status, ProblemReason::BrokerUnreachable)
            })
            .await;
        insert(&app, "order", "a", 2..=51).await;
        reports(&relay, 50).await;
        // what has never published anything says the same
        relay.kill9();
        relay = setting.start_relay();
        reports(&relay, 50).await;
        setting.nats.restart();
        setting.drained().await;
        relay.until("resolved", |status| status.ready && status.problems.is_empty() && status.pending == 0).await;
    }
}
