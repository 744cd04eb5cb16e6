//! The tracker's tables in the orchestrator's database.
//!
//! A batch reads its rows, changes them and writes them in one transaction under one lock, so that two processes, which there
//! are for a moment while one replaces the other, do not overwrite each other's events. No fence is needed beside it: adding an
//! event that is known already changes nothing.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, GenericClient, Statement, Transaction};
use uuid::Uuid;

use super::row::{Counted, FindingKey, Row, WAITING};
use crate::{
    contract::DatabaseLogin,
    domain::{
        choreography::{
            assessment::{Finding, Graph},
            definition::{Definition, Kind},
        },
        saga::state::Status,
    },
    outage::Failure,
    postgres::{
        self,
        login::{self, LoginError},
    },
    saga::filter::Cursor,
};

/// Deadline of a batch of statements; after it the connection is dropped.
const DEADLINE: Duration = Duration::from_secs(15);
/// A row whose start has not been seen is kept for this time.
const WAITING_LIMIT: &str = "1 hour";

/// Plans are made once and must not depend on table statistics.
const SETTINGS: &str = "set plan_cache_mode = force_generic_plan; set enable_seqscan = off; set enable_hashjoin = off; \
     set enable_mergejoin = off; set jit = off; set statement_timeout = '15s'";
/// One batch at a time.
const LOCK: &str = "select pg_advisory_xact_lock(5701, -2)";
const COLUMNS: &str = "bucket, id, saga, version, correlation, started_at, ended_at, state, compensating, stuck_since, \
     due_at, events";
const WRITE: &str = include_str!("../sql/track.sql");

