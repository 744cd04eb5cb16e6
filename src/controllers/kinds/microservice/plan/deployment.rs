//! The Deployment of a Microservice.

use std::collections::BTreeMap;

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec},
        core::v1::{Container, ContainerPort, GRPCAction, PodSpec, PodTemplateSpec, Probe, Secret, TCPSocketAction},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};
use kube::core::ObjectMeta;
use serde_json::Value;

use super::{
    OWNER_KIND,
    environment::{self, BINDING_ROOT},
    relay, scaling,
};
use crate::{
    api::v1alpha1::{Microservice, Placement, Protocol},
    controllers::{
        database::{self, client_label, placement},
        kinds::microservice::Observed,
        render::{
            overlay,
            owner::Owner,
            pod::{container_security, mount, pin, pod_spec, wants_upgrade},
            reach,
        },
        resources::{
            labels::{
                Component, DEPENDENCIES_ANNOTATION, RELAY_ANNOTATION, RELAY_PLACEMENT_ANNOTATION,
                RELAY_SECRET_ANNOTATION,
            },
            plan::Rejection,
            settings::Settings,
        },
    },
    domain::names,
};

/// Name of the service's container.
pub const CONTAINER: &str = "service";
/// Name of the volume with the database's binding, and of its folder under [`BINDING_ROOT`].
const BINDING: &str = "db";

/// `credentials`: those of the broker, for the relay.
pub fn deployment(
    object: &Microservice,
    owner: &Owner,
    observed: &Observed,
    credentials: Option<&Secret>,
    settings: &Settings,
) -> Result<Deployment, Rejection> {
    reaches_its_own_only(object, &owner.name)?;
    let addresses = environment::addresses(object, observed);
    let relay = relay::of(object, observed);
    let sidecar = relay.as_ref().filter(|relay| relay.placement == Placement::Sidecar);
    let relay_role = names::relay_secret(&owner.name);
    let binding = object.spec.database.as_ref().map(|database| placement(database).binding(&owner.name, BINDING));
    let secrets = binding.iter().map(|(secret, _)| secret.as_str());
    let secrets: Vec<_> = secrets.chain(sidecar.map(|_| relay_role.as_str())).collect();
    let replaced = database::replaced_annotation(&observed.database, &secrets);
    let newest = settings.defaults(&settings.resources.relay);
    let pinned = pin(observed.deployment.as_ref(), newest, wants_upgrade(object), |defaults| {
        let mut template = template(object, owner, &addresses);
        annotate(&mut template, replaced.clone());
        if let Some((relay, spec)) = sidecar.zip(template.spec.as_mut()) {
            spec.init_containers = Some(vec![relay::sidecar(relay, defaults, settings)]);
            spec.volumes.get_or_insert_default().extend(relay::volumes(relay, credentials));
        }
        overlay::apply(template, object.spec.pod_template.as_ref())
    })?;
    let mut annotations = pinned.annotations;
    if !addresses.is_empty() {
        // a map of strings always has a form in JSON
        let text = serde_json::to_string(&addresses).unwrap_or_default();
        annotations.insert(DEPENDENCIES_ANNOTATION.to_owned(), text);
    }
    if sidecar.is_some() {
        annotations.insert(RELAY_PLACEMENT_ANNOTATION.to_owned(), relay::SIDECAR.to_owned());
    }
    if let Some(relay) = relay {
        annotations.insert(RELAY_ANNOTATION.to_owned(), relay.name);
        annotations.extend(relay.secret.map(|secret| (RELAY_SECRET_ANNOTATION.to_owned(), secret)));
    }
    Ok(Deployment {
        metadata: ObjectMeta {
            annotations: Some(annotations),
            ..owner.metadata(owner.name.clone(), Component::Service)
        },
        spec: Some(DeploymentSpec {
            replicas: scaling::replicas(object, observed.deployment.as_ref()),
            selector: owner.pods(Component::Service),
            template: pinned.template,
            ..DeploymentSpec::default()
        }),
        status: None,
    })
}

