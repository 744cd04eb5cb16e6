//! A Saga's definition, and what should exist because of an orchestrator.

mod definition;
mod lower;
mod orchestrator;

pub use definition::{check_broker, define};
pub use orchestrator::{CONTRACT_FILE, api_url, orchestrator, stage};

#[cfg(test)]
mod tests;
