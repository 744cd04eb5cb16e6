//! The orchestrator's metrics.

use std::{collections::BTreeMap, time::Duration};

use prometheus_client::{
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use crate::{
    contract::status::OrchestratorStatus,
    domain::saga::state::Status,
    metrics::saga::{
        FINDING, OUTCOME, SAGA, SAGA_COMMIT_DURATION, SAGA_COMMIT_ROWS, SAGA_COMPENSATING, SAGA_DEAD_STARTS,
        SAGA_ENDED, SAGA_FINDINGS, SAGA_RUNNING, SAGA_STARTED, SAGA_STEP_DURATION, SAGA_STUCK,
    },
};

type OfSaga = [(&'static str, String); 1];
type OfOutcome = [(&'static str, String); 2];

#[derive(Clone, Debug)]
pub(super) struct Meters {
    started: Family<OfSaga, Counter>,
    ended: Family<OfOutcome, Counter>,
    running: Family<OfSaga, Gauge>,
    compensating: Family<OfSaga, Gauge>,
    stuck: Family<OfSaga, Gauge>,
    dead_starts: Family<OfSaga, Gauge>,
    findings: Family<OfOutcome, Gauge>,
    calls: Family<OfOutcome, Histogram>,
    commits: Histogram,
    rows: Counter,
}

/// Buckets from 0.5 ms to 16 s.
fn durations() -> Histogram {
    Histogram::new(prometheus_client::metrics::histogram::exponential_buckets(0.0005, 2.0, 16))
}

impl Meters {
    pub(super) fn register(registry: &mut Registry) -> Self {
        let meters = Self {
            started: Family::default(),
            ended: Family::default(),
            running: Family::default(),
            compensating: Family::default(),
            stuck: Family::default(),
            dead_starts: Family::default(),
            findings: Family::default(),
            calls: Family::new_with_constructor(durations),
            commits: durations(),
            rows: Counter::default(),
        };
        registry.register(SAGA_STARTED, "Instances started by this process", meters.started.clone());
        registry.register(SAGA_ENDED, "Instances that this process brought to an end", meters.ended.clone());
        registry.register(SAGA_RUNNING, "Instances that have not ended", meters.running.clone());
        registry.register(SAGA_COMPENSATING, "Instances that are being undone", meters.compensating.clone());
        registry.register(SAGA_STUCK, "Instances whose attempts are exhausted", meters.stuck.clone());
        registry.register(
            SAGA_DEAD_STARTS,
            "Events of the last month that can never start their saga",
            meters.dead_starts.clone(),
        );
        registry.register(
            SAGA_FINDINGS,
            "Events that a choreographed saga does not declare, or that came too late",
            meters.findings.clone(),
        );
        registry.register_with_unit(
            SAGA_STEP_DURATION,
            "One call of a participant",
            Unit::Seconds,
            meters.calls.clone(),
        );
        registry.register_with_unit(SAGA_COMMIT_DURATION, "One group commit", Unit::Seconds, meters.commits.clone());
        registry.register(SAGA_COMMIT_ROWS, "Rows of the log that were committed", meters.rows.clone());
        meters
    }

    pub(super) fn started(&self, saga: &str) {
        self.started.get_or_create(&[(SAGA, saga.to_owned())]).inc();
    }

    pub(super) fn ended(&self, saga: &str, status: Status) {
        self.ended.get_or_create(&[(SAGA, saga.to_owned()), (OUTCOME, status.as_str().to_ascii_lowercase())]).inc();
    }

    /// Instances of a choreographed saga that were seen to begin and to end.
    pub(super) fn watched(&self, saga: &str, started: i64, completed: i64, compensated: i64) {
        // a count falls only where a service contradicts itself
        let number = |count: i64| u64::try_from(count).unwrap_or(0);
        self.started.get_or_create(&[(SAGA, saga.to_owned())]).inc_by(number(started));
        for (status, count) in [(Status::Completed, completed), (Status::Compensated, compensated)] {
            let labels = [(SAGA, saga.to_owned()), (OUTCOME, status.as_str().to_ascii_lowercase())];
            self.ended.get_or_create(&labels).inc_by(number(count));
        }
    }

    pub(super) fn called(&self, saga: &str, outcome: &'static str, elapsed: Duration) {
        let labels = [(SAGA, saga.to_owned()), (OUTCOME, outcome.to_owned())];
        self.calls.get_or_create(&labels).observe(elapsed.as_secs_f64());
    }

    pub(super) fn committed(&self, rows: usize, elapsed: Duration) {
        self.commits.observe(elapsed.as_secs_f64());
        self.rows.inc_by(rows as u64);
    }

    /// Gauges follow the status.
    pub(super) fn follow(&self, status: &OrchestratorStatus) {
        for (saga, counts) in &status.sagas {
            let of = [(SAGA, saga.clone())];
            let set = |family: &Family<OfSaga, Gauge>, value: u64| {
                family.get_or_create(&of).set(i64::try_from(value).unwrap_or(i64::MAX));
            };
            set(&self.running, counts.running);
            set(&self.compensating, counts.compensating);
            set(&self.stuck, counts.stuck);
            let mut findings: BTreeMap<&str, u64> = BTreeMap::new();
            for found in &counts.findings {
                *findings.entry(&found.finding).or_default() += found.count;
            }
            for (finding, count) in findings {
                let labels = [(SAGA, saga.clone()), (FINDING, finding.to_owned())];
                self.findings.get_or_create(&labels).set(i64::try_from(count).unwrap_or(i64::MAX));
            }
            if let Some(start) = &counts.start {
                set(&self.dead_starts, start.dead);
            }
        }
    }
}
