//! Waiting for what custom resources say of themselves.

use std::{fmt::Debug, time::Duration};

use anyhow::{Result, bail};
use k8s_openapi::{NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::Condition};
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use weft::api::v1alpha1::{Microservice, OutboxRelay, Saga};

use super::Scenario;

/// A kind with conditions.
pub trait Conditions:
    Resource<Scope = NamespaceResourceScope, DynamicType = ()> + Clone + DeserializeOwned + Debug
{
    fn conditions(&self) -> &[Condition];
    fn observed_generation(&self) -> Option<i64>;
}

macro_rules! conditions {
    ($($kind:ty),*) => {$(
        impl Conditions for $kind {
            fn conditions(&self) -> &[Condition] {
                self.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default()
            }
            fn observed_generation(&self) -> Option<i64> {
                self.status.as_ref().and_then(|status| status.observed_generation)
            }
        }
    )*};
}
conditions!(Microservice, OutboxRelay, Saga);

/// The condition, if the status is about the present spec.
fn condition<'a, K: Conditions>(object: &'a K, type_: &str) -> Option<&'a Condition> {
    if object.observed_generation() != object.meta().generation {
        return None;
    }
    object.conditions().iter().find(|condition| condition.type_ == type_)
}

impl Scenario {
    /// Waits until the object's condition has this status, and gives the condition.
    pub async fn says<K: Conditions>(&self, name: &str, type_: &str, status: &str, within: u64) -> Result<Condition> {
        let kind = K::kind(&());
        let what = format!("{kind} {name} says {type_}={status}");
        self.until(&what, Duration::from_secs(within), async || {
            let Some(object) = self.get::<K>(name).await? else { bail!("{kind} {name} does not exist") };
            let condition = condition(&object, type_);
            match condition {
                Some(condition) if condition.status == status => Ok(Some(condition.clone())),
                Some(Condition { status, reason, message, .. }) => {
                    bail!("{} says {status}, {reason}: {message}", object.name_any())
                }
                None => bail!("it does not say anything of {type_} for its present spec"),
            }
        })
        .await
    }

    pub async fn ready<K: Conditions>(&self, name: &str) -> Result<()> {
        self.says::<K>(name, "Ready", "True", 180).await.map(drop)
    }
}
