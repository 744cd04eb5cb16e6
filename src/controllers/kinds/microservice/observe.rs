//! What exists of a Microservice: from the store; the migrations' content by one request when it changed; and by one more
//! the released pod template, while a new one may have to wait.

use std::time::Duration;

use tokio::time::Instant;

use super::{InboxWanted, Observed, Published, plan, status};
use crate::{
    api::v1alpha1::Microservice,
    contract::database_setup::Purpose,
    controllers::{
        database::{Stage, placement},
        kinds::secrets,
        request::RequestError,
        resources::{
            child::ChildKind,
            key::{Key, ObjectId, ObjectKind},
            labels::DELETED_WITH_ANNOTATION,
            observed::Host,
        },
        runtime::{Context, released},
    },
    domain::names,
    nats::accounts::Access,
};

/// Everything that a plan and a status depend on.
pub async fn observe(context: &Context, key: &Key, object: &Microservice) -> Result<Observed, RequestError> {
    let migrations = match object.spec.database.as_ref().and_then(|database| database.migrations.as_ref()) {
        Some(wanted) => {
            let id = ObjectId::new(&key.id.namespace, &wanted.config_map);
            let version = context.store().config_map(&id);
            Some(context.config_maps.get(&context.client, id, version).await?)
        }
        None => None,
    };
    let mut observed = from_store(context, key, object);
    observed.inbox_wanted = plan::inbox_wanted(object, &observed, &context.settings);
    if observed.predecessor_ends {
        // its Secrets go too
        context.memory.forget(key);
    }
    if let Some(database) = object.spec.database.as_ref().map(placement) {
        let exists = database.exists(&observed.database) && !object.spec.suspend;
        let of_the_database = database.secret_names(&key.id.name, Purpose::Service);
        observed.database.secrets.missing =
            secrets::missing(context, key, &key.id.name, Access::Publish, exists, of_the_database).await;
    }
    observed.database.migrations = migrations;
    observed.database.settles_in = settles_in(context, key, object);
    let may_wait = observed.database.settles_in.is_some()
        || plan::stage(object, &observed, |stage| stage.is_some_and(|stage| stage != Stage::Done));
    if may_wait {
        observed.database.released = released(context, key, &key.id.name).await?;
    }
    Ok(observed)
}

fn from_store(context: &Context, key: &Key, object: &Microservice) -> Observed {
    let store = context.store();
    let dependencies = object.spec.depends_on.iter().filter_map(|dependency| {
        let service = store.get::<Microservice>(&ObjectId::new(&key.id.namespace, &dependency.service))?;
        Some((dependency.service.clone(), service))
    });
    let publishers = object.spec.consumes.iter().filter_map(|consumption| {
        let id = ObjectId::new(&key.id.namespace, &consumption.from);
        store.get::<Microservice>(&id)?;
        let published = Published { relays: store.relays_of(&id), kept_relay: store.kept_relay(&id) };
        Some((consumption.from.clone(), published))
    });
    let mut database = store.database(key, &key.id.name);
    let deleted_with = database.server.as_ref().and_then(|server| server.annotations.get(DELETED_WITH_ANNOTATION));
    let predecessor_ends = deleted_with.is_some_and(|uid| Some(uid) != object.metadata.uid.as_ref());
    if let Some(shared) = object.spec.database.as_ref().and_then(|database| database.shared_with.as_ref()) {
        let host = Key::new(ObjectKind::Microservice, &key.id.namespace, &shared.service);
        database.server = store.workload(&host, ChildKind::StatefulSet, &names::database(&shared.service));
        database.host_set_up = store.recorded_set_up(&host, &shared.service);
        database.host = match store.get::<Microservice>(&host.id) {
            Some(found) => Host::Found(found),
            None if store.is_unreadable(&host) => Host::Unreadable,
            None => Host::None,
        };
    }
    let kept_relay = store.kept_relay(&key.id);
    let services = object.spec.depends_on.iter().map(|dependency| dependency.service.as_str());
    Observed {
        predecessor_ends,
        guests: store.guests_of(&key.id),
        deployment: store.workload(key, ChildKind::Deployment, &key.id.name),
        inbox_deployment: store.workload(key, ChildKind::Deployment, &names::inbox(&key.id.name)),
        inbox_pods: store.inbox_pods(key),
        inbox_wanted: InboxWanted::default(),
        publishers: publishers.collect(),
        relay_deployment: store.workload(key, ChildKind::Deployment, &names::relay(&key.id.name)),
        database,
        isolated: store.isolates(&key.id.namespace, &plan::pod_labels(object)),
        dependencies: dependencies.collect(),
        relays: store.relays_of(&key.id),
        kept_secret: store.carried_secret(&key.id),
        kept_relay,
        unreadable: store.unreadable(&key.id.namespace, services),
    }
}

/// How long a change of the spec still waits for one of its migrations. A spec that says what it needs does not wait.
fn settles_in(context: &Context, key: &Key, object: &Microservice) -> Option<Duration> {
    let migrations = object.spec.database.as_ref()?.migrations.as_ref()?;
    if migrations.last.is_some() {
        return None;
    }
    // another operator, which does not know since when, lets it settle anew
    let settled = object.status.as_ref().filter(|status| !status::is_settling(status));
    let reported = settled.and_then(|status| status.observed_generation);
    context.settling.remaining(key, object.metadata.generation, reported, Instant::now())
}
