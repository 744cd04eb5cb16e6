//! The status of an OutboxRelay.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use super::{Observed, Planned};
use crate::{
    api::v1alpha1::{Lag, Latency, OutboxRelay, OutboxRelayStatus, RelayMode},
    contract::{problem::ProblemReason, status::RelayStatus},
    controllers::{
        database,
        resources::{outcome::Applied, plan::Rejection, reason::Reason},
        status::{
            conditions::{Conditions, SLOT_AT_RISK, Truth},
            progress::{Finding, Progress, not_applied, set_accepted, set_foreign},
        },
    },
};

/// Reasons of the data plane by which the replication slot is, or is about to be, lost.
const SLOT_PROBLEMS: [ProblemReason; 2] = [ProblemReason::SlotAtRisk, ProblemReason::SlotLost];

pub fn status(
    object: &OutboxRelay,
    observed: &Observed,
    planned: &Result<Planned, Rejection>,
    applied: &Applied,
    now: Timestamp,
) -> OutboxRelayStatus {
    let previous = object.status.clone().unwrap_or_default();
    let mut conditions = Conditions::new(&previous.conditions, object.metadata.generation, now);
    progress(object, observed, planned, applied).set(&mut conditions);
    set_accepted(planned, applied, &mut conditions);
    if object.spec.mode == RelayMode::LogTailing {
        slot(observed).set(SLOT_AT_RISK, &mut conditions);
    }
    set_foreign(applied, &mut conditions);
    let conditions = conditions.finish();
    let status = OutboxRelayStatus {
        observed_generation: object.metadata.generation,
        conditions,
        sink: Some(object.spec.sink.kind().to_owned()),
        leader: None,
        latency: None,
        applied_hash: if planned.is_ok() { applied.digest.clone() } else { previous.applied_hash },
        ..previous
    };
    match leader(observed) {
        Some((pod, relay)) => numbers(status, pod, relay),
        // nobody publishes: the last numbers stay, for the events are where they were
        None => status,
    }
}

/// The numbers of the relay that publishes.
fn numbers(status: OutboxRelayStatus, pod: &str, relay: &RelayStatus) -> OutboxRelayStatus {
    let count = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    OutboxRelayStatus {
        leader: Some(pod.to_owned()),
        published: count(relay.published),
        pending: count(relay.pending),
        held: count(relay.held),
        dead_letters: count(relay.dead_letters),
        lag: Some(Lag {
            seconds: relay.lag_seconds,
            bytes: relay.lag_bytes.map(count),
            summary: age(relay.lag_seconds),
        }),
        latency: relay
            .latency
            .map(|latency| Latency { p50_seconds: latency.p50_seconds, p99_seconds: latency.p99_seconds }),
        position: relay.position.clone(),
        last_published_time: relay.last_published.map(Time),
        ..status
    }
}

/// The pod whose relay leads. For a moment two may report that: the one with more published is the newer.
fn leader(observed: &Observed) -> Option<(&str, &RelayStatus)> {
    let status = observed.pods.iter().filter_map(|(pod, status)| Some((pod.as_str(), status.as_ref()?)));
    status.filter(|(_, status)| status.leading).max_by_key(|(_, status)| status.published)
}

fn progress(
    object: &OutboxRelay,
    observed: &Observed,
    planned: &Result<Planned, Rejection>,
    applied: &Applied,
) -> Progress {
    let service = &object.spec.microservice;
    let version = match planned {
        Ok(planned) => &planned.contract_version,
        Err(rejection) => return rejection.into(),
    };
    not_applied(applied)
        .or_else(|| not_followed(object, observed))
        .or_else(|| nobody_runs(service, observed))
        .unwrap_or_else(|| publishing(object, observed, version))
}

/// Events in a table of the team's get to the relay once the set-up of the database has made its trigger.
fn not_followed(object: &OutboxRelay, observed: &Observed) -> Option<Progress> {
    let wanted = database::outbox_hash(&object.spec.outbox)?;
    if observed.set_up.as_ref().and_then(|set_up| set_up.outbox_hash.as_ref()) == Some(&wanted) {
        return None;
    }
    let message = format!(
        "the database of Microservice `{}` has not been set up for spec.outbox yet; its condition Migrated names the cause",
        object.spec.microservice
    );
    Some(Progress::waiting(Reason::MicroserviceNotReady, message))
}

