//! Reading the outbox table: all rows that one snapshot sees and another does not, in the order of `seq`.

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

/// An open query keeps the server from removing dead rows: when the broker takes nothing for so long, the query is given up,
/// and begun again behind the last row when there is room.
const STALLED: Duration = Duration::from_secs(5);
/// Deadline of short statements.
const DEADLINE: Duration = Duration::from_secs(30);

/// A connection that reads.
#[derive(Debug)]
pub(crate) struct Reader {
    client: Client,
    window: Statement,
    probe: Statement,
}

/// What a probe saw.
#[derive(Debug)]
pub(crate) struct Probe {
    pub(crate) snapshot: Snapshot,
    /// The WAL's insert position.
    pub(crate) lsn: Lsn,
    /// Whether there is a row that the probe sees and `previous` did not.
    pub(crate) any: bool,
}

impl Reader {
    /// Connects; the connection's task ends with the client.
    pub(crate) async fn connect(login: &DatabaseLogin, application: &str) -> Result<Self, SourceError> {
        let mut config = login::config(login, application).await?;
        config.options(login::UNLIMITED);
        let (client, connection) = login::open(login, &config).await?;
        tokio::spawn(connection);
        // rows to come are found by (txid, seq), however many dead rows the table has
        let settings = "set enable_seqscan = off; set work_mem = '16MB'; set jit = off";
        client.batch_execute(settings).await.map_err(SourceError::query("preparing to read the outbox"))?;
        let prepared = SourceError::query("preparing to read the outbox");
        // a row is in the window when the transaction that wrote it is seen by $2 and was not by $1 (PgQ). One that is here
        // with an id which no transaction has had yet ($4) came with a backup of another server
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

    /// Looks for rows that `previous` does not see, or any at all.
    pub(crate) async fn probe(&self, previous: Option<&Snapshot>) -> Result<Probe, SourceError> {
        let previous = text(previous);
        let doing = "looking for new rows of the outbox";
        let row = within(DEADLINE, doing, self.client.query_one(&self.probe, &[&previous])).await?;
        let column = |index| row.try_get::<_, &str>(index).map_err(SourceError::query("reading a snapshot"));
        let snapshot = column(0)?.parse().map_err(|_| SourceError::Layout("a snapshot cannot be read"))?;
        let any = row.try_get(2).map_err(SourceError::query("reading a snapshot"))?;
        Ok(Probe { snapshot, lsn: column(1)?.parse()?, any })
    }

    /// What the snapshot that another connection exported sees.
    pub(crate) async fn import(&self, name: &str) -> Result<Snapshot, SourceError> {
        let name = name.replace('\'', "''");
        let begin = format!("begin isolation level repeatable read read only; set transaction snapshot '{name}'");
        let question = async {
            self.client.batch_execute(&begin).await?;
            let row = self.client.query_one("select pg_current_snapshot()::text", &[]).await?;
            self.client.batch_execute("commit").await?;
            row.try_get::<_, String>(0)
        };
        let text = within(DEADLINE, "importing the slot's snapshot", question).await?;
        text.parse().map_err(|_| SourceError::Layout("a snapshot cannot be read"))
    }

    /// Sends the rows between two snapshots, oldest `seq` first; `lsn` becomes their position. Without a previous one these
    /// are all that the table has, rows from elsewhere too, but for those of transactions that `current` does not see.
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

    /// `None` when all were sent, else the `seq` behind which to begin again.
    async fn some_rows(
        &self,
        previous: Option<&Snapshot>,
        current: &Snapshot,
        lsn: Lsn,
        after: i64,
        batches: &mpsc::Sender<Batch>,
    ) -> Result<Option<i64>, SourceError> {
        let doing = SourceError::query("reading the outbox");
        let foreign = previous.is_none();
        let (previous, current) = (text(previous), current.to_string());
        let parameters: [&(dyn ToSql + Sync); 4] = [&previous, &current, &after, &foreign];
        let rows = self.client.query_raw(&self.window, parameters).await.map_err(&doing)?;
        let mut rows = std::pin::pin!(rows);
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.next().await {
            let (event, seq) = row::event(&row.map_err(&doing)?, lsn.0)?;
            bytes += event.size();
            batch.push(Item::Event(event));
            if batch.len() < BATCH_EVENTS && bytes < BATCH_BYTES {
                continue;
            }
            bytes = 0;
            if let Some(unsent) = send_or_stall(batches, std::mem::take(&mut batch)).await? {
                // the rest of the answer is not wanted: end the query before the rows are read to no purpose
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

/// Gives the batch back when there was no room for it in time.
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
