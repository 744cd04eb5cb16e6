//! The engine: keeps the instances in memory by partition. Each is changed by [`decide`] under its partition's lock,
//! and its rows are queued for the writer in the order of the decisions. Calls are sent from [`Engine::recorded`],
//! after the commit.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::{Semaphore, oneshot};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use super::{
    answer::{self, Answer},
    catalogue::Catalogue,
    compiled::{Compiled, Facts},
    counts::Counted,
    kept::Kept,
    key::{Key, PARTITIONS, partition_of},
    lease::Lease,
    log::{self, Acknowledge, Entry, Queue, Recorded, Row, Unrecorded},
    meters::Meters,
    shard::{Instance, Memory, Recovered, Shard, due, size},
    transport::{self, Permit, Transport},
    view::View,
};
use crate::domain::saga::{
    decide::{self, Command, Decision, Moment, Refusal},
    json,
    state::{Event, Json, Outcome, Phase, Record, State, Status, codes},
};

const INTERPRETER_FAULT: &str = "the expression ended by a fault of its interpreter";

/// A job is polled for this time longer than the deadline, which is checked at intervals: what the deadline ends ends by it.
const JOB_MARGIN: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub(super) enum EngineError {
    #[error("there is no saga `{0}`")]
    UnknownSaga(String),
    #[error("the saga cannot run with this input: {0}")]
    UnusableInput(String),
    #[error("saga `{0}` is being deleted: it starts nothing any more")]
    Draining(String),
    #[error("there is no instance `{id}` of saga `{saga}`")]
    UnknownInstance { saga: String, id: Uuid },
    #[error("instance `{id}` cannot be changed like that: {why}")]
    Refused {
        id: Uuid,
        // a part of the message and not a source, since the API answers with one sentence
        why: Refusal,
    },
    #[error(
        "the Idempotency-Key was used before, with another input; its instance is `{0}`: send another key, or the same input"
    )]
    KeyReused(Uuid),
    #[error("this orchestrator does not hold the instance's partition, or not yet; try again")]
    NotHeld,
    #[error("the database is not keeping up with {0} waiting changes; try again")]
    Congested(usize),
    #[error("{0} instances run, and there is no memory for more; try again when some have ended")]
    Full(usize),
    #[error(transparent)]
    Unrecorded(#[from] Unrecorded),
}

/// Everything that a call needs.
#[derive(Debug)]
struct Prepared {
    compiled: Arc<Compiled>,
    facts: Arc<Facts>,
    /// The last part of the idempotency key.
    operation: &'static str,
    /// A clone of [`Instance::calls`].
    _call_guard: Arc<()>,
}

/// The result of a start.
#[derive(Debug)]
pub(super) struct Started {
    pub id: Uuid,
    pub recorded: Recorded,
    pub view: View,
    /// Resolves when the instance ends, also for an instance that existed already in this process. `None` when it had
    /// ended before.
    pub end: Option<oneshot::Receiver<View>>,
}

#[derive(Debug)]
pub(super) struct Engine {
    shards: Vec<Mutex<Shard>>,
    pub(super) queue: Queue,
    pub(super) catalogue: Catalogue,
    transport: Transport,
    /// Evaluations that may take long, one at a time: each may need 100 MiB, and many busy threads would delay those that renew
    /// the lease and answer the probes.
    evaluations: Arc<Semaphore>,
    pub(super) lease: Lease,
    pub(super) kept: Kept,
    memory: Memory,
    pub(super) meters: Meters,
    pub(super) tasks: TaskTracker,
    /// When cancelled, no new call is sent.
    pub(super) stopping: CancellationToken,
}

impl Engine {
    /// `memory` bounds the bytes of live instances.
    pub(super) fn new(meters: Meters, memory: usize) -> Arc<Self> {
        Arc::new(Self {
            shards: (0..PARTITIONS).map(|_| Mutex::default()).collect(),
            queue: Queue::default(),
            catalogue: Catalogue::default(),
            transport: Transport::default(),
            evaluations: Arc::new(Semaphore::new(1)),
            lease: Lease::default(),
            kept: Kept::default(),
            memory: Memory::new(memory),
            meters,
            tasks: TaskTracker::new(),
            stopping: CancellationToken::new(),
        })
    }

