//! The status of a Microservice.

use jiff::Timestamp;

use super::{
    Observed,
    plan::{self, OWNER_KIND},
};
use crate::{
    api::v1alpha1::{Binding, DatabaseStatus, Microservice, MicroserviceStatus, MicroserviceSummary, SharedWith},
    contract::status::{InboxStatus, SubscriptionStatus},
    controllers::{
        database::{Stage, placement, status as database_status},
        render::owner::Owner,
        resources::{
            labels::Component,
            observed::Workload,
            outcome::Applied,
            plan::{Plan, Rejection},
            reason::Reason,
        },
        status::{
            conditions::{
                CONSUMING, Conditions, DATABASE_READY, DEPENDENCIES_FOUND, MIGRATED, SHARED_DATABASE, SLOT_REMAINS,
                Truth,
            },
            progress::{Finding, Progress, not_applied, not_rolled_out, set_accepted, set_foreign},
        },
    },
};

pub fn status(
    object: &Microservice,
    observed: &Observed,
    planned: &Result<Plan, Rejection>,
    applied: &Applied,
    now: Timestamp,
) -> MicroserviceStatus {
    let previous = object.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
    let mut conditions = Conditions::new(previous, object.metadata.generation, now);
    plan::stage(object, observed, |stage| {
        progress(object, observed, planned, applied, stage.as_ref()).set(&mut conditions);
        set_accepted(planned, applied, &mut conditions);
        if let Some(stage) = &stage
            && let Some(ready) = database_ready(object, observed, stage)
        {
            ready.set(DATABASE_READY, &mut conditions);
            database_status::migrated(stage).set(MIGRATED, &mut conditions);
        }
    });
    if let Some((job, message)) = plan::remaining_slot(object, observed) {
        database_status::slot_remains(job.as_deref(), message).set(SLOT_REMAINS, &mut conditions);
    }
    if let Some(shared) = shared(object, observed) {
        shared.set(SHARED_DATABASE, &mut conditions);
    }
    if let Some(finding) = dependencies(object, observed) {
        finding.set(DEPENDENCIES_FOUND, &mut conditions);
    }
    if let Some(finding) = consuming(object, observed) {
        finding.set(CONSUMING, &mut conditions);
    }
    set_foreign(applied, &mut conditions);
    let owner = Owner::of(object, OWNER_KIND);
    MicroserviceStatus {
        observed_generation: object.metadata.generation,
        conditions: conditions.finish(),
        replicas: observed.deployment.as_ref().map_or(0, |live| live.replicas),
        selector: Some(selector(&owner)),
        database: database_of(object, observed, &owner),
        binding: object.spec.database.as_ref().map(|database| {
            let (name, _) = placement(database).binding(&owner.name, "");
            Binding { name }
        }),
        summary: Some(summary(object, observed)),
        applied_hash: if planned.is_ok() {
            applied.digest.clone()
        } else {
            object.status.as_ref().and_then(|status| status.applied_hash.clone())
        },
    }
}

fn progress(
    object: &Microservice,
    observed: &Observed,
    planned: &Result<Plan, Rejection>,
    applied: &Applied,
    stage: Option<&Stage<'_>>,
) -> Progress {
    if let Err(rejection) = planned {
        return rejection.into();
    }
    let live = observed.deployment.as_ref();
    if object.spec.suspend {
        return suspended(observed);
    }
    let database = stage
        .and_then(|stage| database_status::progress(&database_ready(object, observed, stage)?, stage))
        .map(|progress| with_old_version(progress, observed, stage));
    // whoever takes over is to know that it settles, whatever else is not ready
    not_applied(applied)
        .or_else(|| planned.as_ref().ok().and_then(settling))
        .or(database)
        .or_else(|| not_rolled_out(live, "the service"))
        .unwrap_or_else(|| Progress::ready(Reason::Ready, format!("{} of {0} pods are ready", wanted(object, live))))
}

