//! The lint of a saga: finds what is wrong with it before anything runs. Pure; the operator puts the findings into
//! `Accepted=False`. Whether the named services and commands exist is not known here: the operator checks that.

use std::fmt;

use super::{
    definition::{Call, Definition, Step, Task, Transaction, Undo},
    lint_expressions::{Site, check_call, check_expression},
    schema::Schema,
    tree::{Named, ON_COMPENSATED, OUTPUT, ROOT, Tree},
};

/// Steps of all levels. Each may be a call and an undo, and every call of an instance is a row of its log.
const MAX_STEPS: usize = 256;

/// One fault. Displays as one sentence: `FIELD: MESSAGE`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Path from the object's root: `spec.steps[1].do.with.amount`.
    pub field: String,
    /// What is wrong with which value, and how to fix it.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// A step with its field.
struct Found<'a> {
    field: String,
    step: &'a Step,
    nodes: Named,
    /// In a group, or after `else`.
    nested: bool,
    in_each: bool,
}

/// All faults of `definition`, in the order of its fields; empty when it can run. Its calls need no addresses yet.
pub fn lint(definition: &Definition) -> Vec<Finding> {
    let mut steps = Vec::new();
    let tree = Tree::of(definition);
    find_steps(&definition.steps, "spec.steps", (false, false), tree.steps(), &mut steps);
    let mut lint = Lint { definition, tree: &tree, findings: Findings(Vec::new()) };
    lint.check(&steps);
    lint.findings.0
}

fn find_steps<'a>(
    steps: &'a [Step],
    field: &str,
    (nested, in_each): (bool, bool),
    nodes: &[Named],
    found: &mut Vec<Found<'a>>,
) {
    for (index, step) in steps.iter().enumerate() {
        let field = format!("{field}[{index}]");
        let of_step = nodes.get(found.len()).copied().unwrap_or_default();
        found.push(Found { field: field.clone(), step, nodes: of_step, nested, in_each });
        match &step.task {
            Task::All(steps) => {
                find_steps(steps, &format!("{field}.all"), (true, in_each || step.for_each.is_some()), nodes, found);
            }
            Task::Steps(steps) => {
                find_steps(steps, &format!("{field}.steps"), (true, in_each || step.for_each.is_some()), nodes, found);
            }
            Task::Call(_) | Task::Wait(_) | Task::WaitUntil(_) | Task::Signal(_) => {}
        }
        find_steps(&step.otherwise, &format!("{field}.else"), (true, in_each), nodes, found);
    }
}

pub(super) struct Findings(Vec<Finding>);

impl Findings {
    pub(super) fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Finding { field: field.into(), message: message.into() });
    }
}

struct Lint<'a> {
    definition: &'a Definition,
    tree: &'a Tree,
    findings: Findings,
}

