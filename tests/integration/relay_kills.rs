//! The relay's promise while relay, database and broker are killed at random: nothing lost, nothing reordered within an
//! aggregate, nothing that was rolled back, duplicates under the same id. `WEFT_SEED` repeats the order of the kills.

use rand::{Rng, SeedableRng, rngs::StdRng};
use weft::contract::relay::Mode;

use crate::{
    checker::check,
    relay_harness::{Setting, Writers},
    servers::{SUPERUSER, SUPERUSER_PASSWORD, until},
};

const KILLS: usize = 24;
const WRITERS: u64 = 8;

async fn kill_at_random(mode: Mode) {
    let seed = std::env::var("WEFT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("WEFT_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut setting = Setting::new(mode).await;
    let url = setting.database.server.url(SUPERUSER, SUPERUSER_PASSWORD, crate::database::DATABASE);
    let mut relays = [setting.start_relay(), setting.start_relay()];
    let writers = Writers::start(&url, seed, WRITERS, usize::MAX);
    for _ in 0..KILLS {
        // between two kills some events are published, sometimes few, sometimes many
        let more = setting.count().await.unwrap_or_default() + random.random_range(1..200);
        let enough = async || setting.count().await.is_some_and(|count| count >= more);
        until("events are published", enough).await;
        match random.random_range(0..4) {
            0 => setting.database.server.restart(),
            1 => setting.nats.restart(),
            which => {
                let which = which - 2;
                relays[which].kill9();
                relays[which] = setting.start_relay();
            }
        }
    }
    writers.stop().await;
    setting.drained().await;
    let verdict = check(&setting.committed().await, &setting.delivered().await);
    println!("{mode:?}: {verdict}");
    assert!(verdict.is_kept(), "{mode:?}, WEFT_SEED={seed}: {verdict}");
    assert!(verdict.events > 1000, "{mode:?}: too few events for a verdict: {verdict}");
}

#[tokio::test]
async fn log_tailing_loses_and_reorders_nothing_whatever_is_killed() {
    kill_at_random(Mode::LogTailing).await;
}

#[tokio::test]
async fn polling_loses_and_reorders_nothing_whatever_is_killed() {
    kill_at_random(Mode::Polling).await;
}