    fn shard(&self, partition: i16) -> Option<MutexGuard<'_, Shard>> {
        let shard = self.shards.get(usize::try_from(partition).ok()?)?;
        Some(shard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Starts an instance; returns when that is durable. With a `key` a second start returns the first one's instance.
    pub(super) async fn start(&self, saga: &str, input: Json, key: Option<Key<'_>>) -> Result<Started, EngineError> {
        let absent = || {
            let saga = saga.to_owned();
            if self.catalogue.is_draining(&saga) { EngineError::Draining(saga) } else { EngineError::UnknownSaga(saga) }
        };
        let compiled = self.catalogue.current(saga).ok_or_else(absent)?;
        if let Some(waiting) = self.queue.congested() {
            return Err(EngineError::Congested(waiting));
        }
        let (of, checked) = (Arc::clone(&compiled), input.clone());
        let check = self.evaluate(compiled.has_heavy(input.as_str().len()), move || of.check_input(&checked)).await;
        check.map_err(EngineError::UnusableInput)?;
        let id = key.map_or_else(Uuid::now_v7, |key| key.id(saga));
        if matches!(key, Some(Key::Request(_))) {
            self.check_input(id, &input)?;
        }
        let (acknowledge, acknowledged) = oneshot::channel();
        let (end_sender, end) = oneshot::channel();
        let (view, fresh) = self.begin(id, compiled, input, acknowledge, end_sender)?;
        let recorded = acknowledged.await.map_err(|_| Unrecorded::TakenOver)??;
        let (recorded, end) = match (recorded, fresh) {
            (Recorded::Written, true) => (Recorded::Written, Some(end)),
            // it is in memory: live, or it has just ended and its end is about to be sent
            (Recorded::Written, false) => (Recorded::Existed, Some(end)),
            (Recorded::Existed, _) => (Recorded::Existed, None),
        };
        Ok(Started { id, recorded, view, end })
    }

    /// An instance that is in memory must have the same input. For one that is not the caller compares what is stored.
    fn check_input(&self, id: Uuid, input: &Json) -> Result<(), EngineError> {
        let earlier =
            self.shard(partition_of(id)).and_then(|shard| Some(shard.instances.get(&id)?.state.input.clone()));
        match earlier {
            Some(earlier) if !json::same(&earlier, input) => Err(EngineError::KeyReused(id)),
            _ => Ok(()),
        }
    }

    fn begin(
        &self,
        id: Uuid,
        compiled: Arc<Compiled>,
        input: Json,
        acknowledge: Acknowledge,
        end_sender: oneshot::Sender<View>,
    ) -> Result<(View, bool), EngineError> {
        let partition = partition_of(id);
        let mut shard = self.shard(partition).filter(|shard| shard.held).ok_or(EngineError::NotHeld)?;
        if let Some(instance) = shard.instances.get_mut(&id) {
            instance.waiting.push(end_sender);
            let view = instance.view(id);
            // queued behind the entry of the first start, which may not be durable yet
            self.queue.push(Entry { id, partition, row: None, command: None, acknowledge: Some(acknowledge) });
            return Ok((view, false));
        }
        let (state, command) = decide::start(&compiled.definition, input.clone());
        let definition = &compiled.definition;
        let started_at = log::now();
        let bytes = size(&state);
        if !self.memory.has_room_for(bytes) {
            return Err(EngineError::Full(self.memory.instances()));
        }
        let bucket = self.kept.bucket().ok_or(EngineError::NotHeld)?;
        let row = Row {
            bucket,
            seq: 0,
            at: started_at,
            body: body(&Event::Started { input }, &state),
            start: Some((definition.name.clone(), definition.version.clone())),
            end: None,
        };
        compiled.counts.change(id, Counted::NOTHING, definition, Some(&state));
        let due = Instant::now() + Duration::from_millis(definition.deadline_ms);
        let instance = Instance {
            compiled,
            state,
            bucket,
            next_seq: 1,
            started_at,
            bytes,
            due,
            durable: false,
            calls: Arc::default(),
            waiting: vec![end_sender],
        };
        let view = instance.view(id);
        self.memory.add(1, bytes);
        shard.insert(id, instance);
        self.queue.push(Entry { id, partition, row: Some(row), command, acknowledge: Some(acknowledge) });
        Ok((view, true))
    }

    /// Applies a person's verb, with the attempt that the instance has reached; returns when it is durable.
    pub(super) async fn change(&self, saga: &str, id: Uuid, event: fn(u32) -> Event) -> Result<(), EngineError> {
        let (acknowledge, acknowledged) = oneshot::channel();
        let unknown = || EngineError::UnknownInstance { saga: saga.to_owned(), id };
        {
            let mut shard = self.shard(partition_of(id)).filter(|shard| shard.held).ok_or(EngineError::NotHeld)?;
            let instance = shard.instances.get_mut(&id).ok_or_else(unknown)?;
            if instance.compiled.definition.name != saga {
                return Err(unknown());
            }
            if !instance.durable {
                return Err(EngineError::NotHeld);
            }
            let event = event(instance.state.attempt);
            instance.check_verified(&event).map_err(|why| EngineError::Refused { id, why })?;
            let decided = self.decide_and_queue(id, instance, &event, Some(acknowledge));
            decided.map_err(|why| EngineError::Refused { id, why })?;
        }
        acknowledged.await.map_err(|_| Unrecorded::TakenOver)??;
        Ok(())
    }

    /// Applies an event to an instance. Does nothing when the instance is no longer in this process.
    pub(super) fn handle_event(self: &Arc<Self>, id: Uuid, event: &Event) {
        let command = {
            let Some(mut shard) = self.shard(partition_of(id)) else { return };
            let Some(instance) = shard.instances.get_mut(&id) else { return };
            // only a person's verbs are refused
            self.decide_and_queue(id, instance, event, None).unwrap_or(None)
        };
        if let Some(command) = command {
            self.send(id, command);
        }
    }

    /// Decides and queues the row; returns a command that may be sent at once because nothing has to be recorded.
    fn decide_and_queue(
        &self,
        id: Uuid,
        instance: &mut Instance,
        event: &Event,
        acknowledge: Option<Acknowledge>,
    ) -> Result<Option<Command>, Refusal> {
        let at = log::now();
        let before = Counted::of(&instance.state);
        let moment = Moment { now_ms: at.as_millisecond(), random: rand::random() };
        let compiled = Arc::clone(&instance.compiled);
        let definition = &compiled.definition;
        let decision = decide::decide(definition, &mut instance.state, event, moment)?;
        if let (Decision::Recorded(_), Event::Succeeded { reply: Some(reply), .. }) = (&decision, event) {
            instance.bytes += reply.as_str().len();
            self.memory.add(0, reply.as_str().len());
        }
        compiled.counts.change(id, before, definition, Some(&instance.state));
        let (row, command) = match decision {
            Decision::Unrecorded(command) => return Ok(Some(command)),
            Decision::Ignored => (None, None),
            Decision::Recorded(command) => {
                let status = instance.state.status();
                let end = instance.state.phase.is_end().then(|| (definition.name.clone(), status));
                let row = Row {
                    bucket: instance.bucket,
                    seq: instance.next_seq,
                    at,
                    body: body(event, &instance.state),
                    start: None,
                    end,
                };
                instance.next_seq += 1;
                (Some(row), command)
            }
        };
        if row.is_some() || acknowledge.is_some() {
            self.queue.push(Entry { id, partition: partition_of(id), row, command, acknowledge });
        }
        Ok(None)
    }

    /// Called when `entries` are durable: sends their calls, notifies callers and removes instances that have ended.
    /// `existed` are the starts that the database refused because the instance exists already.
    pub(super) fn recorded(self: &Arc<Self>, entries: Vec<Entry>, existed: &[Uuid]) {
        let existed: HashSet<Uuid> = existed.iter().copied().collect();
        self.withdraw(&existed);
        for Entry { id, partition, row, command, acknowledge } in entries {
            let refused = existed.contains(&id);
            match row {
                Some(Row { start: Some(_), .. }) if refused => self.forget(id, partition),
                Some(_) if refused => {}
                Some(Row { start: Some((saga, _)), .. }) => self.started(id, partition, &saga),
                Some(Row { end: Some((_, status)), at, .. }) => self.ended(id, partition, status, at),
                Some(_) | None => {}
            }
            if let Some(command) = command.filter(|_| !refused) {
                self.send(id, command);
            }
            if let Some(acknowledge) = acknowledge {
                let recorded = if refused { Recorded::Existed } else { Recorded::Written };
                // the caller may have disconnected
                let _ = acknowledge.send(Ok(recorded));
            }
        }
    }

    /// Answers the queued entries of instances that existed already. They should contain no rows, unless something was
    /// queued for an instance that was not durable; such rows must not be written, since they could be mistaken for
    /// rows of the first life.
    fn withdraw(&self, existed: &HashSet<Uuid>) {
        if existed.is_empty() {
            return;
        }
        for entry in self.queue.withdraw(|entry| existed.contains(&entry.id)) {
            let answer = if entry.row.is_some() { Err(Unrecorded::TakenOver) } else { Ok(Recorded::Existed) };
            if let Some(acknowledge) = entry.acknowledge {
                let _ = acknowledge.send(answer);
            }
        }
    }

    fn started(&self, id: Uuid, partition: i16, saga: &str) {
        if let Some(mut shard) = self.shard(partition)
            && let Some(instance) = shard.instances.get_mut(&id)
        {
            instance.durable = true;
        }
        self.meters.started(saga);
    }

    /// Removes an instance whose start was refused.
    fn forget(&self, id: Uuid, partition: i16) {
        if let Some(instance) = self.shard(partition).and_then(|mut shard| shard.remove(id)) {
            self.memory.remove(&instance);
            let counted = Counted::of(&instance.state);
            instance.compiled.counts.change(id, counted, &instance.compiled.definition, None);
        }
    }

    fn ended(&self, id: Uuid, partition: i16, status: Status, at: Timestamp) {
        let instance = self.shard(partition).and_then(|mut shard| shard.remove(id));
        let Some(instance) = instance else { return };
        self.memory.remove(&instance);
        let definition = &instance.compiled.definition;
        instance.compiled.counts.ended(status);
        self.meters.ended(&definition.name, status);
        let view = View::new(id, definition, &instance.state, instance.started_at, Some(at));
        for waiting in instance.waiting {
            let _ = waiting.send(view.clone());
        }
    }

    fn send(self: &Arc<Self>, id: Uuid, command: Command) {
        if !self.stopping.is_cancelled() {
            self.tasks.spawn(Arc::clone(self).run_attempt(id, command));
        }
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
        let (call, timeout_ms) = command.at.call(&compiled.definition)?;
        let (of, facts) = (Arc::clone(compiled), Arc::clone(&prepared.facts));
        let body = match self
            .evaluate(compiled.is_heavy(command.at, prepared.facts.length()), move || of.body(command.at, &facts))
            .await
        {
            Ok(body) => body,
            Err(why) => return Some(answer::failure(codes::EXPRESSION, &why)),
        };
        let step = command.at.step(&compiled.definition).unwrap_or_default();
        let operation = prepared.operation;
        let moved = self.catalogue.moved(&compiled.definition, call);
        let (method, url) = moved.as_ref().map_or((&call.method, &call.url), |moved| (&moved.method, &moved.url));
        let call = transport::Call {
            service: &call.service,
            method,
            url,
            body,
            idempotency_key: format!("{id}/{step}/{operation}"),
            traceparent: traceparent(id, command),
            correlation_id: id.to_string(),
            timeout: Duration::from_millis(timeout_ms),
            job_timeout: Duration::from_millis(compiled.definition.deadline_ms) + JOB_MARGIN,
            // a pivot's undo is called only in doubt, and its refusal decides that the saga goes forward
            doubtful: command.attempt > 1
                || compiled.definition.pivot().is_some_and(|pivot| command.at == Phase::Undo(pivot)),
            lease: &self.lease,
            is_current: &|| self.is_current(id, command),
            stopping: &self.stopping,
        };
        self.transport.call(call, permit).await
    }

    /// Whether the instance is in this process and waits for the outcome of the call.
    fn is_current(&self, id: Uuid, command: Command) -> bool {
        self.shard(partition_of(id)).is_some_and(|shard| {
            let state = shard.instances.get(&id).map(|instance| &instance.state);
            state.is_some_and(|state| state.phase == command.at && state.attempt == command.attempt)
        })
    }

    /// Evaluates expressions; where that may take long, on a thread apart, since this one also renews the lease and answers
    /// probes.
    async fn evaluate<T: Send + 'static>(
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
        let (call, _) = command.at.call(&compiled.definition)?;
        tokio::select! {
            biased; // a free permit needs no check of the shutdown
            permit = self.transport.acquire_permit(&call.service) => (!self.stopping.is_cancelled()).then_some(permit),
            () = self.stopping.cancelled() => None,
        }
    }