impl Lint<'_> {
    fn check(&mut self, steps: &[Found<'_>]) {
        if self.definition.deadline_ms == 0 {
            self.findings.add("spec.deadline", "0s leaves no time for any step; give a duration such as `5m`");
        }
        if let Some(Err(error)) = self.definition.input.as_ref().map(Schema::compile) {
            self.findings.add("spec.input", error.to_string());
        }
        if steps.is_empty() {
            self.findings.add("spec.steps", "a saga without steps does nothing; give at least one step");
        }
        if steps.len() > MAX_STEPS {
            let count = steps.len();
            self.findings.add(
                "spec.steps",
                format!("there are {count} steps, those in groups counted, and at most {MAX_STEPS} are allowed; give a part of them to a saga of its own"),
            );
            return;
        }
        for (index, found) in steps.iter().enumerate() {
            self.check_name(found, steps.get(..index).unwrap_or_default());
            self.check_step(found);
        }
        if let Some(source) = &self.definition.key {
            check_expression(self.definition, self.tree, ROOT, source, "spec.key", &mut self.findings);
        }
        for (name, source) in &self.definition.output {
            if let Some(node) = self.tree.output() {
                let field = format!("spec.output.{name}");
                check_expression(self.definition, self.tree, node, source, &field, &mut self.findings);
            }
        }
        if let Some(call) = &self.definition.on_compensated {
            self.check_call("spec.onCompensated", Site::Compensated, call);
        }
    }

    fn check_name(&mut self, Found { field, step, .. }: &Found<'_>, earlier: &[Found<'_>]) {
        let (field, name) = (format!("{field}.name"), &step.name);
        if name.is_empty() {
            self.findings.add(field, "a step needs a name; it is part of the idempotency key `SAGA-ID/STEP/do`");
            return;
        }
        if let Some(Found { field: first, .. }) = earlier.iter().find(|other| other.step.name == *name) {
            let message = format!("`{name}` is the name of {first} already; give each step a name of its own");
            self.findings.add(field, message);
        } else if [ON_COMPENSATED, OUTPUT].contains(&name.as_str()) {
            self.findings
                .add(field, format!("`{name}` is the name of a call or an evaluation of Weft's own; rename the step"));
        } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
            self.findings.add(field, format!("`{name}` may hold letters, digits, `-` and `_` only; rename the step"));
        }
    }

    fn check_step(&mut self, found: &Found<'_>) {
        let Found { field, step, .. } = found;
        self.check_modifiers(found);
        match &step.task {
            Task::Call(transaction) => self.check_transaction(found, transaction),
            Task::Wait(wait) => self.check_time(&format!("{field}.wait"), found, wait.duration_ms),
            Task::WaitUntil(source) => {
                if let Some(node) = found.nodes.task {
                    let field = format!("{field}.waitUntil");
                    check_expression(self.definition, self.tree, node, source, &field, &mut self.findings);
                }
            }
            Task::Signal(signal) => {
                if let Some(within_ms) = signal.within_ms {
                    self.check_time(&format!("{field}.signal.within"), found, within_ms);
                }
                if found.in_each || step.for_each.is_some() {
                    self.findings.add(
                        format!("{field}.signal"),
                        format!("`{}` would be awaited once for each item, and a signal says for none which it is; move it out of the `forEach`", step.name),
                    );
                }
            }
            Task::All(steps) | Task::Steps(steps) if steps.is_empty() => {
                let message = "a group without steps does nothing; give at least one step, or remove it";
                let group = if matches!(step.task, Task::All(_)) { "all" } else { "steps" };
                self.findings.add(format!("{field}.{group}"), message);
            }
            Task::All(_) | Task::Steps(_) => {}
        }
    }

    /// `when`, `else` and `forEach`.
    fn check_modifiers(&mut self, Found { field, step, nodes, in_each, .. }: &Found<'_>) {
        match (&step.when, nodes.choice) {
            (Some(source), Some(node)) => {
                let field = format!("{field}.when");
                check_expression(self.definition, self.tree, node, source, &field, &mut self.findings);
            }
            (None, _) if !step.otherwise.is_empty() => self.findings.add(
                format!("{field}.else"),
                "there is no `when` that could be false; add one, or move these steps out of `else`",
            ),
            _ => {}
        }
        let Some(each) = &step.for_each else { return };
        if *in_each {
            self.findings.add(
                format!("{field}.forEach"),
                format!("`{}` is in a `forEach` already and its call would be known by one item only; make one list of both, or give the inner one to a saga of its own", step.name),
            );
        }
        if each.concurrency == 0 {
            self.findings.add(format!("{field}.forEach.concurrency"), "0 items at a time never begin; give at least 1");
        }
        if let Some(node) = nodes.each {
            let field = format!("{field}.forEach.items");
            check_expression(self.definition, self.tree, node, &each.items, &field, &mut self.findings);
        }
    }

    fn check_transaction(&mut self, found: &Found<'_>, transaction: &Transaction) {
        let Found { field, step, nodes, .. } = found;
        let name = &step.name;
        self.check_pivot(found, transaction);
        self.check_undo(found, transaction);
        if self.is_after_pivot(found) && !transaction.failures.is_empty() {
            let codes = transaction.failures.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            self.findings.add(
                format!("{field}.failures"),
                format!("step `{name}` comes after the pivot and may not fail, yet {codes} is declared; move the step before the pivot or remove `failures`"),
            );
        }
        lint_times(self.definition, transaction, field, &mut self.findings);
        let Some(node) = nodes.task else { return };
        self.check_call(&format!("{field}.do"), Site::Do(node), &transaction.action);
        if let Undo::Call(call) = &transaction.undo {
            self.check_call(&format!("{field}.undo"), Site::Undo(node), call);
        }
    }

    fn check_pivot(&mut self, found: &Found<'_>, transaction: &Transaction) {
        let Found { field, step, nodes, nested, .. } = found;
        if !transaction.pivot {
            return;
        }
        if self.tree.pivot() != nodes.task {
            let first = self.tree.pivot().and_then(|pivot| self.tree.node(pivot)).map_or("", |node| &node.name);
            let message =
                format!("`{first}` is the pivot already and a saga has one point of no return; remove one of them");
            self.findings.add(format!("{field}.pivot"), message);
        }
        if *nested || step.when.is_some() || step.for_each.is_some() {
            self.findings.add(
                format!("{field}.pivot"),
                format!("every instance turns at its pivot, alone; make `{}` a step of spec.steps, without `when` and `forEach`", step.name),
            );
        }
    }

    fn is_after_pivot(&self, found: &Found<'_>) -> bool {
        self.tree.pivot().is_some_and(|pivot| found.nodes.task.is_some_and(|node| node > pivot))
    }

    fn check_undo(&mut self, found: &Found<'_>, transaction: &Transaction) {
        let (field, name) = (format!("{}.undo", found.field), &found.step.name);
        let after_pivot = self.is_after_pivot(found);
        match &transaction.undo {
            Undo::Missing if !after_pivot && self.tree.pivot() != found.nodes.task => self.findings.add(
                field,
                format!("step `{name}` comes before the pivot and does not define how it is undone; give `undo`, or `undo: {{none: true}}` when there is nothing to undo"),
            ),
            Undo::Call(_) if after_pivot && !transaction.pivot => self.findings.add(
                field,
                format!("step `{name}` comes after the pivot and is never undone; remove `undo`, or move the step before the pivot"),
            ),
            // the record of the do, by which `weft.enter` knows that there is something to undo, is in the database of its
            // service
            Undo::Call(undo) if elsewhere(&transaction.action, undo) => self.findings.add(
                format!("{field}.service"),
                format!(
                    "step `{name}` is done in `{done}` and undone in `{undone}`, whose database has no record of it, so `weft.enter` would undo nothing there; undo it in `{done}`, and give `{undone}` a step of its own",
                    done = transaction.action.service,
                    undone = undo.service,
                ),
            ),
            Undo::Missing | Undo::Nothing | Undo::Call(_) => {}
        }
    }

    /// Of a wait or a signal, which ends by the deadline, unless it is after the pivot.
    fn check_time(&mut self, field: &str, found: &Found<'_>, time_ms: u64) {
        let deadline_ms = self.definition.deadline_ms;
        if time_ms == 0 {
            self.findings.add(field, "0s is over at once; give a duration such as `1h`, or remove it");
        } else if time_ms > deadline_ms && deadline_ms > 0 && !self.is_after_pivot(found) {
            self.findings.add(
                field,
                format!(
                    "it may take {} and the whole saga only {}, by which it is compensated; shorten it or raise spec.deadline",
                    seconds(time_ms),
                    seconds(deadline_ms)
                ),
            );
        }
    }

    fn check_call(&mut self, field: &str, site: Site, call: &Call) {
        if call.service.is_empty() {
            self.findings.add(format!("{field}.service"), "no service is named; give the name of a Microservice");
        }
        if call.command.is_empty() {
            self.findings
                .add(format!("{field}.command"), "no command is named; give one of the service's spec.commands");
        }
        check_call(self.definition, self.tree, site, call, field, &mut self.findings);
    }
}

