//! The control plane: one controller for three kinds.
//!
//! Each kind is four words: `observe` (reads only) → `plan` (pure) → `apply` (server-side apply, in the runtime) →
//! `status` (pure). Only `observe` and `apply` hold a client.

pub mod conditions;
pub mod kind;
pub mod labels;
pub mod microservice;
pub mod observed;
pub mod outbox_relay;
pub mod plan;
pub mod saga;
