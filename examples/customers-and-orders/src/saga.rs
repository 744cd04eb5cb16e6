//! Commands of a saga: each takes effect once.
//!
//! The orchestrator repeats a command until it knows the outcome, so a command may come twice, late, or after its own
//! undo. `weft.enter` decides, in the handler's transaction, whether to act; `weft.remember` stores the answer for a
//! repetition. A handler has this form:
//!
//! ```text
//! let transaction = match command.begin(&mut client).await? {
//!     Begun::New(transaction) => transaction,
//!     Begun::Before(reply) => return Ok(reply),
//! };
//! …                                          // change data, emit events
//! command.finish(transaction, reply).await   // also with a refusal: a repetition gets the first answer
//! ```

use axum::{
    extract::FromRequestParts,
    http::{StatusCode, request::Parts},
};
use deadpool_postgres::{Client, Transaction};
use serde_json::{Value, json};

use crate::{
    outbox,
    reply::{Reply, Unavailable},
};

/// Which command this is, from the header `Idempotency-Key: SAGA-ID/STEP/do` (or `undo`).
#[derive(Debug)]
pub struct Command {
    saga_id: String,
    step: String,
    op: String,
    /// The headers that the command's events must contain.
    pub trace: Value,
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
        let (saga_id, step, op) = (&self.saga_id, &self.step, &self.op);
        let transaction = client.transaction().await?;
        let entered = transaction.query_one("select enter($1, $2, $3)", &[saga_id, step, op]).await?;
        if entered.try_get(0)? {
            return Ok(Begun::New(transaction));
        }
        let earlier = transaction.query_one("select recall($1, $2, $3)", &[saga_id, step, op]).await?;
        // an undo that comes before its do has inserted a row that blocks the do: without the commit the row would be
        // lost
        transaction.commit().await?;
        Ok(Begun::Before(match earlier.try_get::<_, Option<Value>>(0)? {
            Some(reply) => serde_json::from_value(reply)?,
            None if op == "undo" => Reply::ok(json!({"undone": "nothing, since it was never done"})),
            None => Reply::refused(StatusCode::CONFLICT, "AlreadyUndone", "this command was undone before it came"),
        }))
    }

    /// Commits the command's changes together with its answer.
    pub async fn finish(&self, transaction: Transaction<'_>, reply: Reply) -> Result<Reply, Unavailable> {
        let kept = serde_json::to_value(&reply)?;
        let remember = "select remember($1, $2, $3, $4)";
        transaction.execute(remember, &[&self.saga_id, &self.step, &self.op, &kept]).await?;
        transaction.commit().await?;
        Ok(reply)
    }
}

impl<S: Sync> FromRequestParts<S> for Command {
    type Rejection = Reply;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Reply> {
        let key = parts.headers.get("idempotency-key").and_then(|key| key.to_str().ok()).unwrap_or_default();
        match key.split('/').collect::<Vec<_>>()[..] {
            [saga_id, step, op @ ("do" | "undo")] if !saga_id.is_empty() && !step.is_empty() => Ok(Self {
                saga_id: saga_id.to_owned(),
                step: step.to_owned(),
                op: op.to_owned(),
                trace: outbox::trace(&parts.headers),
            }),
            _ => {
                let detail = "a command needs the header Idempotency-Key: SAGA-ID/STEP/do or …/undo";
                Err(Reply::refused(StatusCode::BAD_REQUEST, "BadIdempotencyKey", detail))
            }
        }
    }
}
