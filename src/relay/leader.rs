//! Who leads.
//!
//! All sidecars of a service run the same contract. The one whose session holds the lock leads, and the lock is released
//! when the session ends; the others wait inside the lock, so that the next one leads at once. The lock belongs to the
//! database, as outbox and slot do, and not to the relay: while the pods of a service roll, sidecars of an OutboxRelay
//! and of the one that replaces it run side by side.
//!
//! It is the lock of a table and not an advisory one, because of those who wait: a statement that waits for an advisory
//! lock has a snapshot, which keeps the server from removing dead rows for as long as it waits; `LOCK TABLE` has none
//! (`PlannedStmtRequiresSnapshot` of PostgreSQL).
//!
//! A leader that loses its connection stops at once and drops its in-flight publishes. Both ends detect a connection
//! that was cut silently through TCP keepalives: the relay within 11 s, the server after 35 s at the earliest, so nobody
//! else leads before the relay has stopped. Even if two processes led at once, order would hold (see
//! [`super::window`]).

use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::source::{SourceError, postgres::session::Session};
use crate::contract::DatabaseLogin;

const LOCK: &str = "begin; lock table weft.relay_leader in exclusive mode";

/// Leads as long as it is not lost.
#[derive(Debug)]
pub(crate) struct Leadership(Session);

impl Leadership {
    /// Waits until no other process leads; `waits` is called once it is clear that one does, or may.
    pub(crate) async fn acquire(
        login: &DatabaseLogin,
        application: &str,
        waits: impl FnOnce(),
    ) -> Result<Self, SourceError> {
        let session = Session::connect(login, application).await?;
        let action = SourceError::query("waiting for the leader's lock");
        let lock = async {
            let locked = session.client.batch_execute(LOCK);
            let mut locked = std::pin::pin!(locked);
            match timeout(super::STANDBY, &mut locked).await {
                Ok(locked) => locked,
                Err(_elapsed) => {
                    waits();
                    locked.await
                }
            }
        };
        lock.await.map_err(&action)?;
        Ok(Self(session))
    }

    /// Cancelled when another process may lead.
    pub(crate) fn lost(&self) -> &CancellationToken {
        &self.0.lost
    }
}
