//! Runs the reconciles: takes keys from the queue, a bounded number at a time, and decides when each comes again. It knows no
//! kind.

mod backoff;
pub mod broker;
mod config_maps;
mod context;
pub mod driver;
pub mod events;
pub mod leader;
pub mod metrics;
mod pace;
mod queue;
pub mod report;
mod settling;
mod workers;

pub use config_maps::{ConfigMaps, file_of, released};
pub use context::{Context, PassResult, Verdict};
pub use pace::{News, StatusPace};
pub use queue::Priority;
pub use workers::{ReconcileFn, resync, run};
