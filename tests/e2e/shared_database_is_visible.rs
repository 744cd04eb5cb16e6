//! A service in the database of another has roles, a schema and the reads that it names, no pod of its own, and both say so.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use weft::api::v1alpha1::Microservice;

use crate::harness::{Company, Scenario, microservice, scenario};

#[tokio::test]
async fn shared_database_is_visible() {
    scenario("shared_database_is_visible", Company::Others, async |world| {
        world.install(&world.release()).await?;
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
        Ok(())
    })
    .await;
}

async fn may(world: &Scenario, table: &str, expected: bool) -> Result<()> {
    let sql = format!("select has_table_privilege('reports_app', '{table}', 'select')");
    let said = world.psql("orders", &sql).await?;
    ensure!(said == [if expected { "t" } else { "f" }], "reports may read {table}: {said:?}");
    Ok(())
}
