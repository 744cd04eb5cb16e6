//! The outbox in windows: the rows that one snapshot sees and the one before it does not (see [`super::snapshot`]).

use tokio::sync::mpsc;

use super::{
    ledger::Ledger,
    snapshot::Snapshot,
    table::{FEW, Newest, Reader},
};
use crate::{
    postgres::replication::Lsn,
    relay::source::{BATCH_BYTES, BATCH_EVENTS, Batch, Item, Mark, Point, SourceError, send},
};

/// Goes from snapshot to snapshot, and sends what is between them.
pub(super) struct Windows<'a> {
    pub(super) reader: &'a Reader,
    batches: &'a mpsc::Sender<Batch>,
    /// Every row that it sees was sent, or settled before.
    pub(super) seen: Option<Snapshot>,
    /// Positions grow from window to window, even when no log was written between two of them.
    pub(super) floor: Lsn,
    pub(super) serial: u64,
    /// This term has read the whole table once.
    begun: bool,
}

impl<'a> Windows<'a> {
    pub(super) fn new(reader: &'a Reader, ledger: Ledger, batches: &'a mpsc::Sender<Batch>) -> Self {
        let Ledger { snapshot, floor, .. } = ledger;
        Self { reader, batches, seen: snapshot, floor, serial: 0, begun: false }
    }

    /// Sends the next window; whether it had rows.
    ///
    /// A term's first window goes through the whole table. So it also finds rows that were restored from another server's
    /// dump, whose transaction ids mean nothing here.
    pub(super) async fn next(&mut self) -> Result<bool, SourceError> {
        let previous = match &self.seen {
            Some(previous) if self.begun => previous,
            settled => {
                let (snapshot, lsn) = self.reader.now().await?;
                let lsn = lsn.max(Lsn(self.floor.0 + 1));
                self.reader.pages(settled.as_ref(), &snapshot, i64::MIN, lsn, self.batches).await?;
                self.begun = true;
                self.pass(snapshot, lsn).await?;
                return Ok(true);
            }
        };
        let Newest { snapshot, lsn, rows } = self.reader.newest(previous).await?;
        if rows.is_empty() {
            // the older snapshot is as good
            return Ok(false);
        }
        let lsn = lsn.max(Lsn(self.floor.0 + 1));
        if rows.len() > FEW {
            self.reader.pages(Some(previous), &snapshot, i64::MIN, lsn, self.batches).await?;
        } else {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            for mut row in rows {
                row.event.position.lsn = lsn.0;
                bytes += row.event.size();
                batch.push(Item::Event(row));
                if batch.len() >= BATCH_EVENTS || bytes >= BATCH_BYTES {
                    bytes = 0;
                    send(self.batches, std::mem::take(&mut batch)).await?;
                }
            }
            send(self.batches, batch).await?;
        }
        self.pass(snapshot, lsn).await?;
        Ok(true)
    }

    /// Sends the rows that a slot's snapshot sees and no window had. `begins` is where the slot begins.
    pub(super) async fn up_to(&mut self, snapshot: &Snapshot, begins: Lsn) -> Result<(), SourceError> {
        let (_, lsn) = self.reader.now().await?;
        self.floor = lsn.max(Lsn(self.floor.0 + 1));
        self.reader.pages(self.seen.as_ref(), snapshot, i64::MIN, self.floor, self.batches).await?;
        self.serial += 1;
        let point = Point::Slot { begins, snapshot: self.seen.clone(), floor: self.floor };
        let mark = Mark { serial: self.serial, point };
        send(self.batches, vec![Item::Mark(mark)]).await
    }

    async fn pass(&mut self, snapshot: Snapshot, floor: Lsn) -> Result<(), SourceError> {
        (self.floor, self.serial) = (floor, self.serial + 1);
        let mark = Mark { serial: self.serial, point: Point::Seen { snapshot: snapshot.clone(), floor } };
        self.seen = Some(snapshot);
        send(self.batches, vec![Item::Mark(mark)]).await
    }
}
