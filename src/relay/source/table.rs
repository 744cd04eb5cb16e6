//! Reads the outbox table: all rows that one snapshot sees and another does not, in the order of `seq`.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use tokio::{sync::mpsc, time::timeout};
use tokio_postgres::{Client, NoTls, Statement, types::ToSql};

use super::{
    BATCH_BYTES, BATCH_EVENTS, Batch, Item, SourceError,
    row::{self, SELECT_COLUMNS},
    snapshot::Snapshot,
    within,
};
use crate::{
    contract::DatabaseLogin,
    postgres::{login, replication::Lsn},
};

/// An open query keeps the server from removing dead rows. When the broker accepts nothing for this long, the query is
/// cancelled, and started again after the last sent row when there is room.
const STALLED: Duration = Duration::from_secs(5);
/// Deadline of short statements.
const DEADLINE: Duration = Duration::from_secs(30);

/// A connection that reads the outbox.
#[derive(Debug)]
pub(crate) struct Reader {
    client: Client,
    window: Statement,
    probe: Statement,
}

/// The result of a probe.
#[derive(Debug)]
pub(crate) struct Probe {
    pub(crate) snapshot: Snapshot,
    /// The WAL's insert position.
    pub(crate) lsn: Lsn,
    /// Whether there is a row that the probe sees and `previous` did not.
    pub(crate) has_rows: bool,
}

impl Reader {
    /// Connects; the connection's task ends when the client is dropped.
    pub(crate) async fn connect(login: &DatabaseLogin, application: &str) -> Result<Self, SourceError> {
        let mut config = login::config(login, application).await?;
        config.options(login::UNLIMITED);
        let (client, connection) = login::open(login, &config).await?;
        tokio::spawn(connection);
        // the plan must use the index on (txid, seq), however many dead rows the table has
        let settings = "set enable_seqscan = off; set work_mem = '16MB'; set jit = off";
        client.batch_execute(settings).await.map_err(SourceError::query("preparing to read the outbox"))?;
        let prepared = SourceError::query("preparing to read the outbox");
        // a row is in the window when its transaction is visible in $2 and was not in $1 (PgQ); a row whose transaction
        // id was not assigned yet on this server ($4) was restored from another server's backup
        let window = format!(
            "select {SELECT_COLUMNS} from weft.outbox \
             where (txid >= pg_snapshot_xmax($1::text::pg_snapshot) \
                    or txid = any (array(select pg_snapshot_xip($1::text::pg_snapshot)))) \
               and (pg_visible_in_snapshot(txid, $2::text::pg_snapshot) \
                    or ($4 and txid >= pg_snapshot_xmax(pg_current_snapshot()))) \
               and seq > $3 \
             order by seq"
        );
        let probe = "select pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text, \
             exists (select from weft.outbox where txid >= pg_snapshot_xmax($1::text::pg_snapshot) \
                     and pg_visible_in_snapshot(txid, pg_current_snapshot())) \
             or exists (select from weft.outbox where txid = any (array(select pg_snapshot_xip($1::text::pg_snapshot))) \
                     and pg_visible_in_snapshot(txid, pg_current_snapshot()))";
        let window = client.prepare(&window).await.map_err(&prepared)?;
        let probe = client.prepare(probe).await.map_err(&prepared)?;
        Ok(Self { client, window, probe })
    }

    /// Finds out whether there are rows that `previous` does not see (without it: any rows at all).
    pub(crate) async fn probe(&self, previous: Option<&Snapshot>) -> Result<Probe, SourceError> {
        let previous = text(previous);
        let action = "polling the outbox for new rows";
        let row = within(DEADLINE, action, self.client.query_one(&self.probe, &[&previous])).await?;
        let column = |index| row.try_get::<_, &str>(index).map_err(SourceError::query("reading a snapshot"));
        let snapshot = column(0)?.parse().map_err(|_| SourceError::Layout("a snapshot cannot be read"))?;
        let has_rows = row.try_get(2).map_err(SourceError::query("reading a snapshot"))?;
        Ok(Probe { snapshot, lsn: column(1)?.parse()?, has_rows })
    }

    /// Imports the snapshot that another connection exported.
    pub(crate) async fn import(&self, name: &str) -> Result<Snapshot, SourceError> {
        let name = name.replace('\'', "''");
        let begin = format!("begin isolation level repeatable read read only; set transaction snapshot '{name}'");
        let query = async {
            self.client.batch_execute(&begin).await?;
            let row = self.client.query_one("select pg_current_snapshot()::text", &[]).await?;
            self.client.batch_execute("commit").await?;
            row.try_get::<_, String>(0)
        };
        let text = within(DEADLINE, "importing the slot's snapshot", query).await?;
        text.parse().map_err(|_| SourceError::Layout("a snapshot cannot be read"))
    }

    /// Sends the rows between two snapshots in the order of `seq`; `lsn` becomes their position. Without a previous
    /// snapshot these are all rows of the table, restored ones included, except those of transactions that `current`
    /// does not see.
    pub(crate) async fn rows(
        &self,
        previous: Option<&Snapshot>,
        current: &Snapshot,
        lsn: Lsn,
        batches: &mpsc::Sender<Batch>,
    ) -> Result<(), SourceError> {
        let mut after = i64::MIN;
        while let Some(next) = self.some_rows(previous, current, lsn, after, batches).await? {
            after = next;
        }
        Ok(())
    }

    /// Sends rows with a `seq` greater than `after`. Returns `None` when all were sent, else the `seq` after which to
    /// continue.
    async fn some_rows(
        &self,
        previous: Option<&Snapshot>,
        current: &Snapshot,
        lsn: Lsn,
        after: i64,
        batches: &mpsc::Sender<Batch>,
    ) -> Result<Option<i64>, SourceError> {
        let action = SourceError::query("reading the outbox");
        let foreign = previous.is_none();
        let (previous, current) = (text(previous), current.to_string());
        let parameters: [&(dyn ToSql + Sync); 4] = [&previous, &current, &after, &foreign];
        let rows = self.client.query_raw(&self.window, parameters).await.map_err(&action)?;
        let mut rows = std::pin::pin!(rows);
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.next().await {
            let (event, seq) = row::event(&row.map_err(&action)?, lsn.0)?;
            bytes += event.size();
            batch.push(Item::Event(event));
            if batch.len() < BATCH_EVENTS && bytes < BATCH_BYTES {
                continue;
            }
            bytes = 0;
            if let Some(unsent) = send_or_stall(batches, std::mem::take(&mut batch)).await? {
                // cancel the query, or the server would read the remaining rows for nothing
                let _ = timeout(DEADLINE, self.client.cancel_token().cancel_query(NoTls)).await;
                while let Ok(Some(_)) = rows.try_next().await {}
                super::send(batches, unsent).await?;
                return Ok(Some(seq));
            }
        }
        super::send(batches, batch).await?;
        Ok(None)
    }
}

fn text(previous: Option<&Snapshot>) -> String {
    previous.map_or_else(|| Snapshot::nothing().to_string(), Snapshot::to_string)
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
