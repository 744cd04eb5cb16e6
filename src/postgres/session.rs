//! A session that a leader works in, and who answers for its silence.
//!
//! To TCP a server whose processes are stopped is alive: its kernel acknowledges. So the server itself has to answer
//! ([`Session::watch`]). That is asked of this session, which may be busy: a statement waits for whoever has locked its row.
//! So what counts is whether the server answers at all (see [`silence`]).

use std::{sync::Arc, time::Duration};

use futures::future::poll_fn;
use tokio::{
    sync::Notify,
    time::{sleep, timeout},
};
use tokio_postgres::{AsyncMessage, Client};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{
    login::{self, LoginError},
    silence,
};
use crate::{contract::DatabaseLogin, outage::Failure};

/// The client's keepalive: idle 5 s, then three probes 2 s apart.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(5), Duration::from_secs(2), 3);
/// The server's keepalive: idle 20 s, then three probes 5 s apart. And a process that waits for a lock notices within a
/// second that its client is gone.
const SERVER_KEEPALIVE: &str = "-c tcp_keepalives_idle=20 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3 \
     -c tcp_user_timeout=35000 -c client_connection_check_interval=1000";
/// How often the server is asked for an answer.
const WATCH: Duration = Duration::from_millis(1500);

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error(transparent)]
    Login(#[from] LoginError),
    #[error("{action}")]
    Query {
        action: &'static str,
        #[source]
        source: tokio_postgres::Error,
    },
    #[error("the database did not answer within {0} s")]
    Timeout(u64),
    #[error("the connection was closed")]
    Lost,
}

impl SessionError {
    pub(crate) fn query(action: &'static str) -> impl Fn(tokio_postgres::Error) -> Self {
        move |source| Self::Query { action, source }
    }

    /// How the database failed: it refused, is silent, or there is no connection.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Login(error) => error.failure(),
            Self::Query { action, source } => match super::failure(source) {
                Failure::Refused(cause) => Failure::Refused(format!("{action}: {cause}")),
                failure => failure,
            },
            Self::Timeout(_) => Failure::Silent,
            Self::Lost => Failure::Disconnected(self.to_string()),
        }
    }
}

/// Awaits a query's result, for `deadline` at the longest. `action` names the query in the error.
pub(crate) async fn within<T>(
    deadline: Duration,
    action: &'static str,
    query: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, SessionError> {
    let answer = timeout(deadline, query).await.map_err(|_elapsed| SessionError::Timeout(deadline.as_secs()))?;
    answer.map_err(SessionError::query(action))
}

#[derive(Debug)]
pub struct Session {
    pub client: Client,
    /// Cancelled when the connection is lost.
    pub lost: CancellationToken,
    /// Notified by each `NOTIFY` that the session listens for.
    pub notified: Arc<Notify>,
    _ended: DropGuard,
}

impl Session {
    /// Connects; `application` is its name in `pg_stat_activity`.
    pub async fn connect(login: &DatabaseLogin, application: &str) -> Result<Self, LoginError> {
        let mut prepared = login::prepare(login, application).await?;
        let (idle, interval, retries) = KEEPALIVE;
        prepared.config.keepalives_idle(idle).keepalives_interval(interval).keepalives_retries(retries);
        let options = format!("{SERVER_KEEPALIVE} {} {}", login::UNLIMITED, login::search_path(login));
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

    /// Calls `report` with the server's silence while it does not answer, and with `None` when it does. That ends no session:
    /// statements have deadlines, which are longer. Returns when the connection is lost.
    pub async fn watch(&self, login: &DatabaseLogin, report: impl Fn(Option<Duration>)) {
        loop {
            sleep(WATCH).await;
            // without a statement: the server only says that it is ready
            let answer = self.client.check_connection();
            if silence::watched(login, answer, &report).await.is_err() {
                return;
            }
            report(None);
        }
    }
}
