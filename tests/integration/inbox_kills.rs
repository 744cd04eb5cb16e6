//! The inbox's promise while inboxes, broker and the service's database are killed at random, and the service fails at random: no
//! event without its effect, none twice, none out of order in its aggregate. `WEFT_SEED` repeats the order of the kills.

use std::{sync::atomic::Ordering::Relaxed, time::Duration};

use rand::{Rng, SeedableRng, rngs::StdRng};

use crate::{
    inbox_harness::{World, check_effects},
    relay_harness::Writers,
    servers::{until, within},
};

const KILLS: usize = 16;
const WRITERS: u64 = 4;
const FAILING: usize = 3;

async fn kill_at_random(function: bool) {
    let seed = std::env::var("WEFT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("WEFT_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut world = World::new(seed).await;
    let path = if function { "function" } else { "events" };
    if function {
        world.subscribe_function(path, "on_event").max_attempts = u32::MAX;
    } else {
        world.subscribe(path).max_attempts = u32::MAX;
    }
    world.behaviour.failures.store(3, Relaxed);
    let mut relay = world.publisher.start_relay();
    let mut inboxes = [world.start_inbox(), world.start_inbox()];
    let writers = Writers::paced(&world.publisher.url(), seed, WRITERS, Duration::from_millis(4));
    let count = async |world: &World| -> Option<i64> {
        let url = world.database.server.url(
            crate::servers::SUPERUSER,
            crate::servers::SUPERUSER_PASSWORD,
            crate::database::DATABASE,
        );
        let client = crate::servers::connect(&url).await.ok()?;
        client.query_one("select count(*) from effects", &[]).await.ok().map(|row| row.get(0))
    };
    // some aggregates always fail, until the end: their events are held, and all others go on
    until("some aggregates have events", async || world.publisher.committed().await.len() >= FAILING).await;
    world.fail(&world.publisher.committed().await.into_keys().take(FAILING).collect::<Vec<_>>()).await;
    for _ in 0..KILLS {
        let more = count(&world).await.unwrap_or_default() + random.random_range(1..200);
        until("events have effects", async || count(&world).await.is_some_and(|count| count >= more)).await;
        match random.random_range(0..8) {
            0 => world.database.server.restart(),
            1 => world.publisher.nats.restart(),
            2 => {
                relay.kill9();
                relay = world.publisher.start_relay();
            }
            3 | 4 => {
                let which = random.random_range(0..2);
                inboxes[which].terminate().await;
                inboxes[which] = world.start_inbox();
            }
            _ => {
                let which = random.random_range(0..2);
                inboxes[which].kill9();
                inboxes[which] = world.start_inbox();
            }
        }
    }
    let client = world.database.superuser().await;
    let held = async || -> i64 {
        let held = "select count(*) from weft.inbox_held where died_at is null and subscription = $1";
        client.query_one(held, &[&path]).await.unwrap().get(0)
    };
    // an event is held when it has failed for two seconds in one life of the inbox, and the kills may have come faster
    until("a failing event is held", async || held().await > 0).await;
    writers.stop().await;
    world.publisher.drained().await;
    world.behaviour.failures.store(0, Relaxed);
    let held = held().await;
    assert!(held > 0, "WEFT_SEED={seed}: nothing was held");
    world.fail(&[]).await;
    // a person has them delivered now, and not after a minute's pause
    world.dead(&["retry", "--all"]).unwrap();
    let committed = world.publisher.committed().await;
    let all: u64 = committed.values().sum();
    let enough = async || count(&world).await.is_some_and(|count| count.unsigned_abs() >= all);
    within(Duration::from_secs(90), "every event has its effect", enough).await;
    // what comes twice may come late
    tokio::time::sleep(Duration::from_secs(1)).await;
    let verdict = check_effects(&committed, &world.effects(path).await);
    println!("{path}: {verdict:?}");
    assert!(verdict.is_kept(), "{path}, WEFT_SEED={seed}: {verdict:?}");
    assert!(verdict.events > 500, "{path}: too few events for a verdict: {verdict:?}");
}

#[tokio::test]
async fn over_http_each_event_has_its_effect_once_and_in_order_whatever_is_killed() {
    kill_at_random(false).await;
}

#[tokio::test]
async fn by_a_function_each_event_has_its_effect_once_and_in_order_whatever_is_killed() {
    kill_at_random(true).await;
}
