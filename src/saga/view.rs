//! The representation of an instance in the API: `GET /sagas/{name}/{id}`, computed by replaying its events.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::saga::{
    decide::{self, Decision, Moment},
    definition::Definition,
    event::{Audit, Event, Outcome, Record},
    state::{Active, At, Failure, Json, State, Status, Stuck, text},
    tree::Tree,
};

/// An instance's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    pub id: Uuid,
    pub saga: String,
    pub version: String,
    /// The business key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    pub state: Status,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// The deadline passed after the pivot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overdue: bool,
    pub started_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// What is in progress, in the order in which it began.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub current: Vec<Current>,
    /// Why the saga is (being) compensated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
    /// The saga's output, once it has completed. A list leaves it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<serde_json::Value>,
    /// Of a choreographed saga: the correlation of its events.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correlation_id: Option<String>,
    /// Of a choreographed saga: the events that are to come next, the most urgent first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub owed: Vec<Owed>,
}

/// A service is to emit one of several events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Owed {
    pub service: String,
    /// One of these types.
    pub events: Vec<String>,
    /// The type of the event that it is to react to.
    pub to: String,
    /// When that occurred.
    pub since: Timestamp,
    pub due: Timestamp,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Current {
    /// `NAME`, or `NAME.ITEM` in a `forEach`.
    pub step: String,
    /// `do` or `undo` of a call; else what is awaited: `wait`, `signal`, the expression `when` or `forEach`, or `evaluate` of the
    /// output.
    pub operation: String,
    pub attempt: u32,
    /// When it is over by itself: a wait, or a signal with a time limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
    /// Why it is stuck, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck: Option<String>,
    /// It is stuck and continues only after a person's verb.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub waits_for_a_person: bool,
}

/// An instance with its history.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Detail {
    #[serde(flatten)]
    pub view: View,
    /// `null` for a choreographed saga, which reads no data.
    #[serde(default)]
    pub input: serde_json::Value,
    pub history: Vec<Transition>,
}

/// One event of the history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Transition {
    pub time: Timestamp,
    /// The step, with its operation as in `current` and, of a call, its attempt. Of a choreographed saga: the service and the event's
    /// type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// `started`, `succeeded`, `failed`, `unknown`, `deadline passed`; `true` or `false` of a condition, `3 items` of a list,
    /// `until 2026-12-24T18:00:00Z`, `elapsed` of a wait, or of a signal that did not arrive in time, `received` of one that did; or a person's `retry`,
    /// `skip`, `cancel`, `pause`, `resume`. Of a choreographed saga: `started`, `in time`, `late`, `undeclared`, `repeated`,
    /// `cause not seen`.
    pub outcome: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<serde_json::Value>,
    /// Of a person's verb: who asked for it, and why, as they say.
    #[serde(flatten)]
    pub audit: Audit,
    /// Of a choreographed saga: the event's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub event_id: Option<String>,
    /// Of a choreographed saga: the id of the event that it names as its cause.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub causation_id: Option<String>,
    /// The instance's state after it; of a choreographed saga its state now.
    pub state: Status,
}

/// A row of the log.
#[derive(Debug)]
pub(super) struct Logged {
    pub seq: i32,
    pub at: Timestamp,
    pub record: Record,
}

/// Why a log that can be read is none of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReplayError {
    #[error("the log does not begin with its start")]
    MissingStart,
    #[error("rows are missing in the log before row {0}")]
    Gap(i32),
    #[error("this version decides otherwise than the one that wrote row {0} of the log")]
    Differs(i32),
}

impl View {
    /// Without its key, which the log does not have.
    pub(super) fn new(
        id: Uuid,
        definition: &Definition,
        tree: &Tree,
        state: &State,
        started_at: Timestamp,
        ended_at: Option<Timestamp>,
    ) -> Self {
        let current = state.active.iter().map(|active| Current::new(tree, active)).collect();
        Self {
            id,
            saga: definition.name.clone(),
            version: definition.version.clone(),
            key: None,
            state: state.status(),
            paused: state.paused,
            overdue: state.overdue,
            started_at,
            ended_at,
            current,
            failure: state.failure.clone(),
            output: state.output.as_ref().map(parsed),
            correlation_id: None,
            owed: Vec::new(),
        }
    }
}

impl Current {
    fn new(tree: &Tree, active: &Active) -> Self {
        Self {
            step: tree.path(active.at).into_owned(),
            operation: tree.operation(active.at).to_owned(),
            attempt: active.attempt,
            until: active.due_ms(tree).and_then(|until| Timestamp::from_millisecond(until).ok()),
            stuck: active.stuck.as_deref().map(Stuck::text),
            waits_for_a_person: active.stuck.as_ref().is_some_and(|stuck| stuck.waits),
        }
    }
}

