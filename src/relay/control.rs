//! The control connection: leadership, bookkeeping, notifications.
//!
//! # Who leads
//! All sidecars of a service run the same contract. The one whose session holds the advisory lock leads, and the lock ends
//! with the session. The lock is the database's, as outbox and slot are, and not the relay's: while the pods of a service
//! roll, sidecars of an OutboxRelay and of the one that took its place stand side by side. A leader that loses its connection stops at once, in-flight publishes included. A connection that
//! is cut without a word is noticed by both ends through TCP keepalives: by us within 11 s, by the server after 35 s at the
//! earliest, so nobody else leads before we have stopped. Even if that failed, order would hold (see [`super::window`]).

use std::{sync::Arc, time::Duration};

use futures::future::poll_fn;
use tokio::{sync::Notify, time::timeout};
use tokio_postgres::{AsyncMessage, Client, NoTls};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::source::{SourceError, within};
use crate::{
    contract::DatabaseLogin,
    domain::names,
    postgres::login::{self, CONNECT_TIMEOUT},
};

/// Ours: idle 5 s, then three probes 2 s apart.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(5), Duration::from_secs(2), 3);
/// The server's: idle 20 s, then three probes 5 s apart.
const SERVER_KEEPALIVE: &str =
    "-c tcp_keepalives_idle=20 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 -c tcp_user_timeout=35000";
/// How often a standby asks for the lock.
pub(crate) const STANDBY: Duration = Duration::from_secs(2);
/// Key of the advisory lock: "weft rel" in ASCII.
const LOCK: i64 = 0x7765_6674_2072_656c;
/// Deadline of every statement on the control connection but the deletion of rows.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// A session of the relay's role.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) client: Client,
    /// Cancelled when the connection is gone: the lock may be someone else's.
    pub(crate) lost: CancellationToken,
    /// Woken by each notification.
    pub(crate) woken: Arc<Notify>,
    _ended: DropGuard,
}

impl Control {
    pub(crate) async fn connect(login: &DatabaseLogin, application: &str) -> Result<Self, SourceError> {
        let mut config = login::config(login, application).await?;
        let (idle, interval, retries) = KEEPALIVE;
        config.keepalives_idle(idle).keepalives_interval(interval).keepalives_retries(retries);
        let options = format!("{SERVER_KEEPALIVE} {}", login::UNLIMITED);
        config.tcp_user_timeout(Duration::from_secs(10)).options(options);
        let (client, mut connection) = timeout(CONNECT_TIMEOUT, config.connect(NoTls))
            .await
            .map_err(|_elapsed| SourceError::Timeout(CONNECT_TIMEOUT.as_secs()))?
            .map_err(|source| unreachable(login, source))?;
        let (lost, ended) = (CancellationToken::new(), CancellationToken::new());
        let woken = Arc::new(Notify::new());
        let (gone, stop, wake) = (lost.clone().drop_guard(), ended.clone(), woken.clone());
        tokio::spawn(async move {
            let _gone = gone;
            let messages = async {
                while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                    if let AsyncMessage::Notification(_) = message {
                        wake.notify_one();
                    }
                }
            };
            // ends with its owner: the lock is given up at once, whatever is still being answered
            tokio::select! { () = messages => {} () = stop.cancelled() => {} }
        });
        Ok(Self { client, lost, woken, _ended: ended.drop_guard() })
    }

    /// Takes the lock if nobody has it.
    pub(crate) async fn lead(&self) -> Result<bool, SourceError> {
        let doing = "asking for the leader's lock";
        let statement = "select pg_try_advisory_lock($1)";
        let row = within(DEADLINE, doing, self.client.query_one(statement, &[&LOCK])).await?;
        row.try_get(0).map_err(SourceError::query(doing))
    }

    /// Asks to be woken by inserts into the outbox.
    pub(crate) async fn listen(&self) -> Result<(), SourceError> {
        let listen = format!("listen {}", names::OUTBOX_CHANNEL);
        within(DEADLINE, "listening for new rows", self.client.batch_execute(&listen)).await?;
        self.want_notifications(true).await
    }

    /// Tells the outbox's trigger whether anyone listens. A notification is not for nothing: commits that have one take turns.
    pub(crate) async fn want_notifications(&self, wanted: bool) -> Result<(), SourceError> {
        let doing = "writing weft.relay_wake";
        let statement = "update weft.relay_wake set polling = $1 where polling <> $1";
        within(DEADLINE, doing, self.client.execute(statement, &[&wanted])).await?;
        Ok(())
    }
}

fn unreachable(login: &DatabaseLogin, source: tokio_postgres::Error) -> SourceError {
    SourceError::Login(login::LoginError::Connect {
        database: login.database.clone(),
        host: login.host.clone(),
        port: login.port,
        role: login.role.name.clone(),
        source,
    })
}
