//! What the scenarios share. A scenario is a function that gets a namespace with an operator, and says by an error what
//! is not as promised; the dump of the namespace then goes into the failure.

mod audit;
mod chaos;
mod checks;
mod cluster;
mod database;
mod dump;
mod http;
mod manifests;
mod objects;
mod operator;
mod shell;

use std::{
    io::Write,
    panic::AssertUnwindSafe,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use futures::FutureExt;
use k8s_openapi::api::core::v1::Namespace;
use kube::{
    Api, Client,
    api::{DeleteParams, PostParams},
};

pub use audit::Request;
pub use chaos::{Kill, Victim, seed};
pub use checks::Conditions;
pub use manifests::{SCHEMA, configmap, microservice, relay, saga};
pub use objects::merged;
pub use operator::{Release, make_image_next};
pub use shell::{cluster as cluster_tool, kubectl};

/// The image that the scenarios' services run.
pub const SERVICE_IMAGE: &str = "localhost/weft-examples:dev";
/// Namespaces of scenarios carry it, so that those left by an earlier run can be found.
const LABEL: &str = "weft.dev/e2e";

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(400);

/// A scenario's namespace on the cluster.
pub struct Scenario {
    pub name: &'static str,
    pub client: Client,
    pub namespace: String,
    /// Beside `namespace`, those that the scenario made for itself.
    others: std::sync::Mutex<Vec<String>>,
}

/// Whether a scenario can share the cluster with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Company {
    /// Its operator works in its own namespace only.
    Others,
    /// Its operator works in the whole cluster.
    Alone,
}

/// Runs a scenario in a fresh namespace. Panics with its dump when it fails.
pub async fn scenario<F>(name: &'static str, company: Company, body: F)
where
    F: AsyncFnOnce(&Scenario) -> Result<()>,
{
    static ALONE: tokio::sync::RwLock<()> = tokio::sync::RwLock::const_new(());
    let client = match cluster::prepared().await {
        Ok(client) => client,
        Err(error) => panic!("{error:#}"),
    };
    let _guards = match company {
        Company::Others => (Some(ALONE.read().await), None),
        Company::Alone => (None, Some(ALONE.write().await)),
    };
    let begun = Instant::now();
    let prefix = name.replace('_', "-");
    let namespace = format!("e2e-{}-{:06x}", prefix, rand::random::<u32>() >> 8);
    let scenario = Scenario { name, client, namespace, others: std::sync::Mutex::default() };
    progress(&format!("{name}: begins in {}", scenario.namespace));
    let outcome = match scenario.create_namespace(&scenario.namespace).await {
        Ok(()) => AssertUnwindSafe(body(&scenario)).catch_unwind().await.unwrap_or_else(|panic| {
            let message = panic.downcast_ref::<String>().cloned();
            let message = message.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
            Err(anyhow!("panicked: {}", message.unwrap_or_default()))
        }),
        Err(error) => Err(error),
    };
    let seconds = begun.elapsed().as_secs();
    match outcome {
        Ok(()) => {
            progress(&format!("{name}: passed in {seconds} s"));
            if let Err(error) = scenario.clean_up().await {
                panic!("{name} passed, but cleaning up failed: {error:#}");
            }
        }
        Err(error) => {
            // in one line, for the summary of `make test`
            progress(&format!("{name}: FAILED after {seconds} s: {}", format!("{error:#}").replace('\n', " | ")));
            let (file, dump) = scenario.dump(&error).await;
            if std::env::var_os("WEFT_E2E_KEEP").is_none() {
                let _ = scenario.clean_up().await;
            }
            panic!("{dump}\nthe whole of it: {}\n\n{name}: {error:#}", file.display());
        }
    }
}

/// A deadline ends a test that would never end; it is no measurement.
const PATIENCE: u32 = 3;

/// A line that is seen at once, also while the test harness captures output.
pub fn progress(line: &str) {
    let _ = writeln!(std::io::stderr(), "    {line}");
}

impl Scenario {
    /// Looks until `probe` gives a value. A failing look is a look without a value: servers are killed here.
    /// `within` is for an idle machine; a busy one gets [`PATIENCE`] times as long.
    pub async fn until<T>(
        &self,
        what: &str,
        within: Duration,
        probe: impl AsyncFnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        self.promptly(what, within * PATIENCE, probe).await
    }

    /// As [`until`](Self::until), where `within` is the promise itself.
    pub async fn promptly<T>(
        &self,
        what: &str,
        within: Duration,
        mut probe: impl AsyncFnMut() -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + within;
        loop {
            let last = match probe().await {
                Ok(Some(value)) => return Ok(value),
                Ok(None) => None,
                Err(error) => Some(error),
            };
            if Instant::now() > deadline {
                let seconds = within.as_secs();
                return Err(match last {
                    None => anyhow!("waited {seconds} s for this, in vain: {what}"),
                    Some(error) => error.context(format!("waited {seconds} s for this, in vain: {what}")),
                });
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Another namespace for the scenario, removed with it.
    pub async fn another_namespace(&self, suffix: &str) -> Result<String> {
        let name = format!("{}-{suffix}", self.namespace);
        self.create_namespace(&name).await?;
        self.others.lock().map_err(|_| anyhow!("poisoned"))?.push(name.clone());
        Ok(name)
    }

    /// The same scenario, looking at another namespace.
    pub fn within(&self, namespace: &str) -> Self {
        Self {
            name: self.name,
            client: self.client.clone(),
            namespace: namespace.to_owned(),
            others: std::sync::Mutex::default(),
        }
    }

    async fn create_namespace(&self, name: &str) -> Result<()> {
        let namespace: Namespace = serde_json::from_value(serde_json::json!({
            "metadata": {"name": name, "labels": {
                LABEL: "true",
                "pod-security.kubernetes.io/enforce": "restricted",
            }},
        }))?;
        let created = Api::all(self.client.clone()).create(&PostParams::default(), &namespace).await;
        created.with_context(|| format!("making namespace {name}"))?;
        Ok(())
    }

    /// Custom resources first, while their operator still runs; then the namespaces, without waiting for their end.
    async fn clean_up(&self) -> Result<()> {
        let mut namespaces = self.others.lock().map_err(|_| anyhow!("poisoned"))?.clone();
        namespaces.push(self.namespace.clone());
        for namespace in &namespaces {
            let kinds = "sagas.weft.dev,outboxrelays.weft.dev,microservices.weft.dev";
            let deletion = ["delete", kinds, "--all", "--namespace", namespace, "--timeout=60s"];
            shell::kubectl(&deletion).await.context("deleting the custom resources")?;
        }
        let api: Api<Namespace> = Api::all(self.client.clone());
        for namespace in namespaces.iter().rev() {
            // what a release has outside its namespace goes with the release
            shell::uninstall_releases(namespace).await?;
            // a scenario may have deleted it
            if api.get_opt(namespace).await?.is_some() {
                api.delete(namespace, &DeleteParams::default()).await?;
            }
        }
        Ok(())
    }
}

/// The checkout.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Fails unless both are the same.
pub fn same<T: PartialEq + std::fmt::Debug>(what: &str, before: &T, after: &T) -> Result<()> {
    if before != after {
        bail!("{what} changed\nfrom {before:#?}\nto {after:#?}");
    }
    Ok(())
}
