use super::*;
use crate::domain::saga::{
    definition::{Call, Definition, ForEach, RetryPolicy, Signal, Step, Task, Transaction, Undo, Wait},
    state::{Place, Status},
    verbs::{retry_of, skip_of},
};

fn call(name: &str) -> Call {
    Call {
        service: "s".into(),
        command: name.into(),
        method: "POST".into(),
        url: format!("http://s/{name}"),
        ..Call::default()
    }
}

fn transaction(name: &str, undo: bool) -> Transaction {
    Transaction {
        action: call(name),
        undo: if undo { Undo::Call(call(&format!("undo-{name}"))) } else { Undo::Nothing },
        timeout_ms: 1_000,
        retry: RetryPolicy { max_attempts: 3, initial_backoff_ms: 100, max_backoff_ms: 1_000 },
        failures: [("Refused".to_owned(), "NO_WAY".to_owned())].into(),
        ..Transaction::default()
    }
}

fn step(name: &str, task: Task) -> Step {
    Step { name: name.into(), task, ..Step::default() }
}

fn done(name: &str) -> Step {
    step(name, Task::call(transaction(name, true)))
}

fn saga(steps: Vec<Step>) -> Definition {
    Definition {
        name: "test".into(),
        deadline_ms: 60_000,
        steps,
        on_compensated: Some(call("notify")),
        ..Definition::default()
    }
}

fn pivot(name: &str) -> Step {
    step(name, Task::call(Transaction { pivot: true, ..transaction(name, false) }))
}

fn last(name: &str) -> Step {
    step(name, Task::call(transaction(name, false)))
}

/// `a` and `b` can be undone, `check` changes nothing, `charge` is the pivot, `ship` comes after it.
fn definition() -> Definition {
    saga(vec![done("a"), last("check"), done("b"), pivot("charge"), last("ship")])
}

/// The node of a step at the top, when it is not in a group.
fn place(index: u32) -> Place {
    Place { node: index + 1, item: None }
}

fn do_at(index: u32) -> At {
    At::Do(place(index))
}

fn undo_at(index: u32) -> At {
    At::Undo(place(index))
}

struct Run {
    tree: Tree,
    state: State,
    /// The last one.
    command: Option<Command>,
}

impl Run {
    fn new() -> Self {
        Self::of(&definition())
    }

    fn of(definition: &Definition) -> Self {
        let tree = Tree::of(definition);
        let (state, actions) = start(&tree, Json::parse("{}".into()).unwrap(), 7);
        Self { tree, state, command: actions.into_iter().last() }
    }

    fn try_event(&mut self, event: Event) -> Result<Decision, Refusal> {
        let decision = decide(&self.tree, &mut self.state, &event, Moment { now_ms: 7, random: 0.5 })?;
        if let Decision::Recorded(actions) | Decision::Unrecorded(actions) = decision.clone() {
            self.command = actions.into_iter().last().or(self.command);
        }
        Ok(decision)
    }

    fn event(mut self, event: Event) -> Self {
        self.try_event(event).unwrap();
        self
    }

    /// The first that is in progress.
    fn at(&self) -> (At, u32) {
        self.state.active.first().map(|active| (active.at, active.attempt)).unwrap()
    }

    fn stage(&self) -> Stage {
        self.state.stage
    }

    fn stuck(&self) -> Option<(bool, i64)> {
        self.state.stuck().map(|(_, stuck)| (stuck.waits, stuck.since_ms))
    }

    fn operation(&self) -> &'static str {
        self.state.active.first().unwrap().operation()
    }

    fn retried(self) -> Self {
        let event = retry_of(&self.tree, &self.state, None).unwrap();
        self.event(event)
    }

    fn skipped(self) -> Self {
        let event = skip_of(&self.tree, &self.state, None).unwrap();
        self.event(event)
    }

    fn ok(self) -> Self {
        let (at, attempt) = self.at();
        self.event(Event::Succeeded { at, attempt, reply: None, note: None })
    }

    fn fail(self) -> Self {
        let (at, attempt) = self.at();
        self.event(Event::Failed { at, attempt, code: "Refused".into(), message: "no".into(), note: None })
    }

    fn unknown(self) -> Self {
        let (at, attempt) = self.at();
        self.event(Event::Unknown { at, attempt, message: "reset".into(), detail: None, retry_after_ms: None })
    }

    fn times(self, count: usize, step: impl Fn(Self) -> Self) -> Self {
        (0..count).fold(self, |run, _| step(run))
    }

    /// Completes the compensation and returns its calls.
    fn undone(mut self) -> Vec<At> {
        let mut calls = Vec::new();
        while !self.stage().is_end() {
            calls.push(self.at().0);
            self = self.ok();
        }
        calls
    }
}

