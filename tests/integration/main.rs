//! Tests against real servers: one binary, one module per subject.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing, reason = "these are tests")]

mod broker_accounts;
#[path = "../support/checker.rs"]
mod checker;
mod choreography;
mod database;
mod database_confinement;
mod database_example;
mod database_functions;
mod database_no_transaction;
mod database_patience;
mod database_placements;
mod database_setup;
mod database_start;
mod inbox;
mod inbox_harness;
mod inbox_kills;
mod outbox_layouts;
mod relay;
mod relay_dead;
mod relay_faults;
mod relay_harness;
mod relay_kills;
mod relay_outages;
mod relay_refusals;
mod relay_sinks;
mod relay_slot;
mod saga;
mod saga_batch;
mod saga_crashes;
mod saga_instances;
mod saga_jobs;
mod saga_keys;
mod saga_participant;
mod saga_permits;
mod saga_requests;
mod saga_starts;
mod saga_tree;
mod saga_world;
mod sample_system;
mod servers;
#[path = "../support/settings.rs"]
mod settings;
