//! Puts what was read into the database, batch by batch, and acknowledges it at the broker after the commit. It also finds what
//! became overdue. All writes of the tracker are made here.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use async_nats::jetstream::message::Acker;
use jiff::Timestamp;
use tokio::{
    sync::{mpsc, oneshot},
    time::{MissedTickBehavior, interval},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    Shared, SkipError,
    row::{Counted, Row},
    store::{Batch, Store, StoreError},
};
use crate::{
    contract::{
        DatabaseLogin,
        orchestrator::Choreography,
        status::{REACT, StuckInstance},
    },
    domain::choreography::{
        assessment::{Graph, assess},
        instance::Seen,
    },
    postgres::login,
    saga::{
        engine::Engine,
        problem::{Problems, SagaProblem},
    },
};

/// Events of one batch.
pub(super) const BATCH: usize = 2_048;
/// How often overdue reactions are looked for.
const DUE_INTERVAL: Duration = Duration::from_millis(500);
/// Instances that become stuck in one batch.
const MAX_DUE: i64 = 1_000;
/// How often the stuck instances in the status are read, while there are some.
const STUCK_INTERVAL: Duration = Duration::from_secs(1);
/// How often rows that wait for their start too long are deleted.
const PURGE_INTERVAL: Duration = Duration::from_mins(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Maximum number of stuck instances in the status.
const MAX_REPORTED: i64 = 10;
/// Where problems of the tracker's database are reported.
const SOURCE: &str = "database of the tracker";

/// An event on its way from the broker to the database.
pub(super) struct Item {
    pub saga: Arc<str>,
    /// Of the instance.
    pub id: Uuid,
    pub correlation: String,
    pub event: Seen,
    pub acker: Acker,
    /// When the broker stored it, in milliseconds since 1970.
    pub published: i64,
    pub progress: Arc<Progress>,
}

/// How far the events of one consumer are.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// How many are on their way.
    pub under_way: AtomicUsize,
    /// When the broker stored the last one that is in the database, in milliseconds since 1970.
    pub recorded: AtomicI64,
}

/// A person's decision to give up what an instance is owed.
pub(super) struct Skip {
    pub saga: String,
    pub id: Uuid,
    pub answer: oneshot::Sender<Result<(), SkipError>>,
}

pub(super) struct Committer {
    pub login: DatabaseLogin,
    pub engine: Arc<Engine>,
    pub problems: Arc<Problems>,
    pub shared: Arc<Shared>,
    pub items: mpsc::Receiver<Item>,
    pub skips: mpsc::Receiver<Skip>,
    pub stopping: CancellationToken,
}

