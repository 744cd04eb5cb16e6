//! The orchestrator that the Sagas of a namespace share: a Deployment, its Service and contract, and a database.
//!
//! Of a Saga that is rejected, or cannot be read, the contract keeps the definition that it has, so new instances start with
//! the last good one; a Saga that was never good is left out. The engine keeps the definition of each running instance in its
//! database.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentStrategy},
        core::v1::{
            ConfigMap, Container, ContainerPort, EnvVar, EnvVarSource, HTTPGetAction, PodSpec, PodTemplateSpec, Probe,
            ResourceFieldSelector, Secret, Service, ServicePort, ServiceSpec, VolumeMount,
        },
        networking::v1::NetworkPolicy,
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::{ResourceExt, core::ObjectMeta};

use crate::{
    api::v1alpha1::{self as api, Postgres, Retention},
    contract::{ADMIN_PORT, Contract, database_setup::Purpose, orchestrator as contract, relay::NatsSink},
    controllers::{
        database::{self, Placement, Stage, User, Wanted},
        kinds::{
            outbox_relay,
            saga::{Defined, Member, Orchestrator, OrchestratorObserved, drain::is_draining},
        },
        render::{
            broker, milliseconds, network,
            owner::{Owner, reference},
            pod::{config_map_volume, mount, pin, pod_spec, service_account, single, wants_upgrade, weft_security},
            sink,
        },
        resources::{
            child::Child,
            labels::{Component, SAGAS_ANNOTATION},
            observed::DatabaseObserved,
            plan::{Plan, Rejection},
            reason::Reason,
            settings::{Defaults, Settings},
        },
    },
    domain::names::{self, MAX_NAME, ORCHESTRATOR_API_PORT},
    nats::accounts::Access,
};

/// Value of `weft.dev/owner-kind` on the children of an orchestrator.
pub const OWNER_KIND: &str = "Orchestrator";

const CONTRACT: (&str, &str) = ("weft-saga", "/etc/weft/saga");
pub const CONTRACT_FILE: &str = "orchestrator.yaml";
const CONTAINER: &str = "orchestrator";
const API_PORT_NAME: &str = "http";
const ADMIN_PORT_NAME: &str = "weft-admin";

/// Nothing is made before the first Saga is accepted; what exists then stays as long as there are Sagas.
pub fn orchestrator(
    object: &Orchestrator,
    observed: &OrchestratorObserved,
    settings: &Settings,
) -> Result<Plan, Rejection> {
    if object.name.len() > MAX_NAME {
        return Err(Rejection {
            reason: Reason::NameTooLong,
            message: format!(
                "spec.orchestrator: `{}` has {} characters: use at most {MAX_NAME}",
                object.name,
                object.name.len()
            ),
        });
    }
    let exists = observed.deployment.is_some() || observed.database.server.is_some();
    if !exists && object.unreadable.is_empty() && !object.members.iter().any(is_startable) {
        return Ok(Plan::default());
    }
    let storage = database::storage(observed.database.server.as_ref());
    let storage = storage.unwrap_or_else(|| settings.orchestrator_storage.clone());
    let (owner, postgres) = (owner(object), Postgres { storage, ..Postgres::default() });
    let wanted = Wanted { upgrade: upgrade(object), ..wanted(&owner, &postgres) };
    let credentials = credentials(&owner, settings);
    let contract = contract(object, &owner, &postgres, observed, settings);
    let secrets = (credentials.as_ref(), &secrets(&contract));
    let deployment = deployment(object, (&owner, &postgres), observed, secrets, settings)?;
    let account = owner.metadata(owner.name.clone(), Component::Orchestrator);
    let mut plan =
        Plan { children: vec![Child::ServiceAccount(service_account(account, settings))], ..Plan::default() };
    plan.children.push(Child::ConfigMap(config_map(&owner, &contract)?));
    plan.children.extend(credentials.map(Child::Secret));
    plan.children.push(Child::NetworkPolicy(network_policy(&owner, settings)));
    plan.children.push(Child::Service(service(&owner)));
    let Plan { children, retained, recheck_in } = database::plan(&wanted, &observed.database, deployment, settings)?;
    plan.children.extend(children);
    plan.retained.extend(retained);
    Ok(Plan { recheck_in, ..plan })
}

fn is_startable(member: &Member) -> bool {
    member.defined.is_some() && !is_draining(&member.saga)
}

