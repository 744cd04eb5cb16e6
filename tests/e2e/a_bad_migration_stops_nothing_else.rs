//! A migration that fails holds back the new version and nothing else: the one that runs is scaled and repaired. A set-up that
//! is done stays done, whoever deletes its Job.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::{apps::v1::Deployment, batch::v1::Job};
use kube::{
    ResourceExt,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use serde_json::json;
use weft::api::v1alpha1::Microservice;

use crate::harness::{Company, Scenario, configmap, microservice, scenario};

const TABLES: (&str, &str) = ("001_tables.sql", include_str!("participant/schema.sql"));
const BAD: (&str, &str) = ("003.sql", "alter table no_such_table add column total integer;");
/// The promise: on an idle machine it takes a second.
const SOON: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_bad_migration_stops_nothing_else() {
    scenario("a_bad_migration_stops_nothing_else", Company::Others, async |world| {
        world.install(&world.release()).await?;
        world.apply(&configmap("orders-migrations", &[TABLES])).await?;
        apply_version(world, "1").await?;
        world.ready::<Microservice>("orders").await?;
        a_job_that_is_deleted_is_not_missed(world).await?;

        world.apply(&configmap("orders-migrations", &[TABLES, BAD])).await?;
        apply_version(world, "2").await?;
        let failed = world.says::<Microservice>("orders", "Stalled", "True", 90).await?;
        ensure!(failed.message.contains("003.sql"), "the file is not named: {}", failed.message);
        scales(world, 3).await?;
        the_deployment_is_made_again(world).await?;

        // gone, after its files were applied
        world.remove(&configmap("orders-migrations", &[])).await?;
        world.says::<Microservice>("orders", "Migrated", "False", 30).await?;
        scales(world, 1).await?;
        the_deployment_is_made_again(world).await?;

        world.apply(&configmap("orders-migrations", &[TABLES, ("003.sql", "create table total ();")])).await?;
        world.ready::<Microservice>("orders").await?;
        serves(world, "2").await
    })
    .await;
}

async fn apply_version(world: &Scenario, version: &str) -> Result<()> {
    let mut orders = microservice("orders");
    orders["spec"]["env"] = json!([{"name": "VERSION", "value": version}]);
    world.apply(&orders).await?;
    Ok(())
}

/// Deletes the Job, and the operator's whole memory of it.
async fn a_job_that_is_deleted_is_not_missed(world: &Scenario) -> Result<()> {
    let before = world.now_says::<Microservice>("orders", "Ready").await?;
    let jobs = ListParams::default().labels("app.kubernetes.io/instance=orders");
    for job in world.api::<Job>().list(&jobs).await? {
        world.api::<Job>().delete(&job.name_any(), &DeleteParams::background()).await?;
    }
    let labels = ListParams::default().labels("app.kubernetes.io/component=operator");
    let operators = world.api::<k8s_openapi::api::core::v1::Pod>().list(&labels).await?;
    world.delete_by_force(&operators.items.first().context("no operator")?.name_any()).await?;
    // a change that the operator has to make proves that it has seen the rest
    scales(world, 2).await?;
    world.ready::<Microservice>("orders").await?;
    let made = world.api::<Job>().list(&jobs).await?.items;
    ensure!(made.is_empty(), "a set-up that was done runs again: {}", made[0].name_any());
    let migrated = world.now_says::<Microservice>("orders", "Migrated").await?;
    ensure!(migrated.last_transition_time.0 <= before.last_transition_time.0, "Migrated was not True all the time");
    let orders = world.get::<Microservice>("orders").await?.context("no Microservice")?;
    let set_up = orders.status.and_then(|status| status.database?.set_up).context("no set-up is recorded")?;
    ensure!(set_up.files == Some(1) && set_up.last.as_deref() == Some(TABLES.0), "it is not this one: {set_up:?}");
    Ok(())
}

/// As `kubectl scale` does.
async fn scales(world: &Scenario, replicas: i32) -> Result<()> {
    let scale = Patch::Merge(json!({"spec": {"replicas": replicas}}));
    world.api::<Microservice>().patch_scale("orders", &PatchParams::default(), &scale).await?;
    world
        .promptly(&format!("there are {replicas} replicas"), SOON, async || {
            let spec = world.get::<Deployment>("orders").await?.and_then(|deployment| deployment.spec);
            Ok(spec.is_some_and(|spec| spec.replicas == Some(replicas)).then_some(()))
        })
        .await
}

async fn the_deployment_is_made_again(world: &Scenario) -> Result<()> {
    let before = world.get::<Deployment>("orders").await?.context("no Deployment")?;
    world.api::<Deployment>().delete("orders", &DeleteParams::background()).await?;
    world
        .promptly("the Deployment is made again", SOON, async || {
            let now = world.get::<Deployment>("orders").await?;
            Ok(now.filter(|now| now.uid() != before.uid()).map(drop))
        })
        .await?;
    world.until("the old version serves", Duration::from_mins(1), async || Ok(Some(serves(world, "1").await?))).await
}

async fn serves(world: &Scenario, version: &str) -> Result<()> {
    let served = world.get_text("services/orders:8080", "/version").await?;
    ensure!(served == version, "version {served} serves, not {version}");
    Ok(())
}
