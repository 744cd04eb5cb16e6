//! What exists of a Microservice: from the store, and the migrations' content by one request when it changed.

use super::Observed;
use crate::{
    api::v1alpha1::Microservice,
    controllers::{
        request::RequestError,
        resources::{
            child::ChildKind,
            key::{Key, ObjectId},
            observed::DatabaseObserved,
        },
        runtime::Context,
    },
    domain::names,
};

/// Everything that a plan and a status depend on.
pub async fn observe(context: &Context, key: &Key, object: &Microservice) -> Result<Observed, RequestError> {
    let within = |name: &str| ObjectId::new(&key.id.namespace, name);
    let migrations = match object.spec.database.as_ref().and_then(|database| database.migrations.as_ref()) {
        Some(wanted) => {
            let id = within(&wanted.config_map);
            let version = context.store().config_map(&id);
            Some(context.config_maps.get(&context.client, id, version).await?)
        }
        None => None,
    };
    let store = context.store();
    let dependencies = object.spec.depends_on.iter().filter_map(|dependency| {
        let service = store.get::<Microservice>(&within(&dependency.service))?;
        Some((dependency.service.clone(), service))
    });
    Ok(Observed {
        deployment: store.workload(key, ChildKind::Deployment, &key.id.name),
        database: DatabaseObserved {
            server: store.workload(key, ChildKind::StatefulSet, &names::database(&key.id.name)),
            jobs: store.jobs(key),
            migrations,
        },
        dependencies: dependencies.collect(),
        relays: store.relays_of(&key.id),
        kept_relay: store.kept_relay(&key.id),
        unreadable: store.unreadable(&key.id.namespace, object.spec.depends_on.iter().map(|one| one.service.as_str())),
    })
}
