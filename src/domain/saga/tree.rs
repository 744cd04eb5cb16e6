//! The tree of a saga: its steps and groups as numbered nodes, which the rules, the engine and the views share.
//!
//! Nodes are numbered in preorder, so that what is within a node has the numbers from the node's own to its `end`, and what is
//! done later has a higher number than what is done earlier, except between the branches of an `all`.
//!
//! ```text
//!   step with `when`     ─► Choice ─► the step without it, or the sequence of `else`
//!   step with `forEach`  ─► Each   ─► the step without it, once for each item
//! ```
//! These nodes have the name of their step: only the innermost one is a call, so a path names one call. The last node is the
//! output, when the saga has one.

use std::{borrow::Cow, collections::BTreeMap};

use super::{
    definition::{Call, Definition, RetryPolicy, Step, Task, Transaction},
    state::{At, Place},
};

/// The step name of the call to `onCompensated`, in idempotency key and history.
pub const ON_COMPENSATED: &str = "onCompensated";
/// The step name of the evaluation of the output, in the history.
pub const OUTPUT: &str = "output";
/// Time-out of one attempt of `onCompensated`, in milliseconds.
const ON_COMPENSATED_TIMEOUT_MS: u64 = 10_000;

/// Index of a node in its tree.
pub type NodeId = u32;

/// The sequence of the definition's steps.
pub const ROOT: NodeId = 0;

#[derive(Debug)]
pub struct Tree {
    pub deadline_ms: u64,
    nodes: Vec<Node>,
    /// In the order of the definition, each before those in it.
    steps: Vec<Named>,
    pivot: Option<NodeId>,
    notify: Option<Call>,
}

#[derive(Debug)]
pub struct Node {
    /// Of the step; empty for sequences that have no name.
    pub name: String,
    pub kind: Kind,
    pub parent: Option<NodeId>,
    /// The one after it, when it is in a sequence.
    pub next: Option<NodeId>,
    /// After the last node within it.
    pub end: NodeId,
    /// The `forEach` around it.
    pub each: Option<NodeId>,
    /// Whether a condition decides if it is done.
    pub conditional: bool,
}

#[derive(Debug)]
pub enum Kind {
    Call(Box<Transaction>),
    Wait {
        duration_ms: u64,
    },
    /// The time is evaluated.
    WaitUntil(String),
    Signal {
        within_ms: Option<u64>,
    },
    Sequence(Vec<NodeId>),
    All(Vec<NodeId>),
    Choice {
        condition: String,
        then: NodeId,
        otherwise: Option<NodeId>,
    },
    Each {
        items: String,
        concurrency: u32,
        body: NodeId,
    },
    /// What the instance shows once it has completed. It is evaluated last, and completes the instance also without a value.
    Output(BTreeMap<String, String>),
}

/// The nodes of one step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Named {
    pub choice: Option<NodeId>,
    pub each: Option<NodeId>,
    /// What is done, innermost.
    pub task: Option<NodeId>,
}

/// When one node is done, as seen from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Same,
    /// `always`: unless the other is done, too, it has been done.
    Before {
        always: bool,
    },
    After,
    /// In another branch of an `all`.
    Beside,
    /// In the other branch of a condition.
    Instead,
}

/// Where a node is.
#[derive(Clone, Copy)]
struct Around {
    parent: NodeId,
    each: Option<NodeId>,
    conditional: bool,
}

impl Tree {
    pub fn of(definition: &Definition) -> Self {
        let mut tree = Self {
            deadline_ms: definition.deadline_ms,
            nodes: Vec::new(),
            steps: Vec::new(),
            pivot: None,
            notify: definition.on_compensated.clone(),
        };
        let root = tree.push("", None);
        let around = Around { parent: root, each: None, conditional: false };
        let mut children = tree.add_sequence(&definition.steps, around);
        if !definition.output.is_empty() {
            let output = tree.push("", Some(around));
            tree.finish(output, Kind::Output(definition.output.clone()));
            tree.follow(children.last().copied(), output);
            children.push(output);
        }
        tree.finish(root, Kind::Sequence(children));
        tree.pivot = tree.ids().find(|id| tree.transaction(*id).is_some_and(|call| call.pivot));
        tree
    }

    fn push(&mut self, name: &str, around: Option<Around>) -> NodeId {
        let id = NodeId::try_from(self.nodes.len()).unwrap_or(NodeId::MAX);
        self.nodes.push(Node {
            name: name.to_owned(),
            kind: Kind::Sequence(Vec::new()),
            parent: around.map(|around| around.parent),
            next: None,
            end: id,
            each: around.and_then(|around| around.each),
            conditional: around.is_some_and(|around| around.conditional),
        });
        id
    }

