//! What the inbox keeps in the service's database: positions, held events and dead letters.

use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use tokio_postgres::{
    Client, Row,
    types::{Json, ToSql},
};

use super::{event::Event, source::Position};
use crate::postgres::session::{SessionError, within};

/// Deadline of a statement.
const DEADLINE: Duration = Duration::from_secs(10);
/// Held events that are read at a time.
const LIMIT: i64 = 32;

/// The tables, for one subscription.
#[derive(Clone, Copy, Debug)]
pub(super) struct Store<'a> {
    pub client: &'a Client,
    pub subscription: &'a str,
}

/// An event on its way into `weft.inbox_held`.
#[derive(Debug)]
pub(super) struct NewlyHeld {
    pub sequence: u64,
    pub key: u64,
    pub stored_at: Timestamp,
    pub event: Event,
    /// Of the one that failed; of those behind it there is none.
    pub failure: Option<Failure>,
}

#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub attempts: u32,
    pub cause: String,
    /// When it is delivered again; `None`: it is a dead letter.
    pub again_in: Option<Duration>,
}

/// A held event whose turn it is.
#[derive(Debug)]
pub(super) struct Held {
    pub place: i64,
    pub key: u64,
    pub attempts: u32,
    pub event: Event,
}

/// What is held, and what is given up.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub held: u64,
    pub dead: u64,
    pub oldest: Option<Timestamp>,
    /// Id and cause of the held event that has failed last, and of the latest dead letter.
    pub refused: Option<(String, String)>,
    pub latest_dead: Option<(String, String)>,
}

const HELD_COLUMNS: &str = "place, key, attempts, event, data";

