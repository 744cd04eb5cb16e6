//! Which Events a change of conditions is worth.

use k8s_openapi::{api::core::v1::ObjectReference, apimachinery::pkg::apis::meta::v1::Condition};

use super::conditions::{ACCEPTED, MIGRATED, READY, SLOT_AT_RISK, STUCK};

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
struct Told {
    condition: &'static str,
    status: &'static str,
    warning: bool,
    reason: Option<&'static str>,
}

const TOLD: [Told; 9] = [
    Told { condition: ACCEPTED, status: "True", warning: false, reason: Some("Accepted") },
    Told { condition: ACCEPTED, status: "False", warning: true, reason: None },
    Told { condition: MIGRATED, status: "True", warning: false, reason: Some("Migrated") },
    Told { condition: READY, status: "True", warning: false, reason: Some("Ready") },
    Told { condition: SLOT_AT_RISK, status: "True", warning: true, reason: Some("SlotAtRisk") },
    Told { condition: SLOT_AT_RISK, status: "False", warning: false, reason: Some("SlotSafe") },
    Told { condition: STUCK, status: "True", warning: true, reason: Some("SagaStuck") },
    Told { condition: STUCK, status: "False", warning: false, reason: Some("SagaUnstuck") },
    Told { condition: MIGRATED, status: "False", warning: true, reason: Some("MigrationFailed") },
];

/// The Events that a change of conditions is worth.
pub fn of_change(before: &[Condition], after: &[Condition]) -> Vec<Notice> {
    let mut notices = Vec::new();
    for told in &TOLD {
        let Some(now) = after.iter().find(|condition| condition.type_ == told.condition) else { continue };
        let was = before.iter().find(|condition| condition.type_ == told.condition);
        // the good half of a pair is news only after the bad half
        let never_bad = !told.warning
            && matches!(told.condition, SLOT_AT_RISK | STUCK)
            && was.is_none_or(|was| was.status != "True");
        let is_failure = told.condition != MIGRATED || told.status != "False" || now.reason.contains("Failed");
        let moved = was.is_none_or(|was| was.status != now.status || (told.warning && was.reason != now.reason));
        if now.status == told.status && moved && !never_bad && is_failure {
            let reason = told.reason.map_or_else(|| now.reason.clone(), str::to_owned);
            notices.push(Notice { warning: told.warning, reason, message: now.message.clone(), related: None });
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
    fn a_change_is_told_once_and_calm_is_not_news() {
        assert_eq!(reasons(&[], &[(ACCEPTED, true, "Accepted"), (STUCK, false, "NoneStuck")]), ["Accepted"]);
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
