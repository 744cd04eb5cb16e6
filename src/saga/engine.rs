//! The engine: instances in memory by partition, each changed under its partition's lock by [`decide`], its rows queued for
//! the writer in the order of the decisions. What goes out goes out in [`Engine::recorded`], after the commit.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::oneshot;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use uuid::Uuid;

use super::{
    answer,
    catalogue::{Catalogue, Compiled, Facts},
    counts::Counted,
    log::{self, Acknowledge, CONGESTED, Entry, Queue, Recorded, Row, Unrecorded},
    meters::Meters,
    transport::{self, Place, Transport},
    view::View,
};
use crate::domain::saga::{
    decide::{self, Command, Decision, Moment, Refusal},
    state::{Event, Json, Phase, State, Status, codes},
};

/// Partitions of an orchestrator's instances, as many as `orchestrator.sql` makes rows.
pub(super) const PARTITIONS: i16 = 16;

/// A deadline that passed before the start was durable is looked at again after so long.
const NOT_YET: Duration = Duration::from_millis(500);

/// Namespace of the ids that are made from idempotency keys.
const KEYS: Uuid = Uuid::from_u128(0x8f1d_6a52_94f0_4c53_9a0e_2d2f_6b70_31c8);

#[derive(Debug, thiserror::Error)]
pub(super) enum EngineError {
    #[error("there is no saga `{0}`")]
    UnknownSaga(String),
    #[error("there is no instance `{id}` of saga `{saga}`")]
    UnknownInstance { saga: String, id: Uuid },
    #[error("instance `{id}` cannot be changed like that: {why}")]
    Refused {
        id: Uuid,
        // said in the message, since the API answers with one sentence
        why: Refusal,
    },
    #[error("this orchestrator does not hold the instance's partition (yet); ask again")]
    NotHeld,
    #[error("the database is not keeping up with {0} waiting changes; ask again")]
    Congested(usize),
    #[error(transparent)]
    Unrecorded(#[from] Unrecorded),
}

/// One live instance.
#[derive(Debug)]
struct Instance {
    compiled: Arc<Compiled>,
    state: State,
    next_seq: i32,
    started_at: Timestamp,
    /// Its key in [`Shard::deadlines`], as long as it is there.
    due: Instant,
    /// Its start is in the log. Until then it may turn out that the instance exists already and ended long ago, so that
    /// nothing but its start may be queued: a second row of this life could be taken for one of the first life's.
    durable: bool,
    /// A clone is with each of its calls, as long as that is under way.
    calls: Arc<()>,
    /// Those who wait for its end.
    waiting: Vec<oneshot::Sender<View>>,
}

#[derive(Debug, Default)]
struct Shard {
    held: bool,
    instances: HashMap<Uuid, Instance>,
    /// Of live instances only: a deadline may be a year, and what has ended must not be remembered that long.
    deadlines: BTreeSet<(Instant, Uuid)>,
}

impl Shard {
    fn insert(&mut self, id: Uuid, instance: Instance) {
        self.deadlines.insert((instance.due, id));
        self.instances.insert(id, instance);
    }

    fn remove(&mut self, id: Uuid) -> Option<Instance> {
        let instance = self.instances.remove(&id)?;
        self.deadlines.remove(&(instance.due, id));
        Some(instance)
    }

