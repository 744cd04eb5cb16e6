//! A Secret that somebody deleted is made again, and the server, its roles and the pods get the new password by themselves.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret};
use kube::{
    ResourceExt,
    api::{DeleteParams, ListParams},
};
use weft::api::v1alpha1::{Microservice, OutboxRelay};

use crate::harness::{Company, Release, Scenario, microservice, progress, relay, scenario};

#[tokio::test]
async fn secrets_heal() {
    scenario("secrets_heal", Company::Others, async |world| {
        world.install(&Release { nats: true, ..world.release() }).await?;
        world.apply_service(&microservice("orders")).await?;
        world.apply(&relay("orders", "LogTailing")).await?;
        world.ready::<Microservice>("orders").await?;
        world.ready::<OutboxRelay>("orders").await?;
        no_label_invites_a_pruner(world).await?;
        world.psql("orders", "insert into switch values ('kept')").await?;
        for (secret, component) in
            [("orders-db", "service"), ("orders-db-relay", "service"), ("orders-db-admin", "database")]
        {
            heals(world, secret, component).await?;
        }
        ensure!(world.psql("orders", "select name from switch").await? == ["kept"], "the data are gone");
        Ok(())
    })
    .await;
}

/// Deletes the Secret and a pod that needs it, as a node that fails would.
async fn heals(world: &Scenario, secret: &str, component: &str) -> Result<()> {
    let uid = async || Ok::<_, anyhow::Error>(world.get::<Secret>(secret).await?.and_then(|secret| secret.uid()));
    let before = uid().await?.with_context(|| format!("there is no Secret {secret}"))?;
    world.delete::<Secret>(secret).await?;
    for pod in world.pods("orders", component).await? {
        world.api::<Pod>().delete(&pod.name_any(), &DeleteParams::default()).await?;
    }
    world
        .until(&format!("Secret {secret} is there again"), Duration::from_mins(1), async || {
            Ok(uid().await?.filter(|now| *now != before))
        })
        .await?;
    world.ready::<Microservice>("orders").await?;
    world.ready::<OutboxRelay>("orders").await?;
    world.service_says("orders", &["log-in"], "entered").await?;
    progress(&format!("{secret}: healed"));
    Ok(())
}

/// What outlives its owner has no label by which a GitOps tool tracks what it applied.
async fn no_label_invites_a_pruner(world: &Scenario) -> Result<()> {
    let all = ListParams::default().labels("weft.dev/owner=orders");
    let secrets = world.api::<Secret>().list(&all).await?;
    let claims = world.api::<PersistentVolumeClaim>().list(&all).await?;
    ensure!(secrets.items.len() == 3 && claims.items.len() == 1, "orders has not three Secrets and one claim");
    let labels = secrets.iter().map(ResourceExt::labels).chain(claims.iter().map(ResourceExt::labels));
    let strange: Vec<_> = labels.flat_map(|labels| labels.keys()).filter(|key| !key.starts_with("weft.dev/")).collect();
    ensure!(strange.is_empty(), "what outlives its owner is labelled {strange:?}");
    Ok(())
}
