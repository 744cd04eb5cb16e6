//! The lint of a saga: finds what is wrong with it before anything runs. Pure; the operator puts the findings into
//! `Accepted=False`. Whether the named services and commands exist is not known here: the operator checks that.

use std::{collections::BTreeMap, fmt};

use serde_json::Value;

use super::{
    expression,
    references::References,
    schema::{Schema, unknown_member},
};

/// The lint's input: a saga as its author wrote it, durations in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    pub deadline_ms: u64,
    /// JSON Schema of the input.
    pub input: Option<Value>,
    pub steps: Vec<Step>,
    pub on_compensated: Option<Call>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    pub name: String,
    pub pivot: bool,
    pub action: Call,
    pub undo: Undo,
    pub timeout_ms: u64,
    pub retry: super::definition::RetryPolicy,
    pub failures: BTreeMap<String, String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Undo {
    /// Not given.
    #[default]
    Missing,
    /// `undo: {none: true}`: the step has nothing to undo.
    Nothing,
    Call(Call),
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    pub service: String,
    pub command: String,
    pub with: BTreeMap<String, String>,
}

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

/// All faults of `spec`, in the order of its fields; empty when it can run.
pub fn lint(spec: &Spec) -> Vec<Finding> {
    let mut findings = Findings(Vec::new());
    if spec.deadline_ms == 0 {
        findings.add("spec.deadline", "0s leaves no time for any step; give a duration such as `5m`");
    }
    if let Some(Err(error)) = spec.input.as_ref().map(Schema::compile) {
        findings.add("spec.input", error.to_string());
    }
    if spec.steps.is_empty() {
        findings.add("spec.steps", "a saga without steps does nothing; give at least one step");
    }
    let pivot = spec.steps.iter().position(|step| step.pivot);
    for (index, step) in spec.steps.iter().enumerate() {
        lint_step(spec, index, step, pivot, &mut findings);
    }
    if let Some(call) = &spec.on_compensated {
        let call_check = CallCheck { field: "spec.onCompensated".to_owned(), site: CallSite::Compensated, spec };
        call_check.lint(call, &mut findings);
    }
    findings.0
}

struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.0.push(Finding { field: field.into(), message: message.into() });
    }
}

fn lint_step(spec: &Spec, index: usize, step: &Step, pivot: Option<usize>, findings: &mut Findings) {
    let field = format!("spec.steps[{index}]");
    let name = &step.name;
    lint_name(spec, index, name, &field, findings);
    if step.pivot && pivot.is_some_and(|first| first < index) {
        let first = pivot.and_then(|first| spec.steps.get(first)).map_or("", |step| &step.name);
        findings.add(
            format!("{field}.pivot"),
            format!("`{first}` is the pivot already and a saga has one point of no return; remove one of them"),
        );
    }
    lint_undo(index, step, pivot, &field, findings);
    if pivot.is_some_and(|pivot| index > pivot) && !step.failures.is_empty() {
        let codes = step.failures.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        findings.add(
            format!("{field}.failures"),
            format!("step `{name}` comes after the pivot and may not fail, yet {codes} is declared; move the step before the pivot or remove `failures`"),
        );
    }
    lint_times(spec, step, &field, findings);
    let action = CallCheck { field: format!("{field}.do"), site: CallSite::Do(index), spec };
    action.lint(&step.action, findings);
    if let Undo::Call(call) = &step.undo {
        let undo = CallCheck { field: format!("{field}.undo"), site: CallSite::Undo(index), spec };
        undo.lint(call, findings);
    }
}

fn lint_name(spec: &Spec, index: usize, name: &str, field: &str, findings: &mut Findings) {
    let field = format!("{field}.name");
    if name.is_empty() {
        findings.add(field, "a step needs a name; it is part of the idempotency key `SAGA-ID/STEP/do`");
    } else if let Some(first) = spec.steps.iter().take(index).position(|step| step.name == name) {
        findings.add(
            field,
            format!("`{name}` is the name of spec.steps[{first}] already; give each step a name of its own"),
        );
    } else if !name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
        findings.add(field, format!("`{name}` may hold letters, digits, `-` and `_` only; rename the step"));
    }
}

fn lint_undo(index: usize, step: &Step, pivot: Option<usize>, field: &str, findings: &mut Findings) {
    let (field, name) = (format!("{field}.undo"), &step.name);
    let before_pivot = pivot.is_none_or(|pivot| index < pivot);
    match &step.undo {
        Undo::Missing if before_pivot => findings.add(
            field,
            format!("step `{name}` comes before the pivot and does not define how it is undone; give `undo`, or `undo: {{none: true}}` when there is nothing to undo"),
        ),
        Undo::Call(_) if !before_pivot && !step.pivot => findings.add(
            field,
            format!("step `{name}` comes after the pivot and is never undone; remove `undo`, or move the step before the pivot"),
        ),
        // the record of the do, by which `weft.enter` knows that there is something to undo, is in the database of its
        // service
        Undo::Call(undo) if elsewhere(&step.action, undo) => findings.add(
            format!("{field}.service"),
            format!(
                "step `{name}` is done in `{done}` and undone in `{undone}`, whose database has no record of it, so `weft.enter` would undo nothing there; undo it in `{done}`, and give `{undone}` a step of its own",
                done = step.action.service,
                undone = undo.service,
            ),
        ),
        Undo::Missing | Undo::Nothing | Undo::Call(_) => {}
    }
}

