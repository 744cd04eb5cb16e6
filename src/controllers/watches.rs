//! The watches that feed the [`World`](super::world::World): custom resources in full, children pruned or by their metadata.
//!
//! One connection per kind and namespace (or per kind, when all namespaces are watched). Bookmarks and time-outs are the
//! watch's own; after an error it goes on from where it was, with growing pauses.

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

use super::{
    definitions,
    key::{Key, ObjectId},
    labels::{MANAGED_BY, MANAGED_BY_LABEL},
    live::{ChildSeen, Live, version},
    plan::{ChildKind, ChildRef},
    pods::{self, LivePod, PodSeen},
    readiness::Readiness,
    runtime::Shared,
    world::{Concerned, Custom, Malformed, Scope},
};
use crate::api::v1alpha1::{Microservice, OutboxRelay, Saga};

/// Objects per page of a first list: bounds the memory that one takes.
const PAGE: u32 = 200;
/// Watches that have not delivered their first list by then are reported.
const SLOW_START: Duration = Duration::from_secs(30);

/// How a kind of object enters the world. One value per watch, so that a re-list knows what it has seen.
trait Feed: Send + Sync + 'static {
    type Object: Send;

    /// The custom resource definition that it lives from, and where it watches.
    fn definition(&self) -> Option<(String, &Scope)> {
        None
    }
    fn id(object: &Self::Object) -> ObjectId;
    fn set(&self, shared: &Shared, object: Self::Object) -> Concerned;
    fn remove(&self, shared: &Shared, object: Self::Object) -> Concerned;
    fn retain(&self, shared: &Shared, seen: &HashSet<ObjectId>) -> Concerned;
}

/// Starts all watches; resolves once each has delivered its first list.
pub async fn start(
    shared: &Arc<Shared>,
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
        let starter = Starter { shared, client, scope, readiness, tasks, stop, synced: &synced };
        starter.custom::<Microservice>();
        starter.custom::<OutboxRelay>();
        starter.custom::<Saga>();
        for kind in [ChildKind::Deployment, ChildKind::StatefulSet, ChildKind::Job] {
            starter.pruned(kind);
        }
        for kind in
            [ChildKind::ServiceAccount, ChildKind::Service, ChildKind::NetworkPolicy, ChildKind::PodDisruptionBudget]
        {
            starter.metadata(kind);
        }
        starter.config_maps();
        starter.pods();
    }
    drop(synced);
    // every watch drops its sender after its first list
    while tokio::time::timeout(SLOW_START, all_synced.recv()).await.is_err() {
        tracing::warn!("still waiting for the first lists of all watches");
    }
}

struct Starter<'a> {
    shared: &'a Arc<Shared>,
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
        let feed = CustomFeed::<K> { scope: self.scope.clone(), kind: std::marker::PhantomData };
        self.run(K::KIND.as_str(), watcher(api, config()), feed);
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
        self.run("Pod", well_formed(watcher(self.api::<DeserializeGuard<LivePod>>(&pods::resource()), ours())), feed);
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
        let (shared, stop, synced) = (Arc::clone(self.shared), self.stop.clone(), self.synced.clone());
        let readiness = self.readiness.clone();
        let events = events.default_backoff();
        self.tasks.spawn(async move {
            let followed = follow(&shared, &readiness, kind, events, &feed, synced);
            tokio::select! { () = stop.cancelled() => {} () = followed => {} }
        });
    }
}

