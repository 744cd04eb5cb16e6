//! The state of one instance, and the events that lead to it.

use std::{collections::BTreeMap, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::value::RawValue;

use super::tree::{NodeId, Tree};

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

/// A node of the tree, in a `forEach` for one item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub node: NodeId,
    /// Index in the list of the `forEach` around it.
    pub item: Option<u32>,
}

/// In the log `3`, or `[3, 0]` with an item.
impl Serialize for Place {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.item {
            None => self.node.serialize(serializer),
            Some(item) => (self.node, item).serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Place {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Form {
            Node(NodeId),
            Item(NodeId, u32),
        }
        Ok(match Form::deserialize(deserializer)? {
            Form::Node(node) => Self { node, item: None },
            Form::Item(node, item) => Self { node, item: Some(item) },
        })
    }
}

/// Something that is in progress. In a `do` it may be more than a call: an expression that is evaluated, a wait, a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum At {
    Do(Place),
    Undo(Place),
    /// Everything is undone; `onCompensated` is being called.
    Notify,
}

impl At {
    /// The `do` of a node outside every `forEach`.
    pub fn of(node: NodeId) -> Self {
        Self::Do(Place { node, item: None })
    }

    pub fn place(self) -> Option<Place> {
        match self {
            Self::Do(place) | Self::Undo(place) => Some(place),
            Self::Notify => None,
        }
    }

    /// `do` or `undo`.
    pub fn operation(self) -> &'static str {
        match self {
            Self::Do(_) | Self::Notify => "do",
            Self::Undo(_) => "undo",
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
    /// A signal did not arrive in time.
    pub const SIGNAL: &str = "SignalTimeout";
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

/// Where an instance is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Stage {
    #[default]
    Forward,
    Compensating,
    Completed,
    Compensated,
}

impl Stage {
    pub fn is_end(self) -> bool {
        matches!(self, Self::Completed | Self::Compensated)
    }
}

/// Something that is in progress, with its own attempts.
#[derive(Clone, Debug, PartialEq)]
pub struct Active {
    pub at: At,
    /// Number of the current attempt; 1 is the first. A higher one means that an earlier attempt may have had its
    /// effect.
    pub attempt: u32,
    /// The attempt with which the present allowance of `maxAttempts` began (a person's `retry` begins a new one).
    pub(super) allowance_from: u32,
    /// The pause withholds a call that was not issued yet.
    pub(super) held: bool,
    /// The pause came after a call was recorded and before it was sent. In memory only: a replay does not know it, and
    /// only `resume` depends on it.
    pub(super) stopped: bool,
    /// A person asked again for what the participant had refused: the idempotency key says `redo`.
    pub redo: bool,
    /// Milliseconds since the epoch at which it began, by which timers are set.
    pub(super) since_ms: i64,
    /// The time until which it waits, in milliseconds since the epoch, once it is evaluated.
    pub(super) until_ms: Option<i64>,
    pub stuck: Option<Box<Stuck>>,
}

impl Active {
    /// The last part of the idempotency key: `do`, `undo` or `redo`.
    pub fn operation(&self) -> &'static str {
        if self.redo { "redo" } else { self.at.operation() }
    }

    /// Nothing was sent: the pause came first.
    pub(super) fn is_unsent(&self) -> bool {
        self.held && self.attempt == 1
    }

    /// When it is over by itself, in milliseconds since the epoch.
    pub fn due_ms(&self, tree: &Tree) -> Option<i64> {
        if self.stuck.is_some() {
            return None;
        }
        self.until_ms.or_else(|| {
            let timer = i64::try_from(tree.timer_ms(self.at)?).unwrap_or(i64::MAX);
            Some(self.since_ms.saturating_add(timer))
        })
    }
}

/// A `forEach` that has begun.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Iterations {
    pub items: Vec<Json>,
    /// How many have begun.
    pub begun: u32,
    /// How many have begun and are not done.
    pub running: u32,
}

/// A signal that has arrived.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Received {
    pub node: NodeId,
    pub key: Option<String>,
    pub body: Json,
}

/// One running instance.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    pub stage: Stage,
    /// What is in progress, in the order in which it began. Empty at the end only.
    pub active: Vec<Active>,
    /// The calls that have to be undone if the saga is compensated, in the order of their completion.
    pub(super) completed: Vec<Place>,
    pub paused: bool,
    /// The deadline passed after the pivot was called.
    pub overdue: bool,
    /// The pivot's undo was refused: the pivot happened, so the saga goes forward.
    pub(super) happened: bool,
    pub failure: Option<Failure>,
    pub input: Json,
    /// Of an instance that has completed.
    pub output: Option<Json>,
    /// By node; `None` for a step that has not succeeded.
    replies: Vec<Option<Json>>,
    /// Of the steps in a `forEach`.
    item_replies: BTreeMap<Place, Json>,
    pub(super) iterations: BTreeMap<NodeId, Iterations>,
    pub(super) received: Vec<Received>,
}

impl State {
    pub(super) fn new(tree: &Tree, input: Json) -> Self {
        Self {
            stage: Stage::Forward,
            active: Vec::with_capacity(1),
            completed: Vec::new(),
            paused: false,
            overdue: false,
            happened: false,
            failure: None,
            input,
            output: None,
            replies: vec![None; tree.len()],
            item_replies: BTreeMap::new(),
            iterations: BTreeMap::new(),
            received: Vec::new(),
        }
    }

    /// The instance's state as shown in the API.
    pub fn status(&self) -> Status {
        match self.stage {
            Stage::Completed => Status::Completed,
            Stage::Compensated => Status::Compensated,
            _ if self.stuck().is_some() => Status::Stuck,
            Stage::Forward => Status::Running,
            Stage::Compensating => Status::Compensating,
        }
    }

    pub fn find(&self, at: At) -> Option<&Active> {
        self.active.iter().find(|active| active.at == at)
    }

    pub(super) fn find_mut(&mut self, at: At) -> Option<&mut Active> {
        self.active.iter_mut().find(|active| active.at == at)
    }

    /// The first that is stuck.
    pub fn stuck(&self) -> Option<(&Active, &Stuck)> {
        self.active.iter().find_map(|active| Some((active, active.stuck.as_deref()?)))
    }

    pub fn reply(&self, place: Place) -> Option<&Json> {
        match place.item {
            None => self.replies.get(place.node as usize)?.as_ref(),
            Some(_) => self.item_replies.get(&place),
        }
    }

    pub(super) fn set_reply(&mut self, place: Place, reply: Json) {
        if place.item.is_some() {
            self.item_replies.insert(place, reply);
        } else if let Some(slot) = self.replies.get_mut(place.node as usize) {
            *slot = Some(reply);
        }
    }

    /// The items of a `forEach` that has begun.
    pub fn items(&self, each: NodeId) -> Option<&[Json]> {
        self.iterations.get(&each).map(|iterations| iterations.items.as_slice())
    }

    /// Bytes of all JSON in it.
    pub fn length(&self) -> usize {
        let values = std::iter::once(&self.input)
            .chain(self.replies.iter().flatten())
            .chain(self.item_replies.values())
            .chain(self.iterations.values().flat_map(|iterations| &iterations.items))
            .chain(self.received.iter().map(|received| &received.body));
        values.map(|value| value.as_str().len()).sum()
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
