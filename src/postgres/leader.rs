//! Who leads.
//!
//! Several processes run the same contract. The one whose session holds an advisory lock of the database leads, and the lock is
//! released when the session ends; the others wait inside the lock, so that the next one leads at once.
//!
//! A statement that waits for a lock has a snapshot, which keeps the server from removing dead rows. So it waits for
//! [`WAIT`] at the longest, and is then repeated. (The lock of a table would need no snapshot, but stop everybody who
//! drops the table, as `pg_restore --clean` does.)
//!
//! A leader that loses its connection stops at once. Both ends detect a connection that was cut silently through TCP
//! keepalives: the client within 11 s, the server after 35 s at the earliest, so nobody else leads before the leader has
//! stopped.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::{error::SqlState, types::ToSql};
use tokio_util::sync::CancellationToken;

use super::session::{Session, SessionError};
use crate::contract::DatabaseLogin;

/// How long one statement waits for the lock.
const WAIT: Duration = Duration::from_secs(10);
/// Another process leads when the lock is not free within this time.
const STANDBY: Duration = Duration::from_millis(300);

/// Pause between two terms of leadership: the shortest, and the longest after repeated failures.
const BETWEEN_TERMS: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// After a term of at least this length the pause starts again at the shortest.
const STABLE_TERM: Duration = Duration::from_secs(30);

/// The pause after a term that failed, which grows.
#[derive(Debug)]
pub struct Pause(Duration);

impl Default for Pause {
    fn default() -> Self {
        Self(BETWEEN_TERMS.0)
    }
}

impl Pause {
    /// Waits after a term that began at `started`, or until `stop`.
    pub async fn after_term(&mut self, started: Instant, stop: &CancellationToken) {
        if started.elapsed() > STABLE_TERM {
            self.0 = BETWEEN_TERMS.0;
        }
        tokio::select! { () = sleep(self.0) => {} () = stop.cancelled() => {} }
        self.0 = (self.0 * 2).min(BETWEEN_TERMS.1);
    }
}

/// Leads as long as it is not lost.
#[derive(Debug)]
pub struct Leadership(Session);

impl Leadership {
    /// Waits until no other process holds the lock `key`; `waits` is called once it is clear that one does, or may.
    pub async fn acquire(
        login: &DatabaseLogin,
        application: &str,
        key: i64,
        waits: impl Fn(),
    ) -> Result<Self, SessionError> {
        let session = Session::connect(login, application).await?;
        let action = SessionError::query("waiting for the leader's lock");
        let limit = format!("set lock_timeout = {}", WAIT.as_millis());
        session.client.batch_execute(&limit).await.map_err(&action)?;
        while !Self::lock(&session, key, &waits).await? {}
        Ok(Self(session))
    }

    /// `false` when the lock was not free for [`WAIT`].
    async fn lock(session: &Session, key: i64, waits: impl Fn()) -> Result<bool, SessionError> {
        let keys: [&(dyn ToSql + Sync); 1] = [&key];
        // several services may have their tables in one database, each in a schema of its own
        let statement = "select pg_advisory_lock($1::bigint # hashtextextended(current_schema(), 0))";
        let locked = session.client.execute(statement, &keys);
        let mut locked = std::pin::pin!(locked);
        let locked = match timeout(STANDBY, &mut locked).await {
            Ok(locked) => locked,
            Err(_elapsed) => {
                waits();
                // without an answer the server is silent, or the connection cut
                timeout(2 * WAIT, locked).await.map_err(|_elapsed| SessionError::Timeout((2 * WAIT).as_secs()))?
            }
        };
        match locked {
            Ok(_) => Ok(true),
            Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => Ok(false),
            Err(error) => Err(SessionError::query("waiting for the leader's lock")(error)),
        }
    }

    /// Cancelled when another process may lead.
    pub fn lost(&self) -> &CancellationToken {
        &self.0.lost
    }
}
