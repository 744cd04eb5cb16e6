//! `weft operator`: waits for the definitions, becomes the leader, and then watches and reconciles until it is no longer.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use k8s_openapi::{
    api::{coordination::v1::Lease, core::v1::ObjectReference, networking::v1::NetworkPolicyPeer},
    apimachinery::pkg::api::resource::Quantity,
};
use kube::{Api, Client, Config, client::ClientBuilder};
use prometheus_client::registry::Registry;
use rand::{Rng, distr::Alphanumeric};
use serde::Serialize;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    admin::{self, Admin},
    api::v1alpha1::Storage,
    controllers::{
        kinds,
        resources::settings::{Broker, Resources, Settings},
        runtime::{
            self, Context, broker,
            events::Events,
            leader::Elector,
            metrics::{CountRequests, OperatorMetrics},
        },
        store::Store,
        watch::{self as watches, Namespaces, definitions, pod_events, readiness::Readiness, streams},
    },
    shutdown::Shutdown,
};

/// How long running reconciles may take to end, once asked to.
const LAST_WORK: Duration = Duration::from_secs(5);
/// A connection on which the API server sends nothing for so long is dead. A watch gets a bookmark about once a minute.
const SILENCE: Duration = Duration::from_mins(3);
/// Pause between two attempts to read the broker's keys.
const BROKER_KEYS: Duration = Duration::from_secs(2);
/// How often the gauges about the store are brought up to date.
const GAUGES: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Namespaces to work in, separated by commas; all of them when left out
    #[arg(long, env = "WEFT_NAMESPACES", value_delimiter = ',', conflicts_with = "namespace_label")]
    namespaces: Vec<String>,
    /// Work in the namespaces that have this label
    #[arg(long, env = "WEFT_NAMESPACE_LABEL", value_name = "KEY=VALUE", value_parser = label)]
    namespace_label: Option<(String, String)>,
    /// Image of weft that relays, orchestrators and set-up Jobs run: the operator's own
    #[arg(long, env = "WEFT_IMAGE")]
    image: String,
    /// imagePullPolicy of the containers that Weft adds, and of PostgreSQL; Kubernetes' default when left out
    #[arg(long, env = "WEFT_IMAGE_PULL_POLICY", value_parser = ["Always", "IfNotPresent", "Never"])]
    image_pull_policy: Option<String>,
    /// Image of PostgreSQL; `{version}` stands for the major version
    #[arg(long, env = "WEFT_POSTGRES_IMAGE", default_value = "docker.io/library/postgres:{version}")]
    postgres_image: String,
    /// CPU and memory of the containers that Weft makes, as JSON: `database`, `orchestrator`, `relay` and `setup`, each in
    /// Kubernetes' own form; what is left out has Weft's defaults. Pods that run keep theirs
    #[arg(long, env = "WEFT_RESOURCES", value_name = "JSON", value_parser = resources, default_value = "{}")]
    resources: Resources,
    /// Size of the volume of each orchestrator's database that is made from now on
    #[arg(long, env = "WEFT_ORCHESTRATOR_STORAGE_SIZE", default_value = "2Gi")]
    orchestrator_storage_size: String,
    /// StorageClass of those volumes [default: the cluster's]
    #[arg(long, env = "WEFT_ORCHESTRATOR_STORAGE_CLASS")]
    orchestrator_storage_class: Option<String>,
    /// Name of the Lease by which several replicas agree on a leader; without it this process leads unasked
    #[arg(long, env = "WEFT_LEADER_ELECT", value_name = "LEASE")]
    leader_elect: Option<String>,
    /// Namespace of the operator: of its Lease, and what orchestrators' NetworkPolicies admit its status streams from
    #[arg(long, env = "POD_NAMESPACE", default_value = "weft-system")]
    namespace: String,
    /// This process's name among the replicas: the pod's
    #[arg(long, env = "POD_NAME")]
    identity: Option<String>,
    /// Labels of the operator's pods, KEY=VALUE separated by commas, by which NetworkPolicies admit them
    #[arg(
        long,
        env = "WEFT_POD_LABELS",
        value_delimiter = ',',
        value_parser = label,
        default_value = "app.kubernetes.io/name=weft,app.kubernetes.io/component=operator"
    )]
    pod_labels: Vec<(String, String)>,
    /// Who else may read the metrics of relays and orchestrators: peers of a NetworkPolicy, as a JSON array
    #[arg(long, env = "WEFT_METRICS_CLIENTS", value_name = "JSON", value_parser = peers, default_value = "[]")]
    metrics_clients: Peers,
    /// Secrets, by name and separated by commas, by which the pods that Weft makes pull their images
    #[arg(long, env = "WEFT_IMAGE_PULL_SECRETS", value_delimiter = ',')]
    image_pull_secrets: Vec<String>,
    /// Pods have the user and group ids of their images; `false` where the cluster gives them, as OpenShift does
    #[arg(long, env = "WEFT_FIXED_USER_IDS", action = clap::ArgAction::Set, default_value_t = true)]
    fixed_user_ids: bool,
    /// Address of the broker that is installed with Weft, nats://HOST:PORT
    #[arg(long, env = "WEFT_BROKER_URL", value_name = "URL", requires = "broker_keys")]
    broker_url: Option<String>,
    /// Name of the Secret with that broker's keys, in the operator's namespace; made when it is missing
    #[arg(long, env = "WEFT_BROKER_KEYS", value_name = "SECRET", requires = "broker_url")]
    broker_keys: Option<String>,
    /// Address of the admin port: /livez, /readyz, /metrics
    #[arg(long, env = "WEFT_LISTEN", default_value = "[::]:9464")]
    listen: SocketAddr,
    /// How many objects are reconciled at the same time
    #[arg(long, env = "WEFT_CONCURRENCY", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: u16,
}

