//! The sample system as its manifests are: an order's event goes from the outbox by relay and broker to the orchestrator,
//! which starts the saga of that order and no other.

use std::{fs, time::Duration};

use anyhow::{Context, Result, ensure};
use axum::http::Method;
use serde::Deserialize;
use serde_json::{Value, json};
use weft::api::v1alpha1::{Microservice, OutboxRelay, Saga};

use crate::harness::{Company, Release, Scenario, merged, root, same, scenario};

#[tokio::test]
async fn customers_and_orders() {
    scenario("customers_and_orders", Company::Others, async |world| {
        world.install(&Release { nats: true, ..world.release() }).await?;
        apply_sample(world).await?;
        for service in ["customers", "orders"] {
            world.ready::<Microservice>(service).await?;
            world.ready::<OutboxRelay>(service).await?;
        }
        world.ready::<Saga>("create-order").await?;

        let ada = json!({"name": "Ada", "creditLimit": 10_000});
        let ada = text(&post(world, "customers", &ada).await?, "id")?;
        let order = |customer: &str, total: i64| json!({"customerId": customer, "total": total});
        let unicorn = merged(&order(&ada, 2_000), &json!({"article": "unicorn"}));
        becomes(world, &order(&ada, 6_000), "APPROVED", None).await?;
        becomes(world, &unicorn, "REJECTED", Some("OUT_OF_STOCK")).await?;
        becomes(world, &order(&ada, 6_000), "REJECTED", Some("INSUFFICIENT_CREDIT")).await?;
        becomes(world, &order("nobody", 1_000), "REJECTED", Some("UNKNOWN_CUSTOMER")).await?;
        let ada: Value =
            serde_json::from_str(&world.get_text("services/customers:8080", &format!("/customers/{ada}")).await?)?;
        same("the credit that is reserved", &json!(6_000), &ada["reserved"])?;
        the_columns_tell(world).await
    })
    .await;
}

/// The manifests of `config/samples`, with the broker of this scenario.
async fn apply_sample(world: &Scenario) -> Result<()> {
    for file in fs::read_dir(root().join("config/samples/customers-and-orders"))? {
        let text = fs::read_to_string(file?.path())?.replace(".weft-system:", &format!(".{}:", world.namespace));
        for document in serde_yaml::Deserializer::from_str(&text) {
            let object = Value::deserialize(document)?;
            world.apply(&object).await.with_context(|| format!("applying {object}"))?;
        }
    }
    Ok(())
}

/// Posts to the collection that is called like the service.
async fn post(world: &Scenario, service: &str, body: &Value) -> Result<Value> {
    let (target, path) = (format!("services/{service}:8080"), format!("/{service}"));
    Ok(serde_json::from_str(&world.http(Method::POST, &target, &path, Some(body.clone())).await?.ok()?)?)
}

async fn becomes(world: &Scenario, order: &Value, state: &str, reason: Option<&str>) -> Result<()> {
    let id = text(&post(world, "orders", order).await?, "id")?;
    let decided = world
        .until(&format!("the order {order} is decided"), Duration::from_secs(30), async || {
            let text = world.get_text("services/orders:8080", &format!("/orders/{id}")).await?;
            let order: Value = serde_json::from_str(&text)?;
            Ok((order["state"] != "PENDING").then_some(order))
        })
        .await?;
    same(
        &format!("what becomes of {order}"),
        &(&json!(state), &json!(reason)),
        &(&decided["state"], &decided["reason"]),
    )
}

async fn the_columns_tell(world: &Scenario) -> Result<()> {
    world
        .until("the Saga and the relays count it", Duration::from_secs(30), async || {
            let saga = world.get::<Saga>("create-order").await?.and_then(|saga| saga.status).unwrap_or_default();
            let counts = (saga.completed, saga.compensated, saga.running, saga.stuck);
            ensure!(counts == (1, 3, 0, 0), "completed, compensated, running, stuck: {counts:?}");
            for (service, least) in [("customers", 3), ("orders", 8)] {
                let relay = world.get::<OutboxRelay>(service).await?.and_then(|relay| relay.status).unwrap_or_default();
                ensure!(relay.pending == 0 && relay.published >= least, "{service}: {relay:?}");
            }
            Ok(Some(()))
        })
        .await
}

fn text(object: &Value, key: &str) -> Result<String> {
    Ok(object[key].as_str().with_context(|| format!("no {key} in {object}"))?.to_owned())
}
