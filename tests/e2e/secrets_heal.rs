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
        let credentials = no_label_invites_a_pruner(world).await?;
        world.psql("orders", "insert into switch values ('kept')").await?;
        for (secret, component) in [
            ("orders-db", "service"),
            ("orders-db-relay", "service"),
            ("orders-db-admin", "database"),
            (&credentials, "service"),
        ] {
            heals(world, secret, component).await?;
        }
        ensure!(world.psql("orders", "select name from switch").await? == ["kept"], "the data are gone");
        the_keys_of_the_broker_heal(world).await
    })
    .await;
}

/// With the same keys: the credentials of a relay stay valid.
async fn the_keys_of_the_broker_heal(world: &Scenario) -> Result<()> {
    let seed = async || {
        let secret = world.get::<Secret>("weft-nats").await?;
        Ok::<_, anyhow::Error>(secret.and_then(|secret| secret.data?.remove("seed")).map(|seed| seed.0))
    };
    let before = seed().await?.context("there are no keys of the broker")?;
    world.delete::<Secret>("weft-nats").await?;
    world.api::<Pod>().delete("weft-nats-0", &DeleteParams::default()).await?;
    let again = world.until("the keys are there again", Duration::from_mins(1), seed).await?;
    ensure!(again == before, "the broker has other keys than before");
    world
        .psql(
            "orders",
            "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) values ('a', '1', 'T', '{}')",
        )
        .await?;
    world
        .until("the relay publishes to the broker that started again", Duration::from_mins(2), async || {
            Ok(world.psql("orders", "select 1 from weft.outbox").await?.is_empty().then_some(()))
        })
        .await
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

/// What outlives its owner has no label by which a GitOps tool tracks what it applied. Name of the Secret with the broker's
/// credentials.
async fn no_label_invites_a_pruner(world: &Scenario) -> Result<String> {
    let all = ListParams::default().labels("weft.dev/owner=orders");
    let secrets = world.api::<Secret>().list(&all).await?;
    let claims = world.api::<PersistentVolumeClaim>().list(&all).await?;
    let names: Vec<_> = secrets.iter().map(ResourceExt::name_any).collect();
    ensure!(names.len() == 4 && claims.items.len() == 1, "orders has the Secrets {names:?} and not one claim");
    let labels = secrets.iter().map(ResourceExt::labels).chain(claims.iter().map(ResourceExt::labels));
    let strange: Vec<_> = labels.flat_map(|labels| labels.keys()).filter(|key| !key.starts_with("weft.dev/")).collect();
    ensure!(strange.is_empty(), "what outlives its owner is labelled {strange:?}");
    names.into_iter().find(|name| name.contains("-broker-")).context("no credentials of the broker")
}
