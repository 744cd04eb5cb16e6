//! Taking the operator away leaves what it made: services serve, data stay. Installed again, it adopts all of it and
//! restarts nothing.

use anyhow::{Result, ensure};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Api;
use weft::api::v1alpha1::{Microservice, Saga};

use crate::harness::{Company, Scenario, microservice, saga, same, scenario};

#[tokio::test]
async fn uninstall_keeps_data() {
    scenario("uninstall_keeps_data", Company::Others, async |world| {
        world.install(&world.release()).await?;
        for service in ["stock", "travel"] {
            world.apply_service(&microservice(service)).await?;
        }
        world.apply(&saga("trip", "stock", "travel")).await?;
        for service in ["stock", "travel"] {
            world.ready::<Microservice>(service).await?;
        }
        world.ready::<Saga>("trip").await?;
        world.psql("stock", "insert into switch values ('kept')").await?;
        let before = world.operands().await?;

        world.uninstall().await?;
        all_is_there(world).await?;
        same("the pods", &before, &world.operands().await?)?;

        world.install(&world.release()).await?;
        world.apply_service(&microservice("later")).await?;
        world.ready::<Microservice>("later").await?;
        all_is_there(world).await?;
        let mut after = world.operands().await?;
        after.retain(|pod, _| !pod.starts_with("later"));
        same("the pods", &before, &after)
    })
    .await;
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
