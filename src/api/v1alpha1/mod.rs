//! `weft.dev/v1alpha1`: types only, no IO. Doc comments become `kubectl explain`; CEL rules are checked by the API server.

mod consumes;
mod database;
mod microservice;
mod outbox_relay;
mod saga;

pub use consumes::*;
pub use database::*;
pub use microservice::*;
pub use outbox_relay::*;
pub use saga::*;

/// API group of every kind.
pub const GROUP: &str = "weft.dev";
/// Version of every kind.
pub const VERSION: &str = "v1alpha1";
