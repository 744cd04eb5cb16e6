//! The set-up Job: roles, Weft's tables, then migrations, in the pod network. It carries its contract in an annotation of its
//! pods, which they read as a file, so a ConfigMap is made only when there is something to record.

use std::{collections::BTreeMap, path::PathBuf};

use k8s_openapi::api::{
    batch::v1::{Job, JobSpec},
    core::v1::{
        ConfigMap, Container, DownwardAPIVolumeFile, DownwardAPIVolumeSource, EmptyDirVolumeSource,
        ObjectFieldSelector, PodSpec, PodTemplateSpec, Volume, VolumeMount,
    },
};
use kube::core::ObjectMeta;

use super::{
    Stage, Wanted, client_label, outbox,
    placement::{Access, User},
    secrets, stage,
};
use crate::{
    api::v1alpha1::SetUp,
    contract::{
        Contract, DatabaseLogin,
        database_setup::{DatabaseSetup, DuplicateWindow, Outcome, Purpose},
    },
    controllers::{
        render::{
            milliseconds,
            pod::{self, config_map_volume, mount, pod_spec, weft_security},
        },
        resources::{
            child::{Child, ChildKind, ChildRef},
            labels::{
                CONTRACT_ANNOTATION, Component, DEFAULTS_ANNOTATION, RELEASED_ANNOTATION, SECRETS_ANNOTATION,
                SET_UP_ANNOTATION,
            },
            observed::{DatabaseObserved, JobOutcome, JobState, Migrations, Released, is_about_resources},
            plan::{Plan, Rejection},
            reason::Reason,
            settings::{Defaults, Settings},
        },
    },
    domain::{
        names,
        version::{self, short_hash},
    },
};

const CONTRACT: (&str, &str) = ("weft-setup", "/etc/weft/setup");
const CONTRACT_FILE: &str = "setup.yaml";
const MIGRATIONS: (&str, &str) = ("migrations", "/etc/weft/migrations");
/// A folder that lasts as long as the pod: the program keeps there that an error is definite.
const STATE: (&str, &str) = ("state", "/var/lib/weft");
/// Key of the ConfigMap with the pod template that was released last.
pub const RELEASED_FILE: &str = "released.json";
/// A mesh's proxy is to be a native sidecar (Istio, Linkerd), so that the pod ends with the set-up. It is not kept out: a
/// mesh that demands mutual TLS of the database would then refuse the set-up.
const NATIVE_SIDECARS: [&str; 3] = [
    "sidecar.istio.io/nativeSidecar",
    "config.beta.linkerd.io/proxy-enable-native-sidecar",
    "config.alpha.linkerd.io/proxy-enable-native-sidecar",
];

/// Adds the Job of the present input while it has something to do, or retains the one that has done it.
pub(super) fn add_job(
    wanted: &Wanted<'_>,
    observed: &DatabaseObserved,
    settings: &Settings,
    plan: &mut Plan,
) -> Result<(), Rejection> {
    let Some(name) = job_name(wanted, observed) else { return Ok(()) };
    let runs = match stage(wanted, observed) {
        Stage::MigrationsMissing { .. } | Stage::MigrationsEmpty { .. } | Stage::MigrationsBehind { .. } => false,
        // a Job cannot be changed: this one goes, and the next pass makes another
        Stage::Running(job) => !is_corrected(job, settings),
        // one that has ended and does not count read other migrations: it goes, too
        // the superuser's new password is the server's once that has started with it
        Stage::Pending => !observed.jobs.contains_key(&name) && wanted.placement.has_admin_password(wanted, observed),
        Stage::Failed { .. } => true,
        Stage::Done => {
            // it stays for its log, whoever deletes it; unless an injected container would have it run for ever
            if observed.jobs.get(&name).is_some_and(|job| job.outcome == JobOutcome::Succeeded) {
                plan.retained.push(ChildRef::new(ChildKind::Job, name.clone()));
            }
            false
        }
    };
    if runs {
        plan.children.push(Child::Job(job(wanted, name, contract(wanted), settings)?));
    }
    if leaves_slot(wanted, observed)
        && stage(wanted, observed) == Stage::Done
        && let Some(name) = slot_job_name(wanted, observed)
        && observed.jobs.get(&name).is_none_or(|job| !is_corrected(job, settings))
    {
        let contract = DatabaseSetup { remove_slot: true, ..contract(wanted) };
        plan.children.push(Child::Job(job(wanted, name, contract, settings)?));
    }
    Ok(())
}

