//! A service's migrations: which files there are, which are still to be applied, and applying one.
//!
//! Files are applied in the byte order of their names (numbers of different length are refused: `10_x.sql` would come
//! before `9_x.sql`), each in a transaction of its own, which also records it. So whatever is killed, a file is applied
//! and recorded, or neither. A statement that cannot run in a transaction, such as `create index concurrently`, is a file
//! of its own, which says so ([`super::no_transaction`]). A file waits for locks as long as [`super::locks`] says, unless
//! it says `set local lock_timeout = …`.
//!
//! - A file that was applied may not change: that is an error, since the database would differ from what the files say.
//! - A file that was applied may go: a team that has squashed its old files keeps a small ConfigMap.
//! - A new file must come after the last one applied, since a database set up today would apply it in another place.
//!
//! A file is executed in the migrator's session ([`super::session`]), which may do what the owner may. The superuser says
//! in `weft.migration_attempt` which file it will be; the functions of `sql/base.sql` record it.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};
use tokio_postgres::Client;

use super::{
    no_transaction,
    other_tools::{self, OtherTool},
    refusal::{Failure, Refusal},
    schemas::Schemas,
};
use crate::contract::database_setup::is_migration;

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
    #[error(transparent)]
    OtherTool(#[from] OtherTool),
    #[error("migration {name} failed{}: {refusal}; it was rolled back, correct the file", at(*line))]
    Refused { name: String, line: Option<usize>, refusal: Refusal },
    #[error(
        "migration {name} ends its transaction itself, or says `set constraints all`: remove `begin`, `commit` and `rollback`, since each file is one transaction already, and name the constraints"
    )]
    EndsTransaction { name: String },
    #[error(
        "migration {name} leaves {object} to the login that executes it, not to the owner: remove `set role` from the file; it was rolled back"
    )]
    WrongOwner { name: String, object: String },
    #[error(
        "migration {name} has a statement that PostgreSQL does not execute in a transaction ({message}): move it into a file of its own whose first line is `-- weft: no transaction`"
    )]
    NeedsNoTransaction { name: String, message: String },
    #[error(
        "migration {name} says `-- weft: no transaction` further down, where it has no effect: make it the first line, and leave one statement in the file"
    )]
    LateMarker { name: String },
    #[error(
        "migration {name} is executed without a transaction and has more than one statement: give each a file of its own, since nothing could roll the first ones back"
    )]
    NotAlone { name: String },
    #[error(
        "migration {name} is executed without a transaction, and again if the set-up is killed before it is recorded: write `{guard}`"
    )]
    NotRepeatable { name: String, guard: &'static str },
    #[error(
        "migration {name} failed{}: {refusal}; it has no transaction that could be rolled back, so see what it left, and correct the file", at(*line)
    )]
    RefusedAlone { name: String, line: Option<usize>, refusal: Refusal },
    #[error("migration {name} holds `copy … from stdin`, which needs psql; write `insert` instead")]
    Copies { name: String },
}

fn at(line: Option<usize>) -> String {
    line.map(|line| format!(" at line {line}")).unwrap_or_default()
}

/// One `*.sql` file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Migration {
    pub name: String,
    pub sql: String,
}

impl Migration {
    /// The SQL, without a byte order mark.
    pub fn text(&self) -> &str {
        self.sql.strip_prefix('\u{feff}').unwrap_or(&self.sql)
    }

