//! The service `orders`: accepts orders, which the saga then approves or rejects.

use axum::{
    Json, Router,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    routing::{get, post},
};
use deadpool_postgres::{Pool, Transaction};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_postgres::Row;

use crate::{
    outbox::emit,
    reply::{Reply, Unavailable},
    saga::{Begun, Command},
    server,
};

pub fn routes(pool: Pool) -> Router {
    Router::new()
        .route("/orders", post(place).get(list))
        .route("/orders/{id}", get(show))
        .route("/commands/approve-order", post(approve))
        .route("/commands/reject-order", post(reject))
        .with_state(pool.clone())
        .merge(server::health(pool))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct NewOrder {
    customer_id: String,
    /// In cents.
    total: i64,
    /// The article, if the order is for one that is kept in stock.
    article: Option<String>,
}

/// Creates the order and its event `OrderCreated` in one transaction; the event starts the saga. A repeated request
/// with the same `Idempotency-Key` returns the first one's order.
async fn place(
    State(pool): State<Pool>,
    headers: HeaderMap,
    Json(NewOrder { customer_id, total, article }): Json<NewOrder>,
) -> Result<Reply, Unavailable> {
    if total <= 0 {
        return Ok(Reply::refused(StatusCode::BAD_REQUEST, "BadTotal", "total is in cents, and more than 0"));
    }
    let key = headers.get("idempotency-key").and_then(|key| key.to_str().ok());
    let mut client = pool.get().await?;
    let transaction = client.transaction().await?;
    let insert = "insert into orders (customer_id, total, article, idempotency_key) values ($1, $2, $3, $4)
        on conflict (idempotency_key) do nothing returning id, state";
    let row = match transaction.query_opt(insert, &[&customer_id, &total, &article, &key]).await? {
        Some(row) => {
            let id: &str = row.try_get(0)?;
            let payload = json!({"orderId": id, "customerId": customer_id, "total": total});
            emit(&transaction, ("order", id), "OrderCreated", payload).await?;
            row
        }
        None => transaction.query_one("select id, state from orders where idempotency_key = $1", &[&key]).await?,
    };
    transaction.commit().await?;
    Ok(Reply::created(json!({"id": row.try_get::<_, &str>(0)?, "state": row.try_get::<_, &str>(1)?})))
}

const ORDER: &str = "select id, customer_id, total, article, state, reason from orders";

fn order(row: &Row) -> Result<Value, tokio_postgres::Error> {
    Ok(json!({
        "id": row.try_get::<_, &str>(0)?,
        "customerId": row.try_get::<_, &str>(1)?,
        "total": row.try_get::<_, i64>(2)?,
        "article": row.try_get::<_, Option<&str>>(3)?,
        "state": row.try_get::<_, &str>(4)?,
        "reason": row.try_get::<_, Option<&str>>(5)?,
    }))
}

async fn show(State(pool): State<Pool>, Path(id): Path<String>) -> Result<Reply, Unavailable> {
    let row = pool.get().await?.query_opt(&format!("{ORDER} where id = $1"), &[&id]).await?;
    Ok(match row {
        Some(row) => Reply::ok(order(&row)?),
        None => Reply::refused(StatusCode::NOT_FOUND, "OrderNotFound", "there is no such order"),
    })
}

/// The latest hundred orders.
async fn list(State(pool): State<Pool>) -> Result<Reply, Unavailable> {
    let rows = pool.get().await?.query(&format!("{ORDER} order by created_at desc limit 100"), &[]).await?;
    Ok(Reply::ok(rows.iter().map(order).collect::<Result<_, _>>()?))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Approve {
    order_id: String,
}

async fn approve(
    State(pool): State<Pool>,
    command: Command,
    Json(Approve { order_id }): Json<Approve>,
) -> Result<Reply, Unavailable> {
    let mut client = pool.get().await?;
    let transaction = match command.begin(&mut client).await? {
        Begun::New(transaction) => transaction,
        Begun::Before(reply) => return Ok(reply),
    };
    if !take_from_stock(&transaction, &order_id).await? {
        return command.refuse(transaction, "OutOfStock", "there is nothing left of the article").await;
    }
    decide(transaction, &command, &order_id, "APPROVED", None).await
}

/// Takes one piece of the pending order's article from the stock; returns whether there was one, or none was needed.
async fn take_from_stock(transaction: &Transaction<'_>, order_id: &str) -> Result<bool, tokio_postgres::Error> {
    let wanted = "select article from orders where id = $1 and state = 'PENDING' and article is not null for update";
    let Some(order) = transaction.query_opt(wanted, &[&order_id]).await? else { return Ok(true) };
    let take = "update stock set pieces = pieces - 1 where article = $1 and pieces > 0";
    Ok(transaction.execute(take, &[&order.try_get::<_, &str>(0)?]).await? > 0)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Reject {
    order_id: String,
    reason: String,
}

async fn reject(
    State(pool): State<Pool>,
    command: Command,
    Json(Reject { order_id, reason }): Json<Reject>,
) -> Result<Reply, Unavailable> {
    let mut client = pool.get().await?;
    let transaction = match command.begin(&mut client).await? {
        Begun::New(transaction) => transaction,
        Begun::Before(reply) => return Ok(reply),
    };
    decide(transaction, &command, &order_id, "REJECTED", Some(&reason)).await
}

/// Moves a pending order to its final state and emits the event.
async fn decide(
    transaction: Transaction<'_>,
    command: &Command,
    id: &str,
    state: &str,
    reason: Option<&str>,
) -> Result<Reply, Unavailable> {
    let update =
        "update orders set state = $2, reason = $3 where id = $1 and state = 'PENDING' returning customer_id, total";
    let Some(row) = transaction.query_opt(update, &[&id, &state, &reason]).await? else {
        return command.refuse(transaction, "OrderNotPending", "there is no such pending order").await;
    };
    let (customer_id, total): (&str, i64) = (row.try_get(0)?, row.try_get(1)?);
    let (event_type, payload) = match reason {
        Some(reason) => {
            ("OrderRejected", json!({"orderId": id, "customerId": customer_id, "total": total, "reason": reason}))
        }
        None => ("OrderApproved", json!({"orderId": id, "customerId": customer_id, "total": total})),
    };
    emit(&transaction, ("order", id), event_type, payload).await?;
    command.finish(transaction, json!({"id": id, "state": state})).await
}
