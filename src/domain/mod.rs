//! Pure rules: no async, no clients, no clock, no randomness of its own.

pub mod choreography;
pub mod destination;
pub mod event;
pub mod names;
pub mod saga;
pub mod version;
