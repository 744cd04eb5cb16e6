//! The operator against an API server that answers by a script: which requests it sends, in which order, and what it makes
//! of each answer. The real API server is met in `tests/e2e`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

mod apply;
mod definitions;
mod faults;
mod leader;
mod malformed;
mod reconcile;
mod restart;
mod secrets;
mod server;
mod set_up;
#[path = "../support/settings.rs"]
mod settings;
mod slots;
mod watches;
