//! A service's migrations: which files there are, which are still to be applied, and applying one.
//!
//! Files are applied in the byte order of their names (`10_x.sql` comes before `9_x.sql`: number them `009`, `010`), each
//! in a transaction of its own, which also records it. So whatever is killed, a file is applied and recorded, or neither.
//! A statement that cannot run in a transaction, such as `create index concurrently`, cannot be in a migration. A file
//! waits for locks as long as [`super::locks`] says, unless it says `set local lock_timeout = …` itself.
//!
//! - A file that was applied may not change: that is an error, since the database would differ from what the files say.
//! - A file that was applied may go: a team that has squashed its old files keeps a small ConfigMap.
//! - A new file must come after the last one applied, since a database set up today would apply it in another place.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tokio_postgres::Transaction;

use super::refusal::{Failure, Refusal};

#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    #[error("the migrations in {path} cannot be read: {source}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("migration {name} is not UTF-8 text; save it as UTF-8")]
    NotText { name: String },
    #[error(
        "migration {name} was changed after it was applied; put its old text back and add a new file with the change"
    )]
    Changed { name: String },
    #[error("migration {name} comes before {last}, which is applied already; give it a name that sorts after {last}")]
    OutOfOrder { name: String, last: String },
    #[error("migration {name} failed{}: {refusal}; it was rolled back, mend the file", line.map(|line| format!(" at line {line}")).unwrap_or_default())]
    Refused { name: String, line: Option<usize>, refusal: Refusal },
    #[error(
        "migration {name} ends its transaction itself; remove `commit` or `rollback` from it, and undo by hand what it left behind"
    )]
    EndsTransaction { name: String },
    #[error("migration {name} holds `copy … from stdin`, which needs psql; write `insert` instead")]
    Copies { name: String },
}

/// One `*.sql` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    pub name: String,
    pub sql: String,
}

impl Migration {
    /// Hex digits of the text's SHA-256.
    pub fn sha256(&self) -> String {
        format!("{:x}", Sha256::digest(&self.sql))
    }
}

/// A row of `weft.migration`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    pub name: String,
    pub sha256: String,
}

/// The folder's `*.sql` files in the order of their names. Hidden ones are left out, as a mounted ConfigMap has some.
pub fn read(folder: &Path) -> Result<Vec<Migration>, MigrationError> {
    let failed = |source| MigrationError::Read { path: folder.to_owned(), source };
    let mut migrations = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
        // follows links, which a mounted ConfigMap's files are
        if name.starts_with('.') || path.extension().is_none_or(|extension| extension != "sql") || !path.is_file() {
            continue;
        }
        let bytes = std::fs::read(&path).map_err(failed)?;
        let sql = String::from_utf8(bytes).map_err(|_| MigrationError::NotText { name: name.clone() })?;
        migrations.push(Migration { name, sql });
    }
    migrations.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(migrations)
}

/// The first file that is still to be applied, if the files agree with what is applied already. Both are sorted by name.
pub fn next<'a>(files: &'a [Migration], applied: &[Applied]) -> Result<Option<&'a Migration>, MigrationError> {
    let last = applied.last();
    for file in files {
        match applied.iter().find(|applied| applied.name == file.name) {
            Some(applied) if applied.sha256 == file.sha256() => {}
            Some(_) => return Err(MigrationError::Changed { name: file.name.clone() }),
            None => match last {
                Some(last) if file.name < last.name => {
                    return Err(MigrationError::OutOfOrder { name: file.name.clone(), last: last.name.clone() });
                }
                _ => return Ok(Some(file)),
            },
        }
    }
    Ok(None)
}

/// Why [`apply`] did not.
#[derive(Debug)]
pub enum ApplyError {
    Definite(MigrationError),
    Locked,
    Passing(String),
}

impl From<tokio_postgres::Error> for ApplyError {
    fn from(error: tokio_postgres::Error) -> Self {
        match Failure::from(error) {
            Failure::Refused(refusal) => Self::Passing(refusal.to_string()),
            Failure::Locked => Self::Locked,
            Failure::Passing(why) => Self::Passing(why),
        }
    }
}

