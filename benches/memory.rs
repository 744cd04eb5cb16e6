//! `make bench ONLY=memory`: what the operator keeps of each Microservice with a database and its OutboxRelay, and what they cost
//! it, against an API server that answers at once.
//!
//! The operator is a process of its own, so that its memory is its own; the scripted API server, which plays the cluster's
//! controllers too, and the relays' `/status` are in this one. `OBJECTS` (1,000 unless it says another number) of each are made,
//! and then the operator is started again. `WEFT_TEST_BINARY` is another build of `weft` to measure. With a real API server, and
//! with its rates: `make bench ONLY=fleet`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a benchmark"
)]

#[allow(dead_code, reason = "the fleet uses more of it")]
#[path = "fleet/data_plane.rs"]
mod data_plane;
#[allow(dead_code, reason = "the fleet uses more of it")]
#[path = "fleet/process.rs"]
mod process;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/operator/server/mod.rs"]
mod server;

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, TcpListener},
    path::PathBuf,
    time::{Duration, Instant},
};

use axum::{Router, body::Body, extract::Request, response::Response};
use data_plane::DataPlane;
use kube::Client;
use process::Process;
use serde_json::{Value, json};
use server::Server;
use tempfile::TempDir;
use uuid::Uuid;

/// Objects in a namespace.
const NAMESPACE: usize = 100;
/// The operator is quiet when it has sent nothing for so long.
const QUIET: Duration = Duration::from_secs(12);
const TIME: &str = "2026-01-01T00:00:00Z";

#[tokio::main]
async fn main() {
    rustls::crypto::ring::default_provider().install_default().expect("it is the first one");
    let objects: usize = std::env::var("OBJECTS").ok().map_or(1000, |text| text.parse().expect("OBJECTS is a number"));
    println!("{objects} Microservices with a database and an OutboxRelay each");
    let server = Server::default();
    server.mutate(play_controllers);
    server.rule(|asked| {
        let resources = ["microservices", "outboxrelays", "sagas"]
            .map(|name| json!({"name": name, "singularName": "", "namespaced": true, "kind": "X", "verbs": []}));
        let group = json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "weft.dev/v1alpha1", "resources": resources});
        (asked.path == "/apis/weft.dev/v1alpha1").then_some((200, group))
    });
    let address = serve(server.client()).await;
    let folder = tempfile::tempdir().unwrap();
    let mut measured = Measured { server, folder, address, objects, empty: 0 };
    let operator = measured.start().await;
    measured.quiet(&operator).await;
    measured.empty = operator.resident();
    println!("an operator with nothing to do: {:.1} MiB", measured.empty as f64 / 1024.0);
    let _data_plane = DataPlane::start(measured.server.client()).await;
    measured.make("microservices", microservice);
    measured.pass("Microservices", &operator).await;
    for number in 0..objects {
        measured.server.put("pods", pod(number, "service", "Running"));
        measured.server.put("pods", pod(number, "database", "Running"));
        measured.server.put("pods", pod(number, "database-setup", "Succeeded"));
    }
    measured.make("outboxrelays", relay);
    measured.pass("OutboxRelays", &operator).await;
    operator.stop();
    let again = measured.start().await;
    measured.pass("started again", &again).await;
    again.stop();
    let third = measured.start().await;
    measured.pass("and again", &third).await;
}

struct Measured {
    server: Server,
    folder: TempDir,
    address: String,
    objects: usize,
    /// Resident memory of an operator that has nothing to do [KiB].
    empty: u64,
}

