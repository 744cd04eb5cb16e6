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

use super::schemas::{Schemas, Tenancy};

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
    /// Of this service in this database alone, while the server's other databases may share the other roles: see
    /// [`Schemas::migrator_of`].
    pub migrator: String,
    pub app: Login,
    pub relay: Option<Login>,
    pub schemas: Schemas,
    /// Tables and views of others, `SCHEMA.NAME`, that the app and the owner may read.
    pub reads: Vec<String>,
    pub database: String,
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

/// What ends that the roles `$1` may read a relation outside of the schemas `$2` which is not among `$3`.
const READABLE: &str = "
    select format('revoke select on %I.%I from %I', n.nspname, c.relname, granted.grantee::regrole::name)
      from pg_class as c join pg_namespace as n on n.oid = c.relnamespace, aclexplode(c.relacl) as granted
     where granted.privilege_type = 'SELECT'
       and granted.grantee in (select oid from pg_roles where rolname = any ($1))
       and n.nspname <> all ($2)
       and format('%s.%s', n.nspname, c.relname) <> all ($3)";

impl Roles {
    /// Replaces `{owner}`, `{app}` and `{relay}` in one of Weft's SQL files by quoted names.
    pub fn fill(&self, sql: &str) -> String {
        let sql = self.schemas.fill(sql).replace("{owner}", &escape_identifier(&self.owner));
        let sql = sql.replace("{app}", &escape_identifier(&self.app.name));
        match &self.relay {
            Some(relay) => sql.replace("{relay}", &escape_identifier(&relay.name)),
            None => sql,
        }
    }

    /// Makes the roles that are missing, then says of all of them what they may do in `database`.
    pub async fn make(&self, transaction: &Transaction<'_>) -> Result<(), tokio_postgres::Error> {
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
        transaction.batch_execute(&self.privileges()).await?;
        self.grant_reads(transaction).await
    }

    /// Of tables and views outside of the service's schemas, app and owner may read those that are named, and no other.
    async fn grant_reads(&self, transaction: &Transaction<'_>) -> Result<(), tokio_postgres::Error> {
        if self.schemas.tenancy != Tenancy::Shared {
            return Ok(());
        }
        let readers = [&self.app.name, &self.owner];
        let own = [&self.schemas.own, &self.schemas.weft];
        for revoke in transaction.query(READABLE, &[&readers.as_slice(), &own.as_slice(), &self.reads]).await? {
            transaction.batch_execute(revoke.try_get(0)?).await?;
        }
        let readers = readers.map(|role| escape_identifier(role)).join(", ");
        for table in &self.reads {
            let Some((schema, name)) = table.split_once('.') else { continue };
            let (schema, name) = (escape_identifier(schema), escape_identifier(name));
            let grant =
                format!("grant usage on schema {schema} to {readers}; grant select on {schema}.{name} to {readers}");
            transaction.batch_execute(&grant).await?;
        }
        Ok(())
    }

    fn attributes(&self) -> String {
        self.attributes_with(|login| format!("password {}", verifier(&login.password)))
    }

    /// The same, with the passwords left as they are.
    pub fn attributes_without_passwords(&self) -> String {
        self.attributes_with(|_| String::new())
    }

    fn attributes_with(&self, password: impl Fn(&Login) -> String) -> String {
        let login = |login: &Login, replication: &str| {
            let (name, password) = (escape_identifier(&login.name), password(login));
            format!("alter role {name} login {replication} {HARMLESS} {password} valid until 'infinity';\n")
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

    pub fn privileges(&self) -> String {
        let (owner, app) = (escape_identifier(&self.owner), escape_identifier(&self.app.name));
        let (migrator, database) = (escape_identifier(&self.migrator), escape_identifier(&self.database));
        let (own, weft) = (escape_identifier(&self.schemas.own), escape_identifier(&self.schemas.weft));
        let relay = self.relay.as_ref().map_or_else(String::new, |relay| {
            format!("grant connect on database {database} to {};", escape_identifier(&relay.name))
        });
        let of_the_database = match self.schemas.tenancy {
            Tenancy::Own => format!(
                "revoke all on database {database} from public;
                grant create, temporary on database {database} to {owner};
                create schema if not exists public;
                alter schema public owner to {owner};
                revoke all on schema public from public;"
            ),
            // others may use the database: they keep what they have
            Tenancy::Adopted => format!(
                "grant create, temporary on database {database} to {owner};
                create schema if not exists public;
                grant usage, create on schema public to {owner};"
            ),
            Tenancy::Shared => format!(
                "grant temporary on database {database} to {owner};
                create schema if not exists {own} authorization {owner};
                revoke all on schema {own} from public;"
            ),
        };
        format!(
            "{of_the_database}
            grant connect on database {database} to {migrator};
            alter role {migrator} in database {database} reset all;
            grant connect, temporary on database {database} to {app};
            alter role {app} in database {database} set search_path = {own}, {weft};
            grant usage on schema {own} to {app};
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
            migrator: "weft_migrator_orders".into(),
            app: login("app"),
            relay: Some(login("relay")),
            schemas: Schemas { tenancy: Tenancy::Own, own: "public".into(), weft: "weft".into() },
            reads: Vec::new(),
            database: "orders".into(),
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
}
