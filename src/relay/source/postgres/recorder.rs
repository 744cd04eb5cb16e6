//! The recorder: writes the ledger, deletes what is published, reads again what is held.
//!
//! It works beside the publisher, which waits for nothing that happens here. Rows are deleted in batches, in the
//! transaction that records their publication.
//!
//! A walsender may send a transaction before other sessions see it: a commit is first written to the write-ahead log,
//! and only then is the transaction removed from the list of running ones (with a synchronous standby, after the standby
//! has answered). So a row may be published before it can be deleted. Such a row is deleted later, and nothing waits for
//! that. Whether it is gone, or only invisible, is decided by its transaction.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_postgres::{Client, SimpleQueryMessage, types::ToSql};

use super::{
    DEADLINE, dead,
    held::{self, Found},
    ledger::{self, Entry, Ledger, Records},
    published::{self, KEPT},
    slot::Slot,
    snapshot::Snapshot,
    table::SETTLED,
};
use crate::{
    postgres::{outbox::Outbox, replication::Lsn},
    relay::{
        reporter::{Counted, Reporter},
        source::{Again, Done, Mark, Row, SourceError, within},
    },
};

/// Maximum number of rows that one transaction deletes.
const DELETE: usize = 4096;
/// Longest time from an acknowledgement to its recording.
const RECORD: Duration = Duration::from_millis(100);
/// How often rows are counted (while there is work) and the slot's state is read.
const STATUS_INTERVAL: Duration = Duration::from_secs(6);
/// Longest time between two looks at whether it is another table's turn.
const ROTATE: Duration = Duration::from_mins(1);
/// How often held events are looked for that are due.
const HELD_INTERVAL: Duration = Duration::from_secs(1);

/// Records what is done, until the source or the connection ends.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools, reason = "independent facts, not a state machine")]
pub(crate) struct Recorder<'a> {
    records: Records<'a>,
    done: mpsc::Receiver<Done>,
    recorded: watch::Sender<Option<Mark>>,
    again: mpsc::Sender<Vec<Again>>,
    reporter: &'a Arc<Reporter>,
    slot: Option<&'a Outbox>,
    /// How long what is published is kept; zero: not at all.
    keep: Duration,
    /// When to see whether it is another table's turn, or to empty all of them.
    rotate_due: Option<Instant>,
    /// This term has recorded a position in the log. Before, the slot's position proves nothing: rows from before the slot
    /// may be unpublished.
    streaming: bool,
    /// The ledger's snapshot.
    snapshot: Option<Snapshot>,
    /// A newer one, for when everything that committed before this position is recorded.
    newer: Option<(Snapshot, Lsn)>,
    /// Published rows that could not be deleted yet.
    undeleted: HashMap<i64, Option<u64>>,
    /// Events of each key that were handed over to be held.
    handed: HashMap<u64, u64>,
    /// Held events that were given to the publisher again, by key.
    loaded: HashMap<u64, HashSet<i64>>,
    any_held: bool,
    any_dead: bool,
}

/// The recorder's ends of the queues to the other parts.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) done: mpsc::Receiver<Done>,
    pub(crate) again: mpsc::Sender<Vec<Again>>,
    /// Notifies the source of the last recorded mark.
    pub(crate) recorded: watch::Sender<Option<Mark>>,
}

/// How a recorder works.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Options<'a> {
    /// The relay uses a slot, whose state is then read for the status.
    pub(crate) slot: Option<&'a Outbox>,
    /// A former term left held events.
    pub(crate) any_held: bool,
    /// How long what is published is kept; zero: not at all.
    pub(crate) keep: Duration,
    /// After so many refusals an event is given up; `None`: never.
    pub(crate) max_attempts: Option<u32>,
}

impl<'a> Recorder<'a> {
    pub(crate) async fn new(
        client: &'a Client,
        ledger: &Ledger,
        Options { slot, any_held, keep, max_attempts }: Options<'a>,
        ends: Ends,
        reporter: &'a Arc<Reporter>,
    ) -> Result<Self, SourceError> {
        let Ends { done, again, recorded } = ends;
        Ok(Self {
            records: Records::new(client, ledger, !keep.is_zero(), max_attempts).await?,
            done,
            recorded,
            again,
            reporter,
            slot,
            keep,
            rotate_due: Some(Instant::now()),
            streaming: false,
            snapshot: ledger.snapshot.clone(),
            newer: None,
            undeleted: HashMap::new(),
            handed: HashMap::new(),
            loaded: HashMap::new(),
            any_held,
            // the first status says it
            any_dead: true,
        })
    }

