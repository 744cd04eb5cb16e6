//! Whatever is killed, every saga ends Completed or Compensated, each participant's effects are there exactly once, and
//! what was done is undone in reverse.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::batch::v1::Job;
use serde_json::json;
use weft::api::v1alpha1::{Microservice, Saga};

use crate::harness::{Company, Kill, SERVICE_IMAGE, Scenario, Victim, microservice, progress, saga, scenario, seed};

const SAGAS: usize = 1_000;
const REFUSED: usize = SAGAS / 10;
/// Sagas a second: they have to last for some kills.
const RATE: usize = 20;
const FIRST: &str = "stock";
const SECOND: &str = "travel";

#[tokio::test]
async fn saga_ends() {
    scenario("saga_ends", Company::Others, async |world| {
        world.install(&world.release()).await?;
        for service in [FIRST, SECOND] {
            world.apply_service(&microservice(service)).await?;
        }
        world.apply(&saga("trip", FIRST, SECOND)).await?;
        world.ready::<Saga>("trip").await?;
        for service in [FIRST, SECOND] {
            world.ready::<Microservice>(service).await?;
        }
        world.apply(&starter(&world.namespace)).await?;
        let seed = seed();
        world.while_killing(&victims(), Duration::from_secs(2), seed, all_are_accepted(world)).await?;
        all_have_ended(world).await.with_context(|| format!("repeat it with WEFT_SEED={seed}"))?;
        effects_are_right(world).await.with_context(|| format!("repeat it with WEFT_SEED={seed}"))
    })
    .await;
}

fn victims() -> Vec<Victim> {
    vec![
        Victim::new("default-orchestrator", "orchestrator", "orchestrator", Kill::ProcessOrPod),
        Victim::new("default-orchestrator", "database", "postgres", Kill::ProcessOrPod),
        Victim::new(FIRST, "service", "service", Kill::ProcessOrPod),
        Victim::new(SECOND, "service", "service", Kill::ProcessOrPod),
        Victim::new(FIRST, "database", "postgres", Kill::ProcessOrPod),
        Victim::new(SECOND, "database", "postgres", Kill::ProcessOrPod),
    ]
}

fn starter(namespace: &str) -> serde_json::Value {
    let container = json!({
        "name": "starter",
        "image": SERVICE_IMAGE,
        "command": ["/usr/bin/weft-e2e", "start-sagas", "--url", format!("http://default-orchestrator.{namespace}:8080"),
            "--saga", "trip", "--count", SAGAS.to_string(), "--refuse-every", (SAGAS / REFUSED).to_string(),
            "--rate", RATE.to_string()],
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
    });
    let pod = json!({
        "restartPolicy": "OnFailure",
        "automountServiceAccountToken": false,
        "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    });
    json!({
        "apiVersion": "batch/v1", "kind": "Job",
        "metadata": {"name": "starter"},
        "spec": {"template": {"spec": pod}},
    })
}

async fn all_are_accepted(world: &Scenario) -> Result<()> {
    world
        .until("every saga is accepted", Duration::from_mins(6), async || {
            let job: Option<Job> = world.get("starter").await?;
            let status = job.and_then(|job| job.status).unwrap_or_default();
            Ok((status.succeeded == Some(1)).then_some(()))
        })
        .await
}

async fn all_have_ended(world: &Scenario) -> Result<()> {
    let wanted = (i64::try_from(SAGAS - REFUSED)?, i64::try_from(REFUSED)?, 0, 0);
    world
        .until("every saga has ended", Duration::from_mins(2), async || {
            let status = world.get::<Saga>("trip").await?.and_then(|saga| saga.status).unwrap_or_default();
            let counts = (status.completed, status.compensated, status.running, status.stuck);
            ensure!(counts == wanted, "completed, compensated, running, stuck: {counts:?}, wanted {wanted:?}");
            Ok(Some(()))
        })
        .await
}

/// A saga's effects at both participants, in the order of their times: one clock, as the node is one.
async fn effects_are_right(world: &Scenario) -> Result<()> {
    let mut effects: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for service in [FIRST, SECOND] {
        let sql = "select saga, to_char(at at time zone 'utc', 'YYYY-MM-DD HH24:MI:SS.US'), step, op from effect";
        for row in world.psql(service, sql).await? {
            let fields: Vec<&str> = row.split('|').collect();
            let [saga, at, step, op] = fields[..] else { bail!("a row of effects is {row}") };
            effects.entry(saga.to_owned()).or_default().push((at.to_owned(), format!("{step}/{op}")));
        }
    }
    let completed = ["reserve/do", "book/do", "confirm/do"].as_slice();
    let compensated = ["reserve/do", "book/do", "book/undo", "reserve/undo"].as_slice();
    let mut ends = (0, 0);
    for (saga, mut effects) in effects {
        effects.sort();
        let effects: Vec<&str> = effects.iter().map(|(_, effect)| effect.as_str()).collect();
        match effects.as_slice() {
            done if done == completed => ends.0 += 1,
            done if done == compensated => ends.1 += 1,
            other => bail!("the effects of saga {saga} are {other:?}"),
        }
    }
    progress(&format!("{}: {} completed, {} compensated", world.name, ends.0, ends.1));
    ensure!(ends == (SAGAS - REFUSED, REFUSED), "the effects are of {ends:?} sagas");
    Ok(())
}
