//! `make bench ONLY=fleet`: what the operator costs with a whole fleet, against a real API server.
//!
//! etcd, API server, controller manager and scheduler are real; nodes and pods are played by kwok, the relays' `/status` by
//! this process. `FLEET` Microservices with a database (1,000 unless it says another number) and then as many OutboxRelays
//! are made; the operator, a process of its own, is started again, loses its leadership, hears busy relays, and gets a user's
//! edit behind a backlog. All of it runs on loopback and in a temporary folder, and ends with the benchmark.
//! `WEFT_TEST_BINARY` is another build of `weft` to measure.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a benchmark"
)]

#[path = "fleet/audit.rs"]
mod audit;
#[path = "fleet/control_plane.rs"]
mod control_plane;
#[path = "fleet/data_plane.rs"]
mod data_plane;
#[path = "fleet/observer.rs"]
mod observer;
#[path = "fleet/process.rs"]
mod process;
#[path = "fleet/report.rs"]
mod report;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use audit::{Audit, Requests};
use control_plane::{ControlPlane, create, free_port};
use data_plane::DataPlane;
use futures::StreamExt;
use k8s_openapi::api::core::v1::Service;
use kube::{
    Api,
    api::{DeleteParams, ListParams, Patch, PatchParams},
};
use observer::Observer;
use process::Process;
use report::Report;
use serde_json::json;
use weft::api::v1alpha1::{Microservice, OutboxRelay};

/// Objects in a namespace: some of Kubernetes' controllers go through all pods of one for each workload.
const NAMESPACE: usize = 100;
/// Objects that are made at the same time.
const MAKERS: usize = 16;
/// The operator is quiet when it has sent nothing for so long.
const QUIET: Duration = Duration::from_secs(12);
/// For how long busy relays are listened to.
const BUSY: Duration = Duration::from_mins(1);
/// Name of the Microservice that is made in a quiet cluster.
const ONE_MORE: &str = "one-more";
/// A Lease of that name, in the namespace `default`.
const LEASE: &str = "weft-fleet";

#[tokio::main]
async fn main() {
    let size =
        std::env::var("FLEET").ok().map_or(1000, |text| text.parse().expect("FLEET is a number of Microservices"));
    println!("{size} Microservices with a database and an OutboxRelay each");
    // whoever interrupts it leaves nothing behind either
    tokio::select! {
        () = Box::pin(measure(size)) => {}
        interrupted = tokio::signal::ctrl_c() => interrupted.unwrap(),
    }
}

async fn measure(size: usize) {
    let mut fleet = Fleet::start(size).await;
    let mut report = Report::default();
    fleet.microservices(&mut report).await;
    fleet.one_more(&mut report).await;
    fleet.relays(&mut report).await;
    fleet.busy(&mut report).await;
    fleet.edit_behind_a_backlog(&mut report).await;
    fleet.restart(&mut report).await;
    fleet.new_leader(&mut report).await;
    report.print();
}

struct Fleet {
    size: usize,
    plane: ControlPlane,
    data_plane: DataPlane,
    observer: Observer,
    audit: Audit,
    operator: Process,
    /// Resident memory of an operator that has nothing to do [KiB].
    empty: u64,
}

