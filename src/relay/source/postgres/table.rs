//! Reads the outbox table.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use tokio::{sync::mpsc, time::timeout};
use tokio_postgres::{Client, Statement, types::ToSql};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::{
    DEADLINE,
    row::{self, SELECT_COLUMNS},
    snapshot::Snapshot,
};
use crate::{
    contract::DatabaseLogin,
    postgres::{login, replication::Lsn},
    relay::source::{BATCH_BYTES, BATCH_EVENTS, Batch, Item, Place, Row, SourceError, send, within},
};

/// The transaction that has inserted a row as the server knows it (`xmin` has its low half), which may be another one than
/// `txid` says: that is of another server when the row was restored from a dump.
macro_rules! inserted_by {
    () => {
        "((pg_snapshot_xmax(pg_current_snapshot())::text::bigint \
          - ((pg_snapshot_xmax(pg_current_snapshot())::text::bigint - o.xmin::text::bigint) & 4294967295))::text::xid8)"
    };
}
const INSERTED_BY: &str = inserted_by!();

/// The row `o` is published or held, when the ledger's snapshot is `s`.
pub(super) const SETTLED: &str =
    concat!("pg_visible_in_snapshot(o.txid, s) and pg_visible_in_snapshot(", inserted_by!(), ", s)");

/// An open query keeps the server from removing dead rows. When the broker accepts nothing for this long, the query is
/// cancelled, and started again after the last sent row when there is room.
const STALLED: Duration = Duration::from_secs(5);
/// Most rows of one query: it keeps the server from removing dead rows only for as long as these take.
const PAGE: i64 = 20_000;
/// Most rows that are found by their transactions, and sorted, at once. More are read page by page.
pub(super) const FEW: usize = 1000;

/// A connection that reads the outbox.
pub(crate) struct Reader {
    client: Client,
    page: Statement,
    newest: Statement,
    /// To cancel a query by.
    connector: MakeRustlsConnect,
}

/// Rows that one snapshot sees and an earlier one does not, in the order of `seq`.
#[derive(Debug)]
pub(super) struct Newest {
    pub(super) snapshot: Snapshot,
    /// A position in the write-ahead log that is not before any of their transactions.
    pub(super) lsn: Lsn,
    pub(super) rows: Vec<Row>,
}

impl Reader {
    /// Connects; the connection's task ends when the client is dropped.
    pub(crate) async fn new(login: &DatabaseLogin, application: &str) -> Result<Self, SourceError> {
        let options = format!("{} {}", login::UNLIMITED, login::search_path(login));
        let mut login = login::prepare(login, application).await?;
        login.config.options(options);
        let (client, connection) = login.open().await?;
        tokio::spawn(connection);
        let prepared = SourceError::query("preparing to read the outbox");
        // both statements use an index, however many dead rows the table has, and a page is never sorted
        let settings = "set enable_seqscan = off; set jit = off; set work_mem = '4MB'";
        client.batch_execute(settings).await.map_err(&prepared)?;
        // a page: rows that `$2` sees and the ledger's snapshot `$1` does not, in the order of the primary key. A row whose
        // transaction id was not assigned yet on this server was restored from another server's backup
        let page = format!(
            "select {SELECT_COLUMNS} \
               from outbox as o, (select $1::text::pg_snapshot as s, $2::text::pg_snapshot as now offset 0) as snapshots \
              where seq > $3 \
                and pg_visible_in_snapshot({INSERTED_BY}, now) \
                and (pg_visible_in_snapshot(txid, now) or txid >= pg_snapshot_xmax(pg_current_snapshot())) \
                and not ({SETTLED}) \
                and (select true from relay_held as h where h.seq = o.seq) is null \
              order by seq limit {PAGE}"
        );
        // the rows of few transactions, by their index (PgQ's algorithm, see `Snapshot`)
        let newest = format!(
            "with now as materialized \
                  (select pg_current_snapshot()::text as snapshot, pg_current_wal_insert_lsn()::text as lsn), \
                  rows as materialized \
                  (select {SELECT_COLUMNS} from outbox \
                    where txid >= $1::text::xid8 or txid = any ($2::text[]::xid8[]) limit {FEW} + 1) \
             select {SELECT_COLUMNS}, snapshot, lsn from now left join rows on true order by seq"
        );
        let page = client.prepare(&page).await.map_err(&prepared)?;
        let newest = client.prepare(&newest).await.map_err(&prepared)?;
        Ok(Self { client, page, newest, connector: login.connector() })
    }

