//! Events: each is a row in the outbox, written in the transaction that changes the data. Weft's relay publishes it.

use deadpool_postgres::Transaction;
use serde_json::Value;

/// Writes an event of an aggregate. Change the aggregate's own row first: its lock determines the order of the
/// aggregate's events.
pub async fn emit(
    transaction: &Transaction<'_>,
    (aggregate_type, aggregate_id): (&str, &str),
    event_type: &str,
    payload: Value,
) -> Result<(), tokio_postgres::Error> {
    let sql = "insert into outbox (aggregate_type, aggregate_id, type, payload) values ($1, $2, $3, $4)";
    transaction.execute(sql, &[&aggregate_type, &aggregate_id, &event_type, &payload]).await?;
    Ok(())
}
