//! A person's verb for many instances: `POST /sagas/{name}/batch/{verb}` applies it to a page of those that a filter admits, and says
//! where the next page begins.

use std::{collections::BTreeMap, fmt, sync::Arc};

use futures::{StreamExt, stream};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{
    engine::{Engine, EngineError},
    filter::Filter,
    key::PARTITIONS,
};
use crate::domain::saga::{
    decide::{self, Refusal},
    event::{Audit, Event},
    state::State,
    tree::Tree,
};

/// Instances of one page.
pub(super) const PAGE: usize = 1_000;
/// How many of them are changed at the same time: their rows share group commits.
const CONCURRENCY: usize = 256;

/// A verb that may be applied to many instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verb {
    Retry,
    Cancel,
    Pause,
    Resume,
}

impl Verb {
    pub(super) fn parse(text: &str) -> Option<Self> {
        match text {
            "retry" => Some(Self::Retry),
            "cancel" => Some(Self::Cancel),
            "pause" => Some(Self::Pause),
            "resume" => Some(Self::Resume),
            _ => None,
        }
    }

    /// The event for an instance; a `retry` is of one step, if it is named.
    pub(super) fn event(self, tree: &Tree, state: &State, step: Option<&str>) -> Result<Event, Refusal> {
        match self {
            Self::Retry => decide::retry_of(tree, state, step),
            Self::Cancel => Ok(Event::Cancel),
            Self::Pause => Ok(Event::Pause),
            Self::Resume => Ok(Event::Resume),
        }
    }
}

/// What came of one page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Applied {
    /// Instances to which the verb was applied.
    pub changed: u64,
    /// By reason, in the order of the reasons.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refused: Vec<Refused>,
    /// The last instance of the page, if there may be more: the next page is after it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<Uuid>,
}

impl Applied {
    /// Adds what came of the next page.
    pub(super) fn add(&mut self, page: Self) {
        self.changed += page.changed;
        for refused in page.refused {
            match self.refused.iter_mut().find(|known| known.why == refused.why) {
                Some(known) => known.count += refused.count,
                None => self.refused.push(refused),
            }
        }
        self.next = None;
    }
}

impl fmt::Display for Applied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} changed", self.changed)?;
        for Refused { why, count, id } in &self.refused {
            writeln!(f, "{count} refused, such as {id}: {why}")?;
        }
        Ok(())
    }
}

/// Instances to which the verb could not be applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Refused {
    /// As a clause: `it has ended`.
    pub why: String,
    pub count: u64,
    /// One of them.
    pub id: Uuid,
}

impl Engine {
    /// Applies `verb` to the live instances that `filter` admits, [`PAGE`] of them, in the order of their ids, after `after`.
    /// Returns when all changes are durable; one that the engine cannot record ends the page with an error, and what was
    /// changed before stays so.
    pub(super) async fn change_many(
        self: &Arc<Self>,
        saga: &str,
        verb: Verb,
        filter: &Filter,
        after: Option<Uuid>,
        audit: &Audit,
    ) -> Result<Applied, EngineError> {
        if self.held() < usize::from(PARTITIONS.unsigned_abs()) {
            return Err(EngineError::NotHeld);
        }
        let ids = self.select(saga, filter, after, PAGE);
        let next = ids.last().copied().filter(|_| ids.len() == PAGE);
        let step = filter.step.as_deref();
        let changes = stream::iter(ids).map(|id| async move {
            (id, self.change(saga, id, audit, |tree, state| verb.event(tree, state, step)).await)
        });
        let mut changes = changes.buffer_unordered(CONCURRENCY);
        let (mut changed, mut refused) = (0, BTreeMap::<String, Refused>::new());
        while let Some((id, result)) = changes.next().await {
            let why = match result {
                Ok(()) => {
                    changed += 1;
                    continue;
                }
                Err(EngineError::Refused { why, .. }) => why,
                // it has left the memory since it was selected
                Err(EngineError::UnknownInstance { .. }) => Refusal::Ended,
                Err(error) => return Err(error),
            };
            let new = || Refused { why: why.to_string(), count: 0, id };
            refused.entry(why.to_string()).or_insert_with(new).count += 1;
        }
        Ok(Applied { changed, refused: refused.into_values().collect(), next })
    }

    /// The live instances of `saga` that `filter` admits, in the order of their ids, from after `after`, at most `limit`.
    fn select(&self, saga: &str, filter: &Filter, after: Option<Uuid>, limit: usize) -> Vec<Uuid> {
        let mut ids = Vec::new();
        for shard in (0..PARTITIONS).filter_map(|partition| self.shard(partition)) {
            let wanted = shard.instances.iter().filter(|(id, instance)| {
                // one whose start is not recorded yet comes after this
                instance.durable
                    && instance.compiled.definition.name == saga
                    && after.is_none_or(|after| **id > after)
                    && filter.admits(instance)
            });
            ids.extend(wanted.map(|(id, _)| *id));
        }
        ids.sort_unstable();
        ids.truncate(limit);
        ids
    }
}
