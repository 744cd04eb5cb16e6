//! The checkpoint, and the deletion of published rows in the transaction that records their publication.
//!
//! Only the leader writes the checkpoint, on the control connection. Rows are deleted in batches, off the hot path: an
//! acknowledgement does not wait for the deletion. A position is confirmed to the slot only after the rows before it
//! are deleted durably, so no crash leaves a row behind that is neither streamed again nor deleted.
//!
//! A walsender may send a transaction before other sessions see it: a commit is first written to the WAL, and only then
//! is the transaction removed from the list of running ones. So a row may be published before it can be deleted. Such a
//! row is deleted a little later, and until then no position is confirmed to the slot.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_postgres::{Client, SimpleQueryMessage, types::ToSql};
use uuid::Uuid;

use super::{
    control::DEADLINE,
    reporter::Reporter,
    slot::Slot,
    source::{Mark, Point, SourceError, within},
};

/// Maximum number of rows that one transaction deletes.
const DELETE: usize = 4096;
/// Longest time from an acknowledgement to its recording.
const RECORD: Duration = Duration::from_millis(100);
/// Deadline of one deletion.
const DELETE_DEADLINE: Duration = Duration::from_mins(1);
/// A row that is not visible for this long does not exist: it was deleted in a former term, and its event was streamed
/// again.
pub(crate) const INVISIBLE_GRACE: Duration = Duration::from_secs(5);
/// How often rows are counted (while there is work) and the slot's state is read.
const STATUS_INTERVAL: Duration = Duration::from_secs(10);

/// What earlier terms recorded.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// Whether every row that is older than the slot was acknowledged.
    pub(crate) copied: bool,
    pub(crate) published: u64,
}

/// Reads the checkpoint. This also writes it, so that the WAL's position grows from term to term, and with it
/// `sequence`.
pub(crate) async fn open(client: &Client, relay: &str) -> Result<Checkpoint, SourceError> {
    let action = SourceError::query("reading weft.relay_checkpoint");
    let statement = "insert into weft.relay_checkpoint as c (relay) values ($1) \
         on conflict (relay) do update set updated_at = now() \
         returning c.copied, c.published";
    let row = within(DEADLINE, "reading weft.relay_checkpoint", client.query_one(statement, &[&relay])).await?;
    let published: i64 = row.try_get(1).map_err(&action)?;
    Ok(Checkpoint { copied: row.try_get(0).map_err(&action)?, published: published.unsigned_abs() })
}

/// Records that the rows that are older than the slot are not published yet. Must be durable before the slot is
/// created. The slot belongs to the database: a relay of another name, whose slot it was, must not continue with the
/// new slot.
pub(crate) async fn begin_copy(client: &Client) -> Result<(), SourceError> {
    let statement = "update weft.relay_checkpoint set copied = false, updated_at = now()";
    within(DEADLINE, "writing weft.relay_checkpoint", client.execute(statement, &[])).await?;
    Ok(())
}

/// What the publisher hands to the recorder: acknowledged rows, and the last mark that they completed.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) rows: Vec<Uuid>,
    pub(crate) mark: Option<Mark>,
}

/// Records what is acknowledged, until the source or the connection ends.
#[derive(Debug)]
pub(crate) struct Recorder<'a> {
    pub(crate) client: &'a Client,
    pub(crate) relay: &'a str,
    pub(crate) done: mpsc::Receiver<Done>,
    /// Notifies the source of the last recorded mark.
    pub(crate) recorded: watch::Sender<Option<Mark>>,
    pub(crate) reporter: &'a Arc<Reporter>,
    /// Whether the relay uses a slot, whose state is then read for the status.
    pub(crate) slot: bool,
    /// Whether this term has recorded that the rows older than the slot are published. What a former term recorded does
    /// not count: this term may have created the slot again.
    pub(crate) copied: bool,
    /// Published rows that were not visible when they were to be deleted, each with the time until which the deletion
    /// is tried.
    pub(crate) not_visible: HashMap<Uuid, Instant>,
    /// The last mark that is withheld from the source because of them.
    pub(crate) withheld: Option<Mark>,
}

