//! Deleting a Microservice keeps its volume and Secrets; applying it again adopts them. `retention: Delete` does not.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret};
use kube::{ResourceExt, api::ListParams};
use serde_json::json;
use weft::api::v1alpha1::Microservice;

use crate::harness::{Company, Scenario, microservice, same, scenario};

#[tokio::test]
async fn data_outlives_deletion() {
    scenario("data_outlives_deletion", Company::Others, async |world| {
        world.install(&world.release()).await?;
        let mut forgotten = microservice("forgotten");
        forgotten["spec"]["database"]["retention"] = json!("Delete");
        for object in [&microservice("orders"), &forgotten] {
            world.apply_service(object).await?;
        }
        for name in ["orders", "forgotten"] {
            world.ready::<Microservice>(name).await?;
        }
        for name in ["orders", "forgotten"] {
            world.psql(name, "insert into switch values ('written before')").await?;
        }
        let secrets = secrets(world, "orders").await?;
        ensure!(secrets.len() >= 2, "orders has only these Secrets: {:?}", secrets.keys());

        // whoever applies it again right away begins anew
        world.delete::<Microservice>("forgotten").await?;
        world.apply_service(&forgotten).await?;
        world.ready::<Microservice>("forgotten").await?;
        let rows = world.psql("forgotten", "select name from switch").await?;
        same("what is in the database of forgotten", &Vec::<String>::new(), &rows)?;

        for name in ["orders", "forgotten"] {
            world.delete::<Microservice>(name).await?;
        }
        for name in ["orders", "forgotten"] {
            let what = format!("no pod of {name} is left");
            world.until(&what, Duration::from_secs(90), async || no_pods(world, name).await).await?;
        }
        ensure!(volumes(world, "orders").await?.len() == 1, "the volume of orders is gone");
        same("the Secrets of orders", &secrets, &self::secrets(world, "orders").await?)?;
        world
            .until("nothing of the data of forgotten is left", Duration::from_mins(1), async || {
                let left = (volumes(world, "forgotten").await?, self::secrets(world, "forgotten").await?);
                Ok((left.0.is_empty() && left.1.is_empty()).then_some(()))
            })
            .await?;

        world.apply_service(&microservice("orders")).await?;
        world.ready::<Microservice>("orders").await?;
        let rows = world.psql("orders", "select name from switch").await?;
        same("what is in the database", &vec!["written before".to_owned()], &rows)?;
        same("the Secrets of orders", &secrets, &self::secrets(world, "orders").await?)?;
        world.service_says("orders", &["log-in"], "entered").await
    })
    .await;
}

async fn no_pods(world: &Scenario, owner: &str) -> Result<Option<()>> {
    for component in ["service", "database", "database-setup"] {
        let labels = format!("app.kubernetes.io/instance={owner},app.kubernetes.io/component={component}");
        let pods = world.api::<Pod>().list(&ListParams::default().labels(&labels)).await?;
        if !pods.items.is_empty() {
            return Ok(None);
        }
    }
    Ok(Some(()))
}

async fn volumes(world: &Scenario, owner: &str) -> Result<Vec<String>> {
    let all = world.api::<PersistentVolumeClaim>().list(&ListParams::default()).await?;
    Ok(all.iter().map(ResourceExt::name_any).filter(|name| name.contains(&format!("{owner}-db"))).collect())
}

/// Names and content of the Secrets.
async fn secrets(world: &Scenario, owner: &str) -> Result<BTreeMap<String, String>> {
    let all = world.api::<Secret>().list(&ListParams::default()).await?;
    let own = all.items.into_iter().filter(|secret| secret.name_any().starts_with(&format!("{owner}-db")));
    Ok(own.map(|secret| (secret.name_any(), format!("{:?}", secret.data))).collect())
}
