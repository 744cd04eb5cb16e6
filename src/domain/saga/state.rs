//! The state of one instance, and the events that lead to it.

use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use super::definition::{Call, Definition, RetryPolicy};

/// The step name of the call to `onCompensated`, in idempotency key and history.
pub const ON_COMPENSATED: &str = "onCompensated";
/// Time-out of one attempt of `onCompensated`, in milliseconds.
pub const ON_COMPENSATED_TIMEOUT_MS: u64 = 10_000;

/// A shared JSON text that is not parsed.
#[derive(Clone, Debug)]
pub struct Json(Arc<RawValue>);

impl Json {
    pub fn as_str(&self) -> &str {
        self.0.get()
    }

    pub fn parse(text: String) -> Result<Self, serde_json::Error> {
        RawValue::from_string(text).map(Self::from)
    }
}

impl From<Box<RawValue>> for Json {
    fn from(value: Box<RawValue>) -> Self {
        Self(Arc::from(value))
    }
}

impl PartialEq for Json {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl Serialize for Json {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Box::<RawValue>::deserialize(deserializer).map(Self::from)
    }
}

/// The phase of an instance. The number is the step's index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    Do(usize),
    Undo(usize),
    /// Everything is undone; `onCompensated` is being called.
    Notify,
    Completed,
    Compensated,
}

impl Phase {
    pub fn is_end(self) -> bool {
        matches!(self, Self::Completed | Self::Compensated)
    }

    /// `do` or `undo`; `None` at the end.
    pub fn operation(self) -> Option<&'static str> {
        match self {
            Self::Do(_) | Self::Notify => Some("do"),
            Self::Undo(_) => Some("undo"),
            Self::Completed | Self::Compensated => None,
        }
    }

    /// The name of the step that is called in this phase.
    pub fn step(self, definition: &Definition) -> Option<&str> {
        match self {
            Self::Do(index) | Self::Undo(index) => definition.steps.get(index).map(|step| step.name.as_str()),
            Self::Notify => Some(ON_COMPENSATED),
            Self::Completed | Self::Compensated => None,
        }
    }

    /// The call of this phase, and the time-out of one attempt in milliseconds.
    pub fn call(self, definition: &Definition) -> Option<(&Call, u64)> {
        match self {
            Self::Do(index) => definition.steps.get(index).map(|step| (&step.action, step.timeout_ms)),
            Self::Undo(index) => {
                definition.steps.get(index).and_then(|step| Some((step.undo.as_ref()?, step.timeout_ms)))
            }
            Self::Notify => definition.on_compensated.as_ref().map(|call| (call, ON_COMPENSATED_TIMEOUT_MS)),
            Self::Completed | Self::Compensated => None,
        }
    }

    pub(super) fn retry(self, definition: &Definition) -> RetryPolicy {
        match self {
            Self::Do(index) | Self::Undo(index) => {
                definition.steps.get(index).map(|step| step.retry).unwrap_or_default()
            }
            Self::Notify | Self::Completed | Self::Compensated => RetryPolicy::default(),
        }
    }
}

/// Why an instance is compensated.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failure {
    /// The step that failed, or that was current.
    pub step: String,
    /// The participant's code, or one of [`codes`].
    pub code: String,
    /// The reason to which the step's `failures` map the code; the code itself when they do not contain it.
    pub reason: String,
    pub message: String,
}

/// Failure codes of the orchestrator itself.
pub mod codes {
    /// The saga's deadline passed before its pivot.
    pub const DEADLINE: &str = "DeadlineExceeded";
    /// All attempts of a step are used up, and none has a certain outcome.
    pub const ATTEMPTS: &str = "AttemptsExhausted";
    /// A person cancelled the saga.
    pub const CANCELLED: &str = "Cancelled";
    /// A job that was accepted (202) has failed, and its status names no code.
    pub const JOB: &str = "JobFailed";
    /// An expression in `with` has no value, so nothing was sent. A participant cannot give this code: its own have no `/`.
    pub const EXPRESSION: &str = "weft/InvalidExpression";
}

/// Set when an operation that must succeed does not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stuck {
    /// The error of the last attempt, without anything that the participant wrote but its failure code.
    pub message: String,
    /// The participant's own text. It may contain values, so it stays out of the status and of conditions.
    pub detail: Option<String>,
    /// Milliseconds since the epoch.
    pub since_ms: i64,
    /// True after a definite failure: the instance continues only after a person's verb. False after unknown results:
    /// it is still retried, at the longest back-off.
    pub waits: bool,
}

impl Stuck {
    /// The message with the participant's own text, for the API.
    pub fn text(&self) -> String {
        text(&self.message, self.detail.as_deref())
    }
}

/// A message with its detail, if there is one.
pub fn text(message: &str, detail: Option<&str>) -> String {
    detail.map_or_else(|| message.to_owned(), |detail| format!("{message}: {detail}"))
}

