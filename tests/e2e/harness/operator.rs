//! The operator of a scenario: a release of the chart, in the scenario's own namespace.

use anyhow::{Context, Result};
use tokio::sync::OnceCell;
use weft::api::v1alpha1::{Microservice, OutboxRelay, Saga};

use super::{Scenario, microservice, relay, root, saga, shell};

/// Service account, Deployment and Lease of the operator: the release's name.
pub const NAME: &str = "weft";

/// The values of a release that scenarios vary.
#[derive(Clone, Debug)]
pub struct Release {
    pub tag: &'static str,
    pub replicas: u32,
    /// With a broker (`weft-nats`) beside the operator.
    pub nats: bool,
    /// Namespaces that it works in; all when empty.
    pub namespaces: Vec<String>,
}

impl Scenario {
    /// The release most scenarios have: one operator, no broker, this namespace.
    pub fn release(&self) -> Release {
        Release { tag: "dev", replicas: 1, nats: false, namespaces: vec![self.namespace.clone()] }
    }

    /// `helm upgrade --install`, until it is ready.
    pub async fn install(&self, release: &Release) -> Result<()> {
        let chart = root().join("charts/weft").display().to_string();
        let Release { tag, replicas, nats, namespaces } = release;
        let namespaces = if namespaces.is_empty() { "All".into() } else { serde_json::json!(namespaces) };
        let values = serde_json::json!({
            "image": {"tag": tag},
            "replicas": replicas,
            "nats": {"enabled": nats, "storage": {"size": "512Mi"}},
            "namespaces": namespaces,
            "log": "info,weft=debug",
        });
        let values = values.as_object().into_iter().flatten().map(|(key, value)| format!("{key}={value}"));
        let values: Vec<String> = values.flat_map(|value| ["--set-json".to_owned(), value]).collect();
        let mut args = vec!["upgrade", "--install", NAME, &chart, "--namespace", &self.namespace];
        args.extend(["--wait", "--timeout", "9m"]);
        args.extend(values.iter().map(String::as_str));
        shell::helm(&args).await.context("installing the operator")?;
        Ok(())
    }

    /// The operator with a broker, and on it two services, a relay of one of them, and a saga over both; all Ready.
    pub async fn install_one_of_each(&self) -> Result<()> {
        self.install(&Release { nats: true, ..self.release() }).await?;
        for service in ["stock", "travel"] {
            self.apply_service(&microservice(service)).await?;
        }
        self.apply(&relay("stock", "LogTailing")).await?;
        self.apply(&saga("trip", "stock", "travel")).await?;
        for service in ["stock", "travel"] {
            self.ready::<Microservice>(service).await?;
        }
        self.ready::<OutboxRelay>("stock").await?;
        self.ready::<Saga>("trip").await
    }

    /// `weft broker …`, as a person runs it in the operator's pod.
    pub async fn weft_broker(&self, args: &[&str]) -> Result<String> {
        let command: Vec<_> = ["weft", "broker"].iter().chain(args).copied().collect();
        self.exec(&format!("deployment/{NAME}"), &command).await
    }

    pub async fn uninstall(&self) -> Result<()> {
        shell::helm(&["uninstall", NAME, "--namespace", &self.namespace, "--wait"]).await?;
        Ok(())
    }

    /// `system:serviceaccount:NAMESPACE:NAME`, as the audit log has it.
    pub fn operator_user(&self) -> String {
        format!("system:serviceaccount:{}:{NAME}", self.namespace)
    }
}

/// The same image under another tag, as a next version would be; made known to the cluster once.
pub async fn make_image_next() -> Result<()> {
    static LOADED: OnceCell<()> = OnceCell::const_new();
    let load = async || {
        let archive = root().join("target/images/weft.oci.tar").display().to_string();
        shell::cluster(&["load", "--name", "localhost/weft:next", &archive]).await.map(drop)
    };
    LOADED.get_or_try_init(load).await.map(drop)
}