impl Measured {
    /// An operator that has listed all that there is.
    async fn start(&self) -> Process {
        let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
            "clusters": [{"name": "c", "cluster": {"server": self.address}}], "users": [{"name": "c", "user": {}}]});
        fs::write(self.folder.path().join("operator.kubeconfig"), config.to_string()).unwrap();
        let program = std::env::var_os("WEFT_TEST_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_weft").into());
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let arguments = ["operator", "--image", "weft", "--listen", &format!("127.0.0.1:{port}")].map(str::to_owned);
        let operator = Process::start("operator", &PathBuf::from(program), &arguments, self.folder.path());
        let ready = format!("http://127.0.0.1:{port}/readyz");
        while !reqwest::get(&ready).await.is_ok_and(|answer| answer.status().is_success()) {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        operator
    }

    fn make(&self, plural: &str, object: fn(usize) -> Value) {
        (0..self.objects).for_each(|number| self.server.put(plural, object(number)));
    }

    /// How much was sent until the operator was quiet, by kind.
    async fn quiet(&self, operator: &Process) -> BTreeMap<String, usize> {
        let (mut last, mut all, mut cpu) = (Instant::now(), BTreeMap::new(), operator.cpu());
        while last.elapsed() < QUIET {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let lines = self.server.lines();
            let sent = lines.iter().filter(|line| !line.starts_with("GET"));
            for line in sent {
                let mut parts = line.split('/');
                let (kind, status) = (parts.next().unwrap_or_default(), parts.nth(1).unwrap_or_default());
                *all.entry(format!("{kind} {status}")).or_default() += 1;
                last = Instant::now();
            }
            // a first list, or a pass over objects of which nothing has to be sent
            let now = operator.cpu();
            if now - std::mem::replace(&mut cpu, now) > 0.5 {
                last = Instant::now();
            }
        }
        all
    }

    async fn pass(&self, name: &str, operator: &Process) {
        let (begun, cpu) = (Instant::now(), operator.cpu());
        let sent = self.quiet(operator).await;
        let objects = self.objects as f64;
        println!("\n{name}, after {:.0} s", begun.elapsed().saturating_sub(QUIET).as_secs_f64());
        for (kind, count) in &sent {
            println!("   {:6.2}  {kind}", *count as f64 / objects);
        }
        let requests: usize = sent.values().sum();
        println!(
            "   {:.2} requests and {:.2} ms of CPU for each; RSS {:.1} MiB, at most {:.1}: {:.1} KB for each, at most {:.1}",
            requests as f64 / objects,
            (operator.cpu() - cpu) * 1000.0 / objects,
            operator.resident() as f64 / 1024.0,
            operator.peak() as f64 / 1024.0,
            operator.resident().saturating_sub(self.empty) as f64 / objects,
            operator.peak().saturating_sub(self.empty) as f64 / objects,
        );
    }
}

/// The scripted API server on a port of its own.
async fn serve(client: Client) -> String {
    let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let answer = move |request: Request| {
        let client = client.clone();
        async move {
            let (parts, body) = request.into_parts();
            let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
            let answer = client.send(Request::from_parts(parts, body.to_vec().into())).await.unwrap();
            Response::from(answer.map(Body::new))
        }
    };
    let router = Router::new().fallback(answer);
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    address
}

fn name(number: usize) -> String {
    format!("service-{number}")
}

fn namespace(number: usize) -> String {
    format!("fleet-{}", number / NAMESPACE)
}

fn uid(seed: &str) -> String {
    Uuid::new_v5(&Uuid::NAMESPACE_URL, seed.as_bytes()).to_string()
}

fn metadata(kind: &str, number: usize) -> Value {
    json!({"name": name(number), "namespace": namespace(number), "generation": 1, "creationTimestamp": TIME,
        "uid": uid(&format!("{kind} {number}")),
        "managedFields": [{"manager": "kubectl-client-side-apply", "operation": "Update", "time": TIME,
            "apiVersion": "weft.dev/v1alpha1", "fieldsType": "FieldsV1", "fieldsV1": {"f:spec": {"f:image": {}, "f:ports": {}}}}]})
}

