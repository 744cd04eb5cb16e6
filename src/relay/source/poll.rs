//! The polling source: windows between snapshots (see [`super::snapshot`]), woken by `LISTEN`.
//!
//! A term's first window is everything that is in the table, whatever the checkpoint says: rows are deleted in the
//! transaction that records their publication, so what is there was not recorded. That also finds rows which came with a
//! backup of another server and tell nothing by their transaction's id.
//!
//! A poller sees a transaction as soon as it is visible; with `synchronous_commit = off` that is before it is durable,
//! and a crash of the server can then leave an event published whose transaction is gone. Log tailing has no such gap.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

use super::{Batch, Item, Mark, Point, SourceError, table::Reader};
use crate::postgres::replication::Lsn;

/// Shortest and longest time between two looks; a notification ends the wait.
const SHORTEST: Duration = Duration::from_millis(20);
const LONGEST: Duration = Duration::from_secs(5);

/// Polls for ever.
pub(crate) async fn poll(
    reader: &Reader,
    woken: Arc<Notify>,
    batches: &mpsc::Sender<Batch>,
) -> Result<(), SourceError> {
    let mut previous = None;
    let (mut wait, mut serial, mut last) = (SHORTEST, 0, Lsn(0));
    loop {
        let probe = reader.probe(previous.as_ref()).await?;
        if previous.is_some() && !probe.any {
            previous = Some(probe.snapshot);
            // a notification that came while we looked has left its permit
            if timeout(wait, woken.notified()).await.is_ok() {
                wait = SHORTEST;
            } else {
                wait = (wait * 2).min(LONGEST);
            }
            continue;
        }
        // positions must grow from window to window, also when no WAL was written between two looks
        last = Lsn(probe.lsn.0.max(last.0 + 1));
        reader.rows(previous.as_ref(), &probe.snapshot, last, batches).await?;
        serial += 1;
        super::send(batches, vec![Item::Mark(Mark { serial, point: Point::Seen(last) })]).await?;
        previous = Some(probe.snapshot);
        wait = SHORTEST;
    }
}
