//! Decides what to do next: a pure function from tree, state and event to the new state and the next actions.
//!
//! - A result is success, definite failure, or unknown. An unknown result is retried; a definite failure or the
//!   deadline compensates.
//! - Compensation undoes, in reverse order of completion, every step that may have happened: the steps that succeeded, and
//!   before them those in progress whose outcome is unknown: the other branches of an `all`, the failing step itself after an
//!   attempt without an answer, what is called when the deadline passes. The participant's barrier makes an undo without a do
//!   safe, and one that overtakes its do. Steps are undone one after the other, also those that were done at the same time:
//!   one may have seen the effect of the other, and only the reverse order is known to be possible.
//! - Once the pivot was called, the saga cannot be compensated until its answer is certain. When it has an undo, that is
//!   called first, as for a step before it: success means that the pivot did not happen and will not, a refusal that it
//!   did; then the pivot is called once more, for its reply, and the saga goes forward. Nothing else is in progress then,
//!   since the pivot is in no group.
//! - What must succeed (an undo, `onCompensated`, a step from the pivot on) is retried until it does. After
//!   `maxAttempts` it is stuck, which is reported, and is still retried at the longest back-off, so that it
//!   recovers from an outage without a person. After a definite failure it is stuck at once and waits for a person,
//!   since retrying cannot help. What else is in progress goes on.
//! - A condition, a list, a time and the output are evaluated by the engine when the saga comes to them. The result is an event, so that
//!   it is never evaluated again. An output without a value completes the saga all the same.

use super::{
    event::Event,
    json,
    state::{At, Iterations, Json, Received, Stage, State, Stuck, codes, text},
    tree::{Kind, Tree},
    walk::Walk,
};

pub use super::verbs::{cancel_must_be_verified, retry_of, skip_of};

/// Longest `Retry-After` of a participant that is honoured; a longer one is shortened to it.
pub const MAX_RETRY_AFTER_MS: u64 = 600_000;

/// Time and randomness of one decision.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Milliseconds since the epoch, as in the log. Timers are set by it; nothing else compares it.
    pub now_ms: i64,
    /// Uniform in [0, 1): the jitter of the back-off.
    pub random: f64,
}

/// A call to make, or an expression to evaluate. It may be done only after the event that caused it is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    pub at: At,
    pub attempt: u32,
    /// Milliseconds to wait first.
    pub after_ms: u64,
}

/// Any number of commands; the first is not allocated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Actions {
    first: Option<Command>,
    more: Vec<Command>,
}

impl Actions {
    pub(super) fn push(&mut self, command: Command) {
        match self.first {
            None => self.first = Some(command),
            Some(_) => self.more.push(command),
        }
    }
}

impl IntoIterator for Actions {
    type Item = Command;
    type IntoIter = std::iter::Chain<std::option::IntoIter<Command>, std::vec::IntoIter<Command>>;

    fn into_iter(self) -> Self::IntoIter {
        self.first.into_iter().chain(self.more)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The event is out of date or has no effect; the state is unchanged.
    Ignored,
    /// The event must be appended to the log; then the actions may be done.
    Recorded(Actions),
    /// Another unknown result of a call that is stuck already. It is not recorded, so that an outage does not fill
    /// the log.
    Unrecorded(Actions),
}

/// Why a person's verb, or a signal, is refused. Displays as a clause: `it has ended`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("it has ended")]
    Ended,
    #[error("it is not stuck")]
    NotStuck,
    #[error("several of its steps are stuck: name one of them by `step`")]
    SeveralStuck,
    #[error("the step that is named is not in progress")]
    NotInProgress,
    #[error("no attempt has failed, so there is nothing to retry")]
    NothingToRetry,
    #[error(
        "an expression of its step has no value for what is recorded, and never will have: do by hand what the step does, then skip it"
    )]
    NoValue,
    #[error("it is already being compensated")]
    Compensating,
    #[error("it is past its point of no return (its pivot), so it can only go forward")]
    PastPivot,
    #[error("its definition has no such signal")]
    UnknownSignal,
    #[error("it has received this signal before")]
    SignalReceived,
    #[error("it has received this signal before, with this Idempotency-Key and another body")]
    SignalDiffers,
    /// Returned by the engine, as is the next one: a replay does not know which calls are in progress.
    #[error(
        "its pivot is called automatically and may still happen; pause it first, make sure that it did not happen, then repeat this"
    )]
    PivotTried,
    #[error("a call of its pivot is in progress; repeat this when it has ended")]
    PivotUnderWay,
}