impl Store<'_> {
    /// The recorded position, and how many events were handled so far.
    pub(super) async fn position(&self) -> Result<Option<(Position, u64)>, SessionError> {
        let action = "reading weft.inbox_position";
        let sql = "select stream, stream_created, next, settled, consumed from inbox_position where subscription = $1";
        let row = within(DEADLINE, action, self.client.query_opt(sql, &[&self.subscription])).await?;
        let read = |row: Row| {
            let position = Position {
                stream: row.try_get(0)?,
                stream_created: row.try_get(1)?,
                next: row.try_get::<_, i64>(2)?.unsigned_abs(),
                settled: row.try_get::<_, Vec<i64>>(3)?.into_iter().map(i64::unsigned_abs).collect(),
            };
            Ok((position, row.try_get::<_, i64>(4)?.unsigned_abs()))
        };
        row.map(read).transpose().map_err(SessionError::query(action))
    }

    /// Records the position. Everything before it must be settled.
    pub(super) async fn record(&self, position: &Position, consumed: u64) -> Result<(), SessionError> {
        let sql = "insert into inbox_position (subscription, stream, stream_created, next, settled, consumed)
            values ($1, $2, $3, $4, $5, $6)
            on conflict (subscription) do update set stream = excluded.stream,
                stream_created = excluded.stream_created, next = excluded.next, settled = excluded.settled,
                consumed = excluded.consumed, updated_at = now()";
        let Position { stream, stream_created, next, settled } = position;
        let (next, consumed) = (signed(*next), signed(consumed));
        let settled: Vec<i64> = settled.iter().copied().map(signed).collect();
        let values: [&(dyn ToSql + Sync); 6] = [&self.subscription, stream, stream_created, &next, &settled, &consumed];
        let written = self.client.execute(sql, &values);
        within(DEADLINE, "writing weft.inbox_position", written).await.map(drop)
    }

    /// The keys with held events. Whatever a person or a killed process has left: the first event of each has its turn.
    pub(super) async fn held_keys(&self) -> Result<Vec<u64>, SessionError> {
        let action = "reading weft.inbox_held";
        let sql = "update inbox_held as h set retry_at = now()
              from (select distinct on (key) place, retry_at from inbox_held
                     where subscription = $1 and died_at is null order by key, place) as first
             where h.place = first.place and first.retry_at is null";
        within(DEADLINE, action, self.client.execute(sql, &[&self.subscription])).await?;
        let sql = "select distinct key from inbox_held where subscription = $1 and died_at is null";
        let rows = within(DEADLINE, action, self.client.query(sql, &[&self.subscription])).await?;
        let keys = rows.iter().map(|row| row.try_get::<_, i64>(0).map(i64::cast_unsigned));
        keys.collect::<Result<_, _>>().map_err(SessionError::query(action))
    }

    /// Holds events behind those of their keys that are held already, or buries them. What is known already stays as it is.
    pub(super) async fn hold(&self, stream_created: &str, events: &[NewlyHeld]) -> Result<(), SessionError> {
        let sql = "insert into inbox_held
                (subscription, stream_created, key, sequence, event, data, stored_at, attempts, cause, retry_at, died_at)
            select $1, $2, e.key, e.sequence, e.event::jsonb, e.data, e.stored_at, coalesce(e.attempts, 0), e.cause,
                case when e.again_ms is not null then now() + e.again_ms * interval '1 millisecond'
                     -- the first of its key that waits has its turn at once
                     when e.cause is null and e.index = 1 and not e.has_first and not exists (
                         select from inbox_held as h
                          where h.subscription = $1 and h.key = e.key and h.died_at is null) then now() end,
                case when e.cause is not null and e.again_ms is null then now() end
              from (select *, row_number() over (partition by key, cause is null order by sequence) as index,
                           bool_or(again_ms is not null) over (partition by key) as has_first
                      from unnest($3::bigint[], $4::bigint[], $5::text[], $6::bytea[], $7::timestamptz[], $8::int[],
                                  $9::text[], $10::bigint[])
                        as u (key, sequence, event, data, stored_at, attempts, cause, again_ms)) as e
             order by e.sequence
            on conflict do nothing";
        let column = |of: fn(&NewlyHeld) -> i64| events.iter().map(of).collect::<Vec<_>>();
        let keys = column(|held| held.key.cast_signed());
        let sequences = column(|held| signed(held.sequence));
        let written: Vec<String> = events.iter().map(|held| held.event.to_record()).collect();
        let data: Vec<&[u8]> = events.iter().map(|held| &held.event.data[..]).collect();
        let stored: Vec<Timestamp> = events.iter().map(|held| held.stored_at).collect();
        let failures = || events.iter().map(|held| held.failure.as_ref());
        let attempts: Vec<Option<i32>> =
            failures().map(|failure| failure.map(|failure| failure.attempts.cast_signed())).collect();
        let causes: Vec<Option<String>> =
            failures().map(|failure| failure.map(|failure| failure.cause.replace('\0', ""))).collect();
        let again: Vec<Option<i64>> = failures().map(|failure| failure?.again_in.map(milliseconds)).collect();
        let columns: [&(dyn ToSql + Sync); 8] =
            [&keys, &sequences, &written, &data, &stored, &attempts, &causes, &again];
        let values: Vec<_> =
            [&self.subscription as &(dyn ToSql + Sync), &stream_created].into_iter().chain(columns).collect();
        let inserted = self.client.execute(sql, &values);
        within(DEADLINE, "writing weft.inbox_held", inserted).await.map(drop)
    }

    /// Events whose turn has come, each the first of its key, the oldest turn first; those of `busy` keys are left out.
    pub(super) async fn due(&self, busy: &[i64]) -> Result<Vec<Held>, SessionError> {
        let action = "reading weft.inbox_held";
        let sql = format!(
            "select {HELD_COLUMNS} from inbox_held as h
              where subscription = $1 and died_at is null and retry_at <= now() and key <> all ($2)
                and not exists (select from inbox_held as before
                     where before.subscription = $1 and before.key = h.key and before.died_at is null
                       and before.place < h.place)
              order by retry_at limit {LIMIT}"
        );
        let rows = within(DEADLINE, action, self.client.query(&sql, &[&self.subscription, &busy])).await?;
        rows.iter().map(held).collect::<Result<_, _>>().map_err(SessionError::query(action))
    }

    /// The event is handled: returns the next one of its key, whose turn it is.
    pub(super) async fn settled(&self, event: &Held) -> Result<Option<Held>, SessionError> {
        self.gone("delete from inbox_held where place = $1", event, &[]).await
    }

    /// The event becomes a dead letter: returns the next one of its key, whose turn it is.
    pub(super) async fn bury(&self, event: &Held, attempts: u32, cause: &str) -> Result<Option<Held>, SessionError> {
        let bury = "update inbox_held set died_at = now(), retry_at = null, attempts = $4, cause = $5
             where place = $1 and died_at is null";
        self.gone(bury, event, &[&attempts.cast_signed(), &cause.replace('\0', "")]).await
    }

    /// `gone`: what becomes of the event, in one transaction with the turn of the next one.
    async fn gone(&self, gone: &str, event: &Held, more: &[&(dyn ToSql + Sync)]) -> Result<Option<Held>, SessionError> {
        let action = "writing weft.inbox_held";
        let sql = format!(
            "with gone as ({gone})
             update inbox_held as h set retry_at = now()
              where h.place = (select min(place) from inbox_held
                                where subscription = $2 and key = $3 and died_at is null and place <> $1)
             returning {HELD_COLUMNS}"
        );
        let key = event.key.cast_signed();
        let mut values: Vec<&(dyn ToSql + Sync)> = vec![&event.place, &self.subscription, &key];
        values.extend(more);
        let row = within(DEADLINE, action, self.client.query_opt(&sql, &values)).await?;
        row.as_ref().map(held).transpose().map_err(SessionError::query(action))
    }

    /// The event was delivered in vain again.
    pub(super) async fn failed(&self, event: &Held, failure: &Failure) -> Result<(), SessionError> {
        let sql = "update inbox_held set attempts = $2, cause = $3,
                retry_at = now() + $4::bigint * interval '1 millisecond'
             where place = $1 and died_at is null";
        let (attempts, again) = (failure.attempts.cast_signed(), failure.again_in.map_or(0, milliseconds));
        let cause = failure.cause.replace('\0', "");
        let values: [&(dyn ToSql + Sync); 4] = [&event.place, &attempts, &cause, &again];
        let written = self.client.execute(sql, &values);
        within(DEADLINE, "writing weft.inbox_held", written).await.map(drop)
    }

    pub(super) async fn count(&self) -> Result<Counted, SessionError> {
        let action = "counting weft.inbox_held";
        let sql = "select
            (select count(*) from (select from inbox_held
                where subscription = $1 and died_at is null limit 1000000) as counted),
            (select count(*) from (select from inbox_held
                where subscription = $1 and died_at is not null limit 10000) as counted),
            (select min(stored_at) from (select stored_at from inbox_held
                where subscription = $1 and died_at is null and retry_at is not null limit 10000) as heads),
            (select array[coalesce(event -> 'attributes' ->> 'id', ''), cause] from inbox_held
                where subscription = $1 and died_at is null and retry_at is not null and cause is not null
                order by retry_at desc limit 1),
            (select array[coalesce(event -> 'attributes' ->> 'id', ''), cause] from inbox_held
                where subscription = $1 and died_at is not null order by died_at desc limit 1)";
        let row = within(DEADLINE, action, self.client.query_one(sql, &[&self.subscription])).await?;
        let pair = |texts: Option<Vec<String>>| {
            let [id, cause] = <[String; 2]>::try_from(texts?).ok()?;
            Some((id, cause))
        };
        let read = || {
            Ok(Counted {
                held: row.try_get::<_, i64>(0)?.unsigned_abs(),
                dead: row.try_get::<_, i64>(1)?.unsigned_abs(),
                oldest: row.try_get(2)?,
                refused: pair(row.try_get(3)?),
                latest_dead: pair(row.try_get(4)?),
            })
        };
        read().map_err(SessionError::query(action))
    }
}

fn held(row: &Row) -> Result<Held, tokio_postgres::Error> {
    let Json(mut event): Json<Event> = row.try_get(3)?;
    event.data = Bytes::from(row.try_get::<_, Vec<u8>>(4)?);
    Ok(Held {
        place: row.try_get(0)?,
        key: row.try_get::<_, i64>(1)?.cast_unsigned(),
        attempts: row.try_get::<_, i32>(2)?.unsigned_abs(),
        event,
    })
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn milliseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}