/// One running instance.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::struct_excessive_bools)] // independent facts, not a state machine
pub struct State {
    pub phase: Phase,
    /// Number of the current attempt; 1 is the first. A higher one means that an earlier attempt may have had its
    /// effect.
    pub attempt: u32,
    /// The attempt with which the present allowance of `maxAttempts` began (a person's `retry` begins a new one).
    pub(super) allowance_from: u32,
    pub paused: bool,
    /// The pause withholds a call that was not issued yet.
    pub(super) held: bool,
    /// The pause came after a call was recorded and before it was sent. In memory only: a replay does not know it, and
    /// only `resume` depends on it.
    pub(super) stopped: bool,
    pub stuck: Option<Stuck>,
    /// The deadline passed after the pivot was called.
    pub overdue: bool,
    /// A person asked again for what the participant had refused: the idempotency key says `redo`.
    pub redo: bool,
    /// The pivot's undo was refused: the pivot happened, so the saga goes forward.
    pub(super) happened: bool,
    pub failure: Option<Failure>,
    pub input: Json,
    /// By step; `None` for a step that has not succeeded.
    pub replies: Vec<Option<Json>>,
}

impl State {
    /// The instance's state as shown in the API.
    pub fn status(&self) -> Status {
        match self.phase {
            Phase::Completed => Status::Completed,
            Phase::Compensated => Status::Compensated,
            _ if self.stuck.is_some() => Status::Stuck,
            Phase::Do(_) => Status::Running,
            Phase::Undo(_) | Phase::Notify => Status::Compensating,
        }
    }

    /// The last part of the current call's idempotency key: `do`, `undo` or `redo`; `None` at the end.
    pub fn operation(&self) -> Option<&'static str> {
        self.phase.operation().map(|operation| if self.redo { "redo" } else { operation })
    }

    pub fn is_compensating(&self) -> bool {
        matches!(self.phase, Phase::Undo(_) | Phase::Notify)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Status {
    Running,
    Compensating,
    Stuck,
    Completed,
    Compensated,
}

impl Status {
    pub const ALL: [Self; 5] = [Self::Running, Self::Compensating, Self::Stuck, Self::Completed, Self::Compensated];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "Running",
            Self::Compensating => "Compensating",
            Self::Stuck => "Stuck",
            Self::Completed => "Completed",
            Self::Compensated => "Compensated",
        }
    }

    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str().eq_ignore_ascii_case(text))
    }
}

/// An event of an instance, as the log stores it (externally tagged JSON).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Event {
    /// Always the first.
    Started {
        input: Json,
    },
    /// Success: the step took effect.
    Succeeded {
        at: Phase,
        attempt: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reply: Option<Json>,
        /// Why the answer's body is not the reply, in this program's words.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    },
    /// Definite failure: this attempt had no effect.
    Failed {
        at: Phase,
        attempt: u32,
        code: String,
        message: String,
        /// Why the code is not the participant's own, in this program's words.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    },
    /// Unknown: the attempt may or may not have taken effect.
    Unknown {
        at: Phase,
        attempt: u32,
        message: String,
        /// The participant's own text. It may contain values, so it stays out of the status and of conditions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
        /// The participant's `Retry-After`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u64>,
    },
    DeadlinePassed,
    /// `after` is the attempt that the instance had reached: recovery raises it in memory only, and a replay must not
    /// depend on that.
    Retry {
        after: u32,
    },
    Skip,
    Cancel,
    Pause,
    Resume,
}

/// What an event led to: the part of the state that decides what is called next and whether the instance waits. Attempts
/// are left out, since recovery and unrecorded attempts raise them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Outcome {
    pub phase: Phase,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stuck: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub paused: bool,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub redo: bool,
}

impl Outcome {
    pub fn of(state: &State) -> Self {
        let State { phase, paused, redo, .. } = *state;
        Self { phase, stuck: state.stuck.is_some(), paused, redo }
    }
}

/// A row of the log. A replay must lead to the same outcomes: rules that decide otherwise than those that wrote the row would
/// make another history of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record<E = Event> {
    pub event: E,
    pub to: Outcome,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_keep_their_form_in_the_log() {
        let json = |text: &str| Json::parse(text.to_owned()).unwrap();
        for (event, text) in [
            (Event::Started { input: json(r#"{"a":1}"#) }, r#"{"started":{"input":{"a":1}}}"#),
            (
                Event::Succeeded { at: Phase::Do(0), attempt: 1, reply: Some(json("[2]")), note: None },
                r#"{"succeeded":{"at":{"do":0},"attempt":1,"reply":[2]}}"#,
            ),
            (
                Event::Failed { at: Phase::Undo(3), attempt: 2, code: "C".into(), message: "m".into(), note: None },
                r#"{"failed":{"at":{"undo":3},"attempt":2,"code":"C","message":"m"}}"#,
            ),
            (
                Event::Unknown {
                    at: Phase::Notify,
                    attempt: 1,
                    message: "m".into(),
                    detail: Some("d".into()),
                    retry_after_ms: None,
                },
                r#"{"unknown":{"at":"notify","attempt":1,"message":"m","detail":"d"}}"#,
            ),
            (Event::DeadlinePassed, r#""deadlinePassed""#),
        ] {
            assert_eq!(serde_json::to_string(&event).unwrap(), text);
            assert_eq!(serde_json::from_str::<Event>(text).unwrap(), event);
        }
    }
}
