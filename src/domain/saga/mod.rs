//! The saga's rules: what a definition is, what state an instance can be in, what to do next.
//!
//! ```text
//!   Definition ──► decide(definition, state, event, moment) ──► state', command
//!                     ▲                                             │
//!                     │ result, timer, a person's verb              │ recorded first, then sent
//!                     └──────────── the engine (crate::saga) ◄──────┘
//! ```
//! An instance is its events: [`state::State`] is what [`decide::decide`] makes of them, one after the other.

pub mod decide;
pub mod definition;
pub mod expression;
pub mod lint;
mod references;
#[cfg(test)]
mod simulation;
pub mod state;
#[cfg(test)]
mod wild_expressions;
