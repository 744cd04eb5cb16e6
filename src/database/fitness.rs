//! Whether a server and a database that Weft did not make for this service are as it needs them, before anything is changed.
//!
//! What a person has to change on the server passes by itself once it is changed, so it is no definite error.

use tokio_postgres::{Client, Transaction};

use super::{
    DatabaseError,
    roles::Roles,
    schemas::{Schemas, Tenancy},
};
use crate::contract::database_setup::{DatabaseSetup, Purpose};

/// The oldest version of PostgreSQL that Weft uses, as in `server_version_num`.
const OLDEST: i32 = 150_000;

const SERVER: &str = "
    select current_setting('server_version_num')::int, current_setting('server_version'), pg_is_in_recovery(),
           current_setting('wal_level')";

/// Tables that roles of the service and others may both write: its own with rights for others, and others' with rights for it.
const WRITTEN: &str = "
    select distinct format('%s.%s', n.nspname, c.relname)
      from pg_class as c join pg_namespace as n on n.oid = c.relnamespace, aclexplode(c.relacl) as granted
     where c.relkind in ('r', 'p')
       and granted.privilege_type in ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE')
       and n.nspname !~ '^(pg_.*|information_schema|weft|weft_.*)$'
       and case when n.nspname = $1
                then granted.grantee <> c.relowner and granted.grantee not in (select oid from pg_roles where rolname = any ($2))
                else granted.grantee in (select oid from pg_roles where rolname = any ($2)) end
     order by 1";

/// Refuses a server that cannot be used.
pub async fn check_server(admin: &Client, setup: &DatabaseSetup, roles: &Roles) -> Result<(), DatabaseError> {
    if roles.schemas.tenancy != Tenancy::Adopted {
        return Ok(());
    }
    check_version_and_log(admin, setup).await?;
    let failed = DatabaseError::while_doing("find out who sets the database up");
    let unfit = |what: String| Err(DatabaseError::Unfit(what));
    let user = "select rolname::text, rolsuper from pg_roles where rolname = current_user";
    let row = admin.query_one(user, &[]).await.map_err(&failed)?;
    let name: &str = row.try_get(0).map_err(&failed)?;
    let app = &roles.app.name;
    if name == app {
        return unfit(format!(
            "`username` and `admin-username` of the Secret are both {name}: give the service a login of its own"
        ));
    }
    if !row.try_get::<_, bool>(1).map_err(&failed)? {
        return unfit(format!(
            "{name}, the `admin-username` of the Secret, is no superuser: name one, or leave both it and `admin-password` out, and run what `weft database setup --print-sql` prints"
        ));
    }
    let superuser = "select from pg_roles where rolname = $1 and rolsuper";
    if admin.query_opt(superuser, &[app]).await.map_err(&failed)?.is_some() {
        return unfit(format!(
            "{app}, the `username` of the Secret, is a superuser: give the service a login that may do less"
        ));
    }
    Ok(())
}

/// Refuses a server that is too old, or read-only, or has no log that the relay can read.
pub async fn check_version_and_log(client: &Client, setup: &DatabaseSetup) -> Result<(), DatabaseError> {
    let failed = DatabaseError::while_doing("find out what the server is");
    let row = client.query_one(SERVER, &[]).await.map_err(&failed)?;
    if row.try_get::<_, i32>(0).map_err(&failed)? < OLDEST {
        let version: &str = row.try_get(1).map_err(&failed)?;
        return Err(DatabaseError::Unfit(format!(
            "the server is PostgreSQL {version}, and Weft needs 15 or newer: upgrade it, or name another server in the Secret"
        )));
    }
    if row.try_get(2).map_err(&failed)? {
        let what = "the server is a read-only replica: name its primary in `host` of the Secret";
        return Err(DatabaseError::Unfit(what.to_owned()));
    }
    let level: &str = row.try_get(3).map_err(&failed)?;
    if setup.log_tailing && setup.purpose == Purpose::Service && level != "logical" {
        return Err(DatabaseError::Unfit(format!(
            "the server has wal_level = {level}, and the OutboxRelay reads the transaction log: set wal_level = logical and restart the server, or give the relay `mode: Polling`"
        )));
    }
    Ok(())
}

/// Refuses a schema that somebody else has, and tables to be read that are not there.
pub async fn check_schema(transaction: &Transaction<'_>, roles: &Roles) -> Result<(), DatabaseError> {
    let Schemas { tenancy, own, .. } = &roles.schemas;
    if *tenancy != Tenancy::Shared {
        return Ok(());
    }
    let failed = DatabaseError::while_doing("find out what the database has");
    let owner = "select pg_get_userbyid(nspowner)::text from pg_namespace where nspname = $1";
    let owner = transaction.query_opt(owner, &[own]).await.map_err(&failed)?;
    let owner = owner.map(|row| row.try_get::<_, String>(0)).transpose().map_err(&failed)?;
    if let Some(owner) = owner.filter(|owner| *owner != roles.owner) {
        return Err(DatabaseError::Unfit(format!(
            "sharedWith.schema is {own}, and that schema of the database {} belongs to {owner}: name another one",
            roles.database
        )));
    }
    for table in &roles.reads {
        let (schema, name) = table.split_once('.').unwrap_or(("public", table));
        let there = "select from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
             where n.nspname = $1 and c.relname = $2 and c.relkind in ('r', 'p', 'v', 'm', 'f')";
        if transaction.query_opt(there, &[&schema, &name]).await.map_err(&failed)?.is_none() {
            return Err(DatabaseError::Unfit(format!(
                "sharedWith.reads names {table}, and the database {} has no such table or view: correct it, or have the other service make it",
                roles.database
            )));
        }
    }
    Ok(())
}

/// The tables that roles of this service and others may both write.
pub async fn written_by_others(admin: &Client, roles: &Roles) -> Result<Vec<String>, tokio_postgres::Error> {
    let own: Vec<&String> = [&roles.owner, &roles.migrator, &roles.app.name]
        .into_iter()
        .chain(roles.relay.as_ref().map(|relay| &relay.name))
        .collect();
    let rows = admin.query(WRITTEN, &[&roles.schemas.own, &own]).await?;
    rows.iter().map(|row| row.try_get(0)).collect()
}
