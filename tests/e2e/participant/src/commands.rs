//! The HTTP side: commands that take effect once, and switches that make them fail.

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post, put},
};
use deadpool_postgres::{Pool, tokio_postgres::types::ToSql};
use serde::Deserialize;

/// While it is on, undoing fails: with 500, so that its result is unknown.
const FAIL_UNDO: &str = "fail-undo";

#[derive(Clone)]
struct Service {
    pool: Option<Pool>,
    version: String,
    /// Demanded of those that send events.
    events_token: Option<String>,
}

/// `POST /commands/act` and `/commands/undo` are for sagas, `POST /events/TYPE` for relays, `POST /consume` for inboxes; `PUT` and
/// `DELETE /switches/NAME` for tests.
pub fn router(pool: Option<Pool>, version: String, events_token: Option<String>) -> Router {
    Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/version", get(|State(service): State<Service>| async move { service.version }))
        .route("/commands/act", post(act))
        .route("/commands/undo", post(undo))
        .route("/events/{kind}", post(receive))
        .route("/consume", post(consume))
        .route("/switches/{name}", put(switch_on).delete(switch_off))
        .with_state(Service { pool, version, events_token })
}

#[derive(Deserialize)]
struct Act {
    #[serde(default)]
    refuse: bool,
}

async fn act(State(service): State<Service>, headers: HeaderMap, Json(act): Json<Act>) -> Result<Response, Failure> {
    if act.refuse {
        let problem = serde_json::json!({"type": "Refused", "title": "asked to refuse", "status": 409});
        return Ok((StatusCode::CONFLICT, Json(problem)).into_response());
    }
    service.take_effect(&headers).await
}

/// Writes an event down, unless it is one that asks to be refused.
async fn receive(
    State(service): State<Service>,
    Path(kind): Path<String>,
    headers: HeaderMap,
    Json(event): Json<serde_json::Value>,
) -> Result<StatusCode, Failure> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    if service.events_token.as_ref().is_some_and(|token| header("authorization") != format!("Bearer {token}")) {
        return Ok(StatusCode::UNAUTHORIZED);
    }
    if event.get("refuse") == Some(&true.into()) {
        return Ok(StatusCode::UNPROCESSABLE_ENTITY);
    }
    let insert = "insert into received (id, kind, subject, tenant, body) values ($1, $2, $3, $4, $5)";
    let values: [&(dyn ToSql + Sync); 5] =
        [&header("ce-id"), &kind, &header("ce-subject"), &header("ce-tenant"), &event.to_string()];
    service.client().await?.execute(insert, &values).await?;
    Ok(StatusCode::ACCEPTED)
}

#[derive(Deserialize)]
struct Written {
    aggregate: String,
    n: i32,
}

/// Handles an event of the writer's once.
async fn consume(
    State(service): State<Service>,
    headers: HeaderMap,
    Json(Written { aggregate, n }): Json<Written>,
) -> Result<StatusCode, Failure> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let mut client = service.client().await?;
    let transaction = client.transaction().await?;
    let receive = "select weft.receive('consumer', $1, $2)";
    if transaction.query_one(receive, &[&header("ce-source"), &header("ce-id")]).await?.try_get(0)? {
        transaction.execute("insert into consumed (aggregate, n) values ($1, $2)", &[&aggregate, &n]).await?;
    }
    transaction.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn undo(State(service): State<Service>, headers: HeaderMap) -> Result<Response, Failure> {
    let switched = "select exists (select from switch where name = $1)";
    if service.client().await?.query_one(switched, &[&FAIL_UNDO]).await?.try_get(0)? {
        return Ok((StatusCode::INTERNAL_SERVER_ERROR, "undoing is switched off\n").into_response());
    }
    service.take_effect(&headers).await
}

impl Service {
    async fn client(&self) -> Result<deadpool_postgres::Client, Failure> {
        let pool = self.pool.as_ref().ok_or_else(|| Failure("this service has no database".to_owned()))?;
        Ok(pool.get().await?)
    }

    /// Writes the effect of the command that `Idempotency-Key: SAGA/STEP/OP` names, unless it was written before.
    async fn take_effect(&self, headers: &HeaderMap) -> Result<Response, Failure> {
        let key = headers.get("idempotency-key").and_then(|key| key.to_str().ok()).unwrap_or_default();
        let [saga, step, op] = key.split('/').collect::<Vec<_>>()[..] else {
            return Ok((StatusCode::BAD_REQUEST, format!("Idempotency-Key is `{key}`\n")).into_response());
        };
        let mut client = self.client().await?;
        let transaction = client.transaction().await?;
        let entered = transaction.query_one("select outcome from weft.enter($1, $2, $3)", &[&saga, &step, &op]).await?;
        match entered.try_get(0)? {
            "do it" => {
                let insert = "insert into effect (saga, step, op) values ($1, $2, $3)";
                transaction.execute(insert, &[&saga, &step, &op]).await?;
            }
            "refused before" => {
                transaction.commit().await?;
                let problem = serde_json::json!({"type": "Refused", "title": "refused before", "status": 409});
                return Ok((StatusCode::CONFLICT, Json(problem)).into_response());
            }
            _ => {}
        }
        transaction.commit().await?;
        Ok(Json(serde_json::json!({"step": step})).into_response())
    }
}

async fn switch_on(State(service): State<Service>, Path(name): Path<String>) -> Result<StatusCode, Failure> {
    let insert = "insert into switch values ($1) on conflict do nothing";
    service.client().await?.execute(insert, &[&name]).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn switch_off(State(service): State<Service>, Path(name): Path<String>) -> Result<StatusCode, Failure> {
    service.client().await?.execute("delete from switch where name = $1", &[&name]).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The result is unknown: 500, and the caller comes again.
struct Failure(String);

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        tracing::warn!(error = self.0, "a request failed");
        (StatusCode::INTERNAL_SERVER_ERROR, self.0 + "\n").into_response()
    }
}
