//! Whatever keeps a service from being ready, the cause is the first sentence of its condition within 30 seconds: twenty broken
//! manifests, each with its sentence, in `causes.yaml`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures::future::join_all;
use serde::Deserialize;
use serde_json::{Value, json};
use weft::api::v1alpha1::Microservice;

use crate::harness::{Company, Scenario, merged, microservice, progress, scenario};

const CAUSES: &str = include_str!("causes.yaml");
/// The promise.
const WITHIN: Duration = Duration::from_secs(30);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Cause {
    why: String,
    name: String,
    /// What the Microservice is besides the tests' service.
    change: Value,
    /// It has a database.
    #[serde(default)]
    database: bool,
    /// Applied before it, in a namespace of its own if it concerns all pods of one.
    #[serde(default)]
    with: Vec<Value>,
    /// It is ready before the change: a second version is broken.
    #[serde(default)]
    second_version: bool,
    reason: String,
    says: Vec<String>,
}

#[tokio::test]
async fn causes_are_named() {
    scenario("causes_are_named", Company::Others, async |world| {
        let causes: Vec<Cause> = serde_yaml::from_str(CAUSES)?;
        world.install(&world.release()).await?;
        let (alone, together): (Vec<_>, Vec<_>) = causes.iter().partition(|cause| !cause.with.is_empty());
        let mut wrong: Vec<String> = Vec::new();
        // a few at a time: the promise is about causes, not about a machine that is busy with twenty services
        for some in together.chunks(4) {
            let outcomes = join_all(some.iter().map(|cause| is_named(world, cause))).await;
            wrong.extend(outcomes.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")));
        }
        for cause in alone {
            wrong.extend(is_named(world, cause).await.err().map(|error| format!("{error:#}")));
        }
        ensure!(wrong.is_empty(), "{} of {} causes are not named:\n{}", wrong.len(), causes.len(), wrong.join("\n"));
        Ok(())
    })
    .await;
}

async fn is_named(world: &Scenario, cause: &Cause) -> Result<()> {
    let outcome = named(world, cause).await.with_context(|| cause.why.clone());
    // the next ones have the machine, and the quota, for themselves
    for object in cause.with.iter().rev() {
        world.remove(object).await?;
    }
    world.delete::<Microservice>(&cause.name).await?;
    outcome
}

async fn named(world: &Scenario, cause: &Cause) -> Result<()> {
    for object in &cause.with {
        world.apply(object).await?;
    }
    let bare = if cause.database { json!({}) } else { json!({"spec": {"database": null}}) };
    let base = merged(&microservice(&cause.name), &bare);
    if cause.second_version {
        apply(world, &base, cause.database).await?;
        world.ready::<Microservice>(&cause.name).await?;
    }
    apply(world, &merged(&base, &json!({"spec": cause.change})), cause.database).await?;
    let condition = world
        .promptly(&format!("{} says {}", cause.name, cause.reason), WITHIN, async || {
            let now = world.now_says::<Microservice>(&cause.name, "Ready").await?;
            ensure!(now.status == "False" && now.reason == cause.reason, "it says {}: {}", now.reason, now.message);
            Ok(Some(now))
        })
        .await?;
    let missing: Vec<_> = cause.says.iter().filter(|words| !condition.message.contains(*words)).collect();
    ensure!(missing.is_empty(), "its message lacks {missing:?}: {}", condition.message);
    progress(&format!("{}: {}: {}", cause.name, condition.reason, condition.message));
    Ok(())
}

async fn apply(world: &Scenario, object: &Value, database: bool) -> Result<()> {
    if database { world.apply_service(object).await } else { Ok(world.apply(object).await.map(drop)?) }
}
