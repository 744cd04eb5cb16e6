//! A PostgreSQL server of somebody else's, by its Secret: set-up, service and relay work on it, and what is wrong with it is said.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::batch::v1::Job;
use kube::{
    ResourceExt,
    api::{DeleteParams, ListParams},
};
use serde_json::{Value, json};
use weft::api::v1alpha1::{Microservice, OutboxRelay};

use crate::harness::{Company, Release, Scenario, microservice, relay, scenario};

/// The Microservice whose server plays the part of somebody else's.
const ELSEWHERE: &str = "elsewhere";

#[tokio::test]
async fn external_database() {
    scenario("external_database", Company::Others, async |world| {
        world.install(&Release { nats: true, ..world.release() }).await?;
        world.apply_service(&microservice(ELSEWHERE)).await?;
        world.ready::<Microservice>(ELSEWHERE).await?;
        open(world).await?;
        world.psql(ELSEWHERE, "create role dba superuser login password 'dba'").await?;
        world.psql(ELSEWHERE, "create database shop").await?;
        world.apply(&secret(world, None)).await.context("the Secret without a port")?;
        let mut orders = microservice("orders");
        orders["spec"]["database"]["postgres"] = Value::Null;
        orders["spec"]["database"]["external"] = json!({"secret": "production"});
        world.apply_service(&orders).await?;
        world
            .until("the missing key is named", Duration::from_mins(3), async || {
                let said = world.now_says::<Microservice>("orders", "Migrated").await?;
                Ok(said.message.contains("has no `port`").then_some(()))
            })
            .await?;
        world.apply(&secret(world, Some("5432"))).await?;
        // a container that has failed is started again with growing pauses; a new Job starts at once
        let jobs = ListParams::default().labels("weft.dev/owner=orders,weft.dev/component=database-setup");
        for job in world.api::<Job>().list(&jobs).await? {
            world.api::<Job>().delete(&job.name_any(), &DeleteParams::background()).await?;
        }
        world.ready::<Microservice>("orders").await?;
        world.apply(&relay("orders", "LogTailing")).await?;
        world.ready::<OutboxRelay>("orders").await?;
        world.service_says("orders", &["log-in"], "entered").await?;
        let roles =
            world.psql(ELSEWHERE, "select rolname from pg_roles where rolname ~ '^weft_.*_shop$' order by 1").await?;
        ensure!(roles == ["weft_migrator_shop", "weft_owner_shop", "weft_relay_shop"], "{roles:?}");
        ensure!(world.pods("orders", "database").await?.is_empty(), "no server of its own");
        Ok(())
    })
    .await;
}

/// Somebody else's server has no NetworkPolicy of Weft's.
async fn open(world: &Scenario) -> Result<()> {
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "open"},
        "spec": {
            "podSelector": {"matchLabels": {"weft.dev/owner": ELSEWHERE, "weft.dev/component": "database"}},
            "policyTypes": ["Ingress"], "ingress": [{}],
        },
    });
    world.apply(&policy).await?;
    Ok(())
}

fn secret(world: &Scenario, port: Option<&str>) -> Value {
    let host = format!("{ELSEWHERE}-db.{}.svc", world.namespace);
    let uri = format!("postgresql://shop:shop-secret@{host}:5432/shop");
    let mut keys = json!({
        "type": "postgresql", "host": host, "database": "shop", "username": "shop", "password": "shop-secret",
        "uri": uri, "admin-username": "dba", "admin-password": "dba",
    });
    if let Some(port) = port {
        keys["port"] = json!(port);
    }
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "production"}, "stringData": keys})
}