    /// Returns after the last thing that the publisher hands over is recorded.
    pub(crate) async fn run(mut self) -> Result<(), SourceError> {
        let mut pending = Done::default();
        let mut due = None;
        let (mut status_due, mut held_due) = (Instant::now(), Instant::now());
        loop {
            let room = pending.published.len() < DELETE;
            let at = due.filter(|_| room).unwrap_or_else(Instant::now);
            tokio::select! {
                done = self.done.recv(), if room => {
                    let Some(done) = done else {
                        return self.record(pending).await;
                    };
                    merge(&mut pending, done);
                    due.get_or_insert_with(|| Instant::now() + RECORD);
                }
                () = sleep_until(at), if due.is_some() || !room => {
                    self.record(std::mem::take(&mut pending)).await?;
                    due = (!self.undeleted.is_empty()).then(|| Instant::now() + RECORD);
                }
                () = sleep_until(status_due) => {
                    self.refresh_status().await?;
                    status_due = Instant::now() + STATUS_INTERVAL;
                }
                () = sleep_until(held_due), if self.any_held => {
                    let busy: Vec<u64> = self.loaded.keys().copied().collect();
                    let found = held::due(self.records.client, &busy).await?;
                    let all = found.len() < held::EVENTS;
                    self.give_again(found).await?;
                    held_due = Instant::now() + if all { HELD_INTERVAL } else { RECORD };
                }
            }
        }
    }

    async fn record(&mut self, done: Done) -> Result<(), SourceError> {
        let buried = if done.is_empty() { Vec::new() } else { self.write(&done).await? };
        self.delete_later().await?;
        if !done.held.is_empty() {
            self.any_held = true;
            for held in &done.held {
                *self.handed.entry(held.key).or_default() += 1;
            }
        }
        for (seq, _) in &done.refused {
            // the publisher has dropped those that wait behind it
            self.loaded.retain(|_, seqs| !seqs.contains(seq));
        }
        if done.mark.is_some() {
            self.recorded.send_replace(done.mark);
        }
        if !(done.held.is_empty() && done.refused.is_empty() && done.freed.is_empty()) {
            self.report_held().await?;
        }
        if !buried.is_empty() {
            tracing::warn!(events = buried.len(), "events were given up, and are dead letters now");
            self.report_dead().await?;
        }
        self.follow(&done.freed).await?;
        self.go_on(buried).await
    }

    /// Returns the keys of events that were given up.
    async fn write(&mut self, done: &Done) -> Result<Vec<u64>, SourceError> {
        let mut entry = Entry {
            published: done.published.iter().map(|place| place.seq).collect(),
            freed: done.freed.iter().map(|&(_, seq)| seq).collect(),
            held: &done.held,
            refused: &done.refused,
            keep_all: done.everybody,
            ..Entry::default()
        };
        // pages of the index in their order
        entry.published.sort_unstable();
        if let Some(mark) = &done.mark {
            entry.at(&mark.point);
        }
        let newer = self.newer.take_if(|(_, lsn)| entry.lsn.is_some_and(|recorded| recorded >= *lsn));
        if let Some((snapshot, _)) = &newer {
            entry.catch_up(snapshot);
        }
        let recorded = self.records.record(&entry, true).await?;
        self.streaming |= entry.lsn.is_some();
        if let Some(snapshot) = entry.snapshot {
            self.snapshot = Some(snapshot.clone());
        }
        if !recorded.missing.is_empty() {
            let missing: HashSet<i64> = recorded.missing.iter().copied().collect();
            let places = done.published.iter().filter(|place| missing.contains(&place.seq));
            self.undeleted.extend(
                places
                    .filter(|place| is_to_come(place.transaction, &recorded))
                    .map(|place| (place.seq, place.transaction)),
            );
        }
        // the ledger counts rows as they are deleted
        let published = recorded.published + self.undeleted.len() as u64;
        let (count, point) = (done.published.len() as u64, done.mark.as_ref().map(|mark| &mark.point));
        self.reporter.recorded(count, published, point);
        Ok(recorded.buried)
    }

