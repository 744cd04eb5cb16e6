//! Building blocks of the objects that Weft makes. Pure.

pub mod broker;
pub mod network;
pub mod overlay;
pub mod owner;
pub mod pod;
pub mod reach;
pub mod sink;

/// A duration as contracts write it. None is negative: the API server, and the check of a Saga, refuse that.
pub fn milliseconds(duration: kube::core::Duration) -> u64 {
    u64::try_from(std::time::Duration::from(duration).as_millis()).unwrap_or(u64::MAX)
}
