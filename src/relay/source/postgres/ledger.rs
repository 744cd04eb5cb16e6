//! `weft.relay_ledger` and `weft.relay_held`: what is published, and what is held.
//!
//! Only the leader writes them. Rows are deleted in the transaction that records their publication, so the table has
//! what is not published, and nearly nothing else; what else it has is told apart by the ledger.

use tokio_postgres::{Client, Statement, error::SqlState, types::ToSql};

use super::{DEADLINE, dead, published::KEPT, slot::Slot, snapshot::Snapshot};
use crate::{
    postgres::replication::Lsn,
    relay::source::{Held, Point, SourceError, within},
};

/// Deadline of one deletion.
const RECORD_DEADLINE: std::time::Duration = std::time::Duration::from_mins(1);
/// How long a deletion waits for somebody who has locked a row; and room for the rows of one deletion, whatever the
/// database sets.
const SETTINGS: &str = "set lock_timeout = '1s'; set work_mem = '4MB'";

/// What earlier terms recorded, and the server as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ledger {
    pub(crate) system: String,
    pub(crate) published: u64,
    pub(crate) lsn: Option<Lsn>,
    pub(crate) snapshot: Option<Snapshot>,
    pub(crate) floor: Lsn,
    /// The next transaction id of the server.
    pub(crate) next_transaction: u64,
}

/// Where a log-tailing relay starts.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Start {
    Stream(Lsn),
    /// With the table, and a new slot; why.
    Copy(&'static str),
}

pub(crate) const LOST: &str = "the server has removed log that the slot needs";

/// Reads the ledger, and makes it this relay's and this server's.
pub(crate) async fn open(client: &Client, relay: &str) -> Result<Ledger, SourceError> {
    let action = "reading weft.relay_ledger";
    let statement = format!("{SETTINGS}; update relay_held set retry_at = now() where retry_at > now()");
    within(DEADLINE, action, client.batch_execute(&statement)).await?;
    let former = "select system, timeline from relay_ledger";
    let former = within(DEADLINE, action, client.query_opt(former, &[])).await?;
    let statement = "
        with server as (
            select system_identifier::text as system,
                   ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint as timeline
              from pg_control_system()
        )
        insert into relay_ledger as l (relay, system, timeline) select $1, system, timeline from server
        on conflict (one) do update
           set relay = excluded.relay, system = excluded.system, timeline = excluded.timeline, updated_at = now(),
               published = case when l.relay = excluded.relay then l.published else 0 end,
               lsn = case when l.system = excluded.system then l.lsn end,
               snapshot = case when l.system = excluded.system then l.snapshot end,
               floor = case when l.system = excluded.system then l.floor else '0/0' end
        returning system, published, lsn::text, snapshot::text, floor::text, timeline,
                  pg_snapshot_xmax(pg_current_snapshot())::text";
    let row = within(DEADLINE, action, client.query_one(statement, &[&relay])).await?;
    let failed = SourceError::query(action);
    let text = |index| row.try_get::<_, Option<&str>>(index).map_err(&failed);
    let number = |index| row.try_get::<_, i64>(index).map_err(&failed);
    let (system, timeline) = (text(0)?.unwrap_or_default().to_owned(), number(5)?);
    if let Some(former) = former {
        let was: (&str, i64) = (former.try_get(0).map_err(&failed)?, former.try_get(1).map_err(&failed)?);
        if was.0 != system {
            tracing::warn!("the outbox was restored into another server: everything that is in it is published");
        } else if was.1 != timeline {
            tracing::warn!(timeline, "the server was promoted, or restored to a point in time");
        }
    }
    let layout = |_| SourceError::Layout("a position in weft.relay_ledger cannot be read");
    Ok(Ledger {
        system,
        published: number(1)?.unsigned_abs(),
        lsn: text(2)?.map(str::parse).transpose()?,
        snapshot: text(3)?.map(str::parse).transpose().map_err(layout)?,
        floor: text(4)?.unwrap_or("0/0").parse()?,
        next_transaction: text(6)?.and_then(|id| id.parse().ok()).unwrap_or_default(),
    })
}