    /// The instances whose deadline has passed, each once; those that are not durable yet are put off.
    fn overdue(&mut self, now: Instant) -> Vec<Uuid> {
        let mut passed = Vec::new();
        while let Some((due, id)) = self.deadlines.first().copied().filter(|(due, _)| *due <= now) {
            self.deadlines.remove(&(due, id));
            match self.instances.get_mut(&id) {
                Some(instance) if !instance.durable => {
                    instance.due = now + NOT_YET;
                    self.deadlines.insert((instance.due, id));
                }
                Some(_) => passed.push(id),
                None => {}
            }
        }
        passed
    }
}

/// An instance as the database knows it, for [`Engine::adopt`].
#[derive(Debug)]
pub(super) struct Recovered {
    pub id: Uuid,
    pub compiled: Arc<Compiled>,
    pub state: State,
    pub next_seq: i32,
    pub started_at: Timestamp,
}

/// What a call needs.
#[derive(Debug)]
struct Prepared {
    compiled: Arc<Compiled>,
    facts: Facts,
    /// The instance's [`Instance::calls`].
    under_way: Arc<()>,
}

/// What a start came to.
#[derive(Debug)]
pub(super) struct Started {
    pub id: Uuid,
    pub recorded: Recorded,
    pub view: View,
    /// Resolves with the instance's end; for one that exists already in this process too. `None` when it ended before.
    pub end: Option<oneshot::Receiver<View>>,
}

#[derive(Debug)]
pub(super) struct Engine {
    shards: Vec<Mutex<Shard>>,
    pub(super) queue: Queue,
    pub(super) catalogue: Catalogue,
    transport: Transport,
    pub(super) meters: Meters,
    pub(super) tasks: TaskTracker,
    /// Cancelled: no new call goes out.
    pub(super) ending: CancellationToken,
}

pub(super) fn partition_of(id: Uuid) -> i16 {
    let [.., last] = *id.as_bytes();
    i16::from(last) % PARTITIONS
}

impl Engine {
    pub(super) fn new(meters: Meters) -> Arc<Self> {
        Arc::new(Self {
            shards: (0..PARTITIONS).map(|_| Mutex::default()).collect(),
            queue: Queue::default(),
            catalogue: Catalogue::default(),
            transport: Transport::default(),
            meters,
            tasks: TaskTracker::new(),
            ending: CancellationToken::new(),
        })
    }

    fn shard(&self, partition: i16) -> Option<MutexGuard<'_, Shard>> {
        let shard = self.shards.get(usize::try_from(partition).ok()?)?;
        Some(shard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Starts an instance; returns when that is durable. With a `key` a second start returns the first one's instance.
    pub(super) async fn start(&self, saga: &str, input: Json, key: Option<&str>) -> Result<Started, EngineError> {
        let compiled = self.catalogue.current(saga).ok_or_else(|| EngineError::UnknownSaga(saga.to_owned()))?;
        let waiting = self.queue.len();
        if waiting > CONGESTED {
            return Err(EngineError::Congested(waiting));
        }
        let id = match key {
            Some(key) => Uuid::new_v5(&KEYS, format!("{saga}\0{key}").as_bytes()),
            None => Uuid::now_v7(),
        };
        let (acknowledge, acknowledged) = oneshot::channel();
        let (tell, end) = oneshot::channel();
        let (view, fresh) = self.begin(id, compiled, input, acknowledge, tell)?;
        let recorded = acknowledged.await.map_err(|_| Unrecorded::TakenOver)??;
        let (recorded, end) = match (recorded, fresh) {
            (Recorded::Written, true) => (Recorded::Written, Some(end)),
            // it is in memory: live, or just ended and about to tell
            (Recorded::Written, false) => (Recorded::Existed, Some(end)),
            (Recorded::Existed, _) => (Recorded::Existed, None),
        };
        Ok(Started { id, recorded, view, end })
    }

    fn begin(
        &self,
        id: Uuid,
        compiled: Arc<Compiled>,
        input: Json,
        acknowledge: Acknowledge,
        tell: oneshot::Sender<View>,
    ) -> Result<(View, bool), EngineError> {
        let partition = partition_of(id);
        let mut shard = self.shard(partition).filter(|shard| shard.held).ok_or(EngineError::NotHeld)?;
        if let Some(instance) = shard.instances.get_mut(&id) {
            instance.waiting.push(tell);
            let view = instance.view(id);
            // behind the entry of the first start, which may not be durable yet
            self.queue.push(Entry { id, partition, row: None, command: None, acknowledge: Some(acknowledge) });
            return Ok((view, false));
        }
        let (state, command) = decide::start(&compiled.definition, input.clone());
        let definition = &compiled.definition;
        let started_at = log::now();
        let row = Row {
            seq: 0,
            at: started_at,
            body: body(&Event::Started { input }),
            start: Some((definition.name.clone(), definition.version.clone())),
            end: None,
        };
        compiled.counts.change(id, Counted::NOTHING, definition, Some(&state));
        let due = Instant::now() + Duration::from_millis(definition.deadline_ms);
        let instance = Instance {
            compiled,
            state,
            next_seq: 1,
            started_at,
            due,
            durable: false,
            calls: Arc::default(),
            waiting: vec![tell],
        };
        let view = instance.view(id);
        shard.insert(id, instance);
        self.queue.push(Entry { id, partition, row: Some(row), command, acknowledge: Some(acknowledge) });
        Ok((view, true))
    }

    /// A person's verb, made with the attempt that the instance is at; returns when it is durable.
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
            if event == Event::Cancel {
                instance.may_cancel().map_err(|why| EngineError::Refused { id, why })?;
            }
            let decided = self.apply_to(id, instance, &event, Some(acknowledge));
            decided.map_err(|why| EngineError::Refused { id, why })?;
        }
        acknowledged.await.map_err(|_| Unrecorded::TakenOver)??;
        Ok(())
    }

