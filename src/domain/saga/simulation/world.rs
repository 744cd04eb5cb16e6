//! One instance with its log, its engine, its participants and a network, and everything that can happen to it next.

use std::sync::Arc;

use super::participants::{Entered, Participants, Request, operation};
use crate::domain::saga::{
    decide::{self, Actions, Command, Decision, Moment},
    event::{Event, Outcome, Record},
    state::{At, Json, Place, Stage, State},
    tree::{Kind, Tree},
    verbs,
};

/// What a network does to a request or its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    RequestLost,
    /// A proxy refuses it; the participant never sees it.
    Proxied,
    /// It times out and arrives later.
    Late,
    /// It arrives twice.
    Repeated,
    AnswerLost,
}

/// What can happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Commit,
    /// The process crashes right after a commit, before anything is sent.
    CommitAndCrash,
    Crash,
    /// A call that is due is sent, or an expression is evaluated, to `value`: true, or the number of items.
    Send {
        index: usize,
        value: u32,
    },
    Answer {
        index: usize,
        fault: Fault,
    },
    /// A request that nobody awaits arrives.
    Stray {
        index: usize,
    },
    Elapse(At),
    Signal {
        node: u32,
        key: u8,
    },
    Deadline,
    Pause,
    Resume,
    Retry,
    Cancel,
    /// A person repairs the service that refuses, and retries.
    Repair,
}

