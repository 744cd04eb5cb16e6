//! Counts of what is watched, by saga: read from the database when the tracker begins, then changed with every commit.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::row::{Counted, FindingKey};
use crate::contract::status::{FindingCount, SagaCounts, StuckInstance};

/// Maximum number of findings in the status.
const MAX_FINDINGS: usize = 10;

#[derive(Debug, Default)]
pub(super) struct Counts(Mutex<BTreeMap<String, (Counted, Vec<StuckInstance>)>>);

impl Counts {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, (Counted, Vec<StuckInstance>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No commit of this process may be in progress.
    pub(super) fn set(&self, counts: BTreeMap<String, Counted>) {
        *self.lock() = counts.into_iter().map(|(saga, counted)| (saga, (counted, Vec::new()))).collect();
    }

    pub(super) fn add(&self, changes: &BTreeMap<String, Counted>) {
        let mut counts = self.lock();
        for (saga, change) in changes {
            counts.entry(saga.clone()).or_default().0.add(change, 1);
        }
    }

    /// The sagas of which instances are stuck, or were when [`Self::set_stuck`] was last called.
    pub(super) fn stuck(&self) -> Vec<String> {
        let counts = self.lock();
        let is_stuck =
            |(counted, instances): &(Counted, Vec<StuckInstance>)| counted.stuck > 0 || !instances.is_empty();
        counts.iter().filter(|(_, counts)| is_stuck(counts)).map(|(saga, _)| saga.clone()).collect()
    }

    pub(super) fn set_stuck(&self, saga: &str, instances: Vec<StuckInstance>) {
        if let Some((_, stuck)) = self.lock().get_mut(saga) {
            *stuck = instances;
        }
    }

    /// Adds what is counted of `saga` to `status`. Of a saga that is not followed any more, only what has ended.
    pub(super) fn report(&self, saga: &str, is_followed: bool, status: &mut SagaCounts) {
        let counts = self.lock();
        let Some((counted, stuck)) = counts.get(saga) else { return };
        let number = |count: i64| u64::try_from(count).unwrap_or(0);
        status.completed += number(counted.completed);
        status.compensated += number(counted.compensated);
        if is_followed {
            status.running += number(counted.running);
            status.compensating += number(counted.compensating);
            status.stuck += number(counted.stuck);
            status.stuck_instances.extend(stuck.iter().cloned());
            status.findings = findings(&counted.findings);
        }
    }

    /// The sagas of which something is counted.
    pub(super) fn sagas(&self) -> Vec<String> {
        self.lock().keys().cloned().collect()
    }
}

fn findings(counted: &BTreeMap<FindingKey, i64>) -> Vec<FindingCount> {
    let mut findings: Vec<_> = counted
        .iter()
        .map(|((finding, event, cause), count)| FindingCount {
            finding: finding.as_str().to_owned(),
            event: event.clone(),
            cause: cause.clone(),
            count: u64::try_from(*count).unwrap_or(0),
        })
        .collect();
    findings.sort_by_key(|finding| std::cmp::Reverse(finding.count));
    findings.truncate(MAX_FINDINGS);
    findings
}
