//! A service in the database of another has roles, a schema and the reads that it names, no pod of its own, and both say so. The
//! server outlives the service that it was made for.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weft::api::v1alpha1::{Microservice, OutboxRelay};

use crate::harness::{Company, Release, Scenario, microservice, relay, scenario};

#[tokio::test]
async fn shared_database_is_visible() {
    scenario("shared_database_is_visible", Company::Others, async |world| {
        world.install(&Release { nats: true, ..world.release() }).await?;
        let mut reports = microservice("reports");
        reports["spec"]["database"]["postgres"] = Value::Null;
        reports["spec"]["database"]["sharedWith"] =
            json!({"service": "orders", "schema": "reports", "reads": ["switch"]});
        world.apply_service(&reports).await?;
        let missing = world.says::<Microservice>("reports", "DatabaseReady", "False", 60).await?;
        ensure!(missing.message.contains("there is no Microservice `orders`"), "{}", missing.message);

        for service in ["orders", "customers"] {
            world.apply_service(&microservice(service)).await?;
        }
        for service in ["orders", "customers", "reports"] {
            world.ready::<Microservice>(service).await?;
        }
        let theirs = world.says::<Microservice>("reports", "SharedDatabase", "True", 10).await?;
        ensure!(theirs.message.contains("schema reports of the database of `orders`"), "{}", theirs.message);
        let hosts = world.says::<Microservice>("orders", "SharedDatabase", "True", 10).await?;
        ensure!(hosts.message.contains("`reports`"), "{}", hosts.message);
        ensure!(world.pods("reports", "database").await?.is_empty(), "no pod of its own");

        world.service_says("reports", &["connect", "orders-db:5432"], "connected").await?;
        let stranger = world.in_service("customers", &["connect", "orders-db:5432"]).await?;
        ensure!(stranger != "connected", "customers reached the database of orders");
        world.service_says("reports", &["log-in"], "entered").await?;
        may(world, "switch", true).await?;
        may(world, "weft.outbox", false).await?;

        world.apply(&relay("reports", "LogTailing")).await?;
        world.ready::<OutboxRelay>("reports").await?;
        circle(world).await?;

        world.delete::<Microservice>("orders").await?;
        world
            .until("the service of orders is gone", Duration::from_secs(90), async || {
                Ok(world.pods("orders", "service").await?.is_empty().then_some(()))
            })
            .await?;
        world.service_says("reports", &["log-in"], "entered").await?;
        ensure!(!world.pods("orders", "database").await?.is_empty(), "the server of orders went with it");
        world
            .until("the missing host is said", Duration::from_secs(30), async || {
                let said = world.now_says::<Microservice>("reports", "DatabaseReady").await?;
                Ok(said.message.contains("is deleted").then_some(()))
            })
            .await?;
        world.apply_service(&microservice("orders")).await?;
        world.ready::<Microservice>("orders").await?;
        world.ready::<Microservice>("reports").await
    })
    .await;
}

async fn may(world: &Scenario, table: &str, expected: bool) -> Result<()> {
    let sql = format!("select has_table_privilege('reports_app', '{table}', 'select')");
    let said = world.psql("orders", &sql).await?;
    ensure!(said == [if expected { "t" } else { "f" }], "reports may read {table}: {said:?}");
    Ok(())
}

/// Neither of two services that name each other has a server.
async fn circle(world: &Scenario) -> Result<()> {
    let mut sales = microservice("sales");
    sales["spec"]["database"]["postgres"] = Value::Null;
    sales["spec"]["database"]["sharedWith"] = json!({"service": "reports", "schema": "sales"});
    world.apply_service(&sales).await?;
    let refused = world.says::<Microservice>("sales", "Accepted", "False", 60).await?;
    ensure!(
        refused.message.contains("`reports` has no server of its own, it is in that of `orders`"),
        "{}",
        refused.message
    );
    world.delete::<Microservice>("sales").await
}
