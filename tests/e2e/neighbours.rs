//! Weft beside what other people have in a namespace: policies that deny by default, quotas and limits, policies that change what
//! is written, and an autoscaler that knows nothing of Weft.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use jiff::Timestamp;
use k8s_openapi::api::{
    admissionregistration::v1beta1::{MutatingAdmissionPolicy, MutatingAdmissionPolicyBinding},
    apps::v1::Deployment,
    autoscaling::v2::HorizontalPodAutoscaler,
    batch::v1::Job,
};
use kube::{
    Api,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde_json::{Value, json};
use weft::api::v1alpha1::{Microservice, OutboxRelay, Saga};

use crate::harness::{Company, Release, SERVICE_IMAGE, Scenario, merged, microservice, relay, saga, scenario};

#[tokio::test]
async fn neighbours() {
    scenario("neighbours", Company::Others, async |world| {
        world.install(&Release { nats: true, ..world.release() }).await?;
        for object in [default_deny(), quota(), limits()] {
            world.apply(&object).await?;
        }
        everything_works(world).await.context("with default-deny, a quota and limits")?;
        a_policy_that_adds_something_leads_to_nothing(world).await.context("with a policy that adds a label")?;
        a_policy_that_rewrites_is_named(world).await.context("with a policy that rewrites a field of Weft's")?;
        an_autoscaler_of_others_is_named(world).await.context("with somebody's autoscaler")?;
        with_autoscaling_nobody_else_writes(world).await.context("with spec.autoscaling")
    })
    .await;
}

fn default_deny() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "default-deny"},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"]},
    })
}

/// It admits no container without requests and limits.
fn quota() -> Value {
    let hard = json!({"requests.cpu": "8", "requests.memory": "8Gi", "limits.cpu": "64", "limits.memory": "32Gi"});
    json!({
        "apiVersion": "v1", "kind": "ResourceQuota",
        "metadata": {"name": "small"},
        "spec": {"hard": hard},
    })
}

