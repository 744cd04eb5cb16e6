//! The service `customers`: manages credit limits, and reserves credit for orders.

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    routing::{get, post},
};
use deadpool_postgres::Pool;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    outbox::emit,
    reply::{Reply, Unavailable},
    saga::{Begun, Command},
    server,
};

pub fn routes(pool: Pool) -> Router {
    Router::new()
        .route("/customers", post(add))
        .route("/customers/{id}", get(show))
        .route("/commands/reserve-credit", post(reserve))
        .route("/commands/release-credit", post(release))
        .route("/events", post(receive))
        .with_state(pool.clone())
        .merge(server::health(pool))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NewCustomer {
    name: String,
    /// In cents.
    credit_limit: i64,
}

async fn add(
    State(pool): State<Pool>,
    Json(NewCustomer { name, credit_limit }): Json<NewCustomer>,
) -> Result<Reply, Unavailable> {
    if credit_limit < 0 {
        return Ok(Reply::refused(
            StatusCode::BAD_REQUEST,
            "BadCreditLimit",
            "creditLimit is in cents, and not below 0",
        ));
    }
    let insert = "insert into customers (name, credit_limit) values ($1, $2) returning id";
    let row = pool.get().await?.query_one(insert, &[&name, &credit_limit]).await?;
    Ok(Reply::created(json!({"id": row.try_get::<_, &str>(0)?})))
}

async fn show(State(pool): State<Pool>, Path(id): Path<String>) -> Result<Reply, Unavailable> {
    let select = "select name, credit_limit, reserved, approved_orders from customers where id = $1";
    let Some(row) = pool.get().await?.query_opt(select, &[&id]).await? else {
        return Ok(Reply::refused(StatusCode::NOT_FOUND, "CustomerNotFound", "there is no such customer"));
    };
    Ok(Reply::ok(json!({
        "id": id,
        "name": row.try_get::<_, &str>(0)?,
        "creditLimit": row.try_get::<_, i64>(1)?,
        "reserved": row.try_get::<_, i64>(2)?,
        "approvedOrders": row.try_get::<_, i64>(3)?,
    })))
}

/// The body of both commands.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Credit {
    customer_id: String,
    order_id: String,
    /// In cents.
    amount: i64,
}

async fn reserve(
    State(pool): State<Pool>,
    command: Command,
    Json(Credit { customer_id, order_id, amount }): Json<Credit>,
) -> Result<Reply, Unavailable> {
    let mut client = pool.get().await?;
    let transaction = match command.begin(&mut client).await? {
        Begun::New(transaction) => transaction,
        Begun::Before(reply) => return Ok(reply),
    };
    // locks the customer, so that two reservations cannot both use the last of the credit
    let select = "select credit_limit - reserved from customers where id = $1 for update";
    let Some(row) = transaction.query_opt(select, &[&customer_id]).await? else {
        return command.refuse(transaction, "CustomerNotFound", "there is no such customer").await;
    };
    let available: i64 = row.try_get(0)?;
    if !(1..=available).contains(&amount) {
        let detail = format!("{amount} cents are not within the {available} that are left");
        return command.refuse(transaction, "CreditLimitExceeded", &detail).await;
    }
    let insert = "insert into reservations (order_id, customer_id, amount) values ($1, $2, $3) on conflict do nothing";
    if transaction.execute(insert, &[&order_id, &customer_id, &amount]).await? == 0 {
        return command.refuse(transaction, "AlreadyReserved", "another saga has reserved for this order").await;
    }
    let update = "update customers set reserved = reserved + $2 where id = $1";
    transaction.execute(update, &[&customer_id, &amount]).await?;
    let payload = json!({"customerId": customer_id, "orderId": order_id, "amount": amount});
    emit(&transaction, ("customer", &customer_id), "CreditReserved", payload).await?;
    command.finish(transaction, json!({"available": available - amount})).await
}

/// Undoes [`reserve`]: releases the recorded reservation, whatever amount the command contains.
async fn release(
    State(pool): State<Pool>,
    command: Command,
    Json(Credit { customer_id, order_id, amount: _ }): Json<Credit>,
) -> Result<Reply, Unavailable> {
    let mut client = pool.get().await?;
    let transaction = match command.begin(&mut client).await? {
        Begun::New(transaction) => transaction,
        Begun::Before(reply) => return Ok(reply),
    };
    // locks the customer's row first, as `reserve` does, so that the two cannot deadlock
    transaction.execute("select from customers where id = $1 for update", &[&customer_id]).await?;
    let delete = "delete from reservations where order_id = $1 and customer_id = $2 returning amount";
    let amount: i64 = transaction.query_one(delete, &[&order_id, &customer_id]).await?.try_get(0)?;
    let update = "update customers set reserved = reserved - $2 where id = $1";
    transaction.execute(update, &[&customer_id, &amount]).await?;
    let payload = json!({"customerId": customer_id, "orderId": order_id, "amount": amount});
    emit(&transaction, ("customer", &customer_id), "CreditReleased", payload).await?;
    command.finish(transaction, json!({"released": amount})).await
}

/// Receives an event of another service, a `CloudEvent` in binary mode: attributes in `ce-…` headers, data in the body.
/// Counts a customer's approved orders, each once, however often its event is delivered.
async fn receive(
    State(pool): State<Pool>,
    headers: HeaderMap,
    Json(data): Json<Value>,
) -> Result<StatusCode, Unavailable> {
    let attribute = |name| headers.get(name).and_then(|value| value.to_str().ok());
    let (Some(id), Some(source), Some(kind)) = (attribute("ce-id"), attribute("ce-source"), attribute("ce-type"))
    else {
        return Ok(StatusCode::BAD_REQUEST);
    };
    if kind != "OrderApproved" {
        return Ok(StatusCode::NO_CONTENT);
    }
    let mut client = pool.get().await?;
    let transaction = client.transaction().await?;
    let correlation = attribute("ce-correlationid");
    let receive = "select receive('customers', $1, $2, $3, $4)";
    let new = transaction.query_one(receive, &[&source, &id, &correlation, &attribute("traceparent")]).await?;
    if new.try_get(0)? {
        let count = "update customers set approved_orders = approved_orders + 1 where id = $1";
        transaction.execute(count, &[&data.get("customerId").and_then(Value::as_str)]).await?;
    }
    transaction.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
