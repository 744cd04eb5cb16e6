//! What exists of a Microservice: from the store, and the migrations' content by one request when it changed.

use super::Observed;
use crate::{
    api::v1alpha1::Microservice,
    contract::database_setup::Purpose,
    controllers::{
        kinds::secrets,
        request::RequestError,
        resources::{
            child::ChildKind,
            key::{Key, ObjectId},
            labels::DELETED_WITH_ANNOTATION,
            observed::{DatabaseObserved, SecretsObserved},
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
    let secrets = match object.spec.database {
        Some(_) => secrets::observe(context, key, &key.id.name, Purpose::Service, object.spec.suspend).await,
        None => SecretsObserved::default(),
    };
    let store = context.store();
    let dependencies = object.spec.depends_on.iter().filter_map(|dependency| {
        let service = store.get::<Microservice>(&within(&dependency.service))?;
        Some((dependency.service.clone(), service))
    });
    let server = store.workload(key, ChildKind::StatefulSet, &names::database(&key.id.name));
    let deleted_with = server.as_ref().and_then(|server| server.annotations.get(DELETED_WITH_ANNOTATION));
    let predecessor_ends = deleted_with.is_some_and(|uid| Some(uid) != object.metadata.uid.as_ref());
    if predecessor_ends {
        // its Secrets go too
        context.memory.forget(key);
    }
    Ok(Observed {
        predecessor_ends,
        deployment: store.workload(key, ChildKind::Deployment, &key.id.name),
        database: DatabaseObserved { server, jobs: store.jobs(key), migrations, secrets },
        dependencies: dependencies.collect(),
        relays: store.relays_of(&key.id),
        kept_relay: store.kept_relay(&key.id),
        unreadable: store.unreadable(&key.id.namespace, object.spec.depends_on.iter().map(|one| one.service.as_str())),
    })
}
