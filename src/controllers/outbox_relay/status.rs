//! What an OutboxRelay says of itself.

use jiff::Timestamp;

use super::Observed;
use crate::{
    api::v1alpha1::{OutboxRelay, OutboxRelayStatus},
    controllers::{
        kind::Applied,
        plan::{Plan, Rejection},
    },
};

pub fn status(
    object: &OutboxRelay,
    _observed: &Observed,
    _planned: &Result<Plan, Rejection>,
    _applied: &Applied,
    _now: Timestamp,
) -> OutboxRelayStatus {
    object.status.clone().unwrap_or_default()
}