fn limits() -> Value {
    let container =
        json!({"type": "Container", "max": {"cpu": "4", "memory": "2Gi"}, "min": {"cpu": "1m", "memory": "1Mi"}});
    json!({"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "sane"}, "spec": {"limits": [container]}})
}

/// A service whose own container fits the quota; that of the database is as Weft makes it.
fn service(name: &str) -> Value {
    let resources = json!({"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "1", "memory": "128Mi"}});
    let spec = json!({"resources": resources, "database": {"postgres": {"resources": null}}});
    merged(&microservice(name), &json!({"spec": spec}))
}

async fn everything_works(world: &Scenario) -> Result<()> {
    for name in ["stock", "travel"] {
        world.apply_service(&service(name)).await?;
    }
    world.apply(&relay("stock", "LogTailing")).await?;
    world.apply(&saga("trip", "stock", "travel")).await?;
    for name in ["stock", "travel"] {
        world.ready::<Microservice>(name).await?;
    }
    // the operator has read their status
    world.ready::<OutboxRelay>("stock").await?;
    world.ready::<Saga>("trip").await?;
    let answer = world.in_service("stock", &["connect", "travel:8080"]).await?;
    ensure!(answer != "connected", "Weft's policies opened a service that the namespace had closed");
    world.apply(&starter(&world.namespace)).await?;
    world
        .until("a saga is accepted and has called both services", Duration::from_mins(2), async || {
            let job: Option<Job> = world.get("starter").await?;
            let started = job.and_then(|job| job.status).is_some_and(|status| status.succeeded == Some(1));
            let status = world.get::<Saga>("trip").await?.and_then(|saga| saga.status).unwrap_or_default();
            Ok((started && status.completed == 1).then_some(()))
        })
        .await
}

fn starter(namespace: &str) -> Value {
    let url = format!("http://default-orchestrator.{namespace}:8080");
    let container = json!({
        "name": "starter",
        "image": SERVICE_IMAGE,
        "command": ["/usr/bin/weft-e2e", "start-sagas", "--url", url, "--saga", "trip", "--count", "1",
            "--refuse-every", "10", "--rate", "1"],
        "resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "1", "memory": "128Mi"}},
        "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
    });
    let pod = json!({
        "restartPolicy": "OnFailure",
        "automountServiceAccountToken": false,
        "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    });
    json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "starter"}, "spec": {"template": {"spec": pod}}})
}

/// What the policies of this scenario are about.
async fn travel(world: &Scenario) -> Result<Value> {
    let deployment = world.get::<Deployment>("travel").await?.context("no Deployment")?;
    Ok(serde_json::to_value(deployment)?)
}

/// A policy of somebody's that changes the Deployment `travel` whenever it is written. In force once a write that is only tried
/// shows it: `path` has `value` then.
struct Policy<'a> {
    world: &'a Scenario,
    name: String,
}

impl<'a> Policy<'a> {
    async fn start(world: &'a Scenario, op: &str, path: &str, value: &str) -> Result<Self> {
        let name = format!("{}-{op}", world.namespace);
        let rule = json!({"apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["CREATE", "UPDATE"], "resources": ["deployments"]});
        let patch = format!("[JSONPatch{{op: '{op}', path: '{path}', value: '{value}'}}]");
        let policy = json!({"metadata": {"name": name}, "spec": {
            "failurePolicy": "Fail",
            "reinvocationPolicy": "Never",
            "matchConstraints": {"resourceRules": [rule]},
            "matchConditions": [{"name": "travel", "expression": "object.metadata.name == 'travel'"}],
            "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": patch}}],
        }});
        let here = json!({"matchLabels": {"kubernetes.io/metadata.name": world.namespace}});
        let binding = json!({"metadata": {"name": name}, "spec": {"policyName": name, "matchResources": {"namespaceSelector": here}}});
        let (policies, bindings) = Self::apis(world);
        policies
            .create(&PostParams::default(), &serde_json::from_value(policy)?)
            .await
            .context("the cluster has no MutatingAdmissionPolicy (admissionregistration.k8s.io/v1beta1)")?;
        bindings.create(&PostParams::default(), &serde_json::from_value(binding)?).await?;
        world
            .until("the policy is in force", Duration::from_secs(30), async || {
                let tried = PatchParams { dry_run: true, ..PatchParams::default() };
                let change = Patch::Merge(json!({"metadata": {"annotations": {"e2e.example/tried": "yes"}}}));
                let answer = world.api::<Deployment>().patch("travel", &tried, &change).await?;
                Ok((serde_json::to_value(answer)?.pointer(path) == Some(&json!(value))).then_some(()))
            })
            .await?;
        Ok(Self { world, name })
    }

    async fn end(self) -> Result<()> {
        let (policies, bindings) = Self::apis(self.world);
        bindings.delete(&self.name, &DeleteParams::default()).await?;
        policies.delete(&self.name, &DeleteParams::default()).await?;
        Ok(())
    }

    fn apis(world: &Scenario) -> (Api<MutatingAdmissionPolicy>, Api<MutatingAdmissionPolicyBinding>) {
        (Api::all(world.client.clone()), Api::all(world.client.clone()))
    }
}

/// A change that has Weft write the Deployment; the answer is how often it does within a minute.
async fn writes_of_a_change(world: &Scenario, round: &str) -> Result<usize> {
    let begun = Timestamp::now();
    let change = json!({"spec": {"env": [{"name": "ROUND", "value": round}]}});
    world.merge::<Microservice>("travel", &change).await?;
    tokio::time::sleep(Duration::from_mins(1)).await;
    let requests = world.requests_since(begun).await?.into_iter();
    let writes = requests.filter(|request| request.is_write() && request.resource == "deployments").count();
    ensure!(travel(world).await?.to_string().contains("ROUND"), "the change is not there after a minute");
    Ok(writes)
}

async fn a_policy_that_adds_something_leads_to_nothing(world: &Scenario) -> Result<()> {
    let policy = Policy::start(world, "add", "/metadata/labels/cost-centre", "42").await?;
    let writes = writes_of_a_change(world, "added").await?;
    ensure!(writes == 1, "Weft wrote the Deployment {writes} times for one change");
    ensure!(travel(world).await?["metadata"]["labels"]["cost-centre"] == "42", "the policy changed nothing");
    ensure!(world.now_says::<Microservice>("travel", "Contested").await.is_err(), "a label is no contest");
    policy.end().await?;
    world.ready::<Microservice>("travel").await
}

async fn a_policy_that_rewrites_is_named(world: &Scenario) -> Result<()> {
    let field = "/spec/template/spec/containers/0/terminationMessagePolicy";
    let policy = Policy::start(world, "replace", field, "File").await?;
    let writes = writes_of_a_change(world, "rewritten").await?;
    ensure!((1..=2).contains(&writes), "Weft wrote the Deployment {writes} times within a minute");
    ensure!(travel(world).await?.pointer(field) == Some(&json!("File")), "the policy changed nothing");
    let contested = world.says::<Microservice>("travel", "Contested", "True", 10).await?;
    for part in ["Deployment travel", "containers[service].terminationMessagePolicy", "an admission policy"] {
        ensure!(contested.message.contains(part), "{part} is not named: {}", contested.message);
    }
    world.ready::<Microservice>("travel").await?;
    policy.end().await?;
    writes_of_a_change(world, "as declared").await?;
    ensure!(
        travel(world).await?.pointer(field) == Some(&json!("FallbackToLogsOnError")),
        "it is not as declared again"
    );
    ensure!(world.now_says::<Microservice>("travel", "Contested").await.is_err(), "the contest is over");
    world.ready::<Microservice>("travel").await
}

async fn replicas(world: &Scenario) -> Result<(Option<i32>, i64)> {
    let deployment = world.get::<Deployment>("travel").await?.context("no Deployment")?;
    let generation = deployment.metadata.generation.unwrap_or_default();
    Ok((deployment.spec.and_then(|spec| spec.replicas), generation))
}

/// As an autoscaler writes it.
async fn scale(world: &Scenario, pods: i32) -> Result<()> {
    let params = PatchParams { field_manager: Some("keda".to_owned()), ..PatchParams::default() };
    let scale = Patch::Merge(json!({"spec": {"replicas": pods}}));
    world.api::<Deployment>().patch_scale("travel", &params, &scale).await?;
    Ok(())
}

/// As KEDA makes it for a ScaledObject of the Deployment. Below its minimum it needs no metrics.
fn autoscaler() -> Value {
    let cpu = json!({"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 70}}});
    json!({
        "apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "keda-hpa-travel", "labels": {"app.kubernetes.io/managed-by": "keda-operator"}},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "travel"},
            "minReplicas": 2, "maxReplicas": 3, "metrics": [cpu],
        },
    })
}

async fn an_autoscaler_of_others_is_named(world: &Scenario) -> Result<()> {
    let (_, before) = replicas(world).await?;
    world.apply(&autoscaler()).await?;
    let contested = world.says::<Microservice>("travel", "Contested", "True", 180).await?;
    let (_, after) = replicas(world).await?;
    // three rounds, each of a change and what puts it back
    ensure!(after - before <= 8, "the Deployment changed {} times within minutes", after - before);
    for part in ["Deployment travel", "spec.replicas", "HorizontalPodAutoscaler"] {
        ensure!(contested.message.contains(part), "{part} is not named: {}", contested.message);
    }
    world.remove(&autoscaler()).await
}

async fn with_autoscaling_nobody_else_writes(world: &Scenario) -> Result<()> {
    let scaling = json!({"spec": {"autoscaling": {"min": 1, "max": 3, "cpu": 70}}});
    world.merge::<Microservice>("travel", &scaling).await?;
    world
        .until("the autoscaler is there, and the contest is over", Duration::from_mins(1), async || {
            let there = world.get::<HorizontalPodAutoscaler>("travel").await?.is_some();
            let contested = world.now_says::<Microservice>("travel", "Contested").await.is_ok();
            Ok((there && !contested).then_some(()))
        })
        .await?;
    scale(world, 2).await?;
    world.ready::<Microservice>("travel").await?;
    ensure!(replicas(world).await?.0 == Some(2), "Weft wrote the number of pods beside an autoscaler");
    Ok(())
}
