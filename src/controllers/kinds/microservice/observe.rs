//! What exists of a Microservice: from the store; the migrations' content by one request when it changed; and by one more
//! the released pod template, while a new one may have to wait.

use std::{path::Path, time::Duration};

use tokio::time::Instant;

use super::{InboxWanted, Observed, Published, plan, status};
use crate::{
    api::v1alpha1::Microservice,
    contract::{Contract, database_setup::Purpose, inbox::Inbox},
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
        runtime::{Context, file_of, released},
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
    if observed.predecessor_ends {
        // its Secrets go too
        context.memory.forget(key);
    }
    if let Some(database) = object.spec.database.as_ref().map(placement) {
        let exists = database.exists(&observed.database) && !object.spec.suspend;
        let of_the_database = database.secret_names(&key.id.name, Purpose::Service);
        let accesses = [Access::Publish, Access::Consume];
        observed.database.secrets.missing =
            secrets::missing(context, key, &key.id.name, &accesses, exists, of_the_database).await;
    }
    observed.database.migrations = migrations;
    observed.database.settles_in = settles_in(context, key, object);
    let may_wait = observed.database.settles_in.is_some()
        || plan::stage(object, &observed, |stage| stage.is_some_and(|stage| stage != Stage::Done));
    if may_wait {
        observed.database.released = released(context, key, &key.id.name).await?;
    }
    observed.inbox_waits = may_wait && !object.spec.consumes.is_empty();
    observed.inbox_wanted = plan::inbox_wanted(object, &observed, &context.settings);
    let stays = observed.inbox_wanted.missing.as_ref().is_some_and(plan::stays_in_force);
    if (observed.inbox_waits || stays) && observed.inbox_deployment.is_some() {
        observed.inbox_contract = inbox_contract(context, key).await?;
        observed.inbox_wanted = plan::inbox_wanted(object, &observed, &context.settings);
    }
    Ok(observed)
}

/// The contract that the inbox has: one request. `None` as well when it is of another version.
async fn inbox_contract(context: &Context, key: &Key) -> Result<Option<Box<Inbox>>, RequestError> {
    let text = file_of(context, key, &names::inbox(&key.id.name), plan::INBOX_CONTRACT_FILE).await?;
    Ok(text.and_then(|text| Inbox::from_yaml(&text, Path::new(plan::INBOX_CONTRACT_FILE)).ok()).map(Box::new))
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
    let services = services.chain(object.spec.consumes.iter().map(|consumption| consumption.from.as_str()));
    Observed {
        predecessor_ends,
        guests: store.guests_of(&key.id),
        unreadable_guests: store.unreadable_guests(key),
        deployment: store.workload(key, ChildKind::Deployment, &key.id.name),
        inbox_deployment: store.workload(key, ChildKind::Deployment, &names::inbox(&key.id.name)),
        inbox_pods: store.inbox_pods(key),
        inbox_wanted: InboxWanted::default(),
        inbox_contract: None,
        inbox_waits: false,
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
