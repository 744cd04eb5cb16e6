//! What should exist because of an OutboxRelay.

use super::Observed;
use crate::{
    api::v1alpha1::OutboxRelay,
    controllers::{
        kind::Settings,
        plan::{Plan, Rejection},
    },
};

/// Key of the ConfigMap, and where it is mounted in the sidecar.
pub const CONTRACT_FILE: &str = "relay.yaml";
pub const CONTRACT_FOLDER: &str = "/etc/weft/relay";

pub fn plan(_object: &OutboxRelay, _observed: &Observed, _settings: &Settings) -> Result<Plan, Rejection> {
    Ok(Plan::default())
}
