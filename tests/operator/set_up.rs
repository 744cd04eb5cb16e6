//! A Microservice while its set-up is done, fails, or is deleted.

use std::{sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft::{
    api::v1alpha1::Microservice,
    controllers::{
        kinds::reconcile,
        resources::{
            child::{ChildKind, ChildRef},
            key::ObjectId,
            observed::Problem,
            reason::Reason,
            settings::{Resources, Settings},
        },
        runtime::{self, Context, Priority, Verdict},
        store::{FOR_EVER, Waiting, live::Live, live_pod::LivePod},
    },
};

use super::{
    reconcile::{context, context_of, microservice, orders, server},
    server::{Asked, Server},
    settings::settings,
};

fn version(number: u32, replicas: u32, last: Option<&str>) -> Microservice {
    let mut object = microservice(&json!({
        "image": format!("shop/orders:{number}"), "replicas": replicas,
        "database": {"postgres": {}, "migrations": {"configMap": "orders-migrations", "last": last}},
    }));
    object.metadata.generation = Some(i64::from(number));
    object.metadata.resource_version = Some(if number == 1 { 1 } else { 100_000 }.to_string());
    object
}

/// The ConfigMap of migrations has these files from now on.
fn migrate(server: &Server, context: &Context, files: &[&str]) {
    let data: serde_json::Map<String, Value> =
        files.iter().map(|file| ((*file).to_owned(), json!("select 1"))).collect();
    let version = 1000 + files.len();
    let metadata = json!({"name": "orders-migrations", "namespace": "shop", "resourceVersion": version.to_string()});
    server.rule(move |asked| {
        (asked.line() == "GET configmaps/orders-migrations").then(|| (200, json!({"metadata": metadata, "data": data})))
    });
    context.store().set_config_map(ObjectId::new("shop", "orders-migrations"), version.try_into().unwrap());
}

/// The Job that exists, from now on with that condition.
fn end_job(context: &Context, condition: &str) -> ChildRef {
    let (job, seen) =
        context.store().children(&orders()).into_iter().rfind(|(child, _)| child.kind == ChildKind::Job).unwrap();
    let live: Live = serde_json::from_value(json!({
        "metadata": {"uid": seen.uid, "resourceVersion": "900000",
            "managedFields": [{"manager": "weft", "operation": "Update"}]},
        "status": {"conditions": [{"type": condition, "status": "True", "reason": "", "message": "002.sql: no"}]},
    }))
    .unwrap();
    context.store().set_child(&orders(), job.clone(), live.into());
    job
}

fn delete_child(context: &Context, child: &ChildRef) {
    let uid = context.store().child(&orders(), child).unwrap().uid.clone();
    context.store().remove_child(&orders(), child, &uid, FOR_EVER);
}

/// Version 1 runs: its set-up is done.
async fn running(object: &Microservice) -> (Server, Arc<Context>) {
    let server = server(object);
    let context = context(&server);
    context.store().set(object.clone());
    migrate(&server, &context, &["001.sql"]);
    reconcile(&context, &orders()).await;
    reconcile(&context, &orders()).await;
    assert!(server.lines().contains(&"POST jobs".to_owned()));
    end_job(&context, "Complete");
    reconcile(&context, &orders()).await;
    (server, context)
}

/// Image and replicas of the Deployment that was sent last.
fn sent(asked: &[Asked]) -> Option<(String, u64)> {
    let deployment = asked.iter().rfind(|asked| asked.line() == "PATCH deployments/orders")?;
    let spec = &deployment.body["spec"];
    let image = spec["template"]["spec"]["containers"][0]["image"].as_str()?;
    Some((image.to_owned(), spec["replicas"].as_u64()?))
}

fn condition(context: &Context, type_: &str) -> String {
    let object = context.store().get::<Microservice>(&orders().id).unwrap();
    let status = object.status.as_ref().unwrap();
    status.conditions.iter().find(|condition| condition.type_ == type_).unwrap().status.clone()
}

/// The stages of a roll-out are reported a while later.
async fn report_progress(context: &Arc<Context>) {
    tokio::time::advance(std::time::Duration::from_secs(30)).await;
    reconcile(context, &orders()).await;
}

#[tokio::test]
async fn a_failing_migration_stops_neither_scaling_nor_repair_nor_does_a_restart() {
    let (server, context_) = running(&version(1, 1, Some("001.sql"))).await;
    assert_eq!(sent(&server.asked()), Some(("shop/orders:1".to_owned(), 1)));

    migrate(&server, &context_, &["001.sql", "002.sql"]);
    let second = version(2, 3, Some("002.sql"));
    context_.store().set(second.clone());
    reconcile(&context_, &orders()).await;
    let asked = server.asked();
    assert!(asked.iter().any(|asked| asked.line() == "POST jobs"));
    assert_eq!(sent(&asked), Some(("shop/orders:1".to_owned(), 3)), "it is scaled, whole, with the released template");
    end_job(&context_, "Failed");
    reconcile(&context_, &orders()).await;
    assert_eq!(sent(&server.asked()), None, "nothing differs");

    delete_child(&context_, &ChildRef::new(ChildKind::Deployment, "orders"));
    reconcile(&context_, &orders()).await;
    assert_eq!(sent(&server.asked()), Some(("shop/orders:1".to_owned(), 3)), "it is made again");

    // another operator, to which the Deployment is unknown
    let another = context(&server);
    another.store().set(second);
    migrate(&server, &another, &["001.sql", "002.sql"]);
    for (child, seen) in context_.store().children(&orders()) {
        if child.kind != ChildKind::Deployment {
            another.store().set_child(&orders(), child, seen);
        }
    }
    reconcile(&another, &orders()).await;
    assert_eq!(sent(&server.asked()), Some(("shop/orders:1".to_owned(), 3)));
}

#[tokio::test]
async fn a_record_that_is_deleted_while_a_set_up_fails_is_made_again_from_the_deployment() {
    let (server, context) = running(&version(1, 1, Some("001.sql"))).await;
    let deployment = server.asked().into_iter().rfind(|asked| asked.line() == "PATCH deployments/orders").unwrap().body;
    migrate(&server, &context, &["001.sql", "002.sql"]);
    context.store().set(version(2, 1, Some("002.sql")));
    reconcile(&context, &orders()).await;
    end_job(&context, "Failed");
    reconcile(&context, &orders()).await;
    server.lines();

    delete_child(&context, &ChildRef::new(ChildKind::ConfigMap, "orders-db-setup"));
    let fields = json!([{"manager": "weft", "operation": "Apply", "fieldsV1": {"f:spec": {"f:template": {}}}}]);
    server.rule(move |asked| {
        let mut item = deployment.clone();
        item["metadata"]["managedFields"] = fields.clone();
        let list = json!({"kind": "DeploymentList", "apiVersion": "apps/v1", "metadata": {}, "items": [item]});
        (asked.line() == "GET deployments" && asked.query.contains("metadata.name%3Dorders")).then_some((200, list))
    });
    let mut third = version(2, 4, Some("002.sql"));
    third.metadata.generation = Some(3);
    third.metadata.resource_version = Some("200000".to_owned());
    context.store().set(third);
    reconcile(&context, &orders()).await;
    let asked = server.asked();
    assert_eq!(sent(&asked), Some(("shop/orders:1".to_owned(), 4)), "it is scaled, whole");
    let record = asked.iter().rfind(|asked| asked.line() == "PATCH configmaps/orders-db-setup").unwrap();
    assert!(record.body["data"]["released.json"].as_str().unwrap().contains("shop/orders:1"), "{:?}", record.body);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_deleted_after_its_success_is_not_missed() {
    let (server, context) = running(&version(1, 1, Some("001.sql"))).await;
    report_progress(&context).await;
    server.lines();
    let job = ChildRef::new(ChildKind::Job, end_job(&context, "Complete").name);
    delete_child(&context, &job);
    assert_eq!(reconcile(&context, &orders()).await, Verdict::Done);
    assert_eq!(server.lines(), [""; 0]);
    assert_eq!(condition(&context, "Migrated"), "True");
    let object = context.store().get::<Microservice>(&orders().id).unwrap();
    let recorded = object.status.as_ref().unwrap().database.as_ref().unwrap().set_up.clone().unwrap();
    assert!(job.name.ends_with(&recorded.hash), "{} is not of {}", recorded.hash, job.name);
}

#[tokio::test(start_paused = true)]
async fn an_injected_container_that_never_ends_does_not_hold_the_set_up() {
    let object = microservice(&json!({"image": "shop/orders:1", "database": {"postgres": {}}}));
    let server = server(&object);
    let context = context(&server);
    context.store().set(object);
    reconcile(&context, &orders()).await;
    reconcile(&context, &orders()).await;
    server.lines();
    let job = context.store().children(&orders()).into_keys().find(|child| child.kind == ChildKind::Job).unwrap();
    let report = json!({"files": 0, "applied": 0, "hash": "of no files"}).to_string();
    let pod: LivePod = serde_json::from_value(json!({
        "metadata": {"name": "setup-1", "namespace": "shop", "labels": {"batch.kubernetes.io/job-name": job.name}},
        "spec": {},
        "status": {"phase": "Running", "containerStatuses": [
            {"name": "setup", "state": {"terminated": {"exitCode": 0, "message": report}}},
            {"name": "injected", "ready": true, "state": {"running": {}}},
        ]},
    }))
    .unwrap();
    let requeue = context.store().set_pod(&orders(), "setup-1", pod.into());
    assert!(requeue.now.contains(&orders()));
    reconcile(&context, &orders()).await;
    let lines = server.lines();
    let at = |line: &str| lines.iter().position(|known| known == line).unwrap_or_else(|| panic!("{line}: {lines:?}"));
    assert!(at("POST configmaps") < at(&format!("DELETE jobs/{}", job.name)), "recorded first");
    at("PATCH deployments/orders");
    report_progress(&context).await;
    assert_eq!(condition(&context, "Migrated"), "True");
}

/// In one manifest the Microservice may come before the ConfigMap.
#[tokio::test(start_paused = true)]
async fn a_new_version_waits_a_moment_for_its_migrations() {
    let (server, context) = running(&version(1, 1, None)).await;
    assert_eq!(sent(&server.asked()), None, "the first version, too");
    tokio::time::advance(std::time::Duration::from_secs(4)).await;
    reconcile(&context, &orders()).await;
    assert_eq!(sent(&server.asked()), Some(("shop/orders:1".to_owned(), 1)));
    context.store().set(version(2, 1, None));
    assert!(matches!(reconcile(&context, &orders()).await, Verdict::At(_)), "it comes again by itself");
    assert!(sent(&server.asked()).is_none_or(|(image, _)| image == "shop/orders:1"));
    migrate(&server, &context, &["001.sql", "002.sql"]);
    tokio::time::advance(std::time::Duration::from_secs(4)).await;
    reconcile(&context, &orders()).await;
    let asked = server.asked();
    assert!(asked.iter().any(|asked| asked.line() == "POST jobs"), "the new file first");
    assert!(sent(&asked).is_none_or(|(image, _)| image == "shop/orders:1"));
    end_job(&context, "Complete");
    reconcile(&context, &orders()).await;
    assert_eq!(sent(&server.asked()), Some(("shop/orders:2".to_owned(), 1)));
}

/// The status has the new generation already when the operator is started again.
#[tokio::test(start_paused = true)]
async fn a_new_version_that_waits_a_moment_waits_through_a_restart() {
    let (server, first) = running(&version(1, 1, None)).await;
    tokio::time::advance(std::time::Duration::from_secs(4)).await;
    reconcile(&first, &orders()).await;
    server.lines();
    first.store().set(version(2, 1, None));
    reconcile(&first, &orders()).await;
    let asked = server.asked();
    let status = asked.iter().rfind(|asked| asked.line() == "PATCH microservices/orders/status").unwrap();
    let mut reported = version(2, 1, None);
    reported.status = serde_json::from_value(status.body["status"].clone()).unwrap();
    assert_eq!(reported.status.as_ref().unwrap().observed_generation, Some(2));

    let another = context(&server);
    another.store().set(reported);
    migrate(&server, &another, &["001.sql"]);
    for (child, seen) in first.store().children(&orders()) {
        another.store().set_child(&orders(), child, seen);
    }
    server.lines();
    assert!(matches!(reconcile(&another, &orders()).await, Verdict::At(_)), "it comes again by itself");
    assert!(sent(&server.asked()).is_none_or(|(image, _)| image == "shop/orders:1"));
    tokio::time::advance(std::time::Duration::from_secs(4)).await;
    reconcile(&another, &orders()).await;
    assert_eq!(sent(&server.asked()), Some(("shop/orders:2".to_owned(), 1)));
}

/// There is no pod whose end would be reported, and the end of the Job itself is known already when its watch reports it.
#[tokio::test(start_paused = true)]
async fn a_job_that_a_quota_refuses_is_made_again_at_once_with_other_resources() {
    let object = microservice(&json!({"image": "shop/orders:1", "database": {"postgres": {}}}));
    let server = server(&object);
    let first = context(&server);
    first.store().set(object.clone());
    reconcile(&first, &orders()).await;
    assert!(server.lines().contains(&"POST jobs".to_owned()));

    let smaller = Resources { setup: serde_json::from_value(json!({})).unwrap(), ..Resources::default() };
    let settings = Settings { resources: smaller, ..settings() };
    let second = context_of(&server, settings, &mut Registry::default());
    second.store().set(object);
    for (child, seen) in first.store().children(&orders()) {
        if child.kind == ChildKind::Job {
            let refused = Waiting::Controller { owner: orders(), child: child.clone(), uid: seen.uid.clone() };
            let problem = Problem::new(Reason::QuotaExceeded, "exceeded quota: small");
            second.store().set_wait(&refused, Some(problem));
        }
        let requeue = second.store().set_child(&orders(), child, seen);
        second.enqueue(requeue, Priority::Resync);
    }
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    tasks.spawn(runtime::run(Arc::clone(&second), reconcile, 1, tasks.clone(), stop.clone()));
    tokio::time::sleep(Duration::from_secs(5)).await;
    let lines = server.lines();
    let jobs: Vec<_> = lines.iter().filter(|line| line.contains(" jobs")).collect();
    assert!(
        matches!(jobs[..], [delete, post] if delete.starts_with("DELETE jobs/") && post == "POST jobs"),
        "{lines:?}"
    );

    // the stage of the roll-out is reported a while later, and that is all
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert_eq!(server.lines(), ["PATCH microservices/orders/status"]);
    tokio::time::sleep(Duration::from_mins(1)).await;
    assert_eq!(server.lines(), [""; 0]);
    stop.cancel();
    tasks.close();
    tasks.wait().await;
}
