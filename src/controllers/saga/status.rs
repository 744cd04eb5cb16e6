//! What a Saga says of itself.

use jiff::Timestamp;

use super::{Defined, Observed};
use crate::{
    api::v1alpha1::{Saga, SagaStatus},
    controllers::{kind::Applied, plan::Rejection},
};

pub fn status(
    object: &Saga,
    _observed: &Observed,
    _planned: &Result<Defined, Rejection>,
    _applied: &Applied,
    _now: Timestamp,
) -> SagaStatus {
    object.status.clone().unwrap_or_default()
}
