//! Decides what to do next: a pure function from definition, state and event to the new state and the next call.
//!
//! - A result is success, definite failure, or unknown. An unknown result is retried; a definite failure or the
//!   deadline compensates.
//! - Compensation undoes, in reverse order, every step that may have happened: the steps that succeeded, and also the
//!   failing one when the outcome of one of its attempts is unknown (an earlier attempt, or the current one at a
//!   deadline, a cancel or exhausted attempts). The participant's barrier makes an undo without a do safe.
//! - Once the pivot was called, the saga cannot be compensated until its answer is certain. When it has an undo, that is
//!   called first, as for a step before it: success means that the pivot did not happen and will not, a refusal that it
//!   did; then the pivot is called once more, for its reply, and the saga goes forward.
//! - What must succeed (an undo, `onCompensated`, a step from the pivot on) is retried until it does. After
//!   `maxAttempts` the instance is stuck, which is reported, and is still retried at the longest back-off, so that it
//!   recovers from an outage without a person. After a definite failure it is stuck at once and waits for a person,
//!   since retrying cannot help.

use super::{
    definition::{Definition, Step},
    state::{Event, Failure, Json, Phase, State, Stuck, codes, text},
};

/// Longest `Retry-After` of a participant that is honoured; a longer one is shortened to it.
pub const MAX_RETRY_AFTER_MS: u64 = 600_000;

/// Time and randomness of one decision.
#[derive(Clone, Copy, Debug)]
pub struct Moment {
    /// Milliseconds since the epoch; only shown, never compared.
    pub now_ms: i64,
    /// Uniform in [0, 1): the jitter of the back-off.
    pub random: f64,
}

/// A call to make. It may be sent only after the event that caused it is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    pub at: Phase,
    pub attempt: u32,
    /// Milliseconds to wait first.
    pub after_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The event is out of date or has no effect; the state is unchanged.
    Ignored,
    /// The event must be appended to the log; then the call may be sent.
    Recorded(Option<Command>),
    /// Another unknown result of an instance that is stuck already. It is not recorded, so that an outage does not fill
    /// the log.
    Unrecorded(Command),
}

/// Why a person's verb is refused. Displays as a clause: `it has ended`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("it has ended")]
    Ended,
    #[error("it is not stuck")]
    NotStuck,
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
    /// Returned by the engine, as is the next one: a replay does not know which calls are in progress.
    #[error(
        "its pivot is called automatically and may still happen; pause it first, make sure that it did not happen, then repeat this"
    )]
    PivotTried,
    #[error("a call of its pivot is in progress; repeat this when it has ended")]
    PivotUnderWay,
}

/// The initial state of an instance, and its first call.
pub fn start(definition: &Definition, input: Json) -> (State, Option<Command>) {
    let mut state = State {
        phase: Phase::Do(0),
        attempt: 1,
        allowance_from: 1,
        paused: false,
        held: false,
        stopped: false,
        stuck: None,
        overdue: false,
        redo: false,
        happened: false,
        failure: None,
        input,
        replies: vec![None; definition.steps.len()],
    };
    let first = if definition.steps.is_empty() { Phase::Completed } else { Phase::Do(0) };
    let command = enter(&mut state, first);
    (state, command)
}

/// The call to repeat after a crash. The current attempt may have been sent, so it counts as an attempt.
pub fn recover(state: &mut State) -> Option<Command> {
    let waits = state.stuck.as_ref().is_some_and(|stuck| stuck.waits);
    if state.phase.is_end() || waits || state.held {
        return None;
    }
    again(state, 0)
}

/// Called when the instance is paused and `command` was due: it is sent at `resume`.
pub fn hold(state: &mut State, command: Command) {
    if state.paused && state.phase == command.at && state.attempt == command.attempt {
        state.stopped = true;
    }
}

/// Applies `event`. A refusal leaves the state unchanged.
pub fn decide(definition: &Definition, state: &mut State, event: &Event, moment: Moment) -> Result<Decision, Refusal> {
    match event {
        Event::Started { .. } => Ok(Decision::Ignored),
        Event::Succeeded { at, attempt, reply, note: _ } => Ok(if current(state, *at, *attempt) {
            Decision::Recorded(succeeded(definition, state, reply.clone()))
        } else {
            Decision::Ignored
        }),
        Event::Failed { at, attempt, code, message, note: _ } => Ok(if current(state, *at, *attempt) {
            if code == codes::EXPRESSION {
                // an expression that has no value now had none at any attempt: none was sent
                state.attempt = 1;
            }
            Decision::Recorded(failed(definition, state, code, message, moment))
        } else {
            Decision::Ignored
        }),
        Event::Unknown { at, attempt, message, detail, retry_after_ms } => Ok(if current(state, *at, *attempt) {
            let error = (message.as_str(), detail.as_deref());
            unknown(definition, state, error, retry_after_ms.unwrap_or(0), moment)
        } else {
            Decision::Ignored
        }),
        Event::DeadlinePassed => Ok(deadline(definition, state)),
        Event::Retry { after } => retry(state, *after),
        Event::Skip => skip(definition, state),
        Event::Cancel => cancel(definition, state),
        Event::Pause => pause(state),
        Event::Resume => resume(state),
    }
}

