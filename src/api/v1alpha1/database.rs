//! A service's database: where it is, how its schema is brought up to date, and what was found of it.

use std::collections::BTreeMap;

use k8s_openapi::{api::core::v1::ResourceRequirements, apimachinery::pkg::api::resource::Quantity};
use kube::{KubeSchema, core::Duration};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where the service's data is (exactly one of `postgres`, `external` and `sharedWith`), its migrations, and what becomes of it when
/// the Microservice is deleted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    cel,
    validation = Rule::new("[has(self.postgres), has(self.external), has(self.sharedWith)].filter(given, given).size() == 1").message("spec.database says nowhere, or at more than one place, where the data is: give one of postgres, external and sharedWith"),
    validation = Rule::new("has(self.postgres) == has(oldSelf.postgres) && has(self.external) == has(oldSelf.external) && has(self.sharedWith) == has(oldSelf.sharedWith)").message("spec.database cannot become another of postgres, external and sharedWith: dump the data and restore it into a new Microservice")
)]
pub struct Database {
    /// A PostgreSQL server of the service's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub postgres: Option<Postgres>,
    /// A PostgreSQL server that somebody else runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<External>,
    /// A schema in the database of another Microservice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_with: Option<SharedWith>,
    /// How the schema is brought up to date before a new version of the service starts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migrations: Option<Migrations>,
    /// How long what the service has handled is recognized when it comes again.
    #[serde(default)]
    pub duplicate_window: DuplicateWindow,
    /// What becomes of the volume of `postgres`, and of the passwords that Weft made, when the Microservice is deleted. By `Delete` the volume also goes with the StatefulSet, whoever deletes that. Data in a server of somebody else's, or of another Microservice, stays in any case.
    #[serde(default)]
    pub retention: Retention,
}

/// How long the records are kept by which a repetition is recognized; older ones are deleted by and by, and what comes again after that counts as new.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(cel)]
pub struct DuplicateWindow {
    /// Of messages (`weft.receive`).
    #[serde(default = "default_messages_window")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) >= duration('1h') && duration(self) <= duration('87600h')").message("duplicateWindow.messages must be a duration such as 24h or 336h, from 1h to 87600h"))]
    pub messages: Duration,
    /// Of commands of sagas (`weft.enter`): longer than any saga that asks this service may take, a stuck one included, since what is forgotten cannot be undone.
    #[serde(default = "default_commands_window")]
    #[schemars(length(max = 32))]
    #[x_kube(validation = Rule::new("self.matches('^([0-9]+([.][0-9]+)?(ns|us|ms|s|m|h))+$') && duration(self) >= duration('1h') && duration(self) <= duration('87600h')").message("duplicateWindow.commands must be a duration such as 720h or 2160h, from 1h to 87600h"))]
    pub commands: Duration,
}

fn default_messages_window() -> Duration {
    std::time::Duration::from_hours(14 * 24).into()
}

fn default_commands_window() -> Duration {
    std::time::Duration::from_hours(90 * 24).into()
}

impl Default for DuplicateWindow {
    fn default() -> Self {
        Self { messages: default_messages_window(), commands: default_commands_window() }
    }
}

/// A PostgreSQL server: one pod with a volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(cel)]
pub struct Postgres {
    /// Major version of PostgreSQL, in quotes: 15, 16 or 17.
    #[serde(default = "default_postgres_version")]
    #[schemars(regex(pattern = r"^1[5-7]$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.database.postgres.version cannot change: a volume of another major version is not readable; dump the data and restore it into a new Microservice"))]
    pub version: String,
    /// The volume that holds the data.
    #[serde(default)]
    pub storage: Storage,
    /// Server parameters, as in postgresql.conf; they are given on the server's command line. Those that Weft relies on cannot be set here: `wal_level`, `listen_addresses`, `port`, `data_directory`, `hba_file`, `config_file`, `unix_socket_directories`. Unless set, `max_wal_size` (at most 1 GB) and `max_slot_wal_keep_size` are a quarter of the volume each, and at least 128 MB, so that the log does not fill it, also while a relay is away. Names are in lower case.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    #[x_kube(validation = Rule::new("self.all(k, k.matches('^[a-z_][a-z0-9_.]{0,62}$'))").message("spec.database.postgres.parameters has a name that no parameter can have: small letters, digits, '_' and '.', such as max_connections"),
    validation = Rule::new("!self.exists(k, k in ['wal_level', 'listen_addresses', 'port', 'data_directory', 'hba_file', 'config_file', 'unix_socket_directories'])").message("spec.database.postgres.parameters sets a parameter that Weft relies on: remove wal_level, listen_addresses, port, data_directory, hba_file, config_file and unix_socket_directories"))]
    pub parameters: BTreeMap<String, String>,
    /// CPU and memory of the server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,
}

fn default_postgres_version() -> String {
    "17".to_owned()
}

impl Default for Postgres {
    fn default() -> Self {
        Self {
            version: default_postgres_version(),
            storage: Storage::default(),
            parameters: BTreeMap::new(),
            resources: None,
        }
    }
}