#[derive(Debug, thiserror::Error)]
pub(in crate::saga) enum StoreError {
    #[error(transparent)]
    Login(#[from] LoginError),
    #[error("writing what was seen of choreographed sagas")]
    Database(#[from] tokio_postgres::Error),
    #[error("the database did not answer within {} s", DEADLINE.as_secs())]
    Timeout,
    #[error("what is stored of instance {id} cannot be read")]
    Instance {
        id: Uuid,
        #[source]
        source: serde_json::Error,
    },
    #[error("definition {version} of saga {saga} cannot be read")]
    Definition {
        saga: String,
        version: String,
        #[source]
        source: serde_json::Error,
    },
}

impl StoreError {
    pub(super) fn failure(&self) -> Failure {
        match self {
            Self::Login(error) => error.failure(),
            Self::Database(error) => postgres::failure(error),
            Self::Timeout => Failure::Silent,
            Self::Instance { .. } | Self::Definition { .. } => Failure::Refused(self.to_string()),
        }
    }
}

/// One connection, until it fails.
#[derive(Debug)]
pub(super) struct Store {
    client: Client,
    find: Statement,
    write: Statement,
    connection: JoinHandle<()>,
}

impl Drop for Store {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Which instances are listed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filter<'a> {
    pub saga: &'a str,
    pub status: Option<Status>,
    pub after: Option<Cursor>,
    pub limit: usize,
}

impl Store {
    pub(super) async fn open(login: &DatabaseLogin, application: &str) -> Result<Self, StoreError> {
        let (client, connection) = login::connect(login, application).await?;
        let connection = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the tracker's connection ended");
            }
        });
        within(client.batch_execute(SETTINGS)).await?;
        let find =
            within(client.prepare(&format!("select {COLUMNS} from weft.choreography where id = any($1)"))).await?;
        let write = within(client.prepare(WRITE)).await?;
        Ok(Self { client, find, write, connection })
    }

    pub(super) fn is_closed(&self) -> bool {
        self.client.is_closed()
    }

    /// Begins a batch; without [`Batch::commit`] it is rolled back.
    pub(super) async fn begin(&mut self) -> Result<Batch<'_>, StoreError> {
        let Self { client, find, write, .. } = self;
        let transaction = within(client.transaction()).await?;
        within(transaction.batch_execute(LOCK)).await?;
        Ok(Batch { transaction, find, write })
    }

    /// Makes exactly `sagas` the ones that are followed, and stores their definitions.
    pub(super) async fn publish(&self, definitions: &[Definition]) -> Result<(), StoreError> {
        const DEFINE: &str = "insert into weft.choreography_definition (saga, version, body) values ($1, $2, $3)
             on conflict do nothing";
        const TRACK: &str = "with gone as (delete from weft.choreography_tracked where saga <> all($1))
             insert into weft.choreography_tracked (saga) select unnest($1::text[]) on conflict do nothing";
        for definition in definitions {
            let Definition { name, version, .. } = definition;
            let unreadable = |source| StoreError::Definition { saga: name.clone(), version: version.clone(), source };
            let body = serde_json::to_string(definition).map_err(unreadable)?;
            within(self.client.execute(DEFINE, &[name, version, &body])).await?;
        }
        let sagas: Vec<_> = definitions.iter().map(|definition| definition.name.as_str()).collect();
        within(self.client.execute(TRACK, &[&sagas])).await?;
        Ok(())
    }

    /// A definition that an instance started with.
    pub(super) async fn graph(&self, saga: &str, version: &str) -> Result<Option<Arc<Graph>>, StoreError> {
        graph(&self.client, saga, version).await
    }

    /// What is stored, by saga.
    pub(super) async fn counts(&self) -> Result<BTreeMap<String, Counted>, StoreError> {
        const LIVE: &str = "select saga, count(*), count(*) filter (where compensating),
             count(*) filter (where stuck_since is not null) from weft.choreography where state is null group by saga";
        const ENDED: &str = "select saga, completed, compensated from weft.choreography_count";
        const FINDINGS: &str = "select saga, finding, service, event, cause_service, cause_event, count
             from weft.choreography_finding where count > 0";
        let mut counts: BTreeMap<String, Counted> = BTreeMap::new();
        for row in within(self.client.query(LIVE, &[])).await? {
            let counted = counts.entry(row.try_get(0)?).or_default();
            (counted.running, counted.compensating, counted.stuck) =
                (row.try_get(1)?, row.try_get(2)?, row.try_get(3)?);
        }
        for row in within(self.client.query(ENDED, &[])).await? {
            let counted = counts.entry(row.try_get(0)?).or_default();
            (counted.completed, counted.compensated) = (row.try_get(1)?, row.try_get(2)?);
        }
        for row in within(self.client.query(FINDINGS, &[])).await? {
            let name: &str = row.try_get(1)?;
            // one of a newer version is none of this one's
            let Some(finding) = Finding::ALL.into_iter().find(|finding| finding.as_str() == name) else { continue };
            let event = Kind { service: row.try_get(2)?, event: row.try_get(3)? };
            let cause = Kind { service: row.try_get(4)?, event: row.try_get(5)? };
            let cause = Some(cause).filter(|cause| !cause.service.is_empty());
            let counted = counts.entry(row.try_get(0)?).or_default();
            counted.findings.insert((finding, event, cause), row.try_get(6)?);
        }
        Ok(counts)
    }

    /// Running instances of `sagas` of which something is due before the saga's time in `until`.
    pub(super) async fn due(&self, sagas: &[&str], until: &[Timestamp], limit: i64) -> Result<Vec<Uuid>, StoreError> {
        const SQL: &str = "select c.id from weft.choreography as c
             join unnest($1::text[], $2::timestamptz[]) as n (saga, until) on n.saga = c.saga
             where c.state is null and c.due_at < (select max(u) from unnest($2::timestamptz[]) as u) and c.due_at < n.until
             limit $3";
        let rows = within(self.client.query(SQL, &[&sagas, &until, &limit])).await?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
    }

    /// Of each saga the oldest stuck instances, at most `limit`.
    pub(super) async fn stuck(&self, saga: &str, limit: i64) -> Result<Vec<Row>, StoreError> {
        let sql = format!(
            "select {COLUMNS} from weft.choreography
             where saga = $1 and state is null and stuck_since is not null order by stuck_since, id limit $2"
        );
        within(self.client.query(&sql, &[&saga, &limit])).await?.iter().map(row).collect()
    }

    /// The latest instances first.
    pub(super) async fn list(&self, filter: Filter<'_>) -> Result<Vec<Row>, StoreError> {
        let Filter { saga, status, after, limit } = filter;
        let condition = match status {
            None => "state is distinct from 'Waiting'",
            Some(Status::Completed) => "state = 'Completed'",
            Some(Status::Compensated) => "state = 'Compensated'",
            Some(Status::Stuck) => "state is null and stuck_since is not null",
            Some(Status::Compensating) => "state is null and stuck_since is null and compensating",
            Some(Status::Running) => "state is null and stuck_since is null and not compensating",
        };
        let sql = format!(
            "select {COLUMNS} from weft.choreography where saga = $1 and {condition}
               and started_at <= coalesce($3::timestamptz, 'infinity') and (started_at is distinct from $3 or id > $4::uuid)
             order by started_at desc, id limit $2"
        );
        let (at, id) = (after.map(|after| after.started_at), after.map(|after| after.id));
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        within(self.client.query(&sql, &[&saga, &limit, &at, &id])).await?.iter().map(row).collect()
    }

    pub(super) async fn find(&self, id: Uuid) -> Result<Option<Row>, StoreError> {
        within(self.client.query(&self.find, &[&[id].as_slice()])).await?.first().map(row).transpose()
    }

    /// Deletes what has waited too long for its start.
    pub(super) async fn purge(&self) -> Result<u64, StoreError> {
        let sql = format!(
            "delete from weft.choreography where state = '{WAITING}' and started_at < clock_timestamp() - interval '{WAITING_LIMIT}'"
        );
        within(self.client.execute(&sql, &[])).await
    }
}

