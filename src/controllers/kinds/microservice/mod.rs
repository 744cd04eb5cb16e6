//! `Microservice`: a service with its own database.

mod observe;
mod plan;
mod status;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use jiff::Timestamp;
use k8s_openapi::{api::core::v1::ObjectReference, apimachinery::pkg::apis::meta::v1::OwnerReference};
use kube::{Resource, ResourceExt};

use crate::{
    api::v1alpha1::{Microservice, MicroserviceStatus, OutboxRelay},
    contract::{inbox::Inbox, status::InboxStatus},
    controllers::{
        request::RequestError,
        resources::{
            key::Key,
            observed::{DatabaseObserved, Workload},
            outcome::Applied,
            plan::{Plan, Rejection},
            settings::Settings,
        },
        runtime::{
            Context, Verdict,
            driver::{Driven, Kind},
            report,
        },
        store::{Malformed, Store},
    },
};

/// What the plan and the status of a Microservice depend on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// The Deployment `NAME`.
    pub deployment: Option<Workload>,
    pub database: DatabaseObserved,
    /// Those of `spec.dependsOn` that exist, by name: their ports give the addresses.
    pub dependencies: BTreeMap<String, Arc<Microservice>>,
    /// A NetworkPolicy of somebody else lets in what it names, and nothing else: as in a namespace that denies by default.
    pub isolated: bool,
    /// The Microservices whose databases are in this one's, by name.
    pub guests: Vec<Arc<Microservice>>,
    /// Those of them that cannot be read, as owners of the server.
    pub unreadable_guests: Vec<OwnerReference>,
    /// The OutboxRelays that name this Microservice and are not being deleted, oldest first (then by name): the first one
    /// has the outbox, the others are rejected by their own controller.
    pub relays: Vec<Arc<OutboxRelay>>,
    /// The OutboxRelay whose sidecar the Deployment carries, when that cannot be read: it keeps the outbox.
    pub kept_relay: Option<String>,
    /// The Deployment of a relay that runs in a pod of its own.
    pub relay_deployment: Option<Workload>,
    /// The Deployment of the inbox.
    pub inbox_deployment: Option<Workload>,
    /// The contract that the inbox has; read only where some of it is to stay.
    pub inbox_contract: Option<Box<Inbox>>,
    /// A new contract waits, as a new pod template does.
    pub inbox_waits: bool,
    /// What the inbox's pods report; `None` of one that is silent.
    pub inbox_pods: BTreeMap<String, Option<InboxStatus>>,
    /// The version of the contract that the inbox is to have, and what keeps events of `spec.consumes` from it.
    pub inbox_wanted: InboxWanted,
    /// Those of `spec.consumes` that exist, by name.
    pub publishers: BTreeMap<String, Published>,
    /// The Secret that the relay mounts for its broker.
    pub kept_secret: Option<String>,
    /// The database of a deleted Microservice of this name goes with it, and is not gone yet.
    pub predecessor_ends: bool,
    /// Those of `spec.dependsOn` and `spec.consumes` that exist and cannot be read.
    pub unreadable: BTreeSet<String>,
}

impl Observed {
    /// The names of all Microservices whose databases are in this one's.
    pub fn guests(&self) -> Vec<String> {
        let unreadable = self.unreadable_guests.iter().map(|guest| guest.name.clone());
        let mut guests: Vec<_> = self.guests.iter().map(|guest| guest.name_any()).chain(unreadable).collect();
        guests.sort();
        guests
    }
}

/// Who publishes the events of a Microservice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Published {
    /// Oldest first: the first one publishes.
    pub relays: Vec<Arc<OutboxRelay>>,
    /// The OutboxRelay that publishes, when it cannot be read.
    pub kept_relay: Option<String>,
}

/// What an inbox is to do, of which a plan says nothing to the status.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InboxWanted {
    pub version: Option<String>,
    /// Of the first entry of `spec.consumes` that cannot be consumed yet.
    pub missing: Option<Rejection>,
}

/// Marker of the controller.
#[derive(Debug)]
pub struct Controller;

impl Kind for Controller {
    type Object = Microservice;
    type Observed = Observed;
    type Planned = Plan;
    type Status = MicroserviceStatus;

    fn plan(object: &Microservice, observed: &Observed, settings: &Settings) -> Result<Plan, Rejection> {
        plan::plan(object, observed, settings)
    }

    fn status(
        object: &Microservice,
        observed: &Observed,
        planned: &Result<Plan, Rejection>,
        applied: &Applied,
        now: Timestamp,
    ) -> MicroserviceStatus {
        status::status(object, observed, planned, applied, now)
    }
}

impl Driven for Controller {
    fn find(store: &Store, key: &Key) -> Option<Arc<Microservice>> {
        store.get(&key.id)
    }

    async fn observe(context: &Context, key: &Key, object: &Microservice) -> Result<Observed, RequestError> {
        observe::observe(context, key, object).await
    }

    /// A new leader concludes nothing from the silence of an inbox that may still report.
    fn hold(context: &Context, object: &Microservice, observed: &Observed) -> Option<Verdict> {
        let silent = object.status.is_some() && observed.inbox_pods.values().any(Option::is_none);
        context.still_listening().filter(|_| silent).map(Verdict::At)
    }

    fn is_being_deleted(object: &Microservice) -> bool {
        object.metadata.deletion_timestamp.is_some()
    }

    fn is_suspended(object: &Microservice) -> bool {
        object.spec.suspend
    }

    fn children(planned: &Plan) -> &Plan {
        planned
    }

    fn event_targets(object: &Microservice) -> Vec<ObjectReference> {
        vec![object.object_ref(&())]
    }

    fn is_recorded(object: &Microservice, digest: &str) -> bool {
        object.status.as_ref().and_then(|status| status.applied_hash.as_deref()) == Some(digest)
    }

    async fn report(
        context: &Context,
        key: &Key,
        object: &Microservice,
        status: MicroserviceStatus,
    ) -> Result<(), RequestError> {
        report::write(context, key, object, status).await
    }

    async fn report_malformed(context: &Context, key: &Key, malformed: &Malformed) -> Result<(), RequestError> {
        report::write_malformed::<Microservice>(context, key, malformed).await
    }
}