/// The initial state of an instance, and its first actions.
pub fn start(tree: &Tree, input: Json, now_ms: i64) -> (State, Actions) {
    let mut state = State::new(tree, input);
    let mut walk = Walk { tree, state: &mut state, now_ms, actions: Actions::default() };
    walk.start();
    let actions = walk.actions;
    (state, actions)
}

/// What to repeat after a crash. The current attempt of a call may have been sent, so it counts as an attempt.
pub fn recover(tree: &Tree, state: &mut State) -> Actions {
    let waits = |stuck: &Option<Box<Stuck>>| stuck.as_ref().is_some_and(|stuck| stuck.waits);
    let repeated =
        state.active.iter().filter(|active| !active.held && active.until_ms.is_none() && !waits(&active.stuck));
    let repeated: Vec<At> = repeated.map(|active| active.at).collect();
    let mut walk = Walk { tree, state, now_ms: 0, actions: Actions::default() };
    for at in repeated {
        if tree.call(at).is_some() { walk.again(at, 0) } else { walk.issue(at, 0) }
    }
    walk.actions
}

/// Called when the instance is paused and `command` was due: it is sent at `resume`.
pub fn hold(state: &mut State, command: Command) {
    if state.paused
        && let Some(active) = state.find_mut(command.at)
        && active.attempt == command.attempt
    {
        active.stopped = true;
    }
}

/// When the next timer is due, in milliseconds since the epoch.
pub fn next_timer(tree: &Tree, state: &State) -> Option<i64> {
    state.active.iter().filter_map(|active| active.due_ms(tree)).min()
}

/// The timers that are due.
pub fn elapsed(tree: &Tree, state: &State, now_ms: i64) -> Vec<Event> {
    let due = state.active.iter().filter(|active| active.due_ms(tree).is_some_and(|due| due <= now_ms));
    due.map(|active| Event::Elapsed { at: active.at }).collect()
}

/// Applies `event`. A refusal leaves the state unchanged.
pub fn decide(tree: &Tree, state: &mut State, event: &Event, moment: Moment) -> Result<Decision, Refusal> {
    let mut walk = Walk { tree, state, now_ms: moment.now_ms, actions: Actions::default() };
    let recorded = match event {
        Event::Started { .. } => false,
        Event::Succeeded { at, attempt, reply, note: _ } => walk.succeeded(*at, *attempt, reply.as_ref()),
        Event::Failed { at, attempt, code, message, note: _ } => walk.failed(*at, *attempt, code, message),
        Event::Unknown { at, attempt, message, detail, retry_after_ms } => {
            let error = (message.as_str(), detail.as_deref());
            let was_stuck = walk.state.find(*at).is_some_and(|active| active.stuck.is_some());
            let counts = walk.unknown(*at, *attempt, error, retry_after_ms.unwrap_or(0), moment.random);
            if counts && was_stuck && walk.actions.first.is_some() {
                return Ok(Decision::Unrecorded(walk.actions));
            }
            counts
        }
        Event::Chosen { at, value } => walk.chosen(*at, *value),
        Event::Listed { at, items } => walk.listed(*at, items),
        Event::Scheduled { at, until_ms } => walk.scheduled(*at, *until_ms),
        Event::Produced { at, output, note: _ } => walk.produced(*at, output.as_ref()),
        Event::Elapsed { at } => walk.elapsed(*at),
        Event::Signalled { name, key, body } => walk.signalled(name, key.as_deref(), body)?,
        Event::DeadlinePassed => walk.deadline(),
        Event::Retry { calls } => walk.retry(calls)?,
        Event::Skip { at } => walk.skip(*at)?,
        Event::Cancel => walk.cancel()?,
        Event::Pause => walk.pause()?,
        Event::Resume => walk.resume()?,
    };
    Ok(if recorded { Decision::Recorded(walk.actions) } else { Decision::Ignored })
}

