//! A control plane without machines: etcd, API server, controller manager and scheduler as plain processes on loopback, and
//! kwok, which plays the nodes. Everything lies in one temporary folder.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use k8s_openapi::{
    api::{
        core::v1::{Namespace, Node},
        storage::v1::StorageClass,
    },
    apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition,
};
use kube::{
    Api, Client, Config, Resource,
    api::PostParams,
    config::{KubeConfigOptions, Kubeconfig},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use tempfile::TempDir;

use super::process::Process;

/// Pods' addresses: all of them are this machine's, so that one server answers for every pod.
const PODS: &str = "127.64.0.0/10";
const NODES: usize = 10;
const START: Duration = Duration::from_mins(1);
/// User name of the operator in the audit log.
pub const OPERATOR: &str = "weft-operator";

/// Ends with the value, and leaves nothing.
pub struct ControlPlane {
    pub client: Client,
    /// All but the operator.
    pub processes: Vec<Process>,
    folder: TempDir,
    address: String,
}

impl ControlPlane {
    pub async fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("weft-fleet-").tempdir().unwrap();
        let address = format!("https://127.0.0.1:{}", free_port());
        let users = ["admin", "controller-manager", "scheduler", "kwok", "operator"];
        write_credentials(folder.path(), &address, &users);
        let etcd = format!("http://127.0.0.1:{}", free_port());
        let mut processes = vec![start_etcd(folder.path(), &etcd), start_api_server(folder.path(), &etcd, &address)];
        let client = connect(folder.path(), &mut processes).await;
        processes.push(start_controller_manager(folder.path()));
        processes.push(start_scheduler(folder.path()));
        processes.push(start_kwok(folder.path()));
        let mut plane = Self { client, processes, folder, address };
        plane.furnish().await;
        plane
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn audit_log(&self) -> PathBuf {
        self.folder.path().join("audit.log")
    }

    /// A second operator has the same user and a log of its own.
    pub fn kubeconfig_for(&self, name: &str) {
        write_kubeconfig(self.folder.path(), &self.address, name, OPERATOR_TOKEN);
    }

    /// Panics if one of the programs has ended.
    pub fn assert_running(&mut self) {
        self.processes.iter_mut().for_each(Process::assert_running);
    }

    /// Definitions, nodes, and a storage class whose volumes are always there.
    async fn furnish(&mut self) {
        let crds = Path::new(env!("CARGO_MANIFEST_DIR")).join("crds");
        for file in fs::read_dir(crds).unwrap() {
            let text = fs::read_to_string(file.unwrap().path()).unwrap();
            let definition: CustomResourceDefinition = serde_yaml::from_str(&text).unwrap();
            create(&Api::all(self.client.clone()), &definition).await;
        }
        let class = json!({"metadata": {"name": "fleet",
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}, "provisioner": "fleet"});
        create::<StorageClass>(&Api::all(self.client.clone()), &serde_json::from_value(class).unwrap()).await;
        for number in 0..NODES {
            let node =
                json!({"metadata": {"name": format!("node-{number}"), "annotations": {"kwok.x-k8s.io/node": "fake"}}});
            create::<Node>(&Api::all(self.client.clone()), &serde_json::from_value(node).unwrap()).await;
        }
    }

    pub async fn namespace(&self, name: &str) {
        let namespace = json!({"metadata": {"name": name}});
        create::<Namespace>(&Api::all(self.client.clone()), &serde_json::from_value(namespace).unwrap()).await;
    }
}

pub async fn create<K>(api: &Api<K>, object: &K)
where
    K: Resource<DynamicType = ()> + Clone + Serialize + DeserializeOwned + std::fmt::Debug,
{
    api.create(&PostParams::default(), object).await.unwrap();
}

/// Of the service accounts' tokens.
const PRIVATE_KEY: &str = "service-accounts.key";
const PUBLIC_KEY: &str = "service-accounts.pub";
/// The operator's: it is written twice.
const OPERATOR_TOKEN: &str = "fleet-operator";

fn write_credentials(folder: &Path, address: &str, users: &[&str]) {
    let tokens = users.iter().map(|name| {
        let token = format!("fleet-{name}");
        write_kubeconfig(folder, address, name, &token);
        let user = if *name == "operator" { OPERATOR } else { name };
        format!("{token},{user},{user},system:masters\n")
    });
    let tokens: String = tokens.collect();
    fs::write(folder.join("tokens.csv"), tokens).unwrap();
    let policy = json!({"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata", "users": [OPERATOR]}, {"level": "None"}]});
    fs::write(folder.join("audit-policy.json"), policy.to_string()).unwrap();
    openssl(folder, &["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", PRIVATE_KEY]);
    openssl(folder, &["pkey", "-in", PRIVATE_KEY, "-pubout", "-out", PUBLIC_KEY]);
}

fn openssl(folder: &Path, arguments: &[&str]) {
    let made = Command::new("openssl").args(arguments).current_dir(folder).output();
    assert!(made.is_ok_and(|made| made.status.success()), "openssl {} failed, or is missing", arguments.join(" "));
}

/// The API server makes its own certificate, which is trusted by its file.
fn write_kubeconfig(folder: &Path, address: &str, name: &str, token: &str) {
    let config = json!({"apiVersion": "v1", "kind": "Config", "current-context": "fleet",
        "contexts": [{"name": "fleet", "context": {"cluster": "fleet", "user": "fleet"}}],
        "clusters": [{"name": "fleet", "cluster": {"server": address,
            "certificate-authority": folder.join("certificates/apiserver.crt")}}],
        "users": [{"name": "fleet", "user": {"token": token}}]});
    fs::write(folder.join(format!("{name}.kubeconfig")), config.to_string()).unwrap();
}