impl Fleet {
    async fn start(size: usize) -> Self {
        let plane = ControlPlane::start().await;
        for number in 0..size.div_ceil(NAMESPACE) {
            plane.namespace(&namespace(number * NAMESPACE)).await;
        }
        // one more, for the one that is made last
        let claims = (0..size).map(|number| (namespace(number), name(number)));
        let claims = claims.chain([(namespace(0), ONE_MORE.to_owned())]);
        let volumes = claims.map(|(namespace, name)| {
            let plane = &plane;
            async move { plane.volume(&namespace, &format!("data-{name}-db-0")).await }
        });
        futures::stream::iter(volumes).buffer_unordered(MAKERS).collect::<Vec<()>>().await;
        let begun = Instant::now();
        while plane.bound().await <= size {
            assert!(begun.elapsed() < deadline(size), "the volumes are not bound");
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        let data_plane = DataPlane::start(plane.client.clone()).await;
        let observer = Observer::start(&plane.client);
        let audit = Audit::new(plane.audit_log());
        let operator = start_operator(&plane, "operator", &[]);
        let mut fleet = Self { size, plane, data_plane, observer, audit, operator, empty: 0 };
        fleet.settle().await;
        fleet.empty = fleet.operator.resident();
        println!("   an operator with nothing to do: {} MiB", fleet.empty / 1024);
        fleet
    }

    async fn microservices(&mut self, report: &mut Report) {
        println!("\n{} Microservices with a database", self.size);
        let (begun, cpu) = (Instant::now(), self.cpu());
        self.make::<Microservice>(|number| {
            json!({"metadata": {"name": name(number), "namespace": namespace(number)}, "spec": {
                "image": "shop/service:1", "ports": [{"name": "http", "port": 8080, "protocol": "http"}],
                "database": {"postgres": {"version": "17", "storage": {"size": "1Gi"}}}}})
        })
        .await;
        self.until("all are Ready", |fleet| fleet.observer.ready_microservices() >= fleet.size).await;
        let (seconds, after) = (begun.elapsed().as_secs_f64(), self.cpu());
        report.row("all Microservices Ready, s", format!("{seconds:.0}"), "");
        let (operator, all) = (after.0 - cpu.0, after.0 - cpu.0 + after.1 - cpu.1);
        let share = format!("{operator:.1} of {all:.0} s = {:.1} %", operator / all * 100.0);
        report.row("CPU of the operator until Ready, of all", share, "≤ 5 %");
        let requests = self.settle().await;
        requests.print(self.size);
        report.row("requests until Ready, per Microservice", self.per_object(&requests), "≤ 14");
        let each = (self.operator.resident().saturating_sub(self.empty)) as f64 / self.size as f64;
        report.row("RSS per Microservice with a database, KB", format!("{each:.1}"), "≤ 10");
        let (now, peak) = (self.operator.resident() / 1024, self.operator.peak() / 1024);
        report.row("RSS with all Microservices (peak), MiB", format!("{now} ({peak})"), "");
    }

    /// With pods that run at once: what is left is the control planes' own.
    async fn one_more(&mut self, report: &mut Report) {
        println!("\none more, in a quiet cluster");
        let begun = Instant::now();
        let object = json!({"metadata": {"name": ONE_MORE, "namespace": namespace(0)}, "spec": {
            "image": "shop/service:1", "ports": [{"name": "http", "port": 8080, "protocol": "http"}],
            "database": {"postgres": {"version": "17", "storage": {"size": "1Gi"}}}}});
        let api = Api::<Microservice>::namespaced(self.plane.client.clone(), &namespace(0));
        create(&api, &serde_json::from_value(object).unwrap()).await;
        self.until("it is Ready", |fleet| fleet.observer.ready_microservices() > fleet.size).await;
        report.row(
            "Ready of one more, s",
            format!("{:.1}", begun.elapsed().as_secs_f64()),
            "≤ 1 beside PostgreSQL's 8",
        );
        self.settle().await.print(1);
    }

    async fn relays(&mut self, report: &mut Report) {
        println!("\n{} OutboxRelays", self.size);
        let begun = Instant::now();
        self.make::<OutboxRelay>(|number| {
            json!({"metadata": {"name": name(number), "namespace": namespace(number)}, "spec": {
                "microservice": name(number), "sink": {"nats": {"servers": ["nats://nats.nats:4222"]}}}})
        })
        .await;
        self.until("all are Ready", |fleet| {
            fleet.observer.ready_relays() >= fleet.size && fleet.observer.ready_microservices() > fleet.size
        })
        .await;
        report.row("all OutboxRelays Ready, s", format!("{:.0}", begun.elapsed().as_secs_f64()), "");
        let requests = self.settle().await;
        requests.print(self.size);
        report.row("requests until Ready, per OutboxRelay", self.per_object(&requests), "");
        let (now, peak) = (self.operator.resident() / 1024, self.operator.peak() / 1024);
        report.row("RSS with all relays (peak), MiB", format!("{now} ({peak})"), "≤ 130 with 10,000");
        let sockets = format!("{}; {} streams", self.operator.sockets(), self.data_plane.traffic().0);
        report.row("sockets of the operator", sockets, "bounded");
    }

    async fn busy(&mut self, report: &mut Report) {
        println!("\nbusy relays: every status changes each second, for {} s", BUSY.as_secs());
        self.data_plane.busy(true);
        tokio::time::sleep(Duration::from_secs(15)).await;
        self.audit.since().await;
        let (begun, cpu, answers) = (Instant::now(), self.operator.cpu(), self.data_plane.traffic().1);
        let mut sockets = 0;
        while begun.elapsed() < BUSY {
            tokio::time::sleep(Duration::from_secs(1)).await;
            sockets = sockets.max(self.operator.sockets());
        }
        let (seconds, cpu) = (begun.elapsed().as_secs_f64(), self.operator.cpu() - cpu);
        let requests = self.audit.since().await;
        self.data_plane.busy(false);
        requests.print(self.size);
        let writes = format!("{:.1}", requests.statuses() as f64 / seconds);
        report.row("status writes a second with busy relays", writes, "≤ 50");
        let heard = (self.data_plane.traffic().1 - answers) as f64 / seconds;
        println!("   {heard:.0} statuses a second were read, with {:.1} % of a core", cpu / seconds * 100.0);
        report.row("sockets with busy relays, at most", sockets.to_string(), "bounded");
        self.settle().await;
    }

    /// The operator stands still while every Service is deleted, and has a whole fleet to repair when somebody edits an object.
    async fn edit_behind_a_backlog(&mut self, report: &mut Report) {
        println!("\na user's edit behind a backlog of {}", self.size);
        self.operator.signal("STOP");
        for number in 0..self.size.div_ceil(NAMESPACE) {
            let services = Api::<Service>::namespaced(self.plane.client.clone(), &namespace(number * NAMESPACE));
            let ours = ListParams::default().labels("app.kubernetes.io/managed-by=weft");
            services.delete_collection(&DeleteParams::default(), &ours).await.unwrap();
        }
        let last = self.size - 1;
        let api = Api::<Microservice>::namespaced(self.plane.client.clone(), &namespace(last));
        self.operator.signal("CONT");
        // by now the deletions have arrived
        tokio::time::sleep(Duration::from_secs(2)).await;
        let begun = Instant::now();
        let edit = Patch::Merge(json!({"spec": {"image": "shop/service:2"}}));
        let edited = api.patch(&name(last), &PatchParams::default(), &edit).await.unwrap();
        let generation = edited.metadata.generation.unwrap_or_default();
        self.observer.answered(&namespace(last), &name(last), generation, self.deadline()).await;
        report.row("a user's edit behind a backlog, s", format!("{:.2}", begun.elapsed().as_secs_f64()), "< 1");
        let requests = self.settle().await;
        println!(
            "   the backlog was {} requests; all settled after {:.0} s",
            requests.total(),
            begun.elapsed().as_secs_f64()
        );
    }

    async fn restart(&mut self, report: &mut Report) {
        println!("\nthe operator is started again");
        let next = start_operator(&self.plane, "operator-again", &[]);
        std::mem::replace(&mut self.operator, next).stop();
        let requests = self.settle().await;
        requests.print(self.size);
        report.row("requests after a restart, per object", self.per_object(&requests), "0");
        let (now, peak) = (self.operator.resident() / 1024, self.operator.peak() / 1024);
        report.row("RSS after a restart (peak), MiB", format!("{now} ({peak})"), "≤ 130 with 10,000");
    }

    async fn new_leader(&mut self, report: &mut Report) {
        println!("\nthe leader is killed, and another takes over");
        let elect = |identity: &str| {
            ["--leader-elect", LEASE, "--namespace", "default", "--identity", identity].map(str::to_owned)
        };
        let first = start_operator(&self.plane, "operator-first", &elect("first"));
        std::mem::replace(&mut self.operator, first).stop();
        self.settle().await;
        let second = start_operator(&self.plane, "operator-second", &elect("second"));
        // until it stands by; then the lease has to expire
        tokio::time::sleep(Duration::from_secs(3)).await;
        self.audit.since().await;
        drop(std::mem::replace(&mut self.operator, second));
        tokio::time::sleep(Duration::from_secs(20)).await;
        let requests = self.settle().await;
        requests.print(self.size);
        report.row("requests after a new leader, per object", self.per_object(&requests), "0");
    }

    async fn make<K>(&self, object: impl Fn(usize) -> serde_json::Value)
    where
        K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
            + Clone
            + serde::Serialize
            + serde::de::DeserializeOwned
            + std::fmt::Debug,
    {
        let objects = futures::stream::iter((0..self.size).map(|number| {
            let object: K = serde_json::from_value(object(number)).unwrap();
            let api = Api::<K>::namespaced(self.plane.client.clone(), &namespace(number));
            async move { create(&api, &object).await }
        }));
        objects.buffer_unordered(MAKERS).collect::<Vec<()>>().await;
    }

    /// Waits until the operator has sent nothing for [`QUIET`]; answers with everything that it has sent until then.
    async fn settle(&mut self) -> Requests {
        let (begun, mut all, mut last) = (Instant::now(), Requests::default(), Instant::now());
        while last.elapsed() < QUIET {
            assert!(begun.elapsed() < self.deadline(), "the operator does not get quiet");
            self.assert_running();
            tokio::time::sleep(Duration::from_secs(1)).await;
            let new = self.audit.since().await;
            if new.total() > 0 {
                last = Instant::now();
            }
            all.add(new);
        }
        all
    }

    async fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let (begun, mut reported) = (Instant::now(), Instant::now());
        while !done(self) {
            self.assert_running();
            if reported.elapsed() > Duration::from_secs(20) {
                let (services, relays) = (self.observer.ready_microservices(), self.observer.ready_relays());
                println!(
                    "   {:.0} s: {services} Microservices and {relays} OutboxRelays are Ready",
                    begun.elapsed().as_secs_f64()
                );
                reported = Instant::now();
            }
            assert!(begun.elapsed() < self.deadline(), "waited in vain until {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn assert_running(&mut self) {
        self.plane.assert_running();
        self.operator.assert_running();
    }

    /// CPU seconds of the operator, and of everything else in the cluster.
    fn cpu(&self) -> (f64, f64) {
        (self.operator.cpu(), self.plane.processes.iter().map(Process::cpu).sum())
    }

    fn per_object(&self, requests: &Requests) -> String {
        format!("{:.2}", requests.total() as f64 / self.size as f64)
    }

    fn deadline(&self) -> Duration {
        deadline(self.size)
    }
}

/// Nothing takes longer.
fn deadline(size: usize) -> Duration {
    Duration::from_mins(3) + Duration::from_millis(1500) * u32::try_from(size).unwrap()
}

fn name(number: usize) -> String {
    format!("service-{number}")
}

fn namespace(number: usize) -> String {
    format!("fleet-{}", number / NAMESPACE)
}

fn start_operator(plane: &ControlPlane, log: &'static str, more: &[String]) -> Process {
    plane.kubeconfig_for(log);
    let program = std::env::var_os("WEFT_TEST_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_weft").into());
    let listen = format!("127.0.0.1:{}", free_port());
    let mut arguments = ["operator", "--image", "weft", "--listen", &listen].map(str::to_owned).to_vec();
    arguments.extend_from_slice(more);
    Process::start(log, &PathBuf::from(program), &arguments, plane.folder())
}
