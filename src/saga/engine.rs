//! The engine: keeps the instances in memory by partition. Each is changed by [`decide`] under its partition's lock,
//! and its rows are queued for the writer in the order of the decisions. What was decided is done from [`Engine::recorded`],
//! after the commit: see [`super::calls`].

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
    catalogue::Catalogue,
    compiled::Compiled,
    counts::Counted,
    kept::Kept,
    key::{Key, PARTITIONS, partition_of},
    lease::Lease,
    log::{self, Acknowledge, Entry, Queue, Recorded, Row, Start, Unrecorded},
    meters::Meters,
    shard::{Instance, Memory, Shard, size},
    transport::Transport,
    view::View,
};
use crate::domain::saga::{
    decide::{self, Actions, Decision, Moment, Refusal},
    event::{Audit, Event, Written},
    json,
    state::{Json, State, Status},
    tree::Tree,
};

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
    pub(super) transport: Transport,
    /// Evaluations that may take long, one at a time: each may need 100 MiB, and many busy threads would delay those that renew
    /// the lease and answer the probes.
    pub(super) evaluations: Arc<Semaphore>,
    pub(super) lease: Lease,
    pub(super) kept: Kept,
    pub(super) memory: Memory,
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

    pub(super) fn shard(&self, partition: i16) -> Option<MutexGuard<'_, Shard>> {
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
        let heavy = compiled.has_heavy(input.as_str().len());
        let business_key = self.evaluate(heavy, move || of.check_input(&checked).and_then(|()| of.key(&checked))).await;
        let business_key = business_key.map_err(EngineError::UnusableInput)?;
        let id = key.map_or_else(Uuid::now_v7, |key| key.id(saga));
        if matches!(key, Some(Key::Request(_))) {
            self.check_input(id, &input)?;
        }
        let (acknowledge, acknowledged) = oneshot::channel();
        let (end_sender, end) = oneshot::channel();
        let (view, fresh) = self.begin(id, compiled, (input, business_key), acknowledge, end_sender)?;
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
        (input, key): (Json, Option<String>),
        acknowledge: Acknowledge,
        end_sender: oneshot::Sender<View>,
    ) -> Result<(View, bool), EngineError> {
        let partition = partition_of(id);
        let mut shard = self.shard(partition).filter(|shard| shard.held).ok_or(EngineError::NotHeld)?;
        if let Some(instance) = shard.instances.get_mut(&id) {
            instance.waiting.push(end_sender);
            let view = instance.view(id);
            // queued behind the entry of the first start, which may not be durable yet
            self.queue.push(Entry {
                id,
                partition,
                row: None,
                actions: Actions::default(),
                acknowledge: Some(acknowledge),
            });
            return Ok((view, false));
        }
        let started_at = log::now();
        let (state, actions) = decide::start(&compiled.tree, input.clone(), started_at.as_millisecond());
        let definition = &compiled.definition;
        let bytes = size(&state);
        if !self.memory.has_room_for(bytes) {
            return Err(EngineError::Full(self.memory.instances()));
        }
        let bucket = self.kept.bucket().ok_or(EngineError::NotHeld)?;
        let row = Row {
            bucket,
            seq: 0,
            at: started_at,
            body: body(&Event::Started { input }, None, &state),
            start: Some(Start { saga: definition.name.clone(), version: definition.version.clone(), key: key.clone() }),
            end: None,
        };
        compiled.counts.change(id, Counted::NOTHING, &compiled.tree, Some(&state));
        let deadline = Instant::now() + Duration::from_millis(definition.deadline_ms);
        let instance = Instance {
            compiled,
            state,
            bucket,
            next_seq: 1,
            started_at,
            key,
            bytes,
            deadline: Some(deadline),
            timer_ms: None,
            due: None,
            durable: false,
            calls: Arc::default(),
            waiting: vec![end_sender],
        };
        let view = instance.view(id);
        self.memory.add(1, bytes);
        shard.insert(id, instance);
        self.queue.push(Entry { id, partition, row: Some(row), actions, acknowledge: Some(acknowledge) });
        Ok((view, true))
    }

    /// Applies the event that `make` makes of the instance's state, a person's verb or a signal; returns when it is durable.
    /// `audit` is recorded with it.
    pub(super) async fn change(
        self: &Arc<Self>,
        saga: &str,
        id: Uuid,
        audit: &Audit,
        make: impl FnOnce(&Tree, &State) -> Result<Event, Refusal>,
    ) -> Result<(), EngineError> {
        let (acknowledge, acknowledged) = oneshot::channel();
        let unknown = || EngineError::UnknownInstance { saga: saga.to_owned(), id };
        let refused = |why| EngineError::Refused { id, why };
        {
            let mut shard = self.shard(partition_of(id)).filter(|shard| shard.held).ok_or(EngineError::NotHeld)?;
            let instance = shard.instances.get(&id).ok_or_else(unknown)?;
            if instance.compiled.definition.name != saga {
                return Err(unknown());
            }
            if !instance.durable {
                return Err(EngineError::NotHeld);
            }
            let event = make(&instance.compiled.tree, &instance.state).map_err(refused)?;
            instance.check_verified(&event).map_err(refused)?;
            self.decide_and_queue(id, &mut shard, (&event, Some(audit)), Some(acknowledge)).map_err(refused)?;
        }
        acknowledged.await.map_err(|_| Unrecorded::TakenOver)??;
        Ok(())
    }

    /// Applies an event to an instance. Does nothing when the instance is no longer in this process.
    pub(super) fn handle_event(self: &Arc<Self>, id: Uuid, event: &Event) {
        let actions = {
            let Some(mut shard) = self.shard(partition_of(id)) else { return };
            // only a person's verbs and signals are refused
            self.decide_and_queue(id, &mut shard, (event, None), None).unwrap_or_default()
        };
        self.act(id, actions);
    }

    /// Decides and queues the row; returns actions that may be done at once because nothing has to be recorded.
    fn decide_and_queue(
        &self,
        id: Uuid,
        shard: &mut Shard,
        (event, audit): (&Event, Option<&Audit>),
        acknowledge: Option<Acknowledge>,
    ) -> Result<Actions, Refusal> {
        let Some(instance) = shard.instances.get_mut(&id) else { return Ok(Actions::default()) };
        let at = log::now();
        let before = Counted::of(&instance.state);
        let moment = Moment { now_ms: at.as_millisecond(), random: rand::random() };
        let compiled = Arc::clone(&instance.compiled);
        let decision = decide::decide(&compiled.tree, &mut instance.state, event, moment)?;
        if matches!(decision, Decision::Recorded(_)) {
            let bytes = kept(event);
            instance.bytes += bytes;
            self.memory.add(0, bytes);
        }
        compiled.counts.change(id, before, &compiled.tree, Some(&instance.state));
        let (row, actions) = match decision {
            Decision::Unrecorded(actions) => return Ok(actions),
            Decision::Ignored => (None, Actions::default()),
            Decision::Recorded(actions) => {
                let (state, definition) = (&instance.state, &compiled.definition);
                let end = state.stage.is_end().then(|| (definition.name.clone(), state.status()));
                let (bucket, seq, body) = (instance.bucket, instance.next_seq, body(event, audit, state));
                instance.next_seq += 1;
                (Some(Row { bucket, seq, at, body, start: None, end }), actions)
            }
        };
        shard.schedule(id);
        if row.is_some() || acknowledge.is_some() {
            self.queue.push(Entry { id, partition: partition_of(id), row, actions, acknowledge });
        }
        Ok(Actions::default())
    }

    /// Called when `entries` are durable: sends their calls, notifies callers and removes instances that have ended.
    /// `existed` are the starts that the database refused because the instance exists already.
    pub(super) fn recorded(self: &Arc<Self>, entries: Vec<Entry>, existed: &[Uuid]) {
        let existed: HashSet<Uuid> = existed.iter().copied().collect();
        self.withdraw(&existed);
        for Entry { id, partition, row, actions, acknowledge } in entries {
            let refused = existed.contains(&id);
            match row {
                Some(Row { start: Some(_), .. }) if refused => self.forget(id, partition),
                Some(_) if refused => {}
                Some(Row { start: Some(start), .. }) => self.started(id, partition, &start.saga),
                Some(Row { end: Some((_, status)), at, .. }) => self.ended(id, partition, status, at),
                Some(_) | None => {}
            }
            if !refused {
                self.act(id, actions);
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
            instance.compiled.counts.change(id, counted, &instance.compiled.tree, None);
        }
    }

    fn ended(&self, id: Uuid, partition: i16, status: Status, at: Timestamp) {
        let instance = self.shard(partition).and_then(|mut shard| shard.remove(id));
        let Some(instance) = instance else { return };
        self.memory.remove(&instance);
        let definition = &instance.compiled.definition;
        instance.compiled.counts.ended(status);
        self.meters.ended(&definition.name, status);
        let view = View { ended_at: Some(at), ..instance.view(id) };
        for waiting in instance.waiting {
            let _ = waiting.send(view.clone());
        }
    }
}

fn body(event: &Event, audit: Option<&Audit>, state: &State) -> String {
    // serializing strings, numbers and raw JSON cannot fail
    serde_json::to_string(&Written::new(event, audit, state)).unwrap_or_default()
}

/// Bytes that the state keeps of an event.
fn kept(event: &Event) -> usize {
    match event {
        Event::Succeeded { reply: Some(json), .. }
        | Event::Signalled { body: json, .. }
        | Event::Produced { output: Some(json), .. } => json.as_str().len(),
        Event::Listed { items, .. } => items.iter().map(|item| item.as_str().len()).sum(),
        _ => 0,
    }
}
