//! The status of a Saga and the counts of its instances.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;

use super::{
    Defined, Observed,
    drain::{is_draining, waits_for},
    plan::{api_url, stage, store},
};
use crate::{
    api::v1alpha1::{Saga, SagaEvent, SagaStatus, SagaStyle, StuckSaga},
    contract::status::{FindingCount, REACT, SagaCounts, StuckInstance},
    controllers::{
        database::{Placement, Stage, status as database_status},
        resources::{outcome::Applied, plan::Rejection, reason::Reason},
        status::{
            conditions::{ACCEPTED, AS_DECLARED, Conditions, DATABASE_READY, DELETING, START_EVENT_SEEN, STUCK, Truth},
            progress::{self, Finding, Progress, not_applied, not_rolled_out, set_foreign},
        },
    },
    domain::choreography::definition::Kind,
};

pub fn status(object: &Saga, observed: &Observed, planned: &Result<Defined, Rejection>, now: Timestamp) -> SagaStatus {
    let applied = observed.orchestrator_pass.as_ref().map(|pass| pass.applied.clone()).unwrap_or_default();
    let previous = object.status.clone().unwrap_or_default();
    let (namespace, name) = (object.namespace().unwrap_or_default(), object.name_any());
    let counts = observed.orchestrator.status.as_ref().and_then(|status| status.sagas.get(&name));
    let mut conditions = Conditions::new(&previous.conditions, object.metadata.generation, now);
    let deleting = is_draining(object).then(|| waits_for(object, observed, planned)).flatten();
    match &deleting {
        Some(Finding { reason, message, .. }) => Progress::Waiting(*reason, message.clone()),
        None => progress(object, observed, planned, &applied, counts),
    }
    .set(&mut conditions);
    accepted(planned, &applied, counts).set(ACCEPTED, &mut conditions);
    at_stage(object, observed, |stage| database(observed, stage)).set(DATABASE_READY, &mut conditions);
    stuck(observed, counts).set(STUCK, &mut conditions);
    if let Some(seen) = start_event(object, counts) {
        seen.set(START_EVENT_SEEN, &mut conditions);
    }
    if let Some(as_declared) = as_declared(object, counts) {
        as_declared.set(AS_DECLARED, &mut conditions);
    }
    if let Some(deleting) = &deleting {
        deleting.set(DELETING, &mut conditions);
    }
    set_foreign(&applied, &mut conditions);
    let conditions = conditions.finish();
    let status = SagaStatus {
        observed_generation: object.metadata.generation,
        conditions,
        steps: i32::try_from(object.spec.tasks().len() + object.spec.reactions.len()).unwrap_or(i32::MAX),
        url: Some(format!("{}/sagas/{name}", api_url(&namespace, &object.spec.orchestrator))),
        applied_hash: match &observed.orchestrator_pass {
            Some(pass) if pass.rejection.is_none() => pass.applied.digest.clone(),
            Some(_) | None => previous.applied_hash,
        },
        ..previous
    };
    match (counts, &observed.orchestrator.status) {
        (Some(counts), _) => numbers(status, counts),
        (None, Some(_)) => numbers(status, &SagaCounts::default()),
        // nobody reports: the last numbers stay
        (None, None) => status,
    }
}

fn numbers(status: SagaStatus, counts: &SagaCounts) -> SagaStatus {
    let count = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    SagaStatus {
        running: count(counts.running),
        completed: count(counts.completed),
        compensated: count(counts.compensated),
        stuck: count(counts.stuck),
        dead_starts: count(counts.start.as_ref().map_or(0, |start| start.dead)),
        stuck_instances: counts.stuck_instances.iter().take(10).map(stuck_saga).collect(),
        ..status
    }
}

fn stuck_saga(instance: &StuckInstance) -> StuckSaga {
    let StuckInstance { id, step, operation, message, since } = instance.clone();
    StuckSaga { id, step, operation, message, since: Time(since) }
}

fn progress(
    object: &Saga,
    observed: &Observed,
    planned: &Result<Defined, Rejection>,
    applied: &Applied,
    counts: Option<&SagaCounts>,
) -> Progress {
    let defined = match planned {
        Ok(defined) => defined,
        Err(rejection) => return rejection.into(),
    };
    let orchestrator = &observed.orchestrator;
    let database = || at_stage(object, observed, |stage| database_status::progress(&database(observed, stage), stage));
    not_applied(applied)
        .or_else(database)
        .or_else(|| not_rolled_out(orchestrator.deployment.as_ref(), "the orchestrator"))
        .unwrap_or_else(|| running(observed, defined, counts))
}

