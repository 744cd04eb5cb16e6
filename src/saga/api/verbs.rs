//! What changes instances: a person's verbs, for one and for many, and signals.

use axum::{
    Json as JsonBody,
    body::Bytes,
    extract::{Path, Query, State},
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
        filter::FilterQuery,
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
    if let Some(watched) = api.tracker.find(&saga, &id).await? {
        return change_watched(&api, &saga, watched.view.id, &verb).await;
    }
    let of_many = Verb::parse(&verb);
    if of_many.is_none() && verb != "skip" {
        return Err(ApiError::Verb(verb));
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

#[derive(Debug, Deserialize)]
pub(super) struct BatchQuery {
    /// The last instance of the page before.
    after: Option<Uuid>,
    /// Without a filter, every running instance is meant.
    #[serde(default)]
    all: bool,
}

pub(super) async fn change_many(
    State(api): State<Api>,
    Path((saga, verb)): Path<(String, String)>,
    Query(filter): Query<FilterQuery>,
    Query(query): Query<BatchQuery>,
    Query(audit): Query<Audit>,
) -> Result<JsonBody<Applied>, ApiError> {
    let verb = Verb::parse(&verb).ok_or(ApiError::BatchVerb(verb))?;
    if api.tracker.follows(&saga) {
        return Err(ApiError::Invalid(format!("saga `{saga}` is choreographed: Weft only watches its instances")));
    }
    let filter = filter.parse(Timestamp::now()).map_err(ApiError::Invalid)?;
    if filter.is_empty() && !query.all {
        let message =
            "name the instances by `state`, `step`, `key` or `olderThan`; `all=true` means every one that runs";
        return Err(ApiError::Invalid(message.to_owned()));
    }
    if !filter.admits_live() {
        return Err(ApiError::Invalid("instances that have ended cannot be changed".to_owned()));
    }
    let catalogue = &api.engine.catalogue;
    if catalogue.current(&saga).is_none() && !catalogue.is_draining(&saga) {
        return Err(EngineError::UnknownSaga(saga).into());
    }
    Ok(JsonBody(api.engine.change_many(&saga, verb, &filter, query.after, &parse_audit(audit)?).await?))
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
    if !["retry", "skip", "cancel", "pause", "resume"].contains(&verb) {
        return Err(ApiError::Verb(verb.to_owned()));
    }
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
