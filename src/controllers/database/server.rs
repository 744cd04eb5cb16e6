//! The PostgreSQL server: StatefulSet, Service and NetworkPolicy, all named `NAME-db`.
//!
//! The official image works unchanged: it runs as user 999, takes its documented environment, and its stop signal (SIGINT)
//! is PostgreSQL's fast shutdown, so no preStop hook is needed. A log-tailing relay that cannot get rid of its events keeps
//! a fast shutdown waiting; the grace period ends that, and the next start recovers from the log.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::{StatefulSet, StatefulSetPersistentVolumeClaimRetentionPolicy, StatefulSetSpec},
        core::v1::{
            Container, ContainerPort, EmptyDirVolumeSource, EnvVar, ExecAction, PersistentVolumeClaim,
            PersistentVolumeClaimSpec, PodSecurityContext, PodSpec, PodTemplateSpec, Probe, SecurityContext, Service,
            ServicePort, ServiceSpec, Volume, VolumeMount, VolumeResourceRequirements,
        },
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::{api::resource::Quantity, util::intstr::IntOrString},
};
use kube::core::ObjectMeta;

use super::{Wanted, placement::ADMIN, secrets};
use crate::{
    api::v1alpha1::{Postgres, Retention, Storage},
    controllers::{
        render::{
            network,
            pod::{PASSWORD, container_security, mount, password_volume, pin, pod_security, pod_spec},
        },
        resources::{
            child::Child,
            labels::{
                Component, DATABASE_CLIENT_LABEL, DELETED_WITH_ANNOTATION, GUESTS_ANNOTATION, SECRETS_ANNOTATION,
                STORAGE_ANNOTATION,
            },
            observed::{DatabaseObserved, Workload},
            plan::Rejection,
            reason::Reason,
            settings::{Defaults, Settings},
        },
    },
    domain::names::{self, POSTGRES_PORT},
};

/// User and group `postgres` of the official image (Debian).
const POSTGRES_USER: i64 = 999;
/// Name of the volume claim's template: the claim is `data-NAME-db-0`.
const DATA: &str = "data";
const DATA_FOLDER: &str = "/var/lib/postgresql/data";
/// A sub-folder, since a fresh volume's root may hold `lost+found` and belongs to root.
const PGDATA: &str = "/var/lib/postgresql/data/pgdata";
/// Name of the server's container.
pub const CONTAINER: &str = "postgres";
const PORT_NAME: &str = "postgres";
/// Starts the image's own entry point, `$@`, on the volume `$0`.
const START: &str = include_str!("start.sh");
/// Enough for a checkpoint; what is not written by then is recovered from the log.
const GRACE_SECONDS: i64 = 60;
/// PostgreSQL's own `max_wal_size` [MB], which suits volumes from 4 GiB on.
const MAX_WAL_SIZE: u64 = 1024;

pub(super) fn all(
    postgres: &Postgres,
    wanted: &Wanted<'_>,
    observed: &DatabaseObserved,
    settings: &Settings,
) -> Result<Vec<Child>, Rejection> {
    Ok(vec![
        Child::NetworkPolicy(network_policy(wanted)),
        Child::Service(service(wanted)),
        Child::StatefulSet(stateful_set(postgres, wanted, observed, settings)?),
    ])
}

/// Of everything that is named after the database.
pub(super) fn metadata(wanted: &Wanted<'_>) -> ObjectMeta {
    wanted.owner.metadata(names::database(&wanted.owner.name), Component::Database)
}

/// The probes are commands in the container, so nothing else needs to get in.
fn network_policy(wanted: &Wanted<'_>) -> NetworkPolicy {
    let clients = network::pods([(DATABASE_CLIENT_LABEL.to_owned(), wanted.owner.name.clone())].into());
    let rule = network::admit(POSTGRES_PORT, vec![clients]);
    network::policy(metadata(wanted), wanted.owner.pods(Component::Database), vec![rule])
}

