//! The roles of a database and what each may do, as SQL that can be repeated.
//!
//! | role | may |
//! |---|---|
//! | owner | own the schema `public`; make schemas and trusted extensions; cannot log in: migrations become it by `set role` |
//! | app | log in; read and write what migrations make (default privileges); Weft's functions; insert into the outbox |
//! | relay | log in, also for replication; read and delete outbox rows; keep its checkpoint |
//!
//! Nobody else may connect to the database. Passwords are sent as SCRAM verifiers (RFC 5802), so that the clear ones are
//! neither on the wire nor in the server's log.

use postgres_protocol::{
    escape::{escape_identifier, escape_literal},
    password::scram_sha_256,
};
use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::Transaction;

/// A role that logs in, and its password.
#[derive(Debug)]
pub struct Login {
    pub name: String,
    pub password: SecretString,
}

/// The roles of one database.
#[derive(Debug)]
pub struct Roles {
    pub owner: String,
    pub app: Login,
    pub relay: Option<Login>,
}

impl Roles {
    /// Replaces `{owner}`, `{app}` and `{relay}` in one of Weft's SQL files by quoted names.
    pub fn fill(&self, sql: &str) -> String {
        let sql = sql.replace("{owner}", &escape_identifier(&self.owner));
        let sql = sql.replace("{app}", &escape_identifier(&self.app.name));
        match &self.relay {
            Some(relay) => sql.replace("{relay}", &escape_identifier(&relay.name)),
            None => sql,
        }
    }

    /// Makes the roles that are missing, then says of all of them what they may do in `database`.
    pub async fn make(&self, transaction: &Transaction<'_>, database: &str) -> Result<(), tokio_postgres::Error> {
        let logins = std::iter::once(&self.app).chain(&self.relay).map(|login| &login.name);
        for role in logins.chain([&self.owner]) {
            let known = "select from pg_roles where rolname = $1";
            if transaction.query_opt(known, &[role]).await?.is_none() {
                transaction.batch_execute(&format!("create role {}", escape_identifier(role))).await?;
                tracing::info!(role, "role made");
            }
        }
        transaction.batch_execute(&self.attributes()).await?;
        transaction.batch_execute(&self.privileges(database)).await
    }

    fn attributes(&self) -> String {
        const HARMLESS: &str = "nosuperuser nocreatedb nocreaterole nobypassrls";
        let login = |login: &Login, replication: &str| {
            let name = escape_identifier(&login.name);
            let verifier = escape_literal(&scram_sha_256(login.password.expose_secret().as_bytes()));
            format!("alter role {name} login {replication} {HARMLESS} password {verifier};\n")
        };
        let owner = format!("alter role {} nologin noreplication {HARMLESS};\n", escape_identifier(&self.owner));
        let relay = self.relay.as_ref().map(|relay| login(relay, "replication"));
        owner + &login(&self.app, "noreplication") + &relay.unwrap_or_default()
    }

    fn privileges(&self, database: &str) -> String {
        let (owner, app) = (escape_identifier(&self.owner), escape_identifier(&self.app.name));
        let database = escape_identifier(database);
        let relay = self.relay.as_ref().map_or_else(String::new, |relay| {
            format!("grant connect on database {database} to {};", escape_identifier(&relay.name))
        });
        format!(
            "revoke all on database {database} from public;
            grant create, temporary on database {database} to {owner};
            grant connect, temporary on database {database} to {app};
            alter role {app} in database {database} set search_path = public, weft;
            create schema if not exists public;
            alter schema public owner to {owner};
            revoke all on schema public from public;
            grant usage on schema public to {app};
            alter default privileges for role {owner} grant usage on schemas to {app};
            alter default privileges for role {owner} grant select, insert, update, delete on tables to {app};
            alter default privileges for role {owner} grant usage, select on sequences to {app};
            {relay}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roles() -> Roles {
        let login = |name: &str| Login { name: name.into(), password: SecretString::from("hush-hush") };
        Roles { owner: "o\"wner".into(), app: login("app"), relay: Some(login("relay")) }
    }

    #[test]
    fn names_are_quoted() {
        assert_eq!(roles().fill("grant x to {owner}, {app}; '{}'"), r#"grant x to "o""wner", "app"; '{}'"#);
    }

    #[test]
    fn no_clear_password_is_in_a_statement() {
        let sql = roles().attributes();
        assert!(!sql.contains("hush-hush"));
        assert_eq!(sql.matches("password 'SCRAM-SHA-256$4096:").count(), 2);
    }
}
