//! Without the operator every deletion ends by itself: a Microservice with `retention: Delete` takes its data with it, a Saga waits
//! for nobody, and a namespace goes.

use std::time::Duration;

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::{Namespace, PersistentVolumeClaim, Secret};
use kube::{
    Api, ResourceExt,
    api::{DeleteParams, ListParams},
};
use serde_json::json;
use weft::api::v1alpha1::{Microservice, Saga};

use crate::harness::{Company, Scenario, merged, microservice, saga, scenario};

#[tokio::test]
async fn uninstall_leaves_nothing_hanging() {
    scenario("uninstall_leaves_nothing_hanging", Company::Others, async |world| {
        world.install(&world.release()).await?;
        let forgotten = json!({"spec": {"database": {"retention": "Delete"}}});
        for name in ["first", "second"] {
            world.apply_service(&merged(&microservice(name), &forgotten)).await?;
        }
        for name in ["first", "second"] {
            world.ready::<Microservice>(name).await?;
        }
        ensure!(!left_of(world, "first").await?.is_empty(), "the first has neither Secrets nor a claim");
        world.apply(&saga("trip", "first", "second")).await?;
        world.says::<Saga>("trip", "Accepted", "True", 30).await?;
        world
            .until("the Saga has its finalizer", Duration::from_secs(30), async || {
                let saga = world.get::<Saga>("trip").await?;
                Ok(saga.is_some_and(|saga| !saga.finalizers().is_empty()).then_some(()))
            })
            .await?;
        world.uninstall().await?;

        world.delete::<Microservice>("first").await?;
        world
            .until("nothing of the data of the first is left", Duration::from_mins(2), async || {
                Ok(left_of(world, "first").await?.is_empty().then_some(()))
            })
            .await?;

        let namespaces: Api<Namespace> = Api::all(world.client.clone());
        namespaces.delete(&world.namespace, &DeleteParams::default()).await?;
        world
            .until("the namespace is gone, and the second with it", Duration::from_mins(3), async || {
                Ok(namespaces.get_opt(&world.namespace).await?.is_none().then_some(()))
            })
            .await
    })
    .await;
}

/// The Secrets and claims of a service.
async fn left_of(world: &Scenario, owner: &str) -> Result<Vec<String>> {
    let all = ListParams::default().labels(&format!("weft.dev/owner={owner}"));
    let secrets = world.api::<Secret>().list(&all).await?;
    let claims = world.api::<PersistentVolumeClaim>().list(&all).await?;
    Ok(secrets.iter().map(ResourceExt::name_any).chain(claims.iter().map(ResourceExt::name_any)).collect())
}