fn label(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not KEY=VALUE"))?;
    Ok((key.to_owned(), value.to_owned()))
}

/// One argument, where clap would take a `Vec` for several.
#[derive(Clone, Debug)]
struct Peers(Vec<NetworkPolicyPeer>);

fn peers(text: &str) -> Result<Peers, String> {
    serde_json::from_str(text)
        .map(Peers)
        .map_err(|error| format!("not a JSON array of peers of a NetworkPolicy: {error}"))
}

fn resources(text: &str) -> Result<Resources, String> {
    serde_json::from_str(text).map_err(|error| format!("not resources of containers as JSON: {error}"))
}

/// What `/status` of the operator answers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct OperatorStatus {
    identity: String,
    leading: bool,
}

/// Everything that the operator is made of, once its arguments are resolved.
struct Operator {
    client: Client,
    /// Without the broker.
    settings: Settings,
    /// Address of the broker that is installed with Weft, and name of the Secret with its keys.
    broker: Option<(String, String)>,
    metrics: Arc<OperatorMetrics>,
    namespaces: Namespaces,
    concurrency: usize,
    identity: String,
    readiness: Readiness,
    status: watch::Sender<OperatorStatus>,
}

/// Removes the finalizers of the Sagas of these namespaces (of all, if none is given), for after the operator's end.
pub async fn release_sagas(namespaces: &[String]) -> anyhow::Result<()> {
    let config = Config::infer().await.context("finding the cluster: neither in a pod nor with a kubeconfig")?;
    kinds::saga::drain::release_all(&Client::try_from(config)?, namespaces).await
}

