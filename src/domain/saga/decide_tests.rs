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
    step(name, Task::Call(transaction(name, true)))
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
    step(name, Task::Call(Transaction { pivot: true, ..transaction(name, false) }))
}

fn last(name: &str) -> Step {
    step(name, Task::Call(transaction(name, false)))
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

/// `flight`, and at the same time `hotel` and then `seat`; after them the pivot `charge`, and at the same time `mail` and `book`.
fn trip() -> Definition {
    let sequence = step("stay", Task::Steps(vec![done("hotel"), done("seat")]));
    let first = step("reserve", Task::All(vec![done("flight"), sequence]));
    let after = step("close", Task::All(vec![last("mail"), last("book")]));
    saga(vec![first, pivot("charge"), after])
}

impl Run {
    fn named(&self, name: &str) -> At {
        At::of(self.tree.task(name).unwrap())
    }

    fn undo_of(&self, name: &str) -> At {
        At::Undo(Place { node: self.tree.task(name).unwrap(), item: None })
    }

    /// What is in progress.
    fn paths(&self) -> Vec<String> {
        let active = self.state.active.iter();
        active.map(|active| format!("{} {}", self.tree.operation(active.at), self.tree.path(active.at))).collect()
    }

    fn ok_of(self, name: &str) -> Self {
        let (at, reply) = (self.named(name), None);
        self.event(Event::Succeeded { at, attempt: 1, reply, note: None })
    }

    fn refused(self, name: &str) -> Self {
        let at = self.named(name);
        self.event(Event::Failed { at, attempt: 1, code: "Refused".into(), message: "no".into(), note: None })
    }

    fn ok_at(self, at: At) -> Self {
        self.event(Event::Succeeded { at, attempt: 1, reply: None, note: None })
    }
}

#[test]
fn branches_begin_together_and_what_follows_begins_when_all_are_done() {
    let run = Run::of(&trip());
    assert_eq!(run.paths(), ["do flight", "do hotel"]);
    let run = run.ok_of("hotel");
    assert_eq!(run.paths(), ["do flight", "do seat"]);
    let run = run.ok_of("flight");
    assert_eq!(run.paths(), ["do seat"]);
    let run = run.ok_of("seat").ok_of("charge");
    assert_eq!(run.paths(), ["do mail", "do book"]);
    assert_eq!(run.ok_of("book").ok_of("mail").state.status(), Status::Completed);
}

#[test]
fn a_failed_branch_undoes_what_is_in_progress_first_and_then_in_reverse_order_of_completion() {
    let run = Run::of(&trip()).ok_of("hotel");
    let [flight, hotel, seat] = ["flight", "hotel", "seat"].map(|name| run.undo_of(name));
    let run = run.refused("seat");
    assert_eq!(run.state.failure.as_ref().map(|failure| failure.step.as_str()), Some("seat"));
    assert_eq!(run.undone(), [flight, hotel, At::Notify], "nobody knows whether the flight is booked");
    let run = Run::of(&trip()).ok_of("hotel").ok_of("flight").ok_of("seat").refused("charge");
    assert_eq!(run.undone(), [seat, flight, hotel, At::Notify]);
    let run = Run::of(&trip()).ok_of("hotel").event(Event::DeadlinePassed);
    assert_eq!(run.undone(), [seat, flight, hotel, At::Notify]);
    // a pause kept the second call of a branch from being sent
    let run = Run::of(&trip()).event(Event::Pause).ok_of("hotel").event(Event::Cancel);
    assert_eq!(run.undone(), [flight, hotel, At::Notify]);
}

#[test]
fn a_branch_that_is_stuck_holds_up_no_other() {
    let run = Run::of(&trip()).ok_of("hotel").ok_of("flight").ok_of("seat").ok_of("charge").refused("mail");
    assert_eq!((run.state.status(), run.paths()), (Status::Stuck, vec!["do mail".to_owned(), "do book".to_owned()]));
    let both = Run { tree: Tree::of(&trip()), state: run.state.clone(), command: None }.refused("book");
    assert_eq!(skip_of(&both.tree, &both.state, None), Err(Refusal::SeveralStuck));
    let skipped = skip_of(&both.tree, &both.state, Some("mail"));
    assert_eq!(skipped, Ok(Event::Skip { at: both.named("mail") }));
    let Ok(Event::Retry { calls }) = retry_of(&both.tree, &both.state, None) else { panic!("both are retried") };
    assert_eq!(calls.len(), 2);
    assert_eq!(retry_of(&both.tree, &both.state, Some("hotel")), Err(Refusal::NotInProgress));
    let run = run.ok_of("book");
    assert_eq!((run.state.status(), run.paths()), (Status::Stuck, vec!["do mail".to_owned()]));
    assert_eq!(run.skipped().state.status(), Status::Completed);
}

#[test]
fn a_recovery_repeats_every_call_that_was_in_progress() {
    let mut run = Run::of(&trip()).ok_of("hotel");
    let again: Vec<_> = recover(&run.tree, &mut run.state).into_iter().map(|command| command.attempt).collect();
    assert_eq!(again, [2, 2]);
}

#[test]
fn a_condition_chooses_once() {
    let mut insured = done("insure");
    insured.when = Some("input.insured".into());
    insured.otherwise = vec![last("warn")];
    let definition = saga(vec![insured, last("ship")]);
    let chosen = |value: bool| {
        let run = Run::of(&definition);
        assert_eq!(run.paths(), ["when insure"]);
        let (at, attempt) = run.at();
        assert_eq!(run.command, Some(Command { at, attempt, after_ms: 0 }), "it is evaluated");
        let mut run = run.event(Event::Chosen { at, value });
        assert_eq!(run.try_event(Event::Chosen { at, value: !value }), Ok(Decision::Ignored));
        run
    };
    assert_eq!(chosen(true).paths(), ["do insure"]);
    assert_eq!(chosen(false).paths(), ["do warn"]);
    assert_eq!(chosen(false).ok().paths(), ["do ship"]);
}

#[test]
fn items_begin_in_order_and_no_more_at_a_time_than_allowed() {
    let mut each = done("pack");
    each.for_each = Some(ForEach { items: "input.lines".into(), concurrency: 2 });
    let run = Run::of(&saga(vec![each, last("ship")]));
    assert_eq!(run.paths(), ["forEach pack"]);
    let (at, list) = (run.at().0, |count: usize| vec![Json::parse("1".into()).unwrap(); count]);
    let of = |run: &Run, item| At::Do(Place { node: run.tree.task("pack").unwrap(), item: Some(item) });
    let run = run.event(Event::Listed { at, items: list(3) });
    assert_eq!(run.paths(), ["do pack.0", "do pack.1"]);
    let second = of(&run, 1);
    let run = run.ok_at(second);
    assert_eq!(run.paths(), ["do pack.0", "do pack.2"]);
    let (first, third) = (of(&run, 0), of(&run, 2));
    let run = run.ok_at(third).ok_at(first);
    assert_eq!(run.paths(), ["do ship"]);
    let undone: Vec<String> = run
        .fail()
        .undone()
        .into_iter()
        .filter_map(At::place)
        .filter_map(|place| place.item)
        .map(|item| item.to_string())
        .collect();
    assert_eq!(undone, ["0", "2", "1"], "in reverse order of completion");
}

#[test]
fn a_list_without_items_is_done_at_once() {
    let mut each = done("pack");
    each.for_each = Some(ForEach { items: "[]".into(), concurrency: 1 });
    let run = Run::of(&saga(vec![each]));
    let at = run.at().0;
    assert_eq!(run.event(Event::Listed { at, items: vec![] }).state.status(), Status::Completed);
}

#[test]
fn a_wait_is_over_by_the_time_of_its_beginning() {
    let run = Run::of(&saga(vec![step("cool", Task::Wait(Wait { duration_ms: 1_000 })), last("ship")]));
    assert_eq!((run.command, run.paths()), (None, vec!["wait cool".to_owned()]));
    assert_eq!(next_timer(&run.tree, &run.state), Some(1_007), "it began at 7");
    assert_eq!(elapsed(&run.tree, &run.state, 1_006), []);
    let due = elapsed(&run.tree, &run.state, 1_007);
    assert_eq!(due, [Event::Elapsed { at: run.named("cool") }]);
    assert_eq!(run.event(due[0].clone()).paths(), ["do ship"]);
}

fn signalled(key: Option<&str>, body: &str) -> Event {
    Event::Signalled { name: "paid".into(), key: key.map(Into::into), body: Json::parse(body.into()).unwrap() }
}

fn paid(within_ms: Option<u64>) -> Step {
    step("paid", Task::Signal(Signal { within_ms }))
}

#[test]
fn a_signal_may_come_early_and_counts_once() {
    let definition = saga(vec![done("a"), paid(None), last("ship")]);
    let mut early = Run::of(&definition).event(signalled(Some("k"), r#"{"sum": 1}"#));
    assert_eq!(early.paths(), ["do a"]);
    assert_eq!(early.try_event(signalled(Some("k"), r#"{"sum":1}"#)), Ok(Decision::Ignored), "a repetition");
    assert_eq!(early.try_event(signalled(Some("k"), "2")), Err(Refusal::SignalDiffers));
    assert_eq!(early.try_event(signalled(Some("l"), "2")), Err(Refusal::SignalReceived));
    assert_eq!(early.try_event(signalled(None, "2")), Err(Refusal::SignalReceived));
    assert_eq!(early.ok().paths(), ["do ship"], "it does not wait for it");
    let run = Run::of(&definition).ok();
    assert_eq!(run.paths(), ["signal paid"]);
    let mut run = run.event(signalled(None, "3"));
    assert_eq!(run.paths(), ["do ship"]);
    let place = run.named("paid").place().unwrap();
    assert_eq!(run.state.reply(place).map(Json::as_str), Some("3"));
    let other = Event::Signalled { name: "a".into(), key: None, body: Json::parse("1".into()).unwrap() };
    assert_eq!(run.try_event(other), Err(Refusal::UnknownSignal));
    let mut late = Run::of(&definition).fail();
    assert_eq!(late.try_event(signalled(None, "3")), Err(Refusal::Compensating));
}

#[test]
fn a_signal_that_does_not_come_compensates_and_after_the_pivot_is_stuck() {
    let run = Run::of(&saga(vec![done("a"), paid(Some(500))])).ok();
    let elapsed = Event::Elapsed { at: run.named("paid") };
    let run = run.event(elapsed.clone());
    let failure = run.state.failure.as_ref().map(|failure| (failure.step.as_str(), failure.code.as_str()));
    assert_eq!(failure, Some(("paid", codes::SIGNAL)));
    assert_eq!(run.undone(), [undo_at(0), At::Notify]);
    let mut run = Run::of(&saga(vec![pivot("charge"), paid(Some(500))])).ok().event(elapsed.clone());
    assert_eq!((run.state.status(), next_timer(&run.tree, &run.state)), (Status::Stuck, None));
    assert_eq!(run.try_event(elapsed), Ok(Decision::Ignored));
    assert_eq!(run.event(signalled(None, "1")).state.status(), Status::Completed, "it still waits");
}

#[test]
fn a_condition_without_a_value_compensates_and_after_the_pivot_can_only_be_skipped() {
    let mut insured = done("insure");
    insured.when = Some("input.insured".into());
    let fail = |run: Run| {
        let (at, attempt) = run.at();
        run.event(Event::Failed { at, attempt, code: codes::EXPRESSION.into(), message: "no".into(), note: None })
    };
    assert_eq!(fail(Run::of(&saga(vec![done("a"), insured.clone()])).ok()).undone(), [undo_at(0), At::Notify]);
    let run = fail(Run::of(&saga(vec![pivot("charge"), insured, last("ship")])).ok());
    assert_eq!(retry_of(&run.tree, &run.state, None), Err(Refusal::NoValue));
    assert_eq!(run.skipped().paths(), ["do ship"]);
}
