//! Taking the operator away leaves what it made: services serve, data stay. Installed again, it adopts all of it and
//! restarts nothing.

use anyhow::{Result, ensure};
use k8s_openapi::{
    api::core::v1::PersistentVolumeClaim,
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{Api, ResourceExt, api::ListParams};
use weft::api::v1alpha1::{Microservice, OutboxRelay};

use crate::harness::{Company, Release, Scenario, microservice, same, scenario};

#[tokio::test]
async fn uninstall_keeps_data() {
    scenario("uninstall_keeps_data", Company::Others, async |world| {
        world.install_one_of_each().await?;
        world.psql("stock", "insert into switch values ('kept')").await?;
        let before = world.operands().await?;

        let events = claims_of_the_broker(world).await?;
        ensure!(!events.is_empty(), "the broker has no volume");

        world.uninstall().await?;
        all_is_there(world).await?;
        same("the claims of the broker's volumes", &events, &claims_of_the_broker(world).await?)?;
        same("the pods", &before, &world.operands().await?)?;

        world.install(&Release { nats: true, ..world.release() }).await?;
        world.apply_service(&microservice("later")).await?;
        world.ready::<Microservice>("later").await?;
        world.ready::<OutboxRelay>("stock").await?;
        same("the claims of the broker's volumes", &events, &claims_of_the_broker(world).await?)?;
        all_is_there(world).await?;
        let mut after = world.operands().await?;
        after.retain(|pod, _| !pod.starts_with("later"));
        same("the pods", &before, &after)
    })
    .await;
}

/// With their uids: a claim that is made anew has an empty volume.
async fn claims_of_the_broker(world: &Scenario) -> Result<Vec<Option<String>>> {
    let claims = world.api::<PersistentVolumeClaim>().list(&ListParams::default()).await?;
    Ok(claims.into_iter().filter(|claim| claim.name_any().contains("nats")).map(|claim| claim.uid()).collect())
}

async fn all_is_there(world: &Scenario) -> Result<()> {
    for service in ["stock", "travel"] {
        world.get_text(&format!("services/{service}:8080"), "/healthz").await?;
        ensure!(world.get::<Microservice>(service).await?.is_some(), "Microservice {service} is gone");
    }
    ensure!(world.psql("stock", "select name from switch").await? == ["kept"], "the row is gone");
    let definitions: Api<CustomResourceDefinition> = Api::all(world.client.clone());
    ensure!(definitions.get_opt("microservices.weft.dev").await?.is_some(), "the definitions are gone");
    Ok(())
}
