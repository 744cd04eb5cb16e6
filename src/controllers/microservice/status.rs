//! What a Microservice says of itself.

use jiff::Timestamp;

use super::Observed;
use crate::{
    api::v1alpha1::{Microservice, MicroserviceStatus},
    controllers::{
        kind::Applied,
        plan::{Plan, Rejection},
    },
};

pub fn status(
    object: &Microservice,
    _observed: &Observed,
    _planned: &Result<Plan, Rejection>,
    _applied: &Applied,
    _now: Timestamp,
) -> MicroserviceStatus {
    object.status.clone().unwrap_or_default()
}
