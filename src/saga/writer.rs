//! The writer: one task that holds the partitions and commits what the engine decides, group by group.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    compiled::Compiled,
    engine::Engine,
    key::PARTITIONS,
    lease::Moment,
    liveness::Liveness,
    log::{Entry, Unrecorded},
    problem::{Problems, SagaProblem},
    reader::{Listed, Log, ReadError, Reader},
    session::{Epochs, RENEW_INTERVAL, Session, SessionError},
    shard::Recovered,
    view::{self, ReplayError},
};
use crate::{
    contract::DatabaseLogin,
    outage::{Failure, with_causes},
    postgres::{login, silence},
};

const DATABASE: &str = "database";
const DATABASE_SILENCE: &str = "silence of the database";
/// Maximum number of unreadable instances that are named for each partition.
const MAX_REPORTED: usize = 5;
/// Time between two attempts to connect to the database, and between two attempts to acquire missing partitions.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);

#[derive(Debug, thiserror::Error)]
enum RecoveryError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("instance {id} runs version {version} of saga {saga}, which is not stored")]
    NoDefinition { id: Uuid, saga: String, version: String },
    #[error("instance {id}: {why}")]
    Replay { id: Uuid, why: ReplayError },
}

impl RecoveryError {
    /// True when retrying cannot help, because this instance's log is damaged; false when the database failed and may
    /// recover.
    fn is_permanent(&self) -> bool {
        match self {
            Self::Read(error) => error.is_permanent(),
            Self::NoDefinition { .. } | Self::Replay { .. } => true,
        }
    }
}

/// The live instances of a partition, and the errors of those that are unreadable and not run.
#[derive(Debug, Default)]
struct Recovery {
    instances: Vec<Recovered>,
    unreadable: Vec<RecoveryError>,
}

pub(super) struct Writer {
    pub engine: Arc<Engine>,
    pub reader: Arc<Reader>,
    pub problems: Arc<Problems>,
    pub liveness: Arc<Liveness>,
    pub login: DatabaseLogin,
    /// Unique to this run of the process: the memory of this process is valid as long as the partitions are held under
    /// this name.
    pub holder: String,
    /// Cancelled at shutdown, after the last calls: the queue is committed once more, then the partitions are released.
    pub close: CancellationToken,
}