/// Each returns whether the event counts.
impl Walk<'_> {
    /// Whether a result belongs to a current call. The log may contain a higher attempt than a replay has counted,
    /// because recovery and unrecorded attempts raise it.
    fn is_current(&mut self, at: At, attempt: u32) -> bool {
        let Some(active) = self.state.find_mut(at).filter(|active| attempt >= active.attempt) else { return false };
        active.attempt = attempt;
        true
    }

    fn succeeded(&mut self, at: At, attempt: u32, reply: Option<&Json>) -> bool {
        if !self.is_current(at, attempt) {
            return false;
        }
        if let At::Do(place) = at {
            self.state.set_reply(place, reply.cloned().unwrap_or_else(null));
        }
        self.finish(at);
        true
    }

    fn failed(&mut self, at: At, attempt: u32, code: &str, message: &str) -> bool {
        if !self.is_current(at, attempt) {
            return false;
        }
        let Some(active) = self.state.find_mut(at) else { return false };
        if code == codes::EXPRESSION {
            // an expression that has no value now had none at any attempt: none was sent
            active.attempt = 1;
        }
        // a definite failure of the first attempt had no effect; when the outcome of an earlier attempt is unknown, the
        // step may have happened
        let refused = active.attempt == 1;
        match at {
            At::Undo(place)
                if self.tree.pivot() == Some(place.node) && ![codes::EXPRESSION, codes::JOB].contains(&code) =>
            {
                self.pivot_happened(place);
            }
            _ if self.is_compensable() => self.compensate(Some(at), code, message, refused),
            _ => self.set_stuck(at, code, Some(message), true),
        }
        true
    }

    fn unknown(
        &mut self,
        at: At,
        attempt: u32,
        (message, detail): (&str, Option<&str>),
        retry_after_ms: u64,
        random: f64,
    ) -> bool {
        if !self.is_current(at, attempt) {
            return false;
        }
        let policy = self.tree.retry(at);
        let allowance_from = self.state.find(at).map_or(1, |active| active.allowance_from);
        let used = attempt.saturating_add(1).saturating_sub(allowance_from);
        let exhausted = used >= policy.max_attempts;
        if exhausted && self.is_compensable() && self.final_pivot() != Some(at) {
            self.compensate(Some(at), codes::ATTEMPTS, &text(message, detail), false);
            return true;
        }
        if exhausted {
            self.set_stuck(at, message, detail, false);
        }
        let exponential =
            policy.initial_backoff_ms.saturating_mul(1_u64.checked_shl(used.saturating_sub(1)).unwrap_or(u64::MAX));
        let backoff = jitter(exponential.min(policy.max_backoff_ms), random);
        self.again(at, backoff.max(retry_after_ms.min(MAX_RETRY_AFTER_MS)));
        true
    }

    fn set_stuck(&mut self, at: At, message: &str, detail: Option<&str>, waits: bool) {
        let now_ms = self.now_ms;
        let Some(active) = self.state.find_mut(at) else { return };
        let since_ms = active.stuck.as_ref().map_or(now_ms, |stuck| stuck.since_ms);
        let (message, detail) = (message.to_owned(), detail.map(ToOwned::to_owned));
        active.stuck = Some(Box::new(Stuck { message, detail, since_ms, waits }));
    }

    /// Whether the saga can still be compensated, unless its pivot may have happened.
    pub(super) fn is_compensable(&self) -> bool {
        let before = |active: &super::state::Active| {
            let node = active.at.place().map(|place| place.node);
            self.tree.pivot().is_none_or(|pivot| node.is_some_and(|node| node <= pivot))
        };
        self.state.stage == Stage::Forward && !self.state.happened && self.state.active.iter().all(before)
    }

    /// The call of a pivot that cannot be asked whether it happened.
    pub(super) fn final_pivot(&self) -> Option<At> {
        self.tree.final_pivot().map(At::of)
    }

    fn chosen(&mut self, at: At, value: bool) -> bool {
        let At::Do(place) = at else { return false };
        let counts = self.state.find(at).is_some() && matches!(self.tree.kind(place.node), Some(Kind::Choice { .. }));
        if counts {
            self.choose(place, value);
        }
        counts
    }

    fn listed(&mut self, at: At, items: &[Json]) -> bool {
        let At::Do(place) = at else { return false };
        let counts = self.state.find(at).is_some() && matches!(self.tree.kind(place.node), Some(Kind::Each { .. }));
        if counts {
            self.list(place, Iterations { items: items.to_vec(), begun: 0, running: 0 });
        }
        counts
    }

    fn scheduled(&mut self, at: At, until_ms: i64) -> bool {
        let is_wait = at.place().is_some_and(|place| matches!(self.tree.kind(place.node), Some(Kind::WaitUntil(_))));
        let Some(active) = self.state.find_mut(at).filter(|active| is_wait && active.until_ms.is_none()) else {
            return false;
        };
        active.until_ms = Some(until_ms);
        true
    }

    fn produced(&mut self, at: At, output: Option<&Json>) -> bool {
        let counts = at.place().map(|place| place.node) == self.tree.output() && self.state.find(at).is_some();
        if counts {
            self.state.output = output.cloned();
            self.finish(at);
        }
        counts
    }

    fn elapsed(&mut self, at: At) -> bool {
        // only what has a time can be over by itself
        if self.state.find(at).and_then(|active| active.due_ms(self.tree)).is_none() {
            return false;
        }
        let kind = at.place().and_then(|place| self.tree.kind(place.node));
        let Some(Kind::Signal { within_ms: Some(timer_ms) }) = kind else {
            self.finish(at);
            return true;
        };
        let message = format!("the signal did not arrive within {timer_ms} ms");
        if self.is_compensable() {
            self.compensate(Some(at), codes::SIGNAL, &message, true);
        } else {
            self.set_stuck(at, &message, None, false);
        }
        true
    }

    fn signalled(&mut self, name: &str, key: Option<&str>, body: &Json) -> Result<bool, Refusal> {
        let node = self.tree.signal(name).ok_or(Refusal::UnknownSignal)?;
        if let Some(earlier) = self.state.received.iter().find(|received| received.node == node) {
            return match key {
                Some(_) if earlier.key.as_deref() != key => Err(Refusal::SignalReceived),
                Some(_) if json::same(&earlier.body, body) => Ok(false),
                Some(_) => Err(Refusal::SignalDiffers),
                None => Err(Refusal::SignalReceived),
            };
        }
        match self.state.stage {
            Stage::Completed | Stage::Compensated => return Err(Refusal::Ended),
            Stage::Compensating => return Err(Refusal::Compensating),
            Stage::Forward => {}
        }
        self.state.received.push(Received { node, key: key.map(ToOwned::to_owned), body: body.clone() });
        let at = At::of(node);
        if self.state.find(at).is_some() {
            self.succeeded(at, 1, Some(body));
        }
        Ok(true)
    }

    fn deadline(&mut self) -> bool {
        if self.is_compensable() && !self.may_have_passed_pivot() {
            let message = format!("not finished within {} ms", self.tree.deadline_ms);
            self.compensate(None, codes::DEADLINE, &message, false);
            return true;
        }
        let overdue = self.state.stage == Stage::Forward && !self.state.overdue;
        self.state.overdue |= overdue;
        overdue
    }

    /// Whether a pivot that cannot be asked was called.
    pub(super) fn may_have_passed_pivot(&self) -> bool {
        self.final_pivot().and_then(|pivot| self.state.find(pivot)).is_some_and(|active| !active.is_unsent())
    }
}

fn null() -> Json {
    Json::from(serde_json::value::RawValue::NULL.to_owned())
}

/// Full jitter (Brooker, "Exponential Backoff And Jitter"): uniform between nothing and the exponential back-off.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // milliseconds of minutes
fn jitter(backoff_ms: u64, random: f64) -> u64 {
    (backoff_ms as f64 * random) as u64
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