async fn connect(folder: &Path, processes: &mut [Process]) -> Client {
    let begun = Instant::now();
    let kubeconfig = folder.join("admin.kubeconfig");
    loop {
        processes.iter_mut().for_each(Process::assert_running);
        if folder.join("certificates/apiserver.crt").exists() {
            let config = Kubeconfig::read_from(&kubeconfig).unwrap();
            let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await.unwrap();
            let client = Client::try_from(config).unwrap();
            let ready = axum::http::Request::get("/readyz").body(Vec::new()).unwrap();
            if client.request_text(ready).await.is_ok() {
                return client;
            }
        }
        assert!(begun.elapsed() < START, "the API server is not ready; its log is in {}", folder.display());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

fn start_etcd(folder: &Path, address: &str) -> Process {
    let peers = format!("http://127.0.0.1:{}", free_port());
    let arguments = [
        format!("--data-dir={}", folder.join("etcd").display()),
        "--unsafe-no-fsync".to_owned(),
        "--log-level=warn".to_owned(),
        format!("--quota-backend-bytes={}", 8_u64 << 30),
        format!("--listen-client-urls={address}"),
        format!("--advertise-client-urls={address}"),
        format!("--listen-peer-urls={peers}"),
        format!("--initial-advertise-peer-urls={peers}"),
        format!("--initial-cluster=default={peers}"),
    ];
    Process::start("etcd", &program("etcd"), &arguments, folder)
}

fn start_api_server(folder: &Path, etcd: &str, address: &str) -> Process {
    let file = |name: &str| folder.join(name).display().to_string();
    let arguments = [
        format!("--etcd-servers={etcd}"),
        "--bind-address=127.0.0.1".to_owned(),
        "--advertise-address=127.0.0.1".to_owned(),
        // it would make Endpoints of its own address, which may not be loopback
        "--endpoint-reconciler-type=none".to_owned(),
        format!("--secure-port={}", address.rsplit(':').next().unwrap()),
        format!("--cert-dir={}", file("certificates")),
        format!("--token-auth-file={}", file("tokens.csv")),
        "--authorization-mode=RBAC".to_owned(),
        "--service-cluster-ip-range=10.96.0.0/12".to_owned(),
        format!("--service-account-key-file={}", file(PUBLIC_KEY)),
        format!("--service-account-signing-key-file={}", file(PRIVATE_KEY)),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        format!("--audit-policy-file={}", file("audit-policy.json")),
        format!("--audit-log-path={}", file("audit.log")),
        "--audit-log-maxsize=100000".to_owned(),
        "--max-requests-inflight=4000".to_owned(),
        "--max-mutating-requests-inflight=2000".to_owned(),
        "--delete-collection-workers=8".to_owned(),
    ];
    Process::start("apiserver", &program("kube-apiserver"), &arguments, folder)
}

/// Not braked: the operator is what is measured. Endpoints of loopback addresses are refused, so nobody makes them.
fn start_controller_manager(folder: &Path) -> Process {
    let mut arguments: Vec<String> = [
        "--controllers=*,-endpoints-controller,-endpointslice-controller,-endpointslice-mirroring-controller",
        "--kube-api-qps=5000",
        "--kube-api-burst=10000",
        "--leader-elect=false",
        "--secure-port=0",
    ]
    .map(str::to_owned)
    .into();
    for kind in ["deployment", "replicaset", "statefulset", "job", "gc"] {
        arguments.push(format!("--concurrent-{kind}-syncs=20"));
    }
    arguments.push(format!("--kubeconfig={}", folder.join("controller-manager.kubeconfig").display()));
    let key = folder.join(PRIVATE_KEY);
    arguments.push(format!("--service-account-private-key-file={}", key.display()));
    Process::start("controller-manager", &program("kube-controller-manager"), &arguments, folder)
}

fn start_scheduler(folder: &Path) -> Process {
    let kubeconfig = format!("--kubeconfig={}", folder.join("scheduler.kubeconfig").display());
    let fixed = ["--kube-api-qps=5000", "--kube-api-burst=10000", "--leader-elect=false", "--secure-port=0"];
    let arguments: Vec<String> = fixed.map(str::to_owned).into_iter().chain([kubeconfig]).collect();
    Process::start("scheduler", &program("kube-scheduler"), &arguments, folder)
}

fn start_kwok(folder: &Path) -> Process {
    let stages = folder.join("stages.yaml");
    fs::write(&stages, include_str!("stages.yaml")).unwrap();
    let arguments = [
        format!("--config={}", stages.display()),
        format!("--kubeconfig={}", folder.join("kwok.kubeconfig").display()),
        "--manage-all-nodes".to_owned(),
        format!("--cidr={PODS}"),
        "--node-ip=127.0.0.1".to_owned(),
        "--node-lease-duration-seconds=40".to_owned(),
    ];
    Process::start("kwok", &program("kwok"), &arguments, folder)
}

/// As `tests/e2e/cluster` built it.
fn program(name: &str) -> PathBuf {
    let folder = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
    let caches = || folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache"))).unwrap_or_default();
    let cache = folder("WEFT_CACHE").unwrap_or_else(|| caches().join("weft"));
    let program = cache.join("bin").join(name);
    assert!(program.exists(), "{name} is missing: run `make bench ONLY=fleet`, which builds it");
    program
}

/// Free a moment ago, which is as good as it gets.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}
