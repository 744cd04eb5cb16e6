//! The log-tailing source: reads the outbox's inserts from the WAL, and confirms positions to the slot.
//!
//! `confirmed_flush` is the end of the last transaction of which every event, and every event before it, is
//! published or held *and recorded*. Nothing else moves it, except the **idle rule**: when everything that was
//! read is recorded and no transaction is open in the stream, the WAL end of a keepalive is confirmed, since everything
//! before it was sent. So an idle outbox in a busy database does not make the server keep WAL.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use super::{row::Layout, snapshot::Snapshot};
use crate::{
    domain::event::Position,
    postgres::replication::{
        Frame, Lsn, WalStream,
        pgoutput::{Insert, Message},
    },
    relay::source::{BATCH_BYTES, BATCH_EVENTS, Batch, Item, Mark, Place, Point, Row, SourceError},
};

/// Progress is confirmed to the slot at most this often…
const CONFIRM: Duration = Duration::from_millis(100);
/// …and a status update is sent at least this often (`wal_sender_timeout` is 60 s by default).
const STATUS_UPDATE: Duration = Duration::from_secs(10);
/// The connection is given up when the server sent nothing for this long. An idle server that receives status updates
/// sends keepalives only after half of `wal_sender_timeout`, so a keepalive is requested after a third of this time.
const MAX_SILENCE: Duration = Duration::from_secs(90);

/// The server's and the slot's positions, for the status.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tail {
    pub(crate) confirmed: Lsn,
    pub(crate) wal_end: Lsn,
    /// Everything that was read is recorded.
    pub(crate) idle: bool,
}

/// Where a stream begins.
#[derive(Debug)]
pub(crate) struct Start {
    /// Transactions that it sees were settled before, and are left out.
    pub(crate) seen: Option<Snapshot>,
    /// No event gets a lower position.
    pub(crate) floor: Lsn,
    /// The serial of the last mark that was sent before.
    pub(crate) serial: u64,
    /// A transaction id of about now.
    pub(crate) transaction: u64,
    /// Of the outbox.
    pub(crate) schema: String,
}

#[derive(Debug)]
pub(crate) struct Tailer {
    stream: WalStream,
    decoder: Decoder,
    /// The last mark that was recorded.
    recorded: watch::Receiver<Option<Mark>>,
    tail: watch::Sender<Tail>,
    confirmed: Lsn,
    /// What was last confirmed to the slot, and when.
    confirm_sent: Lsn,
    confirm_sent_at: Instant,
    received_at: Instant,
}

impl Tailer {
    pub(crate) fn new(
        stream: WalStream,
        start: Start,
        recorded: watch::Receiver<Option<Mark>>,
        tail: watch::Sender<Tail>,
    ) -> Self {
        let now = Instant::now();
        Self {
            stream,
            decoder: Decoder::new(start),
            recorded,
            tail,
            confirmed: Lsn(0),
            confirm_sent: Lsn(0),
            confirm_sent_at: now,
            received_at: now,
        }
    }

    /// Streams until an error, or until nothing is recorded any more, and confirms what was.
    pub(crate) async fn run(mut self, batches: &mpsc::Sender<Batch>) -> Result<(), SourceError> {
        loop {
            let due = if self.confirmed > self.confirm_sent { CONFIRM } else { STATUS_UPDATE };
            let full = self.decoder.is_full();
            tokio::select! {
                permit = batches.reserve(), if !self.decoder.batch.is_empty() => {
                    let permit = permit.map_err(|_closed| SourceError::Ended)?;
                    permit.send(self.decoder.take());
                    if full {
                        // while the batch was full nothing was read from the server, so its silence proves nothing
                        self.received_at = Instant::now();
                    }
                }
                frame = self.stream.next(), if !full => {
                    self.received_at = Instant::now();
                    self.frame(frame?).await?;
                    while !self.decoder.is_full() && let Some(frame) = self.stream.buffered()? {
                        self.frame(frame).await?;
                    }
                }
                changed = self.recorded.changed() => {
                    self.progress();
                    if changed.is_err() {
                        return self.confirm().await;
                    }
                }
                () = sleep_until(self.confirm_sent_at + due) => self.confirm().await?,
                () = sleep_until(self.received_at + MAX_SILENCE), if !full => return Err(SourceError::Timeout(MAX_SILENCE.as_secs())),
            }
        }
    }

    async fn frame(&mut self, frame: Frame) -> Result<(), SourceError> {
        match frame {
            Frame::Data(bytes) => self.decoder.message(bytes),
            Frame::Keepalive { wal_end, reply_requested } => {
                self.progress();
                let idle = self.is_idle();
                if idle {
                    self.confirmed = self.confirmed.max(wal_end);
                }
                self.tail.send_modify(|tail| (tail.wal_end, tail.idle) = (wal_end, idle));
                if reply_requested { self.confirm().await } else { Ok(()) }
            }
        }
    }

    fn progress(&mut self) {
        if let Some(Mark { point: Point::Committed(lsn) | Point::Slot { begins: lsn, .. }, .. }) =
            &*self.recorded.borrow_and_update()
        {
            self.confirmed = self.confirmed.max(*lsn);
        }
    }

