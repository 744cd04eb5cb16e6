//! The log-tailing source: reads the outbox's inserts from the WAL, and confirms positions to the slot.
//!
//! `confirmed_flush` is the end of the last transaction of which every event, and every event before it, is
//! acknowledged by the broker *and recorded*. Nothing else moves it, except the **idle rule**: when everything that was
//! read is recorded and no transaction is open in the stream, the WAL end of a keepalive is confirmed, since everything
//! before it was sent. So an idle outbox in a busy database does not make the server keep WAL.

use std::{collections::HashMap, time::Duration};

use bytes::Bytes;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

use super::{BATCH_BYTES, BATCH_EVENTS, Batch, Item, Mark, Point, SourceError, row::Layout};
use crate::{
    domain::event::Position,
    postgres::replication::{
        Frame, Lsn, WalStream,
        pgoutput::{Insert, Message},
    },
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
    /// `serial` is the serial of the last mark that was sent before.
    pub(crate) fn new(
        stream: WalStream,
        serial: u64,
        recorded: watch::Receiver<Option<Mark>>,
        tail: watch::Sender<Tail>,
    ) -> Self {
        let now = Instant::now();
        Self {
            stream,
            decoder: Decoder::new(serial),
            recorded,
            tail,
            confirmed: Lsn(0),
            confirm_sent: Lsn(0),
            confirm_sent_at: now,
            received_at: now,
        }
    }

    /// Streams until an error.
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
                    changed.map_err(|_closed| SourceError::Ended)?;
                    self.progress();
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
                if self.is_idle() {
                    self.confirmed = self.confirmed.max(wal_end);
                }
                self.tail.send_modify(|tail| tail.wal_end = wal_end);
                if reply_requested { self.confirm().await } else { Ok(()) }
            }
        }
    }

    fn progress(&mut self) {
        if let Some(Mark { point: Point::Committed(lsn), .. }) = &*self.recorded.borrow_and_update() {
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
        self.tail.send_modify(|tail| tail.confirmed = self.confirmed);
        Ok(())
    }
}

/// Turns the stream's messages into batches.
#[derive(Debug)]
struct Decoder {
    batch: Batch,
    bytes: usize,
    serial: u64,
    /// The open transaction: its commit position and the index of its next row.
    open: Option<Position>,
    layouts: HashMap<u32, Option<Layout>>,
}

impl Decoder {
    fn new(serial: u64) -> Self {
        Self { batch: Vec::new(), bytes: 0, serial, open: None, layouts: HashMap::new() }
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
            Message::Begin { commit_lsn, .. } => self.open = Some(Position { lsn: commit_lsn.0, index: 0 }),
            Message::Commit { end_lsn } => {
                self.open = None;
                self.serial += 1;
                self.mark(end_lsn);
            }
            Message::Relation(relation) => {
                self.layouts.insert(relation.oid, Layout::of(&relation)?);
            }
            Message::Insert(insert) => self.insert(insert)?,
            Message::Other => {}
        }
        Ok(())
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
        let Some(layout) = self.layouts.get(&insert.relation).ok_or_else(unknown)? else { return Ok(()) };
        let Some(position) = &mut self.open else {
            return Err(SourceError::Layout("a row was sent outside of a transaction"));
        };
        let event = layout.event(insert.columns, *position)?;
        position.index += 1;
        self.bytes += event.size();
        self.batch.push(Item::Event(event));
        Ok(())
    }
}