/// What is applied, sorted by name in byte order.
pub async fn applied(transaction: &Transaction<'_>) -> Result<Vec<Applied>, tokio_postgres::Error> {
    let rows = transaction.query(r#"select name, sha256 from weft.migration order by name collate "C""#, &[]).await?;
    rows.iter().map(|row| Ok(Applied { name: row.try_get(0)?, sha256: row.try_get(1)? })).collect()
}

/// Applies and records one migration, as `owner` (a quoted identifier).
pub async fn apply(transaction: Transaction<'_>, migration: &Migration, owner: &str) -> Result<(), ApplyError> {
    let before = current_transaction(&transaction).await?;
    transaction.batch_execute(&format!("set local role {owner}; set local search_path = public, weft")).await?;
    let sql = migration.sql.strip_prefix('\u{feff}').unwrap_or(&migration.sql);
    transaction.batch_execute(sql).await.map_err(|error| refused(migration, sql, error))?;
    // the file may have become someone who cannot see `weft`
    transaction
        .batch_execute("reset session authorization; reset role")
        .await
        .map_err(|error| refused(migration, sql, error))?;
    if current_transaction(&transaction).await? != before {
        return Err(ApplyError::Definite(MigrationError::EndsTransaction { name: migration.name.clone() }));
    }
    let record = "insert into weft.migration (name, sha256) values ($1, $2)";
    let recorded = transaction.execute(record, &[&migration.name, &migration.sha256()]).await;
    recorded.map_err(|error| refused(migration, sql, error))?;
    // deferred constraints speak up here
    transaction.commit().await.map_err(|error| refused(migration, sql, error))
}

async fn current_transaction(transaction: &Transaction<'_>) -> Result<String, tokio_postgres::Error> {
    transaction.query_one("select pg_current_xact_id()::text", &[]).await?.try_get(0)
}

fn refused(migration: &Migration, sql: &str, error: tokio_postgres::Error) -> ApplyError {
    let name = migration.name.clone();
    // the driver gives up on a message that it did not expect, which only `copy` brings
    if error.as_db_error().is_none() && error.to_string().starts_with("unexpected message") {
        return ApplyError::Definite(MigrationError::Copies { name });
    }
    match Failure::from(error) {
        Failure::Refused(refusal) => {
            ApplyError::Definite(MigrationError::Refused { name, line: refusal.line(sql), refusal })
        }
        Failure::Locked => ApplyError::Locked,
        Failure::Passing(why) => ApplyError::Passing(why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, sql: &str) -> Migration {
        Migration { name: name.into(), sql: sql.into() }
    }

    fn done(file: &Migration) -> Applied {
        Applied { name: file.name.clone(), sha256: file.sha256() }
    }

    #[test]
    fn files_are_applied_one_after_the_other() {
        let files = [file("001.sql", "a"), file("002.sql", "b")];
        assert_eq!(next(&files, &[]).unwrap(), Some(&files[0]));
        assert_eq!(next(&files, &[done(&files[0])]).unwrap(), Some(&files[1]));
        assert_eq!(next(&files, &[done(&files[0]), done(&files[1])]).unwrap(), None);
    }

    #[test]
    fn an_applied_file_may_not_change() {
        let applied = [done(&file("001.sql", "a"))];
        let error = next(&[file("001.sql", "A")], &applied).unwrap_err();
        assert!(error.to_string().starts_with("migration 001.sql was changed after it was applied"), "{error}");
    }

    #[test]
    fn an_applied_file_may_go() {
        let files = [file("002.sql", "b"), file("003.sql", "c")];
        let applied = [done(&file("001.sql", "a")), done(&files[0])];
        assert_eq!(next(&files, &applied).unwrap(), Some(&files[1]));
    }

    #[test]
    fn a_new_file_comes_after_those_applied() {
        let files = [file("002.sql", "b"), file("010.sql", "c")];
        let error = next(&files, &[done(&files[1])]).unwrap_err();
        assert!(error.to_string().starts_with("migration 002.sql comes before 010.sql"), "{error}");
    }

    #[test]
    fn only_visible_sql_files_count_in_byte_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.sql", "a.sql", "10.sql", "9.sql", ".hidden.sql", "README.md"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        std::fs::create_dir(folder.path().join("folder.sql")).unwrap();
        let names: Vec<_> = read(folder.path()).unwrap().into_iter().map(|file| file.name).collect();
        assert_eq!(names, ["10.sql", "9.sql", "a.sql", "b.sql"]);
    }
}
