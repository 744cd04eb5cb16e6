//! `OutboxRelay`: its contract is a ConfigMap of its own; the sidecar is part of the Microservice's Deployment.

mod observe;
mod plan;
pub mod published;
mod status;

pub use plan::{CONTRACT_FILE, CONTRACT_FOLDER, nats};

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ObjectReference;
use kube::Resource;

use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, OutboxRelayStatus, SetUp},
    contract::status::RelayStatus,
    controllers::{
        request::RequestError,
        resources::{
            key::Key,
            observed::Workload,
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

/// What the plan and the status of an OutboxRelay depend on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// The Microservice that it names, if it exists.
    pub microservice: Option<Arc<Microservice>>,
    /// All OutboxRelays that name the same Microservice and are not being deleted, this one among them, oldest first
    /// (then by name). Only the first one is accepted.
    pub relays: Vec<Arc<OutboxRelay>>,
    /// An OutboxRelay that cannot be read, but whose sidecar the Microservice's pods carry: it keeps the outbox.
    pub kept_relay: Option<String>,
    /// The Microservice exists and cannot be read.
    pub unreadable: bool,
    /// The Deployment whose pods run the relay: the Microservice's, or the relay's own.
    pub deployment: Option<Workload>,
    /// The last set-up of the Microservice's database that succeeded.
    pub set_up: Option<SetUp>,
    /// Pods of the Deployment that have a relay, by name, with the newest status of each (`None` until its stream gave one,
    /// and again once its stream has been broken for a while).
    pub pods: BTreeMap<String, Option<RelayStatus>>,
}

/// What should be because of an OutboxRelay.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Planned {
    pub children: Plan,
    /// Of the contract, as the relay reports it once it works by it.
    pub contract_version: String,
}

/// Marker of the controller.
#[derive(Debug)]
pub struct Controller;

impl Kind for Controller {
    type Object = OutboxRelay;
    type Observed = Observed;
    type Planned = Planned;
    type Status = OutboxRelayStatus;

    fn plan(object: &OutboxRelay, observed: &Observed, settings: &Settings) -> Result<Planned, Rejection> {
        plan::plan(object, observed, settings)
    }

    fn status(
        object: &OutboxRelay,
        observed: &Observed,
        planned: &Result<Planned, Rejection>,
        applied: &Applied,
        now: Timestamp,
    ) -> OutboxRelayStatus {
        status::status(object, observed, planned, applied, now)
    }
}

impl Driven for Controller {
    fn find(store: &Store, key: &Key) -> Option<Arc<OutboxRelay>> {
        store.get(&key.id)
    }

    async fn observe(context: &Context, key: &Key, object: &OutboxRelay) -> Result<Observed, RequestError> {
        context.want_account(key);
        Ok(observe::observe(&context.store(), &key.id, object))
    }

    /// A new leader concludes nothing from the silence of pods that may still report.
    fn hold(context: &Context, object: &OutboxRelay, observed: &Observed) -> Option<Verdict> {
        let silent = object.status.is_some() && observed.pods.values().any(Option::is_none);
        context.still_listening().filter(|_| silent).map(Verdict::At)
    }

    fn is_being_deleted(object: &OutboxRelay) -> bool {
        object.metadata.deletion_timestamp.is_some()
    }

    fn children(planned: &Planned) -> &Plan {
        &planned.children
    }

    fn event_targets(object: &OutboxRelay) -> Vec<ObjectReference> {
        vec![object.object_ref(&())]
    }

    fn is_recorded(object: &OutboxRelay, digest: &str) -> bool {
        object.status.as_ref().and_then(|status| status.applied_hash.as_deref()) == Some(digest)
    }

    async fn report(
        context: &Context,
        key: &Key,
        object: &OutboxRelay,
        status: OutboxRelayStatus,
    ) -> Result<(), RequestError> {
        report::write(context, key, object, status).await
    }

    async fn report_malformed(context: &Context, key: &Key, malformed: &Malformed) -> Result<(), RequestError> {
        report::write_malformed::<OutboxRelay>(context, key, malformed).await
    }
}