    /// Whether everything that was read is recorded and no transaction is open in the stream.
    fn is_idle(&self) -> bool {
        let recorded = self.recorded.borrow().as_ref().map_or(0, |mark| mark.serial);
        !self.decoder.is_open() && self.decoder.batch.is_empty() && recorded == self.decoder.serial
    }

    async fn confirm(&mut self) -> Result<(), SourceError> {
        self.confirm_sent_at = Instant::now();
        self.confirm_sent = self.confirmed;
        // acknowledge last: the broker has stored every event before `confirmed`, and that is recorded
        let quiet = self.received_at.elapsed() >= MAX_SILENCE / 3;
        self.stream.confirm(self.confirmed, quiet).await?;
        let idle = self.is_idle();
        self.tail.send_modify(|tail| (tail.confirmed, tail.idle) = (self.confirmed, idle));
        Ok(())
    }
}

/// Turns the stream's messages into batches.
#[derive(Debug)]
struct Decoder {
    batch: Batch,
    bytes: usize,
    start: Start,
    serial: u64,
    open: Option<Open>,
    layouts: HashMap<u32, Layout>,
}

/// A transaction that is being received.
#[derive(Debug)]
struct Open {
    transaction: u64,
    /// Microseconds since 1970.
    committed_at: i64,
    /// Position of its next row.
    position: Position,
    /// It was published or held before.
    settled: bool,
}

/// Events of transactions that committed before the floor follow those that have the floor as their position, whose
/// indexes are below this one.
const AFTER_FLOOR: u64 = 1 << 63;

impl Decoder {
    fn new(start: Start) -> Self {
        let serial = start.serial;
        Self { batch: Vec::new(), bytes: 0, start, serial, open: None, layouts: HashMap::new() }
    }

    fn is_open(&self) -> bool {
        self.open.is_some()
    }

    fn is_full(&self) -> bool {
        self.batch.len() >= BATCH_EVENTS || self.bytes >= BATCH_BYTES
    }

    fn take(&mut self) -> Batch {
        self.bytes = 0;
        std::mem::take(&mut self.batch)
    }

    fn message(&mut self, bytes: Bytes) -> Result<(), SourceError> {
        match Message::decode(bytes)? {
            Message::Begin { commit_lsn, committed_at, transaction } => {
                self.begin(commit_lsn, committed_at, transaction);
            }
            Message::Commit { end_lsn } => {
                self.open = None;
                self.serial += 1;
                self.mark(end_lsn);
            }
            Message::Relation(relation) => {
                self.layouts.insert(relation.oid, Layout::of(&relation, &self.start.schema)?);
            }
            Message::Insert(insert) => self.insert(insert)?,
            Message::Other => {}
        }
        Ok(())
    }

    fn begin(&mut self, commit_lsn: Lsn, committed_at: i64, low: u32) {
        let transaction = whole(low, self.start.transaction);
        let floor = self.start.floor;
        let position = if commit_lsn > floor {
            Position { lsn: commit_lsn.0, index: 0 }
        } else {
            // positions in the log are below the floor: half of the indexes for the position, half for its rows
            Position { lsn: floor.0, index: AFTER_FLOOR | (commit_lsn.0 << 16 & (AFTER_FLOOR - 1)) }
        };
        let settled = self.start.seen.as_ref().is_some_and(|seen| seen.sees(transaction));
        self.open = Some(Open { transaction, committed_at, position, settled });
    }

    /// Appends a mark. Of two marks without an event between them only the later one is kept.
    fn mark(&mut self, end_lsn: Lsn) {
        let mark = Mark { serial: self.serial, point: Point::Committed(end_lsn) };
        if let Some(Item::Mark(last)) = self.batch.last_mut() {
            *last = mark;
        } else {
            self.batch.push(Item::Mark(mark));
        }
    }

    fn insert(&mut self, insert: Insert) -> Result<(), SourceError> {
        let unknown = || SourceError::Layout("a row was sent before its table's relation message");
        let layout = self.layouts.get(&insert.relation).ok_or_else(unknown)?;
        let Some(open) = &mut self.open else {
            return Err(SourceError::Layout("a row was sent outside of a transaction"));
        };
        if open.settled {
            return Ok(());
        }
        let (event, seq) = layout.event(insert.columns, open.position)?;
        open.position.index += 1;
        self.bytes += event.size();
        let place = Place { seq, transaction: Some(open.transaction) };
        self.batch.push(Item::Event(Row { event, place, committed_at: Some(open.committed_at) }));
        Ok(())
    }
}

/// The transaction id of which `low` is the low half, next to another one.
fn whole(low: u32, near: u64) -> u64 {
    let half = u32::try_from(near & u64::from(u32::MAX)).unwrap_or_default();
    let distance = low.wrapping_sub(half).cast_signed();
    near.saturating_add_signed(i64::from(distance))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_transaction_id_is_completed_from_one_next_to_it() {
        const EPOCH: u64 = 1 << 32;
        for (low, near, expected) in [
            (7, 9, 7),
            (9, 7, 9),
            (7, EPOCH + 9, EPOCH + 7),
            (u32::MAX, EPOCH + 9, EPOCH - 1),
            (3, EPOCH - 5, EPOCH + 3),
        ] {
            assert_eq!(whole(low, near), expected);
        }
    }
}
