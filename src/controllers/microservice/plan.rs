//! What should exist because of a Microservice.

use super::Observed;
use crate::{
    api::v1alpha1::Microservice,
    controllers::{
        kind::Settings,
        plan::{Plan, Rejection},
    },
};

pub fn plan(_object: &Microservice, _observed: &Observed, _settings: &Settings) -> Result<Plan, Rejection> {
    Ok(Plan::default())
}
