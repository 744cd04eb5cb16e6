//! The relay as a native sidecar of the service's pods.

use k8s_openapi::{
    api::core::v1::{Container, ContainerPort, HTTPGetAction, Probe, Volume},
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::{
    contract::ADMIN_PORT,
    controllers::{
        database::RELAY_PASSWORD,
        kinds::outbox_relay::{CONTRACT_FILE, CONTRACT_FOLDER},
        render::pod::{config_map_volume, mount, password_volume, weft_security},
        resources::settings::{Defaults, Settings},
    },
    domain::names,
};

/// Name of the sidecar.
pub const CONTAINER: &str = "weft-relay";
const VOLUME: &str = "weft-relay";

/// An init container that stays (`restartPolicy: Always`). It has no readiness probe: a broker that is away must not take
/// the service out of its Service; and no startup probe, so the service does not wait for it either.
pub fn sidecar(defaults: &Defaults, settings: &Settings) -> Container {
    let config = format!("{CONTRACT_FOLDER}/{CONTRACT_FILE}");
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
        volume_mounts: Some(vec![mount(VOLUME, CONTRACT_FOLDER), mount(RELAY_PASSWORD.0, RELAY_PASSWORD.1)]),
        ..Container::default()
    }
}

/// What the sidecar mounts; the relay role's password is in no other container.
pub fn volumes(service: &str, relay: &str) -> [Volume; 2] {
    [config_map_volume(VOLUME, names::relay(relay)), password_volume(RELAY_PASSWORD.0, names::relay_secret(service))]
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
