//! What a person can do with an instance: retry, skip, cancel, pause, resume.

use super::{
    decide::Refusal,
    event::{Event, Reached},
    state::{Active, At, State, codes},
    tree::Tree,
    walk::Walk,
};

/// The event for a person's `retry`: of the step that is named, else of all that are stuck, else of all whose attempts have
/// failed.
pub fn retry_of(tree: &Tree, state: &State, step: Option<&str>) -> Result<Event, Refusal> {
    if state.stage.is_end() {
        return Err(Refusal::Ended);
    }
    let named = named(tree, state, step)?;
    let is_stuck = |active: &&&Active| active.stuck.is_some();
    let has_no_value = |active: &Active| active.stuck.as_ref().is_some_and(|stuck| stuck.message == codes::EXPRESSION);
    let (no_value, stuck): (Vec<&Active>, Vec<&Active>) =
        named.iter().filter(is_stuck).copied().partition(|active| has_no_value(active));
    let chosen = if stuck.is_empty() { named.into_iter().filter(|active| active.attempt > 1).collect() } else { stuck };
    let calls: Vec<Reached> = chosen
        .iter()
        .filter(|active| !has_no_value(active))
        .map(|active| Reached { at: active.at, attempt: active.attempt })
        .collect();
    match calls.is_empty() {
        false => Ok(Event::Retry { calls }),
        true if no_value.is_empty() => Err(Refusal::NothingToRetry),
        true => Err(Refusal::NoValue),
    }
}

/// The event for a person's `skip`: of the step that is named, else of the one that is stuck.
pub fn skip_of(tree: &Tree, state: &State, step: Option<&str>) -> Result<Event, Refusal> {
    if state.stage.is_end() {
        return Err(Refusal::Ended);
    }
    let stuck: Vec<_> = named(tree, state, step)?.into_iter().filter(|active| active.stuck.is_some()).collect();
    match stuck.as_slice() {
        [] => Err(Refusal::NotStuck),
        [one] => Ok(Event::Skip { at: one.at }),
        _ => Err(Refusal::SeveralStuck),
    }
}

fn named<'a>(tree: &Tree, state: &'a State, step: Option<&str>) -> Result<Vec<&'a Active>, Refusal> {
    let is_named = |active: &&Active| step.is_none_or(|step| tree.path(active.at) == step);
    let named: Vec<_> = state.active.iter().filter(is_named).collect();
    if named.is_empty() { Err(Refusal::NotInProgress) } else { Ok(named) }
}

/// Whether a person who cancels must have verified that the pivot did not happen, since nothing can ask its participant. The
/// engine ensures that it cannot happen later.
pub fn cancel_must_be_verified(tree: &Tree, state: &State) -> bool {
    let pivot = if state.happened { tree.pivot() } else { tree.final_pivot() };
    pivot.and_then(|pivot| state.find(At::of(pivot))).is_some_and(|active| active.stuck.is_some())
}

impl Walk<'_> {
    pub(super) fn retry(&mut self, calls: &[Reached]) -> Result<bool, Refusal> {
        self.check_running()?;
        let mut counts = false;
        for Reached { at, attempt } in calls {
            let (is_call, now_ms) = (self.tree.call(*at).is_some(), self.now_ms);
            let Some(active) = self.state.find_mut(*at) else { continue };
            counts = true;
            // the participant keeps its refusal
            active.redo |= is_call && active.stuck.take().is_some_and(|stuck| stuck.waits) && at.operation() == "do";
            active.stuck = None;
            if is_call {
                active.attempt = active.attempt.max(*attempt);
                active.allowance_from = active.attempt.saturating_add(1);
                self.again(*at, 0);
            } else {
                active.since_ms = now_ms;
            }
        }
        if counts { Ok(true) } else { Err(Refusal::NothingToRetry) }
    }

    pub(super) fn skip(&mut self, at: At) -> Result<bool, Refusal> {
        self.check_running()?;
        if self.state.find(at).is_none_or(|active| active.stuck.is_none()) {
            return Err(Refusal::NotStuck);
        }
        self.finish(at);
        Ok(true)
    }

    pub(super) fn cancel(&mut self) -> Result<bool, Refusal> {
        const MESSAGE: &str = "cancelled by a person";
        self.check_running()?;
        if self.state.stage != super::state::Stage::Forward {
            return Err(Refusal::Compensating);
        }
        let verified = cancel_must_be_verified(self.tree, self.state);
        if !verified && (!self.is_compensable() || self.may_have_passed_pivot()) {
            return Err(Refusal::PastPivot);
        }
        let pivot = self.tree.pivot().map(At::of).filter(|_| verified);
        self.compensate(pivot, codes::CANCELLED, MESSAGE, verified);
        Ok(true)
    }

    pub(super) fn pause(&mut self) -> Result<bool, Refusal> {
        self.check_running()?;
        let pauses = !self.state.paused;
        self.state.paused = true;
        Ok(pauses)
    }

    pub(super) fn resume(&mut self) -> Result<bool, Refusal> {
        self.check_running()?;
        if !self.state.paused {
            return Ok(false);
        }
        self.state.paused = false;
        let withheld = self.state.active.iter().filter(|active| active.held || active.stopped);
        for at in withheld.map(|active| active.at).collect::<Vec<_>>() {
            self.issue(at, 0);
        }
        Ok(true)
    }

    fn check_running(&self) -> Result<(), Refusal> {
        if self.state.stage.is_end() { Err(Refusal::Ended) } else { Ok(()) }
    }
}