    /// Hex digits of the file's SHA-256.
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

/// The folder's migrations in the order of their names, all of them written for Weft.
pub fn read(folder: &Path) -> Result<Vec<Migration>, MigrationError> {
    let failed = |source| MigrationError::Read { path: folder.to_owned(), source };
    let mut migrations = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let Some(name) = path.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
        // follows links, which a mounted ConfigMap's files are
        if !is_migration(&name) || !path.is_file() {
            continue;
        }
        let bytes = std::fs::read(&path).map_err(failed)?;
        let sql = String::from_utf8(bytes).map_err(|_| MigrationError::NotText { name: name.clone() })?;
        migrations.push(Migration { name, sql });
    }
    migrations.sort_by(|a, b| a.name.cmp(&b.name));
    other_tools::refuse(&migrations)?;
    for migration in &migrations {
        no_transaction::check(migration)?;
    }
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

/// What is applied, sorted by name in byte order.
pub async fn applied(admin: &Client, schemas: &Schemas) -> Result<Vec<Applied>, tokio_postgres::Error> {
    let applied = schemas.fill(r#"select name, sha256 from weft.migration order by name collate "C""#);
    let rows = admin.query(&applied, &[]).await?;
    rows.iter().map(|row| Ok(Applied { name: row.try_get(0)?, sha256: row.try_get(1)? })).collect()
}

/// Says, in the superuser's session, which file is applied next; gives the token that ends it. Waits for a session that
/// still executes a file, although its set-up is gone.
pub async fn announce(
    admin: &mut Client,
    migration: &Migration,
    schemas: &Schemas,
) -> Result<String, tokio_postgres::Error> {
    let token = format!("{:032x}", rand::random::<u128>());
    let transaction = admin.transaction().await?;
    transaction.batch_execute(&schemas.fill("delete from weft.migration_attempt")).await?;
    let insert = schemas.fill("insert into weft.migration_attempt (name, sha256, token) values ($1, $2, $3)");
    transaction.execute(&insert, &[&migration.name, &migration.sha256(), &token]).await?;
    transaction.commit().await?;
    Ok(token)
}

/// Applies and records, in the migrator's session, the migration that was announced. After an error the session is of no
/// use any more.
pub async fn apply(migrator: &Client, migration: &Migration, token: &str, schemas: &Schemas) -> Result<(), ApplyError> {
    let failed = |error| failure(migration, error);
    let has_transaction = !no_transaction::is_asked(migration);
    if !has_transaction {
        no_transaction::execute(migrator, migration).await?;
    }
    let begin = schemas.fill("begin read write; select weft.begin_migration()");
    migrator.batch_execute(&begin).await.map_err(failed)?;
    if has_transaction {
        migrator.batch_execute(migration.text()).await.map_err(failed)?;
    }
    // the file may have become the migrator, who cannot see `weft`
    migrator.batch_execute("reset role").await.map_err(failed)?;
    migrator.execute(&schemas.fill("select weft.end_migration($1)"), &[&token]).await.map_err(failed)?;
    // deferred constraints are checked here
    migrator.batch_execute("commit").await.map_err(failed)?;
    // what the file set for its session must not reach the next one
    migrator.batch_execute("discard all").await.map_err(failed)
}

/// The transaction was begun `read write`: a read-only one is another.
const READ_ONLY: &str = "25006";
/// A statement that cannot be executed in a transaction.
const ACTIVE_TRANSACTION: &str = "25001";

pub(super) fn failure(migration: &Migration, error: tokio_postgres::Error) -> ApplyError {
    let name = migration.name.clone();
    // the driver gives up on a message that it did not expect, which only `copy` brings
    if error.as_db_error().is_none() && error.to_string().starts_with("unexpected message") {
        return ApplyError::Definite(MigrationError::Copies { name });
    }
    let refusal = match Failure::from(error) {
        Failure::Refused(refusal) => refusal,
        Failure::Locked => return ApplyError::Locked,
        Failure::Passing(why) => return ApplyError::Passing(why),
    };
    // `WEFT…` are the codes of sql/base.sql
    match refusal.code.as_str() {
        "WEFT1" | READ_ONLY => ApplyError::Definite(MigrationError::EndsTransaction { name }),
        "WEFT2" => ApplyError::Definite(MigrationError::WrongOwner { name, object: refusal.message }),
        ACTIVE_TRANSACTION => {
            ApplyError::Definite(MigrationError::NeedsNoTransaction { name, message: refusal.message })
        }
        "WEFT3" => ApplyError::Passing(refusal.message),
        _ => ApplyError::Definite(MigrationError::Refused { name, line: refusal.line(migration.text()), refusal }),
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
        for name in ["b.sql", "a.sql", "10.sql", "09.sql", ".hidden.sql", "README.md"] {
            std::fs::write(folder.path().join(name), name).unwrap();
        }
        std::fs::create_dir(folder.path().join("folder.sql")).unwrap();
        let names: Vec<_> = read(folder.path()).unwrap().into_iter().map(|file| file.name).collect();
        assert_eq!(names, ["09.sql", "10.sql", "a.sql", "b.sql"]);
    }
}
