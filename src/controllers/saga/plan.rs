//! A Saga's definition, and what should exist because of an orchestrator.

use super::{Defined, Observed, Orchestrator, OrchestratorObserved};
use crate::{
    api::v1alpha1::Saga,
    controllers::{
        kind::Settings,
        plan::{Plan, Rejection},
    },
};

pub fn define(object: &Saga, _observed: &Observed) -> Result<Defined, Rejection> {
    Err(Rejection { reason: "NotBuilt", message: format!("saga {:?} cannot be defined yet", object.metadata.name) })
}

pub fn orchestrator(
    _object: &Orchestrator,
    _observed: &OrchestratorObserved,
    _settings: &Settings,
) -> Result<Plan, Rejection> {
    Ok(Plan::default())
}
