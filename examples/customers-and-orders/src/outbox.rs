//! Events: each is a row in the outbox, written in the transaction that changes the data. Weft's relay publishes it.

use axum::http::HeaderMap;
use deadpool_postgres::Transaction;
use serde_json::{Map, Value};

/// Writes an event of an aggregate. Change the aggregate's own row first: its lock determines the order of the
/// aggregate's events.
pub async fn emit(
    transaction: &Transaction<'_>,
    (aggregate_type, aggregate_id): (&str, &str),
    event_type: &str,
    payload: Value,
    trace: &Value,
) -> Result<(), tokio_postgres::Error> {
    let sql = "insert into outbox (aggregate_type, aggregate_id, type, payload, headers) values ($1, $2, $3, $4, $5)";
    transaction.execute(sql, &[&aggregate_type, &aggregate_id, &event_type, &payload, trace]).await?;
    Ok(())
}

/// The headers of a request that its events must contain too, so that one order can be traced through all services.
pub fn trace(headers: &HeaderMap) -> Value {
    let carried = ["traceparent", "tracestate", "correlationid"];
    let found = carried.iter().filter_map(|&name| Some((name.to_owned(), headers.get(name)?.to_str().ok()?.into())));
    Value::Object(found.collect::<Map<_, _>>())
}
