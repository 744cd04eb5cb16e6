//! Writes events to the outbox, and each into the ledger in the same transaction.
//!
//! Every aggregate has one writer at a time (an advisory lock of its lane), so its events have one order: `n`. A writer
//! that is killed, or loses its database, goes on from the ledger.

use std::{sync::Arc, time::Duration};

use deadpool_postgres::{Client, Pool};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedMutRandom};
use uuid::Uuid;

/// Each lane writes the aggregates whose number it divides with this remainder.
const LANES: u32 = 4;
const LANE_LOCKS: i32 = 0x7765;

#[derive(clap::Args, Clone, Debug)]
pub struct Args {
    /// Events to write in all; none by default
    #[arg(long = "write-events", env = "WRITE_EVENTS", default_value_t = 0)]
    events: u32,
    #[arg(long = "write-aggregates", env = "WRITE_AGGREGATES", default_value_t = 200)]
    aggregates: u32,
    /// Events a second, roughly; 0 is as fast as it goes
    #[arg(long = "write-rate", env = "WRITE_RATE", default_value_t = 0)]
    rate: u32,
    #[arg(long = "write-seed", env = "WRITE_SEED", default_value_t = 1)]
    seed: u64,
}

impl Args {
    pub fn is_wanted(&self) -> bool {
        self.events > 0
    }
}

pub fn start(pool: Pool, args: Args) {
    let args = Arc::new(args);
    for lane in 0..LANES {
        let (pool, args) = (pool.clone(), args.clone());
        tokio::spawn(async move {
            let mut random = StdRng::seed_from_u64(args.seed.wrapping_add(u64::from(lane)));
            while let Err(error) = write_lane(&pool, &args, lane, &mut random).await {
                tracing::warn!(lane, error = format!("{error:#}"), "writing failed, going on from the ledger");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            tracing::info!(lane, "every event of this lane is written");
        });
    }
}

async fn write_lane(pool: &Pool, args: &Args, lane: u32, random: &mut StdRng) -> anyhow::Result<()> {
    let mut client = pool.get().await?;
    let locked = "select pg_try_advisory_lock($1, $2)";
    while !client.query_one(locked, &[&LANE_LOCKS, &lane.cast_signed()]).await?.try_get::<_, bool>(0)? {
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let wanted = (args.events / args.aggregates).cast_signed();
    let mut next: Vec<(String, i32)> = Vec::new();
    for number in (0..args.aggregates).filter(|number| number % LANES == lane) {
        let aggregate = format!("a{number}");
        let last = "select coalesce(max(n), 0) from ledger where aggregate = $1";
        let written: i32 = client.query_one(last, &[&aggregate]).await?.try_get(0)?;
        next.push((aggregate, written + 1));
    }
    loop {
        next.retain(|(_, n)| *n <= wanted);
        if next.is_empty() {
            return Ok(());
        }
        let batch = write_batch(&mut client, &mut next, wanted, random).await?;
        if args.rate > 0 {
            let share = f64::from(batch * LANES) / f64::from(args.rate);
            tokio::time::sleep(Duration::from_secs_f64(share)).await;
        }
    }
}

/// One transaction of 1 to 16 events of several aggregates; one in twenty is rolled back. Gives the number of events.
async fn write_batch(
    client: &mut Client,
    next: &mut [(String, i32)],
    wanted: i32,
    random: &mut StdRng,
) -> anyhow::Result<u32> {
    let size = random.random_range(1..=16);
    let abandoned = random.random_ratio(1, 20);
    let mut advanced: Vec<(String, i32)> = next.to_vec();
    let (mut aggregates, mut numbers, mut ids) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..size {
        if let Some((aggregate, n)) = advanced.choose_mut(random)
            && *n <= wanted
        {
            aggregates.push(aggregate.clone());
            numbers.push(*n);
            ids.push(Uuid::now_v7());
            *n += 1;
        }
    }
    let transaction = client.transaction().await?;
    let insert = include_str!("write_batch.sql");
    transaction.execute(insert, &[&aggregates, &numbers, &ids]).await?;
    if abandoned {
        transaction.rollback().await?;
    } else {
        transaction.commit().await?;
        next.clone_from_slice(&advanced);
    }
    Ok(size)
}
