//! The set-up Job: roles, Weft's tables, then migrations, in the pod network.

use std::path::{Path, PathBuf};

use k8s_openapi::api::{
    batch::v1::{
        Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern,
        PodFailurePolicyRule,
    },
    core::v1::{ConfigMap, Container, PodSpec, PodTemplateSpec, Volume, VolumeMount},
};
use kube::core::ObjectMeta;

use super::{ADMIN_PASSWORD, APP_PASSWORD, RELAY_PASSWORD, Stage, Wanted, host, secrets, server, stage};
use crate::{
    contract::{
        Contract, DatabaseLogin, Role,
        database_setup::{DatabaseSetup, EXIT_DEFINITE, Purpose},
    },
    controllers::{
        render::pod::{PASSWORD, config_map_volume, mount, password_volume, pod_security, requests, weft_security},
        resources::{
            child::Child,
            labels::{Component, DATABASE_CLIENT_LABEL, IMAGE_ANNOTATION, SECRETS_ANNOTATION},
            observed::{DatabaseObserved, Migrations},
            plan::Rejection,
            settings::Settings,
        },
    },
    domain::{
        names::{self, POSTGRES_PORT},
        version::short_hash,
    },
};

const CONTRACT: (&str, &str) = ("weft-setup", "/etc/weft/setup");
const CONTRACT_FILE: &str = "setup.yaml";
const MIGRATIONS: (&str, &str) = ("migrations", "/etc/weft/migrations");
/// The program waits for the server by itself and ends only when it is done or cannot be; so this bounds crashes of nodes
/// and the like, and is large: a Job that gave up needs a person.
const BACKOFF_LIMIT: i32 = 1000;

/// The contract's ConfigMap, and the Job of the present input, unless its migrations are missing.
pub(super) fn all(
    wanted: &Wanted<'_>,
    observed: &DatabaseObserved,
    settings: &Settings,
) -> Result<Vec<Child>, Rejection> {
    let mut children = vec![Child::ConfigMap(config_map(wanted, observed)?)];
    let waits = match stage(wanted, observed) {
        Stage::MigrationsMissing { .. } | Stage::MigrationsEmpty { .. } => true,
        // a Job cannot be changed: this one goes, and the next pass makes another
        Stage::Running(job) => {
            !job.missing_images.is_empty() && job.annotations.get(IMAGE_ANNOTATION) != Some(&settings.image)
        }
        // the superuser's new password is the server's once that has started with it
        Stage::Pending => !server::has_admin_password(wanted, observed),
        Stage::Failed { .. } | Stage::Done => false,
    };
    if !waits {
        children.push(Child::Job(job(wanted, observed, settings)));
    }
    Ok(children)
}

