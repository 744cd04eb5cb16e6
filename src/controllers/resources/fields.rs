//! Which fields of a child somebody else writes, as `metadata.managedFields` has them.
//!
//! <https://kubernetes.io/docs/reference/using-api/server-side-apply/#field-management>

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ManagedFieldsEntry;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::labels::FIELD_MANAGER;

/// Longest list that is kept of a child: what is reported names a few.
const MOST: usize = 16;

/// A field under `spec` that another manager owns and Weft does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForeignField {
    /// Name of the manager, and of the sub-resource by which it writes: `keda-operator (scale)`.
    pub manager: String,
    pub path: FieldPath,
}

/// A path in the syntax of `managedFields`: `f:spec`, `f:containers`, `k:{"name":"service"}`, ….
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FieldPath(Vec<String>);

impl FieldPath {
    /// A path of members of objects: `["spec", "replicas"]`.
    pub fn of(members: &[&str]) -> Self {
        Self(members.iter().map(|member| format!("f:{member}")).collect())
    }

    pub fn starts_with(&self, other: &Self) -> bool {
        self.0.starts_with(&other.0)
    }

    /// Does the object have a value there?
    pub fn is_in(&self, object: &Value) -> bool {
        self.0.iter().try_fold(object, |value, segment| step(value, segment)).is_some()
    }
}

/// `spec.template.spec.containers[service].env[DEBUG]`.
impl std::fmt::Display for FieldPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, segment) in self.0.iter().enumerate() {
            match segment.strip_prefix("f:") {
                Some(member) if index > 0 => write!(f, ".{member}")?,
                Some(member) => f.write_str(member)?,
                None => write!(f, "[{}]", element(segment))?,
            }
        }
        Ok(())
    }
}

/// An element's key or value, without the syntax around it.
fn element(segment: &str) -> String {
    let text = segment.split_once(':').map_or(segment, |(_, text)| text);
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Object(keys)) => keys.values().map(plain).collect::<Vec<_>>().join(" "),
        Ok(value) => plain(&value),
        Err(_) => text.to_owned(),
    }
}

fn step<'a>(value: &'a Value, segment: &str) -> Option<&'a Value> {
    match segment.split_once(':')? {
        ("f", member) => value.get(member),
        _ => value.as_array()?.iter().find(|element| is_element(element, segment)),
    }
}

/// Is it the element of a list that a segment names by its keys, or by its value?
fn is_element(element: &Value, segment: &str) -> bool {
    let Some((kind, text)) = segment.split_once(':') else { return false };
    match (kind, serde_json::from_str(text)) {
        ("k", Ok(Value::Object(keys))) => keys.iter().all(|(key, value)| element.get(key) == Some(value)),
        (_, Ok(wanted)) => *element == wanted,
        (_, Err(_)) => false,
    }
}

/// What Weft applied under `spec.template` of a workload, without what the API server or others added: who applies it again
/// changes nothing.
pub fn applied_template(entries: &[ManagedFieldsEntry], workload: &Value) -> Option<Value> {
    let is_ours = |entry: &&ManagedFieldsEntry| {
        entry.manager.as_deref() == Some(FIELD_MANAGER) && entry.operation.as_deref() == Some("Apply")
    };
    let fields = &entries.iter().find(is_ours)?.fields_v1.as_ref()?.0;
    Some(extract(fields.get("f:spec")?.get("f:template")?, workload.get("spec")?.get("template")?))
}

/// The part of `value` that consists of `fields`.
fn extract(fields: &Value, value: &Value) -> Value {
    let inner = || fields.as_object().into_iter().flatten().filter(|(segment, _)| *segment != ".");
    match value {
        Value::Object(_) if inner().next().is_some() => inner()
            .filter_map(|(segment, fields)| {
                let member = segment.strip_prefix("f:")?;
                Some((member.to_owned(), extract(fields, value.get(member)?)))
            })
            .collect(),
        Value::Array(elements) if inner().next().is_some() => elements
            .iter()
            .filter_map(|element| {
                let (_, fields) = inner().find(|(segment, _)| is_element(element, segment))?;
                Some(extract(fields, element))
            })
            .collect(),
        _ => value.clone(),
    }
}

/// The fields under `spec` that others own and Weft does not, at most [`MOST`].
pub fn foreign(entries: &[ManagedFieldsEntry]) -> Vec<ForeignField> {
    let spec =
        |entry: &'_ ManagedFieldsEntry| entry.fields_v1.as_ref().and_then(|fields| fields.0.get("f:spec")).cloned();
    let is_ours = |entry: &&ManagedFieldsEntry| entry.manager.as_deref() == Some(FIELD_MANAGER);
    let by =
        |operation| entries.iter().filter(is_ours).find(move |entry| entry.operation.as_deref() == Some(operation));
    // what was created and never applied since is owned by that creation
    let ours = by("Apply").or_else(|| by("Update")).and_then(spec);
    let mut found = Vec::new();
    for entry in entries.iter().filter(|entry| !is_ours(entry)) {
        let Some(Value::Object(theirs)) = spec(entry) else { continue };
        let mut paths = Vec::new();
        collect(&theirs, ours.as_ref(), &FieldPath::of(&["spec"]), &mut paths);
        let manager = manager(entry);
        found.extend(paths.into_iter().map(|path| ForeignField { manager: manager.clone(), path }));
    }
    found.truncate(MOST);
    found
}

