//! The saga's rules: what a definition is, what state an instance can be in, what to do next.

pub mod definition;
pub mod expression;
pub mod lint;
mod references;
