//! Bad specs get the sentence that stands beside them in `bad_specs/`: from the API server when they are applied, or from
//! the operator in the condition `Accepted`.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;
use weft::api::v1alpha1::{Microservice, OutboxRelay, Saga};

use crate::harness::{Company, Conditions, Scenario, merged, progress, scenario};

const FILES: [&str; 3] = [
    include_str!("bad_specs/microservice.yaml"),
    include_str!("bad_specs/outboxrelay.yaml"),
    include_str!("bad_specs/saga.yaml"),
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    base: Value,
    #[serde(default)]
    with: Vec<Value>,
    bad: Vec<Bad>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Bad {
    why: String,
    by: By,
    change: Value,
    /// What the object is before the change, itself a change of the base; absent: it does not exist.
    from: Option<Value>,
    #[serde(default)]
    with: Vec<Value>,
    /// Of the condition.
    reason: Option<String>,
    says: String,
}

#[derive(Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum By {
    Apply,
    Operator,
}

#[tokio::test]
async fn bad_specs_are_refused() {
    scenario("bad_specs_are_refused", Company::Others, async |world| {
        let mut count = 0;
        let mut wrong = Vec::new();
        let mut files = Vec::new();
        for text in FILES {
            let file: File = serde_yaml::from_str(text)?;
            world.create_dry(&file.base).await.context("the base of a file is refused")?;
            for bad in file.bad.iter().filter(|bad| bad.by == By::Apply) {
                count += 1;
                if let Err(error) = by_the_api_server(world, &file.base, bad).await {
                    wrong.push(format!("{}: {error:#}", bad.why));
                }
            }
            files.push(file);
        }
        world.install(&world.release()).await?;
        for file in &files {
            for object in &file.with {
                world.apply(object).await?;
            }
            for bad in file.bad.iter().filter(|bad| bad.by == By::Operator) {
                count += 1;
                if let Err(error) = by_the_operator(world, &file.base, bad).await {
                    wrong.push(format!("{}: {error:#}", bad.why));
                }
            }
        }
        progress(&format!("{}: {count} bad specs", world.name));
        ensure!(count >= 40, "only {count} bad specs");
        ensure!(wrong.is_empty(), "{} of {count} did not get their sentence:\n{}", wrong.len(), wrong.join("\n"));
        Ok(())
    })
    .await;
}

async fn by_the_api_server(world: &Scenario, base: &Value, bad: &Bad) -> Result<()> {
    let answer = match &bad.from {
        None => world.create_dry(&merged(base, &bad.change)).await,
        Some(from) => {
            let mut before = merged(base, from);
            // so that nothing comes of it
            if before["kind"] == "Microservice" {
                before["spec"]["suspend"] = Value::Bool(true);
            }
            world.apply(&before).await.context("applying what it is before")?;
            let answer = world.replace_dry(&merged(&before, &bad.change)).await;
            world.remove(&before).await?;
            answer
        }
    };
    match answer {
        Ok(()) => bail!("it was taken"),
        Err(error) => said(&format!("{error:#}"), &bad.says),
    }
}

async fn by_the_operator(world: &Scenario, base: &Value, bad: &Bad) -> Result<()> {
    for object in &bad.with {
        world.apply(object).await?;
    }
    let object = merged(base, &bad.change);
    world.apply(&object).await.context("the API server refuses it already")?;
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    let refused = match object["kind"].as_str().unwrap_or_default() {
        "Microservice" => refused::<Microservice>(world, name, bad).await,
        "OutboxRelay" => refused::<OutboxRelay>(world, name, bad).await,
        "Saga" => refused::<Saga>(world, name, bad).await,
        other => bail!("what is a {other}?"),
    };
    world.remove(&object).await?;
    for object in &bad.with {
        world.remove(object).await?;
    }
    refused
}

/// Waits for the sentence, not for the first refusal: what was applied a moment before may not be known yet.
async fn refused<K: Conditions>(world: &Scenario, name: &str, bad: &Bad) -> Result<()> {
    let what = format!("{name} is refused with its sentence");
    world
        .until(&what, Duration::from_secs(10), async || {
            let condition = world.now_says::<K>(name, "Accepted").await?;
            ensure!(condition.status == "False", "Accepted is {}", condition.status);
            ensure!(
                bad.reason.as_ref().is_none_or(|reason| *reason == condition.reason),
                "the reason is {}",
                condition.reason
            );
            said(&condition.message, &bad.says).map(Some)
        })
        .await
}

fn said(message: &str, wanted: &str) -> Result<()> {
    ensure!(message.contains(wanted), "it got: {message}\n    not: {wanted}");
    Ok(())
}
