//! Weft's own tables and functions, by version.
//!
//! A part (the purpose of a database) is a list of SQL files; the file at place n brings it from version n to n + 1, and
//! each is applied once. A later release adds a file and never changes one; what it adds must let the previous minor
//! version of the data plane go on. Nothing is ever dropped. A database that is newer than this program is left alone.

use tokio_postgres::Transaction;

use super::roles::Roles;
use crate::contract::database_setup::Purpose;

const BASE: &str = include_str!("sql/base.sql");
const SERVICE: &[&str] = &[include_str!("sql/service.sql"), include_str!("sql/service_2.sql")];
const ORCHESTRATOR: &[&str] = &[include_str!("sql/orchestrator.sql")];

fn part(purpose: Purpose) -> (&'static str, &'static [&'static str]) {
    match purpose {
        Purpose::Service => ("service", SERVICE),
        Purpose::Orchestrator => ("orchestrator", ORCHESTRATOR),
    }
}

/// Brings Weft's tables and functions for `purpose` to this program's version.
pub async fn bring_up_to_date(
    transaction: &Transaction<'_>,
    purpose: Purpose,
    roles: &Roles,
) -> Result<(), tokio_postgres::Error> {
    transaction.batch_execute(&roles.fill(BASE)).await?;
    let (part, files) = part(purpose);
    let row = transaction.query_opt("select version from weft.layout where part = $1", &[&part]).await?;
    let found = row.map_or(Ok(0), |row| row.try_get::<_, i32>(0))?;
    for (version, sql) in (1_i32..).zip(files).skip_while(|&(version, _)| version <= found) {
        transaction.batch_execute(&roles.fill(sql)).await?;
        let record = "insert into weft.layout (part, version) values ($1, $2)
            on conflict (part) do update set version = excluded.version, applied_at = excluded.applied_at";
        transaction.execute(record, &[&part, &version]).await?;
        tracing::info!(part, version, "Weft's tables are up to date");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_knows_of_every_version() {
        for purpose in [Purpose::Service, Purpose::Orchestrator] {
            assert_eq!(purpose.layout(), part(purpose).1.len(), "{purpose:?}");
        }
    }
}