/// The name holds a hash of everything that the Job works from: contract, migrations, and the version of Weft's own tables, but
/// not the image: a new operator runs a new Job only where its data plane needs new tables.
pub(super) fn job_name(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> String {
    // a struct of strings, numbers and paths always has a form in YAML
    let mut input = contract(wanted).to_yaml().unwrap_or_default();
    if let Some(Migrations::Found { hash, .. }) = &observed.migrations {
        input.push_str(hash);
    }
    input.push_str(&wanted.purpose.layout().to_string());
    // a new password is one for the roles too
    let secrets = secrets::secrets_of(&wanted.owner.name, wanted.purpose);
    let secrets: Vec<_> = secrets.iter().map(String::as_str).collect();
    input.push_str(&secrets::replacements(observed, &secrets).unwrap_or_default());
    names::setup_job(&wanted.owner.name, &short_hash(input.as_bytes(), 8))
}

pub(super) fn contract(wanted: &Wanted<'_>) -> DatabaseSetup {
    let owner = wanted.owner;
    let role = |name: &str, (_, folder): (&str, &str)| Role {
        name: name.to_owned(),
        password_file: Path::new(folder).join(PASSWORD),
    };
    DatabaseSetup {
        admin: DatabaseLogin {
            host: host(&owner.name, &owner.namespace),
            port: POSTGRES_PORT,
            database: names::database_name(&owner.name),
            role: role(names::ADMIN_ROLE, ADMIN_PASSWORD),
        },
        owner: names::OWNER_ROLE.to_owned(),
        app: role(names::APP_ROLE, APP_PASSWORD),
        relay: (wanted.purpose == Purpose::Service).then(|| role(names::RELAY_ROLE, RELAY_PASSWORD)),
        purpose: wanted.purpose,
        migrations: wanted.migrations.map(|_| PathBuf::from(MIGRATIONS.1)),
        last_migration: None,
    }
}

fn config_map(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> Result<ConfigMap, Rejection> {
    let text = contract(wanted).to_yaml().map_err(|error| Rejection {
        reason: "ContractNotWritable",
        message: format!("the set-up contract of database {} cannot be written: {error}", wanted.owner.name),
    })?;
    Ok(ConfigMap {
        metadata: ObjectMeta {
            annotations: secrets::record(observed).map(|record| [(SECRETS_ANNOTATION.to_owned(), record)].into()),
            ..wanted.owner.metadata(names::setup(&wanted.owner.name), Component::Setup)
        },
        data: Some([(CONTRACT_FILE.to_owned(), text)].into()),
        ..ConfigMap::default()
    })
}

fn job(wanted: &Wanted<'_>, observed: &DatabaseObserved, settings: &Settings) -> Job {
    let owner = wanted.owner;
    let mut labels = owner.labels(Component::Setup);
    labels.insert(DATABASE_CLIENT_LABEL.to_owned(), owner.name.clone());
    let (volumes, mounts) = volumes(wanted);
    let template = PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels), ..ObjectMeta::default() }),
        spec: Some(PodSpec {
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            restart_policy: Some("Never".to_owned()),
            security_context: Some(pod_security()),
            containers: vec![container(mounts, settings)],
            volumes: Some(volumes),
            ..PodSpec::default()
        }),
    };
    Job {
        metadata: ObjectMeta {
            annotations: Some([(IMAGE_ANNOTATION.to_owned(), settings.image.clone())].into()),
            ..owner.metadata(job_name(wanted, observed), Component::Setup)
        },
        spec: Some(JobSpec {
            backoff_limit: Some(BACKOFF_LIMIT),
            pod_failure_policy: Some(failure_policy()),
            template,
            ..JobSpec::default()
        }),
        ..Job::default()
    }
}

const CONTAINER: &str = "setup";

fn container(mounts: Vec<VolumeMount>, settings: &Settings) -> Container {
    let config = format!("{}/{CONTRACT_FILE}", CONTRACT.1);
    Container {
        name: CONTAINER.to_owned(),
        image: Some(settings.image.clone()),
        image_pull_policy: settings.image_pull_policy.clone(),
        args: Some(["database", "setup", "--config", &config].map(str::to_owned).into()),
        resources: Some(requests("10m", "32Mi")),
        security_context: Some(weft_security()),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

fn volumes(wanted: &Wanted<'_>) -> (Vec<Volume>, Vec<VolumeMount>) {
    let name = &wanted.owner.name;
    let mut volumes = vec![
        (config_map_volume(CONTRACT.0, names::setup(name)), CONTRACT),
        (password_volume(ADMIN_PASSWORD.0, names::admin_secret(name)), ADMIN_PASSWORD),
        (password_volume(APP_PASSWORD.0, names::database(name)), APP_PASSWORD),
    ];
    if wanted.purpose == Purpose::Service {
        volumes.push((password_volume(RELAY_PASSWORD.0, names::relay_secret(name)), RELAY_PASSWORD));
    }
    if let Some(config_map) = wanted.migrations {
        volumes.push((config_map_volume(MIGRATIONS.0, config_map.to_owned()), MIGRATIONS));
    }
    volumes.into_iter().map(|(volume, (name, path))| (volume, mount(name, path))).unzip()
}

/// A definite error ends the Job at once; a pod that its node lost does not count.
fn failure_policy() -> PodFailurePolicy {
    let definite = PodFailurePolicyOnExitCodesRequirement {
        container_name: Some(CONTAINER.to_owned()),
        operator: "In".to_owned(),
        values: vec![i32::from(EXIT_DEFINITE)],
    };
    let disrupted =
        PodFailurePolicyOnPodConditionsPattern { type_: "DisruptionTarget".to_owned(), status: "True".to_owned() };
    PodFailurePolicy {
        rules: vec![
            PodFailurePolicyRule {
                action: "FailJob".to_owned(),
                on_exit_codes: Some(definite),
                on_pod_conditions: None,
            },
            PodFailurePolicyRule {
                action: "Ignore".to_owned(),
                on_exit_codes: None,
                on_pod_conditions: Some(vec![disrupted]),
            },
        ],
    }
}