impl Recorder<'_> {
    pub(crate) async fn run(mut self) -> Result<(), SourceError> {
        let mut pending = Done::default();
        let mut due = None;
        let mut status_due = Instant::now();
        loop {
            let room = pending.rows.len() < DELETE;
            let at = due.filter(|_| room).unwrap_or_else(Instant::now);
            tokio::select! {
                done = self.done.recv(), if room => {
                    let Some(Done { mut rows, mark }) = done else { return Err(SourceError::Ended) };
                    pending.rows.append(&mut rows);
                    pending.mark = mark.or(pending.mark);
                    due.get_or_insert_with(|| Instant::now() + RECORD);
                }
                () = sleep_until(at), if due.is_some() || !room => {
                    self.record(std::mem::take(&mut pending)).await?;
                    due = (!self.not_visible.is_empty()).then(|| Instant::now() + RECORD);
                }
                () = sleep_until(status_due) => {
                    self.refresh_status().await?;
                    status_due = Instant::now() + STATUS_INTERVAL;
                }
            }
        }
    }

    async fn record(&mut self, done: Done) -> Result<(), SourceError> {
        let Done { mut rows, mark } = done;
        let count = rows.len();
        let unseen = std::mem::take(&mut self.not_visible);
        rows.extend(unseen.keys());
        // marks pass in order and only the last one is handed over; a `Committed` mark implies `Copied`, since
        // transactions come after all rows that are older than the slot
        let copied = matches!(mark, Some(Mark { point: Point::Copied(_) | Point::Committed(_), .. }));
        // the mark of an empty transaction needs no record of its own
        if rows.is_empty() && (mark.is_none() || copied && self.copied) {
            self.notify_source(mark);
            return Ok(());
        }
        let lsn = mark.as_ref().map(|mark| mark.point.lsn().to_string());
        let statement = "with gone as (delete from weft.outbox where id = any ($2) returning id) \
             update weft.relay_checkpoint \
                set published = published + (select count(*) from gone), \
                    lsn = coalesce($3::text::pg_lsn, lsn), copied = copied or $4, updated_at = now() \
              where relay = $1 \
             returning published, case when (select count(*) from gone) = cardinality($2) then '{}' \
                  else array(select unnest($2) except select id from gone) end";
        let action = "recording what is published";
        let parameters: [&(dyn ToSql + Sync); 4] = [&self.relay, &rows, &lsn, &copied];
        let row = within(DELETE_DEADLINE, action, self.client.query_one(statement, &parameters)).await?;
        self.copied |= copied;
        let published: i64 = row.try_get(0).map_err(SourceError::query(action))?;
        let missing: Vec<Uuid> = row.try_get(1).map_err(SourceError::query(action))?;
        let now = Instant::now();
        let until = |id: Uuid| unseen.get(&id).copied().unwrap_or(now + INVISIBLE_GRACE);
        self.not_visible = missing.into_iter().map(|id| (id, until(id))).filter(|(_, until)| *until > now).collect();
        self.reporter.recorded(count as u64, published.unsigned_abs(), mark.as_ref().map(|mark| &mark.point));
        self.withheld = mark.or(self.withheld.take());
        if self.not_visible.is_empty() {
            let mark = self.withheld.take();
            self.notify_source(mark);
        }
        Ok(())
    }

    fn notify_source(&self, mark: Option<Mark>) {
        if mark.is_some() {
            self.recorded.send_replace(mark);
        }
    }

    /// Updates the row count and the slot's state in the status, and reports a slot at risk.
    async fn refresh_status(&self) -> Result<(), SourceError> {
        if self.reporter.take_busy()
            && let Some(rows) = self.count().await
        {
            self.reporter.counted(rows);
        }
        if self.slot {
            self.reporter.slot(Slot::find(self.client).await?.as_ref());
        }
        Ok(())
    }

    /// Counts the rows of the outbox. `None` when that takes too long: everything else on this connection waits for the
    /// count, and a number for the status must not end a term.
    async fn count(&self) -> Option<u64> {
        // one message is one transaction, at whose end the setting is reset
        let count = "set local statement_timeout = '2s'; \
             select count(*) from (select from weft.outbox limit 1000000) rows";
        let counted = within(DEADLINE, "counting the rows of the outbox", self.client.simple_query(count)).await;
        let messages = counted
            .inspect_err(|error| tracing::debug!(%error, "the rows of the outbox could not be counted in time"))
            .ok()?;
        messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
            _ => None,
        })
    }
}
