//! The promises of the design, each kept on a real cluster with real pods and databases: one file per promise.
//!
//! `make e2e` brings up a cluster, makes the images and runs this; `cargo test --test e2e` runs it on the cluster of
//! `$KUBECONFIG`. Each scenario has a namespace with Pod Security `restricted` and an operator of its own there, so they
//! run at the same time; a scenario that needs an operator for the whole cluster waits until it is alone.
//!
//! - `WEFT_SEED=N` repeats the random kills of a failed run.
//! - `WEFT_E2E_KEEP=1` leaves the namespaces of failed scenarios until the next run.
//! - What a failed scenario looked like is in `target/e2e/NAME.txt`.

// tests, though the lints see only the functions with the attribute as such
#![allow(clippy::expect_used, clippy::indexing_slicing, clippy::panic)]

#[path = "../support/checker.rs"]
mod checker;
mod harness;

mod a_bad_migration_stops_nothing_else;
mod an_outbox_of_its_own;
mod bad_specs_are_refused;
mod causes_are_named;
mod customers_and_orders;
mod data_outlives_deletion;
mod drift_is_repaired;
mod external_database;
mod inbox_delivers_once;
mod leader_fails_over;
mod neighbours;
mod operator_upgrade_restarts_nothing;
mod overlays_reach_nobody;
mod own_database;
mod relay_loses_nothing;
mod restricted_namespace;
mod saga_ends;
mod saga_gets_stuck_loudly;
mod schema_first;
mod scopes_fail_alone;
mod secrets_heal;
mod shared_database_is_visible;
mod silent_when_converged;
mod two_namespaces;
mod uninstall_keeps_data;
mod uninstall_leaves_nothing_hanging;
mod what_is_wrong_is_said;
