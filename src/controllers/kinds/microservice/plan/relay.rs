//! The relay's container: a native sidecar of the service's pods, or alone in a pod of its own ([`super::standalone`]).

use k8s_openapi::{
    api::core::v1::{Container, ContainerPort, HTTPGetAction, Probe, Secret, Volume},
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::ResourceExt;

use crate::{
    api::v1alpha1::{Microservice, Outbox, Placement, RelayMode},
    contract::ADMIN_PORT,
    controllers::{
        database::{Mount, User, placement},
        kinds::{
            microservice::Observed,
            outbox_relay::{CONTRACT_FILE, CONTRACT_FOLDER},
        },
        render::{
            broker,
            owner::Owner,
            pod::{config_map_volume, mount, weft_security},
            reach, sink,
        },
        resources::{
            labels::{Component, RELAY_PLACEMENT_ANNOTATION},
            observed::Workload,
            settings::{Defaults, Settings},
        },
    },
    domain::names,
    nats::accounts::Access,
};

/// Value of [`RELAY_PLACEMENT_ANNOTATION`].
pub const SIDECAR: &str = "Sidecar";

/// Name of the container.
pub const CONTAINER: &str = "weft-relay";
const VOLUME: &str = "weft-relay";

/// The OutboxRelay of a Microservice.
pub struct Carried {
    pub name: String,
    pub placement: Placement,
    /// The Secret that a person gives for its broker.
    pub secret: Option<String>,
    /// What it logs in to the database with.
    pub login: Vec<(Volume, Mount)>,
}

pub fn of(object: &Microservice, observed: &Observed) -> Option<Carried> {
    let login = placement(object.spec.database.as_ref()?).volumes(&object.name_any(), User::Relay);
    if let Some(name) = observed.kept_relay.clone() {
        let alone = observed.relay_deployment.is_some();
        let placement = if alone { Placement::Standalone } else { Placement::Sidecar };
        return Some(Carried { name, placement, secret: observed.kept_secret.clone(), login });
    }
    let relay = observed.relays.first()?;
    // its own controller refuses another's, and the last good contract stays in force, with its Secret
    let own = |secret: &str| reach::check_secret(&relay.spec.microservice, "", secret).is_ok();
    let secret = match relay.spec.sink.secret() {
        Some(secret) if !own(secret) => observed.kept_secret.clone(),
        secret => secret.map(str::to_owned),
    };
    Some(Carried { name: relay.name_any(), placement: relay.spec.placement, secret, login })
}

/// Whether the relay in a pod of its own is there: also as long as the sidecar that replaces it runs in no pod yet.
pub fn is_alone(carried: &Carried, observed: &Observed) -> bool {
    let has_sidecar = |live: &Workload| {
        live.annotations.get(RELAY_PLACEMENT_ANNOTATION).is_some_and(|value| value == SIDECAR) && live.is_rolled_out()
    };
    carried.placement == Placement::Standalone
        || (observed.relay_deployment.is_some() && !observed.deployment.as_ref().is_some_and(has_sidecar))
}

/// Whether the service's own pods have the relay.
pub fn is_sidecar(object: &Microservice, observed: &Observed) -> bool {
    of(object, observed).is_some_and(|carried| carried.placement == Placement::Sidecar)
}

/// Whether that relay reads the transaction log. One that cannot be read does, if one may have left its slot.
pub fn is_log_tailing(observed: &Observed) -> bool {
    let recorded = observed.database.recorded.as_ref();
    match (&observed.kept_relay, observed.relays.first()) {
        (Some(_), _) => recorded.is_some_and(|recorded| recorded.replication_slot),
        (None, relay) => relay.is_some_and(|relay| relay.spec.mode == RelayMode::LogTailing),
    }
}

/// The outbox of that relay; `None` also while its OutboxRelay cannot be read.
pub fn outbox(observed: &Observed) -> Option<&Outbox> {
    let relay = observed.relays.first().filter(|_| observed.kept_relay.is_none())?;
    Some(&relay.spec.outbox)
}

/// An init container that stays (`restartPolicy: Always`). It has no readiness probe: a broker that is away must not take
/// the service out of its Service; and no startup probe, so the service does not wait for it either.
pub fn sidecar(carried: &Carried, defaults: &Defaults, settings: &Settings) -> Container {
    Container { restart_policy: Some("Always".to_owned()), ..container(carried, defaults, settings) }
}

pub fn container(carried: &Carried, defaults: &Defaults, settings: &Settings) -> Container {
    let config = format!("{CONTRACT_FOLDER}/{CONTRACT_FILE}");
    let secret = carried.secret.as_deref().map(sink::volume_mount);
    let login = carried.login.iter().map(|(_, (volume, path))| mount(volume, path));
    let mounts = std::iter::once(mount(VOLUME, CONTRACT_FOLDER)).chain(login);
    Container {
        name: CONTAINER.to_owned(),
        image: Some(defaults.image.clone()),
        image_pull_policy: defaults.image_pull_policy.clone(),
        args: Some(["relay", "run", "--config", &config].map(str::to_owned).into()),
        ports: Some(vec![admin_port()]),
        liveness_probe: Some(admin_probe("/livez")),
        resources: Some(defaults.resources.clone()),
        security_context: Some(weft_security(settings)),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts.chain(broker::volume_mount(settings)).chain(secret).collect()),
        ..Container::default()
    }
}

/// What the relay's container mounts; the relay role's password and the broker's credentials are in no other container.
pub fn volumes(carried: &Carried, credentials: Option<&Secret>) -> Vec<Volume> {
    let contract = config_map_volume(VOLUME, names::relay(&carried.name));
    let secret = carried.secret.as_deref().map(sink::volume);
    let login = carried.login.iter().map(|(volume, _)| volume.clone());
    std::iter::once(contract).chain(login).chain(credentials.map(broker::volume)).chain(secret).collect()
}

/// The Secret with the broker's credentials, whichever broker the relay uses: that may be edited while its pods run.
pub fn credentials(owner: &Owner, settings: &Settings) -> Option<Secret> {
    broker::secret(owner, Access::Publish, settings, |name| owner.ending_metadata(name, Component::Relay))
}

pub fn admin_port() -> ContainerPort {
    ContainerPort {
        name: Some("weft-admin".to_owned()),
        container_port: ADMIN_PORT.into(),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    }
}

/// Fails after a minute.
pub fn admin_probe(path: &str) -> Probe {
    let get = HTTPGetAction {
        path: Some(path.to_owned()),
        port: IntOrString::Int(ADMIN_PORT.into()),
        ..HTTPGetAction::default()
    };
    Probe { http_get: Some(get), period_seconds: Some(10), failure_threshold: Some(6), ..Probe::default() }
}
