//! The relay as a native sidecar of the service's pods.

use k8s_openapi::{
    api::core::v1::{Container, ContainerPort, HTTPGetAction, Probe, Secret, Volume},
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::ResourceExt;

use crate::{
    api::v1alpha1::Microservice,
    contract::ADMIN_PORT,
    controllers::{
        database::RELAY_PASSWORD,
        kinds::{
            microservice::Observed,
            outbox_relay::{CONTRACT_FILE, CONTRACT_FOLDER},
        },
        render::{
            broker,
            owner::Owner,
            pod::{config_map_volume, mount, password_volume, weft_security},
            reach, sink,
        },
        resources::{
            labels::Component,
            settings::{Defaults, Settings},
        },
    },
    domain::names,
    nats::accounts::Access,
};

/// Name of the sidecar.
pub const CONTAINER: &str = "weft-relay";
const VOLUME: &str = "weft-relay";

/// The OutboxRelay whose sidecar the pods of a Microservice carry.
pub struct Carried {
    pub name: String,
    /// The Secret that a person gives for its broker.
    pub secret: Option<String>,
}

pub fn of(object: &Microservice, observed: &Observed) -> Option<Carried> {
    object.spec.database.as_ref()?;
    if let Some(name) = observed.kept_relay.clone() {
        return Some(Carried { name, secret: observed.kept_secret.clone() });
    }
    let relay = observed.relays.first()?;
    // its own controller refuses another Microservice's
    let own = |secret: &&str| reach::check_secret(&relay.spec.microservice, "", secret).is_ok();
    Some(Carried { name: relay.name_any(), secret: relay.spec.sink.secret().filter(own).map(str::to_owned) })
}

/// An init container that stays (`restartPolicy: Always`). It has no readiness probe: a broker that is away must not take
/// the service out of its Service; and no startup probe, so the service does not wait for it either.
pub fn sidecar(carried: &Carried, defaults: &Defaults, settings: &Settings) -> Container {
    let config = format!("{CONTRACT_FOLDER}/{CONTRACT_FILE}");
    let secret = carried.secret.as_deref().map(sink::volume_mount);
    let mounts = [mount(VOLUME, CONTRACT_FOLDER), mount(RELAY_PASSWORD.0, RELAY_PASSWORD.1)];
    Container {
        name: CONTAINER.to_owned(),
        image: Some(defaults.image.clone()),
        image_pull_policy: defaults.image_pull_policy.clone(),
        args: Some(["relay", "--config", &config].map(str::to_owned).into()),
        restart_policy: Some("Always".to_owned()),
        ports: Some(vec![admin_port()]),
        liveness_probe: Some(Probe { period_seconds: Some(10), failure_threshold: Some(6), ..admin_probe("/livez") }),
        resources: Some(defaults.resources.clone()),
        security_context: Some(weft_security(settings)),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts.into_iter().chain(broker::volume_mount(settings)).chain(secret).collect()),
        ..Container::default()
    }
}

/// What the sidecar mounts; the relay role's password and the broker's credentials are in no other container.
pub fn volumes(owner: &Owner, carried: &Carried, credentials: Option<&Secret>) -> Vec<Volume> {
    let contract = config_map_volume(VOLUME, names::relay(&carried.name));
    let secret = carried.secret.as_deref().map(sink::volume);
    let password = password_volume(RELAY_PASSWORD.0, names::relay_secret(&owner.name));
    [contract, password].into_iter().chain(credentials.map(broker::volume)).chain(secret).collect()
}

/// The Secret with the broker's credentials, whichever broker the relay uses: that may be edited while its pods run.
pub fn credentials(owner: &Owner, settings: &Settings) -> Option<Secret> {
    broker::secret(owner, Access::Publish, settings, |name| owner.ending_metadata(name, Component::Relay))
}

fn admin_port() -> ContainerPort {
    ContainerPort {
        name: Some("weft-admin".to_owned()),
        container_port: ADMIN_PORT.into(),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

fn admin_probe(path: &str) -> Probe {
    let get = HTTPGetAction {
        path: Some(path.to_owned()),
        port: IntOrString::Int(ADMIN_PORT.into()),
        ..HTTPGetAction::default()
    };
    Probe { http_get: Some(get), ..Probe::default() }
}