#[test]
fn steps_run_in_order_until_completed() {
    let mut run = Run::new();
    for index in 0..5 {
        assert_eq!(run.command, Some(Command { at: do_at(index), attempt: 1, after_ms: 0 }));
        run = run.ok();
    }
    assert_eq!(run.state.status(), Status::Completed);
}

#[test]
fn a_definite_failure_undoes_the_steps_before_it_in_reverse() {
    let run = Run::new().ok().ok().ok().fail();
    assert_eq!(run.state.failure.as_ref().map(|f| (f.step.as_str(), f.reason.as_str())), Some(("charge", "NO_WAY")));
    assert_eq!(run.undone(), [undo_at(2), undo_at(0), At::Notify]);
    assert_eq!(Run::new().fail().undone(), [At::Notify]);
}

#[test]
fn a_failure_after_an_unknown_attempt_undoes_the_failing_step_too() {
    assert_eq!(Run::new().ok().ok().fail().undone(), [undo_at(0), At::Notify]);
    assert_eq!(Run::new().ok().ok().unknown().fail().undone(), [undo_at(2), undo_at(0), At::Notify]);
}

#[test]
fn an_unknown_result_is_repeated_with_growing_back_off() {
    let run = Run::new().unknown();
    assert_eq!(run.command, Some(Command { at: do_at(0), attempt: 2, after_ms: 50 }));
    let run = run.unknown();
    assert_eq!(run.command, Some(Command { at: do_at(0), attempt: 3, after_ms: 100 }));
}

#[test]
fn exhausted_attempts_undo_the_step_too() {
    let run = Run::new().times(3, Run::unknown);
    assert_eq!(run.state.failure.as_ref().map(|f| f.code.as_str()), Some(codes::ATTEMPTS));
    assert_eq!(run.undone(), [undo_at(0), At::Notify]);
}

#[test]
fn the_pivot_is_repeated_until_its_answer_is_certain() {
    let run = Run::new().times(3, Run::ok).times(4, Run::unknown);
    assert_eq!(run.state.status(), Status::Stuck);
    assert_eq!(run.command.map(|c| (c.at, c.attempt)), Some((do_at(3), 5)), "it is retried without a person");
    assert_eq!(run.fail().undone(), [undo_at(2), undo_at(0), At::Notify]);
}

/// As `definition`, with a pivot that can be asked.
fn asked() -> Definition {
    let mut definition = definition();
    definition.steps[3].transaction_mut().unwrap().undo = Undo::Call(call("undo-charge"));
    definition
}

#[test]
fn a_pivot_with_an_undo_is_asked_whether_it_happened() {
    let at_pivot = || Run::of(&asked()).times(3, Run::ok);
    assert_eq!(at_pivot().fail().at().0, undo_at(2), "the first answer is certain");
    for turned in [
        at_pivot().unknown().fail(),
        at_pivot().times(3, Run::unknown),
        at_pivot().event(Event::DeadlinePassed),
        at_pivot().event(Event::Cancel),
    ] {
        assert_eq!(turned.at().0, undo_at(3));
        assert_eq!(turned.undone(), [undo_at(3), undo_at(2), undo_at(0), At::Notify]);
    }
    // its undo is refused: it happened, and is called again for its reply
    let mut run = at_pivot().times(3, Run::unknown).fail();
    assert_eq!((run.at(), &run.state.failure), ((do_at(3), 2), &None));
    assert_eq!(run.command.map(|command| command.at), Some(do_at(3)));
    assert_eq!(run.try_event(Event::Cancel), Err(Refusal::PastPivot));
    let run = run.event(Event::DeadlinePassed);
    assert!(run.state.overdue, "from now on a deadline is only reported");
    let run = run.fail();
    assert_eq!((run.at().0, run.state.status()), (do_at(3), Status::Stuck), "it never turns back");
    assert_eq!(run.skipped().ok().state.status(), Status::Completed);
}

