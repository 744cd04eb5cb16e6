//! What all scenarios need once: a cluster that answers, the images on it, the definitions of the three kinds.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::{apps::v1::Deployment, core::v1::Namespace};
use kube::{
    Api, Client, Config,
    api::{DeleteParams, ListParams},
};
use tokio::sync::OnceCell;
use weft::api::v1alpha1::{Microservice, OutboxRelay, Saga};

use super::{LABEL, progress, root, shell};

const NO_CLUSTER: &str = "these tests need a cluster: run `make e2e`, or `make cluster image` and then \
     `KUBECONFIG=./kubeconfig cargo test --test e2e`";

/// A client of the prepared cluster, for the calling test's runtime.
pub async fn prepared() -> Result<Client> {
    static PREPARED: OnceCell<Result<(), String>> = OnceCell::const_new();
    let client = connect().await?;
    let prepared =
        PREPARED.get_or_init(|| async { prepare(&client).await.map_err(|error| format!("{error:#}")) }).await;
    match prepared {
        Ok(()) => Ok(client),
        Err(message) => bail!("{message}"),
    }
}

async fn connect() -> Result<Client> {
    // an error means that it is installed already
    let _ = rustls::crypto::ring::default_provider().install_default();
    if std::env::var_os("KUBECONFIG").is_none() {
        bail!("KUBECONFIG is not set; {NO_CLUSTER}");
    }
    let mut config = Config::infer().await.context(NO_CLUSTER)?;
    config.read_timeout = Some(Duration::from_secs(30));
    config.connect_timeout = Some(Duration::from_secs(5));
    let client = Client::try_from(config)?;
    tokio::time::timeout(Duration::from_secs(10), client.apiserver_version())
        .await
        .context(NO_CLUSTER)?
        .context(NO_CLUSTER)?;
    Ok(client)
}

async fn prepare(client: &Client) -> Result<()> {
    refuse_a_cluster_wide_operator(client).await?;
    clean_up_after_earlier_runs(client).await?;
    progress("loading the images");
    shell::run(root().join("hack/load"), &[]).await.context("loading the images")?;
    progress("installing the definitions");
    let charts = root().join("charts/weft-crds").display().to_string();
    let options = ["--namespace", "weft-crds", "--create-namespace", "--wait"];
    shell::helm(&[&["upgrade", "--install", "weft-crds", &charts], &options[..]].concat()).await?;
    // established is not yet served
    let served = async || {
        let one = ListParams::default().limit(1);
        Api::<Microservice>::all(client.clone()).list(&one).await?;
        Api::<OutboxRelay>::all(client.clone()).list(&one).await?;
        Api::<Saga>::all(client.clone()).list(&one).await
    };
    let mut tries = 60;
    while let Err(error) = served().await {
        tries -= 1;
        if tries == 0 {
            return Err(error).context("the definitions are installed and not served");
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}

/// Each scenario has an operator of its own; one for all namespaces would interfere with every one of them.
async fn refuse_a_cluster_wide_operator(client: &Client) -> Result<()> {
    let labels = ListParams::default().labels("app.kubernetes.io/name=weft,app.kubernetes.io/component=operator");
    for operator in Api::<Deployment>::all(client.clone()).list(&labels).await? {
        let namespace = operator.metadata.namespace.unwrap_or_default();
        let containers =
            operator.spec.and_then(|spec| spec.template.spec).map(|pod| pod.containers).unwrap_or_default();
        let args = containers.iter().flat_map(|container| container.args.iter().flatten());
        if !namespace.starts_with("e2e-") && !args.into_iter().any(|arg| arg.starts_with("--namespaces")) {
            bail!(
                "an operator in namespace {namespace} works in the whole cluster and would interfere with these tests: \
                 take it away (helm uninstall --namespace {namespace} {}), or run `make e2e`, which makes a cluster of its own",
                operator.metadata.name.unwrap_or_default()
            );
        }
    }
    Ok(())
}

async fn clean_up_after_earlier_runs(client: &Client) -> Result<()> {
    let api: Api<Namespace> = Api::all(client.clone());
    for namespace in api.list(&ListParams::default().labels(LABEL)).await? {
        if namespace.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let name = namespace.metadata.name.unwrap_or_default();
        progress(&format!("removing {name} of an earlier run"));
        shell::uninstall_releases(&name).await?;
        api.delete(&name, &DeleteParams::default()).await?;
    }
    Ok(())
}