pub async fn run(args: Args, shutdown: Shutdown) -> anyhow::Result<()> {
    let Args {
        namespaces,
        namespace_label,
        image,
        image_pull_policy,
        postgres_image,
        resources,
        orchestrator_storage_size,
        orchestrator_storage_class,
        leader_elect,
        namespace,
        identity,
        pod_labels,
        metrics_clients,
        image_pull_secrets,
        fixed_user_ids,
        broker_url,
        broker_keys,
        listen,
        concurrency,
    } = args;
    let mut registry = Registry::default();
    let metrics = OperatorMetrics::register(&mut registry);
    let mut config = Config::infer().await.context("finding the cluster: neither in a pod nor with a kubeconfig")?;
    config.read_timeout = Some(SILENCE);
    config.reset_reader_on_write = true;
    let client = ClientBuilder::try_from(config)?.with_layer(&CountRequests(Arc::clone(&metrics))).build();
    let identity = identity.unwrap_or_else(|| format!("weft-{:08x}", rand::random::<u32>()));
    let settings = Settings {
        image,
        image_pull_policy,
        postgres_image,
        resources,
        orchestrator_storage: Storage {
            size: Quantity(orchestrator_storage_size),
            class_name: orchestrator_storage_class,
        },
        namespace: namespace.clone(),
        pod_labels: pod_labels.into_iter().collect::<BTreeMap<_, _>>(),
        metrics_clients: metrics_clients.0,
        image_pull_secrets: image_pull_secrets.into_iter().filter(|name| !name.is_empty()).collect(),
        fixed_user_ids,
        broker: None,
        password,
    };
    let readiness = Readiness::default();
    readiness.waits_for(Some("the operator is starting".to_owned()));
    let (status, status_seen) = watch::channel(OperatorStatus { identity: identity.clone(), leading: false });
    let ready = readiness.clone();
    let admin = Admin {
        live: Arc::new(|| Ok(())),
        ready: Arc::new(move || ready.verdict()),
        status: status_seen,
        registry: Arc::new(registry),
    };
    let lease = leader_elect.map(|name| {
        let leases: Api<Lease> = Api::namespaced(client.clone(), &namespace);
        Elector::new(leases, name, identity.clone())
    });
    let operator = Operator {
        client,
        settings,
        broker: broker_url.zip(broker_keys),
        metrics,
        namespaces: where_to_work(namespaces, namespace_label),
        concurrency: concurrency.into(),
        identity,
        readiness,
        status,
    };
    let served = admin::serve(admin.router(), listen, shutdown.clone());
    let (served, ()) = tokio::join!(
        async {
            let served = served.await;
            // without its admin port the operator is blind to its probes: it ends
            shutdown.token().cancel();
            served
        },
        operator.work(lease, shutdown.token())
    );
    served.context("serving the admin port")
}

impl Operator {
    async fn work(&self, lease: Option<Elector>, stop: &CancellationToken) {
        let present = definitions::wait(&self.client, |missing| self.readiness.waits_for(missing));
        tokio::select! { () = stop.cancelled() => return, () = present => {} }
        let broker = tokio::select! { () = stop.cancelled() => return, broker = self.broker() => broker };
        let settings = Settings { broker, ..self.settings.clone() };
        let Some(mut elector) = lease else {
            self.lead(&settings, stop, stop.child_token()).await;
            return;
        };
        while !stop.is_cancelled() {
            // a candidate is as ready as it can be: it stands by
            self.readiness.waits_for(None);
            let renewed = tokio::select! { () = stop.cancelled() => break, renewed = elector.acquire() => renewed };
            tracing::info!(identity = self.identity, "leading");
            let term = stop.child_token();
            let mut leading = std::pin::pin!(self.lead(&settings, stop, term.clone()));
            let ended = tokio::select! {
                () = elector.keep(renewed, stop) => false,
                () = &mut leading => true,
            };
            // from here on nothing is written: what still runs is cut off at its next await
            term.cancel();
            if !ended {
                leading.await;
            }
        }
        elector.release().await;
    }

    /// The broker that is installed with Weft, once its keys are there.
    async fn broker(&self) -> Option<Broker> {
        let (url, secret) = self.broker.clone()?;
        loop {
            match broker::ensure_accounts(&self.client, &self.settings.namespace, &secret, password()).await {
                Ok(accounts) => return Some(Broker { url, accounts }),
                Err(error) => {
                    tracing::warn!(error = format!("{error:#}"), "the broker's keys are not there");
                    self.readiness.waits_for(Some(format!("the broker's keys are not there: {error:#}")));
                }
            }
            tokio::time::sleep(BROKER_KEYS).await;
        }
    }

    /// Watches and reconciles until `term` ends.
    async fn lead(&self, settings: &Settings, stop: &CancellationToken, term: CancellationToken) {
        self.readiness.waits_for(Some("the first lists of all watches are not complete".to_owned()));
        self.leading(true);
        let tasks = TaskTracker::new();
        let (events, writer) = Events::new(self.client.clone(), self.identity.clone(), term.clone());
        tasks.spawn(writer);
        let context = Arc::new(Context::new(self.client.clone(), settings.clone(), events, Arc::clone(&self.metrics)));
        if let Some((broker, (_, secret))) = settings.broker.clone().zip(self.broker.clone()) {
            let seed = broker.accounts.seed().to_owned();
            let kept = broker::keep_keys(self.client.clone(), settings.namespace.clone(), secret, seed);
            let (giving, ended, stop) = (Arc::clone(&context), term.clone(), stop.clone());
            tasks.spawn(async move {
                tokio::select! {
                    () = ended.cancelled() => {}
                    () = broker::run(giving, broker) => {}
                    // with other keys the process starts again
                    () = kept => stop.cancel(),
                }
            });
        }
        operate(&context, &self.namespaces, &self.pod(), &self.readiness, self.concurrency, &tasks, &term).await;
        self.leading(false);
        tasks.close();
        if tokio::time::timeout(LAST_WORK, tasks.wait()).await.is_err() {
            tracing::warn!("some work did not end in time");
        }
        // alerts go by the leader's gauges
        self.metrics.observe(&Store::default());
        self.readiness.unwatched();
    }

