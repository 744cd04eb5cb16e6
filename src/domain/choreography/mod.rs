//! Choreographed sagas: services react to each other's events, and nobody coordinates. A definition declares who reacts to
//! what; what is known of an instance is a set of events, from which its state is computed.
//!
//! ```text
//!   events of the services ──► instance::Instance (a set: duplicates and their order do not matter)
//!                                   │ assessment::assess(definition, instance)
//!                                   ▼
//!            who owes which event since when · what was never declared · what came too late · how it ended
//! ```

pub mod assessment;
pub mod definition;
pub mod discovery;
pub mod instance;
pub mod lint;
#[cfg(test)]
mod simulation;
