//! What the engine does once it is recorded: it calls participants, and evaluates expressions.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::Value;
use uuid::Uuid;

use super::{
    answer::{self, Answer},
    compiled::{Compiled, time},
    engine::Engine,
    facts::Facts,
    key::partition_of,
    transport::{self, Permit},
};
use crate::domain::saga::{
    decide::{self, Actions, Command},
    event::Event,
    state::{At, Json, Place, codes},
};

const INTERPRETER_FAULT: &str = "the expression ended by a fault of its interpreter";

/// A job is polled for this time longer than the deadline, which is checked at intervals: what the deadline ends ends by it.
const JOB_MARGIN: Duration = Duration::from_secs(10);

/// Longest list of a `forEach`, in bytes of its JSON: it is a row of the log, and in memory.
const MAX_LIST: usize = 1024 * 1024;

/// Everything that a call or an evaluation needs.
#[derive(Debug)]
struct Prepared {
    compiled: Arc<Compiled>,
    facts: Arc<Facts>,
    /// The last part of the idempotency key.
    operation: &'static str,
    /// A clone of [`super::shard::Instance::calls`].
    _call_guard: Arc<()>,
}

impl Engine {
    /// Does what was decided, and is durable.
    pub(super) fn act(self: &Arc<Self>, id: Uuid, actions: Actions) {
        if !self.stopping.is_cancelled() {
            for command in actions {
                self.tasks.spawn(Arc::clone(self).run(id, command));
            }
        }
    }

    /// Calls, or evaluates.
    async fn run(self: Arc<Self>, id: Uuid, command: Command) {
        match command.at {
            At::Do(place) if self.is_evaluation(id, place) => self.run_evaluation(id, command, place).await,
            _ => self.run_attempt(id, command).await,
        }
    }

    fn is_evaluation(&self, id: Uuid, place: Place) -> bool {
        self.shard(partition_of(id)).is_some_and(|shard| {
            shard.instances.get(&id).is_some_and(|instance| instance.compiled.tree.is_evaluation(place.node))
        })
    }

    async fn run_evaluation(self: Arc<Self>, id: Uuid, command: Command, place: Place) {
        let at = command.at;
        let Some(Prepared { compiled, facts, .. }) = self.prepare(id, command) else { return };
        let (of, heavy) = (Arc::clone(&compiled), compiled.is_heavy(at, facts.length()));
        if compiled.tree.output() == Some(place.node) {
            let (output, note) = match self.evaluate(heavy, move || of.output(place, &facts)).await {
                Ok(output) => (Some(output), None),
                Err(why) => (None, Some(why)),
            };
            return self.handle_event(id, &Event::Produced { at, output, note });
        }
        let value = self.evaluate(heavy, move || of.value(place, &facts)).await;
        let event = match value {
            Ok(Value::Bool(value)) => Ok(Event::Chosen { at, value }),
            Ok(Value::Array(items)) => list(&items).map(|items| Event::Listed { at, items }),
            Ok(Value::String(text)) => {
                time(&text).map(|until_ms| Event::Scheduled { at, until_ms }).ok_or_else(|| "it is no time".to_owned())
            }
            Ok(_) => Err("it is neither a condition, a list nor a time".to_owned()),
            Err(why) => Err(why),
        };
        let failed = |why: String| answer::failure(codes::EXPRESSION, &why).into_event(at, command.attempt);
        self.handle_event(id, &event.unwrap_or_else(failed));
    }

    /// Makes one attempt, after its back-off.
    async fn run_attempt(self: Arc<Self>, id: Uuid, command: Command) {
        if command.after_ms > 0 {
            let pause = tokio::time::sleep(Duration::from_millis(command.after_ms));
            tokio::select! { () = pause => {} () = self.stopping.cancelled() => return }
        }
        loop {
            tokio::select! {
                biased;
                () = self.stopping.cancelled() => return,
                () = self.lease.until_young() => {}
            }
            let Some(permit) = self.acquire_permit(id, command).await else { return };
            let Some(prepared) = self.prepare(id, command) else { return };
            let began = Instant::now();
            // without an answer another process may have this instance by the time the lease is young, or the call is
            // not current any more
            if let Some(answer) = self.call(id, command, &prepared, permit).await {
                self.meters.called(&prepared.compiled.definition.name, answer.outcome(), began.elapsed());
                self.handle_event(id, &answer.into_event(command.at, command.attempt));
                return;
            }
        }
    }

