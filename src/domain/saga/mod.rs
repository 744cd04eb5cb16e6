//! The saga's rules: what a definition is, what state an instance can be in, what to do next.
//!
//! ```text
//!   Definition ─► Tree ──► decide(tree, state, event, moment) ──► state', actions
//!                             ▲                                          │
//!                             │ result, timer, signal, a person's verb   │ recorded first, then done
//!                             └──────────── the engine (crate::saga) ◄───┘
//! ```
//! An instance is the sequence of its events: [`decide::decide`] computes its [`state::State`] from them, one after the
//! other.

pub mod decide;
pub mod definition;
pub mod event;
pub mod expression;
pub mod json;
pub mod lint;
mod lint_expressions;
mod meter;
mod references;
pub mod request;
pub mod schema;
#[cfg(test)]
mod simulation;
pub mod state;
pub mod tree;
mod verbs;
mod walk;
#[cfg(test)]
mod wild_expressions;
