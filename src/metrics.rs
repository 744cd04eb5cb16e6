//! Names of metrics and labels: constants in one place, low cardinality (never an id, a key or a subject).
//!
//! `prometheus-client` appends `_total` to counters. Units are in the names: `_seconds`, `_bytes`.

/// `weft relay`.
pub mod relay {
    pub const PUBLISHED: &str = "weft_relay_published";
    pub const RETRIES: &str = "weft_relay_retries";
    pub const PUBLISH_DURATION: &str = "weft_relay_publish_duration_seconds";
    pub const PENDING: &str = "weft_relay_pending";
    pub const INFLIGHT: &str = "weft_relay_inflight";
    pub const PARKED: &str = "weft_relay_parked";
    pub const LAG_SECONDS: &str = "weft_relay_lag_seconds";
    pub const LAG_BYTES: &str = "weft_relay_lag_bytes";
    pub const LEADING: &str = "weft_relay_leading";
}
