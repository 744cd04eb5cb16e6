//! The saga's rules: what a definition is, what state an instance can be in, what to do next.
//!
//! ```text
//!   Definition ──► decide(definition, state, event, moment) ──► state', command
//!                     ▲                                             │
//!                     │ result, timer, a person's verb              │ recorded first, then sent
//!                     └──────────── the engine (crate::saga) ◄──────┘
//! ```
//! An instance is the sequence of its events: [`decide::decide`] computes its [`state::State`] from them, one after the
//! other.

pub mod decide;
pub mod definition;
pub mod expression;
pub mod json;
pub mod lint;
mod meter;
mod references;
pub mod schema;
#[cfg(test)]
mod simulation;
pub mod state;
#[cfg(test)]
mod wild_expressions;