    /// What Events about the operator itself concern.
    fn pod(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: Some(self.settings.namespace.clone()),
            name: Some(self.identity.clone()),
            ..ObjectReference::default()
        }
    }

    fn leading(&self, leading: bool) {
        self.metrics.leading(leading);
        self.status.send_modify(|status| status.leading = leading);
    }
}

/// Watches and reconciles until `term` ends. Each scope begins when its own lists are complete; ready is the operator once all
/// are that can be.
pub async fn operate(
    context: &Arc<Context>,
    namespaces: &Namespaces,
    pod: &ObjectReference,
    readiness: &Readiness,
    concurrency: usize,
    tasks: &TaskTracker,
    term: &CancellationToken,
) {
    tasks.spawn(streams::run(Arc::clone(context), term.clone()));
    let (asking, ended) = (Arc::clone(context), term.clone());
    tasks.spawn(async move {
        tokio::select! { () = ended.cancelled() => {} () = pod_events::run(asking) => {} }
    });
    tasks.spawn(gauges(Arc::clone(context), term.clone()));
    tasks.spawn(runtime::resync(Arc::clone(context), term.clone()));
    let watching = async {
        watches::start(context, namespaces, pod, readiness, tasks, term).await;
        tracing::info!("all watches are complete");
        readiness.waits_for(None);
    };
    let reconciling = runtime::run(Arc::clone(context), kinds::reconcile, concurrency, tasks.clone(), term.clone());
    tokio::join!(reconciling, async {
        tokio::select! { () = term.cancelled() => {} () = watching => {} }
    });
}

fn where_to_work(namespaces: Vec<String>, label: Option<(String, String)>) -> Namespaces {
    let namespaces: Vec<_> = namespaces.into_iter().filter(|namespace| !namespace.is_empty()).collect();
    match label {
        Some((key, value)) => Namespaces::Labelled(format!("{key}={value}")),
        None if namespaces.is_empty() => Namespaces::All,
        None => Namespaces::Listed(namespaces),
    }
}

async fn gauges(context: Arc<Context>, term: CancellationToken) {
    let mut tick = tokio::time::interval(GAUGES);
    loop {
        tokio::select! { () = term.cancelled() => return, _ = tick.tick() => context.metrics.observe(&context.store()) }
    }
}

/// 32 letters and digits: 190 bits from a cryptographic generator that the OS seeds. Each plan has some, and most are not used.
fn password() -> String {
    rand::rng().sample_iter(Alphanumeric).take(32).map(char::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_read_as_policies_have_them() {
        let read = peers(r#"[{"namespaceSelector": {"matchLabels": {"a": "b"}}}]"#).unwrap();
        assert_eq!(read.0.len(), 1);
        let refused = peers("monitoring").unwrap_err();
        assert!(refused.starts_with("not a JSON array of peers of a NetworkPolicy: "), "{refused}");
    }

    #[test]
    fn resources_are_read_as_containers_have_them() {
        let read = resources(r#"{"relay": {"limits": {"cpu": 1, "memory": "64Mi"}}}"#).unwrap();
        let limits = read.relay.limits.unwrap();
        assert_eq!((limits["cpu"].0.as_str(), limits["memory"].0.as_str(), read.relay.requests), ("1", "64Mi", None));
        assert_eq!(read.setup, Resources::default().setup);
        assert!(resources(r#"{"relais": {}}"#).unwrap_err().contains("relais"));
    }

    #[test]
    fn passwords_are_long_and_never_the_same() {
        assert_eq!(password().len(), 32);
        assert_ne!(password(), password());
    }
}
