//! Walks the tree: what begins when something is done, and what is undone when the saga turns back.

use super::{
    decide::{Actions, Command},
    state::{Active, At, Failure, Iterations, Place, Stage, State},
    tree::{Kind, NodeId, ROOT, Tree},
};

/// One decision in the making.
pub(super) struct Walk<'a> {
    pub tree: &'a Tree,
    pub state: &'a mut State,
    pub now_ms: i64,
    pub actions: Actions,
}

impl Walk<'_> {
    pub(super) fn start(&mut self) {
        if !self.enter(ROOT, None) {
            self.end(Stage::Completed);
        }
    }

    fn end(&mut self, stage: Stage) {
        self.state.stage = stage;
        self.state.active.clear();
    }

    /// Begins a node; returns whether anything in it is in progress now. What is done at once begins nothing after it: that is
    /// the caller's.
    pub(super) fn enter(&mut self, node: NodeId, item: Option<u32>) -> bool {
        let place = Place { node, item };
        let tree = self.tree;
        match tree.kind(node) {
            None => false,
            Some(Kind::Sequence(children)) => children.iter().any(|child| self.enter(*child, item)),
            Some(Kind::All(children)) => children.iter().filter(|child| self.enter(**child, item)).count() > 0,
            Some(Kind::Signal { .. }) if self.receive(place) => false,
            Some(
                Kind::Call(_)
                | Kind::Wait { .. }
                | Kind::WaitUntil(_)
                | Kind::Signal { .. }
                | Kind::Choice { .. }
                | Kind::Each { .. }
                | Kind::Output(_),
            ) => {
                self.begin(At::Do(place));
                true
            }
        }
    }

    /// Whether the signal has come before the instance waits for it.
    fn receive(&mut self, place: Place) -> bool {
        let received = self.state.received.iter().find(|received| received.node == place.node);
        let Some(body) = received.map(|received| received.body.clone()) else { return false };
        self.state.set_reply(place, body);
        true
    }

    pub(super) fn begin(&mut self, at: At) {
        self.state.active.push(Active {
            at,
            attempt: 1,
            allowance_from: 1,
            held: false,
            stopped: false,
            redo: false,
            since_ms: self.now_ms,
            until_ms: None,
            stuck: None,
        });
        self.issue(at, 0);
    }

    /// Calls, unless the instance is paused, or evaluates. A wait and a signal need nothing: the engine knows when they are due.
    pub(super) fn issue(&mut self, at: At, after_ms: u64) {
        let is_call = self.tree.call(at).is_some();
        let evaluates = at.place().is_some_and(|place| self.tree.is_evaluation(place.node));
        let held = self.state.paused && is_call;
        let Some(active) = self.state.find_mut(at) else { return };
        (active.held, active.stopped) = (held, false);
        let command = Command { at, attempt: active.attempt, after_ms };
        if evaluates || is_call && !held {
            self.actions.push(command);
        }
    }

    /// Calls once more.
    pub(super) fn again(&mut self, at: At, after_ms: u64) {
        if let Some(active) = self.state.find_mut(at) {
            active.attempt = active.attempt.saturating_add(1);
        }
        self.issue(at, after_ms);
    }

    fn remove(&mut self, at: At) {
        self.state.active.retain(|active| active.at != at);
    }

    /// What was in progress is done, or passed over by a person.
    pub(super) fn finish(&mut self, at: At) {
        self.remove(at);
        match at {
            At::Do(place) => self.done(place),
            At::Undo(_) => self.undo_next(),
            At::Notify => self.end(Stage::Compensated),
        }
    }

    fn done(&mut self, place: Place) {
        if self.tree.pivot() == Some(place.node) {
            // nothing before it will be undone
            self.state.completed = Vec::new();
        } else if self.tree.has_undo(place.node) && self.tree.pivot().is_none_or(|pivot| place.node < pivot) {
            self.state.completed.push(place);
        }
        self.after(place);
    }

    /// Begins what comes after a node that is done.
    fn after(&mut self, Place { node, item }: Place) {
        let tree = self.tree;
        let Some(parent) = tree.node(node).and_then(|node| node.parent) else { return self.end(Stage::Completed) };
        let whole = Place { node: parent, item };
        match tree.kind(parent) {
            Some(Kind::Sequence(_)) => {
                let mut next = tree.node(node).and_then(|node| node.next);
                while let Some(sibling) = next {
                    if self.enter(sibling, item) {
                        return;
                    }
                    next = tree.node(sibling).and_then(|node| node.next);
                }
                self.after(whole);
            }
            Some(Kind::All(_)) if self.is_active_within(whole) => {}
            Some(Kind::Each { .. }) => {
                if let Some(iterations) = self.state.iterations.get_mut(&parent) {
                    iterations.running = iterations.running.saturating_sub(1);
                }
                self.iterate(parent);
            }
            _ => self.after(whole),
        }
    }

    fn is_active_within(&self, Place { node, item }: Place) -> bool {
        let end = self.tree.node(node).map_or(node, |node| node.end);
        let mut places = self.state.active.iter().filter_map(|active| active.at.place());
        // outside every `forEach`, any item of one within it counts
        places.any(|place| (node..end).contains(&place.node) && (item.is_none() || place.item == item))
    }

    /// The condition of a `when` is known.
    pub(super) fn choose(&mut self, place: Place, value: bool) {
        self.remove(At::Do(place));
        let branch = match self.tree.kind(place.node) {
            Some(Kind::Choice { then, .. }) if value => Some(*then),
            Some(Kind::Choice { otherwise, .. }) => *otherwise,
            _ => None,
        };
        if !branch.is_some_and(|branch| self.enter(branch, place.item)) {
            self.after(place);
        }
    }

    /// The list of a `forEach` is known.
    pub(super) fn list(&mut self, place: Place, iterations: Iterations) {
        self.remove(At::Do(place));
        self.state.iterations.insert(place.node, iterations);
        self.iterate(place.node);
    }

    /// Begins as many items as may be worked on.
    fn iterate(&mut self, each: NodeId) {
        let Some(Kind::Each { concurrency, body, .. }) = self.tree.kind(each) else { return };
        loop {
            let Some(iterations) = self.state.iterations.get_mut(&each) else { return };
            let item = iterations.begun;
            if item as usize >= iterations.items.len() {
                break;
            }
            if iterations.running >= *concurrency {
                return;
            }
            iterations.begun += 1;
            if self.enter(*body, Some(item))
                && let Some(iterations) = self.state.iterations.get_mut(&each)
            {
                iterations.running += 1;
            }
        }
        if self.state.iterations.get(&each).is_some_and(|iterations| iterations.running == 0) {
            self.after(Place { node: each, item: None });
        }
    }

    /// Turns back because of `culprit`. What completed is undone in reverse order, and before that, in the reverse order in which
    /// they began, the calls in progress: nobody knows whether they have had their effect. `refused`: the culprit has not.
    pub(super) fn compensate(&mut self, culprit: Option<At>, code: &str, message: &str, refused: bool) {
        let culprit = culprit.or_else(|| self.state.active.first().map(|active| active.at));
        let transaction = culprit.and_then(At::place).and_then(|place| self.tree.transaction(place.node));
        let reason = transaction.and_then(|transaction| transaction.failures.get(code)).map_or(code, String::as_str);
        self.state.failure = Some(Failure {
            step: culprit.map(|culprit| self.tree.path(culprit).into_owned()).unwrap_or_default(),
            code: code.to_owned(),
            reason: reason.to_owned(),
            message: message.to_owned(),
        });
        self.state.stage = Stage::Compensating;
        let active = std::mem::take(&mut self.state.active);
        let in_doubt = active.iter().filter(|active| !(active.is_unsent() || refused && Some(active.at) == culprit));
        let places = in_doubt.filter_map(|active| active.at.place()).filter(|place| self.tree.has_undo(place.node));
        self.state.completed.extend(places);
        self.undo_next();
    }

    fn undo_next(&mut self) {
        match self.state.completed.pop() {
            Some(place) => self.begin(At::Undo(place)),
            None if self.tree.has_notify() => self.begin(At::Notify),
            None => self.end(Stage::Compensated),
        }
    }

    /// The pivot's undo was refused. Its reply may be lost, so it is called again; what went before is in doubt no longer, but
    /// that attempt is not its first.
    pub(super) fn pivot_happened(&mut self, pivot: Place) {
        self.end(Stage::Forward);
        (self.state.happened, self.state.failure) = (true, None);
        self.begin(At::Do(pivot));
        // its first attempt, which is not sent again
        self.actions = Actions::default();
        if let Some(active) = self.state.find_mut(At::Do(pivot)) {
            (active.attempt, active.allowance_from) = (2, 2);
        }
        self.issue(At::Do(pivot), 0);
    }
}
