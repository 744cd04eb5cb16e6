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
    server.rule(move |asked_for| {
        (!asked_for.path.starts_with("/openapi")).then(|| match asked.fetch_add(1, Ordering::Relaxed) {
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
    assert_eq!(server.lines().last().unwrap(), "GET /openapi/v3/apis/weft.dev/v1alpha1");
}

#[tokio::test(start_paused = true)]
async fn a_definition_that_lacks_a_field_is_named_until_it_is_upgraded() {
    let server = Server::default();
    let asked = AtomicUsize::new(0);
    server.rule(|asked| {
        let names = ["microservices", "outboxrelays", "sagas"];
        let resources: Vec<_> = names.iter().map(|plural| json!({"name": plural, "singularName": "", "namespaced": true, "kind": "X", "verbs": []})).collect();
        (asked.path == "/apis/weft.dev/v1alpha1").then(|| {
            (200, json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": "weft.dev/v1alpha1", "resources": resources}))
        })
    });
    server.rule(move |request| {
        request.path.starts_with("/openapi").then(|| {
            let crds = serde_json::to_value(weft::crds::all()).unwrap();
            let mut schemas = serde_json::Map::new();
            for crd in crds.as_array().unwrap() {
                let mut schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
                let kind = crd["spec"]["names"]["kind"].as_str().unwrap().to_owned();
                if kind == "Saga" && asked.fetch_add(1, Ordering::Relaxed) == 0 {
                    schema
                        .pointer_mut("/properties/spec/properties")
                        .unwrap()
                        .as_object_mut()
                        .unwrap()
                        .remove("deadline");
                }
                schema["x-kubernetes-group-version-kind"] =
                    json!([{"group": "weft.dev", "version": "v1alpha1", "kind": kind}]);
                schemas.insert(kind, schema);
            }
            (200, json!({"components": {"schemas": schemas}}))
        })
    });
    let reported = RefCell::new(Vec::new());
    definitions::wait(&server.client(), |missing| reported.borrow_mut().push(missing)).await;
    let reported = reported.into_inner();
    assert_eq!(
        reported[0].as_deref(),
        Some(
            "the custom resource definition sagas.weft.dev is older than this operator and does not have spec.deadline: upgrade the chart weft-crds"
        )
    );
    assert_eq!(reported[1..], [None]);
}
