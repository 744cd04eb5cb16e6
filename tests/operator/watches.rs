//! The watches, when the API server no longer knows what they watch.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use k8s_openapi::api::core::v1::ObjectReference;
use serde_json::json;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use weft::controllers::watch::{self as watches, Namespaces, readiness::Readiness};

use super::{
    reconcile::context,
    server::{Server, failure},
};

const SERVED: u8 = 0;
const DELETED: u8 = 1;
const AGAIN: u8 = 2;

/// Lists are empty, watches break off; nobody knows sagas while they are [`DELETED`], and after that they are listed anew.
fn server(phase: &Arc<AtomicU8>) -> Server {
    let (server, phase) = (Server::default(), Arc::clone(phase));
    server.rule(move |asked| {
        let watch = asked.query.contains("watch=true");
        let sagas = asked.path.ends_with("/sagas");
        Some(match phase.load(Ordering::Relaxed) {
            DELETED if sagas => (404, failure(404, "the server could not find the requested resource")),
            // what a watch of before the deletion gets, in a stream
            AGAIN if sagas && watch => {
                (200, json!({"type": "ERROR", "object": failure(410, "too old resource version: 312 (318)")}))
            }
            _ if watch => (500, failure(500, "a watch that breaks off")),
            _ => (200, json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": "1"}, "items": []})),
        })
    });
    server
}

pub fn pod() -> ObjectReference {
    ObjectReference { kind: Some("Pod".to_owned()), name: Some("weft-1".to_owned()), ..ObjectReference::default() }
}

pub async fn until(what: &str, met: impl Fn() -> bool) {
    let wait = async {
        while !met() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(10), wait).await.unwrap_or_else(|_| panic!("{what}"));
}

#[tokio::test(start_paused = true)]
async fn a_definition_that_is_deleted_is_named_until_it_is_watched_again() {
    let phase = Arc::new(AtomicU8::new(SERVED));
    let server = server(&phase);
    let (context, readiness) = (context(&server), Readiness::default());
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    watches::start(&context, &Namespaces::All, &pod(), &readiness, &tasks, &stop).await;
    assert_eq!(readiness.verdict(), Ok(()));
    phase.store(DELETED, Ordering::Relaxed);
    until("it is not said", || readiness.verdict().is_err()).await;
    let why = readiness.verdict().unwrap_err();
    assert!(why.contains("definition sagas.weft.dev in version v1alpha1 is not installed"), "{why}");
    phase.store(AGAIN, Ordering::Relaxed);
    until("it is still said", || readiness.verdict().is_ok()).await;
    stop.cancel();
    tasks.close();
    tasks.wait().await;
}

/// A namespace whose role bindings went with it: every list of it is forbidden, those of the other namespace are empty.
#[tokio::test(start_paused = true)]
async fn a_namespace_that_cannot_be_watched_holds_up_no_other() {
    let server = server(&Arc::new(AtomicU8::new(SERVED)));
    server.rule(|asked| asked.path.contains("/namespaces/gone/").then(|| (403, failure(403, "is forbidden"))));
    let (context, readiness) = (context(&server), Readiness::default());
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    let namespaces = Namespaces::Listed(vec!["gone".to_owned(), "shop".to_owned()]);
    let pod = pod();
    let started = watches::start(&context, &namespaces, &pod, &readiness, &tasks, &stop);
    tokio::time::timeout(Duration::from_mins(1), started)
        .await
        .expect("the other namespace is waited for, and this one not");
    assert!(context.store().is_complete("shop") && !context.store().is_complete("gone"));
    server.lines();
    tokio::time::sleep(Duration::from_mins(10)).await;
    let retries = server.asked().iter().filter(|asked| asked.path.contains("/namespaces/gone/")).count();
    assert!(retries < 13 * 40, "{retries} requests in ten minutes");
    stop.cancel();
    tasks.close();
    tasks.wait().await;
}
