//! What changes instances: a person's verbs, for one and for many, and signals.

use axum::{
    Json as JsonBody,
    body::Bytes,
    extract::{Path, Query, State, rejection::QueryRejection},
    http::HeaderMap,
};
use jiff::Timestamp;
use serde::Deserialize;
use uuid::Uuid;

use super::{Api, ApiError, parse_body, parse_key};
use crate::{
    domain::saga::{
        decide::{self, Refusal},
        event::{Audit, Event},
        state::State as InstanceState,
        tree::Tree,
    },
    saga::{
        batch::{Applied, Verb},
        engine::EngineError,
        filter::{Filter, FilterQuery},
        tracker::SkipError,
        view::View,
    },
};

#[derive(Debug, Deserialize)]
pub(super) struct ChangeQuery {
    /// As in `current`: of `retry` and `skip`.
    step: Option<String>,
}

/// Longest `by` and `reason`, in bytes.
const MAX_AUDIT: usize = 512;

/// Who asks, and why: they are a part of the history.
fn parse_audit(audit: Audit) -> Result<Audit, ApiError> {
    let texts = [&audit.by, &audit.reason];
    if texts.into_iter().flatten().any(|text| text.len() > MAX_AUDIT || text.chars().any(char::is_control)) {
        let message = format!("`by` and `reason` have at most {MAX_AUDIT} bytes and no control characters");
        return Err(ApiError::Invalid(message));
    }
    Ok(audit)
}

pub(super) async fn change(
    State(api): State<Api>,
    Path((saga, id, verb)): Path<(String, String, String)>,
    Query(query): Query<ChangeQuery>,
    Query(audit): Query<Audit>,
) -> Result<JsonBody<View>, ApiError> {
    let audit = parse_audit(audit)?;
    let of_many = Verb::parse(&verb);
    if of_many.is_none() && verb != "skip" {
        return Err(ApiError::Verb(verb));
    }
    if let Some(watched) = api.tracker.find(&saga, &id).await? {
        return change_watched(&api, &saga, watched.view.id, &verb).await;
    }
    let id = api.resolve(&saga, &id).await?;
    let step = query.step.as_deref();
    if step.is_some() && !["retry", "skip"].contains(&verb.as_str()) {
        return Err(ApiError::Invalid(format!("`{verb}` is of the whole instance; leave out `step`")));
    }
    match of_many {
        Some(verb) => api.apply(&saga, id, &audit, |tree, state| verb.event(tree, state, step)).await,
        None => api.apply(&saga, id, &audit, |tree, state| decide::skip_of(tree, state, step)).await,
    }
}

/// Of a verb for many. What is misspelt or empty is refused: it would mean more instances.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct BatchQuery {
    state: Option<String>,
    key: Option<String>,
    step: Option<String>,
    older_than: Option<String>,
    /// The last instance of the page before.
    after: Option<Uuid>,
    /// Without another filter than `step`, every running instance is meant.
    #[serde(default)]
    all: bool,
    by: Option<String>,
    reason: Option<String>,
}

pub(super) async fn change_many(
    State(api): State<Api>,
    Path((saga, verb)): Path<(String, String)>,
    query: Result<Query<BatchQuery>, QueryRejection>,
) -> Result<JsonBody<Applied>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::Invalid(error.body_text()))?;
    let BatchQuery { state, key, step, older_than, after, all, by, reason } = query;
    let verb = Verb::parse(&verb).ok_or(ApiError::BatchVerb(verb))?;
    if api.tracker.follows(&saga) {
        return Err(ApiError::Invalid(format!("saga `{saga}` is choreographed: Weft only watches its instances")));
    }
    let given = [("state", &state), ("key", &key), ("step", &step), ("olderThan", &older_than)];
    if let Some((name, _)) = given.into_iter().find(|(_, value)| value.as_deref() == Some("")) {
        return Err(ApiError::Invalid(format!("`{name}` is empty; leave it out, or say which instances are meant")));
    }
    let filter = FilterQuery { state, key, step, older_than }.parse(Timestamp::now()).map_err(ApiError::Invalid)?;
    if (Filter { step: None, ..filter.clone() }).is_empty() && !all {
        let message = "name the instances by `state`, `key` or `olderThan`; `all=true` means every one that runs (with `step`, at that step)";
        return Err(ApiError::Invalid(message.to_owned()));
    }
    if !filter.admits_live() {
        return Err(ApiError::Invalid("instances that have ended cannot be changed".to_owned()));
    }
    let catalogue = &api.engine.catalogue;
    if catalogue.current(&saga).is_none() && !catalogue.is_draining(&saga) {
        return Err(EngineError::UnknownSaga(saga).into());
    }
    Ok(JsonBody(api.engine.change_many(&saga, verb, &filter, after, &parse_audit(Audit { by, reason })?).await?))
}

pub(super) async fn signal(
    State(api): State<Api>,
    Path((saga, id, name)): Path<(String, String, String)>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<JsonBody<View>, ApiError> {
    let id = api.resolve(&saga, &id).await?;
    let key = headers.get("idempotency-key").map(parse_key).transpose()?.map(ToOwned::to_owned);
    let body = parse_body(&body, "the signal's body")?;
    api.apply(&saga, id, &Audit::default(), |_, _| Ok(Event::Signalled { name, key, body })).await
}

impl Api {
    async fn apply(
        &self,
        saga: &str,
        id: Uuid,
        audit: &Audit,
        make: impl FnOnce(&Tree, &InstanceState) -> Result<Event, Refusal>,
    ) -> Result<JsonBody<View>, ApiError> {
        match self.engine.change(saga, id, audit, make).await {
            Ok(()) => {}
            // it is not in this process: it may have ended, be held by another orchestrator, or not exist
            Err(EngineError::UnknownInstance { .. }) => {
                let view = self.detail(saga, id).await?.view;
                let why = Refusal::Ended;
                return Err(if view.ended_at.is_some() {
                    EngineError::Refused { id, why }
                } else {
                    EngineError::NotHeld
                }
                .into());
            }
            Err(error) => return Err(error.into()),
        }
        Ok(JsonBody(self.detail(saga, id).await?.view))
    }
}

/// Of the verbs only `skip` says something of a saga that is only watched.
async fn change_watched(api: &Api, saga: &str, id: Uuid, verb: &str) -> Result<JsonBody<View>, ApiError> {
    if verb != "skip" {
        return Err(ApiError::OnlyWatched(id));
    }
    let unknown = || EngineError::UnknownInstance { saga: saga.to_owned(), id };
    match api.tracker.skip(saga, id).await {
        Ok(()) => {}
        Err(SkipError::Unknown) => return Err(unknown().into()),
        Err(SkipError::Ended) => {
            return Err(EngineError::Refused { id, why: Refusal::Ended }.into());
        }
        Err(SkipError::Unavailable) => return Err(EngineError::NotHeld.into()),
    }
    let detail = api.tracker.find(saga, &id.to_string()).await?.ok_or_else(unknown)?;
    Ok(JsonBody(detail.view))
}
