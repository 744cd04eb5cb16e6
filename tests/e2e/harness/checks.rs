//! Waiting for what custom resources say of themselves.

use std::{fmt::Debug, time::Duration};

use anyhow::{Context, Result, bail};
use k8s_openapi::{NamespaceResourceScope, apimachinery::pkg::apis::meta::v1::Condition};
use kube::Resource;
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
    /// What the object says of `type_` for its present spec.
    pub async fn now_says<K: Conditions>(&self, name: &str, type_: &str) -> Result<Condition> {
        let kind = K::kind(&());
        let object = self.get::<K>(name).await?.with_context(|| format!("{kind} {name} does not exist"))?;
        let condition = condition(&object, type_).cloned();
        condition.with_context(|| format!("{kind} {name} does not say anything of {type_} for its present spec"))
    }

    /// Waits until the object's condition has this status, and gives the condition.
    pub async fn says<K: Conditions>(&self, name: &str, type_: &str, status: &str, within: u64) -> Result<Condition> {
        let what = format!("{} {name} says {type_}={status}", K::kind(&()));
        self.until(&what, Duration::from_secs(within), async || {
            let condition = self.now_says::<K>(name, type_).await?;
            if condition.status != status {
                let Condition { status, reason, message, .. } = condition;
                bail!("{name} says {status}, {reason}: {message}");
            }
            Ok(Some(condition))
        })
        .await
    }

    pub async fn ready<K: Conditions>(&self, name: &str) -> Result<()> {
        self.says::<K>(name, "Ready", "True", 180).await.map(drop)
    }
}
