//! The two sessions of a set-up.
//!
//! The superuser's makes roles and Weft's own tables, and never executes anything of a team's: its search path holds
//! PostgreSQL's own functions only. The migrator's executes the files. It belongs to a plain login that owns nothing and
//! may only become the owner, which it is from the start: `reset role`, `reset session authorization` and `discard all`
//! come back to the owner, since that is a setting of the connection. `set role none` comes back to a role that may do
//! nothing. The role may log in for the moment in which its session is opened, with a password of that moment.

use std::time::Duration;

use secrecy::SecretString;
use tokio_postgres::Client;

use super::{
    DatabaseError,
    locks::{LOCK_TIMEOUT, TURN_TIMEOUT},
    refusal::Failure,
    roles::Roles,
    schemas::Schemas,
};
use crate::{
    contract::{DatabaseLogin, Role, Server, database_setup::DatabaseSetup},
    outage::with_causes,
    postgres::login::{self, Address, LoginError, Prepared},
};

const APPLICATION: &str = "weft database setup";

/// Whatever the server's own settings are: a migration may take its time, and one whose client is gone is ended.
const LIMITS: &str = "-c statement_timeout=0 -c idle_in_transaction_session_timeout=0 \
    -c client_connection_check_interval=2s -c client_min_messages=warning";

/// A session, and the server's process of it.
pub struct Session {
    pub client: Client,
    pub process: i32,
}

/// Logs in as the superuser.
pub async fn admin(setup: &DatabaseSetup) -> Result<Session, DatabaseError> {
    let prepared = login::prepare(&setup.admin, APPLICATION).await.map_err(|error| refused(setup, error))?;
    let options = format!("{LIMITS} -c lock_timeout={TURN_TIMEOUT} -c search_path=pg_catalog");
    open(prepared, &options).await.map_err(|error| refused(setup, error))
}

/// Logs in as the service, or as the relay.
pub async fn as_role(setup: &DatabaseSetup, role: &Role) -> Result<Session, DatabaseError> {
    let login = DatabaseLogin { role: role.clone(), ..setup.admin.clone() };
    let prepared = login::prepare(&login, APPLICATION).await.map_err(|error| refused(setup, error))?;
    let options = format!("{LIMITS} -c search_path=pg_catalog");
    open(prepared, &options).await.map_err(|error| refused(setup, error))
}

/// Logs in as the migrator, which becomes the owner.
pub async fn migrator(setup: &DatabaseSetup, roles: &Roles, admin: &Client) -> Result<Session, DatabaseError> {
    let doing = "open the session for migrations";
    let version = admin.query_one("select current_setting('server_version_num')::int", &[]).await;
    let version: i32 = version.and_then(|row| row.try_get(0)).map_err(DatabaseError::while_doing(doing))?;
    let address = Address::of(&setup.admin.server).await.map_err(|error| refused(setup, error))?;
    let password = SecretString::from(format!("{:032x}", rand::random::<u128>()));
    let prepared = Prepared::new(address, roles.migrator.clone(), password.clone(), APPLICATION);

    roles.open_login(admin, &password).await.map_err(DatabaseError::while_doing(doing))?;
    let session = open(prepared, &migrator_options(roles, version)).await;
    roles.close_login(admin).await.map_err(DatabaseError::while_doing(doing))?;
    // its password was set just now: whatever the server says, another attempt may end otherwise
    session.map_err(|error| DatabaseError::Passing { doing: doing.to_owned(), why: reason(error) })
}

/// The transaction of a file says `read write`. What a file executes after it has ended that transaction is refused.
fn migrator_options(roles: &Roles, version: i32) -> String {
    let owner = escape_option(&roles.owner);
    let Schemas { own, weft, .. } = &roles.schemas;
    let transaction_timeout = if version >= 170_000 { "-c transaction_timeout=0" } else { "" };
    format!(
        "{LIMITS} {transaction_timeout} -c lock_timeout={LOCK_TIMEOUT} -c search_path={own},{weft} \
         -c default_transaction_read_only=on -c role={owner}"
    )
}

/// A value among the options of a connection, where white space separates and a backslash quotes.
fn escape_option(value: &str) -> String {
    value.chars().fold(String::new(), |mut escaped, c| {
        if c.is_ascii_whitespace() || c == '\\' {
            escaped.push('\\');
        }
        escaped.push(c);
        escaped
    })
}

async fn open(mut prepared: Prepared, options: &str) -> Result<Session, LoginError> {
    prepared.config.options(options).keepalives_interval(Duration::from_secs(5)).keepalives_retries(3);
    let (client, connection) = prepared.open().await?;
    let Prepared { address: Address { host, port, database, .. }, role, .. } = prepared;
    // ends with the client; a failure shows in the client's next call
    tokio::spawn(connection);
    let process = client.query_one("select pg_catalog.pg_backend_pid()", &[]).await.and_then(|row| row.try_get(0));
    let process = process.map_err(|source| LoginError::Connect { database, host, port, role, source })?;
    Ok(Session { client, process })
}

fn refused(setup: &DatabaseSetup, error: LoginError) -> DatabaseError {
    let doing = format!("log in to the database server {}", login::address(&setup.admin));
    match error {
        error if error.is_of_the_files() => DatabaseError::Login(with_causes(&error)),
        LoginError::Timeout { .. } => DatabaseError::Passing { doing, why: reason(error) },
        LoginError::Connect { database, host, role, source, .. } => match Failure::from(source) {
            Failure::Refused(refusal) => {
                let adopted = matches!(setup.admin.server, Server::Folder { .. });
                DatabaseError::LoginRefused { database, host, role, refusal: Box::new(refusal), adopted }
            }
            Failure::Locked => DatabaseError::Passing { doing, why: "a lock is held".to_owned() },
            Failure::Passing(why) => DatabaseError::Passing { doing, why },
        },
        error => DatabaseError::Passing { doing, why: reason(error) },
    }
}

fn reason(error: LoginError) -> String {
    match error {
        LoginError::Connect { source, .. } => Failure::from(source).to_string(),
        LoginError::Timeout { .. } => format!("{error}; its pod may not run, or a network policy may be in the way"),
        error => with_causes(&error),
    }
}

#[cfg(test)]
mod tests {
    use super::escape_option;

    #[test]
    fn an_option_with_white_space_stays_one() {
        assert_eq!(escape_option(r"the owner\s"), r"the\ owner\\s");
    }
}