impl Writer {
    /// Runs until closed. After `Fenced` or a lost connection it starts over with a new session.
    pub(super) async fn run(self) {
        let mut in_flight_commit: Option<Vec<Entry>> = None;
        let mut held = Epochs::new();
        while !self.close.is_cancelled() || in_flight_commit.is_some() || self.engine.queue.len() > 0 {
            match self.session(&mut in_flight_commit, &mut held).await {
                Ok(()) => break,
                Err(SessionError::Fenced) => {
                    tracing::warn!("another orchestrator has taken over partitions; starting over with a new session");
                    self.drop_partitions(&mut held, |_| true);
                    fail_entries(in_flight_commit.take().unwrap_or_default());
                }
                Err(error) => {
                    let (address, failure) = (self.address(), error.failure());
                    let problem =
                        SagaProblem::of_database(&address, failure, Duration::ZERO, SagaProblem::database_fails);
                    self.problems.report(DATABASE, problem);
                    if error.is_permanent() {
                        self.liveness.commit_refused(std::time::Instant::now());
                    }
                    if self.close.is_cancelled() {
                        break; // shutting down: the next process repeats what is not durable
                    }
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
        fail_entries(in_flight_commit.unwrap_or_default());
        fail_entries(self.engine.queue.take());
    }

    /// Runs one session. Entries whose commit was interrupted stay in `in_flight_commit`.
    async fn session(&self, in_flight_commit: &mut Option<Vec<Entry>>, held: &mut Epochs) -> Result<(), SessionError> {
        let mut session = Session::open(&self.login).await?;
        // in a later session entries may wait that belong to the oldest bucket: they are written first
        if self.engine.kept.bucket().is_none() {
            self.rotate(&session).await?;
        }
        let rotation = tokio::time::sleep(self.engine.kept.rotation());
        tokio::pin!(rotation);
        self.acquire(&mut session, held, in_flight_commit).await?;
        let (mut renew, mut retry) = (interval(RENEW_INTERVAL), interval(RETRY_INTERVAL));
        renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let missing_partitions = held.len() < usize::from(PARTITIONS.unsigned_abs());
            tokio::select! {
                biased;
                _ = renew.tick() => {
                    let sent = Moment::now();
                    self.report_silence(session.renew_lease(&self.holder)).await?;
                    self.engine.lease.renewed(sent);
                }
                () = &mut rotation => {
                    self.rotate(&session).await?;
                    rotation.as_mut().reset(Instant::now() + self.engine.kept.rotation());
                }
                () = self.engine.queue.filled() => self.commit(&session, in_flight_commit).await?,
                () = self.close.cancelled() => return Ok(()),
                _ = retry.tick(), if missing_partitions => self.acquire(&mut session, held, in_flight_commit).await?,
            }
        }
    }

    /// Purges what is older than the retention.
    async fn rotate(&self, session: &Session) -> Result<(), SessionError> {
        match session.rotate(self.engine.kept.retention()).await? {
            Some(bucket) => self.engine.kept.opened(bucket),
            None if self.engine.kept.bucket().is_none() => return Err(SessionError::NoBucket),
            None => {}
        }
        Ok(())
    }

    async fn commit(&self, session: &Session, in_flight_commit: &mut Option<Vec<Entry>>) -> Result<(), SessionError> {
        let entries = in_flight_commit.insert(self.engine.queue.take());
        let began = Instant::now();
        let existed = self.report_silence(session.commit(entries)).await?;
        // durable: from here on calls may be sent and callers may be notified
        self.engine.meters.committed(entries.len(), began.elapsed());
        self.liveness.commit_succeeded();
        self.problems.resolve(DATABASE);
        self.engine.recorded(in_flight_commit.take().unwrap_or_default(), &existed);
        Ok(())
    }

    /// Awaits the database's answer, and meanwhile reports a database that is silent: the deadline of a statement is much
    /// longer. With [`RENEW_INTERVAL`] that is within five seconds of an outage's start.
    async fn report_silence<T>(
        &self,
        answer: impl Future<Output = Result<T, SessionError>>,
    ) -> Result<T, SessionError> {
        let report = |silence| match silence {
            Some(silence) => {
                let (address, failure) = (self.address(), Failure::Silent);
                let problem = SagaProblem::of_database(&address, failure, silence, SagaProblem::database_fails);
                self.problems.report(DATABASE_SILENCE, problem);
            }
            None => self.problems.resolve(DATABASE_SILENCE),
        };
        let answer = silence::watched(&self.login, answer, report).await;
        self.problems.resolve(DATABASE_SILENCE);
        answer
    }

    /// `HOST:PORT` of the database.
    fn address(&self) -> String {
        login::address(&self.login)
    }

    /// Acquires the free partitions. Resolves the in-flight commit once its partitions are held again.
    async fn acquire(
        &self,
        session: &mut Session,
        held: &mut Epochs,
        in_flight_commit: &mut Option<Vec<Entry>>,
    ) -> Result<(), SessionError> {
        let wanted: Vec<i16> = (0..PARTITIONS).filter(|p| !session.epochs.contains_key(p)).collect();
        let acquired = session.acquire(&wanted, &self.holder).await?;
        // a partition that was not re-acquired under the same epoch was held by another process in between
        let lost = |p: i16, epoch: i64| session.epochs.get(&p) != Some(&epoch);
        self.drop_partitions(held, |(p, epoch)| lost(p, epoch));
        if let Some(entries) = in_flight_commit.take() {
            self.resolve_commit(session, held, entries, in_flight_commit).await?;
        }
        if !acquired.is_empty() {
            self.count().await;
        }
        for (partition, epoch) in acquired {
            if held.contains_key(&partition) {
                continue;
            }
            match self.recover(partition).await {
                Ok(Recovery { instances, unreadable }) => {
                    if !instances.is_empty() {
                        tracing::info!(partition, instances = instances.len(), "recovered");
                    }
                    held.insert(partition, epoch);
                    self.engine.adopt(partition, instances);
                    self.report_unreadable(partition, &unreadable);
                }
                Err(error) => {
                    let refused = |address, cause| SagaProblem::RecoveryFailed { partition, address, cause };
                    let problem = match &error {
                        RecoveryError::Read(error) => self.reader.problem(error, refused),
                        other => refused(self.address(), other.to_string()),
                    };
                    self.problems.report(&recovery(partition), problem);
                    // ends the session, which releases the partition, so that the recovery is tried again
                    return Err(SessionError::Timeout);
                }
            }
        }
        if held.is_empty() {
            self.problems.report(DATABASE, SagaProblem::Standby);
        } else {
            self.problems.resolve(DATABASE);
        }
        Ok(())
    }

    /// Finds out whether the commit whose answer was lost took place. If not, it is repeated, except for partitions
    /// that are lost.
    async fn resolve_commit(
        &self,
        session: &Session,
        held: &Epochs,
        entries: Vec<Entry>,
        in_flight_commit: &mut Option<Vec<Entry>>,
    ) -> Result<(), SessionError> {
        let (ours, others) = entries.into_iter().partition(|entry| held.contains_key(&entry.partition));
        fail_entries(others);
        let entries: &mut Vec<Entry> = in_flight_commit.insert(ours);
        let existed = match session.find(entries).await? {
            Some(existed) => existed,
            None => session.commit(entries).await?,
        };
        self.liveness.commit_succeeded();
        self.engine.recorded(in_flight_commit.take().unwrap_or_default(), &existed);
        Ok(())
    }

    fn drop_partitions(&self, held: &mut Epochs, lost: impl Fn((i16, i64)) -> bool) {
        held.retain(|partition, epoch| {
            let gone = lost((*partition, *epoch));
            if gone {
                self.engine.abandon(*partition);
                self.problems.resolve(&recovery(*partition));
                // these entries exist only in memory, and are out of date
                fail_entries(self.engine.queue.withdraw(|entry| entry.partition == *partition));
            }
            !gone
        });
    }

    /// Reads how many instances have ended. This is exact, because only this task commits, and it is not committing
    /// now.
    async fn count(&self) {
        match self.reader.counts().await {
            Ok(counts) => {
                for (saga, completed, compensated) in counts {
                    self.engine.catalogue.counts_of(&saga).set_ended(completed, compensated);
                }
            }
            Err(error) => {
                self.problems.report(DATABASE, self.reader.problem(&error, SagaProblem::database_fails));
            }
        }
    }

    /// Reads the live instances of a partition. An instance that cannot be recovered does not affect the others: it
    /// stays in the database as it is, for a version that can read it, or for a person.
    async fn recover(&self, partition: i16) -> Result<Recovery, RecoveryError> {
        let listed = self.reader.live(partition).await?;
        let mut recovery = Recovery::default();
        if listed.is_empty() {
            return Ok(recovery);
        }
        let mut logs = self.reader.live_events(partition).await?;
        for instance in listed {
            let log = logs.remove(&instance.id).unwrap_or_else(|| Ok(Vec::new()));
            match self.recover_one(&instance, log).await {
                Ok(recovered) => recovery.instances.push(recovered),
                Err(error) if error.is_permanent() => recovery.unreadable.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok(recovery)
    }

    async fn recover_one(&self, instance: &Listed, log: Log) -> Result<Recovered, RecoveryError> {
        let (id, bucket, started_at) = (instance.id, instance.bucket, instance.started_at);
        let events = log?;
        let compiled = self.compiled(instance).await?;
        let replayed = view::replay(&compiled.tree, &events, |_, _| {});
        let state = replayed.map_err(|why| RecoveryError::Replay { id, why })?;
        let next_seq = events.last().map_or(0, |logged| logged.seq + 1);
        Ok(Recovered { id, compiled, state, bucket, next_seq, started_at, key: instance.key.clone() })
    }

    /// Reports which instances of a partition are unreadable; the problem lasts until the partition is recovered again.
    fn report_unreadable(&self, partition: i16, unreadable: &[RecoveryError]) {
        if unreadable.is_empty() {
            return self.problems.resolve(&recovery(partition));
        }
        for error in unreadable {
            // the causes are only logged, since they may quote an instance's data
            tracing::error!(partition, error = with_causes(error), "an instance cannot be read and is not run");
        }
        let errors: Vec<_> = unreadable.iter().take(MAX_REPORTED).map(ToString::to_string).collect();
        let more = unreadable.len() - errors.len();
        self.problems.report(&recovery(partition), SagaProblem::InstanceUnreadable { errors, more });
    }

    /// The definition that an instance started with, from memory or from the database.
    async fn compiled(&self, instance: &Listed) -> Result<Arc<Compiled>, RecoveryError> {
        let Listed { id, saga, version, .. } = instance;
        if let Some(compiled) = self.engine.catalogue.known(saga, version) {
            return Ok(compiled);
        }
        let stored = self.reader.definition(saga, version).await?;
        let missing = || RecoveryError::NoDefinition { id: *id, saga: saga.clone(), version: version.clone() };
        Ok(self.engine.catalogue.insert(stored.ok_or_else(missing)?))
    }
}

fn recovery(partition: i16) -> String {
    format!("recovery of partition {partition}")
}

fn fail_entries(entries: Vec<Entry>) {
    for entry in entries {
        if let Some(acknowledge) = entry.acknowledge {
            let _ = acknowledge.send(Err(Unrecorded::TakenOver));
        }
    }
}
