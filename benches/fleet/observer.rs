//! When the fleet's objects become ready, as anybody sees it who watches them.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::StreamExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, ObjectMeta};
use kube::{
    Api, Client, ResourceExt,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use weft::api::v1alpha1::{Microservice, OutboxRelay};

/// One object.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    generation: i64,
    observed: i64,
    ready: bool,
}

impl Seen {
    fn new(metadata: &ObjectMeta, observed: Option<i64>, conditions: &[Condition]) -> Self {
        Self {
            generation: metadata.generation.unwrap_or_default(),
            observed: observed.unwrap_or_default(),
            ready: conditions.iter().any(|one| one.type_ == "Ready" && one.status == "True"),
        }
    }
}

type Objects = Arc<Mutex<HashMap<(String, String), Seen>>>;

/// All Microservices and OutboxRelays.
#[derive(Clone, Default)]
pub struct Observer {
    microservices: Objects,
    relays: Objects,
}

impl Observer {
    pub fn start(client: &Client) -> Self {
        let observer = Self::default();
        let services = Api::<Microservice>::all(client.clone());
        tokio::spawn(follow(services, Arc::clone(&observer.microservices), |object| {
            let status = object.status.clone().unwrap_or_default();
            Seen::new(&object.metadata, status.observed_generation, &status.conditions)
        }));
        let relays = Api::<OutboxRelay>::all(client.clone());
        tokio::spawn(follow(relays, Arc::clone(&observer.relays), |object| {
            let status = object.status.clone().unwrap_or_default();
            Seen::new(&object.metadata, status.observed_generation, &status.conditions)
        }));
        observer
    }

    pub fn ready_microservices(&self) -> usize {
        ready(&self.microservices)
    }

    pub fn ready_relays(&self) -> usize {
        ready(&self.relays)
    }

    /// Waits until the operator has answered to a generation of a Microservice.
    pub async fn answered(&self, namespace: &str, name: &str, generation: i64, deadline: Duration) {
        let (begun, id) = (Instant::now(), (namespace.to_owned(), name.to_owned()));
        while lock(&self.microservices).get(&id).is_none_or(|seen| seen.observed < generation) {
            assert!(begun.elapsed() < deadline, "no answer to generation {generation} of {name} in {deadline:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn ready(objects: &Objects) -> usize {
    lock(objects).values().filter(|seen| seen.ready && seen.observed >= seen.generation).count()
}

fn lock(objects: &Objects) -> MutexGuard<'_, HashMap<(String, String), Seen>> {
    objects.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn follow<K>(api: Api<K>, objects: Objects, see: fn(&K) -> Seen)
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + Send + serde::de::DeserializeOwned + 'static,
{
    let events = watcher(api, watcher::Config::default().page_size(500)).default_backoff();
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        let Ok(Event::Apply(object) | Event::InitApply(object)) = event else { continue };
        lock(&objects).insert((object.namespace().unwrap_or_default(), object.name_any()), see(&object));
    }
}
