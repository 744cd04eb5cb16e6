//! The custom resource definitions: up to date in `crds/`, small enough for `kubectl apply`, and explained.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "these are tests")]

use std::path::Path;

use kube::ResourceExt;
use serde_json::Value;
use weft::crds;

/// `kubectl apply` keeps the object in an annotation, and all annotations together may have 256 KiB.
const LARGEST: usize = 256 * 1024;

#[test]
fn the_files_are_what_weft_crds_writes() {
    let folder = tempfile::tempdir().unwrap();
    crds::write(Some(folder.path())).unwrap();
    let committed = Path::new(env!("CARGO_MANIFEST_DIR")).join("crds");
    for file in std::fs::read_dir(folder.path()).unwrap().map(Result::unwrap) {
        let wanted = std::fs::read_to_string(file.path()).unwrap();
        let found = std::fs::read_to_string(committed.join(file.file_name())).unwrap_or_default();
        assert!(wanted == found, "crds/{} is stale: run `make crds`", file.file_name().display());
    }
    assert_eq!(std::fs::read_dir(&committed).unwrap().count(), crds::all().len(), "crds/ has a file too many");
}

#[test]
fn they_fit_into_the_annotation_of_kubectl_apply() {
    for crd in crds::all() {
        let size = serde_json::to_vec(&crd).unwrap().len();
        assert!(size < LARGEST, "{} has {size} bytes", crd.name_any());
    }
}

#[test]
fn every_field_is_explained() {
    for crd in crds::all() {
        let schema = serde_json::to_value(&crd.spec.versions[0].schema).unwrap();
        let root = &schema["openAPIV3Schema"];
        assert!(root["description"].as_str().is_some_and(|text| text.len() > 20), "{}", crd.name_any());
        for part in ["spec", "status"] {
            let mut silent = Vec::new();
            unexplained(&root["properties"][part], part, &mut silent);
            assert!(silent.is_empty(), "{}: no description of {silent:?}", crd.name_any());
        }
    }
}

/// Paths of fields without a description.
fn unexplained(schema: &Value, path: &str, found: &mut Vec<String>) {
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        if field["description"].as_str().is_none_or(|text| text.trim().is_empty()) {
            found.push(path.clone());
        }
        unexplained(field, &path, found);
    }
    for inner in ["items", "additionalProperties"] {
        if schema[inner].is_object() {
            unexplained(&schema[inner], &format!("{path}[]"), found);
        }
    }
}

#[test]
fn a_microservice_scales_by_the_fields_that_kubectl_and_autoscalers_ask_for() {
    let microservices = crds::all().into_iter().find(|crd| crd.spec.names.kind == "Microservice").unwrap();
    let scale = microservices.spec.versions[0].subresources.clone().unwrap().scale.unwrap();
    assert_eq!(scale.spec_replicas_path, ".spec.replicas");
    assert_eq!(scale.status_replicas_path, ".status.replicas");
    assert_eq!(scale.label_selector_path.as_deref(), Some(".status.selector"));
}

/// kubectl and Helm read YAML 1.1, where these words are booleans.
#[test]
fn no_field_has_a_name_that_yaml_takes_for_a_boolean() {
    fn check(schema: &serde_json::Value, path: &str) {
        for (name, field) in schema["properties"].as_object().into_iter().flatten() {
            let is_boolean = ["y", "n", "yes", "no", "on", "off", "true", "false"].contains(&name.as_str());
            assert!(!is_boolean, "{path}.{name}");
            check(field, &format!("{path}.{name}"));
        }
        for inner in ["items", "additionalProperties"] {
            if schema[inner].is_object() {
                check(&schema[inner], &format!("{path}[]"));
            }
        }
    }
    for crd in crds::all() {
        let schema = serde_json::to_value(&crd.spec.versions[0].schema).unwrap();
        check(&schema["openAPIV3Schema"], &crd.name_any());
    }
}

#[test]
fn lists_of_objects_merge_by_key_or_say_that_they_do_not() {
    for crd in crds::all() {
        let schema = serde_json::to_value(&crd.spec.versions[0].schema).unwrap();
        let spec = &schema["openAPIV3Schema"]["properties"]["spec"];
        for (name, field) in spec["properties"].as_object().unwrap() {
            let of_objects = field["items"]["properties"].is_object();
            // Kubernetes' own list of sources has no key, and a reaction's is an object
            let wanted = match name.as_str() {
                "envFrom" => continue,
                "reactions" => "atomic",
                _ => "map",
            };
            if of_objects {
                assert_eq!(field["x-kubernetes-list-type"], wanted, "{}: spec.{name}", crd.name_any());
            }
        }
    }
}
