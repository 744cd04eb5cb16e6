//! The watches that feed the [`Store`](super::store::Store): custom resources in full, children pruned or by their metadata.
//!
//! One connection per kind and namespace (or per kind, when all namespaces are watched). Bookmarks and time-outs are the
//! watch's own; after an error it goes on from where it was, with growing pauses.

pub mod definitions;
mod feed;
pub mod pod_events;
mod pod_status;
pub mod readiness;
mod scope;
pub mod streams;

use std::{collections::HashSet, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, TryStreamExt};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, ObjectReference};
use kube::{
    Api, Client, Resource,
    api::ApiResource,
    core::{DeserializeGuard, DynamicResourceScope, PartialObjectMeta},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use tokio::{
    sync::Notify,
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub use self::scope::Namespaces;
use self::{
    feed::{ChildFeed, CustomFeed, Feed, ForeignConfigMaps, ForeignPolicies, NamespaceFeed, PodFeed, SharedFeed},
    readiness::Readiness,
    scope::ScopeWatches,
};
use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga},
    controllers::{
        resources::{
            child::{ChildKind, Watch},
            labels::{MANAGED_BY, MANAGED_BY_LABEL},
        },
        runtime::{Context, Priority},
        store::{
            Custom, Scope,
            live::Live,
            live_pod::{self, LivePod},
        },
    },
};

/// Objects per page of a first list: bounds the memory that one takes.
const PAGE: u32 = 50;
/// Between two attempts at a watch that is refused; doubled each time. (The watch's own pauses begin anew with each attempt.)
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_mins(1);
/// Every watch lists anew so often, or up to a third sooner, so that not all do at once: the net under a change that no
/// event reported. Where nothing differs, nothing is requeued.
const RELIST: Duration = Duration::from_mins(30);
/// Watches that have not delivered their first list by then are reported.
const SLOW_START: Duration = Duration::from_secs(30);

/// Starts all watches; resolves once the first lists of every scope are complete, or known to be refused. Nothing needs to wait
/// for that: what lies in a scope is reconciled when the lists of that scope are complete. Events about scopes concern
/// `operator`, the operator's own pod.
pub async fn start(
    context: &Arc<Context>,
    namespaces: &Namespaces,
    operator: &ObjectReference,
    readiness: &Readiness,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) {
    let changed = Arc::new(Notify::new());
    let mut all = Vec::new();
    for scope in namespaces.scopes() {
        context.store().expect(scope.clone());
        let watches = Arc::new(ScopeWatches::new(scope, Arc::clone(&changed), operator.clone()));
        let starter =
            Starter { context, client: &context.client, watches: Arc::clone(&watches), readiness, tasks, stop };
        if let Namespaces::Labelled(label) = namespaces {
            context.store().require_label(label.clone());
            starter.namespaces(label);
        }
        starter.custom::<Microservice>();
        starter.custom::<OutboxRelay>();
        starter.custom::<Saga>();
        for kind in ChildKind::ALL {
            starter.children(*kind);
        }
        starter.pods();
        all.push(watches);
    }
    while !all.iter().all(|watches| watches.is_settled()) {
        if tokio::time::timeout(SLOW_START, changed.notified()).await.is_err() {
            tracing::warn!("still waiting for the first lists of all watches");
        }
    }
}

struct Starter<'a> {
    context: &'a Arc<Context>,
    client: &'a Client,
    watches: Arc<ScopeWatches>,
    readiness: &'a Readiness,
    tasks: &'a TaskTracker,
    stop: &'a CancellationToken,
}