    /// Which transactions are visible now, and a position that is not before any of them.
    pub(super) async fn now(&self) -> Result<(Snapshot, Lsn), SourceError> {
        let statement = "select pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text";
        let row = within(DEADLINE, "reading a snapshot", self.client.query_one(statement, &[])).await?;
        now(&row, 0)
    }

    /// Reads the rows that `previous` does not see, without those of restored rows. More than [`FEW`] rows are not all of
    /// them.
    pub(super) async fn newest(&self, previous: &Snapshot) -> Result<Newest, SourceError> {
        let action = "polling the outbox for new rows";
        let running: Vec<String> = previous.running().iter().map(u64::to_string).collect();
        let parameters: [&(dyn ToSql + Sync); 2] = [&previous.xmax().to_string(), &running];
        let found = within(DEADLINE, action, self.client.query(&self.newest, &parameters)).await?;
        let first = found.first().ok_or(SourceError::Layout("a query without its snapshot"))?;
        let (snapshot, lsn) = now(first, row::COLUMN_COUNT)?;
        let is_row = |row: &&tokio_postgres::Row| row::is_some(row);
        let rows = found.iter().filter(is_row).map(|row| read(row, lsn)).collect::<Result<_, _>>()?;
        Ok(Newest { snapshot, lsn, rows })
    }

    /// Sends the rows that `current` sees and `settled` does not, which are not held, in the order of `seq`, after the
    /// given one. `lsn` becomes their position.
    pub(super) async fn pages(
        &self,
        settled: Option<&Snapshot>,
        current: &Snapshot,
        after: i64,
        lsn: Lsn,
        batches: &mpsc::Sender<Batch>,
    ) -> Result<(), SourceError> {
        let settled = settled.map_or_else(|| Snapshot::nothing().to_string(), Snapshot::to_string);
        let current = current.to_string();
        let mut after = Some(after);
        while let Some(last) = after {
            after = self.page(&settled, &current, last, lsn, batches).await?;
        }
        Ok(())
    }

    /// Returns `None` when all were sent, else the `seq` after which to continue.
    async fn page(
        &self,
        settled: &str,
        current: &str,
        after: i64,
        lsn: Lsn,
        batches: &mpsc::Sender<Batch>,
    ) -> Result<Option<i64>, SourceError> {
        let action = SourceError::query("reading the outbox");
        let parameters: [&(dyn ToSql + Sync); 3] = [&settled, &current, &after];
        let rows = self.client.query_raw(&self.page, parameters).await.map_err(&action)?;
        let mut rows = std::pin::pin!(rows);
        let (mut batch, mut bytes, mut count, mut last) = (Vec::new(), 0, 0, after);
        while let Some(row) = rows.next().await {
            let row = read(&row.map_err(&action)?, lsn)?;
            (count, last) = (count + 1, row.place.seq);
            bytes += row.event.size();
            batch.push(Item::Event(row));
            if batch.len() < BATCH_EVENTS && bytes < BATCH_BYTES {
                continue;
            }
            bytes = 0;
            if let Some(unsent) = send_or_stall(batches, std::mem::take(&mut batch)).await? {
                // cancel the query, or the server would read the remaining rows for nothing
                let _ = timeout(DEADLINE, self.client.cancel_token().cancel_query(self.connector.clone())).await;
                while let Ok(Some(_)) = rows.try_next().await {}
                send(batches, unsent).await?;
                return Ok(Some(last));
            }
        }
        send(batches, batch).await?;
        Ok((count == PAGE).then_some(last))
    }
}

fn read(row: &tokio_postgres::Row, lsn: Lsn) -> Result<Row, SourceError> {
    let (event, seq) = row::event(row, lsn.0)?;
    let committed_at = event.created_at;
    Ok(Row { event, place: Place { seq, transaction: None }, committed_at })
}

/// Snapshot and position, from the columns `first` and the next one.
fn now(row: &tokio_postgres::Row, first: usize) -> Result<(Snapshot, Lsn), SourceError> {
    let column = |index| row.try_get::<_, &str>(index).map_err(SourceError::query("reading a snapshot"));
    let snapshot = column(first)?.parse().map_err(|_| SourceError::Layout("a snapshot cannot be read"))?;
    Ok((snapshot, column(first + 1)?.parse()?))
}

/// Sends the batch, or returns it when there was no room for it within [`STALLED`].
async fn send_or_stall(batches: &mpsc::Sender<Batch>, batch: Batch) -> Result<Option<Batch>, SourceError> {
    match timeout(STALLED, batches.reserve()).await {
        Ok(Ok(permit)) => {
            permit.send(batch);
            Ok(None)
        }
        Ok(Err(_closed)) => Err(SourceError::Ended),
        Err(_elapsed) => Ok(Some(batch)),
    }
}
