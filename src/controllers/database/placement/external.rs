//! A PostgreSQL server of somebody else's, by the Secret with its Service Binding, which the operator does not read: the set-up
//! reports what is wrong with it.
//!
//! No container gets more of the Secret than it uses: the superuser's login is mounted by the set-up alone, the service's by the
//! service and the set-up.

use std::path::Path;

use k8s_openapi::api::core::v1::{
    KeyToPath, ProjectedVolumeSource, Secret, SecretProjection, Volume, VolumeProjection,
};

use super::{ADMIN, APP, Access, Mount, Placement, RELAY, User, role};
use crate::{
    api::v1alpha1::{DatabaseStatus, External},
    contract::{DatabaseLogin, Role, RoleName, Server, database_setup::Purpose},
    controllers::{
        database::{BINDING_URI, Stage, Wanted, secrets},
        render::{
            owner::Owner,
            pod::{PASSWORD, password_volume},
            reach,
        },
        resources::{observed::DatabaseObserved, plan::Rejection, reason::Reason, settings::Settings},
        status::progress::Finding,
    },
    domain::names,
};

/// Where the server is, and how it is trusted.
const SERVER: Mount = ("weft-server", "/etc/weft/server");
const ADDRESS: [&str; 3] = ["host", "port", "database"];
const TRUST: [&str; 4] = ["sslmode", "ca.crt", "tls.crt", "tls.key"];
const USERNAME: &str = "username";

impl Placement for External {
    fn summary(&self) -> String {
        "external".to_owned()
    }

    fn status(&self, _owner: &Owner) -> DatabaseStatus {
        DatabaseStatus { engine: "postgres".to_owned(), ..DatabaseStatus::default() }
    }

    fn check(&self, name: &str, _observed: &DatabaseObserved) -> Result<(), Rejection> {
        reach::check_secret(name, "spec.database.external.secret", &self.secret)
    }

    fn secret_names(&self, name: &str, purpose: Purpose) -> Vec<String> {
        match purpose {
            Purpose::Service => vec![names::relay_secret(name)],
            Purpose::Orchestrator => Vec::new(),
        }
    }

    fn secrets(&self, wanted: &Wanted<'_>, settings: &Settings) -> Vec<Secret> {
        let names = self.secret_names(&wanted.owner.name, wanted.purpose);
        names.into_iter().map(|name| secrets::role(wanted, name, names::RELAY_ROLE, settings)).collect()
    }

    fn access(&self, _name: &str, _namespace: &str) -> Access {
        let login =
            |role: Role| DatabaseLogin { server: Server::Folder { server: SERVER.1.into() }, role, schema: None };
        let by_file = |mount: Mount| role(RoleName::File { file: Path::new(mount.1).join(USERNAME) }, mount);
        let of_the_database = |prefix: &str| RoleName::Prefix { prefix: prefix.to_owned() };
        Access {
            admin: login(by_file(ADMIN)),
            app: login(by_file(APP)),
            relay: login(role(of_the_database("weft_relay_"), RELAY)),
            owner: of_the_database("weft_owner_"),
            schema: None,
            reads: Vec::new(),
        }
    }

    fn volumes(&self, name: &str, user: User) -> Vec<(Volume, Mount)> {
        // what is missing is reported by the set-up, before any other pod starts
        let server = |must: &[&str]| {
            let may: Vec<_> = ADDRESS.into_iter().chain(TRUST).filter(|key| !must.contains(key)).collect();
            (self.projected(SERVER.0, &same(must), &same(&may)), SERVER)
        };
        let login = same(&[USERNAME, PASSWORD]);
        match user {
            User::Admin => {
                let admin = [("admin-username", USERNAME), ("admin-password", PASSWORD)];
                vec![
                    server(&[]),
                    (self.projected(ADMIN.0, &[], &admin), ADMIN),
                    (self.projected(APP.0, &[], &login), APP),
                ]
            }
            User::App => vec![server(&ADDRESS), (self.projected(APP.0, &login, &[]), APP)],
            User::Relay => {
                vec![server(&ADDRESS), (password_volume(RELAY.0, names::relay_secret(name)), RELAY)]
            }
        }
    }

    fn binding(&self, _name: &str, volume: &str) -> (String, Volume) {
        let must = same(&[ADDRESS[0], ADDRESS[1], ADDRESS[2], USERNAME, PASSWORD]);
        let may = same(&["type", "provider", BINDING_URI, TRUST[0], TRUST[1], TRUST[2], TRUST[3]]);
        (self.secret.clone(), self.projected(volume, &must, &may))
    }

    fn uri_is_optional(&self) -> bool {
        true
    }

    fn client_of<'a>(&'a self, _name: &'a str) -> Option<&'a str> {
        None
    }

    fn identity(&self, _observed: &DatabaseObserved) -> Option<String> {
        Some(self.secret.clone())
    }

    fn is_logical(&self) -> bool {
        false
    }

    fn ready(&self, observed: &DatabaseObserved, stage: &Stage<'_>) -> Finding {
        let problem = match stage {
            Stage::Running(job) => job.problems.first(),
            _ => None,
        };
        match (problem, &observed.recorded) {
            (Some(problem), _) => Finding::from(problem),
            (None, Some(_)) => Finding::new(true, Reason::Ready, "the last set-up has reached the external server"),
            (None, None) => Finding::new(false, Reason::Starting, "no set-up has reached the external server yet"),
        }
    }
}

impl External {
    /// A volume of keys of the Secret, each with its file: those that must be there, and those that may.
    fn projected(&self, name: &str, must: &[(&str, &str)], may: &[(&str, &str)]) -> Volume {
        let source = |keys: &[(&str, &str)], optional: bool| {
            let items = keys.iter().map(|(key, path)| KeyToPath {
                key: (*key).to_owned(),
                path: (*path).to_owned(),
                mode: None,
            });
            let secret = SecretProjection {
                name: self.secret.clone(),
                items: Some(items.collect()),
                optional: optional.then_some(true),
            };
            (!keys.is_empty()).then(|| VolumeProjection { secret: Some(secret), ..VolumeProjection::default() })
        };
        let sources = source(must, false).into_iter().chain(source(may, true)).collect();
        let projected = ProjectedVolumeSource { sources: Some(sources), ..ProjectedVolumeSource::default() };
        Volume { name: name.to_owned(), projected: Some(projected), ..Volume::default() }
    }
}

/// Keys as files of their own names.
fn same<'a>(keys: &[&'a str]) -> Vec<(&'a str, &'a str)> {
    keys.iter().map(|key| (*key, *key)).collect()
}
