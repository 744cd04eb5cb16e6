//! Commands of a saga: each takes effect once.
//!
//! The orchestrator repeats a command until it knows the outcome, so a command may come twice, late, or after its own
//! undo. `weft.enter` decides, in the handler's transaction, whether to act; `weft.remember` and `weft.refuse` store the
//! answer for a repetition. A handler has this form:
//!
//! ```text
//! let transaction = match command.begin(&mut client).await? {
//!     Begun::New(transaction) => transaction,
//!     Begun::Before(reply) => return Ok(reply),
//! };
//! …                                              // check; a refusal is command.refuse(transaction, code, detail)
//! …                                              // change data, emit events
//! command.finish(transaction, body).await
//! ```

use axum::{
    extract::FromRequestParts,
    http::{StatusCode, request::Parts},
};
use deadpool_postgres::{Client, Transaction};
use serde_json::{Value, json};
use tokio_postgres::Row;

use crate::reply::{Reply, Unavailable};

/// Which command this is, from the header `Idempotency-Key: SAGA-ID/STEP/do` (or `undo`, or `redo`: a do that was refused, and
/// that a person asks for again).
#[derive(Debug)]
pub struct Command {
    saga_id: String,
    step: String,
    op: String,
    traceparent: Option<String>,
}

/// Whether a command is new.
#[expect(missing_debug_implementations, reason = "a transaction has none")]
pub enum Begun<'a> {
    /// The command is new: act in this transaction, and finish it.
    New(Transaction<'a>),
    /// The command or its undo came before: return this answer, and do nothing.
    Before(Reply),
}

impl Command {
    pub async fn begin<'a>(&self, client: &'a mut Client) -> Result<Begun<'a>, Unavailable> {
        let transaction = client.transaction().await?;
        let enter = "select outcome, reply from enter($1, $2, $3, $4)";
        let row = transaction.query_one(enter, &[&self.saga_id, &self.step, &self.op, &self.traceparent]).await?;
        if row.try_get::<_, &str>(0)? == "do it" {
            return Ok(Begun::New(transaction));
        }
        // the answer may have left a row that keeps a late do out; without the commit it would be lost
        transaction.commit().await?;
        before(&row).map(Begun::Before)
    }

    /// Commits the command's changes together with its answer.
    pub async fn finish(&self, transaction: Transaction<'_>, body: Value) -> Result<Reply, Unavailable> {
        let remember = "select remember($1, $2, $3, $4)";
        transaction.execute(remember, &[&self.saga_id, &self.step, &self.op, &body]).await?;
        transaction.commit().await?;
        Ok(Reply::ok(body))
    }

    /// Commits a refusal: the command has had no effect, and never will. Its transaction must not have changed anything.
    pub async fn refuse(&self, transaction: Transaction<'_>, code: &str, detail: &str) -> Result<Reply, Unavailable> {
        let refuse = "select outcome, reply from refuse($1, $2, $3, $4)";
        let row = transaction.query_one(refuse, &[&self.saga_id, &self.step, &code, &detail]).await?;
        transaction.commit().await?;
        before(&row)
    }
}

/// The answer that the database has kept.
fn before(row: &Row) -> Result<Reply, Unavailable> {
    let reply: Option<Value> = row.try_get(1)?;
    Ok(match (row.try_get(0)?, reply) {
        ("refused before", Some(refusal)) => {
            let text = |member: &str| refusal.get(member).and_then(Value::as_str).unwrap_or_default();
            Reply::refused(StatusCode::CONFLICT, text("code"), text("detail"))
        }
        ("nothing to do", _) => Reply::ok(json!({"undone": "nothing, since it was never done"})),
        (_, reply) => Reply::ok(reply.unwrap_or_default()),
    })
}

impl<S: Sync> FromRequestParts<S> for Command {
    type Rejection = Reply;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Reply> {
        let header = |name| parts.headers.get(name).and_then(|value| value.to_str().ok());
        let key = header("idempotency-key").unwrap_or_default();
        match key.split('/').collect::<Vec<_>>()[..] {
            [saga_id, step, op @ ("do" | "undo" | "redo")] if !saga_id.is_empty() && !step.is_empty() => Ok(Self {
                saga_id: saga_id.to_owned(),
                step: step.to_owned(),
                op: op.to_owned(),
                traceparent: header("traceparent").map(str::to_owned),
            }),
            _ => {
                let detail = "a command needs the header Idempotency-Key: SAGA-ID/STEP/do, …/undo or …/redo";
                Err(Reply::refused(StatusCode::BAD_REQUEST, "BadIdempotencyKey", detail))
            }
        }
    }
}