/// How far the set-up of the database of orchestrator `name` has come.
pub fn stage<R>(
    namespace: &str,
    name: &str,
    observed: &OrchestratorObserved,
    use_stage: impl FnOnce(Stage<'_>) -> R,
) -> R {
    let owner = Owner::shared(OWNER_KIND, names::orchestrator(name), namespace.to_owned(), Vec::new());
    use_stage(database::stage(&wanted(&owner, &store(&observed.database)), &observed.database))
}

/// The database of an orchestrator, as it is; its volume is that which it has.
pub fn store(observed: &DatabaseObserved) -> Postgres {
    let storage = database::storage(observed.server.as_ref()).unwrap_or_default();
    Postgres { storage, ..Postgres::default() }
}

/// The URL of the orchestrator's API inside the cluster.
pub fn api_url(namespace: &str, orchestrator: &str) -> String {
    format!("http://{}.{namespace}.svc:{ORCHESTRATOR_API_PORT}", names::orchestrator(orchestrator))
}

fn owner(object: &Orchestrator) -> Owner {
    let members = object.members.iter().map(|member| reference(member.saga.as_ref()));
    let references = members.chain(object.unreadable.iter().cloned()).collect();
    Owner::shared(OWNER_KIND, names::orchestrator(&object.name), object.namespace.clone(), references)
}

fn upgrade(object: &Orchestrator) -> bool {
    object.members.iter().any(|member| wants_upgrade(member.saga.as_ref()))
}

fn wanted<'a>(owner: &'a Owner, placement: &'a dyn Placement) -> Wanted<'a> {
    Wanted {
        owner,
        placement,
        retention: Retention::Retain,
        guests: Vec::new(),
        purpose: Purpose::Orchestrator,
        duplicate_window: None,
        migrations: None,
        outbox: None,
        log_tailing: false,
        has_relay: false,
        upgrade: false,
    }
}

fn contract(
    object: &Orchestrator,
    owner: &Owner,
    placement: &dyn Placement,
    observed: &OrchestratorObserved,
    settings: &Settings,
) -> contract::Orchestrator {
    let defined = || object.members.iter().filter_map(|member| member.defined.as_ref());
    let mut sagas: Vec<_> = defined().filter_map(Defined::definition).cloned().collect();
    let mut starts: Vec<_> = defined().filter_map(|defined| start(defined, settings)).collect();
    // a Saga that is being deleted is not followed any more: its services go on without it
    let followed = object.members.iter().filter(|member| !is_draining(&member.saga));
    let followed = followed.filter_map(|member| member.defined.as_ref());
    let mut choreographies: Vec<_> = followed.filter_map(|defined| choreography(defined, settings)).collect();
    if let Some(earlier) = &observed.contract {
        let kept = |name: &String| object.kept.contains(name);
        sagas.extend(earlier.sagas.iter().filter(|saga| kept(&saga.name)).cloned());
        starts.extend(earlier.starts.iter().filter(|start| kept(&start.saga)).cloned());
        choreographies.extend(earlier.choreographies.iter().filter(|saga| kept(&saga.definition.name)).cloned());
        choreographies.sort_by(|a, b| a.definition.name.cmp(&b.definition.name));
        sagas.sort_by(|a, b| a.name.cmp(&b.name));
        starts.sort_by(|a, b| a.saga.cmp(&b.saga));
    }
    let draining =
        object.members.iter().filter(|member| is_draining(&member.saga)).map(|member| member.saga.name_any());
    // an unreadable one that was being deleted still is
    let earlier = observed.contract.iter().flat_map(|earlier| &earlier.draining);
    let still = earlier.filter(|name| object.unreadable.iter().any(|owner| owner.name == **name)).cloned();
    let draining: BTreeSet<_> = draining.chain(still).collect();
    contract::Orchestrator {
        name: object.name.clone(),
        namespace: object.namespace.clone(),
        api_port: ORCHESTRATOR_API_PORT,
        database: placement.access(&owner.name, &owner.namespace).app,
        retention_ms: retention_ms(object, observed),
        sagas,
        draining: draining.into_iter().collect(),
        starts,
        choreographies,
    }
}

/// The longest of the Sagas, since they share one store. That of one that cannot be read is in the contract that is there.
fn retention_ms(object: &Orchestrator, observed: &OrchestratorObserved) -> u64 {
    let readable = object.members.iter().map(|member| milliseconds(member.saga.spec.retention));
    let earlier = observed.contract.as_ref().filter(|_| !object.unreadable.is_empty());
    let earlier = earlier.map(|earlier| earlier.retention_ms);
    readable.chain(earlier).max().unwrap_or_else(|| milliseconds(api::default_retention()))
}

/// `None` as well when there is no broker: then the Saga is rejected by its own controller.
fn start(defined: &Defined, settings: &Settings) -> Option<contract::Start> {
    let Defined::Orchestrated { definition, start: Some(start) } = defined else { return None };
    Some(contract::Start {
        saga: definition.name.clone(),
        service: start.service.clone(),
        event_type: start.event_type.clone(),
        since: start.since,
        from: stream(&start.sink, settings)?,
    })
}

/// `None` as well when there is no broker, as of a start.
fn choreography(defined: &Defined, settings: &Settings) -> Option<contract::Choreography> {
    let Defined::Choreographed(followed) = defined else { return None };
    let source = |(service, sink): (&String, &api::NatsSink)| {
        Some(contract::Source { service: service.clone(), from: stream(sink, settings)? })
    };
    Some(contract::Choreography {
        definition: followed.definition.clone(),
        since: followed.since,
        sources: followed.sinks.iter().map(source).collect::<Option<_>>()?,
    })
}

fn stream(sink: &api::NatsSink, settings: &Settings) -> Option<NatsSink> {
    // the orchestrator's account permits the driver's own
    Some(NatsSink { inbox_prefix: None, ..outbox_relay::nats(sink, settings).ok()? })
}

fn config_map(owner: &Owner, contract: &contract::Orchestrator) -> Result<ConfigMap, Rejection> {
    let text = contract.to_yaml().map_err(|error| Rejection {
        reason: Reason::ContractNotWritable,
        message: format!("the contract of orchestrator {} cannot be written: {error}", contract.name),
    })?;
    let choreographed = contract.choreographies.iter().map(|saga| &saga.definition.name);
    let names: BTreeSet<_> = contract.sagas.iter().map(|saga| &saga.name).chain(choreographed).collect();
    // a list of strings always has a form in JSON
    let names = serde_json::to_string(&names).unwrap_or_default();
    Ok(ConfigMap {
        metadata: ObjectMeta {
            annotations: Some([(SAGAS_ANNOTATION.to_owned(), names)].into()),
            ..owner.metadata(owner.name.clone(), Component::Orchestrator)
        },
        data: Some([(CONTRACT_FILE.to_owned(), text)].into()),
        ..ConfigMap::default()
    })
}

/// It stays, as those of the database do: of the Sagas that own an orchestrator together, others may be there when it is made.
fn credentials(owner: &Owner, settings: &Settings) -> Option<Secret> {
    broker::secret(owner, Access::Consume, settings, |name| owner.lasting_metadata(name, Component::Orchestrator))
}

/// The API is for the namespace's pods and the operator, the admin port for the operator and who reads metrics.
fn network_policy(owner: &Owner, settings: &Settings) -> NetworkPolicy {
    let rules = vec![
        network::admit(ORCHESTRATOR_API_PORT, vec![network::pods(BTreeMap::new()), network::operator(settings)]),
        network::admit(ADMIN_PORT, network::observers(settings)),
        network::admit_probes(),
    ];
    let metadata = owner.metadata(owner.name.clone(), Component::Orchestrator);
    network::policy(metadata, owner.pods(Component::Orchestrator), rules)
}

fn service(owner: &Owner) -> Service {
    Service {
        metadata: owner.metadata(owner.name.clone(), Component::Orchestrator),
        spec: Some(ServiceSpec {
            selector: Some(owner.selector(Component::Orchestrator)),
            ports: Some(vec![ServicePort {
                name: Some(API_PORT_NAME.to_owned()),
                port: ORCHESTRATOR_API_PORT.into(),
                target_port: Some(IntOrString::String(API_PORT_NAME.to_owned())),
                protocol: Some("TCP".to_owned()),
                app_protocol: Some("http".to_owned()),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn deployment(
    object: &Orchestrator,
    (owner, placement): (&Owner, &dyn Placement),
    observed: &OrchestratorObserved,
    secrets: (Option<&Secret>, &BTreeSet<String>),
    settings: &Settings,
) -> Result<Deployment, Rejection> {
    let live = observed.deployment.as_ref();
    let newest = settings.defaults(&settings.resources.orchestrator);
    let template = |defaults: &Defaults| Ok(template((owner, placement), defaults, observed, secrets, settings));
    let pinned = pin(live, newest, upgrade(object), template)?;
    let metadata = owner.metadata(owner.name.clone(), Component::Orchestrator);
    let mut deployment = single(metadata, owner.pods(Component::Orchestrator), pinned);
    // one writer: leases would keep two apart, but a second one would only wait for the first
    deployment.spec.get_or_insert_default().strategy =
        Some(DeploymentStrategy { type_: Some("Recreate".to_owned()), rolling_update: None });
    Ok(deployment)
}

/// The Secrets that people give for the brokers of the services that start sagas, by name.
fn secrets(contract: &contract::Orchestrator) -> BTreeSet<String> {
    let sources = contract.choreographies.iter().flat_map(|saga| &saga.sources).map(|source| &source.from);
    let read = contract.starts.iter().map(|start| &start.from).chain(sources);
    sink::secrets(read.filter_map(|from| from.secret_folder.as_deref()))
}

/// `credentials`: those of the installed broker, and the Secrets of others.
fn template(
    (owner, placement): (&Owner, &dyn Placement),
    defaults: &Defaults,
    observed: &OrchestratorObserved,
    (credentials, secrets): (Option<&Secret>, &BTreeSet<String>),
    settings: &Settings,
) -> PodTemplateSpec {
    let of_brokers =
        credentials.map(broker::volume).into_iter().chain(secrets.iter().map(|secret| sink::volume(secret)));
    let (login, mounts): (Vec<_>, Vec<_>) = placement
        .volumes(&owner.name, User::App)
        .into_iter()
        .map(|(volume, (name, path))| (volume, mount(name, path)))
        .unzip();
    let contract = config_map_volume(CONTRACT.0, owner.name.clone());
    let mut labels = owner.labels(Component::Orchestrator);
    labels.extend(database::client_label(placement, &owner.name));
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: database::replaced_annotation(&observed.database, &[&names::database(&owner.name)]),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            containers: vec![container(defaults, mounts, secrets, settings)],
            volumes: Some(std::iter::once(contract).chain(login).chain(of_brokers).collect()),
            ..pod_spec(owner.name.clone())
        }),
    }
}

fn container(
    defaults: &Defaults,
    login: Vec<VolumeMount>,
    secrets: &BTreeSet<String>,
    settings: &Settings,
) -> Container {
    let config = format!("{}/{CONTRACT_FILE}", CONTRACT.1);
    let mounts = std::iter::once(mount(CONTRACT.0, CONTRACT.1)).chain(login);
    let of_brokers = secrets.iter().map(|secret| sink::volume_mount(secret));
    let port = |name: &str, port: u16| ContainerPort {
        name: Some(name.to_owned()),
        container_port: port.into(),
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    };
    Container {
        name: CONTAINER.to_owned(),
        image: Some(defaults.image.clone()),
        image_pull_policy: defaults.image_pull_policy.clone(),
        args: Some(["saga", "run", "--config", &config].map(str::to_owned).into()),
        env: Some(vec![memory_limit()]),
        ports: Some(vec![port(API_PORT_NAME, ORCHESTRATOR_API_PORT), port(ADMIN_PORT_NAME, ADMIN_PORT)]),
        liveness_probe: Some(probe("/livez", 10, 6)),
        readiness_probe: Some(probe("/readyz", 5, 3)),
        resources: Some(defaults.resources.clone()),
        security_context: Some(weft_security(settings)),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts.chain(broker::volume_mount(settings)).chain(of_brokers).collect()),
        ..Container::default()
    }
}

/// The container's limit, of which running instances get a half; of the node where there is none.
fn memory_limit() -> EnvVar {
    let limit = ResourceFieldSelector { resource: "limits.memory".to_owned(), ..ResourceFieldSelector::default() };
    let source = EnvVarSource { resource_field_ref: Some(limit), ..EnvVarSource::default() };
    EnvVar { name: contract::MEMORY_LIMIT.to_owned(), value_from: Some(source), ..EnvVar::default() }
}

fn probe(path: &str, period_seconds: i32, failures: i32) -> Probe {
    let get = HTTPGetAction {
        path: Some(path.to_owned()),
        port: IntOrString::String(ADMIN_PORT_NAME.to_owned()),
        ..HTTPGetAction::default()
    };
    Probe {
        http_get: Some(get),
        period_seconds: Some(period_seconds),
        failure_threshold: Some(failures),
        ..Probe::default()
    }
}
