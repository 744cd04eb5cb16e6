//! The writer's connection: acquires partitions, commits groups, resolves a commit whose outcome is unknown.
//!
//! The fence is the session-level advisory lock of this connection. Only its holder writes a partition, and the server
//! releases it when, and not before, the session's last transaction is over. So a successor that acquires the lock sees
//! everything that its predecessor wrote, and the predecessor cannot write any more. The session of a holder that is
//! alive but unresponsive (stopped, cut off) is terminated once its lease ([`LEASE`]) has expired.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Statement, error::SqlState};
use uuid::Uuid;

use super::{
    key::is_keyed,
    log::{Entry, Start},
};
use crate::{
    contract::DatabaseLogin,
    domain::saga::state::Status,
    outage::Failure,
    postgres::{
        self,
        login::{self, LoginError},
    },
};

/// A partition is taken over when its holder has not renewed the lease for this long, by the database's clock.
pub(super) const LEASE: Duration = Duration::from_secs(8);
/// How often a holder renews its lease.
pub(super) const RENEW_INTERVAL: Duration = Duration::from_secs(2);
/// Deadline of every statement of the writer; after it the connection is dropped.
const DEADLINE: Duration = Duration::from_secs(30);

/// How often to check whether terminated sessions have ended, before trying again later.
const MAX_EVICTION_CHECKS: usize = 20;

/// First key of the advisory locks, by which Weft's own are recognized.
const LOCK_CLASS: i32 = 5701;

const COMMIT: &str = include_str!("sql/commit.sql");

/// Plans are made once and must not depend on table statistics; an asynchronous commit would break the promise that a
/// call is sent only after its row is durable.
const SETTINGS: &str = "set plan_cache_mode = force_generic_plan; set enable_seqscan = off; set enable_hashjoin = off; \
     set enable_mergejoin = off; set synchronous_commit = on; set jit = off";

const LOCK: &str = "select partition from weft.saga_partition where partition = any($1) and pg_try_advisory_lock($2, partition::integer)";

/// Terminates sessions that hold a partition with an expired lease, and earlier sessions of this process.
const TERMINATE_EXPIRED: &str = "select pg_terminate_backend(l.pid) from pg_locks l
     join weft.saga_partition p on p.partition::integer = l.objid::integer
     where l.locktype = 'advisory' and l.classid::integer = $1 and l.granted and l.pid <> pg_backend_pid()
       and l.database = (select oid from pg_database where datname = current_database())
       and (p.holder = $3 or p.beat_at < clock_timestamp() - make_interval(secs => $2))";

/// A process that was also the last holder keeps the epoch, so that what it has in memory stays valid.
const ACQUIRE: &str = "update weft.saga_partition
     set epoch = case when holder = $2 then epoch else epoch + 1 end, holder = $2, beat_at = clock_timestamp()
     where partition = any($1) returning partition, epoch";

const RENEW: &str = "update weft.saga_partition set beat_at = clock_timestamp() where holder = $1";

const ROTATE: &str = "select weft.saga_rotate(make_interval(secs => $1))";

const FIND: &str = "select e.id from weft.saga_event e
     join unnest($1::uuid[], $2::integer[], $3::timestamptz[]) as n (id, seq, at) on e.id = n.id and e.seq = n.seq and e.at = n.at";

#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Login(#[from] LoginError),
    #[error("writing the saga log")]
    Database(#[from] tokio_postgres::Error),
    #[error("the database did not answer within {} s", DEADLINE.as_secs())]
    Timeout,
    #[error("another orchestrator has taken over a partition of this one")]
    Fenced,
    #[error("the tables of the saga log are in use by a long query or transaction, so no instance can be started yet")]
    NoBucket,
}

impl SessionError {
    /// How the database failed.
    pub(super) fn failure(&self) -> Failure {
        match self {
            Self::Login(error) => error.failure(),
            Self::Database(error) => postgres::failure(error),
            Self::Timeout => Failure::Silent,
            Self::Fenced | Self::NoBucket => Failure::Refused(self.to_string()),
        }
    }

