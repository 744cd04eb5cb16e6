//! Why a pod's first container is not made yet: its volumes, mostly.
//!
//! Only Events carry that. They are listed, and only while a pod waits: a watch would cost a list of all of the
//! cluster's Events every few minutes, since the API server keeps no cache of them.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::api::events::v1::Event;
use kube::{
    Api,
    api::{ListParams, ResourceExt},
};

use crate::{
    contract::status::Problem,
    controllers::{
        request::within_deadline,
        resources::key::ObjectId,
        runtime::{Context, Priority},
        store::live_pod::tail,
    },
};

/// How often the Events of waiting pods are listed; those of a pod that has not waited for so long are not.
const PERIOD: Duration = Duration::from_secs(10);

/// Lists the Events of waiting pods for ever.
pub async fn run(context: Arc<Context>) {
    let mut before = BTreeMap::new();
    loop {
        tokio::time::sleep(PERIOD).await;
        let waiting = context.store().pods_being_created();
        for (pod, uid) in waiting.iter().filter(|(pod, uid)| before.get(*pod) == Some(*uid)) {
            explain(&context, pod, uid).await;
        }
        before = waiting;
    }
}

async fn explain(context: &Context, pod: &ObjectId, uid: &str) {
    let api: Api<Event> = Api::namespaced(context.client.clone(), &pod.namespace);
    let about = ListParams::default().fields(&format!("regarding.uid={uid}"));
    match within_deadline(api.list(&about)).await {
        Ok(events) => {
            let requeue = context.store().set_wait(pod, explanation(&pod.name, events.items));
            context.enqueue(requeue, Priority::Event);
        }
        Err(error) => tracing::debug!(pod = pod.name, %error, "cannot list the Events of a pod that waits"),
    }
}

/// The newest of the pod's Events about volumes, unless the kubelet got further since.
fn explanation(pod: &str, mut events: Vec<Event>) -> Option<Problem> {
    // the version moves when an Event is repeated
    events.sort_by_key(|event| event.resource_version().and_then(|version| version.parse::<u64>().ok()));
    let relevant = ["FailedMount", "FailedAttachVolume", "SuccessfulAttachVolume", "Pulling", "Pulled"];
    let reason = |event: &Event| event.reason.clone().unwrap_or_default();
    let newest = events.into_iter().rev().find(|event| relevant.contains(&reason(event).as_str()))?;
    let note = newest.note.clone().filter(|_| reason(&newest).starts_with("Failed"))?;
    let missing = |what: &str| note.contains(&format!("{what} \"")) && note.contains("not found");
    let reason = match () {
        () if missing("secret") => "SecretMissing",
        () if missing("configmap") => "ConfigMapMissing",
        () => "VolumeNotMounted",
    };
    Some(Problem { reason: reason.to_owned(), message: format!("pod {pod} waits for a volume: {}", tail(&note)) })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(version: u32, reason: &str, note: &str) -> Event {
        serde_json::from_value(json!({"metadata": {"name": "orders-1.17", "resourceVersion": version.to_string()},
            "eventTime": null, "reason": reason, "note": note}))
        .unwrap()
    }

    #[test]
    fn the_newest_event_about_a_volume_explains_the_wait() {
        let missing = "MountVolume.SetUp failed for volume \"tls\" : secret \"orders-tls\" not found";
        let attached = "Multi-Attach error for volume \"pvc-1\": it is used by a pod on another node";
        let events = vec![
            event(10, "FailedMount", missing),
            event(9, "FailedAttachVolume", attached),
            event(11, "Unhealthy", "else"),
        ];
        let problem = explanation("orders-1", events).unwrap();
        assert_eq!(problem.reason, "SecretMissing");
        assert!(problem.message.contains("pod orders-1 waits") && problem.message.contains("\"orders-tls\""));
        let problem = explanation("orders-1", vec![event(9, "FailedAttachVolume", attached)]).unwrap();
        assert_eq!(problem.reason, "VolumeNotMounted");
        let mounted = vec![event(10, "FailedMount", missing), event(12, "Pulling", "Pulling image \"shop/orders:1\"")];
        assert_eq!(explanation("orders-1", mounted), None, "it waits for its image now");
        assert_eq!(explanation("orders-1", vec![event(11, "Unhealthy", "else")]), None);
    }
}
