//! A migration that PostgreSQL does not execute in a transaction, such as `create index concurrently`, or a procedure that commits
//! as it goes. It is one statement, in a file whose first line is `-- weft: no transaction`.
//!
//! It is executed first and recorded then, so a set-up that is killed in between executes it again: it must be repeatable. Indexes
//! that a failure left invalid (PostgreSQL's documentation of `CREATE INDEX`, "Building Indexes Concurrently") are dropped.

use tokio_postgres::Client;

use super::migrations::{ApplyError, Migration, MigrationError, failure};

const MARKER: &str = "-- weft: no transaction";

/// The key of the advisory lock that the session of such a file holds: "weft mig" in ASCII. The server's process of a set-up that was
/// killed may still execute it.
const LOCK: i64 = 0x7765_6674_206d_6967;

/// Indexes of the owner's that are not valid and that the file `$1` names.
const INVALID: &str = r"
select format('%I.%I', n.nspname, c.relname)
  from pg_catalog.pg_index as i
  join pg_catalog.pg_class as c on c.oid = i.indexrelid
  join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
 where not i.indisvalid and c.relkind = 'i' and n.nspname <> 'pg_toast'
   and c.relowner = (select oid from pg_catalog.pg_roles where rolname = current_user)
   and position(pg_catalog.lower(c.relname) in pg_catalog.lower($1)) > 0";

fn is_marker(line: &str) -> bool {
    line.trim().eq_ignore_ascii_case(MARKER)
}

/// The lines of the file from the first one on that is not blank.
fn lines(migration: &Migration) -> impl Iterator<Item = &str> {
    migration.text().lines().skip_while(|line| line.trim().is_empty())
}

/// Whether the file asks for it.
pub fn is_asked(migration: &Migration) -> bool {
    lines(migration).next().is_some_and(is_marker)
}

/// Refuses a marker where it has no effect, and a statement that fails when it is executed again after it succeeded.
pub fn check(migration: &Migration) -> Result<(), MigrationError> {
    let name = || migration.name.clone();
    if lines(migration).skip(1).any(is_marker) {
        return Err(MigrationError::LateMarker { name: name() });
    }
    if !is_asked(migration) {
        return Ok(());
    }
    let words = words(migration.text());
    let words: Vec<&str> = words.iter().take(8).map(String::as_str).filter(|word| *word != "unique").collect();
    let (verb, rest) = match words.as_slice() {
        [verb @ ("create" | "drop"), "index", rest @ ..] => {
            (*verb, rest.strip_prefix(&["concurrently"]).unwrap_or(rest))
        }
        _ => return Ok(()),
    };
    let (guard, is_guarded) = if verb == "create" {
        ("if not exists", rest.starts_with(&["if", "not", "exists"]))
    } else {
        ("if exists", rest.starts_with(&["if", "exists"]))
    };
    if is_guarded { Ok(()) } else { Err(MigrationError::NotRepeatable { name: name(), guard }) }
}

/// Executes the file in the migrator's session, outside of a transaction.
pub async fn execute(migrator: &Client, migration: &Migration) -> Result<(), ApplyError> {
    let sql = migration.text();
    let failed = |error| failure(migration, error);
    // it waits for old transactions, and holds up nobody meanwhile; a lock on a table is waited for as long as super::locks says
    let settings = "set default_transaction_read_only = off; set lock_timeout = 0";
    migrator.batch_execute(settings).await.map_err(failed)?;
    let free = migrator.query_one("select pg_catalog.pg_try_advisory_lock($1)", &[&LOCK]).await;
    if !free.and_then(|row| row.try_get::<_, bool>(0)).map_err(failed)? {
        let why = "a set-up that has ended began it, and the server still executes it".to_owned();
        return Err(ApplyError::Passing(why));
    }
    drop_invalid(migrator, sql).await.map_err(failed)?;
    // the extended protocol takes one statement
    match migrator.execute(sql, &[]).await {
        Ok(_) => Ok(()),
        Err(error) => {
            // the session is still of use: nothing is rolled back but the statement
            let _ = drop_invalid(migrator, sql).await;
            Err(untransacted(migration, error))
        }
    }
}

async fn drop_invalid(migrator: &Client, sql: &str) -> Result<(), tokio_postgres::Error> {
    for row in migrator.query(INVALID, &[&sql]).await? {
        let index: String = row.try_get(0)?;
        tracing::info!(index, "dropping an index that is not valid");
        migrator.batch_execute(&format!("drop index concurrently if exists {index}")).await?;
    }
    Ok(())
}

fn untransacted(migration: &Migration, error: tokio_postgres::Error) -> ApplyError {
    match failure(migration, error) {
        ApplyError::Definite(MigrationError::Refused { name, line, refusal }) => {
            ApplyError::Definite(if refusal.is_several_statements() {
                MigrationError::NotAlone { name }
            } else {
                MigrationError::RefusedAlone { name, line, refusal }
            })
        }
        other => other,
    }
}

/// The words of a statement in lower case, without comments.
fn words(sql: &str) -> Vec<String> {
    let mut text = String::with_capacity(sql.len());
    let mut rest = sql;
    while let Some(next) = rest.chars().next() {
        if rest.starts_with("--") {
            rest = rest.find('\n').and_then(|end| rest.get(end..)).unwrap_or_default();
        } else if rest.starts_with("/*") {
            rest = rest.find("*/").and_then(|end| rest.get(end + 2..)).unwrap_or_default();
            text.push(' ');
        } else {
            text.push(next.to_ascii_lowercase());
            rest = rest.get(next.len_utf8()..).unwrap_or_default();
        }
    }
    text.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(sql: &str) -> Migration {
        Migration { name: "004.sql".into(), sql: sql.into() }
    }

    #[test]
    fn the_first_line_asks() {
        assert!(is_asked(&file("-- weft: no transaction\nvacuum;")));
        assert!(is_asked(&file("\u{feff}\n  -- Weft: no transaction \nvacuum;")));
        assert!(!is_asked(&file("select '-- weft: no transaction';")));
        let late = check(&file("select 1;\n-- weft: no transaction\n")).unwrap_err();
        assert!(late.to_string().contains("make it the first line"), "{late}");
    }

    #[test]
    fn what_could_not_be_repeated_is_refused() {
        let file = |sql: &str| file(&format!("-- weft: no transaction\n{sql}"));
        for good in [
            "create index concurrently if not exists a on t (b)",
            "create unique index concurrently if not exists a on t (b)",
            "-- create index\n/* drop index */ drop index concurrently if exists a",
            "reindex index concurrently a",
            "call backfill()",
        ] {
            check(&file(good)).unwrap();
        }
        for (bad, guard) in [
            ("create index concurrently a on t (b)", "if not exists"),
            ("CREATE UNIQUE INDEX -- x\n CONCURRENTLY a on t (b)", "if not exists"),
            ("drop index concurrently a", "if exists"),
        ] {
            let refused = check(&file(bad)).unwrap_err().to_string();
            assert!(refused.contains(&format!("`{guard}`")), "{refused}");
        }
    }
}