/// How many pods there should be: an autoscaler's number is on the Deployment.
fn wanted(object: &Microservice, live: Option<&Workload>) -> i32 {
    match (&object.spec.autoscaling, live) {
        (None, _) => object.spec.replicas,
        (Some(scaling), None) => scaling.min,
        (Some(_), Some(live)) => live.wanted,
    }
}

/// The status is of a version that still waited for a change of its migrations.
pub(super) fn is_settling(status: &MicroserviceStatus) -> bool {
    status.conditions.iter().any(|condition| condition.reason == Reason::Settling.as_str())
}

/// The set-up is done, and a new pod template still waits for a change of the migrations.
fn settling(plan: &Plan) -> Option<Progress> {
    plan.recheck_in.map(|_| {
        let message =
            "the new version starts within three seconds, unless the ConfigMap of its migrations changes first";
        Progress::waiting(Reason::Settling, message)
    })
}

/// Nothing is reconciled: only the present state is reported.
fn suspended(observed: &Observed) -> Progress {
    const SAID: &str = "spec.suspend is true: nothing is reconciled until it is false";
    match not_rolled_out(observed.deployment.as_ref(), "the service") {
        None => Progress::ready(Reason::Suspended, SAID),
        Some(Progress::Ready(_, why) | Progress::Waiting(_, why) | Progress::Stalled(_, why)) => {
            Progress::waiting(Reason::Suspended, format!("{SAID}; {why}"))
        }
    }
}

/// While a set-up does not succeed, the version that runs goes on.
fn with_old_version(progress: Progress, observed: &Observed, stage: Option<&Stage<'_>>) -> Progress {
    let serves = observed.deployment.as_ref().is_some_and(|live| live.ready > 0);
    match (progress, stage) {
        (Progress::Stalled(reason, message), Some(Stage::Failed { .. })) if serves => {
            Progress::Stalled(reason, format!("{message}; the version that runs goes on serving"))
        }
        (progress, _) => progress,
    }
}

/// `None` when nothing is depended on.
fn dependencies(object: &Microservice, observed: &Observed) -> Option<Finding> {
    let wanted = || object.spec.depends_on.iter().map(|dependency| &dependency.service);
    if let Some(service) = observed.unreadable.first() {
        let Rejection { reason, message } = Rejection::microservice_malformed("spec.dependsOn", service);
        return Some(Finding::new(false, reason, message));
    }
    let missing: Vec<_> = wanted()
        .filter(|service| !observed.dependencies.contains_key(*service))
        .map(|service| format!("`{service}`"))
        .collect();
    wanted().next()?;
    Some(if missing.is_empty() {
        Finding::new(true, Reason::Found, "every Microservice of spec.dependsOn exists")
    } else {
        let message = format!(
            "spec.dependsOn: there is no Microservice {} in this namespace yet: apply it, or correct the name",
            missing.join(", ")
        );
        Finding::new(false, Reason::MicroserviceNotFound, message)
    })
}

/// `None` when nothing is consumed.
fn consuming(object: &Microservice, observed: &Observed) -> Option<Finding> {
    if object.spec.consumes.is_empty() {
        return None;
    }
    let found = |truth: Truth, reason: Reason, message: String| Some(Finding::new(truth, reason, message));
    if let Some(Rejection { reason, message }) = observed.inbox_wanted.missing.clone() {
        return found(Truth::False, reason, message);
    }
    // one that reports may be of the former pod
    let stopped = observed.inbox_deployment.as_ref().filter(|live| !live.is_rolled_out());
    if let Some(problem) = stopped.and_then(|live| live.problems.first()) {
        return found(Truth::False, problem.reason, problem.message.clone());
    }
    let Some(inbox) = inbox(observed) else {
        let problem = observed.inbox_deployment.as_ref().and_then(|live| live.problems.first());
        let reported = observed.inbox_pods.values().flatten().flat_map(|status| &status.problems).next();
        return match (problem, reported) {
            (_, Some(problem)) => found(Truth::False, problem.reason.into(), problem.message.clone()),
            (Some(problem), None) => found(Truth::False, problem.reason, problem.message.clone()),
            (None, None) => {
                found(Truth::Unknown, Reason::InboxSilent, "the inbox has not reported its status yet".to_owned())
            }
        };
    };
    if observed.inbox_wanted.version.as_ref() != Some(&inbox.contract) {
        let message = "the inbox has not read its new contract yet, which takes up to a minute and a half";
        return found(Truth::Unknown, Reason::Loading, message.to_owned());
    }
    match inbox.problems.first() {
        // others are consumed while an event is refused, or a stream is waited for
        Some(problem) => found(inbox.ready.into(), problem.reason.into(), problem.message.clone()),
        None => {
            found(Truth::True, Reason::Consuming, "every subscription is read, and its events are handled".to_owned())
        }
    }
}

