//! A scripted API server: records what is asked, answers by rules, and otherwise as server-side apply would.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use axum::http::{Request, Response};
use kube::{Client, client::Body};
use serde_json::{Value, json};
use weft::controllers::{
    resources::{
        child::{ChildKind, ChildRef},
        key::Key,
    },
    runtime::Context,
    store::live::Live,
};

/// One request as it was received.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: String,
    pub path: String,
    pub query: String,
    pub body: Value,
}

impl Asked {
    /// `PATCH deployments/orders`, `POST secrets`, `PATCH microservices/orders/status`.
    pub fn line(&self) -> String {
        let rest = self
            .path
            .split("/namespaces/")
            .nth(1)
            .map_or(self.path.as_str(), |rest| rest.split_once('/').map_or(rest, |(_, resource)| resource));
        format!("{} {rest}", self.method)
    }
}

type Rule = Box<dyn Fn(&Asked) -> Option<(u16, Value)> + Send>;

#[derive(Default)]
struct State {
    asked: Vec<Asked>,
    rules: Vec<Rule>,
    version: u64,
    /// Answers to applies, by path: an apply of the same object again changes nothing.
    objects: BTreeMap<String, Value>,
}

/// The server; its clones are the same one.
#[derive(Clone, Default)]
pub struct Server(Arc<Mutex<State>>);

impl Server {
    pub fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let server = server.clone();
            async move {
                let (parts, body) = request.into_parts();
                let body = body.collect_bytes().await?;
                let asked = Asked {
                    method: parts.method.to_string(),
                    path: parts.uri.path().to_owned(),
                    query: parts.uri.query().unwrap_or_default().to_owned(),
                    body: serde_json::from_slice(&body).unwrap_or(Value::Null),
                };
                let (code, answer) = server.answer(asked);
                let response = Response::builder().status(code).body(Body::from(answer.to_string().into_bytes()));
                Ok::<_, kube::Error>(response.expect("a response"))
            }
        });
        Client::new(service, "default")
    }

    /// Answers requests for which `rule` is `Some` with it; later rules win.
    pub fn rule(&self, rule: impl Fn(&Asked) -> Option<(u16, Value)> + Send + 'static) {
        self.0.lock().unwrap().rules.push(Box::new(rule));
    }

    /// Answers every request whose line begins with `line` with that failure.
    pub fn refuse(&self, line: &'static str, code: u16, message: &'static str) {
        self.rule(move |asked| asked.line().starts_with(line).then(|| (code, failure(code, message))));
    }

    /// The requests since the last call, as lines.
    pub fn lines(&self) -> Vec<String> {
        self.asked().iter().map(Asked::line).collect()
    }

    /// The requests since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.0.lock().unwrap().asked)
    }

    /// What the cluster's own controllers make of the children: every Job succeeds, all pods become ready. `version`: of the
    /// objects.
    pub fn settle(&self, context: &Context, version: u64) {
        let objects: Vec<_> = self.0.lock().unwrap().objects.values().map(|known| known["object"].clone()).collect();
        for mut child in objects {
            let kind = match child["kind"].as_str() {
                Some("Job") => ChildKind::Job,
                Some("StatefulSet") => ChildKind::StatefulSet,
                Some("Deployment") => ChildKind::Deployment,
                _ => continue,
            };
            let replicas = child["spec"]["replicas"].as_i64().unwrap_or(1);
            child["status"] = json!({"observedGeneration": 1, "replicas": replicas, "updatedReplicas": replicas,
                "readyReplicas": replicas, "availableReplicas": replicas,
                "conditions": [{"type": "Complete", "status": "True"}]});
            child["metadata"]["resourceVersion"] = version.to_string().into();
            let live: Live = serde_json::from_value(child).unwrap();
            let owner = Key::of_owner("shop", live.metadata.labels.as_ref().unwrap()).unwrap();
            let child = ChildRef::new(kind, live.metadata.name.clone().unwrap());
            context.store().set_child(&owner, child, live.into());
        }
    }

    fn answer(&self, asked: Asked) -> (u16, Value) {
        let mut state = self.0.lock().unwrap();
        state.asked.push(asked.clone());
        if let Some(answer) = state.rules.iter().rev().find_map(|rule| rule(&asked)) {
            return answer;
        }
        match asked.method.as_str() {
            "POST" => (201, state.store(&asked)),
            "PATCH" | "PUT" => (200, state.store(&asked)),
            "DELETE" => (200, json!({"kind": "Status", "status": "Success", "metadata": {}})),
            "GET" if let Some(known) = state.objects.get(&asked.path) => (200, known["object"].clone()),
            _ => (404, failure(404, "not found")),
        }
    }
}

impl State {
    fn store(&mut self, asked: &Asked) -> Value {
        let name = asked.body["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let path = if asked.method == "POST" { format!("{}/{name}", asked.path) } else { asked.path.clone() };
        let known = self.objects.get(&path).cloned();
        if let Some(known) = &known
            && known["asked"] == asked.body
        {
            return known["object"].clone();
        }
        self.version += 1;
        let mut object = asked.body.clone();
        let metadata = object["metadata"].as_object_mut().expect("metadata");
        metadata.entry("uid").or_insert_with(|| json!(format!("uid-{name}")));
        metadata.insert("namespace".into(), json!("shop"));
        metadata.insert("resourceVersion".into(), json!(self.version.to_string()));
        metadata.insert(
            "managedFields".into(),
            json!([{"manager": "weft", "operation": "Apply", "fieldsV1": fields(&asked.body)}]),
        );
        self.objects.insert(path, json!({"asked": asked.body, "object": object}));
        object
    }
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

pub fn failure(code: u16, message: &str) -> Value {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        422 => "Invalid",
        _ => "InternalError",
    };
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "message": message, "reason": reason})
}
