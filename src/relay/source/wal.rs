//! The log-tailing source: the outbox's inserts out of the WAL, and what the slot is told.
//!
//! `confirmed_flush` is the end of the last transaction of which every event, and every event before it, is acknowledged by the
//! broker *and recorded*. Nothing else moves it, but the **idle rule**: when everything that was read is recorded and
//! no transaction is open in the stream, the keepalive's WAL end, before which everything was sent. So an idle outbox in
//! a busy database holds no WAL back.

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

/// The slot is told of progress at most this often…
const CONFIRM: Duration = Duration::from_millis(100);
/// …and of our being alive at least this often (`wal_sender_timeout` is 60 s unless told).
const SIGN_OF_LIFE: Duration = Duration::from_secs(10);
/// More silence than this is an end. An idle server that hears from us has no reason to speak (it does so only when
/// half of `wal_sender_timeout` passed without a word), so it is asked to after a third of this.
const SILENCE: Duration = Duration::from_secs(90);

/// What the server and the slot are at; for the status.
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
    /// What the slot was told last, and when.
    told: Lsn,
    told_at: Instant,
    heard_at: Instant,
}

impl Tailer {
    /// `serial` is that of the last mark that was sent before.
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
            told: Lsn(0),
            told_at: now,
            heard_at: now,
        }
    }

    /// Streams for ever.
    pub(crate) async fn run(mut self, batches: &mpsc::Sender<Batch>) -> Result<(), SourceError> {
        loop {
            let due = if self.confirmed > self.told { CONFIRM } else { SIGN_OF_LIFE };
            let full = self.decoder.is_full();
            tokio::select! {
                permit = batches.reserve(), if !self.decoder.batch.is_empty() => {
                    let permit = permit.map_err(|_closed| SourceError::Ended)?;
                    permit.send(self.decoder.take());
                    if full {
                        // nobody listened meanwhile
                        self.heard_at = Instant::now();
                    }
                }
                frame = self.stream.next(), if !full => {
                    self.heard_at = Instant::now();
                    self.frame(frame?).await?;
                    while !self.decoder.is_full() && let Some(frame) = self.stream.buffered()? {
                        self.frame(frame).await?;
                    }
                }
                changed = self.recorded.changed() => {
                    changed.map_err(|_closed| SourceError::Ended)?;
                    self.progress();
                }
                () = sleep_until(self.told_at + due) => self.confirm().await?,
                () = sleep_until(self.heard_at + SILENCE), if !full => return Err(SourceError::Timeout(SILENCE.as_secs())),
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

    /// Everything that was read is recorded, and no transaction is open in the stream.
    fn is_idle(&self) -> bool {
        let recorded = self.recorded.borrow().as_ref().map_or(0, |mark| mark.serial);
        !self.decoder.is_open() && self.decoder.batch.is_empty() && recorded == self.decoder.serial
    }

    async fn confirm(&mut self) -> Result<(), SourceError> {
        self.told_at = Instant::now();
        self.told = self.confirmed;
        // acknowledged last: every event before `confirmed` is with the broker, and that is recorded
        let quiet = self.heard_at.elapsed() >= SILENCE / 3;
        self.stream.confirm(self.confirmed, quiet).await?;
        self.tail.send_modify(|tail| tail.confirmed = self.confirmed);
        Ok(())
    }
}

/// Makes batches of the stream's messages.
#[derive(Debug)]
struct Decoder {
    batch: Batch,
    bytes: usize,
    serial: u64,
    /// The transaction that is being read: its commit position and the next row's place in it.
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

    /// Of two marks with nothing between them the later one is enough.
    fn mark(&mut self, end_lsn: Lsn) {
        let mark = Mark { serial: self.serial, point: Point::Committed(end_lsn) };
        if let Some(Item::Mark(last)) = self.batch.last_mut() {
            *last = mark;
        } else {
            self.batch.push(Item::Mark(mark));
        }
    }

    fn insert(&mut self, insert: Insert) -> Result<(), SourceError> {
        let unknown = || SourceError::Layout("a row came before its table's description");
        let Some(layout) = self.layouts.get(&insert.relation).ok_or_else(unknown)? else { return Ok(()) };
        let Some(position) = &mut self.open else {
            return Err(SourceError::Layout("a row came outside of a transaction"));
        };
        let event = layout.event(insert.columns, *position)?;
        position.index += 1;
        self.bytes += event.size();
        self.batch.push(Item::Event(event));
        Ok(())
    }
}
