//! What people do wrong, and what breaks by itself, is said in a condition in words, and goes away by itself once mended.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::PersistentVolume;
use kube::{Api, api::DeleteParams};
use serde_json::{Value, json};
use weft::api::v1alpha1::{Microservice, OutboxRelay};

use crate::harness::{Company, Release, Scenario, cluster_tool, merged, microservice, progress, relay, scenario};

#[tokio::test]
async fn what_is_wrong_is_said() {
    scenario("what_is_wrong_is_said", Company::Others, async |world| {
        world.install(&Release { nats: true, ..world.release() }).await?;
        let small = SmallVolume::make(world, "full").await?;
        let outcome = tokio::try_join!(
            an_image_that_crashes(world),
            a_secret_that_a_variable_needs(world),
            a_secret_that_a_volume_needs(world),
            a_broker_that_is_not_there(world),
            Box::pin(a_volume_that_is_full(world, &small)),
        );
        small.remove(world).await?;
        outcome.map(drop)
    })
    .await;
}

/// Waits until `Ready` is false for this reason, with all of `words` in its message.
async fn says(world: &Scenario, name: &str, reason: &str, words: &[&str]) -> Result<()> {
    let condition = world
        .until(&format!("{name} says {reason}"), Duration::from_secs(90), async || {
            let now = world.says::<Microservice>(name, "Ready", "False", 1).await?;
            ensure!(now.reason == reason, "it says {}: {}", now.reason, now.message);
            Ok(Some(now))
        })
        .await?;
    let missing: Vec<_> = words.iter().filter(|word| !condition.message.contains(**word)).collect();
    ensure!(missing.is_empty(), "the message of {name} lacks {missing:?}: {}", condition.message);
    progress(&format!("{name}: {reason}: {}", condition.message));
    Ok(())
}

/// Without a database: less to wait for.
fn stateless(name: &str, spec: &Value) -> Value {
    let bare = merged(&microservice(name), &json!({"spec": {"database": null}}));
    merged(&bare, &json!({"spec": spec}))
}

fn secret(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {"key": "value"}})
}

async fn an_image_that_crashes(world: &Scenario) -> Result<()> {
    world.apply(&stateless("crashing", &json!({"args": ["srve"]}))).await?;
    says(world, "crashing", "CrashLooping", &["exit code 2", "kubectl logs", "--previous"]).await?;
    world.apply(&stateless("crashing", &json!({}))).await?;
    world.ready::<Microservice>("crashing").await
}

async fn a_secret_that_a_variable_needs(world: &Scenario) -> Result<()> {
    let key = json!({"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "payment", "key": "key"}}});
    world.apply(&stateless("paying", &json!({"env": [key]}))).await?;
    says(world, "paying", "SecretMissing", &["\"payment\" not found"]).await?;
    world.apply(&secret("payment")).await?;
    world.ready::<Microservice>("paying").await
}

async fn a_secret_that_a_volume_needs(world: &Scenario) -> Result<()> {
    let pod = json!({"spec": {
        "volumes": [{"name": "tls", "secret": {"secretName": "certificate"}}],
        "containers": [{"name": "service", "volumeMounts": [{"name": "tls", "mountPath": "/tls"}]}],
    }});
    world.apply(&stateless("secured", &json!({"podTemplate": pod}))).await?;
    says(world, "secured", "SecretMissing", &["waits for a volume", "\"certificate\" not found"]).await?;
    world.apply(&secret("certificate")).await?;
    // the kubelet's pauses between its attempts grow to two minutes
    world.ready::<Microservice>("secured").await
}

/// Mended by pointing the relay at the broker; then it is paused, which must not take until the kubelet's next sync.
async fn a_broker_that_is_not_there(world: &Scenario) -> Result<()> {
    world.apply_service(&microservice("orders")).await?;
    let good = relay("orders", "Polling");
    let nats = json!({"spec": {"sink": {"nats": {"servers": ["nats://broker:4222"]}}}});
    world.apply(&merged(&good, &nats)).await?;
    world
        .until("the relay says that it does not reach the broker", Duration::from_secs(90), async || {
            let now = world.says::<OutboxRelay>("orders", "Ready", "False", 1).await?;
            ensure!(now.reason == "BrokerUnreachable", "it says {}: {}", now.reason, now.message);
            ensure!(now.message.contains("broker:4222"), "{}", now.message);
            progress(&format!("orders: {}: {}", now.reason, now.message));
            Ok(Some(()))
        })
        .await?;
    world.apply(&good).await?;
    world.ready::<OutboxRelay>("orders").await?;
    let paused = Instant::now();
    world.apply(&merged(&good, &json!({"spec": {"paused": true}}))).await?;
    world
        .promptly("the relay is paused", Duration::from_secs(25), async || {
            let now = world.says::<OutboxRelay>("orders", "Ready", "True", 1).await?;
            ensure!(now.reason == "Paused", "it says {}: {}", now.reason, now.message);
            Ok(Some(()))
        })
        .await?;
    progress(&format!("orders: paused after {} ms", paused.elapsed().as_millis()));
    Ok(())
}

async fn a_volume_that_is_full(world: &Scenario, small: &SmallVolume) -> Result<()> {
    let storage = json!({"storage": {"className": world.namespace}});
    let full = merged(&microservice("full"), &json!({"spec": {"database": {"postgres": storage}}}));
    world.apply_service(&full).await?;
    world.ready::<Microservice>("full").await?;
    small.shell("dd if=/dev/zero of=$0/filler bs=64k 2>/dev/null || :").await?;
    // the server goes on until it needs one more file for its log
    let filling = async {
        loop {
            for sql in ["select pg_logical_emit_message(false, 'e2e', 'x')", "select pg_switch_wal()"] {
                let _ = world.psql("full", sql).await;
            }
        }
    };
    tokio::select! {
        said = says(world, "full", "VolumeFull", &["full-db-0", "No space left on device", "make room"]) => said?,
        () = filling => {}
    }
    small.shell("rm $0/filler").await?;
    world.ready::<Microservice>("full").await
}

/// A volume that can be filled without filling the machine: memory of the node, for the database of one service.
struct SmallVolume {
    path: String,
    name: String,
}

impl SmallVolume {
    async fn make(world: &Scenario, service: &str) -> Result<Self> {
        let name = world.namespace.clone();
        let small = Self { path: format!("/dev/shm/{name}"), name };
        small.shell("mkdir -p $0 && mount -t tmpfs -o size=192m,uid=999,gid=999,mode=0700 weft-e2e $0").await?;
        let volume = json!({
            "apiVersion": "v1", "kind": "PersistentVolume",
            "metadata": {"name": small.name},
            "spec": {
                "capacity": {"storage": "64Mi"},
                "accessModes": ["ReadWriteOnce"],
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": small.name,
                "hostPath": {"path": small.path},
                "claimRef": {"namespace": small.name, "name": format!("data-{service}-db-0")},
            },
        });
        let volume: PersistentVolume = serde_json::from_value(volume)?;
        let created = Api::all(world.client.clone()).create(&kube::api::PostParams::default(), &volume).await;
        created.context("making a small volume")?;
        Ok(small)
    }

    /// Runs a script in the node; `$0` is the volume.
    async fn shell(&self, script: &str) -> Result<()> {
        cluster_tool(&["exec-node", "sh", "-c", script, &self.path]).await.map(drop)
    }

    async fn remove(&self, world: &Scenario) -> Result<()> {
        let volumes = Api::<PersistentVolume>::all(world.client.clone());
        volumes.delete(&self.name, &DeleteParams::background()).await?;
        self.shell("umount -l $0 && rmdir $0").await
    }
}
