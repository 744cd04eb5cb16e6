//! Has running pods read a changed contract now instead of within a minute or so.
//!
//! A kubelet refreshes the ConfigMaps that a pod mounts in the pod's periodic sync, a minute to a minute and a half apart, and
//! whenever the pod object changes: an annotation is such a change and restarts nothing
//! (<https://kubernetes.io/docs/concepts/configuration/configmap/#mounted-configmaps-are-updated-automatically>).

use futures::{StreamExt, stream};
use kube::{
    Api, Client,
    api::{Patch, PatchParams},
};
use serde_json::json;

use crate::controllers::{
    request::within_deadline,
    resources::labels::{CONTRACT_VERSION_ANNOTATION, FIELD_MANAGER},
    store::{live::Live, live_pod},
};

/// Pods that are notified at a time.
const AT_A_TIME: usize = 8;

/// Notifies `pods` that the contract they mount is at `version`. One that cannot be notified reads it at its next sync.
pub async fn notify(client: &Client, namespace: &str, pods: &[String], version: u64) {
    let api: Api<Live> = Api::namespaced_with(client.clone(), namespace, &live_pod::resource());
    let patch = json!({"metadata": {"annotations": {CONTRACT_VERSION_ANNOTATION: version.to_string()}}});
    let (api, params, patch) = (&api, &PatchParams::apply(FIELD_MANAGER), &Patch::Merge(patch));
    stream::iter(pods)
        .for_each_concurrent(AT_A_TIME, |pod| async move {
            if let Err(error) = within_deadline(api.patch(pod, params, patch)).await {
                tracing::debug!(pod, %error, "cannot notify a pod; it reads its contract at its next sync");
            }
        })
        .await;
}
