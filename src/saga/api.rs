//! The orchestrator's HTTP API. `openapi.json` describes it; a test compares the two.

mod verbs;

use std::{sync::Arc, time::Duration};

use axum::{
    Json as JsonBody, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Path, Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    compiled,
    engine::{Engine, EngineError},
    filter::{Cursor, Filter, FilterQuery},
    key::Key,
    log::Recorded,
    reader::{Listed, ReadError, Reader},
    tracker::{self, Tracker},
    view::{Detail, ReplayError, View},
};
use crate::domain::saga::{
    decide::Refusal,
    json,
    state::{Json, Status},
    tree::Tree,
};

/// Longest input of an instance.
const MAX_INPUT: usize = 1024 * 1024;
/// Longest body of a signal: as of a reply.
const MAX_SIGNAL: usize = super::answer::MAX_BODY;
/// Longest idempotency key.
const MAX_KEY: usize = 256;
/// `?wait=true` waits this long, and a longer `?wait=` is shortened to it.
const MAX_WAIT: Duration = Duration::from_mins(1);
/// Default number of instances in a list.
const DEFAULT_LIST: usize = 50;
/// Maximum number of instances in a list.
const MAX_LIST: usize = 1_000;

const OPENAPI: &str = include_str!("openapi.json");

#[derive(Clone, Debug)]
pub(super) struct Api {
    pub engine: Arc<Engine>,
    pub reader: Arc<Reader>,
    pub tracker: Arc<Tracker>,
}

#[derive(Debug, thiserror::Error)]
enum ApiError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the database does not answer; try again")]
    Read(#[from] ReadError),
    #[error("instance {id}: {why}")]
    Replay { id: Uuid, why: ReplayError },
    #[error("the database does not answer; try again")]
    Watched(#[from] tracker::StoreError),
    #[error("saga `{0}` is choreographed: Weft watches its services and starts nothing; its first event does")]
    NotStartable(String),
    #[error(
        "instance `{0}` of a choreographed saga is only watched: repair the service that owes the next event, or `skip` what is owed"
    )]
    OnlyWatched(Uuid),
    #[error("several running instances of saga `{saga}` have the key `{key}`: name one by its id; `?key=` lists them")]
    SeveralRunning { saga: String, key: String },
    #[error("no instance of saga `{saga}` has the id or the key `{key}`")]
    UnknownKey { saga: String, key: String },
    #[error("{0}")]
    Invalid(String),
    #[error("there is no verb `{0}`; there are retry, skip, cancel, pause and resume")]
    Verb(String),
    #[error("`{0}` is no verb for many instances; there are retry, cancel, pause and resume")]
    BatchVerb(String),
}

/// RFC 9457.
#[derive(Debug, Serialize)]
struct Problem {
    #[serde(rename = "type")]
    kind: String,
    title: &'static str,
    status: u16,
    detail: String,
}