    /// `None`: there is no outcome to record, see [`Transport::call`].
    async fn call(&self, id: Uuid, command: Command, prepared: &Prepared, permit: Permit) -> Option<Answer> {
        let compiled = &prepared.compiled;
        let (call, timeout_ms) = compiled.tree.call(command.at)?;
        let (of, facts) = (Arc::clone(compiled), Arc::clone(&prepared.facts));
        let moved = self.catalogue.moved(&compiled.definition, call);
        let method = moved.as_ref().map_or(&call.method, |moved| &moved.method).clone();
        let heavy = compiled.is_heavy(command.at, facts.length());
        let made = self.evaluate(heavy, move || of.request(command.at, &facts, moved.as_ref())).await;
        let request = match made {
            Ok(request) => request,
            Err(why) => return Some(answer::failure(codes::EXPRESSION, &why)),
        };
        let step = compiled.tree.path(command.at);
        let operation = prepared.operation;
        let call = transport::Call {
            service: &call.service,
            method: &method,
            request,
            idempotency_key: format!("{id}/{step}/{operation}"),
            traceparent: traceparent(id, command),
            correlation_id: id.to_string(),
            timeout: Duration::from_millis(timeout_ms),
            job_timeout: Duration::from_millis(compiled.definition.deadline_ms) + JOB_MARGIN,
            // a pivot's undo is called only in doubt, and its refusal decides that the saga goes forward
            doubtful: command.attempt > 1
                || matches!(command.at, At::Undo(place) if compiled.tree.pivot() == Some(place.node)),
            lease: &self.lease,
            is_current: &|| self.is_current(id, command),
            stopping: &self.stopping,
        };
        self.transport.call(call, permit).await
    }

    /// Whether the instance is in this process and waits for the outcome of the call.
    fn is_current(&self, id: Uuid, command: Command) -> bool {
        self.shard(partition_of(id)).is_some_and(|shard| {
            let active = shard.instances.get(&id).and_then(|instance| instance.state.find(command.at));
            active.is_some_and(|active| active.attempt == command.attempt)
        })
    }

    /// Evaluates expressions; where that may take long, on a thread apart, since this one also renews the lease and answers
    /// probes.
    pub(super) async fn evaluate<T: Send + 'static>(
        &self,
        heavy: bool,
        work: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        if !heavy {
            return work();
        }
        let permit = Arc::clone(&self.evaluations).acquire_owned().await;
        let work = move || {
            // held by the thread: the caller may have given up
            let _permit = permit;
            work()
        };
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|_panicked| Err(INTERPRETER_FAULT.to_owned()))
    }

    /// Waits for a concurrency permit for the target service. `None` when the process is shutting down.
    /// [`Self::prepare`] handles what changes during the wait.
    async fn acquire_permit(&self, id: Uuid, command: Command) -> Option<Permit> {
        let compiled = Arc::clone(&self.shard(partition_of(id))?.instances.get(&id)?.compiled);
        let (call, _) = compiled.tree.call(command.at)?;
        tokio::select! {
            biased; // a free permit needs no check of the shutdown
            permit = self.transport.acquire_permit(&call.service) => (!self.stopping.is_cancelled()).then_some(permit),
            () = self.stopping.cancelled() => None,
        }
    }

    /// Returns what the call or the evaluation needs, if the instance still waits for it.
    fn prepare(&self, id: Uuid, command: Command) -> Option<Prepared> {
        let mut shard = self.shard(partition_of(id))?;
        let instance = shard.instances.get_mut(&id)?;
        let active = instance.state.find(command.at).filter(|active| active.attempt == command.attempt)?;
        let operation = active.operation();
        if instance.state.paused && instance.compiled.tree.call(command.at).is_some() {
            decide::hold(&mut instance.state, command);
            return None;
        }
        Some(Prepared {
            compiled: Arc::clone(&instance.compiled),
            facts: Arc::new(instance.compiled.facts(command.at, &instance.state)),
            operation,
            _call_guard: Arc::clone(&instance.calls),
        })
    }
}

/// The items of a list, as the log keeps them.
fn list(items: &[Value]) -> Result<Vec<Json>, String> {
    let item = |item: &Value| serde_json::value::to_raw_value(item).map(Json::from);
    let items: Vec<Json> = items.iter().map(item).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    let length: usize = items.iter().map(|item| item.as_str().len()).sum();
    if length > MAX_LIST {
        return Err(format!("forEach.items has {length} bytes of JSON, and at most {MAX_LIST} are allowed"));
    }
    Ok(items)
}

/// W3C trace context: the saga is the trace, the attempt is the span.
fn traceparent(id: Uuid, command: Command) -> String {
    let (node, item) = match command.at.place() {
        Some(Place { node, item }) => (u64::from(node) + 1, item.map_or(0, |item| u64::from(item) + 1)),
        None => (0, 0),
    };
    let undo = u64::from(matches!(command.at, At::Undo(_)));
    let span = ((node * 2 + undo) & 0xffff) << 48 | (item & 0xffff) << 32 | u64::from(command.attempt);
    format!("00-{}-{span:016x}-01", id.simple())
}