/// What the inbox that leads reports.
fn inbox(observed: &Observed) -> Option<&InboxStatus> {
    observed.inbox_pods.values().flatten().find(|status| status.leading)
}

fn selector(owner: &Owner) -> String {
    let labels = owner.selector(Component::Service);
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

fn database_of(object: &Microservice, observed: &Observed, owner: &Owner) -> Option<DatabaseStatus> {
    object.spec.database.as_ref().map(|database| DatabaseStatus {
        set_up: observed.database.recorded.clone(),
        ..placement(database).status(owner)
    })
}

fn database_ready(object: &Microservice, observed: &Observed, stage: &Stage<'_>) -> Option<Finding> {
    object.spec.database.as_ref().map(|database| placement(database).ready(&observed.database, stage))
}

/// `SharedDatabase`: several services depend on one database, and so on each other.
fn shared(object: &Microservice, observed: &Observed) -> Option<Finding> {
    let found = |message: String| Some(Finding::new(true, Reason::SharedDatabase, message));
    let written = |tables: &[String]| match tables {
        [] => String::new(),
        tables => format!("; both this service and another one may write {}", tables.join(", ")),
    };
    let set_up = observed.database.recorded.as_ref();
    let written = written(set_up.map(|set_up| set_up.written_by_others.as_slice()).unwrap_or_default());
    let shared = object.spec.database.as_ref().and_then(|database| database.shared_with.as_ref());
    if let Some(SharedWith { service, schema, reads }) = shared {
        let reads = if reads.is_empty() { String::new() } else { format!(", and reads {}", reads.join(", ")) };
        return found(format!("the data is in the schema {schema} of the database of `{service}`{reads}{written}"));
    }
    let guests: Vec<_> = observed.guests().iter().map(|guest| format!("`{guest}`")).collect();
    if guests.is_empty() {
        return None;
    }
    found(format!("in this database are also {}, by their spec.database.sharedWith{written}", guests.join(", ")))
}

fn summary(object: &Microservice, observed: &Observed) -> MicroserviceSummary {
    let live = observed.deployment.as_ref();
    let (ready, wanted) = (live.map_or(0, |live| live.ready), wanted(object, live));
    let count = |of: fn(&SubscriptionStatus) -> u64| {
        let sum: u64 = inbox(observed)?.subscriptions.values().map(of).sum();
        i64::try_from(sum).ok()
    };
    let consumes = !object.spec.consumes.is_empty();
    // while nobody reports, the last numbers stay
    let last = object.status.as_ref().and_then(|status| status.summary.clone()).unwrap_or_default();
    MicroserviceSummary {
        consumed: count(|subscription| subscription.consumed).or(last.consumed).filter(|_| consumes),
        waiting: count(|subscription| subscription.waiting).or(last.waiting).filter(|_| consumes),
        // during a roll-out there are more than are wanted
        replicas: format!("{}/{wanted}", ready.min(wanted)),
        database: object.spec.database.as_ref().map(|database| placement(database).summary()),
    }
}

#[cfg(test)]
#[path = "status_tests.rs"]
mod tests;
