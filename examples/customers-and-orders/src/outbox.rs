//! Events: a row in the outbox, in the same transaction as the change that it tells of. Weft's relay publishes it.

use axum::http::HeaderMap;
use deadpool_postgres::Transaction;
use serde_json::{Map, Value};

/// Writes an event of one aggregate. Change the aggregate's own row first: its lock puts the aggregate's events in order.
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

/// The headers of a request that its events should carry on, so that one order can be followed through all services.
pub fn trace(headers: &HeaderMap) -> Value {
    let carried = ["traceparent", "tracestate", "correlationid"];
    let found = carried.iter().filter_map(|&name| Some((name.to_owned(), headers.get(name)?.to_str().ok()?.into())));
    Value::Object(found.collect::<Map<_, _>>())
}