/// Without pods there is no relay either.
fn nobody_runs(service: &str, observed: &Observed) -> Option<Progress> {
    if !observed.pods.is_empty() {
        return None;
    }
    let waiting = |reason: Reason, message: String| Some(Progress::waiting(reason, message));
    match &observed.deployment {
        None => waiting(
            Reason::MicroserviceNotReady,
            format!("Microservice `{service}` has no pods yet; its own conditions name the cause"),
        ),
        Some(live) if live.wanted == 0 => waiting(
            Reason::ScaledToZero,
            format!("Microservice `{service}` is scaled to 0 pods; events wait in the outbox"),
        ),
        Some(live) => match live.problems.first() {
            Some(problem) => waiting(problem.reason, problem.message.clone()),
            None => waiting(Reason::Starting, "no pod with the relay runs yet".to_owned()),
        },
    }
}

/// `version` is that of the contract.
fn publishing(object: &OutboxRelay, observed: &Observed, version: &str) -> Progress {
    let Some((pod, relay)) = leader(observed) else {
        let problem = observed.pods.values().flatten().flat_map(|status| &status.problems).next();
        return match problem {
            Some(problem) => Progress::waiting(problem.reason, problem.message.clone()),
            None if observed.pods.values().all(Option::is_none) => {
                match observed.deployment.as_ref().and_then(|live| live.problems.first()) {
                    Some(problem) => Progress::waiting(problem.reason, problem.message.clone()),
                    None => Progress::waiting(Reason::RelaySilent, "no pod's relay has reported its status yet"),
                }
            }
            None => Progress::waiting(Reason::NoLeader, "the relays are electing the one that publishes"),
        };
    };
    if relay.relay != object.name_any() {
        return match observed.deployment.as_ref().and_then(|live| live.problems.first()) {
            Some(problem) => Progress::waiting(problem.reason, problem.message.clone()),
            None => Progress::waiting(
                Reason::RollingOut,
                format!(
                    "pod {pod} still runs the relay `{}`: that ends when Microservice `{}` rolls",
                    relay.relay, object.spec.microservice
                ),
            ),
        };
    }
    // a relay of an older version reports none
    let other = !relay.contract.is_empty() && relay.contract != version;
    if other || object.spec.paused != relay.paused {
        return match relay.problems.iter().find(|problem| problem.reason == ProblemReason::ContractInvalid) {
            Some(problem) => Progress::waiting(problem.reason, problem.message.clone()),
            None => {
                Progress::waiting(Reason::Loading, format!("the relay of pod {pod} has not read the newest spec yet"))
            }
        };
    }
    if !relay.ready {
        return match relay.problems.first() {
            Some(problem) => Progress::waiting(problem.reason, problem.message.clone()),
            None => Progress::waiting(Reason::Starting, format!("the relay of pod {pod} is connecting")),
        };
    }
    if relay.paused {
        return Progress::ready(Reason::Paused, "spec.paused is true: events wait in the outbox");
    }
    // it publishes and still reports a problem: an event that the broker refuses holds back its aggregate only
    match relay.problems.iter().find(|problem| !SLOT_PROBLEMS.contains(&problem.reason)) {
        Some(problem) => Progress::ready(problem.reason, problem.message.clone()),
        None => Progress::ready(Reason::Publishing, format!("the relay of pod {pod} publishes")),
    }
}

fn slot(observed: &Observed) -> Finding {
    let Some((_, relay)) = leader(observed) else {
        return Finding::new(
            Truth::Unknown,
            Reason::NoLeader,
            "no relay leads, so nobody watches the replication slot",
        );
    };
    match relay.problems.iter().find(|problem| SLOT_PROBLEMS.contains(&problem.reason)) {
        Some(problem) => Finding::new(true, problem.reason, problem.message.clone()),
        None => Finding::new(false, Reason::SlotSafe, "the server keeps the log that the relay still needs"),
    }
}

/// An age for a column: whole seconds, minutes or hours.
fn age(seconds: f64) -> String {
    // what is longer than a u32 of seconds is past caring; NaN and negative ages are none
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "saturates, as wanted")]
    let seconds = seconds as u32;
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3_600 => format!("{}m", seconds / 60),
        _ => format!("{}h", seconds / 3_600),
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