/// A replication slot that no relay reads any more is in the database.
fn leaves_slot(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> bool {
    let has_slot = observed.recorded.as_ref().is_some_and(|recorded| recorded.replication_slot);
    has_slot && !wanted.has_relay && !observed.relay_runs
}

/// Why the replication slot of an OutboxRelay that is gone could not be removed so far: what it says, and the Job that says
/// it, which there is once the set-up of the present input is done.
pub fn remaining_slot<'a>(wanted: &Wanted<'_>, observed: &'a DatabaseObserved) -> Option<(Option<String>, &'a str)> {
    if !leaves_slot(wanted, observed) {
        return None;
    }
    if stage(wanted, observed) != Stage::Done {
        return Some((
            None,
            "it is removed once the database is set up; the condition Migrated names what that waits for",
        ));
    }
    let job = slot_job_name(wanted, observed)?;
    let state = observed.jobs.get(&job)?;
    let message = match &state.outcome {
        JobOutcome::Failed { message } => message,
        // it tries again
        JobOutcome::Running => &state.problems.first()?.message,
        JobOutcome::Succeeded => return None,
    };
    Some((Some(job), message))
}

/// What keeps this Job's pod from running came from the operator's configuration, which is another one by now.
fn is_corrected(job: &JobState, settings: &Settings) -> bool {
    let never_runs = !job.missing_images.is_empty() || is_about_resources(&job.problems);
    never_runs && pod::defaults(&job.annotations).as_ref() != Some(&defaults(settings))
}

fn defaults(settings: &Settings) -> Defaults {
    settings.defaults(&settings.resources.setup)
}

