//! A Saga's definition, and what should exist because of an orchestrator.

mod choreography;
mod definition;
mod lower;
mod orchestrator;
mod publisher;

pub use definition::define;
pub use orchestrator::{CONTRACT_FILE, api_url, orchestrator, stage, store};
pub use publisher::check_brokers;

#[cfg(test)]
mod tests;
