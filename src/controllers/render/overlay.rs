//! `spec.podTemplate`: a partial PodTemplateSpec, strategically merged over the one that Weft makes.
//!
//! Objects merge member by member and `null` removes a member, as in JSON merge patches (RFC 7396). The lists in
//! [`KEYS`] merge element by element, by the key that Kubernetes' own strategic merge uses; an element with
//! `$patch: delete` is removed. Other lists are replaced.

use k8s_openapi::api::core::v1::PodTemplateSpec;
use serde_json::{Map, Value};

use crate::controllers::resources::{labels::WEFT_PREFIX, plan::Rejection, reason::Reason};

/// Lists that merge by a key: the list's field, the key of its elements.
const KEYS: [(&str, &str); 11] = [
    ("containers", "name"),
    ("initContainers", "name"),
    ("ephemeralContainers", "name"),
    ("env", "name"),
    ("volumes", "name"),
    ("imagePullSecrets", "name"),
    ("volumeMounts", "mountPath"),
    ("volumeDevices", "devicePath"),
    ("ports", "containerPort"),
    ("hostAliases", "ip"),
    ("topologySpreadConstraints", "topologyKey"),
];

/// `template` with `overlay` merged over it, or the sentence why that is no pod template.
pub fn apply(template: PodTemplateSpec, overlay: Option<&Value>) -> Result<PodTemplateSpec, Rejection> {
    let Some(overlay) = overlay else { return Ok(template) };
    if let Some((field, key)) = reserved(overlay) {
        return Err(Rejection {
            reason: Reason::InvalidPodTemplate,
            message: format!(
                "spec.podTemplate.metadata.{field} has `{key}`: what begins with `{WEFT_PREFIX}` is Weft's own, and lets pods reach databases; leave it out"
            ),
        });
    }
    let labels = template.metadata.as_ref().and_then(|metadata| metadata.labels.clone());
    let mut merged = serde_json::to_value(&template).map_err(|error| invalid(&error.to_string()))?;
    merge(&mut merged, overlay);
    let result: PodTemplateSpec =
        serde_json::from_value(merged.clone()).map_err(|error| invalid(&error.to_string()))?;
    let kept = serde_json::to_value(&result).map_err(|error| invalid(&error.to_string()))?;
    if let Some(path) = lost(&merged, &kept) {
        return Err(invalid(&format!("`{path}` is not a field of it")));
    }
    let merged_labels = result.metadata.as_ref().and_then(|metadata| metadata.labels.as_ref());
    for (key, value) in labels.iter().flatten() {
        if merged_labels.and_then(|labels| labels.get(key)) != Some(value) {
            return Err(Rejection {
                reason: Reason::InvalidPodTemplate,
                message: format!(
                    "spec.podTemplate.metadata.labels changes `{key}`, which Weft finds the pods by: leave it out"
                ),
            });
        }
    }
    Ok(result)
}

/// A label or annotation of the overlay that is Weft's own, and its field. By such a label a NetworkPolicy admits pods to a database.
fn reserved(overlay: &Value) -> Option<(&'static str, &str)> {
    ["labels", "annotations"].into_iter().find_map(|field| {
        let keys = overlay.get("metadata")?.get(field)?.as_object()?.keys();
        Some((field, keys.map(String::as_str).find(|key| key.starts_with(WEFT_PREFIX))?))
    })
}

fn invalid(why: &str) -> Rejection {
    Rejection {
        reason: Reason::InvalidPodTemplate,
        message: format!("spec.podTemplate does not merge into a PodTemplateSpec: {why}; correct or remove it"),
    }
}

fn merge(base: &mut Value, overlay: &Value) {
    let Value::Object(overlay) = overlay else {
        *base = overlay.clone();
        return;
    };
    if !base.is_object() {
        *base = Value::Object(Map::new());
    }
    let Value::Object(base) = base else { return };
    for (field, value) in overlay {
        if value.is_null() {
            base.remove(field);
            continue;
        }
        let slot = base.entry(field.as_str()).or_insert(Value::Null);
        match (KEYS.iter().find(|(list, _)| list == field), value) {
            (Some((_, key)), Value::Array(elements)) => merge_list(slot, elements, key),
            _ => merge(slot, value),
        }
    }
}

fn merge_list(base: &mut Value, overlay: &[Value], key: &str) {
    if !base.is_array() {
        *base = Value::Array(Vec::new());
    }
    let Value::Array(base) = base else { return };
    for element in overlay {
        let same = |other: &Value| element.get(key).is_some() && other.get(key) == element.get(key);
        if element.get("$patch").and_then(Value::as_str) == Some("delete") {
            base.retain(|other| !same(other));
        } else if let Some(other) = base.iter_mut().find(|other| same(other)) {
            merge(other, element);
        } else {
            // through `merge`, so that a `null` in a new element is no member either
            let mut new = Value::Null;
            merge(&mut new, element);
            base.push(new);
        }
    }
}

/// The path of the first member of `merged` that did not survive being read as a PodTemplateSpec.
fn lost(merged: &Value, kept: &Value) -> Option<String> {
    match (merged, kept) {
        (Value::Object(merged), Value::Object(kept)) => {
            merged.iter().find_map(|(field, value)| match kept.get(field) {
                Some(kept) => lost(value, kept).map(|path| join(field, &path)),
                None if value.is_null() => None,
                None => Some(field.clone()),
            })
        }
        (Value::Array(merged), Value::Array(kept)) => merged
            .iter()
            .zip(kept)
            .enumerate()
            .find_map(|(index, (merged, kept))| lost(merged, kept).map(|path| join(&format!("[{index}]"), &path))),
        _ => None,
    }
}

