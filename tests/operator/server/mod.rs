//! A scripted API server: it records what is asked, answers by rules, and otherwise as the real one does: server-side apply,
//! lists in pages, watches.

mod objects;

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use axum::{
    body::Body,
    http::{Request, Response},
};
use futures::stream;
use kube::{Client, client};
use serde_json::{Value, json};
use tokio::{sync::watch, time::Instant};
use weft::controllers::{
    resources::{
        child::{ChildKind, ChildRef},
        key::Key,
    },
    runtime::Context,
    store::live::Live,
};

use objects::{Id, Objects, Selection, set_by};

/// Longest time of a watch, as the API server's own when none is asked for.
const WATCH: u64 = 290;
/// Between two bookmarks of a watch.
const BOOKMARK: Duration = Duration::from_mins(1);

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
type Delay = Box<dyn Fn(&Asked) -> Option<Duration> + Send>;
type Mutation = Box<dyn Fn(&mut Value) + Send>;

#[derive(Default)]
struct State {
    asked: Vec<Asked>,
    rules: Vec<Rule>,
    delays: Vec<Delay>,
    mutations: Vec<Mutation>,
    objects: Objects,
    page: Option<u64>,
    /// How often all watches were cut off.
    cuts: u64,
    changed: watch::Sender<()>,
}

/// The server; its clones are the same one.
#[derive(Clone, Default)]
pub struct Server(Arc<Mutex<State>>);

impl Server {
    pub fn client(&self) -> Client {
        let server = self.clone();
        let service = tower::service_fn(move |request: Request<client::Body>| {
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
                let delay = {
                    let mut state = server.lock();
                    state.asked.push(asked.clone());
                    state.delays.iter().rev().find_map(|delay| delay(&asked))
                };
                if let Some(delay) = delay {
                    tokio::time::sleep(delay).await;
                }
                let (code, answer) = server.answer(&asked);
                Ok::<_, kube::Error>(Response::builder().status(code).body(answer).expect("a response"))
            }
        });
        Client::new(service, "default")
    }

    /// Answers requests for which `rule` is `Some` with it; later rules win.
    pub fn rule(&self, rule: impl Fn(&Asked) -> Option<(u16, Value)> + Send + 'static) {
        self.lock().rules.push(Box::new(rule));
    }

    /// Answers every request whose line begins with `line` with that failure.
    pub fn refuse(&self, line: &'static str, code: u16, message: &'static str) {
        self.rule(move |asked| asked.line().starts_with(line).then(|| (code, failure(code, message))));
    }

    /// Answers requests for which `delay` is `Some` so much later.
    pub fn delay(&self, delay: impl Fn(&Asked) -> Option<Duration> + Send + 'static) {
        self.lock().delays.push(Box::new(delay));
    }

    /// As a mutating webhook: `mutation` changes every object that is applied or created.
    pub fn mutate(&self, mutation: impl Fn(&mut Value) + Send + 'static) {
        self.lock().mutations.push(Box::new(mutation));
    }

    /// No page of a list has more objects than that.
    pub fn page(&self, most: u64) {
        self.lock().page = Some(most);
    }

    /// The requests since the last call, as lines.
    pub fn lines(&self) -> Vec<String> {
        self.asked().iter().map(Asked::line).collect()
    }

    /// The requests since the last call.
    pub fn asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.lock().asked)
    }

    /// What the cluster's own controllers make of the children: every Job succeeds, all pods become ready. `version`: of the
    /// objects.
    pub fn settle(&self, context: &Context, version: u64) {
        let objects: Vec<_> = self.lock().objects.all().cloned().collect();
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

    /// The object `deployments/orders` in `namespace`.
    pub fn get(&self, namespace: &str, path: &str) -> Option<Value> {
        self.lock().objects.get(&id(namespace, path))
    }

    /// Somebody else applies or changes the object.
    pub fn put(&self, plural: &str, object: Value) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let metadata = &object["metadata"];
        let id =
            Id { plural: plural.to_owned(), namespace: text(&metadata["namespace"]), name: text(&metadata["name"]) };
        self.change(|objects| drop(objects.put(id, object)));
    }

    /// Somebody else changes the object that is there.
    pub fn edit(&self, namespace: &str, path: &str, edit: impl FnOnce(&mut Value)) {
        let id = id(namespace, path);
        self.change(|objects| {
            let mut object = objects.get(&id).expect("an object to edit");
            edit(&mut object);
            objects.put(id, object);
        });
    }

    /// Somebody else sets a member of the object's `spec`, and owns it from then on.
    pub fn take_over(&self, namespace: &str, path: &str, manager: &str, member: &str, value: Value) {
        self.edit(namespace, path, |object| set_by(object, manager, member, value));
    }

    /// Somebody else deletes the object.
    pub fn remove(&self, namespace: &str, path: &str) {
        self.change(|objects| drop(objects.remove(&id(namespace, path)).expect("an object to delete")));
    }

    /// No watch reports the next change of an object of this kind.
    pub fn lose_next(&self, plural: &str) {
        self.lock().objects.loses = Some(plural.to_owned());
    }

    /// Ends all watches: they may go on from where they were.
    pub fn cut(&self) {
        let mut state = self.lock();
        state.cuts += 1;
        state.changed.send_replace(());
    }

    /// Who watches from an earlier version gets a 410 and has to list again.
    pub fn forget_history(&self) {
        self.lock().objects.forget_history();
    }

    fn change(&self, change: impl FnOnce(&mut Objects)) {
        let mut state = self.lock();
        change(&mut state.objects);
        state.changed.send_replace(());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn answer(&self, asked: &Asked) -> (u16, Body) {
        let mut state = self.lock();
        let (code, answer) = match state.rules.iter().rev().find_map(|rule| rule(asked)) {
            Some(answer) => answer,
            None if asked.method == "GET" => {
                let id = Id::of_path(&asked.path);
                if id.name.is_empty() && !id.plural.is_empty() {
                    let selection = Selection::new(id, &asked.query);
                    if selection.is_watch() {
                        let cuts = state.cuts;
                        let changed = state.changed.subscribe();
                        drop(state);
                        return (200, self.watch(selection, cuts, changed));
                    }
                    let page = state.page;
                    (200, state.objects.list(&selection, page))
                } else {
                    state.objects.get(&id).map_or_else(|| (404, failure(404, "not found")), |object| (200, object))
                }
            }
            None => {
                let answer = state.write(asked);
                state.changed.send_replace(());
                answer
            }
        };
        (code, body(&answer))
    }

    /// The changes from the version that is asked for, as they come.
    fn watch(&self, selection: Selection, cuts: u64, changed: watch::Receiver<()>) -> Body {
        let from = selection.number("resourceVersion").unwrap_or_default();
        let end = Instant::now() + Duration::from_secs(selection.number("timeoutSeconds").unwrap_or(WATCH));
        let server = self.clone();
        let events = stream::unfold((Some(from), changed), move |(after, mut changed)| {
            let (server, selection) = (server.clone(), selection.clone());
            async move {
                let mut after = after?;
                loop {
                    changed.borrow_and_update();
                    let (events, version) = {
                        let state = server.lock();
                        if state.cuts > cuts {
                            return None;
                        }
                        if after < state.objects.oldest {
                            let gone = json!({"type": "ERROR", "object": failure(410, "too old resource version")});
                            return Some((line(&gone), (None, changed.clone())));
                        }
                        state.objects.changes(&selection, after)
                    };
                    after = version;
                    if !events.is_empty() {
                        return Some((events.iter().flat_map(line).collect(), (Some(after), changed.clone())));
                    }
                    tokio::select! {
                        _ = changed.changed() => {}
                        () = tokio::time::sleep_until(end) => return None,
                        () = tokio::time::sleep(BOOKMARK) => {
                            let object = json!({"kind": "", "apiVersion": "", "metadata": {"resourceVersion": after.to_string()}});
                            let bookmark = json!({"type": "BOOKMARK", "object": object});
                            return Some((line(&bookmark), (Some(after), changed.clone())));
                        }
                    }
                }
            }
        });
        Body::from_stream(futures::StreamExt::map(events, Ok::<_, std::convert::Infallible>))
    }
}