fn running(observed: &Observed, defined: &Defined, counts: Option<&SagaCounts>) -> Progress {
    let Some(status) = &observed.orchestrator.status else {
        return Progress::waiting(Reason::OrchestratorSilent, "the orchestrator has not reported its status yet");
    };
    if !status.ready {
        return match status.problems.first() {
            Some(problem) => Progress::waiting(problem.reason, problem.message.clone()),
            None => Progress::waiting(Reason::Starting, "the orchestrator is recovering its instances"),
        };
    }
    let version = defined.version();
    let runs = match defined {
        Defined::Orchestrated { .. } => format!("the orchestrator runs version {version} of the saga"),
        Defined::Choreographed(_) => format!("the orchestrator watches the saga, as of version {version}"),
    };
    if counts.is_none_or(|counts| counts.version != *version) {
        return Progress::waiting(
            Reason::Loading,
            format!("the orchestrator has not read version {version} of the saga yet"),
        );
    }
    if counts.is_some_and(|counts| counts.stuck > 0) {
        let Finding { reason, message, .. } = stuck(observed, counts);
        return Progress::Ready(reason, format!("{runs}; {message}"));
    }
    match status.problems.first() {
        Some(problem) => Progress::ready(problem.reason, problem.message.clone()),
        None => Progress::ready(Reason::Ready, runs),
    }
}

/// `Accepted`, with the version that stays in force while the spec is not.
fn accepted(planned: &Result<Defined, Rejection>, applied: &Applied, counts: Option<&SagaCounts>) -> Finding {
    let mut finding = progress::accepted(planned, applied);
    if let (Err(_), Some(SagaCounts { version, .. })) = (planned, counts)
        && !version.is_empty()
    {
        finding.message.push_str("; new instances start with the last good version, ");
        finding.message.push_str(version);
    }
    finding
}

/// Passes on how far the set-up of the orchestrator's database has come.
fn at_stage<R>(object: &Saga, observed: &Observed, use_stage: impl FnOnce(&Stage<'_>) -> R) -> R {
    let namespace = object.namespace().unwrap_or_default();
    stage(&namespace, &object.spec.orchestrator, &observed.orchestrator, |stage| use_stage(&stage))
}

/// `DatabaseReady`: the orchestrator's server answers.
fn database(observed: &Observed, stage: &Stage<'_>) -> Finding {
    store(&observed.orchestrator.database).ready(&observed.orchestrator.database, stage)
}

/// `Stuck`: instances wait for a person.
fn stuck(observed: &Observed, counts: Option<&SagaCounts>) -> Finding {
    if observed.orchestrator.status.is_none() {
        return Finding::new(
            Truth::Unknown,
            Reason::OrchestratorSilent,
            "the orchestrator does not report on its instances",
        );
    }
    let Some(counts) = counts.filter(|counts| counts.stuck > 0) else {
        return Finding::new(false, Reason::NoneStuck, "no instance waits for a person");
    };
    let oldest = counts.stuck_instances.first().map_or_else(
        String::new,
        |StuckInstance { id, step, operation, message, .. }| match operation.as_str() {
            // of a saga that is only watched
            REACT => format!("; the oldest, {id}: {message}"),
            _ => format!("; the oldest, {id}, cannot {operation} step `{step}`: {message}"),
        },
    );
    let waits =
        if counts.stuck == 1 { "1 instance waits".to_owned() } else { format!("{} instances wait", counts.stuck) };
    Finding::new(true, Reason::InstancesStuck, format!("{waits} for a person{oldest}"))
}

/// `StartEventSeen`: whether the event exists by which the Saga starts. A service that has just begun has emitted none yet, so
/// this is no error.
fn start_event(object: &Saga, counts: Option<&SagaCounts>) -> Option<Finding> {
    let start = object.spec.start_on.as_ref()?;
    let report = counts?.start.as_ref()?;
    let SagaEvent { service, event } = start;
    if report.seen? {
        return Some(Finding::new(true, Reason::Found, format!("`{service}` has published events of type `{event}`")));
    }
    let types: Vec<_> = report.types.iter().map(|known| format!("`{known}`")).collect();
    let others = match types.as_slice() {
        [] => "it has published no other type either".to_owned(),
        types => format!("those that the stream has are {}", types.join(", ")),
    };
    let message = format!("`{service}` has published no event of type `{event}` yet; {others}");
    Some(Finding::new(false, Reason::NoSuchEvent, message))
}

/// `AsDeclared`: whether the services of a choreographed saga emit what it says.
fn as_declared(object: &Saga, counts: Option<&SagaCounts>) -> Option<Finding> {
    let counts = counts.filter(|_| object.spec.style == SagaStyle::Choreography)?;
    if counts.findings.is_empty() {
        return Some(Finding::new(true, Reason::AsDeclared, "every event that was seen is declared, and came in time"));
    }
    let mut sentences: Vec<_> = counts.findings.iter().take(MAX_FINDINGS).map(finding_sentence).collect();
    let more = counts.findings.len().saturating_sub(MAX_FINDINGS);
    if more > 0 {
        sentences.push(format!("and {more} more"));
    }
    Some(Finding::new(false, Reason::NotAsDeclared, sentences.join("; ")))
}

/// How many findings the condition says.
const MAX_FINDINGS: usize = 3;

fn finding_sentence(found: &FindingCount) -> String {
    let FindingCount { finding, event: Kind { service, event }, cause, count } = found;
    let reaction = cause.as_ref().map(|cause| format!(" in reaction to {}", cause.event)).unwrap_or_default();
    let times = if *count == 1 { "once".to_owned() } else { format!("{count} times") };
    let what = match finding.as_str() {
        "late" => "later than the Saga allows",
        "repeated" => "although it had reacted already",
        _ => "which no reaction of the Saga declares",
    };
    format!("`{service}` emitted {event}{reaction} {times}, {what}")
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
