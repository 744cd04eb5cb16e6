//! Which Events a change of conditions is worth.

use k8s_openapi::{api::core::v1::ObjectReference, apimachinery::pkg::apis::meta::v1::Condition};

use super::conditions::{ACCEPTED, CONTESTED, DRIFTED, MIGRATED, READY, SLOT_AT_RISK, STUCK};

/// Something worth an Event.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    pub warning: bool,
    /// PascalCase.
    pub reason: String,
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
    reason: Option<&'static str>,
}

const REPORTED: [Reported; 10] = [
    Reported { condition: ACCEPTED, status: "True", warning: false, reason: Some("Accepted") },
    Reported { condition: ACCEPTED, status: "False", warning: true, reason: None },
    Reported { condition: READY, status: "True", warning: false, reason: Some("Ready") },
    Reported { condition: SLOT_AT_RISK, status: "True", warning: true, reason: Some("SlotAtRisk") },
    Reported { condition: SLOT_AT_RISK, status: "False", warning: false, reason: Some("SlotSafe") },
    Reported { condition: CONTESTED, status: "True", warning: true, reason: Some("Contested") },
    Reported { condition: DRIFTED, status: "True", warning: true, reason: Some("Drifted") },
    Reported { condition: STUCK, status: "True", warning: true, reason: Some("SagaStuck") },
    Reported { condition: STUCK, status: "False", warning: false, reason: Some("SagaUnstuck") },
    Reported { condition: MIGRATED, status: "False", warning: true, reason: Some("MigrationFailed") },
];

/// The Events that a change of conditions is worth.
pub fn of_change(before: &[Condition], after: &[Condition]) -> Vec<Notice> {
    let mut notices = Vec::new();
    for reported in &REPORTED {
        let Some(now) = after.iter().find(|condition| condition.type_ == reported.condition) else { continue };
        let was = before.iter().find(|condition| condition.type_ == reported.condition);
        // the good half of a pair is news only after the bad half; `Ready` always is, and says that all the others are good
        let never_bad =
            !reported.warning && reported.condition != READY && was.is_none_or(|was| was.status == "Unknown");
        let is_failure = reported.condition != MIGRATED || reported.status != "False" || now.reason.contains("Failed");
        let moved = was.is_none_or(|was| was.status != now.status || (reported.warning && was.reason != now.reason));
        if now.status == reported.status && moved && !never_bad && is_failure {
            let reason = reported.reason.map_or_else(|| now.reason.clone(), str::to_owned);
            notices.push(Notice { warning: reported.warning, reason, message: now.message.clone(), related: None });
        }
    }
    // `Ready` that is lost, though nobody changed the spec
    let ready_before = before.iter().find(|condition| condition.type_ == READY && condition.status == "True");
    if let Some(was) = ready_before
        && let Some(ready) = after.iter().find(|condition| condition.type_ == READY && condition.status == "False")
        && ready.observed_generation == was.observed_generation
    {
        notices.push(Notice {
            warning: true,
            reason: ready.reason.clone(),
            message: ready.message.clone(),
            related: None,
        });
    }
    notices
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::controllers::status::conditions::Conditions;

    fn conditions(list: &[(&str, bool, &str)]) -> Vec<Condition> {
        let mut conditions = Conditions::new(&[], None, Timestamp::UNIX_EPOCH);
        for (type_, status, reason) in list {
            conditions.set(type_, *status, reason, "a sentence");
        }
        conditions.finish()
    }

    fn reasons(before: &[(&str, bool, &str)], after: &[(&str, bool, &str)]) -> Vec<String> {
        of_change(&conditions(before), &conditions(after)).into_iter().map(|notice| notice.reason).collect()
    }

    #[test]
    fn a_change_is_reported_once_and_calm_is_not_news() {
        let calm = [(ACCEPTED, true, "Accepted"), (MIGRATED, true, "Migrated"), (STUCK, false, "NoneStuck")];
        assert_eq!(reasons(&[], &calm), Vec::<String>::new());
        assert_eq!(reasons(&[(ACCEPTED, false, "OutboxTaken")], &[(ACCEPTED, true, "Accepted")]), ["Accepted"]);
        assert_eq!(reasons(&[(READY, false, "Starting")], &[(READY, true, "Ready")]), ["Ready"]);
        assert_eq!(reasons(&[(STUCK, false, "NoneStuck")], &[(STUCK, true, "Stuck")]), ["SagaStuck"]);
        assert_eq!(reasons(&[(STUCK, true, "Stuck")], &[(STUCK, false, "NoneStuck")]), ["SagaUnstuck"]);
        assert_eq!(reasons(&[(ACCEPTED, true, "Accepted")], &[(ACCEPTED, true, "Accepted")]), Vec::<String>::new());
        assert_eq!(
            reasons(&[(ACCEPTED, false, "TwoRelays")], &[(ACCEPTED, false, "UnknownService")]),
            ["UnknownService"]
        );
    }

    #[test]
    fn a_running_migration_is_not_a_failed_one() {
        assert_eq!(reasons(&[], &[(MIGRATED, false, "Migrating")]), Vec::<String>::new());
        assert_eq!(
            reasons(&[(MIGRATED, false, "Migrating")], &[(MIGRATED, false, "MigrationFailed")]),
            ["MigrationFailed"]
        );
    }

    #[test]
    fn readiness_that_is_lost_is_a_warning() {
        assert_eq!(reasons(&[(READY, true, "Ready")], &[(READY, false, "CrashLooping")]), ["CrashLooping"]);
        assert_eq!(reasons(&[(READY, false, "Starting")], &[(READY, false, "CrashLooping")]), Vec::<String>::new());
    }
}
