//! The polling source: reads the rows between two snapshots (see [`super::snapshot`]) and is notified by `LISTEN`.
//!
//! A term's first window is everything that is in the table, whatever the checkpoint contains: rows are deleted in the
//! transaction that records their publication, so a row that is present was not recorded. This also finds rows that
//! were restored from another server's backup, whose transaction ids mean nothing here.
//!
//! A transaction is polled as soon as it is visible. With `synchronous_commit = off` that is before it is durable, and
//! a crash of the server can then leave a published event whose transaction is lost. Log tailing does not have this
//! gap.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};

use super::{Batch, Item, Mark, Point, SourceError, table::Reader};
use crate::postgres::replication::Lsn;

/// Shortest and longest time between two queries; a notification ends the wait.
const MIN_WAIT: Duration = Duration::from_millis(20);
const MAX_WAIT: Duration = Duration::from_secs(5);

/// Polls until an error.
pub(crate) async fn poll(
    reader: &Reader,
    notified: Arc<Notify>,
    batches: &mpsc::Sender<Batch>,
) -> Result<(), SourceError> {
    let mut previous = None;
    let (mut wait, mut serial, mut last) = (MIN_WAIT, 0, Lsn(0));
    loop {
        let probe = reader.probe(previous.as_ref()).await?;
        if previous.is_some() && !probe.has_rows {
            previous = Some(probe.snapshot);
            // a notification that came during the query has stored a permit, which ends this wait at once
            if timeout(wait, notified.notified()).await.is_ok() {
                wait = MIN_WAIT;
            } else {
                wait = (wait * 2).min(MAX_WAIT);
            }
            continue;
        }
        // positions must grow from window to window, even when no WAL was written between two queries
        last = Lsn(probe.lsn.0.max(last.0 + 1));
        reader.rows(previous.as_ref(), &probe.snapshot, last, batches).await?;
        serial += 1;
        super::send(batches, vec![Item::Mark(Mark { serial, point: Point::Seen(last) })]).await?;
        previous = Some(probe.snapshot);
        wait = MIN_WAIT;
    }
}
