//! Logs: JSON on stderr, or text if stderr is a terminal. `WEFT_LOG` filters (default `info`).

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, fmt};

/// Environment variable with the filter, in `tracing`'s directive syntax.
pub const LOG_VARIABLE: &str = "WEFT_LOG";

pub fn init() {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() { builder.init() } else { builder.json().flatten_event(true).init() }
}
