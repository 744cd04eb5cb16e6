//! The tracker of choreographed sagas: reads what their services emit, sends nothing, and knows who owes the next event.
//!
//! ```text
//!   stream of each service ─► consumer ─► committer ── one transaction per batch ──► weft.choreography
//!                                ▲            │
//!                                └─ acknowledged after the commit
//! ```
//! Nothing is kept in memory but counts and what is on its way: an instance is read when one of its events comes, or when
//! something that it is owed becomes due.

mod committer;
mod consumer;
mod counts;
mod discover;
mod row;
mod store;
mod view;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError, RwLock},
};

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::{
    committer::{BATCH, Committer, Item, Skip},
    consumer::Consumer,
    counts::Counts,
    row::Row,
    store::{Filter, Store},
};
pub(super) use self::{
    discover::{DiscoverArgs, run as discover},
    store::StoreError,
};
use super::{
    engine::Engine,
    filter::Cursor,
    key::Key,
    problem::Problems,
    reader::Reader,
    view::{Detail, View},
};
use crate::{
    contract::{
        DatabaseLogin,
        orchestrator::{Choreography, Orchestrator, Start},
        status::SagaCounts,
    },
    domain::{
        choreography::{
            assessment::Graph,
            definition::{Definition, Kind},
        },
        saga::state::Status,
    },
};

/// The `event_type` of what reads all events of a service. No event has it.
const EVERY_TYPE: &str = "*";

/// What reads the events of a choreography, by service.
pub(super) fn reads(choreography: &Choreography) -> Vec<Start> {
    let read = |source: &crate::contract::orchestrator::Source| Start {
        saga: choreography.definition.name.clone(),
        service: source.service.clone(),
        event_type: EVERY_TYPE.to_owned(),
        since: choreography.since,
        from: source.from.clone(),
    };
    choreography.sources.iter().map(read).collect()
}

/// The instance of `saga` with this correlation.
pub(super) fn instance_id(saga: &str, correlation: &str) -> Uuid {
    Key::Correlation(correlation).id(saga)
}

/// Why an instance is not skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SkipError {
    Unknown,
    Ended,
    /// The process ends, or the database does not answer.
    Unavailable,
}

/// What the tracker's tasks share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    counts: Counts,
    graphs: Graphs,
    contract: Mutex<Arc<[Choreography]>>,
    /// By saga and service: all events up to then were read.
    read_until: Mutex<HashMap<(String, String), Timestamp>>,
}

