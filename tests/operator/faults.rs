//! The operator as a whole, its watches, queue and driver, while the API server loses events, is slow, answers lists in part,
//! refuses writes and changes them.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft::controllers::{
    operator::operate,
    resources::key::{Key, ObjectKind},
    runtime::Context,
    watch::{Namespaces, readiness::Readiness},
};

use super::{
    reconcile::context_with_metrics,
    server::{Asked, Server, failure},
    watches::{pod, until},
};

const ORDERS: &str = "deployments/orders";

fn microservice(namespace: &str, name: &str) -> Value {
    json!({
        "apiVersion": "weft.dev/v1alpha1", "kind": "Microservice",
        "metadata": {"name": name, "namespace": namespace, "uid": format!("uid-{namespace}-{name}"), "generation": 1},
        "spec": {"image": "shop/orders:1", "replicas": 2, "ports": [{"name": "http", "port": 8080}]},
    })
}

/// The operator, as it works until the test ends.
struct Operator {
    context: Arc<Context>,
    readiness: Readiness,
    registry: Registry,
    stop: CancellationToken,
}

impl Operator {
    fn start(server: &Server, namespaces: Namespaces) -> Self {
        let (mut registry, readiness, stop) = (Registry::default(), Readiness::default(), CancellationToken::new());
        let context = context_with_metrics(server, &mut registry);
        readiness.waits_for(Some("it starts".to_owned()));
        // for the status of pods; an error means that it is installed already
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (working, ready, term) = (Arc::clone(&context), readiness.clone(), stop.clone());
        tokio::spawn(async move {
            operate(&working, &namespaces, &pod(), &ready, 4, &TaskTracker::new(), &term).await;
        });
        Self { context, readiness, registry, stop }
    }