impl Ledger {
    /// From where the log can be read; see the module's documentation.
    pub(crate) async fn start(&self, slot: Option<Slot>, client: &Client) -> Result<Start, SourceError> {
        let Some(lsn) = self.lsn else { return Ok(Start::Copy("no replication slot is recorded")) };
        let Some(slot) = slot else { return Ok(Start::Copy("the replication slot is gone")) };
        if !slot.usable {
            return Ok(Start::Copy(LOST));
        }
        // beyond what is recorded it is moved while nothing is to be published, and by those who make it by hand
        if slot.confirmed > lsn && self.has_new_rows(client).await? {
            return Ok(Start::Copy("the replication slot is ahead of what is published"));
        }
        Ok(Start::Stream(lsn.max(slot.confirmed)))
    }

    /// Whether there is a row that is neither published nor held.
    async fn has_new_rows(&self, client: &Client) -> Result<bool, SourceError> {
        let snapshot = self.snapshot.as_ref().map_or_else(|| Snapshot::nothing().to_string(), Snapshot::to_string);
        let action = "looking for rows that are not published";
        let statement = "select exists (select from outbox as o
            where not pg_visible_in_snapshot(txid, $1::text::pg_snapshot)
              and not exists (select from relay_held as h where h.seq = o.seq))";
        let row = within(DEADLINE, action, client.query_one(statement, &[&snapshot])).await?;
        row.try_get(0).map_err(SourceError::query(action))
    }
}

/// Nothing that a slot sends counts any more. Must be durable before another slot is made.
pub(crate) async fn forget_slot(client: &Client) -> Result<(), SourceError> {
    let statement = "update relay_ledger set lsn = null, updated_at = now() where lsn is not null";
    within(DEADLINE, "writing weft.relay_ledger", client.execute(statement, &[])).await?;
    Ok(())
}

/// What one transaction records.
#[derive(Debug, Default)]
pub(crate) struct Entry<'a> {
    /// Rows that are published, by `seq`.
    pub(crate) published: Vec<i64>,
    /// Of these, those that were held.
    pub(crate) freed: Vec<i64>,
    pub(crate) held: &'a [Held],
    pub(crate) refused: &'a [(i64, String)],
    /// The broker refuses everybody's events: none of them is given up.
    pub(crate) keep_all: bool,
    pub(crate) lsn: Option<Lsn>,
    pub(crate) snapshot: Option<&'a Snapshot>,
    pub(crate) floor: Option<Lsn>,
}

#[derive(Debug)]
pub(crate) struct Recorded {
    pub(crate) published: u64,
    /// Rows that were not there to be deleted, or locked by somebody.
    pub(crate) missing: Vec<i64>,
    /// Whether a row was locked, so that it is missing for no other reason.
    pub(crate) locked: bool,
    /// What the transaction saw.
    pub(crate) snapshot: Snapshot,
    /// Keys of events that were given up.
    pub(crate) buried: Vec<u64>,
}

/// Records, by prepared statements.
#[derive(Debug)]
pub(crate) struct Records<'a> {
    pub(crate) client: &'a Client,
    system: String,
    /// After so many refusals an event is given up.
    max_attempts: Option<u32>,
    /// Deletes rows, and waits for who has locked one.
    any: Statement,
    /// Deletes rows that nobody has locked.
    unlocked: Statement,
}

const ACTION: &str = "recording what is published";

