//! `Microservice`: a service with its own database.

pub(crate) mod observe;
mod plan;
mod status;

use std::{collections::BTreeMap, sync::Arc};

use jiff::Timestamp;

use super::{
    kind::{Applied, Kind, Settings},
    observed::{DatabaseObserved, Workload},
    plan::{Plan, Rejection},
};
use crate::api::v1alpha1::{Microservice, MicroserviceStatus, OutboxRelay};

/// What the plan and the status of a Microservice depend on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// The Deployment `NAME`.
    pub deployment: Option<Workload>,
    pub database: DatabaseObserved,
    /// Those of `spec.dependsOn` that exist, by name: their ports give the addresses.
    pub dependencies: BTreeMap<String, Arc<Microservice>>,
    /// The OutboxRelays that name this Microservice and are not being deleted, oldest first (then by name): the first one
    /// has the outbox, the others are rejected by their own controller.
    pub relays: Vec<Arc<OutboxRelay>>,
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
