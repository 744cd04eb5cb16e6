//! Names of metrics and labels: constants in one place, low cardinality (never an id, a key or a subject).
//!
//! `prometheus-client` appends `_total` to counters. Units are in the names: `_seconds`, `_bytes`.

/// `weft relay`.
pub mod relay {
    pub const PUBLISHED: &str = "weft_relay_published";
    pub const RETRIES: &str = "weft_relay_retries";
    pub const PUBLISH_DURATION: &str = "weft_relay_publish_duration_seconds";
    pub const LATENCY: &str = "weft_relay_latency_seconds";
    pub const PENDING: &str = "weft_relay_pending";
    pub const INFLIGHT: &str = "weft_relay_inflight";
    pub const HELD: &str = "weft_relay_held";
    pub const DEAD: &str = "weft_relay_dead_letters";
    pub const LAG_SECONDS: &str = "weft_relay_lag_seconds";
    pub const LAG_BYTES: &str = "weft_relay_lag_bytes";
    pub const LEADING: &str = "weft_relay_leading";
}

/// `weft inbox`. Label: `subscription`; and `outcome` of a delivery (`handled`, `refused`, `failed`).
pub mod inbox {
    pub const SUBSCRIPTION: &str = "subscription";
    pub const OUTCOME: &str = "outcome";

    pub const DELIVERIES: &str = "weft_inbox_deliveries";
    /// Registered with the unit, which appends `_seconds`.
    pub const DELIVERY_DURATION: &str = "weft_inbox_delivery_duration";
    pub const WAITING: &str = "weft_inbox_waiting";
    pub const HELD: &str = "weft_inbox_held";
    pub const DEAD: &str = "weft_inbox_dead_letters";
    pub const LAG_SECONDS: &str = "weft_inbox_lag_seconds";
    pub const LEADING: &str = "weft_inbox_leading";
}

/// The operator's.
pub mod operator {
    /// Counter: reconciles by `kind` and `result` (`ok`, `waiting`, `retry`, `invalid`, `fatal`).
    pub const RECONCILE: &str = "weft_reconcile";
    /// Histogram: seconds of a reconcile by `kind`.
    pub const RECONCILE_DURATION: &str = "weft_reconcile_duration_seconds";
    /// Counter: requests to the API server by `verb`, `kind` (the resource's plural) and `code` (`0`: no answer).
    pub const API_REQUESTS: &str = "weft_api_requests";
    /// Counter: children that somebody had changed and that were corrected, by `kind`.
    pub const DRIFT_CORRECTED: &str = "weft_drift_corrected";
    /// Gauge: 1 while this process leads.
    pub const LEADER: &str = "weft_leader";
    /// Gauge: 1 while the API server does not let `namespace` be watched (empty: the whole cluster).
    pub const SCOPE_REFUSED: &str = "weft_scope_refused";
    /// Counter: writes of a custom resource's status, by `kind`.
    pub const STATUS_WRITES: &str = "weft_status_writes";
    /// Gauge: custom resources by `kind` and `ready` (`True`, `False`, `Unknown`).
    pub const OBJECTS: &str = "weft_objects";
    /// Gauge: namespaces for which the broker that is installed with Weft has no account yet.
    pub const BROKER_ACCOUNTS_WAITING: &str = "weft_broker_accounts_waiting";
    /// Gauge: saga instances by `state` (`running`, `completed`, `compensated`, `stuck`), all Sagas together.
    pub const SAGA_INSTANCES: &str = "weft_saga_instances";
    /// Gauge: outbox rows that are not published, all OutboxRelays together.
    pub const OUTBOX_PENDING: &str = "weft_outbox_pending";
    /// Gauge: events that brokers have acknowledged, all OutboxRelays together.
    pub const OUTBOX_PUBLISHED: &str = "weft_outbox_published";
}

/// `weft saga run`. Labels: `saga`, and `outcome` of a call or of an instance.
pub mod saga {
    pub const SAGA: &str = "saga";
    pub const OUTCOME: &str = "outcome";
    pub const FINDING: &str = "finding";

    pub const SAGA_STARTED: &str = "weft_saga_started";
    pub const SAGA_ENDED: &str = "weft_saga_ended";
    pub const SAGA_RUNNING: &str = "weft_saga_running";
    pub const SAGA_COMPENSATING: &str = "weft_saga_compensating";
    pub const SAGA_STUCK: &str = "weft_saga_stuck";
    pub const SAGA_DEAD_STARTS: &str = "weft_saga_dead_starts";
    /// Gauge by `saga` and `finding` (`undeclared`, `repeated`, `late`).
    pub const SAGA_FINDINGS: &str = "weft_saga_findings";
    /// Registered with the unit, which appends `_seconds`.
    pub const SAGA_STEP_DURATION: &str = "weft_saga_step_duration";
    pub const SAGA_COMMIT_DURATION: &str = "weft_saga_commit_duration";
    pub const SAGA_COMMIT_ROWS: &str = "weft_saga_commit_rows";
}