/// Nothing in the spec may give the pods what is Weft's, or another Microservice's.
fn reaches_its_own_only(object: &Microservice, name: &str) -> Result<(), Rejection> {
    // structs of Kubernetes' own always have a form in JSON
    let json = |list: serde_json::Result<Value>| list.unwrap_or_default();
    reach::check(name, "spec.env", &json(serde_json::to_value(&object.spec.env)))?;
    reach::check(name, "spec.envFrom", &json(serde_json::to_value(&object.spec.env_from)))?;
    match object.spec.pod_template.as_ref().and_then(|overlay| overlay.get("spec")) {
        Some(spec) => reach::check(name, "spec.podTemplate.spec", spec),
        None => Ok(()),
    }
}

/// The labels of the service's pods, those of `spec.podTemplate` among them.
pub fn pod_labels(object: &Microservice) -> BTreeMap<String, String> {
    let mut labels = own_labels(object, &Owner::of(object, OWNER_KIND));
    let overlay = object.spec.pod_template.as_ref().and_then(|overlay| overlay.pointer("/metadata/labels"));
    let texts = overlay.and_then(Value::as_object).into_iter().flatten();
    labels.extend(texts.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))));
    labels
}

fn annotate(template: &mut PodTemplateSpec, annotations: Option<BTreeMap<String, String>>) {
    if let Some(metadata) = &mut template.metadata {
        metadata.annotations = annotations;
    }
}

fn own_labels(object: &Microservice, owner: &Owner) -> BTreeMap<String, String> {
    let mut labels = owner.labels(Component::Service);
    let database = object.spec.database.as_ref();
    labels.extend(database.and_then(|database| client_label(placement(database), &owner.name)));
    labels
}

fn template(object: &Microservice, owner: &Owner, addresses: &BTreeMap<String, String>) -> PodTemplateSpec {
    let labels = own_labels(object, owner);
    let binding = object.spec.database.as_ref().map(|database| placement(database).binding(&owner.name, BINDING));
    PodTemplateSpec {
        metadata: Some(ObjectMeta { labels: Some(labels), ..ObjectMeta::default() }),
        spec: Some(PodSpec {
            containers: vec![container(object, owner, addresses)],
            volumes: binding.map(|(_, volume)| vec![volume]),
            ..pod_spec(owner.name.clone())
        }),
    }
}

fn container(object: &Microservice, owner: &Owner, addresses: &BTreeMap<String, String>) -> Container {
    let spec = &object.spec;
    let probes = spec.probes.clone().unwrap_or_default();
    let some = |list: &Vec<String>| (!list.is_empty()).then(|| list.clone());
    let variables = environment::variables(object, owner, addresses);
    let ports = spec.ports.iter().map(|port| ContainerPort {
        name: Some(port.name.clone()),
        container_port: port.port,
        protocol: Some("TCP".to_owned()),
        ..ContainerPort::default()
    });
    let ports: Vec<_> = ports.collect();
    Container {
        name: CONTAINER.to_owned(),
        image: Some(spec.image.clone()),
        command: some(&spec.command),
        args: some(&spec.args),
        ports: (!ports.is_empty()).then_some(ports),
        env: (!variables.is_empty()).then_some(variables),
        env_from: (!spec.env_from.is_empty()).then(|| spec.env_from.clone()),
        resources: spec.resources.clone(),
        readiness_probe: probes.readiness.or_else(|| default_probe(object)),
        liveness_probe: probes.liveness,
        startup_probe: probes.startup,
        security_context: Some(container_security()),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: spec.database.as_ref().map(|_| vec![mount(BINDING, &format!("{BINDING_ROOT}/{BINDING}"))]),
        ..Container::default()
    }
}

/// Of the first port: gRPC's health check, or whether it opens.
fn default_probe(object: &Microservice) -> Option<Probe> {
    let port = object.spec.ports.first()?;
    let mut probe = Probe { period_seconds: Some(5), ..Probe::default() };
    match port.protocol {
        Protocol::Grpc => probe.grpc = Some(GRPCAction { port: port.port, service: None }),
        Protocol::Http | Protocol::H2c | Protocol::Tcp => {
            probe.tcp_socket = Some(TCPSocketAction { port: IntOrString::Int(port.port), host: None });
        }
    }
    Some(probe)
}