impl Shared {
    fn contract(&self) -> Arc<[Choreography]> {
        Arc::clone(&self.contract.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// That never goes back.
    fn set_read_until(&self, read: &Start, until: Timestamp) {
        let key = (read.saga.clone(), read.service.clone());
        let mut read_until = self.read_until.lock().unwrap_or_else(PoisonError::into_inner);
        let known = read_until.entry(key).or_insert(until);
        *known = until.max(*known);
    }

    /// Up to when the events of all services of `saga` were read; `None` while that is not known of one.
    fn read_until(&self, saga: &str) -> Option<Timestamp> {
        let contract = self.contract();
        let followed = contract.iter().find(|followed| followed.definition.name == saga)?;
        let read_until = self.read_until.lock().unwrap_or_else(PoisonError::into_inner);
        let until = |service: &str| read_until.get(&(saga.to_owned(), service.to_owned())).copied();
        let all: Option<Vec<_>> = followed.sources.iter().map(|source| until(&source.service)).collect();
        all?.into_iter().min()
    }
}

/// The definitions that this process knows, by saga and version.
#[derive(Debug, Default)]
struct Graphs(RwLock<Known>);

#[derive(Debug, Default)]
struct Known {
    versions: HashMap<(String, String), Arc<Graph>>,
    /// By saga: what new instances start with.
    current: HashMap<String, Arc<Graph>>,
}

impl Graphs {
    /// The definition of an instance that started with `version`; the current one when it has not started.
    fn of(&self, saga: &str, version: &str) -> Option<Arc<Graph>> {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if version.is_empty() {
            return known.current.get(saga).cloned();
        }
        known.versions.get(&(saga.to_owned(), version.to_owned())).cloned()
    }

    fn insert(&self, graph: Arc<Graph>) {
        let key = (graph.definition.name.clone(), graph.definition.version.clone());
        self.0.write().unwrap_or_else(PoisonError::into_inner).versions.insert(key, graph);
    }

    fn insert_current(&self, definition: Definition) {
        let graph = Arc::new(Graph::new(definition));
        let saga = graph.definition.name.clone();
        self.insert(Arc::clone(&graph));
        self.0.write().unwrap_or_else(PoisonError::into_inner).current.insert(saga, graph);
    }
}

/// The tracker of one orchestrator.
#[derive(Debug)]
pub(super) struct Tracker {
    engine: Arc<Engine>,
    reader: Arc<Reader>,
    problems: Arc<Problems>,
    login: DatabaseLogin,
    shared: Arc<Shared>,
    items: mpsc::Sender<Item>,
    skips: mpsc::Sender<Skip>,
    running: Mutex<Vec<(Start, Kind, CancellationToken)>>,
    stopping: CancellationToken,
    /// For requests of people.
    store: tokio::sync::Mutex<Option<Store>>,
}

impl Tracker {
    pub(super) fn start(
        login: DatabaseLogin,
        engine: &Arc<Engine>,
        reader: &Arc<Reader>,
        problems: &Arc<Problems>,
    ) -> Arc<Self> {
        let (items, receiver) = mpsc::channel(BATCH);
        let (skips, skip_receiver) = mpsc::channel(16);
        let (shared, stopping) = (Arc::new(Shared::default()), CancellationToken::new());
        let committer = Committer {
            login: login.clone(),
            engine: Arc::clone(engine),
            problems: Arc::clone(problems),
            shared: Arc::clone(&shared),
            items: receiver,
            skips: skip_receiver,
            stopping: stopping.clone(),
        };
        engine.tasks.spawn(committer.run());
        Arc::new(Self {
            engine: Arc::clone(engine),
            reader: Arc::clone(reader),
            problems: Arc::clone(problems),
            login,
            shared,
            items,
            skips,
            running: Mutex::default(),
            stopping,
            store: tokio::sync::Mutex::default(),
        })
    }

    /// Follows exactly the choreographies of `contract`.
    pub(super) fn follow(&self, contract: &Orchestrator) {
        let seal = |saga: &Choreography| {
            let mut saga = saga.clone();
            if saga.definition.version.is_empty() {
                saga.definition = saga.definition.seal();
            }
            saga
        };
        let followed: Arc<[Choreography]> = contract.choreographies.iter().map(seal).collect();
        *self.shared.contract.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&followed);
        let wanted: Vec<_> = followed
            .iter()
            .flat_map(|saga| reads(saga).into_iter().map(|read| (read, saga.definition.start.clone())))
            .collect();
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|(read, start, token)| {
            let stays = wanted.iter().any(|wanted| (&wanted.0, &wanted.1) == (read, start));
            if !stays {
                token.cancel();
                self.problems.resolve(&consumer::source(read));
                let is_read =
                    wanted.iter().any(|(other, _)| (&other.saga, &other.service) == (&read.saga, &read.service));
                if !is_read {
                    self.spawn(contract, read.clone(), start.clone(), true);
                }
            }
            stays
        });
        for (read, start) in wanted {
            if !running.iter().any(|known| (&known.0, &known.1) == (&read, &start)) {
                let token = self.spawn(contract, read.clone(), start.clone(), false);
                running.push((read, start, token));
            }
        }
    }

    fn spawn(&self, contract: &Orchestrator, read: Start, start: Kind, over: bool) -> CancellationToken {
        let token = self.stopping.child_token();
        let consumer = Consumer {
            namespace: contract.namespace.clone(),
            orchestrator: contract.name.clone(),
            read,
            start,
            over,
            engine: Arc::clone(&self.engine),
            reader: Arc::clone(&self.reader),
            problems: Arc::clone(&self.problems),
            shared: Arc::clone(&self.shared),
            items: self.items.clone(),
        };
        let cancelled = token.clone();
        self.engine.tasks.spawn(async move {
            tokio::select! { () = consumer.run() => {} () = cancelled.cancelled() => {} }
        });
        token
    }

