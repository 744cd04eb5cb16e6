//! Parallel branches, conditions, lists, waits and signals.

use super::*;

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

#[test]
fn a_wait_until_a_time_is_over_then_also_after_a_crash() {
    let mut run = Run::of(&saga(vec![step("cool", Task::WaitUntil("input.at".into())), last("ship")]));
    let at = run.named("cool");
    assert_eq!(run.command.map(|command| command.at), Some(at), "the time is evaluated");
    assert_eq!(run.try_event(Event::Elapsed { at }), Ok(Decision::Ignored), "it is not known yet");
    let mut run = run.event(Event::Scheduled { at, until_ms: 7_000 });
    assert_eq!(run.try_event(Event::Scheduled { at, until_ms: 9_000 }), Ok(Decision::Ignored), "it is evaluated once");
    assert_eq!(next_timer(&run.tree, &run.state), Some(7_000));
    assert_eq!(elapsed(&run.tree, &run.state, 6_999), []);
    assert_eq!(recover(&run.tree, &mut run.state), Actions::default(), "nor is it after a crash");
    assert_eq!(elapsed(&run.tree, &run.state, 7_000), [Event::Elapsed { at }]);
    assert_eq!(run.event(Event::Elapsed { at }).paths(), ["do ship"]);
}
