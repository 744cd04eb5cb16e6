//! Why something does not get further: a pod's volumes, image and probes, a claim without a volume, a pod that is refused.
//!
//! Only Events carry that. They are listed, and only while something waits: a watch would cost a list of all of the
//! cluster's Events every few minutes, since the API server keeps no cache of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::api::events::v1::Event;
use kube::{
    Api,
    api::{ListParams, ResourceExt},
};

use crate::controllers::{
    request::within_deadline,
    resources::{observed::Problem, reason::Reason},
    runtime::{Context, Priority},
    store::{Waiting, live::pods_refused, live_pod::tail},
};

/// How often the Events of what waits are listed; those of what has not waited for so long are not.
const PERIOD: Duration = Duration::from_secs(10);
/// How many of them at most: when a whole cluster waits, the others have their turn in the next rounds.
const PER_ROUND: usize = 32;

/// Lists the Events of what waits for ever.
pub async fn run(context: Arc<Context>) {
    let mut rounds = Rounds::default();
    loop {
        tokio::time::sleep(PERIOD).await;
        let waiting = context.store().waiting();
        context.store().retain_waits(&waiting);
        for waiting in rounds.next(waiting) {
            explain(&context, &waiting).await;
        }
    }
}

/// What waits, with the round in which it was last explained; zero when it never was.
#[derive(Debug, Default)]
struct Rounds {
    round: u64,
    explained: BTreeMap<Waiting, u64>,
}

impl Rounds {
    /// What is to be explained in this round: what waited in the last one too, and longest without being explained.
    fn next(&mut self, waiting: BTreeSet<Waiting>) -> Vec<Waiting> {
        self.round += 1;
        let mut due: Vec<_> = waiting.iter().filter_map(|one| Some((*self.explained.get(one)?, one.clone()))).collect();
        due.sort();
        due.truncate(PER_ROUND);
        self.explained = waiting
            .into_iter()
            .map(|one| {
                let last = self.explained.get(&one).copied().unwrap_or_default();
                (one, last)
            })
            .collect();
        let due: Vec<_> = due.into_iter().map(|(_, one)| one).collect();
        self.explained.extend(due.iter().map(|one| (one.clone(), self.round)));
        due
    }
}

async fn explain(context: &Context, waiting: &Waiting) {
    let api: Api<Event> = Api::namespaced(context.client.clone(), waiting.namespace());
    let about = ListParams::default().fields(&selector(waiting));
    match within_deadline(api.list(&about)).await {
        Ok(events) => {
            let requeue = context.store().set_wait(waiting, explanation(waiting, events.items));
            context.enqueue(requeue, Priority::Event);
        }
        Err(error) => tracing::debug!(?waiting, %error, "cannot list the Events of what waits"),
    }
}

fn selector(waiting: &Waiting) -> String {
    match waiting {
        Waiting::Pod { uid, .. } | Waiting::Controller { uid, .. } => format!("regarding.uid={uid}"),
        Waiting::Claim { claim, .. } => format!("regarding.kind=PersistentVolumeClaim,regarding.name={claim}"),
    }
}

/// Events that say how far something is; the newest of them counts.
fn is_relevant(waiting: &Waiting, reason: &str) -> bool {
    match waiting {
        Waiting::Pod { .. } => matches!(
            reason,
            "FailedMount"
                | "FailedAttachVolume"
                | "SuccessfulAttachVolume"
                | "FailedCreatePodSandBox"
                | "Pulling"
                | "Pulled"
                | "Started"
                | "Unhealthy"
                | "ProbeWarning"
        ),
        Waiting::Controller { .. } => matches!(reason, "FailedCreate" | "SuccessfulCreate"),
        Waiting::Claim { .. } => matches!(
            reason,
            "ProvisioningFailed" | "FailedBinding" | "ExternalProvisioning" | "Provisioning" | "ProvisioningSucceeded"
        ),
    }
}

/// What the newest of the relevant Events says, unless that it got further.
fn explanation(waiting: &Waiting, mut events: Vec<Event>) -> Option<Problem> {
    // the version moves when an Event is repeated
    events.sort_by_key(|event| event.resource_version().and_then(|version| version.parse::<u64>().ok()));
    let newest =
        events.into_iter().rev().find(|event| is_relevant(waiting, event.reason.as_deref().unwrap_or_default()))?;
    let (reason, note) = (newest.reason.unwrap_or_default(), tail(&newest.note.unwrap_or_default()));
    match waiting {
        Waiting::Pod { pod, .. } => of_pod(&pod.name, &reason, &note),
        Waiting::Controller { .. } if reason == "FailedCreate" => Some(pods_refused(&note)),
        Waiting::Claim { pod, claim } if reason != "ProvisioningSucceeded" => Some(Problem {
            reason: Reason::VolumeNotProvisioned,
            message: format!("claim {claim} of pod {} has no volume: {note}", pod.name),
        }),
        Waiting::Controller { .. } | Waiting::Claim { .. } => None,
    }
}