    /// Returns what the call needs, if it is still the next call of the instance.
    fn prepare(&self, id: Uuid, command: Command) -> Option<Prepared> {
        let mut shard = self.shard(partition_of(id))?;
        let instance = shard.instances.get_mut(&id)?;
        if instance.state.phase != command.at || instance.state.attempt != command.attempt {
            return None;
        }
        if instance.state.paused {
            decide::hold(&mut instance.state, command);
            return None;
        }
        Some(Prepared {
            compiled: Arc::clone(&instance.compiled),
            facts: Arc::new(Facts::of(&instance.state)),
            operation: instance.state.operation().unwrap_or_default(),
            _call_guard: Arc::clone(&instance.calls),
        })
    }

    /// Takes over a partition with its live instances, and repeats the calls that were in progress.
    pub(super) fn adopt(self: &Arc<Self>, partition: i16, instances: Vec<Recovered>) {
        let mut commands = Vec::new();
        if let Some(mut shard) = self.shard(partition) {
            for Recovered { id, compiled, mut state, bucket, next_seq, started_at } in instances {
                if let Some(command) = decide::recover(&mut state) {
                    commands.push((id, command));
                }
                compiled.counts.change(id, Counted::NOTHING, &compiled.definition, Some(&state));
                let due = due(started_at, compiled.definition.deadline_ms);
                let (durable, calls, waiting) = (true, Arc::default(), Vec::new());
                let bytes = size(&state);
                let instance =
                    Instance { compiled, state, bucket, next_seq, started_at, bytes, due, durable, calls, waiting };
                self.memory.add(1, bytes);
                shard.insert(id, instance);
            }
            shard.held = true;
        }
        for (id, command) in commands {
            self.send(id, command);
        }
    }

