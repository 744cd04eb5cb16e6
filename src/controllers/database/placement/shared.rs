//! A schema in the database of another Microservice, the host.
//!
//! The set-up logs in as the superuser of the host's server. Whatever else logs in has a role of this service's own. That the pods
//! may connect is in their label, by which the host's NetworkPolicy admits them: nothing of the host's changes.

use k8s_openapi::api::core::v1::{Secret, Volume};

use super::{
    ADMIN, APP, Access, Mount, Placement, RELAY, User,
    postgres::{address, host, passwords, whole},
    role,
};
use crate::{
    api::v1alpha1::{DatabaseStatus, SharedWith},
    contract::{DatabaseLogin, Role, RoleName, database_setup::Purpose},
    controllers::{
        database::{Stage, Wanted, secrets, status},
        render::owner::Owner,
        resources::{
            observed::{DatabaseObserved, Host},
            plan::Rejection,
            reason::Reason,
            settings::Settings,
        },
        status::progress::Finding,
    },
    domain::names,
};

const FIELD: &str = "spec.database.sharedWith.service";

impl Placement for SharedWith {
    fn summary(&self) -> String {
        format!("in {}", self.service)
    }

    fn status(&self, owner: &Owner) -> DatabaseStatus {
        DatabaseStatus {
            engine: "postgres".to_owned(),
            host: Some(host(&self.service, &owner.namespace)),
            schema: Some(self.schema.clone()),
            ..DatabaseStatus::default()
        }
    }

    /// Only a Microservice with a server of its own is a host, so nothing can go round in a circle.
    fn check(&self, name: &str, observed: &DatabaseObserved) -> Result<(), Rejection> {
        if self.service == name {
            return Err(refused(format!(
                "{FIELD} is this Microservice itself: name the one in whose server the database is, or use spec.database.postgres for a server of its own"
            )));
        }
        let Host::Found(found) = &observed.host else { return Ok(()) };
        let service = &self.service;
        let Some(database) = &found.spec.database else {
            return Err(refused(format!(
                "{FIELD}: `{service}` has no database: name a Microservice with spec.database.postgres"
            )));
        };
        match &database.shared_with {
            Some(next) if next.service == name => Err(refused(format!(
                "{FIELD}: `{service}` is in the database of `{name}` itself, so neither has a server: give one of them spec.database.postgres"
            ))),
            Some(next) => Err(refused(format!(
                "{FIELD}: `{service}` has no server of its own, it is in that of `{}`: name `{}` instead",
                next.service, next.service
            ))),
            None if database.postgres.is_some() => Ok(()),
            None => Err(refused(format!(
                "{FIELD}: the database of `{service}` is external: give this Microservice a Secret for it by spec.database.external"
            ))),
        }
    }

    fn secret_names(&self, name: &str, _purpose: Purpose) -> Vec<String> {
        vec![names::database(name), names::relay_secret(name)]
    }

    fn secrets(&self, wanted: &Wanted<'_>, settings: &Settings) -> Vec<Secret> {
        let Owner { name, namespace, .. } = wanted.owner;
        let (app, relay) = (names::shared_role(name, names::APP_ROLE), names::shared_role(name, names::RELAY_ROLE));
        vec![
            secrets::binding(wanted, &app, &address(&self.service, namespace), settings),
            secrets::role(wanted, names::relay_secret(name), &relay, settings),
        ]
    }

    fn access(&self, name: &str, namespace: &str) -> Access {
        let login = |role: Role| DatabaseLogin {
            server: address(&self.service, namespace),
            role,
            schema: Some(names::weft_schema(&self.schema)),
        };
        let of_the_service = |role: &str| RoleName::Known(names::shared_role(name, role));
        let reads = self.reads.iter().map(|table| match table.split_once('.') {
            Some(_) => table.clone(),
            None => format!("public.{table}"),
        });
        Access {
            admin: login(role(names::ADMIN_ROLE, ADMIN)),
            app: login(role(of_the_service(names::APP_ROLE), APP)),
            relay: login(role(of_the_service(names::RELAY_ROLE), RELAY)),
            owner: of_the_service(names::OWNER_ROLE),
            schema: Some(self.schema.clone()),
            reads: reads.collect(),
        }
    }

    fn volumes(&self, name: &str, user: User) -> Vec<(Volume, Mount)> {
        passwords(name, names::admin_secret(&self.service), user)
    }

    fn binding(&self, name: &str, volume: &str) -> (String, Volume) {
        whole(names::database(name), volume)
    }

    fn client_of<'a>(&'a self, _name: &'a str) -> Option<&'a str> {
        Some(&self.service)
    }

    /// After each set-up of the host: a table that is made anew has lost its grants.
    fn identity(&self, observed: &DatabaseObserved) -> Option<String> {
        let (server, set_up) = (observed.server.as_ref()?, observed.host_set_up.as_ref()?);
        Some(format!("{}{}", server.uid, set_up.hash))
    }

    fn ready(&self, observed: &DatabaseObserved, _stage: &Stage<'_>) -> Finding {
        let service = &self.service;
        match &observed.host {
            Host::None if observed.server.is_some() => {
                let mut found = status::server(observed.server.as_ref());
                found.message = format!(
                    "{}; the Microservice `{service}` that it was made for is deleted, and nobody repairs it: apply that one again",
                    found.message
                );
                found
            }
            Host::None => {
                let Rejection { reason, message } = Rejection::microservice_not_found(FIELD, service);
                Finding::new(false, reason, message)
            }
            Host::Unreadable => {
                let Rejection { reason, message } = Rejection::microservice_malformed(FIELD, service);
                Finding::new(false, reason, message)
            }
            Host::Found(_) if observed.server.is_some() && observed.host_set_up.is_none() => Finding::new(
                false,
                Reason::MicroserviceNotReady,
                format!(
                    "the database of Microservice `{service}` is not set up yet; its condition Migrated names the cause"
                ),
            ),
            Host::Found(_) => status::server(observed.server.as_ref()),
        }
    }
}

fn refused(message: String) -> Rejection {
    Rejection { reason: Reason::NotShareable, message }
}
