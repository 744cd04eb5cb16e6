//! The writer: one task that holds the partitions and makes what the engine decides durable, group by group.

use std::{sync::Arc, time::Duration};

use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    catalogue::Compiled,
    engine::{Engine, PARTITIONS, Recovered},
    log::{Entry, Unrecorded},
    problems::{Problems, in_words},
    pulse::Pulse,
    reader::{Listed, Log, ReadError, Reader},
    session::{BEAT, Epochs, Session, SessionError},
    view,
};
use crate::contract::DatabaseLogin;

const DATABASE: &str = "database";
/// So many of the instances that cannot be recovered are named for each partition.
const TOLD: usize = 5;
/// Between two attempts to reach the database, and between two looks for partitions that became free.
const PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug, thiserror::Error)]
enum RecoveryError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("instance {id} runs version {version} of saga {saga}, which is not stored")]
    NoDefinition { id: Uuid, saga: String, version: String },
    #[error("rows of the log of instance {0} are missing")]
    Gap(Uuid),
    #[error("the log of instance {0} does not begin with its start")]
    Headless(Uuid),
}

impl RecoveryError {
    /// Of this one instance, and so the next time too; else of the database, at this moment.
    fn is_of_the_instance(&self) -> bool {
        match self {
            Self::Read(error) => error.is_of_the_content(),
            Self::NoDefinition { .. } | Self::Gap(_) | Self::Headless(_) => true,
        }
    }
}

/// The live instances of a partition, and why others of them are left alone.
#[derive(Debug, Default)]
struct Recovery {
    instances: Vec<Recovered>,
    left: Vec<RecoveryError>,
}

pub(super) struct Writer {
    pub engine: Arc<Engine>,
    pub reader: Arc<Reader>,
    pub problems: Arc<Problems>,
    pub pulse: Arc<Pulse>,
    pub login: DatabaseLogin,
    /// Unique to this run of the process: whoever holds the partitions under it has what is in memory.
    pub holder: String,
    /// Cancelled when everything is flushed that will be: the queue is emptied once more, then the partitions are freed.
    pub close: CancellationToken,
}

impl Writer {
    /// Runs until closed. `Fenced` and lost connections are survived, by starting over.
    pub(super) async fn run(self) {
        let mut doubt: Option<Vec<Entry>> = None;
        let mut held = Epochs::new();
        while !self.close.is_cancelled() || doubt.is_some() || self.engine.queue.len() > 0 {
            match self.session(&mut doubt, &mut held).await {
                Ok(()) => break,
                Err(SessionError::Fenced) => {
                    tracing::warn!("another orchestrator has taken over; starting over");
                    self.lose(&mut held, |_| true);
                    refuse(doubt.take().unwrap_or_default());
                }
                Err(error) => {
                    let reason =
                        if matches!(error, SessionError::Login(_)) { "DatabaseUnreachable" } else { "DatabaseFails" };
                    self.problems.say(DATABASE, reason, in_words(&error));
                    if error.is_for_ever() {
                        self.pulse.refused(std::time::Instant::now());
                    }
                    if self.close.is_cancelled() {
                        break; // asked to end: what is not durable is repeated by the next process
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
        refuse(doubt.unwrap_or_default());
        refuse(self.engine.queue.take());
    }

    /// One connection's life. What was being committed when it broke stays in `doubt`.
    async fn session(&self, doubt: &mut Option<Vec<Entry>>, held: &mut Epochs) -> Result<(), SessionError> {
        let mut session = Session::open(&self.login).await?;
        self.acquire(&mut session, held, doubt).await?;
        let (mut beat, mut look) = (interval(BEAT), interval(PAUSE));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let wanting = held.len() < usize::from(PARTITIONS.unsigned_abs());
            tokio::select! {
                biased;
                _ = beat.tick() => session.show(&self.holder).await?,
                () = self.engine.queue.filled() => self.commit(&session, doubt).await?,
                () = self.close.cancelled() => return Ok(()),
                _ = look.tick(), if wanting => self.acquire(&mut session, held, doubt).await?,
            }
        }
    }

    async fn commit(&self, session: &Session, doubt: &mut Option<Vec<Entry>>) -> Result<(), SessionError> {
        let entries = doubt.insert(self.engine.queue.take());
        let began = Instant::now();
        let existed = session.commit(entries).await?;
        // durable: from here on calls may go out and callers may be told
        self.engine.meters.committed(entries.len(), began.elapsed());
        self.pulse.committed();
        self.problems.mended(DATABASE);
        self.engine.recorded(doubt.take().unwrap_or_default(), &existed);
        Ok(())
    }

    /// Takes what partitions are free; settles what is in doubt once those of before are held again.
    async fn acquire(
        &self,
        session: &mut Session,
        held: &mut Epochs,
        doubt: &mut Option<Vec<Entry>>,
    ) -> Result<(), SessionError> {
        let wanted: Vec<i16> = (0..PARTITIONS).filter(|p| !session.epochs.contains_key(p)).collect();
        let taken = session.take(&wanted, &self.holder).await?;
        // a partition that was ours and is not again, under the same epoch, was another's in between
        let lost = |p: i16, epoch: i64| session.epochs.get(&p) != Some(&epoch);
        self.lose(held, |(p, epoch)| lost(p, epoch));
        if let Some(entries) = doubt.take() {
            self.settle(session, held, entries, doubt).await?;
        }
        if !taken.is_empty() {
            self.count().await;
        }
        for (partition, epoch) in taken {
            if held.contains_key(&partition) {
                continue;
            }
            match self.recover(partition).await {
                Ok(Recovery { instances, left }) => {
                    if !instances.is_empty() {
                        tracing::info!(partition, instances = instances.len(), "recovered");
                    }
                    held.insert(partition, epoch);
                    self.engine.adopt(partition, instances);
                    self.tell_of(partition, &left);
                }
                Err(error) => {
                    self.problems.say(&recovery(partition), "RecoveryFailed", in_words(&error));
                    // frees it, so that it is tried again
                    return Err(SessionError::Silent);
                }
            }
        }
        if held.is_empty() {
            self.problems.say(DATABASE, "Standby", "another orchestrator holds all partitions; standing by".to_owned());
        } else {
            self.problems.mended(DATABASE);
        }
        Ok(())
    }

    /// The commit whose answer was lost: did it take place? If not it is repeated, but for partitions that are lost.
    async fn settle(
        &self,
        session: &Session,
        held: &Epochs,
        entries: Vec<Entry>,
        doubt: &mut Option<Vec<Entry>>,
    ) -> Result<(), SessionError> {
        let (ours, others) = entries.into_iter().partition(|entry| held.contains_key(&entry.partition));
        refuse(others);
        let entries: &mut Vec<Entry> = doubt.insert(ours);
        let existed = match session.find(entries).await? {
            Some(existed) => existed,
            None => session.commit(entries).await?,
        };
        self.pulse.committed();
        self.engine.recorded(doubt.take().unwrap_or_default(), &existed);
        Ok(())
    }

    fn lose(&self, held: &mut Epochs, lost: impl Fn((i16, i64)) -> bool) {
        held.retain(|partition, epoch| {
            let gone = lost((*partition, *epoch));
            if gone {
                self.engine.abandon(*partition);
                self.problems.mended(&recovery(*partition));
                // in memory only, and out of date
                refuse(self.engine.queue.withdraw(|entry| entry.partition == *partition));
            }
            !gone
        });
    }

    /// How many instances have ended ever: exact while no commit is under way, which only this task makes.
    async fn count(&self) {
        match self.reader.counts().await {
            Ok(counts) => {
                for (saga, completed, compensated) in counts {
                    self.engine.catalogue.counts_of(&saga).begin(completed, compensated);
                }
            }
            Err(error) => self.problems.say(DATABASE, "DatabaseFails", in_words(&error)),
        }
    }

    /// An instance that cannot be recovered keeps nobody else from going on. It stays as it is, for a version that can read it,
    /// or for a person.
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
                Err(error) if error.is_of_the_instance() => recovery.left.push(error),
                Err(error) => return Err(error),
            }
        }
        Ok(recovery)
    }

