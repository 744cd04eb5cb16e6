//! One relay ends and another one goes on: asked to by SIGTERM, or killed.

use std::time::{Duration, Instant};

use rand::{Rng, SeedableRng, rngs::StdRng};

use super::{MODES, started};
use crate::{
    checker::check,
    relay_harness::{Passed, Setting, Tap, Writers},
};

const WRITERS: u64 = 8;

/// The longest time without an event between these moments.
fn longest_gap(passed: &[Passed], from: Instant, to: Instant) -> Duration {
    let times = passed.iter().map(|passed| passed.at).filter(|at| (from..to).contains(at));
    let times: Vec<Instant> = std::iter::once(from).chain(times).chain([to]).collect();
    times.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap()
}

fn median(times: &[Duration]) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    sorted[sorted.len() / 2]
}

#[tokio::test]
async fn a_relay_that_is_asked_to_end_leaves_no_gap_and_no_duplicate() {
    const TURNS: usize = 5;
    for mode in MODES {
        let setting = Setting::new(mode).await;
        let mut leader = started(&setting).await;
        let writers = Writers::paced(&setting.url(), 1, WRITERS, Duration::from_millis(20));
        let tap = Tap::start(&setting).await;
        let mut gaps = Vec::new();
        for _ in 0..TURNS {
            let standby = setting.start_relay();
            standby.until("a standby", |status| status.ready && !status.leading).await;
            tap.next_new(Instant::now()).await;
            let asked = Instant::now();
            leader.terminate().await;
            standby.until("the standby leads", |status| status.leading).await;
            tap.next_new(Instant::now()).await;
            gaps.push(longest_gap(&tap.all(), asked, Instant::now()));
            leader = standby;
        }
        writers.stop().await;
        setting.drained().await;
        let verdict = check(&setting.committed().await, &setting.delivered().await);
        println!("{mode:?}: gaps {gaps:?}; {verdict}; {} published twice", tap.duplicates());
        assert!(verdict.is_kept(), "{mode:?}: {verdict}");
        assert_eq!(tap.duplicates(), 0, "{mode:?}: events that were published twice");
        // 0.1 s on a quiet machine; a candidate that asks for the lock now and then has seconds
        assert!(median(&gaps) < Duration::from_secs(1), "{mode:?}: {gaps:?}");
    }
}

#[tokio::test]
async fn a_relay_that_is_killed_again_and_again_gets_on() {
    const KILLS: usize = 20;
    let seed = std::env::var("WEFT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    println!("WEFT_SEED={seed}");
    for mode in MODES {
        let mut random = StdRng::seed_from_u64(seed);
        let setting = Setting::new(mode).await;
        let writers = Writers::paced(&setting.url(), seed, WRITERS, Duration::from_millis(16));
        let tap = Tap::start(&setting).await;
        let mut relay = started(&setting).await;
        let mut pauses = Vec::new();
        for _ in 0..KILLS {
            tap.next_new(Instant::now()).await;
            // it dies so soon after it got on
            tokio::time::sleep(Duration::from_millis(random.random_range(50..1500))).await;
            relay.kill9();
            // what it sent last has passed by then
            tokio::time::sleep(Duration::from_millis(30)).await;
            let begun = Instant::now();
            relay = setting.start_relay();
            pauses.push(tap.next_new(begun).await.at - begun);
        }
        writers.stop().await;
        setting.drained().await;
        let verdict = check(&setting.committed().await, &setting.delivered().await);
        println!("{mode:?}: from a start to the next new event {pauses:?}; {verdict}");
        assert!(verdict.is_kept(), "{mode:?}, WEFT_SEED={seed}: {verdict}");
        let (first, last) = (median(&pauses[..KILLS / 2]), median(&pauses[KILLS / 2..]));
        assert!(last < first * 2 + Duration::from_secs(2), "{mode:?}: it grows from {first:?} to {last:?}: {pauses:?}");
        // 0.1 s on a quiet machine; what a relay waits for when it cannot tell published rows from new ones is 5 s
        assert!(median(&pauses) < Duration::from_secs(2), "{mode:?}: {pauses:?}");
    }
}
