//! The Secrets of a database: created when missing, never read, never changed.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Secret;

use super::Wanted;
use crate::{
    api::v1alpha1::Retention,
    contract::Server,
    controllers::{
        render::pod::PASSWORD,
        resources::{
            child::Child,
            labels::{Component, SECRETS_ANNOTATION},
            observed::{DatabaseObserved, SecretsObserved},
            settings::Settings,
        },
    },
    domain::names,
};

/// The key of the binding Secret that holds a connection URI.
pub const URI: &str = "uri";

/// How often these Secrets were made again; `None` when they never were. Where it stands in a pod template, its pods roll.
pub fn replacements(observed: &DatabaseObserved, secrets: &[&str]) -> Option<String> {
    let replaced = &observed.secrets.replaced;
    let known: BTreeMap<_, _> = secrets.iter().filter_map(|secret| replaced.get_key_value(*secret)).collect();
    // a map of numbers always has a form in JSON
    (!known.is_empty()).then(|| serde_json::to_string(&known).unwrap_or_default())
}

/// The annotation with [`replacements`].
pub fn replaced_annotation(observed: &DatabaseObserved, secrets: &[&str]) -> Option<BTreeMap<String, String>> {
    Some([(SECRETS_ANNOTATION.to_owned(), replacements(observed, secrets)?)].into())
}

/// What is recorded before those that are missing are made again: a crash in between then loses nothing.
pub(super) fn record(observed: &DatabaseObserved) -> Option<String> {
    let SecretsObserved { mut replaced, missing } = observed.secrets.clone();
    for secret in missing {
        *replaced.entry(secret).or_default() += 1;
    }
    (!replaced.is_empty()).then(|| serde_json::to_string(&replaced).unwrap_or_default())
}

/// All of them for a database that is only being made; of one that exists those that were deleted.
pub(super) fn all(wanted: &Wanted<'_>, observed: &DatabaseObserved, settings: &Settings) -> Vec<Child> {
    let exists = wanted.placement.exists(observed);
    let is_wanted = |secret: &Secret| {
        let missing = &observed.secrets.missing;
        !exists || secret.metadata.name.as_ref().is_some_and(|name| missing.contains(name))
    };
    wanted.placement.secrets(wanted, settings).into_iter().filter(is_wanted).map(Child::Secret).collect()
}

/// `NAME-db`, as the Service Binding specification has it: <https://servicebinding.io/spec/core/1.1.0/#well-known-secret-entries>.
pub(super) fn binding(wanted: &Wanted<'_>, role: &str, server: &Server, settings: &Settings) -> Secret {
    let password = (settings.password)();
    let (host, port, database) = match server.clone() {
        Server::Address { host, port, database } => (host, port, database),
        // of such a server somebody else makes the binding
        Server::Folder { .. } => Default::default(),
    };
    // the password is of letters and digits, the other parts are names: nothing needs escaping
    let uri = format!("postgresql://{role}:{password}@{host}:{port}/{database}");
    let entries = [
        ("type", "postgresql".to_owned()),
        ("provider", "weft".to_owned()),
        ("host", host),
        ("port", port.to_string()),
        ("database", database),
        ("username", role.to_owned()),
        (PASSWORD, password),
        (URI, uri),
    ];
    secret(wanted, names::database(&wanted.owner.name), "servicebinding.io/postgresql", entries)
}

/// A role's login.
pub(super) fn role(wanted: &Wanted<'_>, name: String, role: &str, settings: &Settings) -> Secret {
    let entries = [("username", role.to_owned()), (PASSWORD, (settings.password)())];
    secret(wanted, name, "kubernetes.io/basic-auth", entries)
}

fn secret<const N: usize>(wanted: &Wanted<'_>, name: String, type_: &str, entries: [(&str, String); N]) -> Secret {
    Secret {
        metadata: match wanted.retention {
            Retention::Retain => wanted.owner.lasting_metadata(name, Component::Database),
            Retention::Delete => wanted.owner.ending_metadata(name, Component::Database),
        },
        type_: Some(type_.to_owned()),
        string_data: Some(entries.map(|(key, value)| (key.to_owned(), value)).into_iter().collect::<BTreeMap<_, _>>()),
        ..Secret::default()
    }
}