#[test]
fn a_retry_of_what_was_refused_says_so_to_the_participant() {
    let run = Run::new().times(4, Run::ok).fail().retried();
    assert_eq!(run.operation(), "redo");
    let run = Run::new().times(4, Run::ok).times(3, Run::unknown).retried();
    assert_eq!(run.operation(), "do", "what was not refused is not redone");
    let run = Run::new().ok().ok().ok().fail().fail().retried();
    assert_eq!(run.operation(), "undo", "an undo is tried again under its own key");
}

#[test]
fn a_deadline_before_the_pivot_compensates_what_is_under_way() {
    let run = Run::new().ok().ok().event(Event::DeadlinePassed);
    assert_eq!(run.state.failure.as_ref().map(|f| f.code.as_str()), Some(codes::DEADLINE));
    assert_eq!(run.undone(), [undo_at(2), undo_at(0), At::Notify]);
}

#[test]
fn a_deadline_from_the_pivot_on_is_only_reported() {
    for done in [3, 4] {
        let mut run = Run::new().times(done, Run::ok).event(Event::DeadlinePassed);
        assert!(run.state.overdue);
        assert_eq!(run.state.status(), Status::Running);
        assert_eq!(run.try_event(Event::DeadlinePassed), Ok(Decision::Ignored), "it is reported once");
    }
}

#[test]
fn a_definite_failure_where_none_is_allowed_waits_for_a_person() {
    for mut run in [Run::new().times(4, Run::ok).fail(), Run::new().ok().ok().ok().fail().fail()] {
        let phase = run.at().0;
        assert_eq!(run.stuck(), Some((true, 7)));
        assert_eq!(recover(&run.tree, &mut run.state), Actions::default(), "a restart does not retry it");
        let run = run.retried();
        assert_eq!(run.command, Some(Command { at: phase, attempt: 2, after_ms: 0 }));
        assert_ne!(run.ok().state.status(), Status::Stuck);
    }
}

#[test]
fn an_undo_with_unknown_results_is_stuck_after_its_attempts_and_retried() {
    let mut run = Run::new().ok().fail().times(3, Run::unknown);
    assert_eq!(run.stuck().map(|(waits, _)| waits), Some(false));
    let (at, attempt) = run.at();
    let again = Event::Unknown { at, attempt, message: "reset".into(), detail: None, retry_after_ms: None };
    assert!(matches!(run.try_event(again), Ok(Decision::Unrecorded(_))), "an outage does not fill the log");
    assert_eq!(run.ok().undone(), [At::Notify]);
}

#[test]
fn a_participant_s_retry_after_is_honoured_within_reason() {
    for (asked, waited) in [(5_000, 5_000), (u64::MAX, MAX_RETRY_AFTER_MS), (1, 50)] {
        let mut run = Run::new();
        let event = Event::Unknown {
            at: do_at(0),
            attempt: 1,
            message: String::new(),
            detail: None,
            retry_after_ms: Some(asked),
        };
        run.try_event(event).unwrap();
        assert_eq!(run.command.map(|c| c.after_ms), Some(waited));
    }
}

#[test]
fn results_of_other_attempts_and_phases_are_ignored() {
    let mut run = Run::new().ok().unknown();
    for (at, attempt) in [(do_at(0), 1), (do_at(1), 1), (undo_at(1), 2)] {
        assert_eq!(run.try_event(Event::Succeeded { at, attempt, reply: None, note: None }), Ok(Decision::Ignored));
        let failed = Event::Failed { at, attempt, code: String::new(), message: String::new(), note: None };
        assert_eq!(run.try_event(failed), Ok(Decision::Ignored));
    }
    assert_eq!(run.at(), (do_at(1), 2));
}