    fn finish(&mut self, id: NodeId, kind: Kind) {
        let end = NodeId::try_from(self.nodes.len()).unwrap_or(NodeId::MAX);
        if let Some(node) = self.nodes.get_mut(id as usize) {
            (node.kind, node.end) = (kind, end);
        }
    }

    fn add_sequence(&mut self, steps: &[Step], around: Around) -> Vec<NodeId> {
        let children: Vec<NodeId> = steps.iter().map(|step| self.add(step, around)).collect();
        for pair in children.windows(2) {
            if let [earlier, later] = *pair {
                self.follow(Some(earlier), later);
            }
        }
        children
    }

    fn follow(&mut self, earlier: Option<NodeId>, later: NodeId) {
        if let Some(node) = earlier.and_then(|earlier| self.nodes.get_mut(earlier as usize)) {
            node.next = Some(later);
        }
    }

    fn add(&mut self, step: &Step, around: Around) -> NodeId {
        let index = self.steps.len();
        self.steps.push(Named::default());
        let Some(condition) = &step.when else { return self.add_each(step, index, around) };
        let id = self.push(&step.name, Some(around));
        self.note(index, |named| named.choice = Some(id));
        let within = Around { parent: id, conditional: true, ..around };
        let then = self.add_each(step, index, within);
        let otherwise = (!step.otherwise.is_empty()).then(|| {
            let sequence = self.push("", Some(within));
            let children = self.add_sequence(&step.otherwise, Around { parent: sequence, ..within });
            self.finish(sequence, Kind::Sequence(children));
            sequence
        });
        self.finish(id, Kind::Choice { condition: condition.clone(), then, otherwise });
        id
    }

    fn note(&mut self, index: usize, change: impl FnOnce(&mut Named)) {
        if let Some(named) = self.steps.get_mut(index) {
            change(named);
        }
    }

    fn add_each(&mut self, step: &Step, index: usize, around: Around) -> NodeId {
        let Some(each) = &step.for_each else { return self.add_task(step, index, around) };
        let id = self.push(&step.name, Some(around));
        self.note(index, |named| named.each = Some(id));
        let body = self.add_task(step, index, Around { parent: id, each: Some(id), ..around });
        self.finish(id, Kind::Each { items: each.items.clone(), concurrency: each.concurrency.max(1), body });
        id
    }