    async fn recover_one(&self, instance: &Listed, log: Log) -> Result<Recovered, RecoveryError> {
        let (id, started_at) = (instance.id, instance.started_at);
        let events = log?;
        let compiled = self.compiled(instance).await?;
        let state = view::replay(&compiled.definition, &events, |_, _| {}).ok_or(RecoveryError::Headless(id))?;
        if !(0..).zip(&events).all(|(seq, logged)| logged.seq == seq) {
            return Err(RecoveryError::Gap(id));
        }
        let next_seq = events.last().map_or(0, |logged| logged.seq + 1);
        Ok(Recovered { id, compiled, state, next_seq, started_at })
    }

    /// Says which instances of a partition are left alone; the problem lasts until the partition is recovered again.
    fn tell_of(&self, partition: i16, left: &[RecoveryError]) {
        let Some(first) = left.iter().take(TOLD).map(ToString::to_string).reduce(|all, one| format!("{all}; {one}"))
        else {
            return self.problems.mended(&recovery(partition));
        };
        for error in left {
            // the causes only here: they may quote the log
            tracing::error!(partition, error = in_words(error), "an instance is left alone");
        }
        let more = left.len().saturating_sub(TOLD);
        let more = if more == 0 { String::new() } else { format!("; and {more} more") };
        let message = format!(
            "{first}{more}: left alone, all others go on; run the version of weft that wrote it, or mend the row, and restart the orchestrator"
        );
        self.problems.say(&recovery(partition), "InstanceUnreadable", message);
    }

    /// The definition that an instance started with, from memory or from the database.
    async fn compiled(&self, instance: &Listed) -> Result<Arc<Compiled>, RecoveryError> {
        let Listed { id, saga, version, .. } = instance;
        if let Some(compiled) = self.engine.catalogue.known(saga, version) {
            return Ok(compiled);
        }
        let stored = self.reader.definition(saga, version).await?;
        let missing = || RecoveryError::NoDefinition { id: *id, saga: saga.clone(), version: version.clone() };
        Ok(self.engine.catalogue.learn(stored.ok_or_else(missing)?))
    }
}

fn recovery(partition: i16) -> String {
    format!("recovery of partition {partition}")
}

fn refuse(entries: Vec<Entry>) {
    for entry in entries {
        if let Some(acknowledge) = entry.acknowledge {
            let _ = acknowledge.send(Err(Unrecorded::TakenOver));
        }
    }
}