impl ApiError {
    fn class(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Engine(EngineError::UnknownSaga(_)) => (StatusCode::NOT_FOUND, "UnknownSaga"),
            Self::Engine(EngineError::Draining(_)) => (StatusCode::GONE, "Draining"),
            Self::Engine(EngineError::UnknownInstance { .. }) | Self::UnknownKey { .. } => {
                (StatusCode::NOT_FOUND, "UnknownInstance")
            }
            Self::Engine(EngineError::Refused { why: Refusal::UnknownSignal, .. }) => {
                (StatusCode::NOT_FOUND, "UnknownSignal")
            }
            Self::Engine(EngineError::Refused { why: Refusal::SignalDiffers, .. }) => {
                (StatusCode::UNPROCESSABLE_ENTITY, "KeyReused")
            }
            Self::Engine(EngineError::Refused { .. }) => (StatusCode::CONFLICT, "Refused"),
            Self::Engine(EngineError::UnusableInput(_)) => (StatusCode::BAD_REQUEST, "UnusableInput"),
            Self::Engine(EngineError::KeyReused(_)) => (StatusCode::UNPROCESSABLE_ENTITY, "KeyReused"),
            Self::Engine(EngineError::NotHeld | EngineError::Unrecorded(_)) => {
                (StatusCode::SERVICE_UNAVAILABLE, "NotHeld")
            }
            Self::Engine(EngineError::Congested(_)) => (StatusCode::TOO_MANY_REQUESTS, "Congested"),
            Self::Engine(EngineError::Full(_)) => (StatusCode::TOO_MANY_REQUESTS, "Full"),
            Self::Read(error) if error.is_permanent() => (StatusCode::INTERNAL_SERVER_ERROR, "Unreadable"),
            Self::Replay { .. } => (StatusCode::INTERNAL_SERVER_ERROR, "Unreadable"),
            Self::Read(_) | Self::Watched(_) => (StatusCode::SERVICE_UNAVAILABLE, "DatabaseUnreachable"),
            Self::NotStartable(_) => (StatusCode::CONFLICT, "NotStartable"),
            Self::OnlyWatched(_) => (StatusCode::CONFLICT, "OnlyWatched"),
            Self::SeveralRunning { .. } => (StatusCode::CONFLICT, "SeveralRunning"),
            Self::Invalid(_) => (StatusCode::BAD_REQUEST, "InvalidRequest"),
            Self::Verb(_) | Self::BatchVerb(_) => (StatusCode::NOT_FOUND, "UnknownVerb"),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let (status, title) = self.class();
        let detail = match &self {
            Self::Engine(error @ EngineError::Refused { .. }) => error.to_string(),
            Self::Read(error) if error.is_permanent() => error.to_string(),
            other => other.to_string(),
        };
        if let Self::Read(error) = &self {
            tracing::warn!(
                error = crate::outage::with_causes(error),
                status = status.as_u16(),
                "a request failed, because the database could not be read"
            );
        }
        if let Self::Watched(error) = &self {
            tracing::warn!(
                error = crate::outage::with_causes(error),
                "a request failed, because the database could not be read"
            );
        }
        let problem = Problem { kind: format!("urn:weft:problem:{title}"), title, status: status.as_u16(), detail };
        let mut response = (status, JsonBody(problem)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/problem+json"));
        if [StatusCode::SERVICE_UNAVAILABLE, StatusCode::TOO_MANY_REQUESTS].contains(&status) {
            headers.insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        response
    }
}

/// Paths and methods of the API, as in `openapi.json`.
#[cfg(test)]
const ROUTES: &[(&str, &str)] = &[
    ("get", "/openapi.json"),
    ("get", "/sagas/{name}"),
    ("post", "/sagas/{name}"),
    ("post", "/sagas/{name}/batch/{verb}"),
    ("get", "/sagas/{name}/{id}"),
    ("post", "/sagas/{name}/{id}/signals/{signal}"),
    ("post", "/sagas/{name}/{id}/{verb}"),
];

impl Api {
    pub(super) fn router(self) -> Router {
        Router::new()
            .route("/openapi.json", get(|| async { ([(header::CONTENT_TYPE, "application/json")], OPENAPI) }))
            .route("/sagas/{name}", get(list).post(start))
            .route("/sagas/{name}/batch/{verb}", post(verbs::change_many))
            .route("/sagas/{name}/{id}", get(show))
            .route("/sagas/{name}/{id}/{verb}", post(verbs::change))
            .route("/sagas/{name}/{id}/signals/{signal}", post(verbs::signal).layer(DefaultBodyLimit::max(MAX_SIGNAL)))
            .layer(DefaultBodyLimit::max(MAX_INPUT))
            .with_state(self)
    }

    async fn detail(&self, saga: &str, id: Uuid) -> Result<Detail, ApiError> {
        let unknown = || EngineError::UnknownInstance { saga: saga.to_owned(), id };
        let listed = self.reader.instance(saga, id).await?.ok_or_else(unknown)?;
        let known = self.engine.catalogue.known(saga, &listed.version);
        let stored = match &known {
            Some(_) => None,
            None => self.reader.definition(saga, &listed.version).await?,
        };
        let tree = stored.as_ref().map(Tree::of);
        let (definition, tree) = match (&known, &stored, &tree) {
            (Some(compiled), ..) => (&compiled.definition, &compiled.tree),
            (None, Some(stored), Some(tree)) => (stored, tree),
            _ => return Err(unknown().into()),
        };
        let events = self.reader.events(id).await?;
        if events.is_empty() {
            return Err(unknown().into());
        }
        let mut detail = Detail::new(id, definition, tree, &events).map_err(|why| ApiError::Replay { id, why })?;
        detail.view.key = listed.key;
        Ok(detail)
    }

    /// The instance of this id, or of this business key: the one that runs, else the latest that has ended.
    async fn resolve(&self, saga: &str, text: &str) -> Result<Uuid, ApiError> {
        if !compiled::may_be_key(text) {
            return Err(ApiError::UnknownKey { saga: saga.to_owned(), key: "…".to_owned() });
        }
        let id = text.parse::<Uuid>().ok();
        if let Some(id) = id
            && (self.engine.holds(saga, id) || self.reader.instance(saga, id).await?.is_some())
        {
            return Ok(id);
        }
        let filter = Filter { key: Some(text.to_owned()), ..Filter::default() };
        let running = self.engine.live(saga, &filter, None, 2);
        match (running.as_slice(), id) {
            ([one], _) => return Ok(one.id),
            ([_, ..], _) => return Err(ApiError::SeveralRunning { saga: saga.to_owned(), key: text.to_owned() }),
            ([], _) => {}
        }
        match (self.reader.list(saga, &filter, None, 1).await?.first(), id) {
            (Some(latest), _) => Ok(latest.id),
            (None, Some(id)) => Err(EngineError::UnknownInstance { saga: saga.to_owned(), id }.into()),
            (None, None) => Err(ApiError::UnknownKey { saga: saga.to_owned(), key: text.to_owned() }),
        }
    }

    /// An instance that may have been started before, under the same key.
    async fn earlier(&self, saga: &str, id: Uuid, input: &Json) -> Result<View, ApiError> {
        let detail = self.detail(saga, id).await?;
        let same = serde_json::from_str::<serde_json::Value>(input.as_str()).is_ok_and(|input| input == detail.input);
        if same { Ok(detail.view) } else { Err(EngineError::KeyReused(id).into()) }
    }
}

#[derive(Debug, Deserialize)]
struct StartQuery {
    wait: Option<String>,
}

async fn start(
    State(api): State<Api>,
    Path(saga): Path<String>,
    Query(query): Query<StartQuery>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, ApiError> {
    let wait = query.wait.as_deref().map(parse_wait).transpose()?;
    let key = headers.get("idempotency-key").map(parse_key).transpose()?;
    let input = parse_input(&body)?;
    let key = key.map(Key::Request);
    if api.tracker.follows(&saga) {
        return Err(ApiError::NotStartable(saga));
    }
    let started = match (api.engine.start(&saga, input.clone(), key).await, key) {
        // a repetition of a start that was accepted before, perhaps by another definition
        (Err(refused @ (EngineError::Draining(_) | EngineError::UnusableInput(_))), Some(key)) => {
            let id = key.id(&saga);
            return match api.earlier(&saga, id, &input).await {
                Ok(view) => Ok(answer(StatusCode::OK, id, view)),
                Err(ApiError::Engine(EngineError::UnknownInstance { .. })) => Err(refused.into()),
                Err(error) => Err(error),
            };
        }
        (started, _) => started?,
    };
    let mut view = started.view;
    let stored = || api.earlier(&saga, started.id, &input);
    match (started.end, wait) {
        (Some(end), Some(wait)) => {
            match tokio::time::timeout(wait, end).await {
                Ok(Ok(ended)) => view = ended,
                // the sender was dropped: the instance existed already, or another orchestrator holds it
                Ok(Err(_dropped)) => view = stored().await?,
                Err(_elapsed) => {}
            }
        }
        (Some(_), None) => {}
        (None, _) => view = stored().await?,
    }
    let status = if started.recorded == Recorded::Written { StatusCode::CREATED } else { StatusCode::OK };
    Ok(answer(status, started.id, view))
}

fn answer(status: StatusCode, id: Uuid, view: View) -> Response {
    let location = format!("/sagas/{}/{id}", view.saga);
    (status, [(header::LOCATION, location)], JsonBody(view)).into_response()
}

fn parse_input(body: &[u8]) -> Result<Json, ApiError> {
    parse_body(body, "the saga's input")
}

/// No body is an object without members.
fn parse_body(body: &[u8], what: &str) -> Result<Json, ApiError> {
    if body.trim_ascii().is_empty() {
        return Ok(Json::from(serde_json::value::to_raw_value(&serde_json::Map::new()).unwrap_or_default()));
    }
    json::admit(body).map_err(|why| ApiError::Invalid(format!("the body cannot be {what}: {why}")))
}

fn parse_key(value: &header::HeaderValue) -> Result<&str, ApiError> {
    match value.to_str() {
        Ok(key) if (1..=MAX_KEY).contains(&key.len()) => Ok(key),
        _ => Err(ApiError::Invalid(format!(
            "the header Idempotency-Key must have 1 to {MAX_KEY} visible ASCII characters"
        ))),
    }
}

/// `true`, `false`, `30s`, `500ms`, `1m`.
fn parse_wait(text: &str) -> Result<Duration, ApiError> {
    let invalid =
        || ApiError::Invalid(format!("wait={text} is not a time; give `true`, or a time such as `30s` or `500ms`"));
    let scaled = |number: &str, unit: u64| Some(Duration::from_millis(number.parse::<u64>().ok()?.checked_mul(unit)?));
    let wait = match text {
        "true" | "" => Some(MAX_WAIT),
        "false" => Some(Duration::ZERO),
        _ => match (text.strip_suffix("ms"), text.strip_suffix('s'), text.strip_suffix('m')) {
            (Some(number), _, _) => scaled(number, 1),
            (_, Some(number), _) => scaled(number, 1_000),
            (_, _, Some(number)) => scaled(number, 60_000),
            _ => None,
        },
    };
    wait.map(|wait| wait.min(MAX_WAIT)).ok_or_else(invalid)
}

#[derive(Debug, Deserialize)]
struct ListQuery {
    limit: Option<usize>,
    /// `next` of the page before.
    after: Option<String>,
}

#[derive(Debug, Serialize)]
struct List {
    items: Vec<View>,
    /// If there may be more: the next page is `after` it.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

async fn list(
    State(api): State<Api>,
    Path(saga): Path<String>,
    Query(filter): Query<FilterQuery>,
    Query(query): Query<ListQuery>,
) -> Result<JsonBody<List>, ApiError> {
    let limit = query.limit.unwrap_or(DEFAULT_LIST).clamp(1, MAX_LIST);
    let filter = filter.parse(Timestamp::now()).map_err(ApiError::Invalid)?;
    let parse = |text: String| {
        Cursor::parse(&text).ok_or_else(|| ApiError::Invalid(format!("after={text} is no `next` of a list")))
    };
    let after = query.after.map(parse).transpose()?;
    let mut items = api.engine.live(&saga, &filter, after, limit);
    if filter.admits_ended() {
        let rows = api.reader.list(&saga, &filter, after, i64::try_from(limit).unwrap_or(i64::MAX)).await?;
        let unseen = rows.into_iter().filter(|row| !items.iter().any(|item| item.id == row.id)).collect::<Vec<_>>();
        items.extend(unseen.into_iter().map(ended));
        items.sort_by_key(|item| Cursor::of(item).order());
        items.truncate(limit);
    }
    if api.tracker.follows(&saga) && filter != (Filter { status: filter.status, ..Filter::default() }) {
        return Err(ApiError::Invalid(format!(
            "saga `{saga}` is choreographed; its instances are listed by `state` only"
        )));
    }
    items.extend(api.tracker.list(&saga, filter.status, after, limit).await?);
    items.sort_by_key(|item| Cursor::of(item).order());
    items.truncate(limit);
    let catalogue = &api.engine.catalogue;
    if items.is_empty()
        && catalogue.current(&saga).is_none()
        && !catalogue.is_draining(&saga)
        && !api.tracker.follows(&saga)
    {
        return Err(EngineError::UnknownSaga(saga).into());
    }
    let next = items.last().filter(|_| items.len() == limit).map(|last| Cursor::of(last).to_string());
    Ok(JsonBody(List { items, next }))
}

/// A listed instance from the database: it has ended, or another orchestrator runs it.
fn ended(row: Listed) -> View {
    View {
        id: row.id,
        saga: row.saga,
        version: row.version,
        key: row.key,
        state: row.state.unwrap_or(Status::Running),
        paused: false,
        overdue: false,
        started_at: row.started_at,
        ended_at: row.ended_at,
        current: Vec::new(),
        failure: None,
        output: None,
        correlation_id: None,
        owed: Vec::new(),
    }
}

async fn show(State(api): State<Api>, Path((saga, id)): Path<(String, String)>) -> Result<JsonBody<Detail>, ApiError> {
    // an instance of a choreographed saga is also found by its correlation
    let orchestrated = match api.resolve(&saga, &id).await {
        Ok(id) => api.detail(&saga, id).await,
        Err(error) => Err(error),
    };
    match orchestrated {
        Err(error @ (ApiError::Engine(EngineError::UnknownInstance { .. }) | ApiError::UnknownKey { .. })) => {
            api.tracker.find(&saga, &id).await?.map(JsonBody).ok_or(error)
        }
        other => other.map(JsonBody),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_openapi_document_describes_the_routes() {
        let document: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        let mut described: Vec<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, methods)| {
                let methods = methods.as_object().unwrap().keys().filter(|key| *key != "parameters");
                methods.map(|method| (method.clone(), path.clone())).collect::<Vec<_>>()
            })
            .collect();
        described.sort();
        let mut routes: Vec<_> =
            ROUTES.iter().map(|(method, path)| ((*method).to_owned(), (*path).to_owned())).collect();
        routes.sort();
        assert_eq!(described, routes);
    }

    #[test]
    fn a_wait_is_a_time_of_at_most_a_minute() {
        assert_eq!(parse_wait("true").unwrap(), MAX_WAIT);
        assert_eq!(parse_wait("30s").unwrap(), Duration::from_secs(30));
        assert_eq!(parse_wait("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(parse_wait("90m").unwrap(), MAX_WAIT);
        assert!(parse_wait("soon").is_err());
        assert!(parse_wait("99999999999999999999m").is_err());
    }

    #[test]
    fn an_input_is_json_or_nothing() {
        assert_eq!(parse_input(b" ").unwrap().as_str(), "{}");
        assert_eq!(parse_input(b"{\"a\":1}").unwrap().as_str(), "{\"a\":1}");
        assert!(
            parse_input(b"{a}")
                .unwrap_err()
                .to_string()
                .starts_with("the body cannot be the saga's input: it is not JSON")
        );
    }
}
