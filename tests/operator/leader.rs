//! Leader election against a scripted Lease, in virtual time.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use k8s_openapi::api::coordination::v1::Lease;
use kube::Api;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use weft::controllers::runtime::leader::Elector;

use super::server::{Asked, Server, failure};

/// The Lease as the API server keeps it, with its optimistic locking.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Option<Value>>>);

impl Kept {
    fn server(&self) -> Server {
        let (server, kept) = (Server::default(), self.clone());
        server.rule(move |asked| Some(kept.answer(asked)));
        server
    }

    fn answer(&self, asked: &Asked) -> (u16, Value) {
        let mut kept = self.0.lock().unwrap();
        match (asked.method.as_str(), kept.as_ref()) {
            ("GET", Some(lease)) => (200, lease.clone()),
            ("POST", Some(_)) => (409, failure(409, "already exists")),
            ("PUT", Some(lease))
                if lease["metadata"]["resourceVersion"] != asked.body["metadata"]["resourceVersion"] =>
            {
                (409, failure(409, "the object has been modified"))
            }
            ("POST" | "PUT", _) => (200, Self::keep(&mut kept, asked.body.clone())),
            _ => (404, failure(404, "not found")),
        }
    }

    fn keep(kept: &mut Option<Value>, mut lease: Value) -> Value {
        let version =
            kept.as_ref().map_or(0, |kept| kept["metadata"]["resourceVersion"].as_str().unwrap().parse().unwrap());
        lease["metadata"]["resourceVersion"] = json!((version + 1_u64).to_string());
        *kept = Some(lease.clone());
        lease
    }

    fn write(&self, change: impl FnOnce(&mut Value)) {
        let mut kept = self.0.lock().unwrap();
        let mut lease = kept.clone().unwrap_or_else(|| json!({"metadata": {"name": "weft"}, "spec": {}}));
        change(&mut lease);
        Self::keep(&mut kept, lease);
    }

    fn holder(&self) -> String {
        self.0.lock().unwrap().as_ref().unwrap()["spec"]["holderIdentity"].as_str().unwrap_or_default().to_owned()
    }
}

fn elector(server: &Server, identity: &str) -> Elector {
    let leases: Api<Lease> = Api::namespaced(server.client(), "weft-system");
    Elector::new(leases, "weft", identity)
}

fn held_by_other(lease: &mut Value) {
    lease["spec"] = json!({"holderIdentity": "other", "leaseDurationSeconds": 15, "leaseTransitions": 3,
        "renewTime": "2001-01-01T00:00:00.000000Z"});
}

#[tokio::test(start_paused = true)]
async fn a_lease_that_nobody_has_is_taken_and_given_back() {
    let kept = Kept::default();
    let mut elector = elector(&kept.server(), "me");
    elector.acquire().await;
    assert_eq!(kept.holder(), "me");
    elector.release().await;
    assert_eq!(kept.holder(), "");
}

#[tokio::test(start_paused = true)]
async fn another_s_lease_is_taken_only_after_it_has_not_changed_for_its_duration() {
    let (kept, start) = (Kept::default(), Instant::now());
    // its clock is far behind ours: that must not matter
    kept.write(held_by_other);
    let server = kept.server();
    let renewing = async {
        for round in 0..4 {
            tokio::time::sleep(Duration::from_secs(5)).await;
            kept.write(|lease| lease["spec"]["renewTime"] = json!(format!("2001-01-01T00:00:0{round}.000000Z")));
        }
    };
    let mut elector = elector(&server, "me");
    tokio::join!(elector.acquire(), renewing);
    assert_eq!(kept.holder(), "me");
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(35) && waited < Duration::from_secs(45), "{waited:?}");
    assert_eq!(kept.0.lock().unwrap().as_ref().unwrap()["spec"]["leaseTransitions"], 4);
}

#[tokio::test(start_paused = true)]
async fn the_holder_renews_by_one_request_and_does_not_read() {
    let kept = Kept::default();
    let server = kept.server();
    let mut elector = elector(&server, "me");
    let renewed = elector.acquire().await;
    server.lines();
    let stop = CancellationToken::new();
    let (stopper, start) = (stop.clone(), Instant::now());
    tokio::join!(elector.keep(renewed, &stop), async move {
        tokio::time::sleep_until(start + Duration::from_secs(61)).await;
        stopper.cancel();
    });
    let lines = server.lines();
    assert_eq!(lines.len(), 30);
    assert!(lines.iter().all(|line| line == "PUT leases/weft"), "{lines:?}");
}

#[tokio::test(start_paused = true)]
async fn leading_ends_before_the_lease_does_when_the_api_server_is_gone() {
    let kept = Kept::default();
    let server = kept.server();
    let mut elector = elector(&server, "me");
    let renewed = elector.acquire().await;
    server.refuse("PUT", 500, "etcdserver: no leader");
    server.refuse("GET", 500, "etcdserver: no leader");
    elector.keep(renewed, &CancellationToken::new()).await;
    let led = renewed.elapsed();
    assert!(led >= Duration::from_secs(10) && led < Duration::from_secs(15), "{led:?}");
}

#[tokio::test(start_paused = true)]
async fn leading_ends_at_once_when_another_has_the_lease() {
    let kept = Kept::default();
    let server = kept.server();
    let mut elector = elector(&server, "me");
    let renewed = elector.acquire().await;
    kept.write(held_by_other);
    elector.keep(renewed, &CancellationToken::new()).await;
    assert!(renewed.elapsed() < Duration::from_secs(3));
    // what is not ours is not given back
    server.lines();
    elector.release().await;
    assert_eq!((server.lines().len(), kept.holder().as_str()), (0, "other"));
}
