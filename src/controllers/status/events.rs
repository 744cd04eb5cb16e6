//! Which Events a change of conditions is worth.

use k8s_openapi::{api::core::v1::ObjectReference, apimachinery::pkg::apis::meta::v1::Condition};

use super::conditions::{
    ACCEPTED, AS_DECLARED, CONSUMING, CONTESTED, DRIFTED, MIGRATED, READY, SLOT_AT_RISK, SLOT_REMAINS, STUCK,
};
use crate::{contract::problem::ProblemReason, controllers::resources::reason::Reason};

/// Something worth an Event.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    pub warning: bool,
    pub reason: Reason,
    pub message: String,
    /// Another object that it is about; notices about different ones are never merged.
    pub related: Option<ObjectReference>,
}

/// Conditions whose change is an Event: when they become `True` or `False`, is that a warning, and which reason does it have?
/// `None` for the reason: the condition's own.
struct Reported {
    condition: &'static str,
    status: &'static str,
    warning: bool,
    reason: Option<Reason>,
}

const REPORTED: [Reported; 13] = [
    Reported { condition: ACCEPTED, status: "True", warning: false, reason: Some(Reason::Accepted) },
    Reported { condition: ACCEPTED, status: "False", warning: true, reason: None },
    Reported { condition: READY, status: "True", warning: false, reason: Some(Reason::Ready) },
    Reported {
        condition: SLOT_AT_RISK,
        status: "True",
        warning: true,
        reason: Some(Reason::DataPlane(ProblemReason::SlotAtRisk)),
    },
    Reported { condition: SLOT_AT_RISK, status: "False", warning: false, reason: Some(Reason::SlotSafe) },
    Reported { condition: CONTESTED, status: "True", warning: true, reason: Some(Reason::Contested) },
    Reported { condition: DRIFTED, status: "True", warning: true, reason: Some(Reason::Drifted) },
    Reported { condition: STUCK, status: "True", warning: true, reason: Some(Reason::SagaStuck) },
    Reported { condition: STUCK, status: "False", warning: false, reason: Some(Reason::SagaUnstuck) },
    Reported { condition: MIGRATED, status: "False", warning: true, reason: Some(Reason::MigrationFailed) },
    Reported { condition: CONSUMING, status: "False", warning: true, reason: None },
    Reported { condition: AS_DECLARED, status: "False", warning: true, reason: None },
    Reported { condition: SLOT_REMAINS, status: "True", warning: true, reason: None },
];

/// The Events that a change of conditions is worth.
pub fn of_change(before: &[Condition], after: &[Condition]) -> Vec<Notice> {
    let mut notices = Vec::new();
    for reported in &REPORTED {
        let Some(now) = after.iter().find(|condition| condition.type_ == reported.condition) else { continue };
        let Some(reason) = Reason::parse(&now.reason) else { continue };
        let was = before.iter().find(|condition| condition.type_ == reported.condition);
        // the good half of a pair is news only after the bad half. `Ready` says that all the others are good, so it is news but
        // for the one who applied the object and reads its status
        let never_bad = !reported.warning
            && if reported.condition == READY {
                is_first_roll_out(before)
            } else {
                was.is_none_or(|was| was.status == "Unknown")
            };
        let is_failure = match (reported.condition, reported.status) {
            (MIGRATED, "False") => reason.is_failed_set_up(),
            (CONSUMING, "False") => !reason.is_progress(),
            _ => true,
        };
        let moved = was.is_none_or(|was| was.status != now.status || (reported.warning && was.reason != now.reason));
        if now.status == reported.status && moved && !never_bad && is_failure {
            let reason = reported.reason.unwrap_or(reason);
            notices.push(Notice { warning: reported.warning, reason, message: now.message.clone(), related: None });
        }
    }
    // `Ready` that is lost, though nobody changed the spec
    let ready_before = before.iter().find(|condition| condition.type_ == READY && condition.status == "True");
    if let Some(was) = ready_before
        && let Some(ready) = after.iter().find(|condition| condition.type_ == READY && condition.status == "False")
        && ready.observed_generation == was.observed_generation
        && let Some(reason) = Reason::parse(&ready.reason)
    {
        notices.push(Notice { warning: true, reason, message: ready.message.clone(), related: None });
    }
    notices
}

