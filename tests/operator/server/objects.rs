//! What the server stores, with its versions and its history: as etcd and server-side apply do, as far as the operator depends on it.

use std::collections::{BTreeMap, HashMap};

use axum::{extract::Query, http::Uri};
use serde_json::{Value, json};

/// `deployments`, `shop`, `orders`; a sub-resource belongs to the name: `orders/status`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id {
    pub plural: String,
    pub namespace: String,
    pub name: String,
}

impl Id {
    /// Of `/api/v1/…` or `/apis/GROUP/VERSION/…`. The name of a collection is empty, and so is the namespace of all of them.
    pub fn of_path(path: &str) -> Self {
        let segments: Vec<_> = path.split('/').skip(1).collect();
        let rest = segments.get(if path.starts_with("/apis/") { 3 } else { 2 }..).unwrap_or_default();
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            rest => ("", rest),
        };
        let (plural, name) = rest.split_first().unwrap_or((&"", &[]));
        Self { plural: (*plural).to_owned(), namespace: namespace.to_owned(), name: name.join("/") }
    }

    /// The object of a sub-resource.
    pub fn status_of(&self) -> Option<Self> {
        Some(Self { name: self.name.strip_suffix("/status")?.to_owned(), ..self.clone() })
    }
}

/// The objects that a list or a watch asks for.
#[derive(Clone, Debug)]
pub struct Selection {
    collection: Id,
    options: HashMap<String, String>,
}

impl Selection {
    pub fn new(collection: Id, query: &str) -> Self {
        let uri: Uri = format!("/?{query}").parse().expect("a query");
        let Query(options) = Query::try_from_uri(&uri).expect("a query");
        Self { collection, options }
    }

    pub fn is_watch(&self) -> bool {
        self.options.get("watch").is_some_and(|watch| watch == "true")
    }

    pub fn number(&self, option: &str) -> Option<u64> {
        self.options.get(option)?.parse().ok()
    }

    fn has(&self, id: &Id, object: &Value) -> bool {
        let Id { plural, namespace, name: _ } = &self.collection;
        let label = self.options.get("labelSelector").and_then(|label| label.split_once('='));
        *plural == id.plural
            && (namespace.is_empty() || *namespace == id.namespace)
            && label.is_none_or(|(key, value)| object["metadata"]["labels"][key] == value)
    }
}

struct Change {
    version: u64,
    kind: &'static str,
    id: Id,
    object: Value,
}

#[derive(Default)]
pub struct Objects {
    pub version: u64,
    stored: BTreeMap<Id, Value>,
    deletions: u64,
    /// For watches, from the first list on.
    history: Option<Vec<Change>>,
    /// Older changes than this version are forgotten.
    pub oldest: u64,
    /// The next change in this collection is not part of the history.
    pub loses: Option<String>,
}

impl Objects {
    pub fn get(&self, id: &Id) -> Option<Value> {
        self.stored.get(id).cloned()
    }

    pub fn all(&self) -> impl Iterator<Item = &Value> {
        self.stored.values()
    }

    /// As applied or created by the operator; `mutate` is what admission makes of it. The same again changes nothing.
    pub fn write(&mut self, id: Id, body: &Value, mutate: impl Fn(&mut Value)) -> Value {
        let known = self.get(&id);
        let uid = known.as_ref().map_or_else(|| self.new_uid(&id.name), |known| known["metadata"]["uid"].clone());
        let mut object = body.clone();
        let metadata = object["metadata"].as_object_mut().expect("metadata");
        metadata.entry("uid").or_insert(uid);
        metadata.insert("namespace".into(), json!(id.namespace));
        let managed = json!([{"manager": "weft", "operation": "Apply", "fieldsV1": fields(body)}]);
        metadata.insert("managedFields".into(), managed);
        mutate(&mut object);
        if let Some(known) = known {
            object["metadata"]["resourceVersion"] = known["metadata"]["resourceVersion"].clone();
            if let Some(status) = known.get("status") {
                object["status"] = status.clone();
            }
            if object == known {
                return known;
            }
        }
        self.put(id, object)
    }