impl Starter<'_> {
    /// Namespaces with `label`.
    fn namespaces(&self, label: &str) {
        let api: Api<PartialObjectMeta<Namespace>> = Api::all(self.client.clone());
        let config = config().labels(label);
        self.run("Namespace", move || watcher(api.clone(), config.clone()).map_ok(without_body), NamespaceFeed);
    }

    fn custom<K: Custom>(&self) {
        let api: Api<DeserializeGuard<K>> = match &self.watches.scope.0 {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        let feed = CustomFeed::<K>::new(self.watches.scope.clone());
        self.run(K::KIND.as_str(), move || watcher(api.clone(), config()), feed);
    }

    fn children(&self, kind: ChildKind) {
        match kind.watch() {
            Watch::Status => self.pruned(kind),
            Watch::Metadata => self.metadata(kind),
            Watch::MetadataOfAll => self.config_maps(),
            Watch::SpecOfAll => self.policies(kind),
            Watch::Never => {}
        }
    }

    fn pruned(&self, kind: ChildKind) {
        let api: Api<DeserializeGuard<Live>> = self.api(&kind.resource());
        let feed = ChildFeed::new(self.watches.scope.clone(), kind);
        self.run(kind.as_str(), move || well_formed(watcher(api.clone(), ours())), feed);
    }

    fn metadata(&self, kind: ChildKind) {
        let api: Api<PartialObjectMeta<Live>> = self.api(&kind.resource());
        let feed = ChildFeed::new(self.watches.scope.clone(), kind);
        self.run(kind.as_str(), move || watcher(api.clone(), ours()).map_ok(without_body), feed);
    }

    fn config_maps(&self) {
        let api: Api<PartialObjectMeta<ConfigMap>> = match &self.watches.scope.0 {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        };
        let ours = ChildFeed::new(self.watches.scope.clone(), ChildKind::ConfigMap);
        let feed = SharedFeed::<ForeignConfigMaps>::new(ours);
        self.run("ConfigMap", move || watcher(api.clone(), config()).map_ok(without_body), feed);
    }

    fn policies(&self, kind: ChildKind) {
        let api: Api<DeserializeGuard<Live>> = self.api(&kind.resource());
        let feed = SharedFeed::<ForeignPolicies>::new(ChildFeed::new(self.watches.scope.clone(), kind));
        self.run(kind.as_str(), move || well_formed(watcher(api.clone(), config())), feed);
    }

    fn pods(&self) {
        let api: Api<DeserializeGuard<LivePod>> = self.api(&live_pod::resource());
        let feed = PodFeed { scope: self.watches.scope.clone() };
        self.run("Pod", move || well_formed(watcher(api.clone(), ours())), feed);
    }

    fn api<K>(&self, resource: &ApiResource) -> Api<K>
    where
        K: Resource<DynamicType = ApiResource, Scope = DynamicResourceScope>,
    {
        match &self.watches.scope.0 {
            Some(namespace) => Api::namespaced_with(self.client.clone(), namespace, resource),
            None => Api::all_with(self.client.clone(), resource),
        }
    }

    fn run<F, S>(&self, kind: &'static str, watch: impl Fn() -> S + Send + Sync + 'static, feed: F)
    where
        F: Feed,
        S: Stream<Item = Result<Event<F::Object>, watcher::Error>> + Send + 'static,
    {
        let (context, stop, watches) = (Arc::clone(self.context), self.stop.clone(), Arc::clone(&self.watches));
        let readiness = self.readiness.clone();
        watches.expect();
        self.tasks.spawn(async move {
            let watch = || watch().default_backoff();
            let followed = follow(&context, &readiness, kind, watch, &feed, &watches);
            tokio::select! { () = stop.cancelled() => {} () = followed => {} }
        });
    }
}

async fn follow<F, S>(
    context: &Context,
    readiness: &Readiness,
    kind: &'static str,
    watch: impl Fn() -> S,
    feed: &F,
    watches: &ScopeWatches,
) where
    F: Feed,
    S: Stream<Item = Result<Event<F::Object>, watcher::Error>>,
{
    let mut listed = false;
    let mut pause = FIRST_PAUSE;
    let mut seen = HashSet::new();
    // not while it lists: however long that takes, it is to come to an end
    let mut relist: Option<Instant> = None;
    let mut events = std::pin::pin!(watch());
    loop {
        let event = match relist {
            Some(at) => timeout_at(at, events.next()).await,
            None => Ok(events.next().await),
        };
        let Ok(event) = event else {
            events.set(watch());
            relist = None;
            continue;
        };
        let Some(event) = event else { return };
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                interrupted(context, readiness, kind, feed.definition(), watches, &error);
                if matches!(code(&error), Some(401 | 403)) {
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    // a list shows that the rights are back, which a watch of what does not change never would
                    events.set(watch());
                    relist = None;
                }
                continue;
            }
        };
        let (requeue, first_list) = match event {
            // it comes before each attempt, and says nothing about it
            Event::Init => {
                feed.list_begins(context);
                seen.clear();
                relist = None;
                continue;
            }
            Event::InitApply(object) => {
                seen.insert(F::id(&object));
                (feed.set(context, object), false)
            }
            Event::InitDone => {
                relist = Some(Instant::now() + RELIST.mul_f64(1.0 - rand::random::<f64>() / 3.0));
                (feed.retain(context, &std::mem::take(&mut seen)), !std::mem::replace(&mut listed, true))
            }
            Event::Apply(object) => (feed.set(context, object), false),
            Event::Delete(object) => (feed.remove(context, object), false),
        };
        if let Some((definition, scope)) = feed.definition()
            && readiness.watched(&definition, scope)
        {
            tracing::info!(definition, "the definition is there again");
        }
        pause = FIRST_PAUSE;
        watches.works(context, kind);
        // before the first list is complete, nothing is known to have changed
        context.enqueue(requeue, if listed && !first_list { F::PRIORITY } else { Priority::Resync });
        if first_list {
            watches.listed(context);
        }
    }
}

/// A watch that ends is normal; one that cannot begin is not.
fn interrupted(
    context: &Context,
    readiness: &Readiness,
    kind: &'static str,
    definition: Option<(String, &Scope)>,
    watches: &ScopeWatches,
    error: &watcher::Error,
) {
    match (definition, code(error)) {
        (Some((definition, scope)), Some(404)) => {
            if readiness.deleted(&definition, scope) {
                tracing::warn!(definition, "the definition was deleted: waiting for it");
            }
        }
        (_, Some(401 | 403 | 404)) => watches.refused(context, kind, &error.to_string()),
        _ => {
            let error = error as &dyn std::error::Error;
            tracing::debug!(kind, error, "a watch was interrupted");
        }
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