/// Replays a log and returns the final state. `each` is called with every row and the state after it.
pub(super) fn replay<'e>(
    tree: &Tree,
    log: impl IntoIterator<Item = &'e Logged>,
    mut each: impl FnMut(&'e Logged, &State),
) -> Result<State, ReplayError> {
    let mut log = log.into_iter();
    let started = log.next().filter(|first| first.seq == 0).ok_or(ReplayError::MissingStart)?;
    let Event::Started { input } = &started.record.event else { return Err(ReplayError::MissingStart) };
    let mut state = decide::start(tree, input.clone(), started.at.as_millisecond()).0;
    let fits = |logged: &Logged, state: &State| {
        let same = Outcome::of(state) == logged.record.to;
        same.then_some(()).ok_or(ReplayError::Differs(logged.seq))
    };
    fits(started, &state)?;
    each(started, &state);
    for (seq, logged) in (1..).zip(log) {
        if logged.seq != seq {
            return Err(ReplayError::Gap(logged.seq));
        }
        let moment = Moment { now_ms: logged.at.as_millisecond(), random: 0.0 };
        // only what changed the state was recorded
        match decide::decide(tree, &mut state, &logged.record.event, moment) {
            Ok(Decision::Recorded(_)) => fits(logged, &state)?,
            Ok(Decision::Ignored | Decision::Unrecorded(_)) | Err(_) => return Err(ReplayError::Differs(logged.seq)),
        }
        each(logged, &state);
    }
    Ok(state)
}

impl Detail {
    pub(super) fn new(id: Uuid, definition: &Definition, tree: &Tree, events: &[Logged]) -> Result<Self, ReplayError> {
        let mut history = Vec::with_capacity(events.len());
        let state = replay(tree, events, |logged, state| {
            history.push(Transition::new(tree, logged, state.status()));
        })?;
        let started_at = events.first().ok_or(ReplayError::MissingStart)?.at;
        let ended_at = state.stage.is_end().then(|| events.last().map(|logged| logged.at)).flatten();
        let input = serde_json::from_str(state.input.as_str()).unwrap_or_default();
        Ok(Self { view: View::new(id, definition, tree, &state, started_at, ended_at), input, history })
    }
}

impl Transition {
    fn new(tree: &Tree, logged: &Logged, state: Status) -> Self {
        let mut transition = Self {
            time: logged.at,
            step: None,
            operation: None,
            attempt: None,
            outcome: String::new(),
            code: None,
            message: None,
            reply: None,
            audit: logged.record.audit.clone().unwrap_or_default(),
            event_id: None,
            causation_id: None,
            state,
        };
        transition.outcome = transition.describe(tree, &logged.record.event);
        transition
    }

    /// Sets what the event has, and returns its outcome.
    fn describe(&mut self, tree: &Tree, event: &Event) -> String {
        let outcome = match event {
            Event::Started { .. } => "started",
            Event::Succeeded { at, attempt, reply, note } => {
                self.set_call(tree, *at, *attempt);
                self.message.clone_from(note);
                self.reply = reply.as_ref().map(parsed);
                "succeeded"
            }
            Event::Failed { at, attempt, code, message, note } => {
                self.set_call(tree, *at, *attempt);
                (self.code, self.message) = (Some(code.clone()), Some(text(message, note.as_deref())));
                "failed"
            }
            Event::Unknown { at, attempt, message, detail, retry_after_ms: _ } => {
                self.set_call(tree, *at, *attempt);
                self.message = Some(text(message, detail.as_deref()));
                "unknown"
            }
            Event::Chosen { at, value } => {
                self.set_step(tree, *at);
                return value.to_string();
            }
            Event::Listed { at, items } => {
                self.set_step(tree, *at);
                return format!("{} items", items.len());
            }
            Event::Scheduled { at, until_ms } => {
                self.set_step(tree, *at);
                let until = Timestamp::from_millisecond(*until_ms).unwrap_or_default();
                return format!("until {until:.0}");
            }
            Event::Produced { at, output, note } => {
                self.set_step(tree, *at);
                self.message.clone_from(note);
                if output.is_some() { "succeeded" } else { "failed" }
            }
            Event::Elapsed { at } => {
                self.set_step(tree, *at);
                "elapsed"
            }
            Event::Signalled { name, key: _, body } => {
                (self.step, self.operation) = (Some(name.clone()), Some("signal".to_owned()));
                self.reply = Some(parsed(body));
                "received"
            }
            Event::DeadlinePassed => "deadline passed",
            Event::Retry { calls } => {
                if let [reached] = calls.as_slice() {
                    self.set_step(tree, reached.at);
                }
                "retry"
            }
            Event::Skip { at } => {
                self.set_step(tree, *at);
                "skip"
            }
            Event::Cancel => "cancel",
            Event::Pause => "pause",
            Event::Resume => "resume",
        };
        outcome.to_owned()
    }

    fn set_call(&mut self, tree: &Tree, at: At, attempt: u32) {
        self.set_step(tree, at);
        self.attempt = Some(attempt);
    }

    fn set_step(&mut self, tree: &Tree, at: At) {
        self.step = Some(tree.path(at).into_owned());
        self.operation = Some(tree.operation(at).to_owned());
    }
}

fn parsed(json: &Json) -> serde_json::Value {
    serde_json::from_str(json.as_str()).unwrap_or_default()
}
