//! The progress of an object: one finding becomes `Ready`, `Reconciling` and `Stalled`, as kstatus reads them.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;

use super::conditions::{
    ACCEPTED, CONTESTED, Conditions, DATABASE_READY, DRIFTED, MIGRATED, READY, RECONCILING, STALLED, Truth, status_of,
};
use crate::controllers::resources::{
    observed::{Problem, Workload},
    outcome::{ADMISSION, Applied, Class, Failure, ForeignChange},
    plan::Rejection,
    reason::Reason,
};

/// A condition's status with its reason and its sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    pub truth: Truth,
    pub reason: Reason,
    pub message: String,
}

impl Finding {
    pub fn new(truth: impl Into<Truth>, reason: impl Into<Reason>, message: impl Into<String>) -> Self {
        Self { truth: truth.into(), reason: reason.into(), message: message.into() }
    }

    pub fn set(&self, type_: &str, conditions: &mut Conditions<'_>) {
        conditions.set(type_, self.truth, self.reason, &self.message);
    }

    /// The finding as what the object waits for, unless it is good.
    pub fn blocking(self) -> Option<Progress> {
        (self.truth != Truth::True).then_some(Progress::Waiting(self.reason, self.message))
    }
}

impl From<&Problem> for Finding {
    fn from(problem: &Problem) -> Self {
        Self::new(false, problem.reason, problem.message.clone())
    }
}

/// How far an object has come, with a reason and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    Ready(Reason, String),
    /// It gets there by itself, or once something that it waits for comes.
    Waiting(Reason, String),
    /// Only a change of its spec, or of what it names, gets it further.
    Stalled(Reason, String),
}

impl Progress {
    pub fn ready(reason: impl Into<Reason>, message: impl Into<String>) -> Self {
        Self::Ready(reason.into(), message.into())
    }

    pub fn waiting(reason: impl Into<Reason>, message: impl Into<String>) -> Self {
        Self::Waiting(reason.into(), message.into())
    }

    /// Sets `Ready`, `Reconciling` and `Stalled`, in this order.
    pub fn set(&self, conditions: &mut Conditions<'_>) {
        let (Self::Ready(reason, message) | Self::Waiting(reason, message) | Self::Stalled(reason, message)) = self;
        let (ready, waiting, stalled) =
            (matches!(self, Self::Ready(..)), matches!(self, Self::Waiting(..)), matches!(self, Self::Stalled(..)));
        conditions.set(READY, ready, *reason, message);
        let (reconciling, because) = if waiting { (*reason, message.as_str()) } else { (Reason::Settled, "") };
        conditions.set(RECONCILING, waiting, reconciling, because);
        let (stalling, because) = if stalled { (*reason, message.as_str()) } else { (Reason::NotStalled, "") };
        conditions.set(STALLED, stalled, stalling, because);
    }
}

/// A change of conditions by which nothing happened but that a roll-out, which goes on, came further.
pub fn is_on_the_way(was: &[Condition], is: &[Condition]) -> bool {
    let goes_on = |conditions| status_of(conditions, READY) == Some("False");
    let mut moved = is.iter().filter(|condition| !was.contains(condition));
    goes_on(was)
        && goes_on(is)
        && was.iter().all(|condition| status_of(is, &condition.type_).is_some())
        && moved.all(|condition| {
            matches!(condition.type_.as_str(), READY | RECONCILING | DATABASE_READY | MIGRATED)
                && Reason::parse(&condition.reason).is_some_and(Reason::is_progress)
        })
}

/// A rejection stalls, unless it ends by itself.
impl From<&Rejection> for Progress {
    fn from(rejection: &Rejection) -> Self {
        let (reason, message) = (rejection.reason, rejection.message.clone());
        if reason.is_waited_for() { Self::Waiting(reason, message) } else { Self::Stalled(reason, message) }
    }
}

/// `Accepted`: whether the spec can be planned, and then whether the API server accepts the children that it became.
pub fn accepted<T>(planned: &Result<T, Rejection>, applied: &Applied) -> Finding {
    match planned {
        Ok(_) => match first(applied, Class::Invalid) {
            Some(Failure { reason, message, .. }) => Finding::new(false, *reason, message),
            None => Finding::new(true, Reason::Accepted, "the spec is valid"),
        },
        Err(Rejection { reason, message }) => Finding::new(false, *reason, message),
    }
}

/// Sets [`accepted`].
pub fn set_accepted<T>(planned: &Result<T, Rejection>, applied: &Applied, conditions: &mut Conditions<'_>) {
    accepted(planned, applied).set(ACCEPTED, conditions);
}

/// The failure of that class that is reported: always the same one, whatever the order of the writes.
fn first(applied: &Applied, class: Class) -> Option<&Failure> {
    applied.failures.iter().filter(|failure| failure.reason.class() == class).min_by_key(|failure| &failure.child)
}

/// Sets `Contested` and `Drifted` while somebody else writes what Weft planned, or beside it.
pub fn set_foreign(applied: &Applied, conditions: &mut Conditions<'_>) {
    let line = |one: &ForeignChange| format!("{}: {} by {}", one.child, one.fields.join(", "), one.author);
    let list = |changes: &[&ForeignChange]| changes.iter().map(|one| line(one)).collect::<Vec<_>>().join("; ");
    let (admission, others): (Vec<_>, Vec<_>) = applied.contested.iter().partition(|one| one.author == ADMISSION);
    let mut contests = Vec::new();
    if !others.is_empty() {
        let who = list(&others);
        contests.push(format!("what Weft declares is changed as often as it is put back: {who}. Weft now waits longer between repairs; stop the other one, or declare what it wants (for the number of pods: spec.autoscaling)"));
    }
    if !admission.is_empty() {
        let who = list(&admission);
        contests.push(format!("what Weft writes is stored otherwise: {who}. Exempt what Weft writes from it, or declare what it wants; Weft writes it again with growing pauses"));
    }
    if !contests.is_empty() {
        conditions.set(CONTESTED, true, Reason::ChangedByOthers, contests.join("; "));
    }
    if !applied.added.is_empty() {
        let who = list(&applied.added.iter().collect::<Vec<_>>());
        conditions.set(
            DRIFTED,
            true,
            Reason::AddedByOthers,
            format!(
                "there is more than Weft declares, and Weft leaves it: {who}. Remove it, or declare it in this object"
            ),
        );
    }
}