#[test]
fn after_a_recovery_the_current_step_is_undone_too() {
    let mut run = Run::new().ok().ok();
    assert_eq!(
        recover(&run.tree, &mut run.state).into_iter().next(),
        Some(Command { at: do_at(2), attempt: 2, after_ms: 0 })
    );
    assert_eq!(run.fail().undone(), [undo_at(2), undo_at(0), At::Notify]);
}

#[test]
fn a_cancel_undoes_before_the_pivot_and_is_refused_after() {
    assert_eq!(Run::new().ok().ok().event(Event::Cancel).undone(), [undo_at(2), undo_at(0), At::Notify]);
    assert_eq!(Run::new().times(3, Run::ok).try_event(Event::Cancel), Err(Refusal::PastPivot));
    assert_eq!(Run::new().times(4, Run::ok).try_event(Event::Cancel), Err(Refusal::PastPivot));
    assert_eq!(Run::new().fail().try_event(Event::Cancel), Err(Refusal::Compensating));
    assert_eq!(Run::new().times(5, Run::ok).try_event(Event::Cancel), Err(Refusal::Ended));
    let held_pivot = Run::new().ok().ok().event(Event::Pause).ok();
    assert_eq!(held_pivot.event(Event::Cancel).at().0, undo_at(2), "a pause kept the pivot from being called");
    let stuck_pivot = Run::new().times(3, Run::ok).times(3, Run::unknown);
    assert_eq!(stuck_pivot.event(Event::Cancel).undone(), [undo_at(2), undo_at(0), At::Notify]);
}

#[test]
fn a_skip_passes_over_what_is_stuck_and_nothing_else() {
    let run = Run::new();
    assert_eq!(skip_of(&run.tree, &run.state, None), Err(Refusal::NotStuck));
    let run = Run::new().ok().ok().ok().fail().fail().skipped();
    assert_eq!(run.at().0, undo_at(0));
    let run = Run::new().times(4, Run::ok).fail().skipped();
    assert_eq!(run.state.status(), Status::Completed);
}

#[test]
fn a_pause_withholds_the_next_call_and_resume_sends_it() {
    let mut run = Run::new().event(Event::Pause);
    assert_eq!(run.try_event(Event::Pause), Ok(Decision::Ignored));
    run.command = None;
    let run = run.ok();
    assert_eq!((run.command, run.at().0), (None, do_at(1)));
    let run = run.event(Event::Resume);
    assert_eq!(run.command, Some(Command { at: do_at(1), attempt: 1, after_ms: 0 }));
}

#[test]
fn a_resume_does_not_repeat_a_call_that_is_under_way() {
    let mut run = Run::new().event(Event::Pause);
    assert_eq!(run.try_event(Event::Resume), Ok(Decision::Recorded(Actions::default())));
    let mut run = Run::new().event(Event::Pause);
    hold(&mut run.state, Command { at: do_at(0), attempt: 1, after_ms: 0 });
    run.command = None;
    run.try_event(Event::Resume).unwrap();
    assert!(run.command.is_some(), "unless the pause stopped it");
}

#[test]
fn a_retry_needs_a_failed_attempt() {
    let run = Run::new();
    assert_eq!(retry_of(&run.tree, &run.state, None), Err(Refusal::NothingToRetry));
    let run = Run::new().unknown().unknown().retried().unknown().unknown();
    assert_eq!(run.at().0, do_at(0), "a retry begins a new allowance of attempts");
}

#[test]
fn a_step_whose_expression_has_no_value_was_never_sent() {
    let fail = |run: Run| {
        let (at, attempt) = run.at();
        run.event(Event::Failed { at, attempt, code: codes::EXPRESSION.into(), message: "no".into(), note: None })
    };
    // another process evaluates it first, after a recovery that counts an attempt
    let mut run = Run::new().ok().ok();
    recover(&run.tree, &mut run.state);
    assert_eq!(fail(run).undone(), [undo_at(0), At::Notify]);
    // after the pivot it can only be skipped
    let run = fail(Run::new().times(4, Run::ok));
    assert_eq!(retry_of(&run.tree, &run.state, None), Err(Refusal::NoValue));
    assert_eq!(run.skipped().state.status(), Status::Completed);
}

#[path = "groups_tests.rs"]
mod groups;