    fn add_task(&mut self, step: &Step, index: usize, around: Around) -> NodeId {
        let id = self.push(&step.name, Some(around));
        self.note(index, |named| named.task = Some(id));
        let within = Around { parent: id, ..around };
        let kind = match &step.task {
            Task::Call(transaction) => Kind::Call(transaction.clone()),
            Task::Wait(wait) => Kind::Wait { duration_ms: wait.duration_ms },
            Task::WaitUntil(time) => Kind::WaitUntil(time.clone()),
            Task::Signal(signal) => Kind::Signal { within_ms: signal.within_ms },
            Task::All(steps) => Kind::All(steps.iter().map(|step| self.add(step, within)).collect()),
            Task::Steps(steps) => Kind::Sequence(self.add_sequence(steps, within)),
        };
        self.finish(id, kind);
        id
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    pub fn ids(&self) -> impl DoubleEndedIterator<Item = NodeId> + use<> {
        0..NodeId::try_from(self.nodes.len()).unwrap_or(NodeId::MAX)
    }

    pub fn nodes(&self) -> impl Iterator<Item = (NodeId, &Node)> {
        self.ids().zip(&self.nodes)
    }

    pub fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id as usize)
    }

    pub fn kind(&self, id: NodeId) -> Option<&Kind> {
        self.node(id).map(|node| &node.kind)
    }

    pub fn transaction(&self, id: NodeId) -> Option<&Transaction> {
        if let Some(Kind::Call(transaction)) = self.kind(id) { Some(transaction) } else { None }
    }

    pub fn has_undo(&self, id: NodeId) -> bool {
        self.transaction(id).is_some_and(|transaction| transaction.undo.call().is_some())
    }

    pub fn has_notify(&self) -> bool {
        self.notify.is_some()
    }

    /// The point of no return, if the saga has one.
    pub fn pivot(&self) -> Option<NodeId> {
        self.pivot
    }

    /// The pivot when it has no undo, so that nothing can ask whether it happened.
    pub fn final_pivot(&self) -> Option<NodeId> {
        self.pivot.filter(|pivot| !self.has_undo(*pivot))
    }

    pub fn output(&self) -> Option<NodeId> {
        let last = self.ids().next_back()?;
        matches!(self.kind(last), Some(Kind::Output(_))).then_some(last)
    }

    /// Whether the node is evaluated: the result is an event.
    pub fn is_evaluation(&self, node: NodeId) -> bool {
        matches!(self.kind(node), Some(Kind::WaitUntil(_) | Kind::Choice { .. } | Kind::Each { .. } | Kind::Output(_)))
    }

    /// The nodes of each step, in the order of the definition: a step comes before those in it, and these before `else`.
    pub fn steps(&self) -> &[Named] {
        &self.steps
    }

    /// What the step of this name does; the first, when there are several.
    pub fn task(&self, name: &str) -> Option<NodeId> {
        let mut tasks = self.steps.iter().filter_map(|step| step.task);
        tasks.find(|task| self.node(*task).is_some_and(|node| node.name == name))
    }

    /// From the node outwards to the root.
    pub fn ancestors(&self, node: NodeId) -> impl Iterator<Item = NodeId> {
        std::iter::successors(Some(node), |node| self.node(*node)?.parent)
    }

    /// When `node` is done, as seen from `here`.
    pub fn order(&self, node: NodeId, here: NodeId) -> Order {
        if node == here {
            return Order::Same;
        }
        let is_around =
            |node: NodeId, inner: NodeId| self.node(node).is_some_and(|found| (node..found.end).contains(&inner));
        if is_around(node, here) || is_around(here, node) {
            return Order::After;
        }
        let Some(shared) = self.ancestors(node).find(|ancestor| is_around(*ancestor, here)) else {
            return Order::After;
        };
        let conditional = self.ancestors(node).take_while(|ancestor| *ancestor != shared);
        let always = !conditional.into_iter().any(|ancestor| matches!(self.kind(ancestor), Some(Kind::Choice { .. })));
        match self.kind(shared) {
            Some(Kind::All(_)) => Order::Beside,
            Some(Kind::Choice { .. }) => Order::Instead,
            _ if node < here => Order::Before { always },
            _ => Order::After,
        }
    }

    /// The signal of this name.
    pub fn signal(&self, name: &str) -> Option<NodeId> {
        let mut nodes = self.nodes();
        nodes.find(|(_, node)| matches!(node.kind, Kind::Signal { .. }) && node.name == name).map(|(id, _)| id)
    }

    /// The call, and the time-out of one attempt in milliseconds.
    pub fn call(&self, at: At) -> Option<(&Call, u64)> {
        match at {
            At::Do(place) => self.transaction(place.node).map(|call| (&call.action, call.timeout_ms)),
            At::Undo(place) => self.transaction(place.node).and_then(|call| Some((call.undo.call()?, call.timeout_ms))),
            At::Notify => self.notify.as_ref().map(|call| (call, ON_COMPENSATED_TIMEOUT_MS)),
        }
    }

    pub(super) fn retry(&self, at: At) -> RetryPolicy {
        let call = at.place().and_then(|place| self.transaction(place.node));
        call.map(|call| call.retry).unwrap_or_default()
    }

    /// The step as in idempotency key and history: `NAME`, or `NAME.ITEM` in a `forEach`, counted from 0.
    pub fn path(&self, at: At) -> Cow<'_, str> {
        let Some(Place { node, item }) = at.place() else { return Cow::Borrowed(ON_COMPENSATED) };
        let name = self.node(node).map_or("", |node| node.name.as_str());
        let name = if matches!(self.kind(node), Some(Kind::Output(_))) { OUTPUT } else { name };
        item.map_or(Cow::Borrowed(name), |item| Cow::Owned(format!("{name}.{item}")))
    }

    /// What is in progress there: `do` or `undo` of a call, `wait`, `signal`, the expression `when` or `forEach`, or `evaluate` of
    /// the output.
    pub fn operation(&self, at: At) -> &'static str {
        match at.place().and_then(|place| self.kind(place.node)) {
            Some(Kind::Wait { .. } | Kind::WaitUntil(_)) => "wait",
            Some(Kind::Signal { .. }) => "signal",
            Some(Kind::Choice { .. }) => "when",
            Some(Kind::Each { .. }) => "forEach",
            Some(Kind::Output(_)) => "evaluate",
            _ => at.operation(),
        }
    }

    /// How many milliseconds after it began the step is over by itself.
    pub fn timer_ms(&self, at: At) -> Option<u64> {
        let At::Do(place) = at else { return None };
        match self.kind(place.node)? {
            Kind::Wait { duration_ms } => Some(*duration_ms),
            Kind::Signal { within_ms } => *within_ms,
            _ => None,
        }
    }
}
