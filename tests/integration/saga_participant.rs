//! A participant in the test's process, so that it survives crashes of orchestrators. It implements the barrier of
//! `weft.enter` and records every effect in order, so that a test can check them exactly.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};

use axum::{
    Json, Router,
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, Method, StatusCode, Uri, header},
    response::{IntoResponse, Response},
    routing::{any, get, post},
};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// How a command is answered, and whether it takes effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Behaviour {
    Succeed,
    /// 409 with this code; no effect, also of a later copy (`weft.refuse`).
    Refuse(&'static str),
    /// As `Refuse`, with 503 instead of the answer.
    RefuseAndLoseTheAnswer,
    /// 503; no effect.
    Unavailable,
    /// 500 with this body; no effect.
    Fail(Value),
    /// 503 after the effect.
    LoseTheAnswer,
    /// 503 after the effect; the next attempt does not reach the handler and gets this status; then success.
    LoseTheAnswerThen(u16),
    /// The handler is not reached: this status; then success.
    NotReached(u16),
    /// Success after this time; the effect at once.
    Slow(Duration),
    /// No effect, and no answer until the behaviour changes; then 503.
    NoAnswer,
    /// 202 and a Location that is 200 at the third poll.
    Accepted,
    /// 202 and a Location that is 202 forever.
    Unfinished,
    /// 202 and a Location that is 404: the command takes effect, but the service has forgotten the job.
    Forgotten,
    /// 200 with this reply.
    Reply(Value),
    /// 429 with `Retry-After: 1`, without effect, the first time; then success.
    TooMany,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effect {
    pub saga: String,
    pub step: String,
    pub operation: String,
}

#[derive(Debug, Default)]
struct Inner {
    /// By command, or by `command/saga-id` for one saga.
    behaviours: HashMap<String, Behaviour>,
    barrier: Barrier,
    effects: Vec<Effect>,
    /// Every call with its body and headers, also repeated ones.
    calls: Vec<(String, Value, HashMap<String, String>)>,
    polls: HashMap<String, u32>,
}

#[derive(Clone, Debug)]
pub struct Participant {
    address: SocketAddr,
    inner: Arc<Mutex<Inner>>,
}

impl Participant {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let participant = Self { address: listener.local_addr().unwrap(), inner: Arc::default() };
        let router = Router::new()
            .route("/commands/{command}", post(command))
            .route("/orders/{*path}", any(resource))
            .route("/jobs/{job}", get(job))
            .route("/unfinished", get(|| async { StatusCode::ACCEPTED }))
            .with_state(participant.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        participant
    }

    pub fn url(&self, command: &str) -> String {
        format!("http://{}/commands/{command}", self.address)
    }

    /// A resource, which has any method; the command is the method and the path with its query: `GET /orders/7?all=true`.
    pub fn resource_url(&self, path: &str) -> String {
        format!("http://{}/orders/{path}", self.address)
    }

    /// Sets how `command` (of one saga: `command/saga-id`) is answered from now on.
    pub fn behave(&self, command: &str, behaviour: Behaviour) {
        self.inner.lock().unwrap().behaviours.insert(command.to_owned(), behaviour);
    }

    /// Effects of one saga, in order: `reserve do`, `reserve undo`, …
    pub fn effects(&self, saga: &str) -> Vec<String> {
        let inner = self.inner.lock().unwrap();
        let of = inner.effects.iter().filter(|effect| effect.saga == saga);
        of.map(|effect| format!("{} {}", effect.step, effect.operation)).collect()
    }

    pub fn calls(&self, command: &str) -> Vec<(Value, HashMap<String, String>)> {
        let inner = self.inner.lock().unwrap();
        let of = inner.calls.iter().filter(|(called, _, _)| called == command);
        of.map(|(_, body, headers)| (body.clone(), headers.clone())).collect()
    }

    /// How many calls there were.
    pub fn all(&self) -> usize {
        self.inner.lock().unwrap().calls.len()
    }

    pub fn count(&self, command: &str) -> usize {
        self.calls(command).len()
    }
}

/// The table of `weft.enter` and `weft.refuse`, by saga and step.
#[derive(Debug, Default)]
struct Barrier {
    dos: HashMap<(String, String), Entered>,
    undone: HashSet<(String, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entered {
    Done,
    Refused,
    Undone,
}

impl Barrier {
    /// `weft.enter`.
    fn enter(&mut self, saga: &str, step: &str, operation: &str) -> &'static str {
        let key = (saga.to_owned(), step.to_owned());
        let of_do = self.dos.get(&key).copied();
        match (operation, of_do) {
            ("undo", Some(Entered::Done)) if self.undone.insert(key.clone()) => "do it",
            ("undo", Some(Entered::Done)) => "done before",
            ("undo", None) => {
                self.dos.insert(key, Entered::Undone);
                "nothing to do"
            }
            ("undo", Some(_)) => "nothing to do",
            (_, Some(Entered::Done)) => "done before",
            ("do", Some(_)) | ("redo", Some(Entered::Undone)) => "refused before",
            _ => {
                self.dos.insert(key, Entered::Done);
                "do it"
            }
        }
    }

    /// `weft.refuse`.
    fn refuse(&mut self, saga: &str, step: &str) {
        self.dos.entry((saga.to_owned(), step.to_owned())).or_insert(Entered::Refused);
    }
}

impl Inner {
    /// Whether the answer is success.
    fn effect(&mut self, saga: &str, step: &str, operation: &str) -> bool {
        let entered = self.barrier.enter(saga, step, operation);
        if entered == "do it" {
            let operation = operation.trim_start_matches("re").to_owned();
            self.effects.push(Effect { saga: saga.to_owned(), step: step.to_owned(), operation });
        }
        entered != "refused before"
    }
}

async fn resource(
    State(participant): State<Participant>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    command(State(participant), Path(format!("{method} {uri}")), headers, body).await
}

/// A request without a body has `null`.
async fn command(
    State(participant): State<Participant>,
    Path(command): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(&body).unwrap() };
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    let mut parts = key.split('/');
    let (saga, step, operation) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
    let behaviour = {
        let mut inner = participant.inner.lock().unwrap();
        let headers =
            headers.iter().map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect();
        inner.calls.push((command.clone(), body, headers));
        let behaviour = inner.behaviours.get(&format!("{command}/{saga}")).or_else(|| inner.behaviours.get(&command));
        let behaviour = behaviour.cloned().unwrap_or(Behaviour::Succeed);
        let nothing = matches!(
            behaviour,
            Behaviour::Refuse(_)
                | Behaviour::RefuseAndLoseTheAnswer
                | Behaviour::Unavailable
                | Behaviour::Fail(_)
                | Behaviour::NoAnswer
                | Behaviour::TooMany
                | Behaviour::NotReached(_)
        );
        let refused = !nothing && !inner.effect(saga, step, operation);
        match behaviour {
            Behaviour::Refuse(_) | Behaviour::RefuseAndLoseTheAnswer if operation != "undo" => {
                inner.barrier.refuse(saga, step);
            }
            Behaviour::TooMany | Behaviour::NotReached(_) => {
                inner.behaviours.insert(command.clone(), Behaviour::Succeed);
            }
            Behaviour::LoseTheAnswerThen(status) => {
                inner.behaviours.insert(command.clone(), Behaviour::NotReached(status));
            }
            _ => {}
        }
        if refused { Behaviour::Refuse("RefusedBefore") } else { behaviour }
    };
    match behaviour {
        Behaviour::Succeed => Json(json!({"step": step})).into_response(),
        Behaviour::Reply(reply) => Json(reply).into_response(),
        Behaviour::Refuse(code) => {
            let problem =
                json!({"type": format!("https://example.org/problems/{code}"), "detail": "refused by the test"});
            (StatusCode::CONFLICT, [(header::CONTENT_TYPE, "application/problem+json")], problem.to_string())
                .into_response()
        }
        Behaviour::NotReached(status) => StatusCode::from_u16(status).unwrap().into_response(),
        Behaviour::Unavailable
        | Behaviour::RefuseAndLoseTheAnswer
        | Behaviour::LoseTheAnswer
        | Behaviour::LoseTheAnswerThen(_) => StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Behaviour::Fail(body) => (StatusCode::INTERNAL_SERVER_ERROR, Json(body)).into_response(),
        Behaviour::Slow(time) => {
            tokio::time::sleep(time).await;
            Json(json!({"step": step})).into_response()
        }
        Behaviour::NoAnswer => {
            while participant.inner.lock().unwrap().behaviours.get(&command) == Some(&Behaviour::NoAnswer) {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            StatusCode::SERVICE_UNAVAILABLE.into_response()
        }
        Behaviour::Accepted => {
            (StatusCode::ACCEPTED, [(header::LOCATION, format!("/jobs/{saga}-{step}-{operation}"))]).into_response()
        }
        Behaviour::Unfinished => (StatusCode::ACCEPTED, [(header::LOCATION, "/unfinished")]).into_response(),
        Behaviour::Forgotten => (StatusCode::ACCEPTED, [(header::LOCATION, "/forgotten")]).into_response(),
        Behaviour::TooMany => (StatusCode::TOO_MANY_REQUESTS, [(header::RETRY_AFTER, "1")]).into_response(),
    }
}

async fn job(State(participant): State<Participant>, Path(job): Path<String>) -> Response {
    let mut inner = participant.inner.lock().unwrap();
    let polls = inner.polls.entry(job.clone()).or_default();
    *polls += 1;
    if *polls < 3 { StatusCode::ACCEPTED.into_response() } else { Json(json!({"job": job})).into_response() }
}