    /// Deletes rows that were invisible or locked before.
    async fn delete_later(&mut self) -> Result<(), SourceError> {
        if self.undeleted.is_empty() {
            return Ok(());
        }
        let mut published: Vec<i64> = self.undeleted.keys().copied().collect();
        published.sort_unstable();
        let recorded = self.records.record(&Entry { published, ..Entry::default() }, false).await?;
        let missing: HashSet<i64> = recorded.missing.iter().copied().collect();
        self.undeleted.retain(|seq, transaction| missing.contains(seq) && is_to_come(*transaction, &recorded));
        self.reporter.recorded(0, recorded.published + self.undeleted.len() as u64, None);
        Ok(())
    }

    /// Gives the publisher the events that follow those that are held no more.
    async fn follow(&mut self, freed: &[(u64, i64)]) -> Result<(), SourceError> {
        let mut keys = Vec::new();
        for &(key, seq) in freed {
            if let Some(seqs) = self.loaded.get_mut(&key) {
                seqs.remove(&seq);
                if seqs.is_empty() {
                    self.loaded.remove(&key);
                    keys.push(key);
                }
            }
        }
        self.go_on(keys).await
    }

    async fn go_on(&mut self, keys: Vec<u64>) -> Result<(), SourceError> {
        if keys.is_empty() {
            return Ok(());
        }
        let free = ledger::without_held(self.records.client, &keys).await?;
        let freed =
            free.iter().map(|key| Again::Free { key: *key, handed: self.handed.remove(key).unwrap_or_default() });
        let freed: Vec<Again> = freed.collect();
        self.send(freed).await?;
        let keys: Vec<u64> = keys.into_iter().filter(|key| !free.contains(key)).collect();
        if keys.is_empty() {
            return Ok(());
        }
        let found = held::of_keys(self.records.client, &keys).await?;
        Box::pin(self.give_again(found)).await
    }

    async fn give_again(&mut self, found: Vec<Found>) -> Result<(), SourceError> {
        let (mut again, mut skipped, mut keys) = (Vec::new(), Vec::new(), Vec::new());
        let snapshot = self.visible().await?;
        for Found { place, key, event } in found {
            match event {
                Some(event) => {
                    self.loaded.entry(key).or_default().insert(place.seq);
                    again.push(Again::Event(Box::new(Row { event, place, committed_at: None })));
                }
                None if place.transaction.is_none_or(|transaction| snapshot.sees(transaction)) => {
                    tracing::warn!(seq = place.seq, "a held event is skipped, because its row was deleted");
                    skipped.push(place.seq);
                    keys.push(key);
                }
                // its row is not visible yet
                None => {}
            }
        }
        self.send(again).await?;
        if skipped.is_empty() {
            return Ok(());
        }
        ledger::skip(self.records.client, &skipped).await?;
        // a person may have moved them to the dead letters
        self.report_dead().await?;
        self.report_held().await?;
        keys.retain(|key| !self.loaded.contains_key(key));
        self.go_on(keys).await
    }

    async fn send(&self, again: Vec<Again>) -> Result<(), SourceError> {
        if again.is_empty() {
            return Ok(());
        }
        // a publisher that has ended has what is to be recorded in the queue still
        let _ = self.again.send(again).await;
        Ok(())
    }

    async fn visible(&self) -> Result<Snapshot, SourceError> {
        let action = "reading a snapshot";
        let query = self.records.client.query_one("select pg_current_snapshot()::text", &[]);
        let row = within(DEADLINE, action, query).await?;
        let text: &str = row.try_get(0).map_err(SourceError::query(action))?;
        text.parse().map_err(|_| SourceError::Layout("a snapshot cannot be read"))
    }

    async fn report_held(&mut self) -> Result<(), SourceError> {
        let held = ledger::held(self.records.client).await?;
        self.any_held = held.is_some();
        self.reporter.held(held);
        Ok(())
    }

    async fn report_dead(&mut self) -> Result<(), SourceError> {
        let dead = dead::dead(self.records.client).await?;
        self.any_dead = dead.is_some();
        self.reporter.dead(dead);
        Ok(())
    }

