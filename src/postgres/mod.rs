//! Shared by everything that uses PostgreSQL: logging in, sessions and who leads, noticing silence, and the streaming replication
//! protocol.

pub mod leader;
pub mod login;
pub mod outbox;
pub mod replication;
pub mod session;
pub mod silence;
pub mod tls;

use crate::outage::Failure;

/// The server's name in messages.
pub const SERVER: &str = "PostgreSQL";

/// SQLSTATE class 57, operator intervention: the server starts, stops, or an administrator ended the session.
const INTERVENTION: &str = "57";

/// How the server failed: it refused the request, is silent, or there is no connection.
pub fn failure(error: &tokio_postgres::Error) -> Failure {
    if let Some(refused) = error.as_db_error() {
        return refusal(refused.code().code(), refused.message());
    }
    let cause = std::error::Error::source(error);
    match cause.and_then(|cause| cause.downcast_ref::<std::io::Error>()) {
        Some(error) => Failure::of_io(error),
        None if error.is_closed() => Failure::Disconnected("the connection was closed".to_owned()),
        None => Failure::Disconnected(crate::outage::with_causes(error)),
    }
}

fn refusal(code: &str, message: &str) -> Failure {
    if code.starts_with(INTERVENTION) {
        return Failure::Disconnected(message.to_owned());
    }
    Failure::Refused(format!("{message} (SQLSTATE {code})"))
}