/// One transaction.
pub(super) struct Batch<'a> {
    transaction: Transaction<'a>,
    find: &'a Statement,
    write: &'a Statement,
}

impl Batch<'_> {
    pub(super) async fn rows(&self, ids: &[Uuid]) -> Result<Vec<Row>, StoreError> {
        within(self.transaction.query(self.find, &[&ids])).await?.iter().map(row).collect()
    }

    pub(super) async fn graph(&self, saga: &str, version: &str) -> Result<Option<Arc<Graph>>, StoreError> {
        graph(&self.transaction, saga, version).await
    }

    /// Writes `rows`, and what the change means for the counts of each saga.
    pub(super) async fn commit(self, rows: &[Row], changes: &BTreeMap<String, Counted>) -> Result<(), StoreError> {
        let columns = Columns::of(rows)?;
        let counts = Counts::of(changes);
        within(self.transaction.execute(
            self.write,
            &[
                &columns.buckets,
                &columns.ids,
                &columns.sagas,
                &columns.versions,
                &columns.correlations,
                &columns.started,
                &columns.ended,
                &columns.states,
                &columns.compensating,
                &columns.stuck,
                &columns.due,
                &columns.events,
                &counts.sagas,
                &counts.completed,
                &counts.compensated,
                &counts.finding_sagas,
                &counts.findings,
                &counts.services,
                &counts.events,
                &counts.cause_services,
                &counts.cause_events,
                &counts.occurrences,
            ],
        ))
        .await?;
        within(self.transaction.commit()).await
    }
}

async fn within<T>(answer: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, StoreError> {
    match tokio::time::timeout(DEADLINE, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_elapsed) => Err(StoreError::Timeout),
    }
}

