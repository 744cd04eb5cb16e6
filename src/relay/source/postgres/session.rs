//! A session of the relay's role, and who answers for its silence.
//!
//! To TCP a server whose processes are stopped is alive: its kernel acknowledges. So the server itself has to answer
//! ([`Session::watch`]). That is asked of this session and not of the stream of changes, which is rightly silent while
//! the server decodes a large transaction. This session may be busy too: the deletion of a published row waits for
//! whoever has locked it. So what counts is whether the server answers at all (see [`silence`]).

use std::{sync::Arc, time::Duration};

use futures::future::poll_fn;
use tokio::{sync::Notify, time::sleep};
use tokio_postgres::{AsyncMessage, Client};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::{
    contract::DatabaseLogin,
    postgres::{login, silence},
    relay::{
        problem::RelayProblem,
        reporter::Reporter,
        source::{SourceError, postgres::outbox::search_path},
    },
};

/// The relay's keepalive: idle 5 s, then three probes 2 s apart.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(5), Duration::from_secs(2), 3);
/// The server's keepalive: idle 20 s, then three probes 5 s apart. And a process that waits for a lock notices within a
/// second that its client is gone.
const SERVER_KEEPALIVE: &str = "-c tcp_keepalives_idle=20 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 \
     -c tcp_user_timeout=35000 -c client_connection_check_interval=1000";
/// How often the server is asked for an answer.
const WATCH: Duration = Duration::from_millis(1500);

#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) client: Client,
    /// Cancelled when the connection is lost.
    pub(crate) lost: CancellationToken,
    /// Notified by each `NOTIFY` that the session listens for.
    pub(crate) notified: Arc<Notify>,
    _ended: DropGuard,
}

impl Session {
    /// Connects; `application` is its name in `pg_stat_activity`.
    pub(crate) async fn connect(login: &DatabaseLogin, application: &str) -> Result<Self, SourceError> {
        let mut prepared = login::prepare(login, application).await?;
        let (idle, interval, retries) = KEEPALIVE;
        prepared.config.keepalives_idle(idle).keepalives_interval(interval).keepalives_retries(retries);
        let options = format!("{SERVER_KEEPALIVE} {} {}", login::UNLIMITED, search_path(login));
        prepared.config.tcp_user_timeout(Duration::from_secs(10)).options(options);
        let (client, mut connection) = prepared.open().await?;
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
            // ends together with the session: what it locks is released at once, even while answers are outstanding
            tokio::select! { () = messages => {} () = stop.cancelled() => {} }
        });
        Ok(Self { client, lost, notified, _ended: ended.drop_guard() })
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
}
