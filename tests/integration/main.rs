//! Tests against real servers: one binary, one module per subject.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

mod database;
mod database_example;
mod database_functions;
mod database_setup;
mod servers;