    /// True when retrying cannot help, because the database refuses the rows themselves: an integrity violation, or a
    /// data exception.
    pub(super) fn is_permanent(&self) -> bool {
        let Self::Database(error) = self else { return false };
        let class = error.code().and_then(|code| code.code().get(..2));
        class.is_some_and(|class| ["22", "23"].contains(&class))
    }
}

/// The partitions that this process holds, each with its epoch.
pub(super) type Epochs = BTreeMap<i16, i64>;

#[derive(Debug)]
pub(super) struct Session {
    client: Client,
    commit: Statement,
    connection: JoinHandle<()>,
    pub(super) epochs: Epochs,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Session {
    pub(super) async fn open(login: &DatabaseLogin) -> Result<Self, SessionError> {
        let (client, connection) = login::connect(login, "weft saga writer").await?;
        let connection = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the writer's connection ended");
            }
        });
        within(client.batch_execute(SETTINGS)).await?;
        let commit = within(client.prepare(COMMIT)).await?;
        Ok(Self { client, commit, connection, epochs: Epochs::new() })
    }

    /// Acquires those of `wanted` that nobody else holds; returns their epochs.
    pub(super) async fn acquire(&mut self, wanted: &[i16], holder: &str) -> Result<Epochs, SessionError> {
        let mut locked: Vec<i16> = self.query(LOCK, &[&wanted, &LOCK_CLASS]).await?;
        for _ in 0..MAX_EVICTION_CHECKS {
            let missing: Vec<i16> = wanted.iter().copied().filter(|partition| !locked.contains(partition)).collect();
            let lease = LEASE.as_secs_f64();
            if missing.is_empty()
                || within(self.client.query(TERMINATE_EXPIRED, &[&LOCK_CLASS, &lease, &holder])).await?.is_empty()
            {
                break;
            }
            // the server releases the locks of a terminated session when its transaction is rolled back
            tokio::time::sleep(Duration::from_millis(50)).await;
            locked.extend(self.query(LOCK, &[&missing, &LOCK_CLASS]).await?);
        }
        if locked.is_empty() {
            return Ok(Epochs::new());
        }
        let rows = within(self.client.query(ACQUIRE, &[&locked, &holder])).await?;
        let acquired: Epochs = rows
            .iter()
            .map(|row| Ok((row.try_get(0)?, row.try_get(1)?)))
            .collect::<Result<_, tokio_postgres::Error>>()?;
        self.epochs.extend(&acquired);
        Ok(acquired)
    }

    async fn query(
        &self,
        sql: &str,
        parameters: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    ) -> Result<Vec<i16>, SessionError> {
        let rows = within(self.client.query(sql, parameters)).await?;
        Ok(rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?)
    }

    /// Drops what is older than `keep`; returns the bucket for new instances. `None` when there is none yet, or another process
    /// rotates at the moment: nothing is lost by trying again later.
    pub(super) async fn rotate(&self, keep: Duration) -> Result<Option<i32>, SessionError> {
        let rotated = within(self.client.query_one(ROTATE, &[&keep.as_secs_f64()])).await;
        match rotated {
            Ok(row) => Ok(row.try_get(0)?),
            Err(SessionError::Database(error)) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn renew_lease(&self, holder: &str) -> Result<(), SessionError> {
        within(self.client.execute(RENEW, &[&holder])).await?;
        Ok(())
    }

    /// Commits `entries`, all or none; returns the ids of starts whose instance exists already.
    pub(super) async fn commit(&self, entries: &[Entry]) -> Result<Vec<Uuid>, SessionError> {
        let columns = Columns::of(entries);
        if columns.ids.is_empty() {
            return Ok(Vec::new());
        }
        let (partitions, epochs): (Vec<i16>, Vec<i64>) = self.epochs.iter().map(|(p, e)| (*p, *e)).unzip();
        let counts = columns.counts();
        let row = within(self.client.query_one(
            &self.commit,
            &[
                &partitions,
                &epochs,
                &columns.start_ids,
                &columns.start_partitions,
                &columns.start_sagas,
                &columns.start_versions,
                &columns.start_times,
                &columns.end_ids,
                &columns.end_states,
                &columns.end_times,
                &counts.0,
                &counts.1,
                &counts.2,
                &columns.ids,
                &columns.seqs,
                &columns.times,
                &columns.bodies,
                &columns.start_buckets,
                &columns.start_keyed,
                &columns.end_buckets,
                &columns.buckets,
                &columns.start_keys,
            ],
        ))
        .await?;
        // the rows are durable here, unless the fence rejected them
        if row.try_get::<_, bool>(0)? { Ok(row.try_get(1)?) } else { Err(SessionError::Fenced) }
    }

    /// Whether a commit of `entries`, whose answer was lost, took place; if so, returns what [`Self::commit`] would
    /// have returned. Call it only after the partitions are held again: before that the commit could still be running.
    pub(super) async fn find(&self, entries: &[Entry]) -> Result<Option<Vec<Uuid>>, SessionError> {
        let columns = Columns::of(entries);
        let rows = within(self.client.query(FIND, &[&columns.ids, &columns.seqs, &columns.times])).await?;
        if rows.is_empty() {
            return Ok(None);
        }
        let found = rows.iter().map(|row| row.try_get(0)).collect::<Result<std::collections::HashSet<Uuid>, _>>()?;
        Ok(Some(columns.start_ids.into_iter().filter(|id| !found.contains(id)).collect()))
    }
}

async fn within<T>(answer: impl Future<Output = Result<T, tokio_postgres::Error>>) -> Result<T, SessionError> {
    match tokio::time::timeout(DEADLINE, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_elapsed) => Err(SessionError::Timeout),
    }
}