    /// Nothing when there is no such object.
    pub fn write_status(&mut self, id: Id, body: &Value) -> Option<Value> {
        let mut object = self.get(&id)?;
        if object["status"] == body["status"] {
            return Some(object);
        }
        object["status"] = body["status"].clone();
        Some(self.put(id, object))
    }

    pub fn put(&mut self, id: Id, mut object: Value) -> Value {
        self.version += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.record(if self.stored.contains_key(&id) { "MODIFIED" } else { "ADDED" }, &id, &object);
        self.stored.insert(id, object.clone());
        object
    }

    pub fn remove(&mut self, id: &Id) -> Option<Value> {
        let mut object = self.stored.remove(id)?;
        self.version += 1;
        self.deletions += 1;
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.record("DELETED", id, &object);
        Some(object)
    }

    /// A page: as many as asked for, or `most`.
    pub fn list(&mut self, selection: &Selection, most: Option<u64>) -> Value {
        self.history.get_or_insert_default();
        let selected = self.stored.iter().filter(|(id, object)| selection.has(id, object));
        let first = selection.number("continue").unwrap_or_default();
        let most = selection.number("limit").into_iter().chain(most).min().unwrap_or(u64::MAX);
        let (skipped, limit) = (usize::try_from(first).unwrap(), usize::try_from(most).unwrap_or(usize::MAX));
        let page = selected.skip(skipped).take(limit.saturating_add(1));
        let mut items: Vec<_> = page.map(|(_, object)| object.clone()).collect();
        let mut metadata = json!({"resourceVersion": self.version.to_string()});
        if items.len() > limit {
            items.truncate(limit);
            metadata["continue"] = json!((first + most).to_string());
        }
        json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items})
    }

    /// Events of a watch, and the version up to which they are all of them.
    pub fn changes(&self, selection: &Selection, after: u64) -> (Vec<Value>, u64) {
        let history = self.history.as_deref().unwrap_or_default();
        let known = history.partition_point(|change| change.version <= after);
        let changes = history.get(known..).unwrap_or_default().iter();
        let selected = changes.filter(|change| selection.has(&change.id, &change.object));
        let events = selected.map(|change| json!({"type": change.kind, "object": change.object}));
        (events.collect(), self.version.max(after))
    }

    /// As etcd's compaction does: who watches from an earlier version has to list again.
    pub fn forget_history(&mut self) {
        self.history = self.history.as_ref().map(|_| Vec::new());
        self.oldest = self.version;
    }

    fn record(&mut self, kind: &'static str, id: &Id, object: &Value) {
        if self.loses.take_if(|plural| *plural == id.plural).is_some() {
            return;
        }
        if let Some(history) = &mut self.history {
            history.push(Change { version: self.version, kind, id: id.clone(), object: object.clone() });
        }
    }

    fn new_uid(&self, name: &str) -> Value {
        match self.deletions {
            0 => json!(format!("uid-{name}")),
            before => json!(format!("uid-{name}-{before}")),
        }
    }
}

/// `manager` sets a member of `spec`, and owns it from then on.
pub fn set_by(object: &mut Value, manager: &str, member: &str, value: Value) {
    object["spec"][member] = value;
    let member = format!("f:{member}");
    let entries = object["metadata"]["managedFields"].as_array_mut().expect("managed fields");
    for entry in entries.iter_mut() {
        if let Some(fields) = entry["fieldsV1"]["f:spec"].as_object_mut() {
            fields.remove(&member);
        }
    }
    entries.retain(|entry| entry["manager"] != manager);
    entries.push(json!({"manager": manager, "operation": "Update", "fieldsV1": {"f:spec": {member: {}}}}));
}

/// The paths of an applied object, without its values.
fn fields(value: &Value) -> Value {
    match value {
        Value::Object(members) => members
            .iter()
            .map(|(name, value)| (format!("f:{name}"), fields(value)))
            .collect::<serde_json::Map<_, _>>()
            .into(),
        _ => json!({}),
    }
}
