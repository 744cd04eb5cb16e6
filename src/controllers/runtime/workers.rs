//! The loop that takes keys from the queue and has them reconciled, a bounded number at a time.

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use super::{
    context::{Context, Verdict},
    queue::Priority,
};
use crate::controllers::{
    resources::{key::Key, outcome::Class},
    store::Requeue,
};

/// Longest that one reconcile may take; every request in it has a deadline of its own.
const RECONCILE_DEADLINE: Duration = Duration::from_mins(5);

/// A part of all keys is reconciled again at each tick; all of them in half an hour.
const RESYNC_TICK: Duration = Duration::from_mins(1);
const RESYNC_SLOTS: u64 = 30;

/// Reconciles one key, whatever its kind. Boxed: the future holds a whole plan.
pub type ReconcileFn = for<'a> fn(&'a Arc<Context>, &'a Key) -> Pin<Box<dyn Future<Output = Verdict> + Send + 'a>>;

/// Reconciles what the queue yields until `stop`; then waits for nothing: a reconcile that is cut off is simply done again.
pub async fn run(
    context: Arc<Context>,
    reconcile: ReconcileFn,
    concurrency: usize,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let (turns, ended) = (Arc::clone(&context), stop.clone());
    tasks.spawn(async move {
        tokio::select! { () = ended.cancelled() => {} () = turns.grant_turns() => {} }
    });
    let permits = Arc::new(Semaphore::new(concurrency.max(1)));
    loop {
        let next = async {
            let permit = Arc::clone(&permits).acquire_owned().await.ok()?;
            Some((permit, context.next().await))
        };
        let next = tokio::select! { () = stop.cancelled() => None, next = next => next };
        let Some((permit, key)) = next else { return };
        let (context, stop) = (Arc::clone(&context), stop.clone());
        let span = tracing::info_span!(
            "reconcile",
            kind = key.kind.as_str(),
            namespace = %key.id.namespace,
            name = %key.id.name
        );
        let work = async move {
            let verdict = tokio::select! {
                () = stop.cancelled() => None,
                verdict = one(&context, reconcile, &key) => Some(verdict),
            };
            context.settle(&key, verdict);
            drop(permit);
        };
        tasks.spawn(work.instrument(span));
    }
}

/// Reconciles every key again in the course of [`RESYNC_SLOTS`] ticks, a part at each tick: the net under a change whose requeue
/// was lost. (That under a change that the watch did not report is the watch's: it lists anew.) Where nothing differs, nothing is sent.
pub async fn resync(context: Arc<Context>, stop: CancellationToken) {
    let mut tick = tokio::time::interval(RESYNC_TICK);
    tick.tick().await;
    for slot in (0..RESYNC_SLOTS).cycle() {
        tokio::select! { () = stop.cancelled() => return, _ = tick.tick() => {} }
        let keys = context.store().part_of_keys(slot, RESYNC_SLOTS);
        context.enqueue(Requeue { now: keys, paced: Vec::new() }, Priority::Resync);
    }
}

async fn one(context: &Arc<Context>, reconcile: ReconcileFn, key: &Key) -> Verdict {
    let started = Instant::now();
    let verdict = tokio::time::timeout(RECONCILE_DEADLINE, reconcile(context, key)).await;
    let verdict = verdict.unwrap_or(Verdict::Failed(Class::Retry));
    context.metrics.reconciled(key.kind, verdict, started.elapsed());
    verdict
}
