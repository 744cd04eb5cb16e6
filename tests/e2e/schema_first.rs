//! No new pod of a service starts before its migrations succeeded. A failing one leaves the old version serving, and the
//! Microservice says which file it is and why.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, ensure};
use kube::ResourceExt;
use serde_json::json;
use weft::api::v1alpha1::Microservice;

use crate::harness::{Company, Scenario, configmap, microservice, same, scenario};

const TABLES: (&str, &str) = ("001_tables.sql", include_str!("participant/schema.sql"));

#[tokio::test]
async fn schema_first() {
    scenario("schema_first", Company::Others, async |world| {
        world.install(&world.release()).await?;
        apply_version(world, "1", &[TABLES]).await?;
        world.ready::<Microservice>("orders").await?;
        serves(world, "1").await?;
        let before = service_pods(world).await?;

        let broken = ("002_total.sql", "alter table purchase_order add column total integer;");
        apply_version(world, "2", &[TABLES, broken]).await?;
        let failed = world.says::<Microservice>("orders", "Migrated", "False", 90).await?;
        let failed = world
            .until("the condition names the file and the cause", Duration::from_mins(1), async || {
                let now = world.says::<Microservice>("orders", "Migrated", "False", 5).await?;
                let said = now.message.contains("002_total.sql") && now.message.contains("purchase_order");
                Ok(said.then_some(now))
            })
            .await
            .map_err(|error| error.context(format!("it said: {}: {}", failed.reason, failed.message)))?;
        ensure!(!failed.message.contains("postgres://"), "the message has a credential: {}", failed.message);
        serves(world, "1").await?;
        same("the service's pods", &before, &service_pods(world).await?)?;

        let corrected = ("002_total.sql", "create table purchase_order (total integer);");
        apply_version(world, "2", &[TABLES, corrected]).await?;
        world.ready::<Microservice>("orders").await?;
        world.until("version 2 serves", Duration::from_mins(1), async || Ok(serves(world, "2").await.ok())).await?;
        world.says::<Microservice>("orders", "Migrated", "True", 30).await?;
        let columns = "select column_name from information_schema.columns where table_name = 'purchase_order'";
        ensure!(world.psql("orders", columns).await? == ["total"], "the corrected migration was not applied");
        the_microservice_may_come_first(world, &[TABLES, corrected]).await
    })
    .await;
}

/// In one manifest the new version may come before its ConfigMap, without and with the name of the file that it needs.
async fn the_microservice_may_come_first(world: &Scenario, files: &[(&str, &str)]) -> Result<()> {
    let mut files = files.to_vec();
    for (version, file, last, pause) in [("3", "003_slow.sql", None, 0), ("4", "004_slow.sql", Some("004_slow.sql"), 6)]
    {
        files.push((file, "select pg_sleep(5);"));
        let mut orders = microservice("orders");
        orders["spec"]["env"] = json!([{"name": "VERSION", "value": version}]);
        if let Some(last) = last {
            orders["spec"]["database"]["migrations"]["last"] = json!(last);
        }
        world.apply(&orders).await?;
        // longer than a version waits that does not say what it needs
        tokio::time::sleep(Duration::from_secs(pause)).await;
        world.apply(&configmap("orders-migrations", &files)).await?;
        world.ready::<Microservice>("orders").await?;
        serves(world, version).await?;
        let pods = world.pods("orders", "service").await?.into_iter();
        let first = pods.filter_map(|pod| pod.metadata.creation_timestamp).map(|time| time.0).min();
        let first = first.context("no pods")?;
        let at =
            format!("select applied_at < '{first}'::timestamptz + '1 s' from weft.migration where name = '{file}'");
        ensure!(world.psql("orders", &at).await? == ["t"], "a pod of version {version} is older than {file}");
    }
    Ok(())
}

async fn apply_version(world: &Scenario, version: &str, files: &[(&str, &str)]) -> Result<()> {
    world.apply(&configmap("orders-migrations", files)).await?;
    let mut orders = microservice("orders");
    orders["spec"]["env"] = json!([{"name": "VERSION", "value": version}]);
    world.apply(&orders).await?;
    Ok(())
}

/// Every pod of the service, started or not, with its restarts.
async fn service_pods(world: &Scenario) -> Result<BTreeMap<String, i32>> {
    let pods = world.pods("orders", "service").await?.into_iter().map(|pod| {
        let statuses = pod.status.as_ref().and_then(|status| status.container_statuses.as_deref()).unwrap_or_default();
        (pod.name_any(), statuses.iter().map(|status| status.restart_count).sum())
    });
    Ok(pods.collect())
}

async fn serves(world: &Scenario, version: &str) -> Result<()> {
    let served = world.get_text("services/orders:8080", "/version").await?;
    ensure!(served == version, "version {served} serves, not {version}");
    Ok(())
}
