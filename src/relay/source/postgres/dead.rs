//! Dead letters, `weft.relay_dead`: events that were given up, each with its cause. They stay until a person retries or
//! purges them.

use tokio_postgres::Client;

use super::DEADLINE;
use crate::relay::source::{SourceError, within};

/// What is given up, for the status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeadEvents {
    /// Counted up to 10,000.
    pub(crate) events: u64,
    /// Id of the one that was given up last.
    pub(crate) latest: String,
    pub(crate) cause: String,
}

/// Common table expressions, to be put behind one that is called `due` and has `seq`, `attempts` and `cause` of rows of the outbox: they
/// become dead letters.
pub(crate) const LETTERS: &str = "letters as (
        delete from outbox as o using due where o.seq = due.seq returning o.*, due.attempts, due.cause
    ), kept as (
        insert into relay_dead select letters.*, now() from letters
    )";

/// Moves those of these held events to the dead letters that have been refused `attempts` times. Returns their keys. One whose
/// row is locked by somebody, or not visible yet, stays held, and is moved when it is refused again.
pub(super) async fn bury(client: &Client, seqs: &[i64], attempts: u32) -> Result<Vec<i64>, tokio_postgres::Error> {
    let statement = format!(
        "with due as (
            select h.seq, h.key, h.attempts, h.cause from relay_held as h join outbox as o using (seq)
             where h.seq = any ($1) and h.attempts >= $2 for update of o skip locked
        ), {LETTERS}
        delete from relay_held as h using due where h.seq = due.seq returning h.key"
    );
    let attempts = i32::try_from(attempts).unwrap_or(i32::MAX);
    let keys = client.query(&statement, &[&seqs, &attempts]).await?;
    keys.iter().map(|row| row.try_get(0)).collect()
}

/// `None`: nothing is given up.
pub(crate) async fn dead(client: &Client) -> Result<Option<DeadEvents>, SourceError> {
    let action = "reading weft.relay_dead";
    let statement = "
        select (select count(*) from (select from relay_dead limit 10000) as counted), id, cause
          from relay_dead order by died_at desc, seq desc limit 1";
    let Some(row) = within(DEADLINE, action, client.query_opt(statement, &[])).await? else { return Ok(None) };
    let failed = SourceError::query(action);
    let text = |index| row.try_get::<_, String>(index).map_err(&failed);
    Ok(Some(DeadEvents {
        events: row.try_get::<_, i64>(0).map_err(&failed)?.unsigned_abs(),
        latest: text(1)?,
        cause: text(2)?,
    }))
}
