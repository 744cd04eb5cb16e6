//! A Saga lowered into a definition: durations become milliseconds, groups become a tree. Its calls have no addresses yet.

use kube::core::Duration;

use crate::{
    api::v1alpha1::{Retry, SagaBranch, SagaCommand, SagaInnerStep, SagaSpec, SagaStep, SagaTask, Undo},
    controllers::render::milliseconds,
    domain::saga::definition::{self, Call, Definition, ForEach, RetryPolicy, Signal, Step, Task, Transaction, Wait},
};

/// The definition, and what in the spec has no form in it, in one sentence each.
pub fn lower(name: &str, spec: &SagaSpec) -> (Definition, Vec<String>) {
    let mut lowering = Lowering { findings: Vec::new() };
    lowering.check_positive("spec.deadline", spec.deadline);
    lowering.check_positive("spec.retention", spec.retention);
    let steps = spec.steps.iter().enumerate();
    let definition = Definition {
        name: name.to_owned(),
        version: String::new(),
        deadline_ms: milliseconds(spec.deadline),
        input: spec.input.clone(),
        key: spec.key.clone(),
        steps: steps.map(|(index, step)| lowering.step(&format!("spec.steps[{index}]"), step)).collect(),
        on_compensated: spec.on_compensated.as_ref().map(call),
        output: spec.output.clone(),
    };
    (definition, lowering.findings)
}

struct Lowering {
    findings: Vec<String>,
}

impl Lowering {
    /// A negative duration has no form in milliseconds, so it is found here.
    fn check_positive(&mut self, field: &str, duration: Duration) {
        if duration.is_negative() {
            self.findings.push(format!("{field}: {duration} is negative; give a duration such as `2s`"));
        }
    }

    fn step(&mut self, field: &str, step: &SagaStep) -> Step {
        let SagaStep { task, pivot, all, steps, otherwise } = step;
        let mut groups = Vec::new();
        if !all.is_empty() {
            groups.push(Task::All(self.each(field, "all", all, Self::branch)));
        }
        if !steps.is_empty() {
            groups.push(Task::Steps(self.each(field, "steps", steps, Self::inner)));
        }
        let mut lowered = self.task(field, task, groups);
        lowered.otherwise = self.each(field, "else", otherwise, Self::inner);
        match lowered.transaction_mut() {
            Some(transaction) => transaction.pivot = *pivot,
            None if *pivot => self.findings.push(format!(
                "{field}.pivot: `{}` is no command, and only a command can be the point of no return; set it on one",
                task.name
            )),
            None => {}
        }
        lowered
    }

    fn branch(&mut self, field: &str, SagaBranch { task, steps }: &SagaBranch) -> Step {
        let sequence = (!steps.is_empty()).then(|| Task::Steps(self.each(field, "steps", steps, Self::inner)));
        self.task(field, task, sequence.into_iter().collect())
    }

    fn inner(&mut self, field: &str, SagaInnerStep { task }: &SagaInnerStep) -> Step {
        self.task(field, task, Vec::new())
    }

    fn each<T>(&mut self, field: &str, group: &str, steps: &[T], lower: fn(&mut Self, &str, &T) -> Step) -> Vec<Step> {
        let steps = steps.iter().enumerate();
        steps.map(|(index, step)| lower(self, &format!("{field}.{group}[{index}]"), step)).collect()
    }

    fn task(&mut self, field: &str, task: &SagaTask, mut tasks: Vec<Task>) -> Step {
        let SagaTask { name, when, for_each, action, undo, timeout, retry, failures, wait, wait_until, signal } = task;
        self.check_positive(&format!("{field}.timeout"), *timeout);
        self.check_positive(&format!("{field}.retry.initialBackoff"), retry.initial_backoff);
        self.check_positive(&format!("{field}.retry.maxBackoff"), retry.max_backoff);
        if let Some(action) = action {
            tasks.push(Task::call(Transaction {
                pivot: false,
                action: call(action),
                undo: undo.as_ref().map_or(definition::Undo::Missing, lower_undo),
                timeout_ms: milliseconds(*timeout),
                retry: retry_policy(retry),
                failures: failures.clone(),
            }));
        } else if undo.is_some() || !failures.is_empty() {
            self.findings.push(format!(
                "{field}: `{name}` is no command, and `undo` and `failures` are of a command; move them to one"
            ));
        }
        if let Some(wait) = wait {
            self.check_positive(&format!("{field}.wait"), *wait);
            tasks.push(Task::Wait(Wait { duration_ms: milliseconds(*wait) }));
        }
        tasks.extend(wait_until.clone().map(Task::WaitUntil));
        if let Some(signal) = signal {
            let within =
                signal.within.inspect(|within| self.check_positive(&format!("{field}.signal.within"), *within));
            tasks.push(Task::Signal(Signal { within_ms: within.map(milliseconds) }));
        }
        if tasks.len() != 1 {
            self.findings.push(format!(
                "{field}: `{name}` has {} of `do`, `wait`, `waitUntil`, `signal`, `all` and `steps`; give it exactly one, and give each other one a step of its own",
                tasks.len()
            ));
        }
        let for_each = for_each.as_ref().map(|each| ForEach {
            items: each.items.clone(),
            concurrency: u32::try_from(each.concurrency).unwrap_or(0),
        });
        let task = tasks.into_iter().next().unwrap_or(Task::Wait(Wait { duration_ms: 1 }));
        Step { name: name.clone(), when: when.clone(), otherwise: Vec::new(), for_each, task }
    }
}

fn call(command: &SagaCommand) -> Call {
    let SagaCommand { service, command, with, body, headers } = command.clone();
    Call { service, command, with, body, headers, ..Call::default() }
}

fn lower_undo(undo: &Undo) -> definition::Undo {
    let Undo { none, service, command, with, body, headers } = undo.clone();
    if none {
        return definition::Undo::Nothing;
    }
    let (service, command) = (service.unwrap_or_default(), command.unwrap_or_default());
    definition::Undo::Call(Call { service, command, with, body, headers, ..Call::default() })
}

fn retry_policy(retry: &Retry) -> RetryPolicy {
    RetryPolicy {
        max_attempts: u32::try_from(retry.max_attempts).unwrap_or(0),
        initial_backoff_ms: milliseconds(retry.initial_backoff),
        max_backoff_ms: milliseconds(retry.max_backoff),
    }
}