impl<'a> Records<'a> {
    pub(crate) async fn new(
        client: &'a Client,
        ledger: &Ledger,
        keep: bool,
        max_attempts: Option<u32>,
    ) -> Result<Self, SourceError> {
        let (columns, kept) = if keep { ("*", KEPT) } else { ("seq", "") };
        let prepare = async |rows| {
            let statement = format!(
                "with gone as (delete from outbox where {rows} returning {columns}){kept}
                 update relay_ledger
                    set published = published + (select count(*) from gone), lsn = coalesce($3::text::pg_lsn, lsn),
                        snapshot = coalesce($4::text::pg_snapshot, snapshot),
                        floor = greatest($5::text::pg_lsn, floor), updated_at = now()
                  where system = $1
                 returning published, pg_current_snapshot()::text,
                           case when (select count(*) from gone) = cardinality($2) then '{{}}'
                                else array(select unnest($2) except select seq from gone) end"
            );
            within(DEADLINE, ACTION, client.prepare(&statement)).await
        };
        let any = prepare("seq = any ($2)").await?;
        let unlocked = "seq in (select seq from outbox where seq = any ($2) for update skip locked)";
        Ok(Self { client, system: ledger.system.clone(), max_attempts, any, unlocked: prepare(unlocked).await? })
    }

    /// Records in one transaction. With `patient` it waits for rows that somebody has locked, for a second.
    pub(crate) async fn record(&self, entry: &Entry<'_>, patient: bool) -> Result<Recorded, SourceError> {
        if patient {
            match self.record_once(entry, &self.any).await {
                Err(SourceError::Query { source, .. }) if source.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
                    within(DEADLINE, ACTION, self.client.batch_execute("rollback")).await?;
                }
                recorded => return recorded,
            }
        }
        Ok(Recorded { locked: true, ..self.record_once(entry, &self.unlocked).await? })
    }

    async fn record_once(&self, entry: &Entry<'_>, statement: &Statement) -> Result<Recorded, SourceError> {
        let transaction = entry.changes_held();
        let mut buried = Vec::new();
        if transaction {
            within(DEADLINE, ACTION, self.client.batch_execute("begin")).await?;
            buried = within(
                RECORD_DEADLINE,
                ACTION,
                change_held(self.client, entry, self.max_attempts.filter(|_| !entry.keep_all)),
            )
            .await?;
        }
        let (lsn, floor) = (entry.lsn.map(|lsn| lsn.to_string()), entry.floor.map(|floor| floor.to_string()));
        let snapshot = entry.snapshot.map(Snapshot::to_string);
        let parameters: [&(dyn ToSql + Sync); 5] = [&self.system, &entry.published, &lsn, &snapshot, &floor];
        let row = within(RECORD_DEADLINE, ACTION, self.client.query_opt(statement, &parameters)).await?;
        let row = row.ok_or(SourceError::LedgerReplaced)?;
        if transaction {
            within(DEADLINE, ACTION, self.client.batch_execute("commit")).await?;
        }
        let failed = SourceError::query(ACTION);
        let snapshot = row.try_get::<_, &str>(1).map_err(&failed)?.parse();
        Ok(Recorded {
            published: row.try_get::<_, i64>(0).map_err(&failed)?.unsigned_abs(),
            missing: row.try_get(2).map_err(&failed)?,
            locked: false,
            snapshot: snapshot.map_err(|_| SourceError::Layout("a snapshot cannot be read"))?,
            buried: buried.into_iter().map(i64::cast_unsigned).collect(),
        })
    }
}

impl Entry<'_> {
    fn changes_held(&self) -> bool {
        !(self.held.is_empty() && self.freed.is_empty() && self.refused.is_empty())
    }
}

