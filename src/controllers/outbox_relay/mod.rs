//! `OutboxRelay`: its contract is a ConfigMap of its own; the sidecar is part of the Microservice's Deployment.

pub(crate) mod observe;
mod plan;
mod status;

pub use plan::{CONTRACT_FILE, CONTRACT_FOLDER, sink};

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;

use super::{
    kind::{Applied, Kind, Settings},
    observed::Workload,
    plan::{Plan, Rejection},
};
use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, OutboxRelayStatus},
    contract::status::RelayStatus,
};

/// What the plan and the status of an OutboxRelay depend on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// The Microservice that it names, if it exists.
    pub microservice: Option<Arc<Microservice>>,
    /// All OutboxRelays that name the same Microservice and are not being deleted, this one among them, oldest first
    /// (then by name). Only the first one is accepted.
    pub relays: Vec<Arc<OutboxRelay>>,
    /// The Microservice's Deployment.
    pub deployment: Option<Workload>,
    /// Pods of the Deployment that have a relay, by name, with the newest status of each (`None` until its stream gave one,
    /// and again once its stream has been broken for a while).
    pub pods: BTreeMap<String, Option<RelayStatus>>,
}

/// Marker of the controller.
#[derive(Debug)]
pub struct Controller;

impl Kind for Controller {
    type Object = OutboxRelay;
    type Observed = Observed;
    type Planned = Plan;
    type Status = OutboxRelayStatus;

    fn plan(object: &OutboxRelay, observed: &Observed, settings: &Settings) -> Result<Plan, Rejection> {
        plan::plan(object, observed, settings)
    }

    fn status(
        object: &OutboxRelay,
        observed: &Observed,
        planned: &Result<Plan, Rejection>,
        applied: &Applied,
        now: Timestamp,
    ) -> OutboxRelayStatus {
        status::status(object, observed, planned, applied, now)
    }
}