    fn has_metric(&self, line: &str) -> bool {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text.lines().any(|known| known == line)
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// With the Microservice `orders` in namespace `shop`, and what Weft makes of it.
async fn with_orders() -> (Server, Operator) {
    let server = Server::default();
    server.put("microservices", microservice("shop", "orders"));
    let operator = Operator::start(&server, Namespaces::All);
    until("the Deployment is made, and reported", || status(&server, "shop", "orders").is_some()).await;
    settled(&server).await;
    assert_eq!(operator.readiness.verdict(), Ok(()));
    (server, operator)
}

/// Long enough for all that follows from a change at once; what was asked until then is forgotten.
async fn settled(server: &Server) {
    tokio::time::sleep(Duration::from_secs(30)).await;
    server.asked();
}

fn status(server: &Server, namespace: &str, name: &str) -> Option<Value> {
    server.get(namespace, &format!("microservices/{name}"))?.get("status").cloned()
}

fn replicas(server: &Server) -> Option<u64> {
    server.get("shop", ORDERS)?["spec"]["replicas"].as_u64()
}

/// The lines of the requests since the last time that change something.
fn writes(server: &Server) -> Vec<String> {
    server.asked().iter().filter(|asked| asked.method != "GET").map(Asked::line).collect()
}

fn times(writes: &[String], line: &str) -> usize {
    writes.iter().filter(|written| *written == line).count()
}

#[tokio::test(start_paused = true)]
async fn a_change_that_no_watch_reported_is_repaired_within_half_an_hour_and_nothing_else_is_sent() {
    let (server, _operator) = with_orders().await;
    server.lose_next("deployments");
    server.take_over("shop", ORDERS, "kubectl-scale", "replicas", json!(7));
    tokio::time::sleep(Duration::from_mins(2)).await;
    assert_eq!(replicas(&server), Some(7), "or the test does not lose what it is about");
    tokio::time::sleep(Duration::from_mins(29)).await;
    assert_eq!(replicas(&server), Some(2));
    assert_eq!(writes(&server), ["PATCH deployments/orders"]);
    tokio::time::sleep(Duration::from_mins(65)).await;
    assert_eq!(writes(&server), [""; 0], "two more lists of everything, in which nothing differs");
}

#[tokio::test(start_paused = true)]
async fn a_custom_resource_whose_change_no_watch_reported_is_reconciled_within_half_an_hour() {
    let (server, _operator) = with_orders().await;
    server.lose_next("microservices");
    server.edit("shop", "microservices/orders", |orders| {
        orders["spec"]["replicas"] = json!(3);
        orders["metadata"]["generation"] = json!(2);
    });
    tokio::time::sleep(Duration::from_mins(31)).await;
    assert_eq!(replicas(&server), Some(3));
}

#[tokio::test(start_paused = true)]
async fn what_is_deleted_while_the_watches_are_away_is_noticed_when_they_list_again() {
    let (server, operator) = with_orders().await;
    server.put("microservices", microservice("shop", "stock"));
    until("both are there", || server.get("shop", "deployments/stock").is_some()).await;
    settled(&server).await;
    let away = Arc::new(AtomicBool::new(true));
    let still_away = Arc::clone(&away);
    server.rule(move |asked| {
        let watches = asked.query.contains("watch=true") && still_away.load(Ordering::Relaxed);
        watches.then(|| (503, failure(503, "no watch is served")))
    });
    server.cut();
    tokio::time::sleep(Duration::from_secs(10)).await;
    server.remove("shop", ORDERS);
    server.remove("shop", "microservices/stock");
    server.forget_history();
    writes(&server);
    away.store(false, Ordering::Relaxed);
    until("the Deployment is made again", || server.get("shop", ORDERS).is_some()).await;
    let stock = Key::new(ObjectKind::Microservice, "shop", "stock");
    until("the deletion is noticed", || !operator.context.store().part_of_keys(0, 1).contains(&stock)).await;
    settled(&server).await;
    tokio::time::sleep(Duration::from_mins(5)).await;
    assert_eq!(writes(&server), [""; 0], "nothing is made for what is gone");
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_ends_goes_on_where_it_was_and_lists_nothing() {
    let (server, _operator) = with_orders().await;
    server.cut();
    server.take_over("shop", ORDERS, "kubectl-scale", "replicas", json!(7));
    until("the change is repaired", || replicas(&server) == Some(2)).await;
    let lists = server.asked().into_iter().filter(|asked| asked.method == "GET" && asked.query.contains("limit="));
    assert_eq!(lists.map(|asked| asked.line()).collect::<Vec<_>>(), [""; 0]);
}

/// The second page fails: once as an etcd that has compacted answers, and then as one that is overloaded.
#[tokio::test(start_paused = true)]
async fn a_list_that_breaks_off_is_not_taken_for_the_deletion_of_the_rest() {
    let server = Server::default();
    for name in ["orders", "stock", "travel"] {
        server.put("microservices", microservice("shop", name));
    }
    server.page(1);
    let operator = Operator::start(&server, Namespaces::All);
    until("all are made", || ["orders", "stock", "travel"].iter().all(|name| status(&server, "shop", name).is_some()))
        .await;
    settled(&server).await;
    let failures = Arc::new(AtomicU32::new(0));
    let counted = Arc::clone(&failures);
    server.rule(move |asked| {
        let code = if counted.load(Ordering::Relaxed).is_multiple_of(2) { 410 } else { 500 };
        let fails = asked.query.contains("continue=") && counted.load(Ordering::Relaxed) < 200;
        fails.then(|| {
            counted.fetch_add(1, Ordering::Relaxed);
            (code, failure(code, "the rest of the list"))
        })
    });
    server.forget_history();
    server.put(
        "configmaps",
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "shop"}}),
    );
    server.cut();
    until("lists fail", || failures.load(Ordering::Relaxed) > 20).await;
    assert_eq!(operator.context.store().part_of_keys(0, 1).len(), 3);
    until("lists fail no more", || failures.load(Ordering::Relaxed) >= 200).await;
    tokio::time::sleep(Duration::from_mins(10)).await;
    assert_eq!(operator.context.store().part_of_keys(0, 1).len(), 3);
    assert_eq!(writes(&server), [""; 0], "nothing is pruned, made again or reported");
}