impl Step {
    /// What is not part of an undisturbed run.
    pub(super) fn is_fault(self) -> bool {
        match self {
            // a wait ends; a signal comes, or it is too late for it
            Self::Elapse(_)
            | Self::Signal { .. }
            | Self::Commit
            | Self::Send { .. }
            | Self::Stray { .. }
            | Self::Resume
            | Self::Repair => false,
            Self::Answer { fault, .. } => fault != Fault::None,
            Self::CommitAndCrash | Self::Crash | Self::Deadline | Self::Pause | Self::Retry | Self::Cancel => true,
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct World {
    pub tree: Arc<Tree>,
    pub participants: Participants,
    /// The durable log.
    pub log: Vec<Record>,
    /// Decided but not yet committed, with what to do after the commit.
    pub pending: Vec<(Record, Actions)>,
    pub state: State,
    /// Calls that are recorded and ready to be sent, or wait for their back-off.
    pub due: Vec<Command>,
    /// Calls that this process sent and that are not answered.
    pub in_flight: Vec<(Command, bool)>,
    /// Requests in the network whose answers nobody awaits: repeated, late, or sent by a process that has died.
    pub stray: Vec<Request>,
    /// A proxy has refused a call that the participant never saw.
    pub proxied: bool,
    pub crashes: usize,
    repairs: usize,
}

pub(super) fn json(text: &str) -> Json {
    Json::parse(text.into()).unwrap()
}

impl World {
    pub(super) fn new(tree: Arc<Tree>, participants: Participants) -> Self {
        let (state, actions) = decide::start(&tree, json("{}"), 0);
        let pending = vec![(
            Record { event: Event::Started { input: json("{}") }, audit: None, to: Outcome::of(&state) },
            actions,
        )];
        let (log, due, in_flight, stray) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (proxied, crashes, repairs) = (false, 0, 0);
        Self { tree, participants, log, pending, state, due, in_flight, stray, proxied, crashes, repairs }
    }

    /// The instance has ended, durably.
    pub(super) fn has_ended(&self) -> bool {
        self.state.stage.is_end() && self.pending.is_empty()
    }

    /// Everything that can happen next.
    pub(super) fn steps(&self) -> Vec<Step> {
        const FAULTS: [Fault; 6] =
            [Fault::None, Fault::RequestLost, Fault::Proxied, Fault::Late, Fault::Repeated, Fault::AnswerLost];
        let mut steps = vec![Step::Crash, Step::Deadline, Step::Pause, Step::Resume, Step::Retry];
        if self.may_cancel() {
            steps.push(Step::Cancel);
        }
        if !self.pending.is_empty() {
            steps.extend([Step::Commit, Step::CommitAndCrash]);
        }
        for (index, command) in self.due.iter().enumerate() {
            let values = match command.at.place().and_then(|place| self.tree.kind(place.node)) {
                Some(Kind::Choice { .. } | Kind::Output(_)) => 0..2,
                Some(Kind::Each { .. }) => 0..4,
                _ => 0..1,
            };
            steps.extend(values.map(|value| Step::Send { index, value }));
        }
        for index in 0..self.in_flight.len() {
            steps.extend(FAULTS.map(|fault| Step::Answer { index, fault }));
        }
        steps.extend((0..self.stray.len()).map(|index| Step::Stray { index }));
        let elapsed = decide::elapsed(&self.tree, &self.state, i64::MAX).into_iter();
        steps.extend(
            elapsed.filter_map(|event| if let Event::Elapsed { at } = event { Some(Step::Elapse(at)) } else { None }),
        );
        for (node, _) in self.tree.nodes().filter(|(_, node)| matches!(node.kind, Kind::Signal { .. })) {
            steps.extend((0..2).map(|key| Step::Signal { node, key }));
        }
        if self.repairs < 20 && self.waits().is_some() && self.pending.is_empty() {
            steps.push(Step::Repair);
        }
        steps
    }

    pub(super) fn apply(&mut self, step: Step, moment: Moment) {
        match step {
            Step::Commit => self.commit(),
            Step::CommitAndCrash => {
                self.commit();
                self.crash();
            }
            Step::Crash => self.crash(),
            Step::Send { index, value } => self.send(index, value, moment),
            Step::Answer { index, fault } => self.answer(index, fault, moment),
            Step::Stray { index } => {
                let request = self.stray.remove(index);
                self.participants.handle(request);
            }
            Step::Elapse(at) => self.handle(Event::Elapsed { at }, moment),
            Step::Signal { node, key } => {
                let name = self.tree.node(node).unwrap().name.clone();
                self.handle(
                    Event::Signalled { name, key: Some(key.to_string()), body: json(&key.to_string()) },
                    moment,
                );
            }
            Step::Deadline => self.handle(Event::DeadlinePassed, moment),
            Step::Pause => self.handle(Event::Pause, moment),
            Step::Resume => self.handle(Event::Resume, moment),
            Step::Retry => {
                if let Ok(event) = verbs::retry_of(&self.tree, &self.state, None) {
                    self.handle(event, moment);
                }
            }
            Step::Cancel => self.handle(Event::Cancel, moment),
            Step::Repair => self.repair(moment),
        }
    }

    fn handle(&mut self, event: Event, moment: Moment) {
        match decide::decide(&self.tree, &mut self.state, &event, moment) {
            Ok(Decision::Recorded(actions)) => {
                let to = Outcome::of(&self.state);
                self.pending.push((Record { event, audit: None, to }, actions));
            }
            Ok(Decision::Unrecorded(actions)) => self.due.extend(actions),
            Ok(Decision::Ignored) | Err(_) => {}
        }
    }

    fn commit(&mut self) {
        for (record, actions) in self.pending.drain(..) {
            self.log.push(record);
            self.due.extend(actions);
        }
        self.check_replay();
    }

    pub(super) fn replayed(&self) -> State {
        let Some(Record { event: Event::Started { input }, .. }) = self.log.first() else {
            panic!("the log begins with the start")
        };
        let mut state = decide::start(&self.tree, input.clone(), 0).0;
        for Record { event, to, audit: _ } in self.log.iter().skip(1) {
            let moment = Moment { now_ms: 0, random: 0.0 };
            let decision = decide::decide(&self.tree, &mut state, event, moment);
            assert!(matches!(decision, Ok(Decision::Recorded(_))), "a replay refuses {event:?}");
            assert_eq!(Outcome::of(&state), *to, "a replay of {event:?} leads elsewhere");
        }
        state
    }

    /// A replay of the log must lead to the state in memory.
    fn check_replay(&self) {
        let (live, replayed) = (&self.state, self.replayed());
        let of = |state: &State| {
            let until: Vec<_> = state.active.iter().map(|active| active.until_ms).collect();
            let rest = (state.completed.clone(), state.iterations.clone(), state.received.clone(), until);
            (Outcome::of(state), state.stage, state.failure.clone(), state.overdue, state.output.clone(), rest)
        };
        assert_eq!(of(live), of(&replayed), "a replay leads elsewhere");
    }

    fn crash(&mut self) {
        self.crashes += 1;
        self.pending.clear();
        self.due.clear();
        let sent = self.in_flight.drain(..).map(|(command, redo)| (operation(command.at), redo));
        self.stray.extend(sent);
        if self.log.is_empty() {
            // the start was never acknowledged, so the client sends it again
            let Self { tree, participants, stray, crashes, .. } = self;
            let fresh = Self::new(Arc::clone(tree), std::mem::take(participants));
            *self = Self { stray: std::mem::take(stray), crashes: *crashes, ..fresh };
            return;
        }
        self.state = self.replayed();
        self.due.extend(decide::recover(&self.tree, &mut self.state));
    }

    /// Sends a call that is due, unless it is out of date or the instance is paused, as the engine does.
    fn send(&mut self, index: usize, value: u32, moment: Moment) {
        let command = self.due.remove(index);
        let Some(active) = self.state.find(command.at).filter(|active| active.attempt == command.attempt) else {
            return;
        };
        let redo = active.redo;
        match command.at.place().map(|place| self.tree.kind(place.node).unwrap()) {
            Some(Kind::Choice { .. }) => self.handle(Event::Chosen { at: command.at, value: value == 1 }, moment),
            Some(Kind::Each { .. }) => {
                let items = (0..value).map(|item| json(&item.to_string())).collect();
                self.handle(Event::Listed { at: command.at, items }, moment);
            }
            Some(Kind::WaitUntil(_)) => self.handle(Event::Scheduled { at: command.at, until_ms: 1 }, moment),
            Some(Kind::Output(_)) => {
                let output = (value == 1).then(|| json("{}"));
                self.handle(Event::Produced { at: command.at, output, note: None }, moment);
            }
            _ if self.state.paused => decide::hold(&mut self.state, command),
            _ => self.in_flight.push((command, redo)),
        }
    }

    /// A request arrives or is lost; its answer arrives or is lost.
    fn answer(&mut self, index: usize, fault: Fault, moment: Moment) {
        let (Command { at, attempt, .. }, redo) = self.in_flight.remove(index);
        let request = (operation(at), redo);
        let unknown =
            |message: &str| Event::Unknown { at, attempt, message: message.into(), detail: None, retry_after_ms: None };
        let failed = |code: &str| Event::Failed { at, attempt, code: code.into(), message: String::new(), note: None };
        let event = match fault {
            Fault::RequestLost => unknown("the request is lost"),
            Fault::Proxied => {
                // what is not the barrier's answer is definite only as long as nothing was in doubt (`answer::classify`)
                self.proxied = true;
                let asked = matches!(at, At::Undo(place) if self.tree.pivot() == Some(place.node));
                if attempt == 1 && !asked { failed("HTTP_404") } else { unknown("404 of a proxy") }
            }
            Fault::Late => {
                self.stray.push(request);
                unknown("timed out; it arrives later")
            }
            Fault::None | Fault::Repeated | Fault::AnswerLost => {
                if fault == Fault::Repeated {
                    self.stray.push(request);
                }
                let done = self.participants.handle(request);
                match done {
                    _ if fault == Fault::AnswerLost => unknown("the answer is lost"),
                    true => Event::Succeeded { at, attempt, reply: None, note: None },
                    false => failed("Refused"),
                }
            }
        };
        self.handle(event, moment);
    }

    /// A stuck pivot that cannot be asked is cancelled only while no call of it is in progress or due (`Instance::check_verified`
    /// ensures that), and only by a person who knows that it did not happen and will not: no copy of it may be in the
    /// network either.
    fn may_cancel(&self) -> bool {
        if !decide::cancel_must_be_verified(&self.tree, &self.state) {
            return true;
        }
        let call = (self.tree.pivot().map(|node| Place { node, item: None }), false);
        let happens = self.participants.entered.get(&call) == Some(&Entered::Done)
            || self.stray.iter().any(|(stray, _)| *stray == call);
        self.state.paused && self.in_flight.is_empty() && !happens
    }

    /// A call that waits for a person.
    fn waits(&self) -> Option<At> {
        let mut active = self.state.active.iter();
        active.find(|active| active.stuck.as_ref().is_some_and(|stuck| stuck.waits)).map(|active| active.at)
    }

    /// An operation that must succeed was refused.
    fn repair(&mut self, moment: Moment) {
        let Some(at) = self.waits() else { return };
        self.repairs += 1;
        let (called, step) = (operation(at), self.tree.path(at).into_owned());
        if self.participants.entered.get(&called) == Some(&Entered::Done) {
            let forgetful = called.0.is_some_and(|place| self.participants.forgetful.contains(&place));
            assert!(forgetful || self.proxied, "stuck though it is done");
            let event = verbs::skip_of(&self.tree, &self.state, Some(&step)).unwrap();
            return self.handle(event, moment);
        }
        // a crash may have undone the retry, and not the repair
        let repaired = self.repairs > 1;
        assert!(
            repaired || self.proxied || self.participants.refusing.contains(&called),
            "stuck without a reason at {at:?}"
        );
        // when the barrier has no record of the refusal, the person waits for the last late request, since a late copy of
        // a refused request would take effect now
        while self.participants.rolls_back && !self.stray.is_empty() {
            let request = self.stray.remove(0);
            self.participants.handle(request);
        }
        self.participants.refusing.clear();
        let event = verbs::retry_of(&self.tree, &self.state, Some(&step)).unwrap();
        self.handle(event, moment);
    }

    /// The steps in the order in which their completion was recorded.
    pub(super) fn recorded(&self) -> Vec<Place> {
        let of = |record: &Record| match record.event {
            Event::Succeeded { at: At::Do(place), .. } => Some(place),
            _ => None,
        };
        self.log.iter().filter_map(of).collect()
    }

    /// Lets every late request arrive and checks what happened.
    pub(super) fn finish(mut self) -> (Stage, usize) {
        while let Some(request) = self.stray.pop() {
            self.participants.handle(request);
        }
        super::checks::check(&self);
        (self.state.stage, self.crashes)
    }
}
