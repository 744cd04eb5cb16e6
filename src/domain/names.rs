//! Names of everything that exists because of a custom resource, in one file, so that the planes and the tests agree.

use super::version::short_hash;

/// The longest name of a `Microservice` or an orchestrator. A DNS name has at most 63 characters, and the longest child
/// is `NAME-db-setup-HASH` (18 characters more), or `NAME-orchestrator-db-setup-HASH` (31 more).
pub const MAX_NAME: usize = 32;

/// PostgreSQL's port, in the pod and on the Service.
pub const POSTGRES_PORT: u16 = 5432;
/// Port of the orchestrator's HTTP API, in the pod and on the Service.
pub const ORCHESTRATOR_API_PORT: u16 = 8080;

/// Roles in a service's database. The superuser is the official image's `postgres`.
pub const ADMIN_ROLE: &str = "postgres";
pub const OWNER_ROLE: &str = "owner";
pub const APP_ROLE: &str = "app";
pub const RELAY_ROLE: &str = "relay";

/// The schema of Weft's own tables and functions; it follows `public` on the app role's `search_path`.
pub const SCHEMA: &str = "weft";
/// `NOTIFY` channel through which the outbox's insert trigger notifies a polling relay.
pub const OUTBOX_CHANNEL: &str = "weft_outbox";

/// `NAME-db`: StatefulSet, Service, NetworkPolicy and binding Secret of a database.
pub fn database(owner: &str) -> String {
    format!("{owner}-db")
}

/// `NAME-db-admin`: the superuser's Secret.
pub fn admin_secret(owner: &str) -> String {
    format!("{owner}-db-admin")
}

/// `NAME-db-relay`: the relay role's Secret.
pub fn relay_secret(owner: &str) -> String {
    format!("{owner}-db-relay")
}

/// `NAME-db-setup`: ConfigMap with what is recorded of the set-up.
pub fn setup(owner: &str) -> String {
    format!("{owner}-db-setup")
}

/// `NAME-db-setup-HASH`: the set-up Job for one input; `hash` has 8 hex digits.
pub fn setup_job(owner: &str, hash: &str) -> String {
    format!("{owner}-db-setup-{hash}")
}

/// Name of the database inside the server: the service's name with `-` as `_`, so that it needs no quoting.
pub fn database_name(owner: &str) -> String {
    owner.replace('-', "_")
}

/// Name of a role of one database, on a server whose other databases may have roles of their own for the same purpose. The
/// server cuts names off after 63 bytes.
pub fn role_of(prefix: &str, database: &str) -> String {
    let room = database.floor_char_boundary(63_usize.saturating_sub(prefix.len()));
    format!("{prefix}{}", database.get(..room).unwrap_or_default())
}

/// Publication of the outbox in the schema `weft`; in a database of Weft's, its replication slot too.
pub fn publication(weft: &str) -> String {
    format!("{weft}_outbox")
}

/// Replication slot of the outbox in `database`, one of several on a server: of lower case letters, digits and `_`, as slots
/// must be, and so with a hash of the name.
pub fn slot_of_database(publication: &str, database: &str) -> String {
    let is_allowed = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == '_';
    let readable: String = database.chars().filter(is_allowed).take(32).collect();
    format!("{publication}_{readable}_{}", short_hash(database.as_bytes(), 8))
}

/// The schema of Weft's own tables for a service that has a schema in the database of another.
pub fn weft_schema(schema: &str) -> String {
    format!("{SCHEMA}_{schema}")
}

/// A role of the service `owner` in the database of another: `orders_app`.
pub fn shared_role(owner: &str, role: &str) -> String {
    format!("{}_{role}", database_name(owner))
}

/// `NAME-relay`: ConfigMap with the contract of the OutboxRelay NAME; Deployment, NetworkPolicy and ServiceAccount of the relay of the
/// Microservice NAME that runs in a pod of its own.
pub fn relay(relay: &str) -> String {
    format!("{relay}-relay")
}

/// `NAME-inbox`: contract, Deployment, NetworkPolicy and ServiceAccount of the inbox of a Microservice.
pub fn inbox(service: &str) -> String {
    format!("{service}-inbox")
}

/// `NAME-orchestrator`: Deployment, Service, ConfigMap of an orchestrator, and the owner name of its database.
pub fn orchestrator(name: &str) -> String {
    format!("{name}-orchestrator")
}

/// `NAME-broker-HASH`: Secret with the credentials of an owner's pods; `hash` is the account's fingerprint.
pub fn broker_secret(owner: &str, hash: &str) -> String {
    format!("{owner}-broker-{hash}")
}

/// CloudEvents `source` of a service's events.
pub fn event_source(namespace: &str, service: &str) -> String {
    format!("/{namespace}/{service}")
}

/// `CUSTOMERS_URL`: the environment variable with the address of a service that another one depends on.
pub fn url_variable(service: &str) -> String {
    format!("{}_URL", service.to_ascii_uppercase().replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_name_leaves_room_for_every_child() {
        let name = "a".repeat(MAX_NAME);
        assert!(setup_job(&orchestrator(&name), "01234567").len() <= 63);
    }

    #[test]
    fn a_url_variable_is_a_shell_name() {
        assert_eq!(url_variable("order-history"), "ORDER_HISTORY_URL");
    }
}