/// Whether both calls name a service, and not the same one.
fn elsewhere(action: &Call, undo: &Call) -> bool {
    !action.service.is_empty() && !undo.service.is_empty() && action.service != undo.service
}

fn lint_times(spec: &Spec, step: &Step, field: &str, findings: &mut Findings) {
    let (timeout, deadline, retry) = (step.timeout_ms, spec.deadline_ms, step.retry);
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

/// Which call of the saga it is. This decides which values its expressions can use.
#[derive(Clone, Copy, PartialEq, Eq)]
enum CallSite {
    Do(usize),
    Undo(usize),
    Compensated,
}

struct CallCheck<'a> {
    field: String,
    site: CallSite,
    spec: &'a Spec,
}

impl CallCheck<'_> {
    fn lint(&self, call: &Call, findings: &mut Findings) {
        if call.service.is_empty() {
            findings.add(format!("{}.service", self.field), "no service is named; give the name of a Microservice");
        }
        if call.command.is_empty() {
            findings
                .add(format!("{}.command", self.field), "no command is named; give one of the service's spec.commands");
        }
        for (name, source) in &call.with {
            let field = format!("{}.with.{name}", self.field);
            match expression::parse(source) {
                Ok(program) => self.lint_references(&References::of(&program.expression().expr), &field, findings),
                Err(error) => {
                    let message = format!("`{}` {error}; see https://cel.dev for the language", excerpt(source));
                    findings.add(field, message);
                }
            }
        }
    }

    fn lint_references<'r>(&self, references: &'r References, field: &str, findings: &mut Findings) {
        let mut reported = Vec::new();
        for name in &references.variables {
            if reported.contains(&name) {
                continue;
            }
            reported.push(name);
            match name.as_str() {
                "input" | "steps" => {}
                "failure" if !matches!(self.site, CallSite::Do(_)) => {}
                "failure" => findings.add(field, "`failure` is known only in `undo` and `onCompensated`; use `input` or `steps` here"),
                _ => findings.add(field, format!("`{name}` is not a variable; there are `input`, `steps.NAME.reply` and, when compensating, `failure`{}", self.dash_hint(name))),
            }
        }
        for refusal in references.refusals() {
            findings.add(field, refusal);
        }
        if references.whole_steps {
            findings.add(field, "`steps` is used as a whole; name a step in it: `steps.NAME.reply`");
        }
        let unknown = |path: &'r Vec<String>| Some((path, unknown_member(self.spec.input.as_ref()?, path)?));
        if let Some((path, name)) = references.input.iter().find_map(unknown) {
            let path = path.join(".");
            findings.add(field, format!("`input.{path}` is not in spec.input, which has no property `{name}` there; correct the name, or add it"));
        }
        for reference in &references.steps {
            let guarded = references.steps.iter().any(|other| other.guarded && other.step == reference.step);
            if let Some(message) = self.wrong_step(&reference.step, reference.member.as_deref(), guarded) {
                findings.add(field, message);
            }
        }
    }

    /// What is wrong with a reference to `step`; `guarded` when the expression also contains `has(steps.STEP.reply)`.
    fn wrong_step(&self, step: &str, member: Option<&str>, guarded: bool) -> Option<String> {
        let steps = &self.spec.steps;
        let Some(index) = steps.iter().position(|other| other.name == step) else {
            let names = steps.iter().map(|step| format!("`{}`", step.name)).collect::<Vec<_>>().join(", ");
            return Some(format!("`{step}` is not a step; there are {names}{}", self.dash_hint(step)));
        };
        if member != Some("reply") {
            return Some(format!("a step has a `reply` and nothing else; write `steps[\"{step}\"].reply`"));
        }
        match self.site {
            CallSite::Do(here) if index >= here => {
                Some(format!("the reply of `{step}` is not there yet; use `input` or the reply of an earlier step"))
            }
            CallSite::Undo(here) if index > here => Some(format!(
                "the reply of the later step `{step}` is not there when it never ran; use `input` or the reply of an earlier step"
            )),
            CallSite::Undo(here) if index == here && !guarded => Some(format!(
                "`{step}` is also undone when its outcome is unknown, and then has no reply; use `input`, or test `has(steps[\"{step}\"].reply)` first"
            )),
            CallSite::Compensated if !guarded => Some(format!(
                "`{step}` may not have run, and then has no reply; use `input` or `failure`, or test `has(steps[\"{step}\"].reply)` first"
            )),
            CallSite::Do(_) | CallSite::Undo(_) | CallSite::Compensated => None,
        }
    }

    /// `steps.reserve-credit.reply` is a subtraction in CEL: a hint, when a step's name begins or ends with `name`.
    fn dash_hint(&self, name: &str) -> String {
        let parts = |step: &&Step| step.name.split('-').any(|part| part == name) && step.name.contains('-');
        self.spec.steps.iter().find(parts).map_or_else(String::new, |step| {
            format!(" (a name with a dash is written `steps[\"{}\"].reply`)", step.name)
        })
    }
}

fn excerpt(source: &str) -> String {
    const LONGEST: usize = 80;
    if source.chars().count() <= LONGEST {
        source.to_owned()
    } else {
        format!("{}…", source.chars().take(LONGEST).collect::<String>())
    }
}

#[cfg(test)]
#[path = "lint_tests.rs"]
mod tests;