    /// Stops; events that are not acknowledged are delivered again to the next process.
    pub(super) fn stop(&self) {
        self.stopping.cancel();
    }

    /// Adds what is counted to the counts of the engine, by saga.
    pub(super) fn report(&self, sagas: &mut BTreeMap<String, SagaCounts>) {
        let contract = self.shared.contract();
        let version = |saga: &str| {
            let followed = contract.iter().find(|followed| followed.definition.name == saga)?;
            Some(followed.definition.version.clone())
        };
        let named = contract.iter().map(|followed| followed.definition.name.clone());
        for saga in self.shared.counts.sagas().into_iter().chain(named).collect::<std::collections::BTreeSet<_>>() {
            let counts = sagas.entry(saga.clone()).or_default();
            let followed = version(&saga).filter(|version| self.shared.graphs.of(&saga, version).is_some());
            self.shared.counts.report(&saga, followed.is_some(), counts);
            if let Some(version) = followed {
                counts.version = version;
            }
        }
    }

    pub(super) fn follows(&self, saga: &str) -> bool {
        self.shared.contract().iter().any(|followed| followed.definition.name == saga)
    }

    /// Uses the connection for requests of people.
    async fn with_store<T>(&self, query: impl AsyncFnOnce(&Store) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut store = self.store.lock().await;
        if store.as_ref().is_none_or(Store::is_closed) {
            *store = None;
        }
        let open = match store.take() {
            Some(open) => open,
            None => Store::open(&self.login, "weft saga tracker api").await?,
        };
        let answer = query(&open).await;
        // a connection that did not answer is not used again
        if !matches!(answer, Err(StoreError::Timeout)) {
            *store = Some(open);
        }
        answer
    }

    /// Instances of a saga, the latest first, after `after`.
    pub(super) async fn list(
        &self,
        saga: &str,
        status: Option<Status>,
        after: Option<Cursor>,
        limit: usize,
    ) -> Result<Vec<View>, StoreError> {
        self.with_store(async |store| {
            let rows = store.list(Filter { saga, status, after, limit }).await?;
            let mut views = Vec::with_capacity(rows.len());
            for row in rows {
                if let Some(graph) = self.graph(store, &row).await? {
                    views.push(view::view(&row, &graph));
                }
            }
            Ok(views)
        })
        .await
    }

    /// The instance with this id, or with this correlation.
    pub(super) async fn find(&self, saga: &str, id: &str) -> Result<Option<Detail>, StoreError> {
        self.with_store(async |store| {
            for id in id.parse().into_iter().chain([instance_id(saga, id)]) {
                let Some(row) = store.find(id).await?.filter(|row| row.saga == saga) else { continue };
                if let Some(graph) = self.graph(store, &row).await? {
                    return Ok(Some(view::detail(&row, &graph)));
                }
            }
            Ok(None)
        })
        .await
    }

    async fn graph(&self, store: &Store, row: &Row) -> Result<Option<Arc<Graph>>, StoreError> {
        if let Some(known) = self.shared.graphs.of(&row.saga, &row.version) {
            return Ok(Some(known));
        }
        let stored = store.graph(&row.saga, &row.version).await?;
        if let Some(graph) = &stored {
            self.shared.graphs.insert(Arc::clone(graph));
        }
        Ok(stored)
    }

    /// Gives up what an instance is owed; returns when that is durable.
    pub(super) async fn skip(&self, saga: &str, id: Uuid) -> Result<(), SkipError> {
        let (answer, answered) = oneshot::channel();
        let skip = Skip { saga: saga.to_owned(), id, answer };
        self.skips.try_send(skip).map_err(|_| SkipError::Unavailable)?;
        answered.await.unwrap_or(Err(SkipError::Unavailable))
    }
}
