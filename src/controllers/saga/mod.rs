//! `Saga` gives a definition; the Sagas of a namespace that name the same orchestrator make one orchestrator together.
//!
//! Two controllers, so that the children that several Sagas own are planned in one place: `Controller` (a Saga: no children,
//! a definition or a rejection, and the status) and `OrchestratorController` (children: Deployment, Service, ConfigMap,
//! database, …; no status of its own, the Sagas tell).

pub(crate) mod observe;
mod plan;
mod status;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use jiff::Timestamp;

use super::{
    kind::{Applied, Kind, Settings},
    observed::{DatabaseObserved, Workload},
    plan::{Plan, Rejection},
};
use crate::{
    api::v1alpha1::{Microservice, OutboxRelay, Saga, SagaStatus},
    contract::{orchestrator::Start, status::OrchestratorStatus},
    domain::saga::definition::Definition,
};

/// The Microservices that a Saga names: in its steps, their undos, `onCompensated` and `startOn`.
pub fn services_of(saga: &Saga) -> BTreeSet<&str> {
    let spec = &saga.spec;
    let steps = spec.steps.iter().map(|step| step.action.service.as_str());
    let undos = spec.steps.iter().filter_map(|step| step.undo.as_ref()?.service.as_deref());
    let start = spec.start_on.as_ref().map(|start| start.service.as_str());
    let end = spec.on_compensated.as_ref().map(|command| command.service.as_str());
    steps.chain(undos).chain(start).chain(end).collect()
}

/// What the definition and the status of a Saga depend on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Observed {
    /// The Microservices that the Saga names (steps, undos, `onCompensated`, `startOn`) and that exist, by name.
    pub services: BTreeMap<String, Arc<Microservice>>,
    /// The OutboxRelays of `startOn.service`, oldest first.
    pub relays: Vec<Arc<OutboxRelay>>,
    pub orchestrator: OrchestratorObserved,
    /// Why the orchestrator cannot be planned (the longer name of its children, say).
    pub orchestrator_rejection: Option<Rejection>,
}

/// What exists of an orchestrator.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OrchestratorObserved {
    /// The Deployment `NAME-orchestrator`.
    pub deployment: Option<Workload>,
    pub database: DatabaseObserved,
    /// The newest `/status` of its pod; `None` until its stream gave one, and again once that has been broken for a while.
    pub status: Option<OrchestratorStatus>,
}

/// What a Saga amounts to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Defined {
    pub definition: Definition,
    pub start: Option<Start>,
}

/// An orchestrator: a name in a namespace, and the Sagas that name it. It has no object of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct Orchestrator {
    pub namespace: String,
    pub name: String,
    /// Sorted by name; never empty; those being deleted are left out. Each owns the children.
    pub members: Vec<Member>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Member {
    pub saga: Arc<Saga>,
    /// `None` when the Saga is rejected: it gets no new instances, the running ones go on.
    pub defined: Option<Defined>,
}

/// Marker of the Saga's controller.
#[derive(Debug)]
pub struct Controller;

impl Kind for Controller {
    type Object = Saga;
    type Observed = Observed;
    type Planned = Defined;
    type Status = SagaStatus;

    fn plan(object: &Saga, observed: &Observed, _settings: &Settings) -> Result<Defined, Rejection> {
        plan::define(object, observed)
    }

    /// `applied` is the orchestrator's.
    fn status(
        object: &Saga,
        observed: &Observed,
        planned: &Result<Defined, Rejection>,
        applied: &Applied,
        now: Timestamp,
    ) -> SagaStatus {
        status::status(object, observed, planned, applied, now)
    }
}

/// Marker of the orchestrator's controller.
#[derive(Debug)]
pub struct OrchestratorController;

impl Kind for OrchestratorController {
    type Object = Orchestrator;
    type Observed = OrchestratorObserved;
    type Planned = Plan;
    type Status = ();

    fn plan(object: &Orchestrator, observed: &OrchestratorObserved, settings: &Settings) -> Result<Plan, Rejection> {
        plan::orchestrator(object, observed, settings)
    }

    fn status(
        _object: &Orchestrator,
        _observed: &OrchestratorObserved,
        _planned: &Result<Plan, Rejection>,
        _applied: &Applied,
        _now: Timestamp,
    ) {
    }
}