    /// Something happened to an instance. Nothing when it is not here any more.
    pub(super) fn happened(self: &Arc<Self>, id: Uuid, event: &Event) {
        let command = {
            let Some(mut shard) = self.shard(partition_of(id)) else { return };
            let Some(instance) = shard.instances.get_mut(&id) else { return };
            // only a person's verbs are refused
            self.apply_to(id, instance, event, None).unwrap_or(None)
        };
        if let Some(command) = command {
            self.send(id, command);
        }
    }

    /// Decides and queues; answers a command that may go out at once because nothing is to be recorded.
    fn apply_to(
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
        compiled.counts.change(id, before, definition, Some(&instance.state));
        let (row, command) = match decision {
            Decision::Unrecorded(command) => return Ok(Some(command)),
            Decision::Ignored => (None, None),
            Decision::Recorded(command) => {
                let status = instance.state.status();
                let end = instance.state.phase.is_end().then(|| (definition.name.clone(), status));
                let row = Row { seq: instance.next_seq, at, body: body(event), start: None, end };
                instance.next_seq += 1;
                (Some(row), command)
            }
        };
        if row.is_some() || acknowledge.is_some() {
            self.queue.push(Entry { id, partition: partition_of(id), row, command, acknowledge });
        }
        Ok(None)
    }