/// One list of one namespace takes ten minutes.
#[tokio::test(start_paused = true)]
async fn a_slow_list_holds_up_its_own_namespace_alone() {
    let server = Server::default();
    server.put("microservices", microservice("shop", "orders"));
    server.put("microservices", microservice("slow", "orders"));
    server.delay(|asked| {
        let slow = asked.path.ends_with("/namespaces/slow/statefulsets") && !asked.query.contains("watch=true");
        slow.then_some(Duration::from_mins(10))
    });
    let operator = Operator::start(&server, Namespaces::Listed(vec!["slow".to_owned(), "shop".to_owned()]));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!(status(&server, "shop", "orders").is_some(), "its lists are complete");
    assert!(operator.readiness.verdict().is_err(), "not all is watched yet, and it says so");
    tokio::time::sleep(Duration::from_mins(9)).await;
    assert!(server.get("slow", ORDERS).is_none(), "nothing is concluded before its lists are complete");
    tokio::time::sleep(Duration::from_mins(2)).await;
    assert!(status(&server, "slow", "orders").is_some());
    assert_eq!(operator.readiness.verdict(), Ok(()));
}

#[tokio::test(start_paused = true)]
async fn a_namespace_whose_rights_come_back_is_available_again_though_nothing_in_it_changed() {
    let server = Server::default();
    for namespace in ["shop", "lost"] {
        server.put("microservices", microservice(namespace, "orders"));
    }
    let operator = Operator::start(&server, Namespaces::Listed(vec!["lost".to_owned(), "shop".to_owned()]));
    until("both are made", || ["shop", "lost"].iter().all(|space| status(&server, space, "orders").is_some())).await;
    let forbidden = Arc::new(AtomicBool::new(true));
    let still = Arc::clone(&forbidden);
    server.rule(move |asked| {
        let refused = asked.path.contains("/namespaces/lost/") && still.load(Ordering::Relaxed);
        refused.then(|| (403, failure(403, "is forbidden")))
    });
    server.cut();
    let refused = |count: u8| format!("weft_scope_refused{{namespace=\"lost\"}} {count}");
    until("it is refused", || operator.has_metric(&refused(1))).await;
    server.take_over("shop", ORDERS, "kubectl-scale", "replicas", json!(7));
    until("the other namespace goes on", || replicas(&server) == Some(2)).await;
    assert_eq!(operator.readiness.verdict(), Ok(()));
    forbidden.store(false, Ordering::Relaxed);
    until("it is available again", || operator.has_metric(&refused(0))).await;
}

const CONFLICT: &str = "Operation cannot be fulfilled on deployments.apps \"orders\": the object has been modified; please apply your changes to the latest version and try again";

#[tokio::test(start_paused = true)]
async fn writes_that_conflict_are_retried_until_each_is_there_once() {
    for line in ["PATCH deployments/orders", "PATCH microservices/orders/status", "PATCH services/orders"] {
        let (server, _operator) = with_orders().await;
        let left = AtomicU32::new(2);
        server.rule(move |asked| {
            let conflicts = asked.line() == line
                && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
            conflicts.then(|| (409, failure(409, CONFLICT)))
        });
        server.edit("shop", "microservices/orders", |orders| {
            orders["spec"]["ports"] = json!([{"name": "http", "port": 9090}]);
            orders["metadata"]["generation"] = json!(2);
        });
        until("it is written and reported", || {
            status(&server, "shop", "orders").is_some_and(|status| status["observedGeneration"] == 2)
        })
        .await;
        tokio::time::sleep(Duration::from_mins(1)).await;
        let asked = server.asked();
        let said = asked.iter().any(|asked| asked.body.to_string().contains("is not Weft's"));
        assert!(!said, "two writes met, and nobody else's object was there");
        let written: Vec<_> = asked.iter().map(Asked::line).collect();
        assert_eq!(
            times(&written, "PATCH deployments/orders"),
            if line == "PATCH deployments/orders" { 3 } else { 1 },
            "{line}: {written:?}"
        );
        let service = server.get("shop", "services/orders").unwrap();
        assert_eq!(service["spec"]["ports"][0]["port"], 9090, "{line}");
        let conditions = status(&server, "shop", "orders").unwrap()["conditions"].to_string();
        assert!(!conditions.contains("has been modified"), "{line}: {conditions}");
        assert_eq!(writes(&server), [""; 0]);
    }
}

