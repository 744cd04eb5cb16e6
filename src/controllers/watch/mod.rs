//! The watches that feed the [`Store`](super::store::Store): custom resources in full, children pruned or by their metadata.
//!
//! One connection per kind and namespace (or per kind, when all namespaces are watched). Bookmarks and time-outs are the
//! watch's own; after an error it goes on from where it was, with growing pauses.

pub mod definitions;
mod feed;
pub mod pod_events;
pub mod readiness;
pub mod streams;

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::{
    Api, Client, Resource,
    api::ApiResource,
    core::{DeserializeGuard, DynamicResourceScope, PartialObjectMeta},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    feed::{ChildFeed, ConfigMapFeed, CustomFeed, Feed, PodFeed},
    readiness::Readiness,
};
use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga},
    controllers::{
        resources::{
            child::{ChildKind, Watch},
            labels::{MANAGED_BY, MANAGED_BY_LABEL},
        },
        runtime::Context,
        store::{
            Custom, Scope,
            live::Live,
            live_pod::{self, LivePod},
        },
    },
};

/// Objects per page of a first list: bounds the memory that one takes.
const PAGE: u32 = 200;
/// Watches that have not delivered their first list by then are reported.
const SLOW_START: Duration = Duration::from_secs(30);

/// Starts all watches; resolves once each has delivered its first list.
pub async fn start(
    context: &Arc<Context>,
    client: &Client,
    namespaces: &[String],
    readiness: &Readiness,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    let scopes: Vec<Scope> = if namespaces.is_empty() {
        vec![Scope(None)]
    } else {
        namespaces.iter().map(|namespace| Scope(Some(namespace.clone()))).collect()
    };
    let (synced, mut all_synced) = tokio::sync::mpsc::channel::<()>(1);
    for scope in scopes {
        let starter = Starter { context, client, scope, readiness, tasks, stop, synced: &synced };
        starter.custom::<Microservice>();
        starter.custom::<OutboxRelay>();
        starter.custom::<Saga>();
        for kind in ChildKind::ALL {
            starter.children(*kind);
        }
        starter.pods();
    }
    drop(synced);
    // every watch drops its sender after its first list
    while tokio::time::timeout(SLOW_START, all_synced.recv()).await.is_err() {
        tracing::warn!("still waiting for the first lists of all watches");
    }
}

struct Starter<'a> {
    context: &'a Arc<Context>,
    client: &'a Client,
    scope: Scope,
    readiness: &'a Readiness,
    tasks: &'a TaskTracker,
    stop: &'a CancellationToken,
    synced: &'a tokio::sync::mpsc::Sender<()>,
}

impl Starter<'_> {
    fn custom<K: Custom>(&self) {
        let api: Api<DeserializeGuard<K>> = match &self.scope.0 {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        let feed = CustomFeed::<K>::new(self.scope.clone());
        self.run(K::KIND.as_str(), watcher(api, config()), feed);
    }

    fn children(&self, kind: ChildKind) {
        match kind.watch() {
            Watch::Status => self.pruned(kind),
            Watch::Metadata => self.metadata(kind),
            Watch::MetadataOfAll => self.config_maps(),
            Watch::Never => {}
        }
    }

    fn pruned(&self, kind: ChildKind) {
        let feed = ChildFeed { scope: self.scope.clone(), kind };
        self.run(
            kind.as_str(),
            well_formed(watcher(self.api::<DeserializeGuard<Live>>(&kind.resource()), ours())),
            feed,
        );
    }

    fn metadata(&self, kind: ChildKind) {
        let api: Api<PartialObjectMeta<Live>> = self.api(&kind.resource());
        let feed = ChildFeed { scope: self.scope.clone(), kind };
        self.run(kind.as_str(), watcher(api, ours()).map_ok(without_body), feed);
    }

    fn config_maps(&self) {
        let api: Api<PartialObjectMeta<ConfigMap>> = match &self.scope.0 {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        let feed = ConfigMapFeed(ChildFeed { scope: self.scope.clone(), kind: ChildKind::ConfigMap });
        self.run("ConfigMap", watcher(api, config()).map_ok(without_body), feed);
    }

    fn pods(&self) {
        let feed = PodFeed { scope: self.scope.clone() };
        self.run(
            "Pod",
            well_formed(watcher(self.api::<DeserializeGuard<LivePod>>(&live_pod::resource()), ours())),
            feed,
        );
    }

    fn api<K>(&self, resource: &ApiResource) -> Api<K>
    where
        K: Resource<DynamicType = ApiResource, Scope = DynamicResourceScope>,
    {
        match &self.scope.0 {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, resource),
            None => Api::all_with(self.client.clone(), resource),
        }
    }

    fn run<F: Feed>(
        &self,
        kind: &'static str,
        events: impl Stream<Item = Result<Event<F::Object>, watcher::Error>> + Send + 'static,
        feed: F,
    ) {
        let (context, stop, synced) = (Arc::clone(self.context), self.stop.clone(), self.synced.clone());
        let readiness = self.readiness.clone();
        let events = events.default_backoff();
        self.tasks.spawn(async move {
            let followed = follow(&context, &readiness, kind, events, &feed, synced);
            tokio::select! { () = stop.cancelled() => {} () = followed => {} }
        });
    }
}