/// A PostgreSQL server (15 or newer) outside of Weft: in the cloud, in a virtual machine, run by another operator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(cel)]
pub struct External {
    /// Secret with a Service Binding: `host`, `port`, `database`, `username` and `password` of the service's login, which need not exist yet; `uri`, for `DATABASE_URL`. With `admin-username` and `admin-password`, a superuser's login, Weft sets the database up; without them the condition `Migrated` says what a person has to run. With `ca.crt`, or `sslmode`, the server is reached by TLS.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub secret: String,
}

/// A schema, with roles of its own, in the database of another Microservice, which has a server of its own (`postgres`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(cel)]
pub struct SharedWith {
    /// The Microservice whose database it is.
    #[schemars(length(min = 1, max = 32), regex(pattern = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.database.sharedWith.service cannot change: the data is there; dump it and restore it into a new Microservice"))]
    pub service: String,
    /// The schema with this service's tables; those of Weft (outbox, inbox, …) are in `weft_SCHEMA`. Both are on the service's `search_path`.
    #[schemars(length(min = 1, max = 40), regex(pattern = r"^[a-z][a-z0-9_]*$"))]
    #[x_kube(
        validation = Rule::new("self == oldSelf").message("spec.database.sharedWith.schema cannot change: the data is there; dump it and restore it into a new Microservice"),
        validation = Rule::new("!(self in ['public', 'weft', 'information_schema']) && !self.startsWith('pg_') && !self.startsWith('weft_')").message("spec.database.sharedWith.schema must be a schema of the service's own: not public, weft, information_schema, or one that begins with pg_ or weft_")
    )]
    pub schema: String,
    /// Tables and views of the others in the database that this service may read, such as `public.customers`; those of `public` without it. All others are closed to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        inner(length(min = 1, max = 127), regex(pattern = r"^([a-z_][a-z0-9_]*\.)?[a-z_][a-z0-9_]*$"))
    )]
    pub reads: Vec<String>,
}

/// A persistent volume.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    cel,
    validation = Rule::new("has(self.className) == has(oldSelf.className)").message("spec.database.postgres.storage.className cannot change: the volume exists already")
)]
pub struct Storage {
    /// Size of the volume: a whole number with a unit, such as `10Gi`. It cannot change afterwards.
    #[serde(default = "default_storage_size")]
    #[x_kube(
        validation = Rule::new("string(self).matches('^[1-9][0-9]{0,14}(k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$')").message("spec.database.postgres.storage.size must be a whole number with a unit, such as 1Gi"),
        validation = Rule::new("!isQuantity(string(self)) || !isQuantity(string(oldSelf)) || quantity(string(self)).compareTo(quantity(string(oldSelf))) >= 0").message("spec.database.postgres.storage.size cannot shrink: keep the old size, or dump the data into a new Microservice"),
        validation = Rule::new("!isQuantity(string(self)) || !isQuantity(string(oldSelf)) || quantity(string(self)).compareTo(quantity(string(oldSelf))) <= 0").message("spec.database.postgres.storage.size cannot grow yet: keep the old size, or dump the data into a new Microservice with a larger volume")
    )]
    pub size: Quantity,
    /// StorageClass of the volume; the cluster's default class when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("spec.database.postgres.storage.className cannot change: the volume exists already"))]
    pub class_name: Option<String>,
}

fn default_storage_size() -> Quantity {
    Quantity("1Gi".to_owned())
}

impl Default for Storage {
    fn default() -> Self {
        Self { size: default_storage_size(), class_name: None }
    }
}

/// Ordered SQL files, each applied once, in a transaction of its own, as the owner of the schema.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Migrations {
    /// ConfigMap whose `*.sql` keys are the migrations, applied in the order of their names. A file that was applied must not change; add a new one.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub config_map: String,
    /// The newest file that this version needs, such as `003_totals.sql`. Its pods start once the ConfigMap has that file and it is applied, whichever of the two is applied first; files after it are applied too. Without it, a new version waits three seconds for a change of the ConfigMap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253), regex(pattern = r"^[-_a-zA-Z0-9][-._a-zA-Z0-9]*\.sql$"))]
    pub last: Option<String>,
}

/// What becomes of the data when its owner is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Retention {
    /// The volume and the Secrets stay; applying the same resource again adopts them.
    #[default]
    Retain,
    /// The volume and the Secrets are deleted too. The data is gone.
    Delete,
}

/// Where the database is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DatabaseStatus {
    /// Engine, such as `postgres`.
    pub engine: String,
    /// Major version, where the spec gives one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Host name of the server inside the cluster; of an external one the Secret has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The schema in the database of another Microservice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<String>,
    /// The last set-up that succeeded: with it the schema is as the spec and the migrations of its time want it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub set_up: Option<SetUp>,
}

/// A set-up of a database that succeeded.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SetUp {
    /// Hash of all that it worked from; the name of its Job ends with it.
    pub hash: String,
    /// How many migrations there were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub files: Option<i32>,
    /// The last migration that is applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<String>,
    /// Hash of the migrations' names and contents.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_hash: Option<String>,
    /// Hash of the OutboxRelay's `spec.outbox` by which events are copied from a table of the team's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outbox_hash: Option<String>,
    /// The database may have the replication slot of an OutboxRelay with `mode: LogTailing`. It is removed once no OutboxRelay
    /// reads the transaction log and no pod runs a relay.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replication_slot: bool,
    /// Tables that this service and another one of the same database may both write, at the time of the set-up.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub written_by_others: Vec<String>,
}
