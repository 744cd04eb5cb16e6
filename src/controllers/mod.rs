//! The control plane: one controller for three kinds.
//!
//! Each kind is four words: `observe` (reads only) → `plan` (pure) → `apply` (server-side apply, in the runtime) →
//! `status` (pure). Only `observe` and `apply` hold a client.

pub mod apply;
pub mod backoff;
pub mod conditions;
pub mod contract_readers;
pub mod data_plane;
pub mod database;
pub mod definitions;
pub mod events;
pub mod failure;
pub mod finalizer;
#[cfg(test)]
mod fixtures;
pub mod key;
pub mod kind;
pub mod labels;
pub mod leader;
pub mod live;
pub mod metrics;
pub mod microservice;
pub mod observed;
pub mod operator;
pub mod outbox_relay;
pub mod overlay;
pub mod owner;
pub mod plan;
pub mod pods;
pub mod queue;
pub mod readiness;
pub mod reconcile;
pub mod references;
pub mod runtime;
pub mod saga;
pub mod standing;
pub mod status;
pub mod status_gate;
pub mod streams;
pub mod waits;
pub mod watches;
pub mod world;
