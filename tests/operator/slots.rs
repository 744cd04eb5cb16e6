//! A Microservice whose log-tailing OutboxRelay is deleted: the replication slot goes with it.

use serde_json::{Value, json};
use weft::{
    api::v1alpha1::OutboxRelay,
    controllers::{
        kinds::reconcile,
        resources::{
            child::{ChildKind, ChildRef},
            key::ObjectId,
        },
        runtime::Context,
        store::{FOR_EVER, live::Live, live_pod::LivePod},
    },
};

use super::{
    reconcile::{context, microservice, orders, relay, server},
    server::{Asked, Server},
};

/// The contract of the set-up that was sent last.
fn set_up(asked: &[Asked]) -> Option<String> {
    let job = asked.iter().rfind(|asked| asked.line() == "POST jobs")?;
    let annotations = job.body["spec"]["template"]["metadata"]["annotations"].as_object()?;
    Some(annotations.values().filter_map(Value::as_str).find(|text| text.contains("kind: DatabaseSetup"))?.to_owned())
}

/// The Job that was sent last, from now on with that condition.
fn end_job(context: &Context, asked: &[Asked], condition: &str, message: &str) -> ChildRef {
    let job = asked.iter().rfind(|asked| asked.line() == "POST jobs").unwrap();
    let job = ChildRef::new(ChildKind::Job, job.body["metadata"]["name"].as_str().unwrap());
    let uid = context.store().child(&orders(), &job).unwrap().uid;
    let live: Live = serde_json::from_value(json!({
        "metadata": {"uid": uid, "resourceVersion": "900000", "managedFields": [{"manager": "weft", "operation": "Update"}]},
        "status": {"conditions": [{"type": condition, "status": "True", "reason": "", "message": message}]},
    }))
    .unwrap();
    context.store().set_child(&orders(), job.clone(), live.into());
    job
}

fn set_pod(context: &Context) {
    let pod: LivePod = serde_json::from_value(json!({
        "metadata": {"name": "orders-1", "namespace": "shop"},
        "spec": {"containers": [{"name": "relay", "ports": [{"containerPort": 9464}]}]},
        "status": {"phase": "Running", "podIP": "10.0.0.1"},
    }))
    .unwrap();
    context.store().set_pod(&orders(), "orders-1", pod.into());
}

/// The message of a condition in the status that was sent last.
fn message(asked: &[Asked], condition: &str) -> Option<String> {
    let status = asked.iter().rfind(|asked| asked.line() == "PATCH microservices/orders/status").unwrap();
    let conditions = status.body["status"]["conditions"].as_array().unwrap();
    let found = conditions.iter().find(|known| known["type"] == condition)?;
    found["message"].as_str().map(str::to_owned)
}

/// What does not change readiness is reported a while later.
async fn report(context: &std::sync::Arc<Context>) {
    reconcile(context, &orders()).await;
    tokio::time::advance(std::time::Duration::from_secs(30)).await;
    reconcile(context, &orders()).await;
}

fn recorded_slot(context: &Context) -> bool {
    context.store().recorded_set_up(&orders(), "orders").unwrap().replication_slot
}

/// A service whose relay reads the log runs, and the OutboxRelay is deleted.
async fn deleted() -> (Server, std::sync::Arc<Context>) {
    let object = microservice(&json!({"image": "shop/orders:1", "database": {"postgres": {}}}));
    let server = server(&object);
    let context = context(&server);
    context.store().set(object);
    context.store().set(relay(&json!(null)));
    reconcile(&context, &orders()).await;
    let asked = server.asked();
    assert!(!set_up(&asked).unwrap().contains("removeSlot"));
    end_job(&context, &asked, "Complete", "");
    set_pod(&context);
    reconcile(&context, &orders()).await;
    assert!(recorded_slot(&context));
    let requeue = context.store().remove::<OutboxRelay>(&ObjectId::new("shop", "events"), FOR_EVER);
    assert!(requeue.now.contains(&orders()));
    reconcile(&context, &orders()).await;
    assert_eq!(set_up(&server.asked()), None, "the pod with the relay has not ended");
    (server, context)
}

#[tokio::test]
async fn the_slot_is_removed_once_no_pod_has_a_relay() {
    let (server, context) = deleted().await;
    let requeue = context.store().remove_pod(&ObjectId::new("shop", "orders-1"));
    assert!(requeue.now.contains(&orders()));
    reconcile(&context, &orders()).await;
    let asked = server.asked();
    assert!(set_up(&asked).unwrap().contains("removeSlot: true"));
    assert!(asked.iter().all(|asked| asked.line() != "PATCH deployments/orders"), "the service is left as it is");
    reconcile(&context, &orders()).await;
    assert_eq!(server.lines(), [""; 0], "it runs");

    let job = end_job(&context, &asked, "Complete", "");
    reconcile(&context, &orders()).await;
    let lines = server.lines();
    let at = |line: &str| lines.iter().position(|known| known == line).unwrap_or_else(|| panic!("{line}: {lines:?}"));
    at("PATCH configmaps/orders-db-setup");
    assert!(!recorded_slot(&context));
    reconcile(&context, &orders()).await;
    reconcile(&context, &orders()).await;
    let rest: Vec<_> = lines.into_iter().chain(server.lines()).filter(|line| line.contains(" jobs")).collect();
    assert_eq!(rest, [format!("DELETE jobs/{}", job.name)], "it is done, and nothing is set up again");
}

#[tokio::test]
async fn a_relay_that_is_there_keeps_its_slot_whatever_its_spec_says() {
    let (server, context) = deleted().await;
    let mut polling = relay(&json!(null));
    polling.metadata.uid = Some("uid-polling".to_owned());
    polling.spec.mode = weft::api::v1alpha1::RelayMode::Polling;
    context.store().set(polling);
    context.store().remove_pod(&ObjectId::new("shop", "orders-1"));
    reconcile(&context, &orders()).await;
    assert_eq!(set_up(&server.asked()), None, "its contract may still be the earlier one");
    assert!(recorded_slot(&context));
}

#[tokio::test(start_paused = true)]
async fn a_slot_that_cannot_be_removed_is_a_condition_and_a_new_relay_keeps_it() {
    let (server, context) = deleted().await;
    context.store().remove_pod(&ObjectId::new("shop", "orders-1"));
    reconcile(&context, &orders()).await;
    let job = end_job(&context, &server.asked(), "Failed", "cannot remove the replication slot: is active for PID 7");
    report(&context).await;
    let message = message(&server.asked(), "SlotRemains").unwrap();
    assert!(message.contains("is active for PID 7") && message.contains(job.name.as_str()), "{message}");

    let mut another = relay(&json!(null));
    another.metadata.uid = Some("uid-another".to_owned());
    context.store().set(another);
    report(&context).await;
    let asked = server.asked();
    assert!(asked.iter().any(|asked| asked.line() == format!("DELETE jobs/{}", job.name)));
    assert!(recorded_slot(&context));
    assert_eq!(self::message(&asked, "SlotRemains"), None);
}