async fn graph(client: &impl GenericClient, saga: &str, version: &str) -> Result<Option<Arc<Graph>>, StoreError> {
    const SQL: &str = "select body from weft.choreography_definition where saga = $1 and version = $2";
    let row = within(client.query_opt(SQL, &[&saga, &version])).await?;
    let Some(row) = row else { return Ok(None) };
    let unreadable = |source| StoreError::Definition { saga: saga.to_owned(), version: version.to_owned(), source };
    let definition: Definition = serde_json::from_str(row.try_get(0)?).map_err(unreadable)?;
    Ok(Some(Arc::new(Graph::new(definition))))
}

fn row(row: &tokio_postgres::Row) -> Result<Row, StoreError> {
    let id = row.try_get(1)?;
    Ok(Row {
        bucket: row.try_get(0)?,
        id,
        saga: row.try_get(2)?,
        version: row.try_get(3)?,
        correlation: row.try_get(4)?,
        started_at: row.try_get(5)?,
        ended_at: row.try_get(6)?,
        state: row.try_get(7)?,
        compensating: row.try_get(8)?,
        stuck_since: row.try_get(9)?,
        due_at: row.try_get(10)?,
        instance: serde_json::from_str(row.try_get(11)?).map_err(|source| StoreError::Instance { id, source })?,
    })
}

/// Rows as the arrays that `track.sql` unnests.
#[derive(Default)]
struct Columns<'a> {
    buckets: Vec<i32>,
    ids: Vec<Uuid>,
    sagas: Vec<&'a str>,
    versions: Vec<&'a str>,
    correlations: Vec<&'a str>,
    started: Vec<Timestamp>,
    ended: Vec<Option<Timestamp>>,
    states: Vec<Option<&'a str>>,
    compensating: Vec<bool>,
    stuck: Vec<Option<Timestamp>>,
    due: Vec<Option<Timestamp>>,
    events: Vec<String>,
}

impl<'a> Columns<'a> {
    fn of(rows: &'a [Row]) -> Result<Self, StoreError> {
        let mut columns = Self::default();
        for row in rows {
            let unwritable = |source| StoreError::Instance { id: row.id, source };
            columns.buckets.push(row.bucket);
            columns.ids.push(row.id);
            columns.sagas.push(&row.saga);
            columns.versions.push(&row.version);
            columns.correlations.push(&row.correlation);
            columns.started.push(row.started_at);
            columns.ended.push(row.ended_at);
            columns.states.push(row.state.as_deref());
            columns.compensating.push(row.compensating);
            columns.stuck.push(row.stuck_since);
            columns.due.push(row.due_at);
            columns.events.push(serde_json::to_string(&row.instance).map_err(unwritable)?);
        }
        Ok(columns)
    }
}

#[derive(Default)]
struct Counts<'a> {
    sagas: Vec<&'a str>,
    completed: Vec<i64>,
    compensated: Vec<i64>,
    finding_sagas: Vec<&'a str>,
    findings: Vec<&'static str>,
    services: Vec<&'a str>,
    events: Vec<&'a str>,
    cause_services: Vec<&'a str>,
    cause_events: Vec<&'a str>,
    occurrences: Vec<i64>,
}

impl<'a> Counts<'a> {
    fn of(changes: &'a BTreeMap<String, Counted>) -> Self {
        let mut counts = Self::default();
        for (saga, changed) in changes {
            if (changed.completed, changed.compensated) != (0, 0) {
                counts.sagas.push(saga);
                counts.completed.push(changed.completed);
                counts.compensated.push(changed.compensated);
            }
            for (key, count) in &changed.findings {
                counts.finding(saga, key, *count);
            }
        }
        counts
    }

    fn finding(&mut self, saga: &'a str, (finding, event, cause): &'a FindingKey, count: i64) {
        let of_cause = |part: fn(&Kind) -> &str| cause.as_ref().map_or("", part);
        self.finding_sagas.push(saga);
        self.findings.push(finding.as_str());
        self.services.push(&event.service);
        self.events.push(&event.event);
        self.cause_services.push(of_cause(|kind| &kind.service));
        self.cause_events.push(of_cause(|kind| &kind.event));
        self.occurrences.push(count);
    }
}
