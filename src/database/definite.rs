//! Definite errors, kept over restarts of the container.
//!
//! Kubernetes restarts a container that failed, whatever it failed for. A migration that fails for good may hold up the service
//! each time that it is tried, and cannot succeed: the next start repeats the sentence and leaves the server alone, unless what is
//! mounted has become newer.

use std::path::{Path, PathBuf};

use super::migrations;
use crate::{
    contract::{
        Contract, RoleName, Server,
        database_setup::{DatabaseSetup, migrations_hash},
    },
    domain::version::short_hash,
};

/// The file that keeps the definite error of one input: contract, migrations, and where and as whom to log in.
#[derive(Debug)]
pub(super) struct Record(PathBuf);

impl Record {
    pub fn of_input(folder: &Path, config: &Path) -> Self {
        // what cannot be read is an error of its own, and is reported by whoever works with it
        let mut input = std::fs::read(config).unwrap_or_default();
        let setup = DatabaseSetup::load(config).ok();
        for path in setup.iter().flat_map(files_of_the_login) {
            input.extend(std::fs::read(path).unwrap_or_default());
        }
        let mounted = setup.and_then(|setup| setup.migrations);
        let files = mounted.and_then(|folder| migrations::read(&folder).ok()).unwrap_or_default();
        let texts = files.iter().map(|file| (file.name.as_str(), file.sql.as_str()));
        input.extend(migrations_hash(texts).into_bytes());
        Self(folder.join(short_hash(&input, 16)))
    }

    /// The sentence of an earlier run.
    pub fn read(&self) -> Option<String> {
        std::fs::read_to_string(&self.0).ok()
    }

    pub fn write(&self, sentence: &str) {
        if let Err(error) = std::fs::write(&self.0, sentence) {
            tracing::warn!(%error, path = %self.0.display(), "the error is not kept: the next start tries again");
        }
    }
}

/// What is mounted of the Secret of a server of somebody else's.
fn files_of_the_login(setup: &DatabaseSetup) -> Vec<PathBuf> {
    let Server::Folder { server } = &setup.admin.server else { return Vec::new() };
    let mut files: Vec<_> = ["host", "port", "database", "sslmode", "ca.crt"].map(|key| server.join(key)).into();
    for role in [&setup.admin.role, &setup.app] {
        if let RoleName::File { file } = &role.name {
            files.push(file.clone());
        }
        files.push(role.password_file.clone());
    }
    files
}
