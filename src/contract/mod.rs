//! The files that the operator writes and the data plane reads.
//!
//! A contract is versioned YAML in a ConfigMap, mounted into the data plane's pod; credentials are paths of files that
//! are mounted from Secrets. Readers ignore unknown fields, so that an operator of the next minor version may add some;
//! a change of a field's meaning requires a new [`VERSION`]. `tests/golden/contract/` pins the format.

pub mod database_setup;
pub mod inbox;
pub mod orchestrator;
pub mod outbox;
pub mod problem;
pub mod relay;
pub mod status;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::domain::names;

/// `apiVersion` of every contract that this version of Weft writes and reads.
pub const VERSION: &str = "contract.weft.dev/v1";

/// Port of every data-plane program's admin endpoints: `/livez`, `/readyz`, `/metrics`, `/status`.
pub const ADMIN_PORT: u16 = 9464;

#[derive(Debug, thiserror::Error)]
pub enum ContractError {
    #[error("reading the contract file {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the contract file {path} is not a valid {kind} contract: {source}")]
    Parse {
        path: PathBuf,
        kind: &'static str,
        #[source]
        source: serde_yaml::Error,
    },
    #[error("the contract file {path} has `apiVersion: {found}`; this version of weft reads `{VERSION}`")]
    Version { path: PathBuf, found: String },
    #[error("the contract file {path} is of kind {found}, expected {expected}")]
    Kind { path: PathBuf, found: String, expected: &'static str },
}

/// A contract, with the `kind` that its file contains.
pub trait Contract: Serialize + DeserializeOwned {
    const KIND: &'static str;

    /// The file's text: `apiVersion`, `kind`, then the contract's own fields.
    fn to_yaml(&self) -> Result<String, serde_yaml::Error> {
        serde_yaml::to_string(&Document {
            api_version: VERSION.to_owned(),
            kind: Self::KIND.to_owned(),
            contract: self,
        })
    }

    fn from_yaml(text: &str, path: &Path) -> Result<Self, ContractError> {
        let parse = |source| ContractError::Parse { path: path.to_owned(), kind: Self::KIND, source };
        let head: Head = serde_yaml::from_str(text).map_err(parse)?;
        if head.api_version != VERSION {
            return Err(ContractError::Version { path: path.to_owned(), found: head.api_version });
        }
        if head.kind != Self::KIND {
            return Err(ContractError::Kind { path: path.to_owned(), found: head.kind, expected: Self::KIND });
        }
        serde_yaml::from_str(text).map_err(parse)
    }

    fn load(path: &Path) -> Result<Self, ContractError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ContractError::Read { path: path.to_owned(), source })?;
        Self::from_yaml(&text, path)
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a, T> {
    api_version: String,
    kind: String,
    #[serde(flatten)]
    contract: &'a T,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    api_version: String,
    kind: String,
}

/// A database and the role to log in with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DatabaseLogin {
    #[serde(flatten)]
    pub server: Server,
    pub role: Role,
    /// The schema of Weft's own tables there. Absent: `weft`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
}

/// Where a database is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Server {
    /// Reached in the pod network, without TLS.
    Address { host: String, port: u16, database: String },
    /// A folder with the files `host`, `port` and `database`, and with `sslmode` and `ca.crt` where the server is reached by TLS
    /// (from the Secret of a Service Binding; read again for each new connection).
    Folder { server: PathBuf },
}

/// A role and the file with its password (from a Secret; read again for each new connection).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Role {
    pub name: RoleName,
    pub password_file: PathBuf,
}

/// The name of a role. Roles belong to the server, while a contract may know neither its other databases nor this one's name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum RoleName {
    Known(String),
    /// The text of a file.
    File {
        file: PathBuf,
    },
    /// This, and the name of the database.
    Prefix {
        prefix: String,
    },
}

impl From<&str> for RoleName {
    fn from(name: &str) -> Self {
        Self::Known(name.to_owned())
    }
}

impl RoleName {
    /// Name of the role in `database`; `None` when it is in a file.
    pub fn in_database(&self, database: &str) -> Option<String> {
        match self {
            Self::Known(name) => Some(name.clone()),
            Self::File { .. } => None,
            Self::Prefix { prefix } => Some(names::role_of(prefix, database)),
        }
    }
}
