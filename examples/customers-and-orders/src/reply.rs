//! The answers of handlers.

use axum::{
    Json,
    http::{StatusCode, header::CONTENT_TYPE},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

/// An answer.
#[derive(Debug, PartialEq)]
pub struct Reply {
    status: u16,
    body: Value,
}

impl Reply {
    pub fn ok(body: Value) -> Self {
        Self { status: 200, body }
    }

    pub fn created(body: Value) -> Self {
        Self { status: 201, body }
    }

    /// A refusal: an RFC 9457 problem. A saga recognizes it by its `kind`, and does not retry.
    pub fn refused(status: StatusCode, kind: &str, detail: &str) -> Self {
        let body = json!({"type": kind, "title": kind, "status": status.as_u16(), "detail": detail});
        Self { status: status.as_u16(), body }
    }
}

impl IntoResponse for Reply {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let media_type = if status.is_success() { "application/json" } else { "application/problem+json" };
        (status, [(CONTENT_TYPE, media_type)], Json(self.body)).into_response()
    }
}

/// A temporary failure: the caller gets a 503, the cause is logged.
#[derive(Debug)]
pub struct Unavailable(anyhow::Error);

impl<E: Into<anyhow::Error>> From<E> for Unavailable {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Unavailable {
    fn into_response(self) -> Response {
        tracing::warn!(error = format!("{:#}", self.0), "a request failed");
        Reply::refused(StatusCode::SERVICE_UNAVAILABLE, "Unavailable", "try again").into_response()
    }
}
