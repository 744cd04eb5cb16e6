//! The roles of a database and what each may do, as SQL that can be repeated.
//!
//! | role | may |
//! |---|---|
//! | owner | own the schema `public`; make schemas and trusted extensions; cannot log in |
//! | migrator | become the owner, nothing else; logs in only at the moment when a set-up opens its session ([`super::session`]) |
//! | app | log in; read and write what migrations make (default privileges); Weft's functions; insert into the outbox |
//! | relay | log in, also for replication; read and delete outbox rows; keep its checkpoint |
//!
//! Each run says all of it again, so that a role that has become more powerful meanwhile is brought back. Nobody else may
//! connect to the database. Passwords are sent as SCRAM verifiers (RFC 5802), so that the clear ones are neither on the
//! wire nor in the server's log.

use postgres_protocol::{
    escape::{escape_identifier, escape_literal},
    password::scram_sha_256,
};
use secrecy::{ExposeSecret, SecretString};
use tokio_postgres::{Client, Transaction};

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
    /// Of this database alone, while the server's other databases may share the other roles: see [`migrator_of`].
    pub migrator: String,
    pub app: Login,
    pub relay: Option<Login>,
}

/// Name of the migrator's role of a database. Roles belong to the server, so that two databases must not share one whose
/// password changes with every run.
pub fn migrator_of(database: &str) -> String {
    const PREFIX: &str = "weft_migrator_";
    // the server cuts names off after 63 bytes
    let room = database.floor_char_boundary(63 - PREFIX.len());
    format!("{PREFIX}{}", database.get(..room).unwrap_or_default())
}

const HARMLESS: &str = "nosuperuser nocreatedb nocreaterole nobypassrls";

/// Roles that `$1` are members of, as statements that end it.
const MEMBERSHIPS: &str = "
    select format('revoke %I from %I', granted.rolname, member.rolname)
           || coalesce(format(' granted by %I', grantor.rolname), '') || ' cascade'
      from pg_auth_members as m
      join pg_roles as granted on granted.oid = m.roleid
      join pg_roles as member on member.oid = m.member
      left join pg_roles as grantor on grantor.oid = m.grantor
     where member.rolname = any ($1) or granted.rolname = $2";

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
        // Roles belong to the server: set-ups of its other databases wait here, as would anyone else who changes roles, or
        // two of them would change one role at once, which the server refuses. Whoever logs in does not wait.
        transaction.batch_execute("lock table pg_catalog.pg_authid in share row exclusive mode").await?;
        let logins = std::iter::once(&self.app).chain(&self.relay).map(|login| &login.name);
        let roles: Vec<_> = logins.chain([&self.owner, &self.migrator]).collect();
        for role in &roles {
            let known = "select from pg_roles where rolname = $1";
            if transaction.query_opt(known, &[role]).await?.is_none() {
                transaction.batch_execute(&format!("create role {}", escape_identifier(role))).await?;
                tracing::info!(role, "role made");
            }
        }
        for revoke in transaction.query(MEMBERSHIPS, &[&roles, &self.migrator]).await? {
            transaction.batch_execute(revoke.try_get(0)?).await?;
        }
        transaction.batch_execute(&self.attributes()).await?;
        transaction.batch_execute(&self.privileges(database)).await
    }

    fn attributes(&self) -> String {
        let login = |login: &Login, replication: &str| {
            let name = escape_identifier(&login.name);
            let verifier = verifier(&login.password);
            format!("alter role {name} login {replication} {HARMLESS} password {verifier} valid until 'infinity';\n")
        };
        let relay = self.relay.as_ref().map(|relay| login(relay, "replication"));
        let (owner, migrator) = (escape_identifier(&self.owner), escape_identifier(&self.migrator));
        format!(
            "alter role {owner} nologin noreplication {HARMLESS} password null;
            alter role {migrator} nologin noinherit noreplication {HARMLESS} password null valid until '-infinity';
            alter role {migrator} reset all;
            grant {owner} to {migrator};
            {}{}",
            login(&self.app, "noreplication"),
            relay.unwrap_or_default()
        )
    }

    /// Lets the migrator log in with `password`, for a minute at most if nobody calls [`Roles::close_login`].
    pub async fn open_login(&self, admin: &Client, password: &SecretString) -> Result<(), tokio_postgres::Error> {
        let soon = admin.query_one("select (clock_timestamp() + interval '1 minute')::text", &[]).await?;
        let (migrator, soon) = (escape_identifier(&self.migrator), escape_literal(soon.try_get(0)?));
        let open = format!("alter role {migrator} login password {} valid until {soon}", verifier(password));
        admin.batch_execute(&open).await
    }

    /// Ends that: a session that is open goes on, and no other one is possible.
    pub async fn close_login(&self, admin: &Client) -> Result<(), tokio_postgres::Error> {
        let close =
            format!("alter role {} nologin password null valid until '-infinity'", escape_identifier(&self.migrator));
        admin.batch_execute(&close).await
    }

    fn privileges(&self, database: &str) -> String {
        let (owner, app) = (escape_identifier(&self.owner), escape_identifier(&self.app.name));
        let migrator = escape_identifier(&self.migrator);
        let database = escape_identifier(database);
        let relay = self.relay.as_ref().map_or_else(String::new, |relay| {
            format!("grant connect on database {database} to {};", escape_identifier(&relay.name))
        });
        format!(
            "revoke all on database {database} from public;
            grant create, temporary on database {database} to {owner};
            grant connect on database {database} to {migrator};
            alter role {migrator} in database {database} reset all;
            grant connect, temporary on database {database} to {app};
            alter role {app} in database {database} set search_path = public, weft;
            create schema if not exists public;
            alter schema public owner to {owner};
            revoke all on schema public from public;
            grant usage on schema public to {app};
            alter default privileges for role {owner} grant usage on schemas to {app};
            alter default privileges for role {owner} grant select, insert, update, delete, truncate on tables to {app};
            alter default privileges for role {owner} grant usage, select, update on sequences to {app};
            {relay}"
        )
    }
}

fn verifier(password: &SecretString) -> String {
    escape_literal(&scram_sha_256(password.expose_secret().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn roles() -> Roles {
        let login = |name: &str| Login { name: name.into(), password: SecretString::from("hush-hush") };
        Roles {
            owner: "o\"wner".into(),
            migrator: migrator_of("orders"),
            app: login("app"),
            relay: Some(login("relay")),
        }
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

    #[test]
    fn a_migrators_name_fits_the_server() {
        assert_eq!(migrator_of("order_history"), "weft_migrator_order_history");
        assert_eq!(migrator_of(&"ö".repeat(31)).len(), 62);
    }
}
