//! Waits until the API server serves Weft's kinds: the operator may be installed before its definitions.

use std::time::Duration;

use kube::Client;

use crate::{
    api::v1alpha1::{GROUP, VERSION},
    controllers::request::within_deadline,
    crds,
};

const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Resolves once all kinds are served; until then reports to `waiting` what is missing.
pub async fn wait(client: &Client, waiting: impl Fn(Option<String>)) {
    let (mut pause, mut reported) = (FIRST_PAUSE, None);
    loop {
        let missing = missing(client).await;
        if missing != reported {
            if let Some(missing) = &missing {
                tracing::warn!(missing, "waiting");
            } else {
                tracing::info!("all definitions are served");
            }
            waiting(missing.clone());
            reported.clone_from(&missing);
        }
        if missing.is_none() {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// A sentence about what is missing.
async fn missing(client: &Client) -> Option<String> {
    let wanted: Vec<_> = crds::all().into_iter().map(|crd| crd.spec.names.plural).collect();
    let group_version = format!("{GROUP}/{VERSION}");
    let served = match within_deadline(client.list_api_group_resources(&group_version)).await {
        Ok(served) => served.resources.into_iter().map(|resource| resource.name).collect(),
        Err(error) if error.code() == Some(404) => Vec::new(),
        Err(error) => return Some(format!("the API server does not list what it serves: {}", error.message())),
    };
    not_installed(wanted.into_iter().filter(|plural| !served.contains(plural)).map(|plural| name(&plural)))
}

/// The name of the definition of `plural`.
pub fn name(plural: &str) -> String {
    format!("{plural}.{GROUP}")
}

/// The sentence about definitions that the API server does not serve; `None` when there are none.
pub fn not_installed(missing: impl IntoIterator<Item: Into<String>>) -> Option<String> {
    let missing: Vec<String> = missing.into_iter().map(Into::into).collect();
    (!missing.is_empty()).then(|| {
        format!(
            "the custom resource definition {} in version {VERSION} is not installed: install the chart weft-crds",
            missing.join(", ")
        )
    })
}
