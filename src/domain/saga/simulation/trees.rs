//! Sagas of every shape.

use super::Random;
use crate::domain::saga::definition::{
    Call, Definition, ForEach, RetryPolicy, Signal, Step, Task, Transaction, Undo, Wait,
};

/// Names steps, and knows what is allowed where: nothing is undone after the pivot, and a `forEach` is in no other.
pub(super) struct Builder {
    names: usize,
    max_attempts: u32,
}

impl Builder {
    pub(super) fn new(max_attempts: u32) -> Self {
        Self { names: 0, max_attempts }
    }

    pub(super) fn step(&mut self, task: Task) -> Step {
        self.names += 1;
        Step { name: format!("s{}", self.names), task, ..Step::default() }
    }

    pub(super) fn call(&mut self, undo: bool) -> Step {
        let undo = if undo { Undo::Call(Call::default()) } else { Undo::Nothing };
        let retry = RetryPolicy { max_attempts: self.max_attempts, ..RetryPolicy::default() };
        self.step(Task::call(Transaction { undo, timeout_ms: 1, retry, ..Transaction::default() }))
    }

    pub(super) fn pivot(&mut self, undo: bool) -> Step {
        let mut step = self.call(undo);
        step.transaction_mut().unwrap().pivot = true;
        step
    }
}

/// It has an output.
pub(super) fn with_output(definition: Definition) -> Definition {
    Definition { output: [("o".to_owned(), String::new())].into(), ..definition }
}

pub(super) fn saga(steps: Vec<Step>, notify: bool) -> Definition {
    let on_compensated = notify.then(Call::default);
    Definition { name: "s".into(), deadline_ms: 1, steps, on_compensated, ..Definition::default() }
}

/// A saga of one to four steps at the top; half of them are plain sequences.
pub(super) fn random(random: &mut Random) -> Definition {
    let mut builder = Builder::new(u32::try_from(1 + random.below(4)).unwrap());
    let count = 1 + random.below(4);
    let pivot = random.percent(60).then(|| random.below(count));
    let plain = random.percent(50);
    let steps = (0..count).map(|index| {
        if pivot == Some(index) {
            return builder.pivot(random.percent(80));
        }
        let undone = pivot.is_none_or(|pivot| index < pivot);
        if plain { builder.call(undone && random.percent(80)) } else { any(random, &mut builder, undone, 2, false) }
    });
    let steps = steps.collect();
    let notify = random.percent(50);
    let definition = saga(steps, notify);
    if random.percent(30) { with_output(definition) } else { definition }
}

/// `undone`: before the pivot.
fn any(random: &mut Random, builder: &mut Builder, undone: bool, depth: usize, in_each: bool) -> Step {
    let group = |random: &mut Random, builder: &mut Builder, in_each| {
        let count = 1 + random.below(3);
        (0..count).map(|_| any(random, builder, undone, depth - 1, in_each)).collect::<Vec<_>>()
    };
    let is_each = !in_each && random.percent(20);
    let task = match random.below(10) {
        0..=2 if depth > 0 => Task::All(group(random, builder, in_each || is_each)),
        3..=4 if depth > 0 => Task::Steps(group(random, builder, in_each || is_each)),
        5 if random.percent(50) => Task::WaitUntil(String::new()),
        5 => Task::Wait(Wait { duration_ms: 1 }),
        // without a limit one that never comes would not end
        6 if !in_each && !is_each => Task::Signal(Signal { within_ms: Some(1) }),
        _ => builder.call(undone && random.percent(80)).task,
    };
    let mut step = builder.step(task);
    if is_each {
        step.for_each =
            Some(ForEach { items: String::new(), concurrency: u32::try_from(1 + random.below(3)).unwrap() });
    }
    if random.percent(20) {
        step.when = Some(String::new());
        if depth > 0 && random.percent(50) {
            step.otherwise = group(random, builder, in_each);
        }
    }
    step
}