impl Committer {
    /// Runs until stopped. What was not committed is delivered by the broker again.
    pub(super) async fn run(mut self) {
        let stopping = self.stopping.clone();
        let mut pending = Vec::new();
        loop {
            let ended = tokio::select! {
                ended = self.session(&mut pending) => ended,
                () = stopping.cancelled() => return,
            };
            let Err(error) = ended else { return };
            let address = login::address(&self.login);
            let problem =
                SagaProblem::of_database(&address, error.failure(), Duration::ZERO, SagaProblem::database_fails);
            self.problems.report(SOURCE, problem);
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Runs over one connection. Items of a batch that failed stay in `pending`.
    async fn session(&mut self, pending: &mut Vec<Item>) -> Result<(), StoreError> {
        // another process still holds the partitions, and watches
        while self.engine.held() == 0 {
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
        let mut store = Store::open(&self.login, "weft saga tracker").await?;
        let mut published: Option<Arc<[Choreography]>> = None;
        self.publish(&store, &mut published).await?;
        self.shared.counts.set(store.counts().await?);
        self.problems.resolve(SOURCE);
        let [mut due, mut stuck, mut purge] = [DUE_INTERVAL, STUCK_INTERVAL, PURGE_INTERVAL].map(|period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        loop {
            if !pending.is_empty() {
                self.record(&mut store, pending).await?;
            }
            tokio::select! {
                count = self.items.recv_many(pending, BATCH), if pending.is_empty() => if count == 0 { return Ok(()) },
                Some(skip) = self.skips.recv() => self.skip(&mut store, skip).await?,
                _ = due.tick() => {
                    self.publish(&store, &mut published).await?;
                    self.find_overdue(&mut store).await?;
                }
                _ = stuck.tick() => self.report_stuck(&store).await?,
                _ = purge.tick() => drop(store.purge().await?),
            }
        }
    }

    /// Stores the definitions of the contract in force, and which sagas are followed.
    async fn publish(&self, store: &Store, published: &mut Option<Arc<[Choreography]>>) -> Result<(), StoreError> {
        let wanted = self.shared.contract();
        if published.as_ref().is_some_and(|published| Arc::ptr_eq(published, &wanted)) {
            return Ok(());
        }
        let definitions: Vec<_> = wanted.iter().map(|saga| saga.definition.clone()).collect();
        store.publish(&definitions).await?;
        for definition in definitions {
            self.shared.graphs.insert_current(definition);
        }
        *published = Some(wanted);
        Ok(())
    }

    /// Commits a batch, then acknowledges it.
    async fn record(&self, store: &mut Store, pending: &mut Vec<Item>) -> Result<(), StoreError> {
        let mut by_instance: HashMap<Uuid, Vec<&Item>> = HashMap::new();
        for item in pending.iter() {
            by_instance.entry(item.id).or_default().push(item);
        }
        // before the first rotation of the engine there is none
        let Some(bucket) = self.engine.kept.bucket() else {
            tokio::time::sleep(RETRY_INTERVAL).await;
            return Ok(());
        };
        let now = Timestamp::now();
        let change = |row: &mut Row| {
            let mut changed = false;
            for item in by_instance.get(&row.id).into_iter().flatten() {
                changed |= row.instance.observe(item.event.clone());
            }
            changed
        };
        let fresh = |id: Uuid| {
            let first = by_instance.get(&id)?.first()?;
            Some(Row::new(bucket, id, &first.saga, &first.correlation, now))
        };
        let ids: Vec<_> = by_instance.keys().copied().collect();
        self.change(store, &ids, fresh, change).await?;
        for item in pending.drain(..) {
            // acknowledge last: what was seen is durable
            if let Err(error) = item.acker.ack().await {
                tracing::debug!(%error, "an event could not be acknowledged and is delivered again");
            }
            item.progress.recorded.fetch_max(item.published, Relaxed);
            item.progress.under_way.fetch_sub(1, Relaxed);
        }
        Ok(())
    }

    /// Changes the rows of `ids` in one transaction; `fresh` makes those that are not there, and `change` says whether a row
    /// has to be computed again.
    async fn change(
        &self,
        store: &mut Store,
        ids: &[Uuid],
        fresh: impl Fn(Uuid) -> Option<Row>,
        change: impl Fn(&mut Row) -> bool,
    ) -> Result<(), StoreError> {
        let batch = store.begin().await?;
        let mut rows: HashMap<Uuid, Row> = batch.rows(ids).await?.into_iter().map(|row| (row.id, row)).collect();
        let mut changes: BTreeMap<String, Counted> = BTreeMap::new();
        let mut written = Vec::with_capacity(ids.len());
        for id in ids {
            let Some(mut row) = rows.remove(id).or_else(|| fresh(*id)) else { continue };
            let Some(graph) = self.graph(&batch, &row).await? else { continue };
            let before = row.counted(&graph);
            if !change(&mut row) {
                continue;
            }
            row.refresh(&graph, self.shared.read_until(&row.saga));
            let counted = changes.entry(row.saga.clone()).or_default();
            counted.add(&before, -1);
            counted.add(&row.counted(&graph), 1);
            written.push(row);
        }
        if !written.is_empty() {
            batch.commit(&written, &changes).await?;
            self.shared.counts.add(&changes);
            for (saga, counted) in &changes {
                let started = counted.running + counted.completed + counted.compensated;
                self.engine.meters.watched(saga, started, counted.completed, counted.compensated);
            }
        }
        Ok(())
    }

    /// The definition that the row's instance started with.
    async fn graph(&self, batch: &Batch<'_>, row: &Row) -> Result<Option<Arc<Graph>>, StoreError> {
        let graphs = &self.shared.graphs;
        if graphs.of(&row.saga, &row.version).is_none()
            && let Some(stored) = batch.graph(&row.saga, &row.version).await?
        {
            graphs.insert(stored);
        }
        Ok(graphs.of(&row.saga, &row.version))
    }

    /// Marks the instances of which something became overdue.
    async fn find_overdue(&self, store: &mut Store) -> Result<(), StoreError> {
        let contract = self.shared.contract();
        let known = contract.iter().filter_map(|saga| {
            let saga = saga.definition.name.as_str();
            Some((saga, self.shared.read_until(saga)?))
        });
        let (sagas, until): (Vec<_>, Vec<_>) = known.unzip();
        if sagas.is_empty() {
            return Ok(());
        }
        let ids = store.due(&sagas, &until, MAX_DUE).await?;
        if ids.is_empty() {
            return Ok(());
        }
        self.change(store, &ids, |_| None, |_| true).await
    }

    async fn skip(&self, store: &mut Store, skip: Skip) -> Result<(), StoreError> {
        let Skip { saga, id, answer } = skip;
        let answered = match store.find(id).await?.filter(|row| row.saga == saga && !row.is_waiting()) {
            None => Err(SkipError::Unknown),
            Some(row) if row.state.is_some() => Err(SkipError::Ended),
            Some(_) => {
                let now = Timestamp::now().as_millisecond();
                let change = |row: &mut Row| {
                    row.instance.skipped_at = Some(now);
                    true
                };
                self.change(store, &[id], |_| None, change).await?;
                Ok(())
            }
        };
        // the caller may have disconnected
        let _ = answer.send(answered);
        Ok(())
    }

    /// Reads the oldest stuck instances, for the status.
    async fn report_stuck(&self, store: &Store) -> Result<(), StoreError> {
        for saga in self.shared.counts.stuck() {
            let mut instances = Vec::new();
            for row in store.stuck(&saga, MAX_REPORTED).await? {
                if let Some(graph) = self.shared.graphs.of(&row.saga, &row.version) {
                    instances.push(stuck_instance(&row, &graph));
                }
            }
            self.shared.counts.set_stuck(&saga, instances);
        }
        Ok(())
    }
}

fn stuck_instance(row: &Row, graph: &Graph) -> StuckInstance {
    let assessment = assess(graph, &row.instance);
    let first = assessment.owed.first().and_then(|owed| graph.definition.reactions.get(owed.reaction));
    StuckInstance {
        id: row.id.to_string(),
        step: first.map(|reaction| reaction.service.clone()).unwrap_or_default(),
        operation: REACT.to_owned(),
        message: row.owes(graph, &assessment).into_iter().next().unwrap_or_default(),
        since: row.stuck_since.unwrap_or_default(),
    }
}
