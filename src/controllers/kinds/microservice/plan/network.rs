//! The Service of a Microservice, and what keeps its pods from being drained all at once.

use k8s_openapi::{
    api::{
        core::v1::{Service, ServicePort, ServiceSpec},
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::util::intstr::IntOrString,
};

use crate::{
    api::v1alpha1::{Microservice, Protocol},
    controllers::{render::owner::Owner, resources::labels::Component},
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

/// `NAME`, when there is more than one pod: with one it would only stand in a drain's way.
pub fn disruption_budget(object: &Microservice, owner: &Owner) -> Option<PodDisruptionBudget> {
    (object.spec.replicas > 1).then(|| PodDisruptionBudget {
        metadata: owner.metadata(owner.name.clone(), Component::Service),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(owner.pods(Component::Service)),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    })
}
