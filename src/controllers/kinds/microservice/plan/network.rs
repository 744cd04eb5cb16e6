//! The Service of a Microservice, and who may connect to its pods.

use k8s_openapi::{
    api::{
        core::v1::{Service, ServicePort, ServiceSpec},
        networking::v1::{NetworkPolicy, NetworkPolicyPeer},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use super::relay;
use crate::{
    api::v1alpha1::{Microservice, Protocol},
    contract::ADMIN_PORT,
    controllers::{
        kinds::microservice::Observed,
        render::{
            network::{admit, admit_all_but, admit_probes, observers, pods, policy as admitting},
            owner::Owner,
        },
        resources::{
            key::ObjectKind,
            labels::{COMPONENT_LABEL, Component, OWNER_KIND_LABEL},
            settings::Settings,
        },
    },
};

/// `NAME`, when there are ports.
pub fn service(object: &Microservice, owner: &Owner) -> Option<Service> {
    let ports = object.spec.ports.iter().map(|port| ServicePort {
        name: Some(port.name.clone()),
        port: port.port,
        target_port: Some(IntOrString::String(port.name.clone())),
        protocol: Some("TCP".to_owned()),
        app_protocol: app_protocol(port.protocol).map(str::to_owned),
        ..ServicePort::default()
    });
    let ports: Vec<_> = ports.collect();
    (!ports.is_empty()).then(|| Service {
        metadata: owner.metadata(owner.name.clone(), Component::Service),
        spec: Some(ServiceSpec {
            selector: Some(owner.selector(Component::Service)),
            ports: Some(ports),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    })
}

/// `http` is IANA's name; `kubernetes.io/h2c` is Kubernetes' name for HTTP/2 in clear text (KEP-3726), which gRPC without TLS is.
fn app_protocol(protocol: Protocol) -> Option<&'static str> {
    match protocol {
        Protocol::Http => Some("http"),
        Protocol::H2c | Protocol::Grpc => Some("kubernetes.io/h2c"),
        Protocol::Tcp => None,
    }
}

/// `NAME`: the operator reaches the relay, orchestrators of the namespace the commands, and the inbox the paths of events, also where the namespace denies by
/// default. Where nobody else's policy isolates the pods, everything but the relay's port stays as open as it is.
pub fn policy(object: &Microservice, observed: &Observed, owner: &Owner, settings: &Settings) -> Option<NetworkPolicy> {
    let mut rules = Vec::new();
    if relay::is_sidecar(object, observed) {
        rules.push(admit(ADMIN_PORT, observers(settings)));
        if !observed.isolated {
            rules.push(admit_all_but(ADMIN_PORT));
        }
    }
    let callers = callers(object, owner);
    if observed.isolated && !callers.is_empty() {
        let http = object.spec.ports.iter().find(|port| port.protocol == Protocol::Http);
        let port = http.and_then(|port| u16::try_from(port.port).ok());
        rules.extend(port.map(|port| admit(port, callers)));
    }
    if rules.is_empty() {
        return None;
    }
    rules.push(admit_probes());
    let metadata = owner.metadata(owner.name.clone(), Component::Service);
    Some(admitting(metadata, owner.pods(Component::Service), rules))
}

/// Pods of Weft's that send requests to the service.
fn callers(object: &Microservice, owner: &Owner) -> Vec<NetworkPolicyPeer> {
    let delivers = object.spec.consumes.iter().any(|consumption| consumption.http.is_some());
    let inbox = delivers.then(|| pods(owner.selector(Component::Inbox)));
    (!object.spec.commands.is_empty()).then(orchestrators).into_iter().chain(inbox).collect()
}

fn orchestrators() -> NetworkPolicyPeer {
    let labels =
        [(OWNER_KIND_LABEL, ObjectKind::Orchestrator.as_str()), (COMPONENT_LABEL, Component::Orchestrator.as_str())];
    pods(labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into())
}
