//! Everything runs where Pod Security `restricted` is enforced: operator, broker, services, databases, set-up, relay,
//! orchestrator.

use anyhow::{Result, ensure};
use k8s_openapi::api::core::v1::{Event, Namespace, Pod};
use kube::{Api, ResourceExt, api::ListParams};

use crate::harness::{Company, scenario};

#[tokio::test]
async fn restricted_namespace() {
    scenario("restricted_namespace", Company::Others, async |world| {
        let namespace = Api::<Namespace>::all(world.client.clone()).get(&world.namespace).await?;
        let level = namespace.labels().get("pod-security.kubernetes.io/enforce").map(String::as_str);
        ensure!(level == Some("restricted"), "the namespace enforces {level:?}");
        world.install_one_of_each().await?;
        every_part_runs(&world.api::<Pod>().list(&ListParams::default()).await?.items)?;
        for event in world.api::<Event>().list(&ListParams::default()).await? {
            let message = event.message.unwrap_or_default();
            ensure!(
                !message.contains("violates PodSecurity"),
                "{}: {message}",
                event.metadata.name.unwrap_or_default()
            );
        }
        Ok(())
    })
    .await;
}

fn every_part_runs(pods: &[Pod]) -> Result<()> {
    // the set-up has run, since everything is Ready, and its Job is gone
    for component in ["operator", "broker", "service", "database", "orchestrator"] {
        let there =
            pods.iter().any(|pod| pod.labels().get("app.kubernetes.io/component").is_some_and(|is| is == component));
        ensure!(there, "no pod of component {component} is there");
    }
    for pod in pods {
        let (name, spec) = (pod.name_any(), pod.spec.clone().unwrap_or_default());
        for container in spec.containers.iter().chain(spec.init_containers.iter().flatten()) {
            let security = container.security_context.clone().unwrap_or_default();
            ensure!(security.privileged != Some(true), "{name}/{} is privileged", container.name);
            // whether a service writes beside its volumes is the service's own affair
            let ours = container.name != "service";
            ensure!(
                !ours || security.read_only_root_filesystem == Some(true),
                "{name}/{} can write its root filesystem",
                container.name
            );
        }
    }
    Ok(())
}
