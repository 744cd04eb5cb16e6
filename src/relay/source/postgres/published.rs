//! Published events that are kept for a while, `weft.relay_published`: to be looked up, and to be published again.
//!
//! Eight tables take turns, and the oldest one is emptied as a whole: nothing is deleted row by row, so nothing is left to be
//! vacuumed (the table rotation of PgQ, <https://www.pgq.dev>). The outbox itself never has what is published, whatever is kept.

use std::time::Duration;

use tokio_postgres::{Client, error::SqlState};

use super::DEADLINE;
use crate::relay::source::{SourceError, within};

/// Number of the tables.
const TURNS: u32 = 8;
const ACTION: &str = "emptying the oldest of weft.relay_published";

/// A common table expression, to be put behind one that is called `gone` and returns all columns of deleted rows of the outbox.
pub(super) const KEPT: &str = ",
    kept as (insert into relay_published select gone.*, now(), turn from gone, relay_turn)";

/// Begins the next turn when the present one has lasted a seventh of `keep`: what the other seven tables have is younger. With
/// nothing to keep, empties all of them. Returns whether that was possible: while somebody reads them it is not.
pub(super) async fn rotate(client: &Client, keep: Duration) -> Result<bool, SourceError> {
    within(DEADLINE, ACTION, client.batch_execute("begin")).await?;
    let emptied = async {
        if keep.is_zero() {
            empty(client).await?;
        } else {
            turn(client, keep.as_secs_f64() / f64::from(TURNS - 1)).await?;
        }
        client.batch_execute("commit").await
    };
    match within(DEADLINE, ACTION, emptied).await {
        Ok(()) => Ok(true),
        Err(SourceError::Query { source, .. }) if source.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
            within(DEADLINE, ACTION, client.batch_execute("rollback")).await?;
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

async fn turn(client: &Client, seconds: f64) -> Result<(), tokio_postgres::Error> {
    let due = format!(
        "update relay_turn set turn = (turn + 1) % {TURNS}, since = now()
          where since <= now() - $1 * interval '1 s' returning turn"
    );
    let Some(turn) = client.query_opt(&due, &[&seconds]).await? else { return Ok(()) };
    let turn: i16 = turn.try_get(0)?;
    client.batch_execute(&format!("truncate weft.relay_published_{turn}")).await
}

async fn empty(client: &Client) -> Result<(), tokio_postgres::Error> {
    let any = client.query_one("select exists (select from relay_published)", &[]).await?;
    if !any.try_get(0)? {
        return Ok(());
    }
    let tables: Vec<String> = (0..TURNS).map(|turn| format!("weft.relay_published_{turn}")).collect();
    client.batch_execute(&format!("truncate {}", tables.join(", "))).await
}
