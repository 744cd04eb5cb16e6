//! The loop that takes keys from the queue and has them reconciled, a bounded number at a time.

use std::{pin::Pin, sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::Instrument;

use super::context::{Context, Verdict};
use crate::controllers::resources::{key::Key, outcome::Class};

/// Longest that one reconcile may take; every request in it has a deadline of its own.
const RECONCILE_DEADLINE: Duration = Duration::from_mins(5);

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
    context.start_listening();
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
            namespace = key.id.namespace,
            name = key.id.name
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

async fn one(context: &Arc<Context>, reconcile: ReconcileFn, key: &Key) -> Verdict {
    let started = Instant::now();
    let verdict = tokio::time::timeout(RECONCILE_DEADLINE, reconcile(context, key)).await;
    let verdict = verdict.unwrap_or(Verdict::Failed(Class::Retry));
    context.metrics.reconciled(key.kind, verdict, started.elapsed());
    verdict
}
