//! Connections from a [`DatabaseLogin`]. Its files are read each time, so that a changed one is used.

use std::{path::PathBuf, time::Duration};

use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::{Client, Config, Connection, Socket, tls::MakeTlsConnect};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls::{Tls, TlsError};
use crate::{
    contract::{DatabaseLogin, Role, RoleName, Server},
    domain::names,
    outage::{self, Failure, with_causes},
    secret::{SecretError, SecretFolder},
};

/// The stream of a connection, with TLS or without.
pub type Stream = <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream;

/// Deadline of connecting and logging in. Less than five seconds, within which an outage is to be reported.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);

/// Session parameters for connections whose statements have deadlines of their own: no time-out that server, database
/// or role set applies, since a copy may take long.
pub const UNLIMITED: &str = "-c statement_timeout=0 -c lock_timeout=0 -c idle_in_transaction_session_timeout=0";

/// Keys of the Secret of a database, by the Service Binding specification.
pub const HOST: &str = "host";
pub const PORT: &str = "port";
pub const DATABASE: &str = "database";

#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    #[error("reading the password of role {role} from {path}")]
    Password {
        role: String,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the database's Secret has no `{0}`: add it")]
    Missing(&'static str),
    #[error("`port` of the database's Secret is no number from 1 to 65535: correct it")]
    Port,
    #[error("reading the name of a role from {path}")]
    Name {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("reading where the database is")]
    Secret(#[from] SecretError),
    #[error(transparent)]
    Tls(#[from] TlsError),
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
            Self::Connect { role, source, .. } => match super::failure(source) {
                Failure::Refused(cause) => Failure::Refused(format!("logging in as {role}: {cause}")),
                failure => failure,
            },
            Self::Timeout { .. } => Failure::Silent,
            Self::Password { .. }
            | Self::Missing(_)
            | Self::Port
            | Self::Name { .. }
            | Self::Secret(_)
            | Self::Tls(_) => Failure::Refused(with_causes(self)),
        }
    }

    /// What is mounted is not as it must be: the server was not asked.
    pub fn is_of_the_files(&self) -> bool {
        !matches!(self, Self::Connect { .. } | Self::Timeout { .. })
    }
}

/// Where a database is, as the files say now.
#[derive(Clone, Debug)]
pub struct Address {
    pub host: String,
    pub port: u16,
    pub database: String,
    pub tls: Tls,
}

impl Address {
    pub async fn of(server: &Server) -> Result<Self, LoginError> {
        let folder = match server {
            Server::Address { host, port, database } => {
                let (host, database) = (host.clone(), database.clone());
                return Ok(Self { host, port: *port, database, tls: Tls::off()? });
            }
            Server::Folder { server } => SecretFolder::new(Some(server.clone())),
        };
        let text = async |key| folder.text(key).await?.filter(|text| !text.is_empty()).ok_or(LoginError::Missing(key));
        let port = text(PORT).await?.parse().ok().filter(|port| *port > 0).ok_or(LoginError::Port)?;
        let tls = Tls::of_secret(&folder).await?;
        Ok(Self { host: text(HOST).await?, port, database: text(DATABASE).await?, tls })
    }
}

/// `HOST:PORT` for messages; the folder where it is said, if it cannot be read.
pub fn address(login: &DatabaseLogin) -> String {
    match &login.server {
        Server::Address { host, port, .. } => outage::address(host, *port),
        Server::Folder { server } => {
            let text = |key| std::fs::read_to_string(server.join(key)).ok().map(|text| text.trim().to_owned());
            match (text(HOST), text(PORT).and_then(|port| port.parse().ok())) {
                (Some(host), Some(port)) => outage::address(&host, port),
                _ => server.display().to_string(),
            }
        }
    }
}

/// Name of the schema with Weft's tables of that service.
pub fn schema(login: &DatabaseLogin) -> &str {
    login.schema.as_deref().unwrap_or(names::SCHEMA)
}

/// The option of a connection by which its statements are about the tables of that service.
pub fn search_path(login: &DatabaseLogin) -> String {
    format!("-c search_path={}", schema(login))
}

/// Reads a role's password from its file, without the trailing newline.
pub async fn password(role: &str, path: &PathBuf) -> Result<SecretString, LoginError> {
    let text = tokio::fs::read_to_string(path).await;
    let text = text.map_err(|source| LoginError::Password { role: role.to_owned(), path: path.clone(), source })?;
    Ok(SecretString::from(text.trim_end_matches(['\n', '\r'])))
}

/// The name that a role has in `database`.
pub async fn role_name(name: &RoleName, database: &str) -> Result<String, LoginError> {
    match name {
        RoleName::File { file } => {
            let text = tokio::fs::read_to_string(file).await;
            let text = text.map_err(|source| LoginError::Name { path: file.clone(), source })?;
            Ok(text.trim_end_matches(['\n', '\r']).to_owned())
        }
        // the others are known, or made of the database's name
        RoleName::Known(_) | RoleName::Prefix { .. } => Ok(name.in_database(database).unwrap_or_default()),
    }
}

/// A role's name in `database`, and its password.
pub async fn credentials(role: &Role, database: &str) -> Result<(String, SecretString), LoginError> {
    let name = role_name(&role.name, database).await?;
    let password = password(&name, &role.password_file).await?;
    Ok((name, password))
}

/// A login that is ready to be used: where, as whom, by which certificates.
#[derive(Clone, Debug)]
pub struct Prepared {
    pub address: Address,
    pub role: String,
    pub password: SecretString,
    pub config: Config,
}

impl Prepared {
    pub fn new(address: Address, role: String, password: SecretString, application: &str) -> Self {
        let mut config = Config::new();
        config
            .host(&address.host)
            .port(address.port)
            .dbname(&address.database)
            .user(&role)
            .password(password.expose_secret())
            .application_name(application)
            .ssl_mode(address.tls.mode)
            .connect_timeout(CONNECT_TIMEOUT)
            .keepalives_idle(Duration::from_secs(15))
            .tcp_user_timeout(Duration::from_secs(15));
        Self { address, role, password, config }
    }

    /// Connects; the caller drives the connection (spawns it, or polls it for notifications).
    pub async fn open(&self) -> Result<(Client, Connection<Socket, Stream>), LoginError> {
        let Address { host, port, database, .. } = &self.address;
        match tokio::time::timeout(CONNECT_TIMEOUT, self.config.connect(self.connector())).await {
            Ok(Ok(connected)) => Ok(connected),
            Ok(Err(source)) => Err(LoginError::Connect {
                database: database.clone(),
                host: host.clone(),
                port: *port,
                role: self.role.clone(),
                source,
            }),
            Err(_elapsed) => Err(LoginError::Timeout { host: host.clone(), port: *port }),
        }
    }

    /// For another connection to the same server, such as one that cancels a query.
    pub fn connector(&self) -> MakeRustlsConnect {
        MakeRustlsConnect::new(rustls::ClientConfig::clone(&self.address.tls.config))
    }
}

/// The driver's configuration for `login`, to which the caller may add; `application` shows in `pg_stat_activity`.
pub async fn prepare(login: &DatabaseLogin, application: &str) -> Result<Prepared, LoginError> {
    let address = Address::of(&login.server).await?;
    let (role, password) = credentials(&login.role, &address.database).await?;
    Ok(Prepared::new(address, role, password, application))
}

/// Connects; the caller drives the connection (spawns it, or polls it for notifications).
pub async fn connect(
    login: &DatabaseLogin,
    application: &str,
) -> Result<(Client, Connection<Socket, Stream>), LoginError> {
    prepare(login, application).await?.open().await
}
