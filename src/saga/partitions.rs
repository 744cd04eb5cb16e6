//! The engine's partitions: which it holds, what is in them, and what is due.

use std::{sync::Arc, time::Instant};

use jiff::Timestamp;
use uuid::Uuid;

use super::{
    counts::Counted,
    engine::Engine,
    filter::{Cursor, Filter},
    key::{PARTITIONS, partition_of},
    shard::{Instance, Recovered, Shard, deadline, size},
    view::View,
};
use crate::domain::saga::decide;

impl Engine {
    /// Takes over a partition with its live instances, and repeats the calls that were in progress.
    pub(super) fn adopt(self: &Arc<Self>, partition: i16, instances: Vec<Recovered>) {
        let mut repeated = Vec::new();
        if let Some(mut shard) = self.shard(partition) {
            for Recovered { id, compiled, mut state, bucket, next_seq, started_at, key } in instances {
                repeated.push((id, decide::recover(&compiled.tree, &mut state)));
                compiled.counts.change(id, Counted::NOTHING, &compiled.tree, Some(&state));
                let deadline = Some(deadline(started_at, compiled.definition.deadline_ms));
                let (durable, calls, waiting) = (true, Arc::default(), Vec::new());
                let bytes = size(&state);
                let (timer_ms, due) = (None, None);
                let instance = Instance {
                    compiled,
                    state,
                    bucket,
                    next_seq,
                    started_at,
                    key,
                    bytes,
                    deadline,
                    timer_ms,
                    due,
                    durable,
                    calls,
                    waiting,
                };
                self.memory.add(1, bytes);
                shard.insert(id, instance);
            }
            shard.held = true;
        }
        for (id, actions) in repeated {
            self.act(id, actions);
        }
    }

    /// Another process holds the partition now: drops its instances, which are out of date here.
    pub(super) fn abandon(&self, partition: i16) {
        let Some(mut shard) = self.shard(partition) else { return };
        let Shard { instances, .. } = std::mem::take(&mut *shard);
        for (id, instance) in instances {
            self.memory.remove(&instance);
            let counted = Counted::of(&instance.state);
            instance.compiled.counts.change(id, counted, &instance.compiled.tree, None);
        }
    }

    /// Applies what is due to every instance: its deadline, and its timers.
    pub(super) fn check_timers(self: &Arc<Self>) {
        let (now, now_ms) = (Instant::now(), Timestamp::now().as_millisecond());
        for partition in 0..PARTITIONS {
            let due = self.shard(partition).map(|mut shard| shard.take_due(now, now_ms)).unwrap_or_default();
            for (id, events) in due {
                for event in &events {
                    self.handle_event(id, event);
                }
                // what has not ended and is not due after all: a clock was set back
                if let Some(mut shard) = self.shard(partition) {
                    shard.schedule(id);
                }
            }
        }
    }

    /// Number of partitions that this process holds.
    pub(super) fn held(&self) -> usize {
        (0..PARTITIONS).filter(|partition| self.shard(*partition).is_some_and(|shard| shard.held)).count()
    }

    /// Whether a live instance of this id is in this process.
    pub(super) fn holds(&self, saga: &str, id: Uuid) -> bool {
        let shard = self.shard(partition_of(id));
        shard.is_some_and(|shard| {
            shard.instances.get(&id).is_some_and(|instance| instance.compiled.definition.name == saga)
        })
    }

    /// The live instances of `saga`, the latest first, after `after`, at most `limit`.
    pub(super) fn live(&self, saga: &str, filter: &Filter, after: Option<Cursor>, limit: usize) -> Vec<View> {
        let mut views: Vec<(Cursor, View)> = Vec::new();
        for shard in (0..PARTITIONS).filter_map(|partition| self.shard(partition)) {
            let of_saga = shard.instances.iter().filter_map(|(id, instance)| {
                let cursor = Cursor { started_at: instance.started_at, id: *id };
                let is_wanted = instance.compiled.definition.name == saga
                    && after.is_none_or(|after| cursor.order() > after.order())
                    && filter.admits(instance);
                is_wanted.then_some((cursor, instance))
            });
            let mut wanted: Vec<(Cursor, &Instance)> = of_saga.collect();
            wanted.sort_by_key(|(cursor, _)| cursor.order());
            views.extend(wanted.into_iter().take(limit).map(|(cursor, instance)| (cursor, instance.view(cursor.id))));
        }
        views.sort_by_key(|(cursor, _)| cursor.order());
        views.truncate(limit);
        views.into_iter().map(|(_, view)| view).collect()
    }
}
