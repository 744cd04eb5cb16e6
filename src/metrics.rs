//! Names of metrics and labels: constants in one place, low cardinality (never an id, a key or a subject).
//!
//! `prometheus-client` appends `_total` to counters. Units are in the names: `_seconds`, `_bytes`.
