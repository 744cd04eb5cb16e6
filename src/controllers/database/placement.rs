//! Where a database is: what that needs, what it binds, whether it is ready, and what it can. One file for each; nothing else
//! asks which one it is.

mod external;
mod postgres;
mod shared;

use std::{fmt, path::Path};

use k8s_openapi::api::core::v1::{Secret, Volume};

use super::{Stage, Wanted};
use crate::{
    api::v1alpha1::{Database, DatabaseStatus},
    contract::{DatabaseLogin, Role, RoleName, database_setup::Purpose},
    controllers::{
        render::{owner::Owner, pod::PASSWORD},
        resources::{child::Child, observed::DatabaseObserved, plan::Rejection, reason::Reason, settings::Settings},
        status::progress::Finding,
    },
};

/// A volume's name, and where it is mounted. The same in every pod that has it.
pub type Mount = (&'static str, &'static str);
pub const ADMIN: Mount = ("weft-admin", "/etc/weft/admin");
pub const APP: Mount = ("weft-app", "/etc/weft/app");
pub const RELAY: Mount = ("weft-relay-role", "/etc/weft/relay-role");

/// Who logs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum User {
    /// The superuser, for the set-up alone.
    Admin,
    /// The service, or the orchestrator.
    App,
    Relay,
}

/// The logins of a database, and what its set-up has to know besides.
#[derive(Clone, Debug)]
pub struct Access {
    pub admin: DatabaseLogin,
    pub app: DatabaseLogin,
    pub relay: DatabaseLogin,
    /// Role that owns what migrations make.
    pub owner: RoleName,
    /// The service's schema in a database that is another's.
    pub schema: Option<String>,
    /// Tables of others, `SCHEMA.NAME`, that it may read.
    pub reads: Vec<String>,
}

/// A place for a database. `name` is the owner's, by whose name its children are named.
pub trait Placement: fmt::Debug + Sync {
    /// For `kubectl get`: `postgres 17`.
    fn summary(&self) -> String;

    /// All of it but the set-up.
    fn status(&self, owner: &Owner) -> DatabaseStatus;

    /// The sentence why a database cannot be there, whatever is waited for.
    fn check(&self, _name: &str, _observed: &DatabaseObserved) -> Result<(), Rejection> {
        Ok(())
    }

    /// The objects that it is made of, but Secrets.
    fn server(
        &self,
        _wanted: &Wanted<'_>,
        _observed: &DatabaseObserved,
        _settings: &Settings,
    ) -> Result<Vec<Child>, Rejection> {
        Ok(Vec::new())
    }

    /// Names of the Secrets that Weft makes for it.
    fn secret_names(&self, name: &str, purpose: Purpose) -> Vec<String>;

    /// The same, with new passwords.
    fn secrets(&self, wanted: &Wanted<'_>, settings: &Settings) -> Vec<Secret>;

    /// It has been made: a Secret that is missing was deleted.
    fn exists(&self, observed: &DatabaseObserved) -> bool {
        observed.recorded.is_some() || !observed.jobs.is_empty()
    }

    fn access(&self, name: &str, namespace: &str) -> Access;

    /// What a pod mounts that logs in.
    fn volumes(&self, name: &str, user: User) -> Vec<(Volume, Mount)>;

    /// Name of the Secret by which the service is bound, and the volume with it, called `volume`.
    fn binding(&self, name: &str, volume: &str) -> (String, Volume);

    /// The binding may have no key `uri`.
    fn uri_is_optional(&self) -> bool {
        false
    }

    /// Whose database it is, by the NetworkPolicy that has to admit its clients. `None`: no policy of Weft's is in the way.
    fn client_of<'a>(&'a self, name: &'a str) -> Option<&'a str>;

    /// Another value than at the last set-up: it has to be done again. `None`: it has to wait.
    fn identity(&self, observed: &DatabaseObserved) -> Option<String>;

    /// The server knows the superuser's newest password, as far as Weft knows.
    fn has_admin_password(&self, _wanted: &Wanted<'_>, _observed: &DatabaseObserved) -> bool {
        true
    }

    /// The transaction log can be read: Weft starts the server so.
    fn is_logical(&self) -> bool {
        true
    }

    /// `DatabaseReady`, as far as the set-up has come to this stage.
    fn ready(&self, observed: &DatabaseObserved, stage: &Stage<'_>) -> Finding;
}

/// Where the database of a spec is.
pub fn placement(database: &Database) -> &dyn Placement {
    match database {
        Database { external: Some(external), .. } => external,
        Database { shared_with: Some(shared), .. } => shared,
        Database { postgres: Some(postgres), .. } => postgres,
        // refused by `check`
        Database { postgres: None, external: None, shared_with: None, .. } => &*postgres::DEFAULT,
    }
}

/// What the API server refuses by CEL, for clusters on which an object came past it.
pub fn check(database: &Database) -> Result<(), Rejection> {
    let Database { postgres, external, shared_with, .. } = database;
    let given = [postgres.is_some(), external.is_some(), shared_with.is_some()];
    if given.into_iter().filter(|given| *given).count() == 1 {
        return Ok(());
    }
    Err(Rejection {
        reason: Reason::InvalidDatabase,
        message: "spec.database says nowhere, or at more than one place, where the data is: give one of postgres, external and sharedWith".to_owned(),
    })
}

/// A role whose password is in a volume with that one file.
fn role(name: impl Into<RoleName>, (_, folder): Mount) -> Role {
    Role { name: name.into(), password_file: Path::new(folder).join(PASSWORD) }
}
