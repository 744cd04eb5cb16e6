//! The representation of an instance in the API: `GET /sagas/{name}/{id}`, computed by replaying its events.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::domain::saga::{
    decide::{self, Moment},
    definition::Definition,
    state::{Event, Failure, Json, Phase, State, Status, Stuck, text},
};

/// An instance's state.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct View {
    pub id: Uuid,
    pub saga: String,
    pub version: String,
    pub state: Status,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    /// The deadline passed after the pivot.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub overdue: bool,
    pub started_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<Timestamp>,
    /// The current step, with its operation and attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub current: Option<Current>,
    /// Why the saga is (being) compensated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Failure>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Current {
    pub step: String,
    /// `do` or `undo`.
    pub operation: String,
    pub attempt: u32,
    /// Why the instance is stuck, if it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck: Option<String>,
    /// The instance is stuck and continues only after a person's verb.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub waits_for_a_person: bool,
}

/// An instance with its history.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Detail {
    #[serde(flatten)]
    pub view: View,
    pub input: serde_json::Value,
    pub history: Vec<Transition>,
}

/// One event of the history.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Transition {
    pub time: Timestamp,
    /// The step of a call's result, with its operation and attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operation: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attempt: Option<u32>,
    /// `started`, `succeeded`, `failed`, `unknown`, `deadline passed`, or a person's `retry`, `skip`, `cancel`, `pause`, `resume`.
    pub outcome: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reply: Option<serde_json::Value>,
    /// The instance's state after it.
    pub state: Status,
}

/// A row of the log.
#[derive(Debug)]
pub(super) struct Logged {
    pub seq: i32,
    pub at: Timestamp,
    pub event: Event,
}

impl View {
    pub(super) fn new(
        id: Uuid,
        definition: &Definition,
        state: &State,
        started_at: Timestamp,
        ended_at: Option<Timestamp>,
    ) -> Self {
        let current = state.phase.step(definition).map(|step| Current {
            step: step.to_owned(),
            operation: state.phase.operation().unwrap_or_default().to_owned(),
            attempt: state.attempt,
            stuck: state.stuck.as_ref().map(Stuck::text),
            waits_for_a_person: state.stuck.as_ref().is_some_and(|stuck| stuck.waits),
        });
        Self {
            id,
            saga: definition.name.clone(),
            version: definition.version.clone(),
            state: state.status(),
            paused: state.paused,
            overdue: state.overdue,
            started_at,
            ended_at,
            current,
            failure: state.failure.clone(),
        }
    }
}

/// Replays `events` and returns the final state; `None` when they do not begin with a start. `each` is called with
/// every event and the state after it.
pub(super) fn replay<'e>(
    definition: &Definition,
    events: impl IntoIterator<Item = &'e Logged>,
    mut each: impl FnMut(&'e Logged, &State),
) -> Option<State> {
    let mut state: Option<State> = None;
    for logged in events {
        match (&mut state, &logged.event) {
            (None, Event::Started { input }) => state = Some(decide::start(definition, input.clone()).0),
            (None, _) => return None,
            (Some(state), event) => {
                let moment = Moment { now_ms: logged.at.as_millisecond(), random: 0.0 };
                // a refused event is never recorded, so an error cannot occur here
                let _ = decide::decide(definition, state, event, moment);
            }
        }
        if let Some(state) = &state {
            each(logged, state);
        }
    }
    state
}

impl Detail {
    pub(super) fn new(id: Uuid, definition: &Definition, events: &[Logged]) -> Option<Self> {
        let mut history = Vec::with_capacity(events.len());
        let state = replay(definition, events, |logged, state| {
            history.push(Transition::new(definition, logged, state.status()));
        })?;
        let started_at = events.first()?.at;
        let ended_at = state.phase.is_end().then(|| events.last().map(|logged| logged.at)).flatten();
        let input = serde_json::from_str(state.input.as_str()).unwrap_or_default();
        Some(Self { view: View::new(id, definition, &state, started_at, ended_at), input, history })
    }
}

impl Transition {
    fn new(definition: &Definition, logged: &Logged, state: Status) -> Self {
        let mut transition = Self {
            time: logged.at,
            step: None,
            operation: None,
            attempt: None,
            outcome: String::new(),
            code: None,
            message: None,
            reply: None,
            state,
        };
        transition.describe(definition, &logged.event);
        transition
    }

    fn describe(&mut self, definition: &Definition, event: &Event) {
        let outcome = match event {
            Event::Started { .. } => "started",
            Event::Succeeded { at, attempt, reply, note } => {
                self.set_call(definition, *at, *attempt);
                self.message.clone_from(note);
                self.reply = reply.as_ref().map(parsed);
                "succeeded"
            }
            Event::Failed { at, attempt, code, message, note } => {
                self.set_call(definition, *at, *attempt);
                (self.code, self.message) = (Some(code.clone()), Some(text(message, note.as_deref())));
                "failed"
            }
            Event::Unknown { at, attempt, message, detail, retry_after_ms: _ } => {
                self.set_call(definition, *at, *attempt);
                self.message = Some(text(message, detail.as_deref()));
                "unknown"
            }
            Event::DeadlinePassed => "deadline passed",
            Event::Retry { after: _ } => "retry",
            Event::Skip => "skip",
            Event::Cancel => "cancel",
            Event::Pause => "pause",
            Event::Resume => "resume",
        };
        outcome.clone_into(&mut self.outcome);
    }

    fn set_call(&mut self, definition: &Definition, at: Phase, attempt: u32) {
        self.step = at.step(definition).map(ToOwned::to_owned);
        self.operation = at.operation().map(ToOwned::to_owned);
        self.attempt = Some(attempt);
    }
}

fn parsed(json: &Json) -> serde_json::Value {
    serde_json::from_str(json.as_str()).unwrap_or_default()
}