/// What could not be written: first what only a person can mend.
pub fn not_applied(applied: &Applied) -> Option<Progress> {
    let worst = [Class::Fatal, Class::Invalid, Class::Retry].into_iter().find_map(|class| first(applied, class))?;
    let (reason, message) = (worst.reason, worst.message.clone());
    Some(match reason.class() {
        Class::Retry => Progress::Waiting(reason, message),
        Class::Invalid | Class::Fatal => Progress::Stalled(reason, message),
    })
}

/// What keeps a Deployment or StatefulSet from being as wanted; `what` names it, such as `the service`.
pub fn not_rolled_out(live: Option<&Workload>, what: &str) -> Option<Progress> {
    let Some(live) = live else { return Some(Progress::waiting(Reason::Creating, format!("{what} is being made"))) };
    if live.is_rolled_out() {
        return None;
    }
    if let Some(problem) = live.problems.first() {
        return Some(Progress::waiting(problem.reason, problem.message.clone()));
    }
    Some(Progress::waiting(Reason::RollingOut, format!("{what}: {}", rollout(live))))
}

/// How far a rollout is that nothing keeps from going on.
fn rollout(live: &Workload) -> String {
    if live.observed_generation < live.generation {
        return "Kubernetes has not begun with the newest version yet".to_owned();
    }
    // a pod that is ready may be of the version before: those are as many as are not of the newest
    let old = (live.replicas - live.updated).max(0);
    let fresh = (live.ready - old).clamp(0, live.updated);
    if fresh >= live.wanted && live.replicas > live.wanted {
        let ending = live.replicas - live.wanted;
        return format!("all pods of the newest version are ready; {ending} older or superfluous ones are ending");
    }
    let serving = if old > 0 && live.ready > 0 { "; pods of the version before go on serving" } else { "" };
    format!("{fresh} of {} pods of the newest version are ready{serving}", live.wanted)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;

    /// Conditions of an object with a database of which `set_up` is `Migrated`.
    fn conditions(progress: &Progress, set_up: &Finding) -> Vec<Condition> {
        let mut conditions = Conditions::new(&[], Some(1), Timestamp::UNIX_EPOCH);
        progress.set(&mut conditions);
        set_up.set(MIGRATED, &mut conditions);
        conditions.finish()
    }

    #[test]
    fn stages_of_a_roll_out_are_progress_and_causes_and_readiness_are_not() {
        let runs = Finding::new(false, Reason::SetupRunning, "it runs");
        let done = Finding::new(true, Reason::Migrated, "it is done");
        let failed = Finding::new(false, Reason::SetupFailed, "001.sql: syntax error");
        let waits = |reason| Progress::waiting(reason, "a sentence");
        let first = conditions(&waits(Reason::Starting), &runs);
        let is_progress = |next: &[Condition]| is_on_the_way(&first, next);
        assert!(is_progress(&conditions(&waits(Reason::RollingOut), &done)));
        assert!(is_progress(&conditions(&Progress::waiting(Reason::Starting, "another sentence"), &runs)));
        assert!(!is_progress(&conditions(&Progress::ready(Reason::Ready, "all are ready"), &done)));
        assert!(!is_progress(&conditions(&waits(Reason::CrashLooping), &done)));
        assert!(!is_progress(&conditions(&Progress::Stalled(Reason::SetupFailed, "no".to_owned()), &failed)));
        assert!(!is_progress(&conditions(&waits(Reason::Starting), &failed)));
        assert!(!is_progress(&first[..3]), "a condition is gone");
        let ready = conditions(&Progress::ready(Reason::Ready, "all are ready"), &done);
        assert!(!is_on_the_way(&ready, &conditions(&waits(Reason::RollingOut), &done)), "readiness is lost");
        let stalled = conditions(&Progress::Stalled(Reason::SetupFailed, "no".to_owned()), &failed);
        assert!(!is_on_the_way(&stalled, &first), "somebody corrected it, and waits for the answer");
    }

    fn live(wanted: i32, replicas: i32, updated: i32, ready: i32) -> Workload {
        Workload { wanted, replicas, updated, ready, ..Workload::default() }
    }

    #[test]
    fn only_pods_of_the_newest_version_count() {
        let serving = "; pods of the version before go on serving";
        let expected = format!("0 of 1 pods of the newest version are ready{serving}");
        assert_eq!(rollout(&live(1, 2, 1, 1)), expected, "v1 serves and v2 is not ready");
        assert_eq!(rollout(&live(2, 2, 2, 1)), "1 of 2 pods of the newest version are ready");
        assert!(rollout(&live(3, 4, 2, 4)).starts_with("2 of 3"));
    }

    #[test]
    fn what_is_not_done_when_all_are_ready_is_named() {
        assert!(rollout(&live(2, 3, 3, 3)).starts_with("all pods of the newest version are ready; 1 "));
        let unseen = Workload { generation: 2, observed_generation: 1, ..live(1, 1, 1, 1) };
        assert_eq!(rollout(&unseen), "Kubernetes has not begun with the newest version yet");
    }
}
