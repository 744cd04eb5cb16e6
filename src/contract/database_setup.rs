//! What `weft database setup` makes of an empty (or already set-up) database.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Contract, DatabaseLogin, Role};

/// Exit code of `weft database setup` when repeating cannot help: a migration that fails, a changed migration, a bad
/// contract. The Job then gives up at once.
pub const EXIT_DEFINITE: u8 = 65;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatabaseSetup {
    /// The server's superuser, whose database is the service's own (`POSTGRES_DB`).
    pub admin: DatabaseLogin,
    /// Owns the schema and runs the migrations; cannot log in (the set-up Job uses `set role`).
    pub owner: String,
    /// The role that the service (or the orchestrator) logs in with.
    pub app: Role,
    /// The relay's role, with `REPLICATION`. Absent for an orchestrator's database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relay: Option<Role>,
    pub purpose: Purpose,
    /// Folder of `*.sql` files, applied in the order of their names, each in a transaction of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migrations: Option<PathBuf>,
}

/// Which tables and functions of Weft's own the database gets (schema `weft`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// `weft.outbox`, `weft.inbox`, `weft.receive`, `weft.enter`, `weft.remember`, `weft.recall`, the publication.
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
            Self::Orchestrator => 1,
        }
    }
}

impl Contract for DatabaseSetup {
    const KIND: &'static str = "DatabaseSetup";
}