async fn follow<F: Feed>(
    shared: &Shared,
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
        let concerned = match event {
            Ok(Event::Init) => {
                seen.clear();
                continue;
            }
            Ok(Event::InitApply(object)) => {
                seen.insert(F::id(&object));
                feed.set(shared, object)
            }
            Ok(Event::InitDone) => {
                synced = None;
                let concerned = feed.retain(shared, &seen);
                seen = HashSet::new();
                concerned
            }
            Ok(Event::Apply(object)) => feed.set(shared, object),
            Ok(Event::Delete(object)) => feed.remove(shared, object),
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
        shared.enqueue(concerned);
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

fn id(object: &impl Resource) -> ObjectId {
    let meta = object.meta();
    ObjectId::new(meta.namespace.clone().unwrap_or_default(), meta.name.clone().unwrap_or_default())
}

struct CustomFeed<K> {
    scope: Scope,
    kind: std::marker::PhantomData<fn() -> K>,
}

impl<K: Custom> Feed for CustomFeed<K> {
    type Object = DeserializeGuard<K>;

    fn definition(&self) -> Option<(String, &Scope)> {
        Some((definitions::name(&K::plural(&())), &self.scope))
    }

    fn id(object: &Self::Object) -> ObjectId {
        id(object)
    }

    fn set(&self, shared: &Shared, object: Self::Object) -> Concerned {
        let id = Self::id(&object);
        match object.0 {
            Ok(object) => shared.world().set(object),
            Err(invalid) => {
                let malformed = Malformed { generation: invalid.metadata.generation, error: invalid.error };
                shared.world().set_malformed::<K>(&id, malformed)
            }
        }
    }

    fn remove(&self, shared: &Shared, object: Self::Object) -> Concerned {
        shared.world().remove::<K>(&Self::id(&object), version(object.meta()))
    }

    fn retain(&self, shared: &Shared, seen: &HashSet<ObjectId>) -> Concerned {
        shared.world().retain::<K>(&self.scope, seen)
    }
}

struct ChildFeed {
    scope: Scope,
    kind: ChildKind,
}

impl ChildFeed {
    fn place(&self, object: &Live) -> Option<(Key, ChildRef)> {
        let id = id(object);
        let owner = Key::of_owner(&id.namespace, object.metadata.labels.as_ref()?)?;
        Some((owner, ChildRef { kind: self.kind.as_str(), name: id.name }))
    }
}

impl Feed for ChildFeed {
    type Object = Live;

    fn id(object: &Live) -> ObjectId {
        id(object)
    }

    fn set(&self, shared: &Shared, object: Live) -> Concerned {
        let Some((owner, child)) = self.place(&object) else { return Concerned::default() };
        shared.world().set_child(&owner, child, ChildSeen::from(object))
    }

    fn remove(&self, shared: &Shared, object: Live) -> Concerned {
        let Some((owner, child)) = self.place(&object) else { return Concerned::default() };
        let uid = object.metadata.uid.as_deref().unwrap_or_default();
        shared.world().remove_child(&owner, &child, uid, version(&object.metadata))
    }

    fn retain(&self, shared: &Shared, seen: &HashSet<ObjectId>) -> Concerned {
        shared.world().retain_children(self.kind, &self.scope, seen)
    }
}

/// Ours by their label; all others may be somebody's migrations.
struct ConfigMapFeed(ChildFeed);

impl Feed for ConfigMapFeed {
    type Object = Live;

    fn id(object: &Live) -> ObjectId {
        id(object)
    }

    fn set(&self, shared: &Shared, object: Live) -> Concerned {
        if is_ours(&object) {
            return self.0.set(shared, object);
        }
        shared.world().set_config_map(id(&object), version(&object.metadata))
    }

    fn remove(&self, shared: &Shared, object: Live) -> Concerned {
        if is_ours(&object) {
            return self.0.remove(shared, object);
        }
        shared.world().remove_config_map(&id(&object))
    }

    fn retain(&self, shared: &Shared, seen: &HashSet<ObjectId>) -> Concerned {
        let theirs = shared.world().retain_config_maps(&self.0.scope, seen);
        [theirs, self.0.retain(shared, seen)].into_iter().collect()
    }
}

fn is_ours(object: &Live) -> bool {
    object.metadata.labels.as_ref().and_then(|labels| labels.get(MANAGED_BY_LABEL)).is_some_and(|by| by == MANAGED_BY)
}

struct PodFeed {
    scope: Scope,
}

impl Feed for PodFeed {
    type Object = LivePod;

    fn id(object: &LivePod) -> ObjectId {
        id(object)
    }

    fn set(&self, shared: &Shared, object: LivePod) -> Concerned {
        let id = id(&object);
        let owner = object.metadata.labels.as_ref().and_then(|labels| Key::of_owner(&id.namespace, labels));
        let Some(owner) = owner else { return Concerned::default() };
        let concerned = shared.world().set_pod(&owner, id.name, PodSeen::from(object));
        shared.pods_changed();
        concerned
    }

    fn remove(&self, shared: &Shared, object: LivePod) -> Concerned {
        let concerned = shared.world().remove_pod(&id(&object));
        shared.pods_changed();
        concerned
    }

    fn retain(&self, shared: &Shared, seen: &HashSet<ObjectId>) -> Concerned {
        let concerned = shared.world().retain_pods(&self.scope, seen);
        shared.pods_changed();
        concerned
    }
}
