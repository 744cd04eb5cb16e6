//! The control plane: one driver for every kind of object.
//!
//! A reconcile has four steps: `observe` (reads only) → `plan` (pure) → `apply` (server-side apply) → `status` (pure). Only
//! what observes, applies and reports holds a client.
//!
//! ```text
//! resources   what is reconciled, and what it becomes: keys, children, plans, labels, settings    (pure)
//! status      conditions, progress, reasons, and the Events that a change is worth                (pure)
//! render      building blocks of objects: owners, pods, overlays                                  (pure)
//! database    a database's objects and how far it is, whoever owns it                             (pure)
//! store       what is known of the cluster                                                        (pure)
//! request     one request to the API server: its deadline, and what its failure means
//! apply       makes a plan true
//! runtime     queue, back-off, leader election, and the driver; it knows no kind
//! watch       feeds the store: watches, and the status streams of the data plane
//! kinds       per kind: observe, plan, status
//! operator    `weft operator`: ties all of it together
//! ```
//! Each may use what stands above it, and nothing below it. `tests/architecture.rs` holds this.

pub mod apply;
pub mod database;
#[cfg(test)]
mod fixtures;
pub mod kinds;
pub mod operator;
pub mod render;
pub mod request;
pub mod resources;
pub mod runtime;
pub mod status;
pub mod store;
pub mod watch;