/// Whether a result belongs to the current call. The log may contain a higher attempt than a replay has counted,
/// because recovery and unrecorded attempts raise it.
fn current(state: &mut State, at: Phase, attempt: u32) -> bool {
    let counts = state.phase == at && attempt >= state.attempt;
    if counts {
        state.attempt = attempt;
    }
    counts
}

fn succeeded(definition: &Definition, state: &mut State, reply: Option<Json>) -> Option<Command> {
    if let Phase::Do(index) = state.phase
        && let Some(slot) = state.replies.get_mut(index)
    {
        *slot = Some(reply.unwrap_or_else(null));
    }
    forward(definition, state)
}

fn null() -> Json {
    Json::from(serde_json::value::RawValue::NULL.to_owned())
}

/// The current operation is done (or skipped): enters the next phase.
fn forward(definition: &Definition, state: &mut State) -> Option<Command> {
    let next = match state.phase {
        Phase::Do(index) if index + 1 < definition.steps.len() => Phase::Do(index + 1),
        Phase::Do(_) => Phase::Completed,
        Phase::Undo(index) => backward(definition, index),
        Phase::Notify => Phase::Compensated,
        end => end,
    };
    enter(state, next)
}

/// The phase that undoes the last step before `index` that has an undo.
fn backward(definition: &Definition, index: usize) -> Phase {
    let undoable = |(_, step): &(usize, &Step)| step.undo.is_some();
    match definition.steps.iter().enumerate().take(index).rfind(undoable) {
        Some((index, _)) => Phase::Undo(index),
        None if definition.on_compensated.is_some() => Phase::Notify,
        None => Phase::Compensated,
    }
}

fn enter(state: &mut State, phase: Phase) -> Option<Command> {
    (state.phase, state.attempt, state.allowance_from, state.stuck, state.redo) = (phase, 1, 1, None, false);
    if phase.is_end() { None } else { issue(state, 0) }
}

fn issue(state: &mut State, after_ms: u64) -> Option<Command> {
    (state.held, state.stopped) = (state.paused, false);
    (!state.paused).then_some(Command { at: state.phase, attempt: state.attempt, after_ms })
}

fn again(state: &mut State, after_ms: u64) -> Option<Command> {
    state.attempt = state.attempt.saturating_add(1);
    issue(state, after_ms)
}

fn failed(definition: &Definition, state: &mut State, code: &str, message: &str, moment: Moment) -> Option<Command> {
    if let Phase::Undo(index) = state.phase
        && definition.pivot() == Some(index)
        && ![codes::EXPRESSION, codes::JOB].contains(&code)
    {
        return pivot_happened(state, index);
    }
    if let Some(index) = compensable_step(definition, state) {
        // a definite failure of the first attempt had no effect; when the outcome of an earlier attempt is unknown, the
        // step may have happened
        return compensate(definition, state, code, message, index + usize::from(state.attempt > 1));
    }
    let (message, detail) = (code.to_owned(), Some(message.to_owned()));
    state.stuck = Some(Stuck { message, detail, since_ms: since(state, moment), waits: true });
    None
}

/// The pivot's undo was refused. Its reply may be lost, so it is called again; what went before is in doubt no longer, but
/// that attempt is not its first.
fn pivot_happened(state: &mut State, pivot: usize) -> Option<Command> {
    (state.happened, state.failure) = (true, None);
    (state.phase, state.attempt, state.allowance_from, state.stuck) = (Phase::Do(pivot), 2, 2, None);
    issue(state, 0)
}

fn unknown(
    definition: &Definition,
    state: &mut State,
    (message, detail): (&str, Option<&str>),
    retry_after_ms: u64,
    moment: Moment,
) -> Decision {
    let policy = state.phase.retry(definition);
    let used = (state.attempt + 1).saturating_sub(state.allowance_from);
    let exhausted = used >= policy.max_attempts;
    if let Some(index) = compensable_step(definition, state)
        && exhausted
        && definition.final_pivot() != Some(index)
    {
        return Decision::Recorded(compensate(definition, state, codes::ATTEMPTS, &text(message, detail), index + 1));
    }
    let was_stuck = state.stuck.is_some();
    if exhausted {
        let (message, detail) = (message.to_owned(), detail.map(ToOwned::to_owned));
        state.stuck = Some(Stuck { message, detail, since_ms: since(state, moment), waits: false });
    }
    let exponential =
        policy.initial_backoff_ms.saturating_mul(1_u64.checked_shl(used.saturating_sub(1)).unwrap_or(u64::MAX));
    let after =
        jitter(exponential.min(policy.max_backoff_ms), moment.random).max(retry_after_ms.min(MAX_RETRY_AFTER_MS));
    match again(state, after) {
        Some(command) if was_stuck => Decision::Unrecorded(command),
        command => Decision::Recorded(command),
    }
}