fn microservice(number: usize) -> Value {
    json!({"apiVersion": "weft.dev/v1alpha1", "kind": "Microservice", "metadata": metadata("Microservice", number), "spec": {
        "image": "shop/service:1", "replicas": 1, "ports": [{"name": "http", "port": 8080, "protocol": "http"}],
        "database": {"postgres": {"version": "17", "storage": {"size": "1Gi"}}}}})
}

fn relay(number: usize) -> Value {
    json!({"apiVersion": "weft.dev/v1alpha1", "kind": "OutboxRelay", "metadata": metadata("OutboxRelay", number), "spec": {
        "microservice": name(number), "sink": {"nats": {"servers": ["nats://nats.nats:4222"]}}}})
}

/// A pod of a Microservice, as kubelets report it.
fn pod(number: usize, component: &str, phase: &str) -> Value {
    let (namespace, owner) = (namespace(number), name(number));
    let seed = format!("{component} {number}");
    let pod = format!("{owner}-{component}-{}", &uid(&seed)[..5]);
    let [_, second, third, fourth] = u32::try_from(number + 256).unwrap().to_be_bytes();
    let state = if phase == "Succeeded" {
        json!({"terminated": {"exitCode": 0, "reason": "Completed", "finishedAt": TIME,
            "message": r#"{"files":0,"applied":0,"hash":"e3b0c44298fc1c14"}"#}})
    } else {
        json!({"running": {"startedAt": TIME}})
    };
    let ports = if component == "service" { json!([{"containerPort": 9464}]) } else { json!([]) };
    let mut labels = json!({"app.kubernetes.io/managed-by": "weft", "app.kubernetes.io/component": component,
        "app.kubernetes.io/name": owner, "weft.dev/owner-kind": "Microservice", "weft.dev/owner": owner,
        "weft.dev/component": component});
    if component == "database-setup" {
        labels["batch.kubernetes.io/job-name"] = json!(format!("{owner}-db-setup-0a1b2c3d"));
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": pod, "namespace": namespace, "uid": uid(&seed), "labels": labels},
        "spec": {"containers": [{"name": component, "image": "shop/service:1", "ports": ports}]},
        "status": {"phase": phase, "podIP": format!("127.{second}.{third}.{fourth}"),
            "conditions": [{"type": "Ready", "status": "True"}],
            "containerStatuses": [{"name": component, "image": "shop/service:1", "ready": phase == "Running", "restartCount": 0, "state": state}]}})
}

/// What the cluster's own controllers make of a child: every Job succeeds, all pods become ready.
fn play_controllers(object: &mut Value) {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
    let uid = uid(&format!("{kind} {} {name}", object["metadata"]["namespace"]));
    let condition = |type_: &str, reason: &str, message: String| {
        json!({"type": type_, "status": "True", "reason": reason, "message": message,
            "lastUpdateTime": TIME, "lastTransitionTime": TIME})
    };
    let conditions = match kind.as_str() {
        "Deployment" => json!([
            condition("Available", "MinimumReplicasAvailable", "Deployment has minimum availability.".to_owned()),
            condition(
                "Progressing",
                "NewReplicaSetAvailable",
                format!("ReplicaSet \"{name}-{}\" has successfully progressed.", &uid[..8])
            ),
        ]),
        "StatefulSet" => json!([]),
        "Job" => {
            let message = "Reached expected number of succeeded pods".to_owned();
            json!([
                condition("SuccessCriteriaMet", "CompletionsReached", message.clone()),
                condition("Complete", "CompletionsReached", message)
            ])
        }
        _ => Value::Null,
    };
    object["metadata"]["uid"] = json!(uid);
    object["metadata"]["creationTimestamp"] = json!(TIME);
    if conditions.is_array() {
        object["metadata"]["generation"] = json!(1);
        object["status"] = json!({"observedGeneration": 1, "replicas": 1, "updatedReplicas": 1, "readyReplicas": 1,
            "availableReplicas": 1, "conditions": conditions});
    }
}
