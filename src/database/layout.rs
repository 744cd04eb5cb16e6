//! Weft's own tables and functions, by version.
//!
//! A part is a list of SQL files; the file at place n brings it from version n to n + 1, and each is applied once. Every
//! database has the part `base`, and the part of its purpose. A later release adds a file and never changes one; what it
//! adds must let the previous minor version of the data plane go on. Nothing is ever dropped. A database that is newer
//! than this program is left alone.

use tokio_postgres::Transaction;

use super::{locks::LOCK_TIMEOUT, roles::Roles, schemas::Schemas};
use crate::contract::database_setup::{DuplicateWindow, Purpose};

type Part = (&'static str, &'static [&'static str]);

const BASE: Part = ("base", &[include_str!("sql/base.sql")]);
const SERVICE: Part = ("service", &[include_str!("sql/service.sql")]);
const ORCHESTRATOR: Part = ("orchestrator", &[include_str!("sql/orchestrator.sql")]);
const CHOREOGRAPHY: Part = ("choreography", &[include_str!("sql/choreography.sql")]);

/// Which version of each part is here. Changes nothing when it exists.
pub const LAYOUT: &str = "
    create schema if not exists weft;
    create table if not exists weft.layout (
        part       text primary key,
        version    integer not null,
        applied_at timestamptz not null default now()
    );";

fn parts(purpose: Purpose) -> &'static [Part] {
    match purpose {
        Purpose::Service => &[BASE, SERVICE],
        Purpose::Orchestrator => &[BASE, ORCHESTRATOR, CHOREOGRAPHY],
    }
}

/// Each file of `purpose`, with its part and the version that it brings that to.
pub fn files(purpose: Purpose) -> impl Iterator<Item = (&'static str, i32, &'static str)> {
    parts(purpose)
        .iter()
        .flat_map(|(part, files)| (1_i32..).zip(*files).map(move |(version, sql)| (*part, version, *sql)))
}

/// Brings Weft's tables and functions for `purpose` to this program's version.
pub async fn bring_up_to_date(
    transaction: &Transaction<'_>,
    purpose: Purpose,
    roles: &Roles,
) -> Result<(), tokio_postgres::Error> {
    // the service may wait behind a change of a table that it uses
    let begin = roles.fill(&format!("set local lock_timeout = '{LOCK_TIMEOUT}'; {LAYOUT}"));
    transaction.batch_execute(&begin).await?;
    for (part, files) in parts(purpose) {
        let version = roles.fill("select version from weft.layout where part = $1");
        let row = transaction.query_opt(&version, &[part]).await?;
        let found = row.map_or(Ok(0), |row| row.try_get::<_, i32>(0))?;
        for (version, sql) in (1_i32..).zip(*files).skip_while(|&(version, _)| version <= found) {
            transaction.batch_execute(&roles.fill(sql)).await?;
            let record = "insert into weft.layout (part, version) values ($1, $2)
                on conflict (part) do update set version = excluded.version, applied_at = excluded.applied_at";
            transaction.execute(&roles.fill(record), &[part, &version]).await?;
            tracing::info!(part, version, "Weft's tables are up to date");
        }
    }
    Ok(())
}

/// Sets for how long repetitions are recognized.
pub async fn set_duplicate_window(
    transaction: &Transaction<'_>,
    window: DuplicateWindow,
    schemas: &Schemas,
) -> Result<(), tokio_postgres::Error> {
    const SQL: &str = "update weft.duplicate_window set keep = $2::bigint * interval '1 millisecond' where part = $1";
    for (part, milliseconds) in [("messages", window.messages_ms), ("commands", window.commands_ms)] {
        transaction.execute(&schemas.fill(SQL), &[&part, &i64::try_from(milliseconds).unwrap_or(i64::MAX)]).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_knows_of_every_version() {
        for purpose in [Purpose::Service, Purpose::Orchestrator] {
            let versions: usize = parts(purpose).iter().map(|(_, files)| files.len()).sum();
            assert_eq!(purpose.layout(), versions, "{purpose:?}");
        }
    }
}