/// Full jitter (Brooker, "Exponential Backoff And Jitter"): uniform between nothing and the exponential back-off.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)] // milliseconds of minutes
fn jitter(backoff_ms: u64, random: f64) -> u64 {
    (backoff_ms as f64 * random) as u64
}

fn since(state: &State, moment: Moment) -> i64 {
    state.stuck.as_ref().map_or(moment.now_ms, |stuck| stuck.since_ms)
}

/// The index of the current step, if the saga can still be compensated.
fn compensable_step(definition: &Definition, state: &State) -> Option<usize> {
    match state.phase {
        Phase::Do(index) if definition.pivot().is_none_or(|pivot| index <= pivot) && !state.happened => Some(index),
        _ => None,
    }
}

/// Starts the compensation: undoes the steps with an index below `until`.
fn compensate(definition: &Definition, state: &mut State, code: &str, message: &str, until: usize) -> Option<Command> {
    let step = match state.phase {
        Phase::Do(index) => definition.steps.get(index),
        _ => None,
    };
    let reason = step.and_then(|step| step.failures.get(code)).map_or(code, String::as_str);
    state.failure = Some(Failure {
        step: step.map(|step| step.name.clone()).unwrap_or_default(),
        code: code.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
    });
    enter(state, backward(definition, until))
}

/// The index below which steps must be undone when the saga is compensated without a result of the current call; `None`
/// when the pivot may have happened.
fn undo_bound(definition: &Definition, state: &State) -> Option<usize> {
    let index = compensable_step(definition, state)?;
    let never_called = state.held && state.attempt == 1;
    if definition.final_pivot() == Some(index) && !never_called {
        return None;
    }
    Some(index + usize::from(!never_called))
}

fn deadline(definition: &Definition, state: &mut State) -> Decision {
    match undo_bound(definition, state) {
        Some(until) => {
            let message = format!("not finished within {} ms", definition.deadline_ms);
            Decision::Recorded(compensate(definition, state, codes::DEADLINE, &message, until))
        }
        None if matches!(state.phase, Phase::Do(_)) && !state.overdue => {
            state.overdue = true;
            Decision::Recorded(None)
        }
        None => Decision::Ignored,
    }
}

fn retry(state: &mut State, after: u32) -> Result<Decision, Refusal> {
    if state.phase.is_end() {
        return Err(Refusal::Ended);
    }
    if state.stuck.as_ref().is_some_and(|stuck| stuck.message == codes::EXPRESSION) {
        return Err(Refusal::NoValue);
    }
    state.attempt = state.attempt.max(after);
    if state.stuck.is_none() && state.attempt == 1 {
        return Err(Refusal::NothingToRetry);
    }
    // the participant keeps its refusal
    state.redo |= state.stuck.as_ref().is_some_and(|stuck| stuck.waits) && state.phase.operation() == Some("do");
    state.stuck = None;
    state.allowance_from = state.attempt.saturating_add(1);
    Ok(Decision::Recorded(again(state, 0)))
}

fn skip(definition: &Definition, state: &mut State) -> Result<Decision, Refusal> {
    match state.stuck {
        _ if state.phase.is_end() => Err(Refusal::Ended),
        None => Err(Refusal::NotStuck),
        Some(_) => Ok(Decision::Recorded(forward(definition, state))),
    }
}

/// Whether a person who cancels must have verified that the pivot did not happen, since nothing can ask its participant. The
/// engine ensures that it cannot happen later.
pub fn cancel_must_be_verified(definition: &Definition, state: &State) -> bool {
    let pivot = if state.happened { definition.pivot() } else { definition.final_pivot() };
    state.stuck.is_some() && pivot.map(Phase::Do) == Some(state.phase)
}

fn cancel(definition: &Definition, state: &mut State) -> Result<Decision, Refusal> {
    const MESSAGE: &str = "cancelled by a person";
    match state.phase {
        phase if phase.is_end() => Err(Refusal::Ended),
        Phase::Do(index) => {
            let verified = cancel_must_be_verified(definition, state).then_some(index);
            let until = undo_bound(definition, state).or(verified).ok_or(Refusal::PastPivot)?;
            Ok(Decision::Recorded(compensate(definition, state, codes::CANCELLED, MESSAGE, until)))
        }
        _ => Err(Refusal::Compensating),
    }
}

fn pause(state: &mut State) -> Result<Decision, Refusal> {
    if state.phase.is_end() {
        return Err(Refusal::Ended);
    }
    if state.paused {
        return Ok(Decision::Ignored);
    }
    state.paused = true;
    Ok(Decision::Recorded(None))
}

fn resume(state: &mut State) -> Result<Decision, Refusal> {
    if state.phase.is_end() {
        return Err(Refusal::Ended);
    }
    if !state.paused {
        return Ok(Decision::Ignored);
    }
    state.paused = false;
    let command = if state.held || state.stopped { issue(state, 0) } else { None };
    Ok(Decision::Recorded(command))
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