/// Whether both calls name a service, and not the same one.
fn elsewhere(action: &Call, undo: &Call) -> bool {
    !action.service.is_empty() && !undo.service.is_empty() && action.service != undo.service
}

fn lint_times(definition: &Definition, transaction: &Transaction, field: &str, findings: &mut Findings) {
    let (timeout, deadline, retry) = (transaction.timeout_ms, definition.deadline_ms, transaction.retry);
    if timeout == 0 {
        findings.add(format!("{field}.timeout"), "0s lets no attempt succeed; give a duration such as `2s`");
    } else if timeout > deadline && deadline > 0 {
        findings.add(
            format!("{field}.timeout"),
            format!(
                "one attempt may take {} and the whole saga only {}; shorten it or raise spec.deadline",
                seconds(timeout),
                seconds(deadline)
            ),
        );
    }
    if retry.max_attempts == 0 {
        findings.add(format!("{field}.retry.maxAttempts"), "0 attempts never call the service; give at least 1");
    }
    if retry.initial_backoff_ms > retry.max_backoff_ms {
        findings.add(
            format!("{field}.retry.initialBackoff"),
            format!(
                "{} is longer than maxBackoff {}; shorten it or raise maxBackoff",
                seconds(retry.initial_backoff_ms),
                seconds(retry.max_backoff_ms)
            ),
        );
    }
}

/// Milliseconds in the form of a duration field.
fn seconds(milliseconds: u64) -> String {
    if milliseconds.is_multiple_of(1_000) { format!("{}s", milliseconds / 1_000) } else { format!("{milliseconds}ms") }
}

#[cfg(test)]
#[path = "lint_tests.rs"]
mod tests;