fn join(parent: &str, path: &str) -> String {
    if path.starts_with('[') { format!("{parent}{path}") } else { format!("{parent}.{path}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn base() -> PodTemplateSpec {
        serde_json::from_value(json!({
            "metadata": {"labels": {"app.kubernetes.io/instance": "orders"}},
            "spec": {
                "containers": [{
                    "name": "service", "image": "orders:1",
                    "env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}],
                    "ports": [{"name": "http", "containerPort": 8080}],
                    "volumeMounts": [{"name": "db", "mountPath": "/bindings/db"}]
                }],
                "securityContext": {"runAsNonRoot": true}
            }
        }))
        .unwrap()
    }

    fn merged(overlay: Value) -> Value {
        serde_json::to_value(apply(base(), Some(&overlay)).unwrap()).unwrap()
    }

    fn refused(overlay: Value) -> String {
        apply(base(), Some(&overlay)).unwrap_err().message
    }

    #[test]
    fn nothing_changes_without_an_overlay() {
        assert_eq!(apply(base(), None), Ok(base()));
        assert_eq!(merged(json!({})), serde_json::to_value(base()).unwrap());
    }

    #[test]
    fn containers_and_their_lists_merge_by_key() {
        let result = merged(json!({"spec": {"containers": [
            {"name": "proxy", "image": "proxy:1"},
            {"name": "service", "env": [{"name": "B", "value": "3"}, {"name": "C", "value": "4"}],
             "ports": [{"containerPort": 8080, "name": "web"}],
             "volumeMounts": [{"mountPath": "/cache", "name": "cache"}]}
        ], "volumes": [{"name": "cache", "emptyDir": {}}]}}));
        let service = &result["spec"]["containers"][0];
        assert_eq!(service["image"], "orders:1");
        assert_eq!(
            service["env"],
            json!([{"name": "A", "value": "1"}, {"name": "B", "value": "3"}, {"name": "C", "value": "4"}])
        );
        assert_eq!(service["ports"], json!([{"name": "web", "containerPort": 8080}]));
        assert_eq!(service["volumeMounts"].as_array().unwrap().len(), 2);
        assert_eq!(result["spec"]["containers"][1]["name"], "proxy");
        assert_eq!(result["spec"]["volumes"], json!([{"name": "cache", "emptyDir": {}}]));
    }

    #[test]
    fn other_lists_are_replaced_and_objects_merge() {
        let result = merged(json!({"spec": {
            "containers": [{"name": "service", "command": ["/x"]}],
            "tolerations": [{"key": "spot", "operator": "Exists"}],
            "securityContext": {"fsGroup": 7}
        }}));
        assert_eq!(result["spec"]["tolerations"], json!([{"key": "spot", "operator": "Exists"}]));
        assert_eq!(result["spec"]["securityContext"], json!({"fsGroup": 7, "runAsNonRoot": true}));
    }

    #[test]
    fn null_removes_a_member_and_patch_delete_an_element() {
        let result = merged(json!({"spec": {
            "securityContext": null,
            "containers": [{"name": "service", "env": [{"name": "A", "$patch": "delete"}]}]
        }}));
        assert_eq!(result["spec"].get("securityContext"), None);
        assert_eq!(result["spec"]["containers"][0]["env"], json!([{"name": "B", "value": "2"}]));
    }

    #[test]
    fn an_unknown_field_is_named() {
        let message = refused(json!({"spec": {"containers": [{"name": "service", "imgae": "x"}]}}));
        assert!(message.contains("`spec.containers[0].imgae` is not a field of it"), "{message}");
    }

    #[test]
    fn a_wrong_type_gets_a_sentence() {
        let message = refused(json!({"spec": {"hostNetwork": "yes"}}));
        assert!(message.starts_with("spec.podTemplate does not merge into a PodTemplateSpec:"), "{message}");
    }

    #[test]
    fn the_labels_that_select_the_pods_cannot_change() {
        let message = refused(json!({"metadata": {"labels": {"app.kubernetes.io/instance": "other"}}}));
        assert!(message.contains("`app.kubernetes.io/instance`"), "{message}");
        let labels = merged(json!({"metadata": {"labels": {"team": "a"}}}))["metadata"]["labels"].clone();
        assert_eq!(labels, json!({"app.kubernetes.io/instance": "orders", "team": "a"}));
    }

    #[test]
    fn what_is_wefts_own_is_left_out() {
        let foreign = json!({"metadata": {"labels": {"team": "a", "weft.dev/database-client": "customers"}}});
        assert_eq!(
            refused(foreign),
            "spec.podTemplate.metadata.labels has `weft.dev/database-client`: what begins with `weft.dev/` is Weft's own, and lets pods reach databases; leave it out"
        );
        let message = refused(json!({"metadata": {"annotations": {"weft.dev/contract-version": null}}}));
        assert!(message.contains("metadata.annotations has `weft.dev/contract-version`"), "{message}");
        let annotations = json!({"metadata": {"annotations": {"weft.devoted/x": "y"}}});
        assert_eq!(merged(annotations)["metadata"]["annotations"], json!({"weft.devoted/x": "y"}));
    }

    #[test]
    fn merging_twice_changes_nothing_more() {
        let overlay = json!({"spec": {"containers": [{"name": "service", "env": [{"name": "C", "value": "4"}]}]}});
        let once = apply(base(), Some(&overlay)).unwrap();
        assert_eq!(apply(once.clone(), Some(&overlay)), Ok(once));
    }
}
