//! Who leads.
//!
//! All sidecars of a service run the same contract. The one whose session holds the lock leads, and the lock is released
//! when the session ends; the others wait inside the lock, so that the next one leads at once. The lock belongs to the
//! database, as outbox and slot do, and not to the relay: while the pods of a service roll, sidecars of an OutboxRelay
//! and of the one that replaces it run side by side.
//!
//! A statement that waits for a lock has a snapshot, which keeps the server from removing dead rows. So it waits for
//! [`WAIT`] at the longest, and is then repeated. (The lock of a table would need no snapshot, but stop everybody who
//! drops the table, as `pg_restore --clean` does.)
//!
//! A leader that loses its connection stops at once and drops its in-flight publishes. Both ends detect a connection
//! that was cut silently through TCP keepalives: the relay within 11 s, the server after 35 s at the earliest, so nobody
//! else leads before the relay has stopped. Even if two processes led at once, order would hold (see
//! [`super::window`]).

use std::time::Duration;

use tokio::time::timeout;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::source::{SourceError, postgres::session::Session};
use crate::contract::DatabaseLogin;

/// Key of the advisory lock: "weft rel" in ASCII.
const LOCK: i64 = 0x7765_6674_2072_656c;
/// How long one statement waits for the lock.
const WAIT: Duration = Duration::from_secs(10);
/// Another process leads when the lock is not free within this time.
const STANDBY: Duration = Duration::from_millis(300);

/// Leads as long as it is not lost.
#[derive(Debug)]
pub(crate) struct Leadership(Session);

impl Leadership {
    /// Waits until no other process leads; `waits` is called once it is clear that one does, or may.
    pub(crate) async fn acquire(
        login: &DatabaseLogin,
        application: &str,
        waits: impl Fn(),
    ) -> Result<Self, SourceError> {
        let session = Session::connect(login, application).await?;
        let action = SourceError::query("waiting for the leader's lock");
        let limit = format!("set lock_timeout = {}", WAIT.as_millis());
        session.client.batch_execute(&limit).await.map_err(&action)?;
        while !Self::lock(&session, &waits).await? {}
        Ok(Self(session))
    }

    /// `false` when the lock was not free for [`WAIT`].
    async fn lock(session: &Session, waits: impl Fn()) -> Result<bool, SourceError> {
        let locked = session
            .client
            .execute("select pg_advisory_lock($1::bigint # hashtextextended(current_schema(), 0))", &[&LOCK]);
        let mut locked = std::pin::pin!(locked);
        let locked = match timeout(STANDBY, &mut locked).await {
            Ok(locked) => locked,
            Err(_elapsed) => {
                waits();
                // without an answer the server is silent, or the connection cut
                timeout(2 * WAIT, locked).await.map_err(|_elapsed| SourceError::Timeout((2 * WAIT).as_secs()))?
            }
        };
        match locked {
            Ok(_) => Ok(true),
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(false),
            Err(error) => Err(SourceError::query("waiting for the leader's lock")(error)),
        }
    }

    /// Cancelled when another process may lead.
    pub(crate) fn lost(&self) -> &CancellationToken {
        &self.0.lost
    }
}
