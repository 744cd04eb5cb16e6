//! The events of an instance, and the rows of its log.

use serde::{Deserialize, Serialize, Serializer};

use super::state::{Active, At, Json, Stage, State};

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
        at: At,
        attempt: u32,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reply: Option<Json>,
        /// Why the answer's body is not the reply, in this program's words.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    },
    /// Definite failure: this attempt had no effect.
    Failed {
        at: At,
        attempt: u32,
        code: String,
        message: String,
        /// Why the code is not the participant's own, in this program's words.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    },
    /// Unknown: the attempt may or may not have taken effect.
    Unknown {
        at: At,
        attempt: u32,
        message: String,
        /// The participant's own text. It may contain values, so it stays out of the status and of conditions.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        detail: Option<String>,
        /// The participant's `Retry-After`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_after_ms: Option<u64>,
    },
    /// The condition of a `when`.
    Chosen {
        at: At,
        value: bool,
    },
    /// The list of a `forEach`.
    Listed {
        at: At,
        items: Vec<Json>,
    },
    /// The time of a `waitUntil`, in milliseconds since the epoch.
    Scheduled {
        at: At,
        until_ms: i64,
    },
    /// The output of an instance that has done everything, or why it has none.
    Produced {
        at: At,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        output: Option<Json>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        note: Option<String>,
    },
    /// A wait is over, or a signal has not come in time.
    Elapsed {
        at: At,
    },
    /// A signal arrives, perhaps before the instance waits for it. `key` is the `Idempotency-Key`.
    Signalled {
        name: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        key: Option<String>,
        body: Json,
    },
    DeadlinePassed,
    Retry {
        calls: Vec<Reached>,
    },
    Skip {
        at: At,
    },
    Cancel,
    Pause,
    Resume,
}

/// A call with the attempt that the instance had reached: recovery raises it in memory only, and a replay must not depend on
/// that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    pub at: At,
    pub attempt: u32,
}

/// What an event led to: the part of the state that decides what is done next and whether the instance waits. Attempts
/// are left out, since recovery and unrecorded attempts raise them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct Outcome {
    /// What is in progress.
    #[serde(default)]
    pub at: Vec<At>,
    /// What of that is stuck.
    #[serde(default)]
    pub stuck: Vec<At>,
    #[serde(default)]
    pub redo: Vec<At>,
    #[serde(default)]
    pub paused: bool,
    #[serde(default)]
    pub end: Option<Stage>,
}

impl Outcome {
    pub fn of(state: &State) -> Self {
        let filtered = |wanted: fn(&Active) -> bool| {
            state.active.iter().filter(|active| wanted(active)).map(|active| active.at).collect::<Vec<_>>()
        };
        Self {
            at: filtered(|_| true),
            stuck: filtered(|active| active.stuck.is_some()),
            redo: filtered(|active| active.redo),
            paused: state.paused,
            end: Some(state.stage).filter(|stage| stage.is_end()),
        }
    }
}

/// Who asked for an event, and why, as they say: the API has no accounts. It changes nothing of what is decided.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Audit {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Audit {
    fn is_empty(&self) -> bool {
        self.by.is_none() && self.reason.is_none()
    }
}

/// A row of the log as it is written, without a copy of anything. It is read as a [`Record`].
#[derive(Debug, Serialize)]
pub struct Written<'a> {
    event: &'a Event,
    #[serde(skip_serializing_if = "Option::is_none")]
    audit: Option<&'a Audit>,
    to: WrittenOutcome<'a>,
}

impl<'a> Written<'a> {
    pub fn new(event: &'a Event, audit: Option<&'a Audit>, state: &'a State) -> Self {
        let places = |wanted: fn(&Active) -> bool| Places { active: &state.active, wanted };
        let to = WrittenOutcome {
            at: places(|_| true),
            stuck: places(|active| active.stuck.is_some()),
            redo: places(|active| active.redo),
            paused: state.paused,
            end: Some(state.stage).filter(|stage| stage.is_end()),
        };
        Self { event, audit: audit.filter(|audit| !audit.is_empty()), to }
    }
}

/// An [`Outcome`].
#[derive(Debug, Serialize)]
struct WrittenOutcome<'a> {
    #[serde(skip_serializing_if = "Places::is_empty")]
    at: Places<'a>,
    #[serde(skip_serializing_if = "Places::is_empty")]
    stuck: Places<'a>,
    #[serde(skip_serializing_if = "Places::is_empty")]
    redo: Places<'a>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    paused: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    end: Option<Stage>,
}

#[derive(Debug)]
struct Places<'a> {
    active: &'a [Active],
    wanted: fn(&Active) -> bool,
}

impl Places<'_> {
    fn is_empty(&self) -> bool {
        !self.active.iter().any(self.wanted)
    }
}

impl Serialize for Places<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.active.iter().filter(|active| (self.wanted)(active)).map(|active| active.at))
    }
}

/// A row of the log. A replay must lead to the same outcomes: rules that decide otherwise than those that wrote the row would
/// make another history of it.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Record {
    pub event: Event,
    #[serde(default)]
    pub audit: Option<Audit>,
    pub to: Outcome,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::saga::state::Place;

    #[test]
    fn events_keep_their_form_in_the_log() {
        let json = |text: &str| Json::parse(text.to_owned()).unwrap();
        let place = |node| Place { node, item: None };
        for (event, text) in [
            (Event::Started { input: json(r#"{"a":1}"#) }, r#"{"started":{"input":{"a":1}}}"#),
            (
                Event::Succeeded { at: At::Do(place(1)), attempt: 1, reply: Some(json("[2]")), note: None },
                r#"{"succeeded":{"at":{"do":1},"attempt":1,"reply":[2]}}"#,
            ),
            (
                Event::Failed { at: At::Undo(place(3)), attempt: 2, code: "C".into(), message: "m".into(), note: None },
                r#"{"failed":{"at":{"undo":3},"attempt":2,"code":"C","message":"m"}}"#,
            ),
            (
                Event::Unknown {
                    at: At::Notify,
                    attempt: 1,
                    message: "m".into(),
                    detail: Some("d".into()),
                    retry_after_ms: None,
                },
                r#"{"unknown":{"at":"notify","attempt":1,"message":"m","detail":"d"}}"#,
            ),
            (
                Event::Chosen { at: At::Do(Place { node: 7, item: Some(0) }), value: true },
                r#"{"chosen":{"at":{"do":[7,0]},"value":true}}"#,
            ),
            (
                Event::Listed { at: At::Do(place(2)), items: vec![json(r#"{"a":1}"#)] },
                r#"{"listed":{"at":{"do":2},"items":[{"a":1}]}}"#,
            ),
            (Event::Scheduled { at: At::Do(place(2)), until_ms: 7 }, r#"{"scheduled":{"at":{"do":2},"until_ms":7}}"#),
            (
                Event::Produced { at: At::Do(place(4)), output: Some(json("{}")), note: None },
                r#"{"produced":{"at":{"do":4},"output":{}}}"#,
            ),
            (
                Event::Signalled { name: "paid".into(), key: None, body: json("1") },
                r#"{"signalled":{"name":"paid","body":1}}"#,
            ),
            (
                Event::Retry { calls: vec![Reached { at: At::Notify, attempt: 3 }] },
                r#"{"retry":{"calls":[{"at":"notify","attempt":3}]}}"#,
            ),
            (Event::DeadlinePassed, r#""deadlinePassed""#),
        ] {
            assert_eq!(serde_json::to_string(&event).unwrap(), text);
            assert_eq!(serde_json::from_str::<Event>(text).unwrap(), event);
        }
    }
}
