//! What a service finds in its environment: its database, and where the services are that it depends on.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{EnvVar, EnvVarSource, SecretKeySelector};

use crate::{
    api::v1alpha1::{Microservice, Protocol, ServicePort},
    controllers::{
        database::{BINDING_URI, Placement, placement},
        kinds::microservice::Observed,
        render::owner::Owner,
        resources::labels::DEPENDENCIES_ANNOTATION,
    },
    domain::names,
};

/// Folder of the bindings, as the Service Binding specification has it.
pub const BINDING_ROOT: &str = "/bindings";

/// The container's variables: Weft's first, so that the user's can refer to them; of the same name, the user's wins.
pub fn variables(object: &Microservice, owner: &Owner, addresses: &BTreeMap<String, String>) -> Vec<EnvVar> {
    let mut variables = Vec::new();
    if let Some(database) = &object.spec.database {
        variables.push(database_url(placement(database), owner));
        variables.push(plain("SERVICE_BINDING_ROOT", BINDING_ROOT));
    }
    variables.extend(addresses.iter().map(|(service, address)| plain(&names::url_variable(service), address)));
    variables.retain(|variable| !object.spec.env.iter().any(|own| own.name == variable.name));
    variables.extend(object.spec.env.iter().cloned());
    variables
}

fn plain(name: &str, value: &str) -> EnvVar {
    EnvVar { name: name.to_owned(), value: Some(value.to_owned()), value_from: None }
}

fn database_url(placement: &dyn Placement, owner: &Owner) -> EnvVar {
    let (name, _) = placement.binding(&owner.name, "");
    let optional = placement.uri_is_optional().then_some(true);
    let uri = SecretKeySelector { name, key: BINDING_URI.to_owned(), optional };
    let source = EnvVarSource { secret_key_ref: Some(uri), ..EnvVarSource::default() };
    EnvVar { name: "DATABASE_URL".to_owned(), value: None, value_from: Some(source) }
}

/// Where each of `spec.dependsOn` is. One that does not exist keeps the address that the live Deployment was made with,
/// so that deleting and re-making a service restarts no other; one that never existed has none yet.
pub fn addresses(object: &Microservice, observed: &Observed) -> BTreeMap<String, String> {
    let known = observed.deployment.as_ref().and_then(|live| live.annotations.get(DEPENDENCIES_ANNOTATION));
    let known: BTreeMap<String, String> = known.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default();
    let address = |service: &String| match observed.dependencies.get(service) {
        Some(other) => address(service, &other.spec.ports),
        None => known.get(service).cloned(),
    };
    let services = object.spec.depends_on.iter().map(|dependency| &dependency.service);
    services.filter_map(|service| address(service).map(|address| (service.clone(), address))).collect()
}

/// The first port with `protocol: http`, else the first port; `None` without ports.
fn address(service: &str, ports: &[ServicePort]) -> Option<String> {
    let port = ports.iter().find(|port| port.protocol == Protocol::Http).or_else(|| ports.first())?;
    let scheme = match port.protocol {
        Protocol::Http | Protocol::H2c | Protocol::Grpc => "http",
        Protocol::Tcp => "tcp",
    };
    Some(format!("{scheme}://{service}:{}", port.port))
}