/// The rows of one commit as the arrays that `commit.sql` unnests.
#[derive(Default)]
struct Columns<'a> {
    start_ids: Vec<Uuid>,
    start_partitions: Vec<i16>,
    start_sagas: Vec<&'a str>,
    start_versions: Vec<&'a str>,
    start_times: Vec<Timestamp>,
    start_buckets: Vec<i32>,
    /// Whether the id is derived from a key, so that the instance may exist already.
    start_keyed: Vec<bool>,
    /// Business keys.
    start_keys: Vec<Option<&'a str>>,
    end_ids: Vec<Uuid>,
    end_sagas: Vec<&'a str>,
    end_states: Vec<&'static str>,
    end_times: Vec<Timestamp>,
    end_buckets: Vec<i32>,
    ids: Vec<Uuid>,
    seqs: Vec<i32>,
    times: Vec<Timestamp>,
    bodies: Vec<&'a str>,
    buckets: Vec<i32>,
}

impl<'a> Columns<'a> {
    fn of(entries: &'a [Entry]) -> Self {
        let mut columns = Self::default();
        for entry in entries {
            let Some(row) = &entry.row else { continue };
            columns.ids.push(entry.id);
            columns.seqs.push(row.seq);
            columns.times.push(row.at);
            columns.bodies.push(&row.body);
            columns.buckets.push(row.bucket);
            if let Some(Start { saga, version, key }) = &row.start {
                columns.start_ids.push(entry.id);
                columns.start_partitions.push(entry.partition);
                columns.start_sagas.push(saga);
                columns.start_versions.push(version);
                columns.start_times.push(row.at);
                columns.start_buckets.push(row.bucket);
                columns.start_keyed.push(is_keyed(entry.id));
                columns.start_keys.push(key.as_deref());
            }
            if let Some((saga, status)) = &row.end {
                columns.end_ids.push(entry.id);
                columns.end_sagas.push(saga);
                columns.end_states.push(status.as_str());
                columns.end_times.push(row.at);
                columns.end_buckets.push(row.bucket);
            }
        }
        columns
    }

    /// Ended instances by saga: completed, compensated.
    fn counts(&self) -> (Vec<&'a str>, Vec<i64>, Vec<i64>) {
        let mut by_saga: BTreeMap<&str, (i64, i64)> = BTreeMap::new();
        for (saga, state) in self.end_sagas.iter().zip(&self.end_states) {
            let (completed, compensated) = by_saga.entry(saga).or_default();
            *if *state == Status::Completed.as_str() { completed } else { compensated } += 1;
        }
        let mut counts = (Vec::new(), Vec::new(), Vec::new());
        for (saga, (completed, compensated)) in by_saga {
            counts.0.push(saga);
            counts.1.push(completed);
            counts.2.push(compensated);
        }
        counts
    }
}
