//! Connections from a [`DatabaseLogin`]. The password is read from its file each time, so that a changed one is used.

use std::{path::PathBuf, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::{Client, Config, Connection, NoTls, Socket, tls::NoTlsStream};

use crate::{
    contract::{DatabaseLogin, Role},
    outage::{Failure, with_causes},
};

/// Deadline of connecting and logging in. Less than five seconds, within which an outage is to be reported.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// Session parameters for connections whose statements have deadlines of their own: no time-out that server, database
/// or role set applies, since a copy may take long.
pub const UNLIMITED: &str = "-c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0";

#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    #[error("reading the password of role {role} from {path}")]
    Password {
        role: String,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("logging in to database {database} on {host}:{port} as {role}")]
    Connect {
        database: String,
        host: String,
        port: u16,
        role: String,
        #[source]
        source: tokio_postgres::Error,
    },
    #[error("no answer from {host}:{port} within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout { host: String, port: u16 },
}

impl LoginError {
    /// How the server failed.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Password { .. } => Failure::Refused(with_causes(self)),
            Self::Connect { role, source, .. } => match super::failure(source) {
                Failure::Refused(cause) => Failure::Refused(format!("logging in as {role}: {cause}")),
                failure => failure,
            },
            Self::Timeout { .. } => Failure::Silent,
        }
    }
}

/// Reads a role's password from its file, without the trailing newline.
pub async fn password(role: &Role) -> Result<SecretString, LoginError> {
    let path = &role.password_file;
    let text = tokio::fs::read_to_string(path).await.map_err(|source| LoginError::Password {
        role: role.name.clone(),
        path: path.clone(),
        source,
    })?;
    Ok(SecretString::from(text.trim_end_matches(['\n', '\r'])))
}

/// The driver's configuration for `login`; `application` shows in `pg_stat_activity`.
pub async fn config(login: &DatabaseLogin, application: &str) -> Result<Config, LoginError> {
    let password = password(&login.role).await?;
    let mut config = Config::new();
    config
        .host(&login.host)
        .port(login.port)
        .dbname(&login.database)
        .user(&login.role.name)
        .password(password.expose_secret())
        .application_name(application)
        .connect_timeout(CONNECT_TIMEOUT)
        .keepalives_idle(Duration::from_secs(15))
        .tcp_user_timeout(Duration::from_secs(15));
    Ok(config)
}

/// Connects; the caller drives the connection (spawns it, or polls it for notifications).
pub async fn connect(
    login: &DatabaseLogin,
    application: &str,
) -> Result<(Client, Connection<Socket, NoTlsStream>), LoginError> {
    open(login, &config(login, application).await?).await
}

/// Connects with a configuration that [`config`] made for `login`, and the caller added to.
pub async fn open(
    login: &DatabaseLogin,
    config: &Config,
) -> Result<(Client, Connection<Socket, NoTlsStream>), LoginError> {
    match tokio::time::timeout(CONNECT_TIMEOUT, config.connect(NoTls)).await {
        Ok(Ok(connected)) => Ok(connected),
        Ok(Err(source)) => Err(LoginError::Connect {
            database: login.database.clone(),
            host: login.host.clone(),
            port: login.port,
            role: login.role.name.clone(),
            source,
        }),
        Err(_elapsed) => Err(LoginError::Timeout { host: login.host.clone(), port: login.port }),
    }
}
