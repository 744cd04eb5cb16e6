//! A PostgreSQL server of the owner's own.

use std::sync::LazyLock;

use k8s_openapi::api::core::v1::{Secret, SecretVolumeSource, Volume};

use super::{ADMIN, APP, Access, Mount, Placement, RELAY, User, role};
use crate::{
    api::v1alpha1::{DatabaseStatus, Postgres},
    contract::{DatabaseLogin, Role, Server, database_setup::Purpose},
    controllers::{
        database::{Stage, Wanted, secrets, server, status},
        render::{owner::Owner, pod::password_volume},
        resources::{child::Child, observed::DatabaseObserved, plan::Rejection, settings::Settings},
        status::progress::Finding,
    },
    domain::names::{self, POSTGRES_PORT},
};

/// In place of one that a spec does not give.
pub static DEFAULT: LazyLock<Postgres> = LazyLock::new(Postgres::default);

impl Placement for Postgres {
    fn summary(&self) -> String {
        format!("postgres {}", self.version)
    }

    fn status(&self, owner: &Owner) -> DatabaseStatus {
        DatabaseStatus {
            engine: "postgres".to_owned(),
            version: Some(self.version.clone()),
            host: Some(host(&owner.name, &owner.namespace)),
            ..DatabaseStatus::default()
        }
    }

    fn server(
        &self,
        wanted: &Wanted<'_>,
        observed: &DatabaseObserved,
        settings: &Settings,
    ) -> Result<Vec<Child>, Rejection> {
        server::all(self, wanted, observed, settings)
    }

    fn secret_names(&self, name: &str, purpose: Purpose) -> Vec<String> {
        let mut secrets = vec![names::database(name), names::admin_secret(name)];
        if purpose == Purpose::Service {
            secrets.push(names::relay_secret(name));
        }
        secrets
    }

    fn secrets(&self, wanted: &Wanted<'_>, settings: &Settings) -> Vec<Secret> {
        let name = &wanted.owner.name;
        let mut all = vec![
            secrets::binding(wanted, names::APP_ROLE, &address(name, &wanted.owner.namespace), settings),
            secrets::role(wanted, names::admin_secret(name), names::ADMIN_ROLE, settings),
        ];
        if wanted.purpose == Purpose::Service {
            all.push(secrets::role(wanted, names::relay_secret(name), names::RELAY_ROLE, settings));
        }
        all
    }

    fn exists(&self, observed: &DatabaseObserved) -> bool {
        observed.server.is_some()
    }

    fn access(&self, name: &str, namespace: &str) -> Access {
        let login = |role: Role| DatabaseLogin { server: address(name, namespace), role, schema: None };
        Access {
            admin: login(role(names::ADMIN_ROLE, ADMIN)),
            app: login(role(names::APP_ROLE, APP)),
            relay: login(role(names::RELAY_ROLE, RELAY)),
            owner: names::OWNER_ROLE.into(),
            schema: None,
            reads: Vec::new(),
        }
    }

    fn volumes(&self, name: &str, user: User) -> Vec<(Volume, Mount)> {
        passwords(name, names::admin_secret(name), user)
    }

    fn binding(&self, name: &str, volume: &str) -> (String, Volume) {
        whole(names::database(name), volume)
    }

    fn client_of<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        Some(name)
    }

    fn identity(&self, observed: &DatabaseObserved) -> Option<String> {
        observed.server.as_ref().map(|server| server.uid.clone())
    }

    fn has_admin_password(&self, wanted: &Wanted<'_>, observed: &DatabaseObserved) -> bool {
        server::has_admin_password(wanted, observed)
    }

    fn ready(&self, observed: &DatabaseObserved, _stage: &Stage<'_>) -> Finding {
        status::server(observed.server.as_ref())
    }
}

/// Host name of the server of `owner` inside the cluster.
pub(super) fn host(owner: &str, namespace: &str) -> String {
    format!("{}.{namespace}.svc", names::database(owner))
}

/// Of the database on the server of `owner`.
pub(super) fn address(owner: &str, namespace: &str) -> Server {
    Server::Address { host: host(owner, namespace), port: POSTGRES_PORT, database: names::database_name(owner) }
}

/// The password of each user in a Secret of its own.
pub(super) fn passwords(name: &str, admin: String, user: User) -> Vec<(Volume, Mount)> {
    let (mount, secret) = match user {
        User::Admin => (ADMIN, admin),
        User::App => (APP, names::database(name)),
        User::Relay => (RELAY, names::relay_secret(name)),
    };
    vec![(password_volume(mount.0, secret), mount)]
}

/// All keys of the binding that Weft made.
pub(super) fn whole(secret: String, volume: &str) -> (String, Volume) {
    let source = SecretVolumeSource { secret_name: Some(secret.clone()), ..SecretVolumeSource::default() };
    (secret, Volume { name: volume.to_owned(), secret: Some(source), ..Volume::default() })
}
