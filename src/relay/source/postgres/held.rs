//! Reads held events again, from `weft.relay_held` and the outbox.

use tokio_postgres::Client;

use super::{DEADLINE, row};
use crate::{
    domain::event::{Event, Position},
    postgres::replication::Lsn,
    relay::source::{Place, SourceError, within},
};

/// Most events that are read at once, and about how many bytes of payload.
pub(super) const EVENTS: usize = 256;
const BYTES: i64 = 4 * 1024 * 1024;

/// A held event.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) place: Place,
    pub(crate) key: u64,
    /// `None`: its row is not in the outbox, or not visible.
    pub(crate) event: Option<Event>,
}

/// The first ones of their keys whose next attempt is due, without those of the keys `but`.
pub(crate) async fn due(client: &Client, but: &[u64]) -> Result<Vec<Found>, SourceError> {
    read(client, "h.retry_at <= now() and h.key <> all ($1)", but).await
}

/// The ones of these keys, in their order.
pub(crate) async fn of_keys(client: &Client, keys: &[u64]) -> Result<Vec<Found>, SourceError> {
    read(client, "h.key = any ($1)", keys).await
}

async fn read(client: &Client, condition: &str, keys: &[u64]) -> Result<Vec<Found>, SourceError> {
    let action = "reading held events";
    let keys: Vec<i64> = keys.iter().map(|key| key.cast_signed()).collect();
    let statement = format!(
        "with candidates as materialized (
             select h.*, coalesce(pg_column_size(o.payload), pg_column_size(o.body), 0) as size
               from relay_held as h left join outbox as o using (seq)
              where {condition} order by h.place limit {EVENTS}
         ),
         few as (select *, sum(size) over (order by place) as total, min(place) over () as first from candidates)
         select {columns}, o.id is not null, h.key, h.txid::text, h.lsn::text, h.index, h.seq
           from few as h left join outbox as o using (seq)
          where h.total <= {BYTES} or h.place = h.first
          order by h.place",
        columns = row::SELECT_COLUMNS
    );
    let rows = within(DEADLINE, action, client.query(&statement, &[&keys])).await?;
    rows.iter()
        .map(|row| found(row).map_err(|error| error.unwrap_or(SourceError::Layout("a held event cannot be read"))))
        .collect()
}

fn found(row: &tokio_postgres::Row) -> Result<Found, Option<SourceError>> {
    let failed = |error| Some(SourceError::query("reading a held event")(error));
    let column = row::COLUMN_COUNT;
    let number = |index| row.try_get::<_, i64>(column + index).map_err(failed);
    let text = |index| row.try_get::<_, &str>(column + index).map_err(failed);
    let transaction: u64 = text(2)?.parse().map_err(|_| None)?;
    let place = Place { seq: number(5)?, transaction: (transaction != 0).then_some(transaction) };
    let key = number(1)?.cast_unsigned();
    if !row.try_get::<_, bool>(column).map_err(failed)? {
        return Ok(Found { place, key, event: None });
    }
    let lsn: Lsn = text(3)?.parse().map_err(|_| None)?;
    let (event, _seq) = row::event(row, 0).map_err(Some)?;
    let position = Position { lsn: lsn.0, index: number(4)?.cast_unsigned() };
    Ok(Found { place, key, event: Some(Event { position, ..event }) })
}