/// These conditions are of a new object that was never ready, and nothing but progress was reported of it. `Ready` has been what it
/// is for as long as any condition.
fn is_first_roll_out(conditions: &[Condition]) -> bool {
    let Some(ready) = conditions.iter().find(|condition| condition.type_ == READY) else { return true };
    ready.status == "False"
        && ready.observed_generation == Some(1)
        && Reason::parse(&ready.reason).is_some_and(Reason::is_progress)
        && conditions.iter().all(|one| one.last_transition_time.0 >= ready.last_transition_time.0)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::controllers::status::conditions::Conditions;

    fn conditions(list: &[(&str, bool, Reason)]) -> Vec<Condition> {
        let mut conditions = Conditions::new(&[], None, Timestamp::UNIX_EPOCH);
        for (type_, status, reason) in list {
            conditions.set(type_, *status, *reason, "a sentence");
        }
        conditions.finish()
    }

    fn reasons(before: &[(&str, bool, Reason)], after: &[(&str, bool, Reason)]) -> Vec<Reason> {
        of_change(&conditions(before), &conditions(after)).into_iter().map(|notice| notice.reason).collect()
    }

    #[test]
    fn a_change_is_reported_once_and_calm_is_not_news() {
        let calm =
            [(ACCEPTED, true, Reason::Accepted), (MIGRATED, true, Reason::Migrated), (STUCK, false, Reason::NoneStuck)];
        assert_eq!(reasons(&[], &calm), Vec::<Reason>::new());
        assert_eq!(
            reasons(&[(ACCEPTED, false, Reason::OutboxTaken)], &[(ACCEPTED, true, Reason::Accepted)]),
            [Reason::Accepted]
        );
        assert_eq!(
            reasons(&[(STUCK, false, Reason::NoneStuck)], &[(STUCK, true, Reason::InstancesStuck)]),
            [Reason::SagaStuck]
        );
        assert_eq!(
            reasons(&[(STUCK, true, Reason::InstancesStuck)], &[(STUCK, false, Reason::NoneStuck)]),
            [Reason::SagaUnstuck]
        );
        assert_eq!(
            reasons(&[(ACCEPTED, true, Reason::Accepted)], &[(ACCEPTED, true, Reason::Accepted)]),
            Vec::<Reason>::new()
        );
        assert_eq!(
            reasons(&[(ACCEPTED, false, Reason::OutboxTaken)], &[(ACCEPTED, false, Reason::NoDatabase)]),
            [Reason::NoDatabase]
        );
    }

    #[test]
    fn a_first_roll_out_that_goes_well_is_no_event_and_every_other_readiness_is() {
        let at = |generation, seconds, list: &[(&str, bool, Reason)]| {
            let moment = Timestamp::from_second(seconds).unwrap();
            let mut conditions = Conditions::new(&[], Some(generation), moment);
            for (type_, status, reason) in list {
                conditions.set(type_, *status, *reason, "a sentence");
            }
            conditions.finish()
        };
        let ready = at(1, 9, &[(READY, true, Reason::Ready)]);
        let is_event = |before: &[Condition]| !of_change(before, &ready).is_empty();
        assert!(!is_event(&[]));
        assert!(!is_event(&at(1, 0, &[(ACCEPTED, true, Reason::Accepted), (READY, false, Reason::Starting)])));
        assert!(is_event(&at(1, 0, &[(READY, false, Reason::CrashLooping)])), "something was wrong");
        assert!(is_event(&at(2, 0, &[(READY, false, Reason::RollingOut)])), "another version");
        let mut lost = at(1, 0, &[(ACCEPTED, true, Reason::Accepted)]);
        lost.extend(at(1, 5, &[(READY, false, Reason::RollingOut)]));
        assert!(is_event(&lost), "it was ready before");
    }

    #[test]
    fn a_running_migration_is_not_a_failed_one() {
        assert_eq!(reasons(&[], &[(MIGRATED, false, Reason::SetupRunning)]), Vec::<Reason>::new());
        assert_eq!(
            reasons(&[(MIGRATED, false, Reason::SetupRunning)], &[(MIGRATED, false, Reason::SetupFailed)]),
            [Reason::MigrationFailed]
        );
    }

    #[test]
    fn readiness_that_is_lost_is_a_warning() {
        assert_eq!(
            reasons(&[(READY, true, Reason::Ready)], &[(READY, false, Reason::CrashLooping)]),
            [Reason::CrashLooping]
        );
        assert_eq!(
            reasons(&[(READY, false, Reason::Starting)], &[(READY, false, Reason::CrashLooping)]),
            Vec::<Reason>::new()
        );
    }
}