fn of_pod(pod: &str, reason: &str, note: &str) -> Option<Problem> {
    let missing = |what: &str| note.contains(&format!("{what} \"")) && note.contains("not found");
    let (reason, message) = match reason {
        "FailedMount" | "FailedAttachVolume" => {
            let reason = match () {
                () if missing("secret") => Reason::SecretMissing,
                () if missing("configmap") => Reason::ConfigMapMissing,
                () => Reason::VolumeNotMounted,
            };
            (reason, format!("pod {pod} waits for a volume: {note}"))
        }
        "FailedCreatePodSandBox" => (Reason::ContainerRefused, format!("pod {pod} cannot start: {note}")),
        "Pulling" => (Reason::ImagePulling, format!("pod {pod} waits for its image: {note}")),
        "Unhealthy" | "ProbeWarning" => (Reason::ProbeFailing, format!("pod {pod} is not ready: {note}")),
        _ => return None,
    };
    Some(Problem { reason, message })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::controllers::resources::{
        child::{ChildKind, ChildRef},
        key::{Key, ObjectId, ObjectKind},
    };

    fn event(version: u32, reason: &str, note: &str) -> Event {
        serde_json::from_value(json!({"metadata": {"name": "orders-1.17", "resourceVersion": version.to_string()},
            "eventTime": null, "reason": reason, "note": note}))
        .unwrap()
    }

    fn pod(name: &str) -> Waiting {
        Waiting::Pod { pod: ObjectId::new("shop", name), uid: "1".to_owned() }
    }

    fn of_pod(events: Vec<Event>) -> Option<(Reason, String)> {
        explanation(&pod("orders-1"), events).map(|problem| (problem.reason, problem.message))
    }

    #[test]
    fn the_newest_event_about_a_volume_explains_the_wait() {
        let missing = "MountVolume.SetUp failed for volume \"tls\" : secret \"orders-tls\" not found";
        let attached = "Multi-Attach error for volume \"pvc-1\": it is used by a pod on another node";
        let events = vec![
            event(10, "FailedMount", missing),
            event(9, "FailedAttachVolume", attached),
            event(11, "Other", "else"),
        ];
        let (reason, message) = of_pod(events).unwrap();
        assert_eq!(reason, Reason::SecretMissing);
        assert!(message.contains("pod orders-1 waits") && message.contains("\"orders-tls\""), "{message}");
        assert_eq!(of_pod(vec![event(9, "FailedAttachVolume", attached)]).unwrap().0, Reason::VolumeNotMounted);
        let mounted = vec![event(10, "FailedMount", missing), event(12, "SuccessfulAttachVolume", "attached")];
        assert_eq!(of_pod(mounted), None, "it got further");
        assert_eq!(of_pod(vec![event(11, "Other", "else")]), None);
    }

    #[test]
    fn an_image_that_is_being_pulled_and_a_probe_that_fails_are_causes() {
        let pulling = event(1, "Pulling", "Pulling image \"shop/orders:9\"");
        let (reason, message) = of_pod(vec![pulling.clone()]).unwrap();
        assert_eq!(reason, Reason::ImagePulling);
        assert!(message.contains("shop/orders:9"), "{message}");
        assert_eq!(of_pod(vec![pulling.clone(), event(2, "Pulled", "Pulled")]), None);
        let probe = "Readiness probe failed: HTTP probe failed with statuscode: 404";
        let (reason, message) = of_pod(vec![pulling, event(2, "Started", ""), event(3, "Unhealthy", probe)]).unwrap();
        assert_eq!((reason, message), (Reason::ProbeFailing, format!("pod orders-1 is not ready: {probe}")));
    }

    #[test]
    fn a_pod_that_is_refused_and_a_claim_without_a_volume_are_causes() {
        let owner = Key::new(ObjectKind::Microservice, "shop", "orders");
        let child = ChildRef::new(ChildKind::StatefulSet, "orders-db");
        let set = Waiting::Controller { owner, child, uid: "7".to_owned() };
        let refused = "create Pod orders-db-0 in StatefulSet orders-db failed error: pods \"orders-db-0\" is forbidden: exceeded quota: small";
        let problem = explanation(&set, vec![event(1, "FailedCreate", refused)]).unwrap();
        assert_eq!(problem.reason, Reason::QuotaExceeded);
        assert!(problem.message.contains("exceeded quota: small"), "{}", problem.message);
        let made = vec![event(1, "FailedCreate", refused), event(2, "SuccessfulCreate", "created")];
        assert_eq!(explanation(&set, made), None);

        let claim = Waiting::Claim { pod: ObjectId::new("shop", "orders-db-0"), claim: "data-orders-db-0".to_owned() };
        let missing = "storageclass.storage.k8s.io \"fast\" not found";
        let problem = explanation(&claim, vec![event(1, "ProvisioningFailed", missing)]).unwrap();
        assert_eq!(problem.reason, Reason::VolumeNotProvisioned);
        assert_eq!(problem.message, format!("claim data-orders-db-0 of pod orders-db-0 has no volume: {missing}"));
        assert_eq!(selector(&claim), "regarding.kind=PersistentVolumeClaim,regarding.name=data-orders-db-0");
    }

    #[test]
    fn everything_that_waits_has_its_turn() {
        let all: BTreeSet<_> = (0..40).map(|number| pod(&format!("orders-{number}"))).collect();
        let mut rounds = Rounds::default();
        assert_eq!(rounds.next(all.clone()), [], "it has only begun to wait");
        let first: BTreeSet<_> = rounds.next(all.clone()).into_iter().collect();
        let second: BTreeSet<_> = rounds.next(all.clone()).into_iter().collect();
        assert_eq!((first.len(), second.len()), (PER_ROUND, PER_ROUND));
        assert_eq!(first.union(&second).count(), 40);
    }
}