/// Returns the keys of events that were given up, as the table has them.
async fn change_held(
    client: &Client,
    entry: &Entry<'_>,
    max_attempts: Option<u32>,
) -> Result<Vec<i64>, tokio_postgres::Error> {
    if !entry.held.is_empty() {
        // one that comes again from the log, because its term ended before its position was recorded, is there already
        let statement = "
            insert into relay_held (seq, key, txid, lsn, index, cause, attempts, retry_at)
            select seq, key, txid::xid8, lsn::pg_lsn, index, cause, (cause is not null)::int,
                   case when cause is not null then now() + interval '1 s' end
              from unnest($1::bigint[], $2::bigint[], $3::text[], $4::text[], $5::bigint[], $6::text[])
                   with ordinality as h (seq, key, txid, lsn, index, cause, place)
             order by place
            on conflict (seq) do nothing";
        let each = || entry.held.iter();
        let seqs: Vec<i64> = each().map(|held| held.place.seq).collect();
        let keys: Vec<i64> = each().map(|held| held.key.cast_signed()).collect();
        let transactions: Vec<String> = each().map(|held| held.place.transaction.unwrap_or(0).to_string()).collect();
        let lsns: Vec<String> = each().map(|held| Lsn(held.position.lsn).to_string()).collect();
        let indexes: Vec<i64> = each().map(|held| held.position.index.cast_signed()).collect();
        let causes: Vec<Option<&str>> = each().map(|held| held.cause.as_deref()).collect();
        client.execute(statement, &[&seqs, &keys, &transactions, &lsns, &indexes, &causes]).await?;
        first_is_due(client, keys).await?;
    }
    if !entry.refused.is_empty() {
        let statement = "
            update relay_held as h
               set cause = r.cause, attempts = attempts + 1,
                   retry_at = now() + least(interval '1 s' * (2 ^ least(attempts, 6)), interval '30 s')
              from unnest($1::bigint[], $2::text[]) as r (seq, cause) where h.seq = r.seq";
        let (seqs, causes): (Vec<i64>, Vec<&str>) =
            entry.refused.iter().map(|(seq, cause)| (*seq, cause.as_str())).unzip();
        client.execute(statement, &[&seqs, &causes]).await?;
    }
    let mut buried = Vec::new();
    if let Some(max_attempts) = max_attempts {
        let held = entry.held.iter().filter(|held| held.cause.is_some()).map(|held| held.place.seq);
        let refused: Vec<i64> = entry.refused.iter().map(|(seq, _)| *seq).chain(held).collect();
        if !refused.is_empty() {
            buried = dead::bury(client, &refused, max_attempts).await?;
            first_is_due(client, buried.clone()).await?;
        }
    }
    free(client, &entry.freed).await?;
    Ok(buried)
}

/// Removes events from the held ones; the next one of each key is due.
async fn free(client: &Client, seqs: &[i64]) -> Result<(), tokio_postgres::Error> {
    if seqs.is_empty() {
        return Ok(());
    }
    let keys = client.query("delete from relay_held where seq = any ($1) returning key", &[&seqs]).await?;
    let keys = keys.iter().map(|row| row.try_get(0)).collect::<Result<Vec<i64>, _>>()?;
    first_is_due(client, keys).await
}

/// The first event of each key is due, unless it was refused and waits.
async fn first_is_due(client: &Client, mut keys: Vec<i64>) -> Result<(), tokio_postgres::Error> {
    keys.sort_unstable();
    keys.dedup();
    let statement = "update relay_held set retry_at = now()
        where place in (select (select min(place) from relay_held where key = k) from unnest($1::bigint[]) as k)
          and retry_at is null";
    client.execute(statement, &[&keys]).await.map(drop)
}

/// An event's row was deleted: it is no longer held, and never published.
pub(crate) async fn skip(client: &Client, seqs: &[i64]) -> Result<(), SourceError> {
    within(RECORD_DEADLINE, "skipping events whose rows were deleted", free(client, seqs)).await
}

/// What is held, for the status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeldEvents {
    pub(crate) events: u64,
    /// How many of them the broker refuses; the others wait behind them.
    pub(crate) refused: u64,
    /// The first one of them.
    pub(crate) first: Option<Refused>,
}

/// A refused event whose row was not deleted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) id: String,
    pub(crate) cause: String,
}