    /// Another process holds the partition now: drops its instances, which are out of date here.
    pub(super) fn abandon(&self, partition: i16) {
        let Some(mut shard) = self.shard(partition) else { return };
        let Shard { instances, .. } = std::mem::take(&mut *shard);
        for (id, instance) in instances {
            self.memory.remove(&instance);
            let counted = Counted::of(&instance.state);
            instance.compiled.counts.change(id, counted, &instance.compiled.definition, None);
        }
    }

    /// Applies the passing of the deadline to every overdue instance.
    pub(super) fn check_deadlines(self: &Arc<Self>) {
        let now = Instant::now();
        for partition in 0..PARTITIONS {
            let passed = self.shard(partition).map(|mut shard| shard.overdue(now)).unwrap_or_default();
            for id in passed {
                self.handle_event(id, &Event::DeadlinePassed);
            }
        }
    }

    /// Number of partitions that this process holds.
    pub(super) fn held(&self) -> usize {
        (0..PARTITIONS).filter(|partition| self.shard(*partition).is_some_and(|shard| shard.held)).count()
    }

    /// The live instances of `saga` in `status` (`None`: in any status), at most `limit`.
    pub(super) fn live(&self, saga: &str, status: Option<Status>, limit: usize) -> Vec<View> {
        let mut views = Vec::new();
        for shard in (0..PARTITIONS).filter_map(|partition| self.shard(partition)) {
            let wanted = shard.instances.iter().filter(|(_, instance)| {
                instance.compiled.definition.name == saga
                    && status.is_none_or(|status| instance.state.status() == status)
            });
            views.extend(wanted.take(limit).map(|(id, instance)| instance.view(*id)));
        }
        views.sort_by(|a, b| b.started_at.cmp(&a.started_at).then_with(|| a.id.cmp(&b.id)));
        views.truncate(limit);
        views
    }
}

fn body(event: &Event, state: &State) -> String {
    let record = Record { event, to: Outcome::of(state) };
    // serializing strings, numbers and raw JSON cannot fail
    serde_json::to_string(&record).unwrap_or_default()
}

/// W3C trace context: the saga is the trace, the attempt is the span.
fn traceparent(id: Uuid, command: Command) -> String {
    let phase = match command.at {
        Phase::Do(index) => index as u64 * 2,
        Phase::Undo(index) => index as u64 * 2 + 1,
        _ => u64::from(u32::MAX),
    };
    let span = (phase << 32) | u64::from(command.attempt);
    format!("00-{}-{span:016x}-01", id.simple())
}
