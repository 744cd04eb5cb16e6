//! Waiting for the custom resource definitions.

use std::{
    cell::RefCell,
    sync::atomic::{AtomicUsize, Ordering},
};

use serde_json::json;
use weft::controllers::watch::definitions;

use super::server::{Server, failure};

#[tokio::test(start_paused = true)]
async fn the_missing_definition_is_named_until_it_is_there() {
    let server = Server::default();
    let asked = AtomicUsize::new(0);
    let resource =
        |plural: &str| json!({"name": plural, "singularName": "", "namespaced": true, "kind": "X", "verbs": []});
    server.rule(move |_| {
        Some(match asked.fetch_add(1, Ordering::Relaxed) {
            0 => (404, failure(404, "the server could not find the requested resource")),
            count => {
                let served = ["microservices", "outboxrelays", "sagas"];
                let resources: Vec<_> = served.iter().take(count + 1).map(|plural| resource(plural)).collect();
                (200, json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "weft.dev/v1alpha1", "resources": resources}))
            }
        })
    });
    let told = RefCell::new(Vec::new());
    definitions::wait(&server.client(), |missing| told.borrow_mut().push(missing)).await;
    let told = told.into_inner();
    assert_eq!(told.len(), 3);
    assert!(told[0].as_ref().unwrap().contains("microservices.weft.dev, outboxrelays.weft.dev, sagas.weft.dev"));
    assert!(told[1].as_ref().unwrap().contains("definition sagas.weft.dev in version v1alpha1 is not installed"));
    assert_eq!(told[2], None);
    assert!(server.lines().iter().all(|line| line == "GET /apis/weft.dev/v1alpha1"));
}
