//! The checkpoint, and the rows that are done with: deleted in the transaction that records their publication.
//!
//! Only the leader writes it, on the control connection. Rows go in batches, off the hot path: an acknowledgement waits for
//! nothing here. The slot is told of an event only after its row is gone and that is durable, so that no crash leaves a
//! row behind that is neither streamed again nor deleted.
//!
//! A walsender may send a transaction before other sessions see it: its commit is in the WAL first, and only then is it
//! taken off the list of running transactions. So a row may be published before it can be deleted; such a row is deleted
//! a little later, and until then the slot is told of nothing.

use std::{collections::HashMap, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_postgres::{Client, SimpleQueryMessage, types::ToSql};
use uuid::Uuid;

use super::{
    control::DEADLINE,
    report::Report,
    slot::Slot,
    source::{Mark, Point, SourceError, within},
};

/// Rows that are deleted in one transaction at most.
const DELETE: usize = 4096;
/// Acknowledged rows are recorded after this long at most.
const RECORD: Duration = Duration::from_millis(100);
/// Deadline of one deletion.
const DELETE_DEADLINE: Duration = Duration::from_mins(1);
/// A row that is not seen for so long is gone: it was deleted in a former term, and its event came again.
pub(crate) const UNSEEN: Duration = Duration::from_secs(5);
/// How often rows are counted (while there is work) and the slot is looked at.
const LOOK: Duration = Duration::from_secs(10);

/// What a former term left.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    /// Every row from before the slot was acknowledged.
    pub(crate) copied: bool,
    pub(crate) published: u64,
}

/// Reads the checkpoint, which also writes it: so the WAL's position grows from term to term, and with it `sequence`.
pub(crate) async fn open(client: &Client, relay: &str) -> Result<Checkpoint, SourceError> {
    let doing = SourceError::query("reading weft.relay_checkpoint");
    let statement = "insert into weft.relay_checkpoint as c (relay) values ($1) \
         on conflict (relay) do update set updated_at = now() \
         returning c.copied, c.published";
    let row = within(DEADLINE, "reading weft.relay_checkpoint", client.query_one(statement, &[&relay])).await?;
    let published: i64 = row.try_get(1).map_err(&doing)?;
    Ok(Checkpoint { copied: row.try_get(0).map_err(&doing)?, published: published.unsigned_abs() })
}

/// Notes that the rows from before the slot are still to be published. Must be durable before the slot is made. The slot is
/// the database's: a relay of another name whose slot it was may not take the new one for its own.
pub(crate) async fn begin_copy(client: &Client) -> Result<(), SourceError> {
    let statement = "update weft.relay_checkpoint set copied = false, updated_at = now()";
    within(DEADLINE, "writing weft.relay_checkpoint", client.execute(statement, &[])).await?;
    Ok(())
}

/// What the publisher hands over: acknowledged rows, and the last mark that they completed.
#[derive(Debug, Default)]
pub(crate) struct Done {
    pub(crate) rows: Vec<Uuid>,
    pub(crate) mark: Option<Mark>,
}

/// Records what is done, for ever.
#[derive(Debug)]
pub(crate) struct Recorder<'a> {
    pub(crate) client: &'a Client,
    pub(crate) relay: &'a str,
    pub(crate) done: mpsc::Receiver<Done>,
    /// Tells the source what is recorded.
    pub(crate) recorded: watch::Sender<Option<Mark>>,
    pub(crate) report: &'a Arc<Report>,
    /// Whether there is a slot to look at.
    pub(crate) slot: bool,
    /// Whether this term wrote that the rows from before the slot are published. Not what a former one wrote: this one may
    /// have made the slot anew.
    pub(crate) copied: bool,
    /// Published rows that were not there to be deleted, and until when that is tried.
    pub(crate) unseen: HashMap<Uuid, Instant>,
    /// The last mark that the source was not told of, because of them.
    pub(crate) held: Option<Mark>,
}

impl Recorder<'_> {
    pub(crate) async fn run(mut self) -> Result<(), SourceError> {
        let mut pending = Done::default();
        let mut due = None;
        let mut look = Instant::now();
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
                    due = (!self.unseen.is_empty()).then(|| Instant::now() + RECORD);
                }
                () = sleep_until(look) => {
                    self.look().await?;
                    look = Instant::now() + LOOK;
                }
            }
        }
    }

    async fn record(&mut self, done: Done) -> Result<(), SourceError> {
        let Done { mut rows, mark } = done;
        let count = rows.len();
        let unseen = std::mem::take(&mut self.unseen);
        rows.extend(unseen.keys());
        // marks pass in their order and only the last is handed over: transactions come after all from before the slot
        let copied = matches!(mark, Some(Mark { point: Point::Copied(_) | Point::Committed(_), .. }));
        // an empty transaction's mark needs no record of its own
        if rows.is_empty() && (mark.is_none() || copied && self.copied) {
            self.tell(mark);
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
        let doing = "recording what is published";
        let parameters: [&(dyn ToSql + Sync); 4] = [&self.relay, &rows, &lsn, &copied];
        let row = within(DELETE_DEADLINE, doing, self.client.query_one(statement, &parameters)).await?;
        self.copied |= copied;
        let published: i64 = row.try_get(0).map_err(SourceError::query(doing))?;
        let missing: Vec<Uuid> = row.try_get(1).map_err(SourceError::query(doing))?;
        let now = Instant::now();
        let until = |id: Uuid| unseen.get(&id).copied().unwrap_or(now + UNSEEN);
        self.unseen = missing.into_iter().map(|id| (id, until(id))).filter(|(_, until)| *until > now).collect();
        self.report.recorded(count as u64, published.unsigned_abs(), mark.as_ref().map(|mark| &mark.point));
        self.held = mark.or(self.held.take());
        if self.unseen.is_empty() {
            let mark = self.held.take();
            self.tell(mark);
        }
        Ok(())
    }

    fn tell(&self, mark: Option<Mark>) {
        if mark.is_some() {
            self.recorded.send_replace(mark);
        }
    }

    /// Looks at what the status shows, and warns in time.
    async fn look(&self) -> Result<(), SourceError> {
        if self.report.take_busy()
            && let Some(rows) = self.count().await
        {
            self.report.counted(rows);
        }
        if self.slot {
            self.report.slot(Slot::look(self.client).await?.as_ref());
        }
        Ok(())
    }

    /// Rows of the outbox. `None` when they cannot be counted soon: everything else on this connection waits for it, and what
    /// only the status shows may not end a term.
    async fn count(&self) -> Option<u64> {
        // one message, so one transaction, which also ends the setting
        let count = "set local statement_timeout = '2s'; \
             select count(*) from (select from weft.outbox limit 1000000) rows";
        let counted = within(DEADLINE, "counting the rows of the outbox", self.client.simple_query(count)).await;
        let messages = counted.inspect_err(|error| tracing::debug!(%error, "the rows are not counted")).ok()?;
        messages.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0)?.parse().ok(),
            _ => None,
        })
    }
}