    /// `entries` are durable: sends calls, tells those who wait, forgets what has ended. `existed` are the starts that the
    /// database refused because the instance exists already.
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
                // whoever asked may have gone away
                let _ = acknowledge.send(Ok(recorded));
            }
        }
    }

    /// What still waits for instances that existed already. Rows are none of it, unless something was queued for an instance
    /// that was not durable; they must not be written, since they would be taken for rows of the first life.
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

    /// Takes back an instance whose start was refused.
    fn forget(&self, id: Uuid, partition: i16) {
        if let Some(instance) = self.shard(partition).and_then(|mut shard| shard.remove(id)) {
            let counted = Counted::of(&instance.state);
            instance.compiled.counts.change(id, counted, &instance.compiled.definition, None);
        }
    }

    fn ended(&self, id: Uuid, partition: i16, status: Status, at: Timestamp) {
        let instance = self.shard(partition).and_then(|mut shard| shard.remove(id));
        let Some(instance) = instance else { return };
        let definition = &instance.compiled.definition;
        instance.compiled.counts.ended(status);
        self.meters.ended(&definition.name, status);
        let view = View::new(id, definition, &instance.state, instance.started_at, Some(at));
        for waiting in instance.waiting {
            let _ = waiting.send(view.clone());
        }
    }

    fn send(self: &Arc<Self>, id: Uuid, command: Command) {
        if !self.ending.is_cancelled() {
            self.tasks.spawn(Arc::clone(self).carry_out(id, command));
        }
    }

    /// One attempt, after its back-off.
    async fn carry_out(self: Arc<Self>, id: Uuid, command: Command) {
        if command.after_ms > 0 {
            let pause = tokio::time::sleep(Duration::from_millis(command.after_ms));
            tokio::select! { () = pause => {} () = self.ending.cancelled() => return }
        }
        let Some(place) = self.place(id, command).await else { return };
        let Some(Prepared { compiled, facts, under_way }) = self.prepare(id, command) else { return };
        let Some((call, timeout_ms)) = command.at.call(&compiled.definition) else { return };
        let began = Instant::now();
        let answer = match compiled.body(command.at, &facts) {
            Err(why) => answer::failure(codes::EXPRESSION, &why),
            Ok(body) => {
                let step = command.at.step(&compiled.definition).unwrap_or_default();
                let operation = command.at.operation().unwrap_or_default();
                let call = transport::Call {
                    method: &call.method,
                    url: &call.url,
                    body,
                    idempotency_key: format!("{id}/{step}/{operation}"),
                    traceparent: traceparent(id, command),
                    correlation_id: id.to_string(),
                    timeout: Duration::from_millis(timeout_ms),
                };
                self.transport.call(&call, place).await
            }
        };
        let definition = &compiled.definition;
        self.meters.called(&definition.name, answer.outcome(), began.elapsed());
        self.happened(id, &answer.into_event(command.at, command.attempt));
        drop(under_way);
    }

    /// A place among the requests to the service that `command` calls. What happens while it is waited for is seen by
    /// [`Self::prepare`]; at the end of the process there is none.
    async fn place(&self, id: Uuid, command: Command) -> Option<Place> {
        let compiled = Arc::clone(&self.shard(partition_of(id))?.instances.get(&id)?.compiled);
        let (call, _) = command.at.call(&compiled.definition)?;
        tokio::select! {
            biased; // a place that is free costs no look at the end
            place = self.transport.place(&call.service) => (!self.ending.is_cancelled()).then_some(place),
            () = self.ending.cancelled() => None,
        }
    }

    /// What the call needs, if it is still the one to make.
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
            facts: Facts::of(&instance.state),
            under_way: Arc::clone(&instance.calls),
        })
    }

    /// Takes over a partition with its live instances, and repeats the calls that were under way.
    pub(super) fn adopt(self: &Arc<Self>, partition: i16, instances: Vec<Recovered>) {
        let mut commands = Vec::new();
        if let Some(mut shard) = self.shard(partition) {
            for Recovered { id, compiled, mut state, next_seq, started_at } in instances {
                if let Some(command) = decide::recover(&mut state) {
                    commands.push((id, command));
                }
                compiled.counts.change(id, Counted::NOTHING, &compiled.definition, Some(&state));
                let due = due(started_at, compiled.definition.deadline_ms);
                let (durable, calls, waiting) = (true, Arc::default(), Vec::new());
                shard.insert(id, Instance { compiled, state, next_seq, started_at, due, durable, calls, waiting });
            }
            shard.held = true;
        }
        for (id, command) in commands {
            self.send(id, command);
        }
    }

    /// Another process holds the partition now: everything that this one knew of it is out of date.
    pub(super) fn abandon(&self, partition: i16) {
        let Some(mut shard) = self.shard(partition) else { return };
        let Shard { instances, .. } = std::mem::take(&mut *shard);
        for (id, instance) in instances {
            let counted = Counted::of(&instance.state);
            instance.compiled.counts.change(id, counted, &instance.compiled.definition, None);
        }
    }

    /// Tells the instances whose deadline has passed.
    pub(super) fn deadlines(self: &Arc<Self>) {
        let now = Instant::now();
        for partition in 0..PARTITIONS {
            let passed = self.shard(partition).map(|mut shard| shard.overdue(now)).unwrap_or_default();
            for id in passed {
                self.happened(id, &Event::DeadlinePassed);
            }
        }
    }

    /// How many partitions are held.
    pub(super) fn held(&self) -> usize {
        (0..PARTITIONS).filter(|partition| self.shard(*partition).is_some_and(|shard| shard.held)).count()
    }

    /// The live instances of `saga` in `status`, up to `limit`; `None`: in any.
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

impl Instance {
    fn view(&self, id: Uuid) -> View {
        View::new(id, &self.compiled.definition, &self.state, self.started_at, None)
    }

    /// A pivot that is stuck may be cancelled by whoever found out that it did not happen. That must stay so: no call of it may
    /// be under way, and none may follow by itself.
    fn may_cancel(&self) -> Result<(), Refusal> {
        let pivot = self.compiled.definition.pivot().map(Phase::Do);
        if self.state.stuck.is_none() || pivot != Some(self.state.phase) {
            return Ok(());
        }
        if !self.state.paused {
            return Err(Refusal::PivotTried);
        }
        if Arc::strong_count(&self.calls) > 1 {
            return Err(Refusal::PivotUnderWay);
        }
        Ok(())
    }
}

/// The stored deadline on this process's monotonic clock. A wall clock that jumped between two processes can bring it forward
/// to now or put it off by one whole deadline, no more.
fn due(started_at: Timestamp, deadline_ms: u64) -> Instant {
    let gone = Timestamp::now().as_millisecond().saturating_sub(started_at.as_millisecond());
    let left = deadline_ms.saturating_sub(u64::try_from(gone).unwrap_or(0)).min(deadline_ms);
    Instant::now() + Duration::from_millis(left)
}

fn body(event: &Event) -> String {
    // strings, numbers and raw JSON always have a form in JSON
    serde_json::to_string(event).unwrap_or_default()
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