/// A policy that rewrites a field that Weft declares, and is deleted after an hour.
#[tokio::test(start_paused = true)]
async fn a_field_that_admission_rewrites_is_named_and_tried_again_at_the_pace_of_a_contest() {
    let server = Server::default();
    server.put("microservices", microservice("shop", "orders"));
    let policy = Arc::new(AtomicBool::new(true));
    let in_force = Arc::clone(&policy);
    server.mutate(move |object| {
        if object["kind"] == "Deployment" && in_force.load(Ordering::Relaxed) {
            object["spec"]["template"]["spec"]["containers"][0]["image"] = json!("mirror/orders:1");
        }
    });
    let contested = || {
        let conditions = status(&server, "shop", "orders")?["conditions"].clone();
        let mut conditions = conditions.as_array()?.iter();
        Some(conditions.find(|condition| condition["type"] == "Contested")?["message"].as_str()?.to_owned())
    };
    let _operator = Operator::start(&server, Namespaces::All);
    tokio::time::sleep(Duration::from_secs(50)).await;
    let message = contested().unwrap();
    assert!(
        message.contains("Deployment orders: spec.template.spec.containers[service].image by an admission policy"),
        "{message}"
    );
    tokio::time::sleep(Duration::from_hours(1)).await;
    let written = writes(&server);
    // made, and tried again after one, five and fifteen minutes, and then every fifteen
    assert_eq!(times(&written, "PATCH deployments/orders"), 6, "{written:?}");
    assert!(times(&written, "PATCH microservices/orders/status") <= 2, "{written:?}");

    policy.store(false, Ordering::Relaxed);
    until("it is as declared, and said no more", || contested().is_none()).await;
    let containers = server.get("shop", ORDERS).unwrap()["spec"]["template"]["spec"]["containers"].clone();
    assert_eq!(containers[0]["image"], "shop/orders:1");
    settled(&server).await;
    tokio::time::sleep(Duration::from_hours(1)).await;
    assert_eq!(writes(&server), [""; 0]);
}

/// A webhook that takes Weft's annotation off, so that no write ever is as it was sent.
#[tokio::test(start_paused = true)]
async fn a_mutation_of_every_write_is_answered_at_the_pace_of_a_contest_and_named() {
    let server = Server::default();
    server.put("microservices", microservice("shop", "orders"));
    server.mutate(|object| {
        if object["kind"] == "Deployment" {
            object["metadata"]["annotations"].as_object_mut().unwrap().remove("weft.dev/applied-hash");
        }
    });
    let _operator = Operator::start(&server, Namespaces::All);
    tokio::time::sleep(Duration::from_hours(1)).await;
    let written = writes(&server);
    // made, and repaired at once, after one, five and fifteen minutes, and then every fifteen
    assert!(times(&written, "PATCH deployments/orders") <= 7, "{written:?}");
    let statuses = times(&written, "PATCH microservices/orders/status");
    assert!(statuses <= 8, "{statuses} statuses");
    let conditions = status(&server, "shop", "orders").unwrap()["conditions"].clone();
    let contested = conditions.as_array().unwrap().iter().find(|condition| condition["type"] == "Contested");
    let message = contested.unwrap_or_else(|| panic!("{conditions}"))["message"].as_str().unwrap();
    assert!(message.contains("Deployment orders") && message.contains("an admission policy"), "{message}");
}

/// As an injector does: nothing of Weft's is changed by it.
#[tokio::test(start_paused = true)]
async fn a_mutation_that_adds_something_harmless_leads_to_nothing() {
    let server = Server::default();
    server.put("microservices", microservice("shop", "orders"));
    server.mutate(|object| {
        object["metadata"]["labels"]["cost-centre"] = json!("42");
        object["metadata"]["annotations"]["policy.example/seen"] = json!("yes");
    });
    let _operator = Operator::start(&server, Namespaces::All);
    until("it is reported", || status(&server, "shop", "orders").is_some()).await;
    settled(&server).await;
    tokio::time::sleep(Duration::from_hours(1)).await;
    assert_eq!(writes(&server), [""; 0]);
}
