//! Starts sagas, each with an idempotency key of its own, again and again until the orchestrator has accepted it.

use std::time::Duration;

use futures::StreamExt;

#[derive(clap::Args)]
pub struct Args {
    /// The orchestrator's API, such as `http://default-orchestrator:8080`
    #[arg(long)]
    url: String,
    #[arg(long)]
    saga: String,
    #[arg(long)]
    count: u32,
    /// Every so many asks to be refused
    #[arg(long, default_value_t = 10)]
    refuse_every: u32,
    #[arg(long, default_value_t = 16)]
    concurrency: usize,
    /// Sagas a second, roughly; 0 is as fast as it goes
    #[arg(long, default_value_t = 0)]
    rate: u32,
}

pub async fn run(args: Args) -> anyhow::Result<()> {
    let client = reqwest::Client::builder().timeout(Duration::from_secs(5)).build()?;
    let address = format!("{}/sagas/{}", args.url, args.saga);
    let started = tokio::time::Instant::now();
    futures::stream::iter(1..=args.count)
        .for_each_concurrent(args.concurrency, |number| {
            let (client, address) = (&client, &address);
            let due = f64::from(number) / f64::from(args.rate.max(1));
            async move {
                if args.rate > 0 {
                    tokio::time::sleep_until(started + Duration::from_secs_f64(due)).await;
                }
                let refuse = number % args.refuse_every == 0;
                while let Err(error) = start(client, address, number, refuse).await {
                    tracing::warn!(number, error = format!("{error:#}"), "not accepted yet");
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
            }
        })
        .await;
    println!("accepted {}", args.count);
    Ok(())
}

async fn start(client: &reqwest::Client, address: &str, number: u32, refuse: bool) -> reqwest::Result<()> {
    let request = client.post(address).header("idempotency-key", format!("start-{number}"));
    request.json(&serde_json::json!({"number": number, "refuse": refuse})).send().await?.error_for_status()?;
    Ok(())
}
