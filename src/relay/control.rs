//! The control connection: leadership, bookkeeping, notifications.
//!
//! # Who leads
//! All sidecars of a service run the same contract. The one whose session holds the advisory lock leads, and the lock
//! is released when the session ends. The lock belongs to the database, as outbox and slot do, and not to the relay:
//! while the pods of a service roll, sidecars of an OutboxRelay and of the one that replaces it run side by side. A
//! leader that loses its connection stops at once and drops its in-flight publishes. Both ends detect a connection that
//! was cut silently through TCP keepalives: the relay within 11 s, the server after 35 s at the earliest, so nobody
//! else leads before the relay has stopped. Even if two processes led at once, order would hold (see
//! [`super::window`]).
//!
//! # A server that is silent
//! To TCP a server whose processes are stopped is alive: its kernel acknowledges. So the server itself has to answer
//! ([`Control::watch`]). That is asked of this session and not of the stream of changes, which is rightly silent while
//! the server decodes a large transaction. This session may be busy too: the deletion of a published row waits for
//! whoever has locked it. So what counts is whether the server answers at all (see [`silence`]).

use std::{sync::Arc, time::Duration};

use futures::future::poll_fn;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_postgres::{AsyncMessage, Client, NoTls};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    problem::RelayProblem,
    reporter::Reporter,
    source::{SourceError, within},
};
use crate::{
    contract::DatabaseLogin,
    domain::names,
    postgres::{
        login::{self, CONNECT_TIMEOUT},
        silence,
    },
};

/// The relay's keepalive: idle 5 s, then three probes 2 s apart.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(5), Duration::from_secs(2), 3);
/// The server's keepalive: idle 20 s, then three probes 5 s apart.
const SERVER_KEEPALIVE: &str =
    "-c tcp_keepalives_idle=20 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 -c tcp_user_timeout=35000";
/// How often a standby tries to acquire the lock.
pub(crate) const LOCK_RETRY: Duration = Duration::from_secs(2);
/// How often the server is asked for an answer.
const WATCH: Duration = Duration::from_millis(1500);
/// Key of the advisory lock: "weft rel" in ASCII.
const LOCK: i64 = 0x7765_6674_2072_656c;
/// Deadline of every statement on the control connection except the deletion of rows.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// A session of the relay's role.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) client: Client,
    /// Cancelled when the connection is lost: another process may hold the lock then.
    pub(crate) lost: CancellationToken,
    /// Notified by each `NOTIFY` of the outbox's trigger.
    pub(crate) notified: Arc<Notify>,
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
        let notified = Arc::new(Notify::new());
        let (gone, stop, wake) = (lost.clone().drop_guard(), ended.clone(), notified.clone());
        tokio::spawn(async move {
            let _gone = gone;
            let messages = async {
                while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
                    if let AsyncMessage::Notification(_) = message {
                        wake.notify_one();
                    }
                }
            };
            // ends together with `Control`: the lock is released at once, even while answers are outstanding
            tokio::select! { () = messages => {} () = stop.cancelled() => {} }
        });
        Ok(Self { client, lost, notified, _ended: ended.drop_guard() })
    }

    /// Acquires the leader's lock; `false` when another session holds it.
    pub(crate) async fn try_lead(&self) -> Result<bool, SourceError> {
        let action = "asking for the leader's lock";
        let statement = "select pg_try_advisory_lock($1)";
        let row = within(DEADLINE, action, self.client.query_one(statement, &[&LOCK])).await?;
        row.try_get(0).map_err(SourceError::query(action))
    }

    /// Reports while the server does not answer. That ends no term: statements have deadlines, which are longer.
    /// Returns when the connection is lost.
    pub(crate) async fn watch(&self, login: &DatabaseLogin, reporter: &Reporter) {
        loop {
            sleep(WATCH).await;
            // without a statement: the server only says that it is ready
            let answer = self.client.check_connection();
            let report = |silence| match silence {
                Some(silence) => reporter.report(RelayProblem::silent_database(login, silence)),
                None => reporter.database_answers(),
            };
            if silence::watched(login, answer, report).await.is_err() {
                return;
            }
            reporter.database_answers();
        }
    }

    /// Subscribes to the notifications that inserts into the outbox send.
    pub(crate) async fn listen(&self) -> Result<(), SourceError> {
        let listen = format!("listen {}", names::OUTBOX_CHANNEL);
        within(DEADLINE, "listening for new rows", self.client.batch_execute(&listen)).await?;
        self.set_notifications(true).await
    }

    /// Switches the outbox trigger's notifications on or off. They have a cost: transactions that notify commit one
    /// after the other.
    pub(crate) async fn set_notifications(&self, enabled: bool) -> Result<(), SourceError> {
        let action = "writing weft.relay_wake";
        let statement = "update weft.relay_wake set polling = $1 where polling <> $1";
        within(DEADLINE, action, self.client.execute(statement, &[&enabled])).await?;
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
