//! What should exist because of an OutboxRelay.

use super::Observed;
use crate::{
    api::v1alpha1::OutboxRelay,
    controllers::{
        kind::Settings,
        plan::{Plan, Rejection},
    },
};

pub fn plan(_object: &OutboxRelay, _observed: &Observed, _settings: &Settings) -> Result<Plan, Rejection> {
    Ok(Plan::default())
}