    /// Updates the row count and the slot's state in the status, and reports a slot at risk.
    async fn refresh_status(&mut self) -> Result<(), SourceError> {
        if self.any_held {
            self.report_held().await?;
        }
        if self.any_dead {
            self.report_dead().await?;
        }
        if self.rotate_due.is_some_and(|due| due <= Instant::now()) {
            self.rotate_due = match (self.keep.is_zero(), published::rotate(self.records.client, self.keep).await?) {
                (true, true) => None,
                (true, false) => Some(Instant::now() + ROTATE),
                (false, _) => Some(Instant::now() + (self.keep / 32).min(ROTATE)),
            };
        }
        if let Some(outbox) = self.slot {
            let slot = Slot::find(self.records.client, outbox).await?;
            self.reporter.slot(slot.as_ref());
            self.advance(slot.as_ref()).await?;
        }
        if !self.reporter.take_busy() {
            return Ok(());
        }
        if let Some(counted) = self.count().await {
            self.reporter.counted(counted);
            self.sweep(counted).await?;
        }
        if self.streaming && self.newer.is_none() {
            let action = "reading a snapshot";
            let statement = "select pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text";
            let row = within(DEADLINE, action, self.records.client.query_one(statement, &[])).await?;
            let text = |index| row.try_get::<_, &str>(index).map_err(SourceError::query(action));
            let snapshot = text(0)?.parse().map_err(|_| SourceError::Layout("a snapshot cannot be read"))?;
            self.newer = Some((snapshot, text(1)?.parse()?));
        }
        Ok(())
    }

    /// Records the newer snapshot when the slot is beyond its position, as it is once the outbox is idle.
    async fn advance(&mut self, slot: Option<&Slot>) -> Result<(), SourceError> {
        let Some((snapshot, _)) =
            self.newer.take_if(|(_, lsn)| slot.is_some_and(|slot| slot.usable && slot.confirmed >= *lsn))
        else {
            return Ok(());
        };
        let entry = Entry { snapshot: Some(&snapshot), ..Entry::default() };
        self.records.record(&entry, true).await?;
        self.snapshot = Some(snapshot);
        Ok(())
    }

    /// Deletes rows that an earlier term has published and could not delete.
    async fn sweep(&self, counted: Counted) -> Result<(), SourceError> {
        let Some(snapshot) = self.snapshot.as_ref().filter(|_| counted.rows > 0 && self.undeleted.is_empty()) else {
            return Ok(());
        };
        let statement = format!(
            "with snapshot as (select $1::text::pg_snapshot as s),
                  settled as (select seq from outbox as o, snapshot
                               where {SETTLED} and not exists (select from relay_held as h where h.seq = o.seq)
                               order by seq limit {DELETE} for update of o skip locked),
                  gone as (delete from outbox where seq in (select seq from settled) returning *){kept}
             select count(*) from gone",
            kept = if self.keep.is_zero() { "" } else { KEPT },
        );
        let snapshot = snapshot.to_string();
        let parameters: [&(dyn ToSql + Sync); 1] = [&snapshot];
        let action = "deleting rows that were published before";
        let counted = within(DEADLINE, action, self.records.client.query_one(&statement, &parameters)).await?;
        let deleted: i64 = counted.try_get(0).map_err(SourceError::query(action))?;
        if deleted > 0 {
            tracing::info!(rows = deleted, "deleted rows that an earlier leader has published");
        }
        Ok(())
    }

    /// Counts the rows of the outbox. `None` when that takes too long: a number for the status must not end a term.
    async fn count(&self) -> Option<Counted> {
        // one message is one transaction, at whose end the setting is reset
        let count = "set local statement_timeout = '2s'; \
             select count(*), extract(epoch from now() - min(created_at) filter (where isfinite(created_at))) \
               from (select created_at from outbox limit 1000000) rows";
        let counted =
            within(DEADLINE, "counting the rows of the outbox", self.records.client.simple_query(count)).await;
        let messages = counted
            .inspect_err(|error| tracing::debug!(%error, "the rows of the outbox could not be counted in time"))
            .ok()?;
        messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(Counted {
                rows: row.get(0)?.parse().ok()?,
                oldest: row
                    .get(1)
                    .and_then(|age| age.parse().ok())
                    .map(Duration::try_from_secs_f64)
                    .and_then(Result::ok),
            }),
            _ => None,
        })
    }
}

fn merge(pending: &mut Done, mut done: Done) {
    pending.published.append(&mut done.published);
    pending.freed.append(&mut done.freed);
    pending.held.append(&mut done.held);
    pending.refused.append(&mut done.refused);
    pending.everybody |= done.everybody;
    pending.mark = done.mark.or(pending.mark.take());
}

/// Whether a row that was not there to be deleted is still to come.
fn is_to_come(transaction: Option<u64>, recorded: &ledger::Recorded) -> bool {
    recorded.locked || transaction.is_some_and(|transaction| !recorded.snapshot.sees(transaction))
}