async fn follow<F: Feed>(
    context: &Context,
    readiness: &Readiness,
    kind: &'static str,
    events: impl Stream<Item = Result<Event<F::Object>, watcher::Error>>,
    feed: &F,
    synced: tokio::sync::mpsc::Sender<()>,
) {
    let mut synced = Some(synced);
    let mut seen = HashSet::new();
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        let requeue = match event {
            Ok(Event::Init) => {
                seen.clear();
                continue;
            }
            Ok(Event::InitApply(object)) => {
                seen.insert(F::id(&object));
                feed.set(context, object)
            }
            Ok(Event::InitDone) => {
                synced = None;
                let requeue = feed.retain(context, &seen);
                seen = HashSet::new();
                requeue
            }
            Ok(Event::Apply(object)) => feed.set(context, object),
            Ok(Event::Delete(object)) => feed.remove(context, object),
            Err(error) => {
                match feed.definition() {
                    Some((definition, scope)) if code(&error) == Some(404) => {
                        if readiness.deleted(&definition, scope) {
                            tracing::warn!(definition, "the definition was deleted: waiting for it");
                        }
                    }
                    _ => report(kind, &error, synced.is_some()),
                }
                continue;
            }
        };
        if let Some((definition, scope)) = feed.definition()
            && readiness.watched(&definition, scope)
        {
            tracing::info!(definition, "the definition is there again");
        }
        context.enqueue(requeue);
    }
}

/// The API server's HTTP status, if it answered.
fn code(error: &watcher::Error) -> Option<u16> {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status))
        | watcher::Error::WatchError(status) => Some(status.code),
        _ => None,
    }
}

/// A watch that ends is normal; one that cannot begin is not.
fn report(kind: &str, error: &watcher::Error, starting: bool) {
    let error = error as &dyn std::error::Error;
    if starting {
        tracing::warn!(kind, error, "cannot watch");
    } else {
        tracing::debug!(kind, error, "a watch was interrupted");
    }
}

fn config() -> watcher::Config {
    watcher::Config::default().page_size(PAGE)
}

fn ours() -> watcher::Config {
    config().labels(&format!("{MANAGED_BY_LABEL}={MANAGED_BY}"))
}

/// Drops what cannot be parsed: one odd child must not end the watch of all.
fn well_formed<K: Send>(
    events: impl Stream<Item = Result<Event<DeserializeGuard<K>>, watcher::Error>> + Send,
) -> impl Stream<Item = Result<Event<K>, watcher::Error>> + Send {
    let known = |object: DeserializeGuard<K>| {
        object.0.inspect_err(|invalid| tracing::warn!(error = invalid.error, "a child cannot be read")).ok()
    };
    events.try_filter_map(move |event| {
        std::future::ready(Ok(match event {
            Event::Apply(object) => known(object).map(Event::Apply),
            Event::Delete(object) => known(object).map(Event::Delete),
            Event::InitApply(object) => known(object).map(Event::InitApply),
            Event::Init => Some(Event::Init),
            Event::InitDone => Some(Event::InitDone),
        }))
    })
}

fn without_body<K>(event: Event<PartialObjectMeta<K>>) -> Event<Live> {
    let live = |object: PartialObjectMeta<K>| Live { metadata: object.metadata, ..Live::default() };
    match event {
        Event::Apply(object) => Event::Apply(live(object)),
        Event::Delete(object) => Event::Delete(live(object)),
        Event::InitApply(object) => Event::InitApply(live(object)),
        Event::Init => Event::Init,
        Event::InitDone => Event::InitDone,
    }
}
