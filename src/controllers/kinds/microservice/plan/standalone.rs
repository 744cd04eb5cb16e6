//! The relay in a pod of its own: `NAME-relay`.
//!
//! One pod: when it is replaced, the new one waits for the old one's lock and leads at once. What is missing in between waits in
//! the outbox.

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{PodSpec, PodTemplateSpec, Secret},
};
use kube::core::ObjectMeta;

use super::relay::{self, Carried};
use crate::{
    api::v1alpha1::Microservice,
    contract::ADMIN_PORT,
    controllers::{
        database,
        kinds::microservice::Observed,
        render::{
            network,
            owner::Owner,
            pod::{pin, pod_spec, service_account, single, wants_upgrade},
        },
        resources::{
            child::Child,
            labels::Component,
            plan::Rejection,
            settings::{Defaults, Settings},
        },
    },
    domain::names,
};

/// `credentials`: those of the broker.
pub fn children(
    object: &Microservice,
    owner: &Owner,
    observed: &Observed,
    (carried, credentials): (&Carried, Option<&Secret>),
    settings: &Settings,
) -> Result<Vec<Child>, Rejection> {
    let metadata = || owner.metadata(names::relay(&owner.name), Component::Relay);
    let rules = vec![network::admit(ADMIN_PORT, network::observers(settings)), network::admit_probes()];
    let policy = network::policy(metadata(), owner.pods(Component::Relay), rules);
    Ok(vec![
        Child::ServiceAccount(service_account(metadata(), settings)),
        Child::NetworkPolicy(policy),
        Child::Deployment(deployment(object, owner, observed, (carried, credentials), settings)?),
    ])
}

fn deployment(
    object: &Microservice,
    owner: &Owner,
    observed: &Observed,
    (carried, credentials): (&Carried, Option<&Secret>),
    settings: &Settings,
) -> Result<Deployment, Rejection> {
    let newest = settings.defaults(&settings.resources.relay);
    let pinned = pin(observed.relay_deployment.as_ref(), newest, wants_upgrade(object), |defaults| {
        Ok(template(object, owner, observed, (carried, credentials), defaults, settings))
    })?;
    let metadata = owner.metadata(names::relay(&owner.name), Component::Relay);
    Ok(single(metadata, owner.pods(Component::Relay), pinned))
}

fn template(
    object: &Microservice,
    owner: &Owner,
    observed: &Observed,
    (carried, credentials): (&Carried, Option<&Secret>),
    defaults: &Defaults,
    settings: &Settings,
) -> PodTemplateSpec {
    let mut labels = owner.labels(Component::Relay);
    let database = object.spec.database.as_ref();
    labels.extend(database.and_then(|database| database::client_label(database::placement(database), &owner.name)));
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: database::replaced_annotation(&observed.database, &[&names::relay_secret(&owner.name)]),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            containers: vec![relay::container(carried, defaults, settings)],
            volumes: Some(relay::volumes(carried, credentials)),
            ..pod_spec(names::relay(&owner.name))
        }),
    }
}
