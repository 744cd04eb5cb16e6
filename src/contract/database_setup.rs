//! What `weft database setup` makes of an empty (or already set-up) database, and what it reports when it has.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Contract, DatabaseLogin, Role, RoleName, outbox::Outbox};

/// Exit code of `weft database setup` when repeating cannot help: a migration that fails, a changed migration, a bad
/// contract.
pub const EXIT_DEFINITE: u8 = 65;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatabaseSetup {
    /// A superuser's login. Where its files are missing, nothing is set up, and what a person has set up is checked instead.
    pub admin: DatabaseLogin,
    /// Owns the schema and what migrations make; cannot log in.
    pub owner: RoleName,
    /// The schema that the owner owns, in a database that is another service's. Absent: `public`, and the database is the service's
    /// own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// Tables and views outside of that schema, each `SCHEMA.NAME`, that the app may read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reads: Vec<String>,
    /// The role that the service (or the orchestrator) logs in with.
    pub app: Role,
    /// The relay's role, with `REPLICATION`. Absent for an orchestrator's database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<Role>,
    /// The relay reads the transaction log: `wal_level` must be `logical`. Absent where Weft sets that itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub log_tailing: bool,
    /// The replication slot of a relay that is not there any more is removed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub remove_slot: bool,
    pub purpose: Purpose,
    /// Absent for an orchestrator's database, and in a file that is written by hand: what was set last stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub duplicate_window: Option<DuplicateWindow>,
    /// Folder of `*.sql` files, applied in the order of their names, each in a transaction of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migrations: Option<PathBuf>,
    /// Name of a file that must be in the folder, or applied already, before anything is applied: a mounted ConfigMap can
    /// be older than the spec that asks for its newest file. Files after it are applied too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_migration: Option<String>,
    /// Where the service writes its events. Absent (without a relay): whatever was set up last stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbox: Option<Outbox>,
}

/// How long what a service has handled is recognized when it comes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DuplicateWindow {
    /// Milliseconds that rows of `weft.inbox` are kept.
    pub messages_ms: u64,
    /// Milliseconds that rows of `weft.saga_barrier` are kept.
    pub commands_ms: u64,
}

/// Which tables and functions of Weft's own the database gets (schema `weft`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// `weft.outbox`, `weft.inbox`, `weft.receive`, `weft.enter`, `weft.remember`, `weft.refuse`, the publication.
    Service,
    /// The saga engine's log.
    Orchestrator,
}

impl Purpose {
    /// How many versions Weft's own tables and functions have had, as of this program. A set-up runs again when there is a new
    /// one: a data plane of this program needs it.
    pub fn layout(self) -> usize {
        match self {
            Self::Service => 2,
            Self::Orchestrator => 3,
        }
    }
}

impl Contract for DatabaseSetup {
    const KIND: &'static str = "DatabaseSetup";
}

/// What a set-up that succeeded leaves as its pod's termination message: one line of JSON. A set-up that did not leaves
/// one sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    /// Migrations in the folder.
    pub files: usize,
    /// Those that this run applied.
    pub applied: usize,
    /// Name of the last migration that the database has recorded, whichever run applied it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<String>,
    /// [`migrations_hash`] of the folder as this run read it.
    pub hash: String,
    /// Tables that this service and another one of the same database may both write.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub written_by_others: Vec<String>,
}

impl Outcome {
    pub fn to_message(&self) -> String {
        // numbers and strings always have a form in JSON
        serde_json::to_string(self).unwrap_or_default()
    }

    /// `None` for a sentence, which a set-up that failed leaves.
    pub fn from_message(message: &str) -> Option<Self> {
        serde_json::from_str(message.trim()).ok()
    }
}

/// Whether a file of the folder (a key of the ConfigMap) is a migration. Hidden files are not: a mounted ConfigMap has some.
pub fn is_migration(name: &str) -> bool {
    !name.starts_with('.') && Path::new(name).extension().is_some_and(|extension| extension == "sql")
}

/// 16 hex digits of the migrations' names and texts, in the order in which they are applied; other files do not count.
pub fn migrations_hash<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut files: Vec<_> = files.into_iter().filter(|(name, _)| is_migration(name)).collect();
    files.sort_unstable();
    let mut hasher = Sha256::new();
    for part in files.into_iter().flat_map(|(name, text)| [name, text]) {
        hasher.update(part.len().to_be_bytes());
        hasher.update(part);
    }
    let mut hash = format!("{:x}", hasher.finalize());
    hash.truncate(16);
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_is_of_names_and_texts_of_migrations_only() {
        let hash = migrations_hash([("002.sql", "b"), ("001.sql", "a"), ("README.md", "x"), (".001.sql", "y")]);
        assert_eq!(hash, migrations_hash([("001.sql", "a"), ("002.sql", "b")]));
        assert_ne!(hash, migrations_hash([("001.sql", "a0"), ("02.sql", "b")]));
        assert_ne!(hash, migrations_hash([("001.sql", "a"), ("002.sql", "c")]));
        assert_eq!(hash.len(), 16);
    }

    #[test]
    fn a_sentence_is_not_an_outcome() {
        let outcome =
            Outcome { files: 2, applied: 1, last: None, hash: migrations_hash([]), written_by_others: Vec::new() };
        assert_eq!(Outcome::from_message(&format!("{}\n", outcome.to_message())), Some(outcome));
        assert_eq!(Outcome::from_message("migration 002.sql failed"), None);
    }
}
