//! What is in memory of a partition, and of all of them together.

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use jiff::Timestamp;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::{compiled::Compiled, view::View};
use crate::domain::saga::{
    decide::{self, Refusal},
    event::Event,
    state::{At, State},
};

/// A deadline that passed before the start was durable is checked again after this time.
const NOT_DURABLE_RETRY: Duration = Duration::from_millis(500);
/// A timer that is further away is checked again after this time.
const LONGEST: Duration = Duration::from_hours(24);

/// One live instance.
#[derive(Debug)]
pub(super) struct Instance {
    pub(super) compiled: Arc<Compiled>,
    pub(super) state: State,
    /// Where its rows are, see `weft.saga_bucket`.
    pub(super) bucket: i32,
    pub(super) next_seq: i32,
    pub(super) started_at: Timestamp,
    /// Its business key.
    pub(super) key: Option<String>,
    /// Of memory, about.
    pub(super) bytes: usize,
    /// Until it has passed.
    pub(super) deadline: Option<Instant>,
    /// When its next timer is due, in milliseconds since the epoch, as of the last [`Shard::schedule`].
    pub(super) timer_ms: Option<i64>,
    /// Its key in [`Shard::due`].
    pub(super) due: Option<Instant>,
    /// Whether its start is in the log. Until then the commit may find that the instance exists already and ended long
    /// ago. So nothing but its start may be queued: a second row of this life could be mistaken for one of the first
    /// life.
    pub(super) durable: bool,
    /// Every call that is in progress holds a clone.
    pub(super) calls: Arc<()>,
    /// Senders for callers that wait for its end.
    pub(super) waiting: Vec<oneshot::Sender<View>>,
}

#[derive(Debug, Default)]
pub(super) struct Shard {
    pub(super) held: bool,
    pub(super) instances: HashMap<Uuid, Instance>,
    /// The next deadline or timer of each live instance: it may be a year away, and an instance that has ended must not use
    /// memory until then.
    due: BTreeSet<(Instant, Uuid)>,
}

impl Shard {
    pub(super) fn insert(&mut self, id: Uuid, instance: Instance) {
        self.instances.insert(id, instance);
        self.schedule(id);
    }

    pub(super) fn remove(&mut self, id: Uuid) -> Option<Instance> {
        let instance = self.instances.remove(&id)?;
        if let Some(due) = instance.due {
            self.due.remove(&(due, id));
        }
        Some(instance)
    }

    /// Notes when the instance is due next. Call it after every change of its state.
    pub(super) fn schedule(&mut self, id: Uuid) {
        let Some(instance) = self.instances.get_mut(&id) else { return };
        let timer_ms = decide::next_timer(&instance.compiled.tree, &instance.state);
        if instance.due.is_some() && instance.timer_ms == timer_ms {
            return;
        }
        instance.timer_ms = timer_ms;
        let due = [instance.deadline, timer_ms.map(instant)].into_iter().flatten().min();
        if instance.due == due {
            return;
        }
        if let Some(before) = std::mem::replace(&mut instance.due, due) {
            self.due.remove(&(before, id));
        }
        self.due.extend(due.map(|due| (due, id)));
    }

    /// The events of the instances that are due, each deadline once; instances that are not durable yet are postponed. Call
    /// [`Self::schedule`] for each when the events are applied.
    pub(super) fn take_due(&mut self, now: Instant, now_ms: i64) -> Vec<(Uuid, Vec<Event>)> {
        let mut taken = Vec::new();
        while let Some((due, id)) = self.due.first().copied().filter(|(due, _)| *due <= now) {
            self.due.remove(&(due, id));
            let Some(instance) = self.instances.get_mut(&id) else { continue };
            if !instance.durable {
                let later = now + NOT_DURABLE_RETRY;
                instance.due = Some(later);
                self.due.insert((later, id));
                continue;
            }
            instance.due = None;
            let mut events = decide::elapsed(&instance.compiled.tree, &instance.state, now_ms);
            if instance.deadline.is_some_and(|deadline| deadline <= now) {
                instance.deadline = None;
                events.push(Event::DeadlinePassed);
            }
            taken.push((id, events));
        }
        taken
    }
}

/// The time of a timer on this process's monotonic clock.
fn instant(due_ms: i64) -> Instant {
    let left = due_ms.saturating_sub(Timestamp::now().as_millisecond());
    Instant::now() + Duration::from_millis(u64::try_from(left).unwrap_or(0)).min(LONGEST)
}

/// An instance that was read from the database, for [`Engine::adopt`].
#[derive(Debug)]
pub(super) struct Recovered {
    pub id: Uuid,
    pub compiled: Arc<Compiled>,
    pub state: State,
    pub bucket: i32,
    pub next_seq: i32,
    pub started_at: Timestamp,
    pub key: Option<String>,
}

impl Instance {
    pub(super) fn view(&self, id: Uuid) -> View {
        let Compiled { definition, tree, .. } = self.compiled.as_ref();
        View { key: self.key.clone(), ..View::new(id, definition, tree, &self.state, self.started_at, None) }
    }

    /// A stuck pivot that cannot be asked may be cancelled, and the question to one that can be skipped, by a person who has
    /// verified that it did not happen. That must remain true: no call of it may be in progress, and none may follow
    /// automatically.
    pub(super) fn check_verified(&self, event: &Event) -> Result<(), Refusal> {
        let verified = match event {
            Event::Cancel => decide::cancel_must_be_verified(&self.compiled.tree, &self.state),
            Event::Skip { at: At::Undo(place) } => self.compiled.tree.pivot() == Some(place.node),
            _ => false,
        };
        if !verified {
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

/// What an instance takes besides its input and its replies: its state, its places in maps, a task that waits.
const OVERHEAD: usize = 2 * 1024;

pub(super) fn size(state: &State) -> usize {
    OVERHEAD + state.length()
}

/// The memory of live instances. When a participant is away they do not end, so what starts more has to wait: a client gets 429,
/// and an event stays at the broker.
#[derive(Debug)]
pub(super) struct Memory {
    limit: usize,
    instances: AtomicUsize,
    bytes: AtomicUsize,
}

impl Memory {
    pub(super) fn new(limit: usize) -> Self {
        Self { limit, instances: AtomicUsize::default(), bytes: AtomicUsize::default() }
    }

    /// One is always accepted.
    pub(super) fn has_room_for(&self, bytes: usize) -> bool {
        self.instances() == 0 || self.bytes.load(Relaxed).saturating_add(bytes) <= self.limit
    }

    pub(super) fn instances(&self) -> usize {
        self.instances.load(Relaxed)
    }

    pub(super) fn add(&self, instances: usize, bytes: usize) {
        self.instances.fetch_add(instances, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn remove(&self, instance: &Instance) {
        self.instances.fetch_sub(1, Relaxed);
        self.bytes.fetch_sub(instance.bytes, Relaxed);
    }
}

/// Converts the stored deadline to this process's monotonic clock. A wall clock that jumped between two processes can
/// shift it to now, or delay it by one whole deadline at most.
pub(super) fn deadline(started_at: Timestamp, deadline_ms: u64) -> Instant {
    let elapsed = Timestamp::now().as_millisecond().saturating_sub(started_at.as_millisecond());
    let left = deadline_ms.saturating_sub(u64::try_from(elapsed).unwrap_or(0)).min(deadline_ms);
    Instant::now() + Duration::from_millis(left)
}