fn service(wanted: &Wanted<'_>) -> Service {
    let owner = wanted.owner;
    Service {
        metadata: metadata(wanted),
        spec: Some(ServiceSpec {
            selector: Some(owner.selector(Component::Database)),
            ports: Some(vec![ServicePort {
                name: Some(PORT_NAME.to_owned()),
                port: POSTGRES_PORT.into(),
                target_port: Some(IntOrString::String(PORT_NAME.to_owned())),
                protocol: Some("TCP".to_owned()),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

/// The server has started with the superuser's newest password.
pub(super) fn has_admin_password(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> bool {
    let admin = names::admin_secret(&wanted.owner.name);
    let Some(replacements) = secrets::replacements(observed, &[&admin]) else { return true };
    observed
        .server
        .as_ref()
        .is_some_and(|live| live.annotations.get(SECRETS_ANNOTATION) == Some(&replacements) && live.is_rolled_out())
}

/// The annotation by which the server restarts with a new password. Not before the Secret is there: it would not come back.
fn admin_annotation(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> BTreeMap<String, String> {
    let admin = names::admin_secret(&wanted.owner.name);
    if observed.secrets.missing.contains(&admin) {
        let live = observed.server.as_ref().and_then(|live| live.annotations.get_key_value(SECRETS_ANNOTATION));
        return live.map(|(key, value)| (key.clone(), value.clone())).into_iter().collect();
    }
    secrets::replaced_annotation(observed, &[&admin]).unwrap_or_default()
}

fn stateful_set(
    postgres: &Postgres,
    wanted: &Wanted<'_>,
    observed: &DatabaseObserved,
    settings: &Settings,
) -> Result<StatefulSet, Rejection> {
    let (live, secrets) = (observed.server.as_ref(), admin_annotation(wanted, observed));
    let owner = wanted.owner;
    let name = names::database(&owner.name);
    let newest = settings.postgres_defaults(&postgres.version);
    let pinned =
        pin(live, newest, wanted.upgrade, |defaults| template(postgres, wanted, defaults, &secrets, settings))?;
    let when_deleted = match wanted.retention {
        Retention::Retain => "Retain",
        Retention::Delete => "Delete",
    };
    let mut annotations = pinned.annotations;
    // quantities and names always have a form in JSON
    annotations.extend(secrets);
    if wanted.retention == Retention::Delete {
        annotations.extend(owner.uid().map(|uid| (DELETED_WITH_ANNOTATION.to_owned(), uid)));
    }
    if !wanted.guests.is_empty() {
        annotations.insert(GUESTS_ANNOTATION.to_owned(), serde_json::to_string(&wanted.guests).unwrap_or_default());
    }
    annotations.insert(STORAGE_ANNOTATION.to_owned(), serde_json::to_string(&postgres.storage).unwrap_or_default());
    Ok(StatefulSet {
        metadata: ObjectMeta { annotations: Some(annotations), ..owner.metadata(name.clone(), Component::Database) },
        spec: Some(StatefulSetSpec {
            replicas: Some(1),
            service_name: Some(name),
            selector: owner.pods(Component::Database),
            template: pinned.template,
            // with OrderedReady a server that cannot start would never get the corrected template
            pod_management_policy: Some("Parallel".to_owned()),
            persistent_volume_claim_retention_policy: Some(StatefulSetPersistentVolumeClaimRetentionPolicy {
                when_deleted: Some(when_deleted.to_owned()),
                when_scaled: Some("Retain".to_owned()),
            }),
            volume_claim_templates: Some(vec![claim(postgres, wanted)]),
            ..StatefulSetSpec::default()
        }),
        status: None,
    })
}

/// Name of the claim of a server's pod.
pub fn claim_of(pod: &str) -> String {
    format!("{DATA}-{pod}")
}

/// The volume that the server has, if there is one.
pub fn storage(live: Option<&Workload>) -> Option<Storage> {
    serde_json::from_str(live?.annotations.get(STORAGE_ANNOTATION)?).ok()
}

fn claim(postgres: &Postgres, wanted: &Wanted<'_>) -> PersistentVolumeClaim {
    let storage = &postgres.storage;
    PersistentVolumeClaim {
        metadata: ObjectMeta {
            name: Some(DATA.to_owned()),
            labels: Some(wanted.owner.lasting_labels(Component::Database)),
            ..ObjectMeta::default()
        },
        spec: Some(PersistentVolumeClaimSpec {
            access_modes: Some(vec!["ReadWriteOnce".to_owned()]),
            storage_class_name: storage.class_name.clone(),
            resources: Some(VolumeResourceRequirements {
                requests: Some([("storage".to_owned(), storage.size.clone())].into()),
                limits: None,
            }),
            ..PersistentVolumeClaimSpec::default()
        }),
        status: None,
    }
}

fn template(
    postgres: &Postgres,
    wanted: &Wanted<'_>,
    defaults: &Defaults,
    secrets: &BTreeMap<String, String>,
    settings: &Settings,
) -> Result<PodTemplateSpec, Rejection> {
    let owner = wanted.owner;
    let user = settings.fixed_user_ids.then_some(POSTGRES_USER);
    Ok(PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(owner.labels(Component::Database)),
            annotations: (!secrets.is_empty()).then(|| secrets.clone()),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            termination_grace_period_seconds: Some(GRACE_SECONDS),
            security_context: Some(PodSecurityContext {
                run_as_user: user,
                run_as_group: user,
                fs_group: user,
                fs_group_change_policy: Some("OnRootMismatch".to_owned()),
                ..pod_security()
            }),
            containers: vec![container(postgres, wanted, defaults)?],
            volumes: Some(vec![
                password_volume(ADMIN.0, names::admin_secret(&owner.name)),
                scratch("run", None),
                scratch("tmp", None),
                // parallel queries share memory here; the runtime's own default is 64 MiB
                scratch("shm", Some("Memory")),
            ]),
            ..pod_spec(names::database(&owner.name))
        }),
    })
}

fn container(postgres: &Postgres, wanted: &Wanted<'_>, defaults: &Defaults) -> Result<Container, Rejection> {
    let folder = |volume: &str, path: &str| VolumeMount {
        name: volume.to_owned(),
        mount_path: path.to_owned(),
        ..VolumeMount::default()
    };
    Ok(Container {
        name: CONTAINER.to_owned(),
        image: Some(defaults.image.clone()),
        image_pull_policy: defaults.image_pull_policy.clone(),
        command: Some(["sh", "-c", START, DATA_FOLDER].map(str::to_owned).into()),
        args: Some(arguments(postgres)?),
        env: Some(environment(wanted)),
        ports: Some(vec![ContainerPort {
            name: Some(PORT_NAME.to_owned()),
            container_port: POSTGRES_PORT.into(),
            protocol: Some("TCP".to_owned()),
            ..ContainerPort::default()
        }]),
        resources: Some(postgres.resources.as_ref().unwrap_or(&defaults.resources).clone()),
        security_context: Some(SecurityContext { read_only_root_filesystem: Some(true), ..container_security() }),
        // Crash recovery may take hours, and one that is cut short begins anew: the start-up probe looks every second and never
        // gives up. There is no liveness probe: a server that dies ends its container by itself, and one that is slow must not
        // be killed for it.
        startup_probe: Some(probe(wanted, 1, i32::MAX)),
        readiness_probe: Some(probe(wanted, 5, 3)),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(vec![
            folder(DATA, DATA_FOLDER),
            folder("run", "/var/run/postgresql"),
            folder("tmp", "/tmp"),
            folder("shm", "/dev/shm"),
            mount(ADMIN.0, ADMIN.1),
        ]),
        ..Container::default()
    })
}

/// Over TCP: while the image makes the database, its server listens on a socket only and does not count.
fn probe(wanted: &Wanted<'_>, period_seconds: i32, failures: i32) -> Probe {
    let database = names::database_name(&wanted.owner.name);
    let command = ["pg_isready", "-q", "-h", "127.0.0.1", "-U", names::ADMIN_ROLE, "-d", &database];
    Probe {
        exec: Some(ExecAction { command: Some(command.map(str::to_owned).into()) }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(3),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}

fn environment(wanted: &Wanted<'_>) -> Vec<EnvVar> {
    let password_file = format!("{}/{PASSWORD}", ADMIN.1);
    [
        ("POSTGRES_USER", names::ADMIN_ROLE.to_owned()),
        ("POSTGRES_PASSWORD_FILE", password_file),
        ("POSTGRES_DB", names::database_name(&wanted.owner.name)),
        ("POSTGRES_HOST_AUTH_METHOD", "scram-sha-256".to_owned()),
        ("POSTGRES_INITDB_ARGS", "--auth-host=scram-sha-256".to_owned()),
        ("PGDATA", PGDATA.to_owned()),
    ]
    .map(|(name, value)| EnvVar { name: name.to_owned(), value: Some(value), value_from: None })
    .into()
}

/// `postgres -c NAME=VALUE …`, sorted by name: Weft's defaults, over them the user's, over them what must not change.
fn arguments(postgres: &Postgres) -> Result<Vec<String>, Rejection> {
    let log = log_megabytes(&postgres.storage.size)?;
    let mut parameters = BTreeMap::from([
        ("max_replication_slots".to_owned(), "10".to_owned()),
        ("max_slot_wal_keep_size".to_owned(), format!("{log}MB")),
        ("max_wal_senders".to_owned(), "10".to_owned()),
        ("max_wal_size".to_owned(), format!("{}MB", log.min(MAX_WAL_SIZE))),
    ]);
    parameters.extend(postgres.parameters.clone());
    parameters.insert("wal_level".to_owned(), "logical".to_owned());
    let settings = parameters.into_iter().flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")]);
    Ok(std::iter::once("postgres".to_owned()).chain(settings).collect())
}

/// The log must not fill the volume: between two checkpoints it may take a quarter of it, and what a slot holds back for a
/// relay that is away another quarter; but at least a few segments.
fn log_megabytes(size: &Quantity) -> Result<u64, Rejection> {
    const LEAST: u64 = 128;
    let bytes = bytes(&size.0).ok_or_else(|| Rejection {
        reason: Reason::InvalidStorageSize,
        message: format!(
            "spec.database.postgres.storage.size: `{}` is not a size that Weft reads; give a whole number and a unit, such as 1Gi",
            size.0
        ),
    })?;
    Ok((bytes / 4 / (1 << 20)).max(LEAST))
}

/// Whole bytes of a quantity as people write sizes: digits, then a unit or none.
fn bytes(quantity: &str) -> Option<u64> {
    let digits = quantity.find(|c: char| !c.is_ascii_digit()).unwrap_or(quantity.len());
    let (number, unit) = quantity.split_at(digits);
    let factor: u64 = match unit {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "P" => 1_000_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        "Pi" => 1 << 50,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(factor)
}

fn scratch(name: &str, medium: Option<&str>) -> Volume {
    let limit = medium.map(|_| Quantity("256Mi".to_owned()));
    Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource { medium: medium.map(str::to_owned), size_limit: limit }),
        ..Volume::default()
    }
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!(bytes("1Gi"), Some(1 << 30));
        assert_eq!(bytes("500M"), Some(500_000_000));
        assert_eq!(bytes("1024"), Some(1024));
        for odd in ["", "Gi", "1.5Gi", "1e9", "-1Gi", "99999999999Pi"] {
            assert_eq!(bytes(odd), None, "{odd}");
        }
    }
}