/// `None`: nothing is held.
pub(crate) async fn held(client: &Client) -> Result<Option<HeldEvents>, SourceError> {
    let action = "reading weft.relay_held";
    let statement = "
        select (select count(*) from (select from relay_held limit 1000000) as counted),
               (select count(*) from (select from relay_held where retry_at is not null limit 1000000) as counted),
               coalesce(o.id, case when not pg_visible_in_snapshot(h.txid, pg_current_snapshot())
                                         then '(its row is not visible yet)' end) as id,
               h.cause
          from relay_held as h left join outbox as o using (seq)
         where h.retry_at is not null order by o.seq is null, h.cause is null, h.place limit 1";
    let Some(row) = within(DEADLINE, action, client.query_opt(statement, &[])).await? else { return Ok(None) };
    let failed = SourceError::query(action);
    let number = |index| row.try_get::<_, i64>(index).map_err(&failed).map(i64::unsigned_abs);
    let text = |index| row.try_get::<_, Option<String>>(index).map_err(&failed);
    // when its row was deleted, the event is about to be skipped
    let first = text(2)?.zip(text(3)?).map(|(id, cause)| Refused { id, cause });
    Ok(Some(HeldEvents { events: number(0)?, refused: number(1)?, first }))
}

/// Keys with held events.
pub(crate) async fn held_keys(client: &Client) -> Result<Vec<u64>, SourceError> {
    let action = "reading weft.relay_held";
    let statement = "select distinct key from relay_held";
    let rows = within(RECORD_DEADLINE, action, client.query(statement, &[])).await?;
    let keys = rows.iter().map(|row| row.try_get::<_, i64>(0).map(i64::cast_unsigned));
    keys.collect::<Result<_, _>>().map_err(SourceError::query(action))
}

/// Which of these keys have no held event.
pub(crate) async fn without_held(client: &Client, keys: &[u64]) -> Result<Vec<u64>, SourceError> {
    let action = "reading weft.relay_held";
    let keys: Vec<i64> = keys.iter().map(|key| key.cast_signed()).collect();
    let statement = "select k from unnest($1::bigint[]) as k
        where not exists (select from relay_held where key = k)";
    let rows = within(DEADLINE, action, client.query(statement, &[&keys])).await?;
    let keys = rows.iter().map(|row| row.try_get::<_, i64>(0).map(i64::cast_unsigned));
    keys.collect::<Result<_, _>>().map_err(SourceError::query(action))
}

impl<'a> Entry<'a> {
    /// Adds a mark's position.
    pub(crate) fn at(&mut self, point: &'a Point) {
        match point {
            Point::Slot { begins, snapshot, floor } => {
                (self.lsn, self.snapshot, self.floor) = (Some(*begins), snapshot.as_ref(), Some(*floor));
            }
            Point::Committed(lsn) => self.lsn = Some(*lsn),
            Point::Seen { snapshot, floor } => (self.snapshot, self.floor) = (Some(snapshot), Some(*floor)),
        }
    }

    /// Adds a snapshot that was taken before everything up to `lsn` was recorded, unless the mark has a later one.
    pub(crate) fn catch_up(&mut self, newer: &'a Snapshot) {
        self.snapshot.get_or_insert(newer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_newer_snapshot_changes_nothing_else_that_a_mark_records() {
        let (earlier, newer): (Snapshot, Snapshot) = ("5:5:".parse().unwrap(), "9:9:".parse().unwrap());
        let point = Point::Slot { begins: Lsn(7), snapshot: Some(earlier.clone()), floor: Lsn(8) };
        let mut entry = Entry::default();
        entry.at(&point);
        entry.catch_up(&newer);
        assert_eq!((entry.lsn, entry.snapshot, entry.floor), (Some(Lsn(7)), Some(&earlier), Some(Lsn(8))));
        let mut entry = Entry::default();
        entry.at(&Point::Committed(Lsn(7)));
        entry.catch_up(&newer);
        assert_eq!((entry.lsn, entry.snapshot, entry.floor), (Some(Lsn(7)), Some(&newer), None));
    }
}