fn manager(entry: &ManagedFieldsEntry) -> String {
    let name = entry.manager.clone().unwrap_or_default();
    match entry.subresource.as_deref() {
        None | Some("") => name,
        // of its controllers only that one writes there
        Some("scale") if name == "kube-controller-manager" => format!("a HorizontalPodAutoscaler ({name})"),
        Some(subresource) => format!("{name} ({subresource})"),
    }
}

/// An element that somebody else added is one path; of one that is ours, each of its fields that are not.
fn collect(theirs: &Map<String, Value>, ours: Option<&Value>, path: &FieldPath, found: &mut Vec<FieldPath>) {
    for (segment, fields) in theirs.iter().filter(|(segment, _)| *segment != ".") {
        let ours = ours.and_then(|ours| ours.get(segment));
        let mut path = path.clone();
        path.0.push(segment.clone());
        match fields.as_object().filter(|fields| fields.keys().any(|segment| segment != ".")) {
            Some(fields) if ours.is_some() || !fields.contains_key(".") || segment.starts_with("f:") => {
                collect(fields, ours, &path, found);
            }
            _ if ours.is_none() => found.push(path),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entries(value: Value) -> Vec<ManagedFieldsEntry> {
        serde_json::from_value(value).unwrap()
    }

    fn deployment() -> Vec<ManagedFieldsEntry> {
        let container = |fields: Value| json!({"f:spec": {"f:template": {"f:spec": {"f:containers": {"k:{\"name\":\"service\"}": fields}}}}});
        entries(json!([
            {"manager": "weft", "operation": "Apply", "fieldsV1": container(json!({".": {}, "f:name": {}, "f:env": {"k:{\"name\":\"A\"}": {".": {}, "f:name": {}}}}))},
            {"manager": "kubectl-set", "operation": "Update", "fieldsV1": container(json!({
                "f:image": {},
                "f:env": {".": {}, "k:{\"name\":\"A\"}": {"f:value": {}}, "k:{\"name\":\"DEBUG\"}": {".": {}, "f:name": {}, "f:value": {}}},
            }))},
            {"manager": "kube-controller-manager", "operation": "Update", "subresource": "scale", "fieldsV1": {"f:spec": {"f:replicas": {}}}},
            {"manager": "kube-controller-manager", "operation": "Update", "subresource": "status", "fieldsV1": {"f:status": {"f:replicas": {}}}},
        ]))
    }

    #[test]
    fn what_others_write_is_named_with_its_writer() {
        let lines: Vec<_> =
            foreign(&deployment()).iter().map(|field| format!("{} {}", field.manager, field.path)).collect();
        assert_eq!(
            lines,
            [
                "kubectl-set spec.template.spec.containers[service].env[A].value",
                "kubectl-set spec.template.spec.containers[service].env[DEBUG]",
                "kubectl-set spec.template.spec.containers[service].image",
                "a HorizontalPodAutoscaler (kube-controller-manager) spec.replicas",
            ]
        );
    }

    #[test]
    fn what_was_applied_is_found_among_what_others_added() {
        let entries = entries(json!([{"manager": "weft", "operation": "Apply", "fieldsV1": {"f:spec": {"f:template": {
            "f:metadata": {"f:labels": {"f:app": {}}},
            "f:spec": {
                "f:containers": {"k:{\"name\":\"service\"}": {".": {}, "f:name": {}, "f:args": {}, "f:resources": {},
                    "f:env": {"k:{\"name\":\"A\"}": {".": {}, "f:name": {}, "f:value": {}}}}},
                "f:volumes": {"k:{\"name\":\"db\"}": {".": {}, "f:name": {}, "f:secret": {"f:secretName": {}}}},
            },
        }}}}]));
        let workload = json!({"spec": {"template": {
            "metadata": {"labels": {"app": "orders", "theirs": "x"}, "annotations": {"kubectl.kubernetes.io/restartedAt": "now"}},
            "spec": {
                "dnsPolicy": "ClusterFirst",
                "containers": [
                    {"name": "injected", "image": "theirs"},
                    {"name": "service", "args": ["a", "b"], "resources": {}, "terminationMessagePath": "/dev/termination-log",
                        "env": [{"name": "DEBUG", "value": "1"}, {"name": "A", "value": "2"}]},
                ],
                "volumes": [{"name": "db", "secret": {"secretName": "orders-db", "defaultMode": 420}}],
            },
        }}});
        let ours = json!({
            "metadata": {"labels": {"app": "orders"}},
            "spec": {
                "containers": [{"name": "service", "args": ["a", "b"], "resources": {}, "env": [{"name": "A", "value": "2"}]}],
                "volumes": [{"name": "db", "secret": {"secretName": "orders-db"}}],
            },
        });
        assert_eq!(applied_template(&entries, &workload), Some(ours));
        assert_eq!(applied_template(&[], &workload), None);
    }

    #[test]
    fn a_path_finds_its_value_by_the_elements_keys() {
        let object = json!({"spec": {"template": {"spec": {"containers": [{"name": "other"}, {"name": "service", "env": [{"name": "A", "value": "1"}]}]}}}});
        let there: Vec<_> = foreign(&deployment()).iter().map(|field| field.path.is_in(&object)).collect();
        assert_eq!(there, [true, false, false, false]);
    }
}