impl State {
    fn write(&mut self, asked: &Asked) -> (u16, Value) {
        let Self { objects, mutations, .. } = self;
        let mutate = |object: &mut Value| mutations.iter().for_each(|mutation| mutation(object));
        let mut id = Id::of_path(&asked.path);
        match asked.method.as_str() {
            "POST" => {
                asked.body["metadata"]["name"].as_str().unwrap_or_default().clone_into(&mut id.name);
                (201, objects.write(id, &asked.body, mutate))
            }
            "DELETE" => {
                objects.remove(&id);
                (200, json!({"kind": "Status", "status": "Success", "metadata": {}}))
            }
            _ => {
                let status = id.status_of().and_then(|of| objects.write_status(of, &asked.body));
                (200, status.unwrap_or_else(|| objects.write(id, &asked.body, mutate)))
            }
        }
    }
}

fn id(namespace: &str, path: &str) -> Id {
    let (plural, name) = path.split_once('/').expect("deployments/orders");
    Id { plural: plural.to_owned(), namespace: namespace.to_owned(), name: name.to_owned() }
}

fn body(answer: &Value) -> Body {
    Body::from(answer.to_string())
}

fn line(event: &Value) -> Vec<u8> {
    format!("{event}\n").into_bytes()
}

pub fn failure(code: u16, message: &str) -> Value {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        422 => "Invalid",
        _ => "InternalError",
    };
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "message": message, "reason": reason})
}
