//! The watches of one scope as a whole: when their first lists are complete, and whether one of them is refused.
//!
//! One scope's trouble is that scope's: a namespace whose rights are gone (because it was deleted, say) is reported once, retried
//! with the watches' own growing pauses, and holds nothing up elsewhere.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, PoisonError},
};

use k8s_openapi::api::core::v1::ObjectReference;
use tokio::sync::Notify;

use crate::controllers::{
    resources::reason::Reason,
    runtime::{Context, Priority},
    status::events::Notice,
    store::Scope,
};

/// The namespaces to work in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespaces {
    All,
    /// Those with this label, `KEY=VALUE`.
    Labelled(String),
    /// These, of which there is at least one.
    Listed(Vec<String>),
}

impl Namespaces {
    pub(super) fn scopes(&self) -> Vec<Scope> {
        match self {
            Self::All | Self::Labelled(_) => vec![Scope(None)],
            Self::Listed(names) => names.iter().map(|name| Scope(Some(name.clone()))).collect(),
        }
    }
}

/// The state that the watches of one scope share.
pub(super) struct ScopeWatches {
    pub(super) scope: Scope,
    state: Mutex<State>,
    changed: Arc<Notify>,
    /// What Events about the scope concern: the operator's own pod.
    operator: ObjectReference,
}

#[derive(Default)]
struct State {
    /// First lists that are to come.
    pending: usize,
    /// Kinds whose watch the API server refuses.
    refused: BTreeSet<&'static str>,
}

impl ScopeWatches {
    pub(super) fn new(scope: Scope, changed: Arc<Notify>, operator: ObjectReference) -> Self {
        Self { scope, state: Mutex::default(), changed, operator }
    }

    /// One more first list is to come.
    pub(super) fn expect(&self) {
        self.lock().pending += 1;
    }

    /// A first list is complete.
    pub(super) fn listed(&self, context: &Context) {
        let done = {
            let mut state = self.lock();
            state.pending = state.pending.saturating_sub(1);
            state.pending == 0
        };
        if done {
            context.start_listening();
            let requeue = context.store().complete(&self.scope);
            context.enqueue(requeue, Priority::Resync);
        }
        self.changed.notify_one();
    }

    /// The API server refuses to let `kind` be watched.
    pub(super) fn refused(&self, context: &Context, kind: &'static str, error: &str) {
        let is_news = {
            let mut state = self.lock();
            let is_news = state.refused.is_empty();
            state.refused.insert(kind);
            is_news
        };
        if is_news {
            let place = self.place();
            let if_gone = match &self.scope.0 {
                Some(_) => {
                    "; if the namespace is gone, create it before, or take it out of the chart's value `namespaces`"
                }
                None => "",
            };
            let message = format!(
                "{place} cannot be watched, and nothing in it is reconciled until it can: {error}; upgrade the release, by which the operator gets its rights again{if_gone}"
            );
            tracing::warn!(scope = place, error, "a scope cannot be watched");
            context.metrics.scope_refused(&self.scope, true);
            let notice = Notice { warning: true, reason: Reason::ScopeUnavailable, message, related: None };
            context.events.publish(notice, self.operator.clone());
        }
        self.changed.notify_one();
    }

    /// A watch of `kind` works.
    pub(super) fn works(&self, context: &Context, kind: &'static str) {
        let is_news = {
            let mut state = self.lock();
            state.refused.remove(kind) && state.refused.is_empty()
        };
        if is_news {
            let place = self.place();
            tracing::info!(scope = place, "the scope can be watched again");
            context.metrics.scope_refused(&self.scope, false);
            let message = format!("{place} can be watched again");
            let notice = Notice { warning: false, reason: Reason::ScopeAvailable, message, related: None };
            context.events.publish(notice, self.operator.clone());
        }
    }

    /// The operator need not wait for it: its lists are complete, or it is a namespace that cannot be watched.
    pub(super) fn is_settled(&self) -> bool {
        let state = self.lock();
        state.pending == 0 || (self.scope.0.is_some() && !state.refused.is_empty())
    }

    fn place(&self) -> String {
        self.scope.0.as_ref().map_or_else(|| "the cluster".to_owned(), |name| format!("namespace {name}"))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