/// The set-up of the present input, if it is done: as recorded, or as its Job reports it.
pub(super) fn done(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> Option<SetUp> {
    let hash = hash(wanted, observed)?;
    let job = observed.jobs.get(&names::setup_job(&wanted.owner.name, &hash));
    let recorded = observed.recorded.clone().filter(|recorded| recorded.hash == hash);
    let reported = job.and_then(|job| reported(job, observed.migrations.as_ref(), hash));
    let outbox_hash = outbox_hash(wanted, observed);
    let reported = reported.map(|reported| SetUp { outbox_hash, ..reported });
    // a report may come after the end of the Job
    let is_whole = recorded.as_ref().is_some_and(|recorded| recorded.files.is_some());
    let done = if is_whole { recorded } else { reported.or(recorded) };
    done.map(|done| SetUp { replication_slot: has_slot(wanted, observed), ..done })
}

/// The database may have the replication slot of a relay: of the one that is wanted, or of a former one.
fn has_slot(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> bool {
    let had_one = observed.recorded.as_ref().is_some_and(|recorded| recorded.replication_slot);
    let removed = || {
        let job = slot_job_name(wanted, observed).and_then(|name| observed.jobs.get(&name));
        job.is_some_and(|job| job.outcome == JobOutcome::Succeeded || job.report.is_some())
    };
    wanted.log_tailing || (had_one && (wanted.has_relay || observed.relay_runs || !removed()))
}

/// What a Job that did its work achieved; its pod, and the report with it, may be gone.
fn reported(job: &JobState, migrations: Option<&Migrations>, hash: String) -> Option<SetUp> {
    let Some(Outcome { files, applied: _, last, hash: content, written_by_others }) = job.report.clone() else {
        return (job.outcome == JobOutcome::Succeeded).then(|| SetUp { hash, ..SetUp::default() });
    };
    // what was mounted can be older than what was observed
    if matches!(migrations, Some(Migrations::Found { hash, .. }) if *hash != content) {
        return None;
    }
    let files = i32::try_from(files).ok();
    Some(SetUp { hash, files, last, content_hash: Some(content), written_by_others, ..SetUp::default() })
}

/// Of everything that the set-up works from: contract, migrations, the server, and the version of Weft's own tables; but
/// not the image: a new operator runs a new Job only where its data plane needs new tables. `None` until the server exists.
fn hash(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> Option<String> {
    // a struct of strings, numbers and paths always has a form in JSON
    let contract = DatabaseSetup { outbox: None, ..contract(wanted) };
    let mut input = serde_json::to_string(&contract).unwrap_or_default();
    input.push_str(&outbox_hash(wanted, observed).unwrap_or_default());
    if let Some(Migrations::Found { hash, .. }) = &observed.migrations {
        input.push_str(hash);
    }
    input.push_str(&wanted.purpose.layout().to_string());
    // a new password is one for the roles too
    let secrets = wanted.placement.secret_names(&wanted.owner.name, wanted.purpose);
    let secrets: Vec<_> = secrets.iter().map(String::as_str).collect();
    input.push_str(&secrets::replacements(observed, &secrets).unwrap_or_default());
    input.push_str(&wanted.placement.identity(observed)?);
    Some(short_hash(input.as_bytes(), 8))
}

/// Hash of the team's outbox that events are copied from: the relay's, or without a relay as it was set up. So a relay of
/// Weft's own layout that comes or goes needs no new set-up, and one that replaces another layout does.
fn outbox_hash(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> Option<String> {
    match wanted.outbox {
        Some(outbox) => outbox::hash(outbox),
        None => observed.recorded.as_ref()?.outbox_hash.clone(),
    }
}

pub(super) fn job_name(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> Option<String> {
    Some(names::setup_job(&wanted.owner.name, &hash(wanted, observed)?))
}

/// The set-up that removes a replication slot as well.
fn slot_job_name(wanted: &Wanted<'_>, observed: &DatabaseObserved) -> Option<String> {
    let hash = hash(wanted, observed)?;
    Some(names::setup_job(&wanted.owner.name, &short_hash(format!("{hash} without a slot").as_bytes(), 8)))
}

pub(super) fn contract(wanted: &Wanted<'_>) -> DatabaseSetup {
    let owner = wanted.owner;
    let Access { admin, app, relay, owner, schema, reads } = wanted.placement.access(&owner.name, &owner.namespace);
    let is_service = wanted.purpose == Purpose::Service;
    DatabaseSetup {
        // the set-up knows the schema
        admin: DatabaseLogin { schema: None, ..admin },
        owner,
        schema,
        reads,
        app: app.role,
        relay: is_service.then_some(relay.role),
        remove_slot: false,
        log_tailing: wanted.log_tailing && !wanted.placement.is_logical(),
        purpose: wanted.purpose,
        duplicate_window: wanted.duplicate_window.map(|window| DuplicateWindow {
            messages_ms: milliseconds(window.messages),
            commands_ms: milliseconds(window.commands),
        }),
        migrations: wanted.migrations.map(|_| PathBuf::from(MIGRATIONS.1)),
        last_migration: wanted.migrations.and_then(|migrations| migrations.last.clone()),
        outbox: wanted.outbox.map(outbox::contract),
    }
}

/// The ConfigMap with what has to outlive the Job, the Deployment and this process: the last set-up that succeeded, the pod template
/// that was released last, and how often each Secret was made again. `None` while there is none of it.
pub(super) fn record(
    wanted: &Wanted<'_>,
    observed: &DatabaseObserved,
    released: Option<&Released>,
) -> Option<ConfigMap> {
    // strings, numbers and structs of Kubernetes' own always have a form in JSON
    let json = |value: serde_json::Result<String>| value.unwrap_or_default();
    // a relay may make its slot while the set-up of the present input is not done
    let slot = has_slot(wanted, observed);
    let earlier = || observed.recorded.clone().map(|recorded| SetUp { replication_slot: slot, ..recorded });
    let done = done(wanted, observed).or_else(earlier);
    let done = done.map(|done| (SET_UP_ANNOTATION.to_owned(), json(serde_json::to_string(&done))));
    let version = released.map(|released| (RELEASED_ANNOTATION.to_owned(), version::of(released)));
    let secrets = secrets::record(observed).map(|record| (SECRETS_ANNOTATION.to_owned(), record));
    let annotations: BTreeMap<_, _> = done.into_iter().chain(version).chain(secrets).collect();
    if annotations.is_empty() {
        return None;
    }
    Some(ConfigMap {
        metadata: ObjectMeta {
            annotations: Some(annotations),
            ..wanted.owner.metadata(names::setup(&wanted.owner.name), Component::Setup)
        },
        data: released.map(|released| [(RELEASED_FILE.to_owned(), json(serde_json::to_string(released)))].into()),
        ..ConfigMap::default()
    })
}

fn job(wanted: &Wanted<'_>, name: String, contract: DatabaseSetup, settings: &Settings) -> Result<Job, Rejection> {
    let owner = wanted.owner;
    let contract = contract.to_yaml().map_err(|error| Rejection {
        reason: Reason::ContractNotWritable,
        message: format!("the set-up contract of database {} cannot be written: {error}", owner.name),
    })?;
    let annotations = NATIVE_SIDECARS.map(|name| (name.to_owned(), "true".to_owned()));
    let annotations = annotations.into_iter().chain([(CONTRACT_ANNOTATION.to_owned(), contract)]);
    let defaults = defaults(settings);
    let mut labels = owner.labels(Component::Setup);
    labels.extend(client_label(wanted.placement, &owner.name));
    let (volumes, mounts) = volumes(wanted);
    let template = PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: Some(annotations.collect()),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            // in place, with the kubelet's growing pauses, and whatever injected containers do: one pod, however often it fails
            restart_policy: Some("OnFailure".to_owned()),
            containers: vec![container(mounts, &defaults, settings)],
            volumes: Some(volumes),
            ..pod_spec(names::database(&owner.name))
        }),
    };
    Ok(Job {
        metadata: ObjectMeta {
            // strings and quantities always have a form in JSON
            annotations: Some(
                [(DEFAULTS_ANNOTATION.to_owned(), serde_json::to_string(&defaults).unwrap_or_default())].into(),
            ),
            ..owner.metadata(name, Component::Setup)
        },
        spec: Some(JobSpec {
            // a Job that gives up would delete the pod, and the error with it
            backoff_limit: Some(i32::MAX),
            template,
            ..JobSpec::default()
        }),
        ..Job::default()
    })
}

pub const CONTAINER: &str = "setup";

fn container(mounts: Vec<VolumeMount>, defaults: &Defaults, settings: &Settings) -> Container {
    let config = format!("{}/{CONTRACT_FILE}", CONTRACT.1);
    Container {
        name: CONTAINER.to_owned(),
        image: Some(defaults.image.clone()),
        image_pull_policy: defaults.image_pull_policy.clone(),
        args: Some(["database", "setup", "--config", &config, "--state", STATE.1].map(str::to_owned).into()),
        resources: Some(defaults.resources.clone()),
        security_context: Some(weft_security(settings)),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts),
        ..Container::default()
    }
}

fn volumes(wanted: &Wanted<'_>) -> (Vec<Volume>, Vec<VolumeMount>) {
    let name = &wanted.owner.name;
    let mut volumes = vec![(contract_volume(), CONTRACT)];
    let users = [User::Admin, User::App, User::Relay];
    let users = users.into_iter().filter(|user| *user != User::Relay || wanted.purpose == Purpose::Service);
    for (volume, mount) in users.flat_map(|user| wanted.placement.volumes(name, user)) {
        // the first one is enough for all that come
        if !volumes.iter().any(|(_, known)| *known == mount) {
            volumes.push((volume, mount));
        }
    }
    if let Some(migrations) = wanted.migrations {
        volumes.push((config_map_volume(MIGRATIONS.0, migrations.config_map.clone()), MIGRATIONS));
    }
    let state =
        Volume { name: STATE.0.to_owned(), empty_dir: Some(EmptyDirVolumeSource::default()), ..Volume::default() };
    let mounted = VolumeMount { name: STATE.0.to_owned(), mount_path: STATE.1.to_owned(), ..VolumeMount::default() };
    let read_only = volumes.into_iter().map(|(volume, (name, path))| (volume, mount(name, path)));
    read_only.chain([(state, mounted)]).unzip()
}

/// The pod's own annotation as a file.
fn contract_volume() -> Volume {
    let field_path = format!("metadata.annotations['{CONTRACT_ANNOTATION}']");
    let file = DownwardAPIVolumeFile {
        path: CONTRACT_FILE.to_owned(),
        field_ref: Some(ObjectFieldSelector { field_path, ..ObjectFieldSelector::default() }),
        ..DownwardAPIVolumeFile::default()
    };
    let source = DownwardAPIVolumeSource { items: Some(vec![file]), ..DownwardAPIVolumeSource::default() };
    Volume { name: CONTRACT.0.to_owned(), downward_api: Some(source), ..Volume::default() }
}
