//! One term of leadership: from the lock to its loss.

use std::{collections::HashMap, sync::Arc};

use tokio::sync::{mpsc, watch};
use tokio_postgres::Client;
use uuid::Uuid;

use super::{
    checkpoint::{self, Checkpoint, Recorder},
    control::{Control, DEADLINE},
    publisher::{Publisher, Rows},
    report::{Report, reason},
    sink::{SinkError, nats::Nats},
    slot::Slot,
    source::{
        Batch, Item, Mark, Point, SourceError, poll,
        table::Reader,
        wal::{Tail, Tailer},
        within,
    },
};
use crate::{
    contract::relay::{Mode, Relay, Retention, Sink},
    domain::names,
    postgres::replication::{Lsn, Replication},
};

/// Batches between source and publisher, and between publisher and recorder.
const BATCHES: usize = 2;
const DONE: usize = 64;

#[derive(Debug, thiserror::Error)]
pub(crate) enum TermError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Sink(#[from] SinkError),
    #[error("the connection that holds the leader's lock is lost")]
    LockLost,
}

/// Publishes as the leader. Returns only with an error; dropping the future stops everything at once.
pub(crate) async fn lead(
    contract: &Relay,
    control: &Control,
    paused: watch::Receiver<bool>,
    report: &Arc<Report>,
) -> Result<(), TermError> {
    let Relay { name, namespace, service, mode, source: _, sink, retention, paused: _, version: _ } = contract;
    // the only retention so far; the recorder deletes
    let Retention::AfterPublish = retention;
    let Sink::Nats(nats) = sink;
    let sink = Nats::new(nats, &names::event_source(namespace, service), application(name))?;
    let checkpoint = checkpoint::open(&control.client, name).await?;
    report.checkpoint(checkpoint.published);
    report.leading(true);
    tracing::info!(relay = name, ?mode, published = checkpoint.published, "leading");

    let (batches, received) = mpsc::channel(BATCHES);
    let (done, finished) = mpsc::channel(DONE);
    let (progress, progressed) = watch::channel(None);
    let publisher = Publisher::new(&sink, Table(&control.client), received, done, paused, report);
    let recorder = Recorder {
        client: &control.client,
        relay: name,
        done: finished,
        recorded: progress,
        report,
        slot: *mode == Mode::LogTailing,
        copied: false,
        unseen: HashMap::new(),
        held: None,
    };
    let source = Source { contract, control, report, batches };
    tokio::select! {
        biased;
        () = control.lost.cancelled() => Err(TermError::LockLost),
        ended = Box::pin(source.run(checkpoint, progressed)) => Ok(ended?),
        ended = Box::pin(publisher.run()) => Ok(ended?),
        ended = Box::pin(recorder.run()) => Ok(ended?),
    }
}

/// The name under which the relay's connections are seen in the database and in the broker.
pub(crate) fn application(relay: &str) -> String {
    format!("weft relay {relay}")
}

struct Table<'a>(&'a Client);

impl Rows for Table<'_> {
    async fn present(&self, ids: &[Uuid]) -> Result<Vec<Uuid>, SourceError> {
        let doing = "looking for the rows of refused events";
        let statement = "select id from weft.outbox where id = any ($1)";
        let rows = within(DEADLINE, doing, self.0.query(statement, &[&ids])).await?;
        rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(SourceError::query(doing))
    }
}

struct Source<'a> {
    contract: &'a Relay,
    control: &'a Control,
    report: &'a Arc<Report>,
    batches: mpsc::Sender<Batch>,
}

impl Source<'_> {
    async fn run(self, checkpoint: Checkpoint, recorded: watch::Receiver<Option<Mark>>) -> Result<(), SourceError> {
        match self.contract.mode {
            Mode::LogTailing => self.tail(checkpoint.copied, recorded).await,
            Mode::Polling => self.poll().await,
        }
    }

    async fn poll(&self) -> Result<(), SourceError> {
        let Self { contract, control, report, batches } = self;
        report.mended(reason::SLOT_PENDING);
        // a slot that nobody reads would hold the WAL back for ever; should the mode change again, a new one is made
        Slot::remove(&control.client).await?;
        control.listen().await?;
        let reader = Reader::connect(&contract.source, &application(&contract.name)).await?;
        poll::poll(&reader, control.woken.clone(), batches).await
    }

    async fn tail(&self, copied: bool, recorded: watch::Receiver<Option<Mark>>) -> Result<(), SourceError> {
        let Self { contract, control, report, batches } = self;
        control.want_notifications(false).await?;
        let connect = async || Replication::connect(&contract.source, &application(&contract.name)).await;
        let slot = Slot::look(&control.client).await?;
        let (stream, serial) = match slot {
            Some(Slot { usable: true, .. }) if copied => (Slot::stream(&control.client, connect).await?, 0),
            slot => {
                if slot.is_some_and(|slot| !slot.usable) {
                    let message = "the database dropped WAL that was not read yet; publishing what is in the outbox, then from a new slot";
                    report.problem(reason::SLOT_LOST, message.to_owned());
                }
                let mut replication = connect().await?;
                self.copy(&mut replication).await?;
                report.mended(reason::SLOT_LOST);
                (replication.stream(names::SLOT, names::PUBLICATION).await?, 1)
            }
        };
        let (tail, tails) = watch::channel(Tail::default());
        let tailer = Tailer::new(stream, serial, recorded, tail);
        tokio::select! {
            ended = tailer.run(batches) => ended,
            () = tell(tails, report) => Err(SourceError::Ended),
        }
    }

    /// Makes the slot anew and sends the rows from before it. Every row that is not acknowledged is still in the table
    /// (rows are deleted only after that), so nothing is skipped, whatever became of the former slot.
    async fn copy(&self, replication: &mut Replication) -> Result<(), SourceError> {
        let Self { contract, control, report, batches } = self;
        checkpoint::begin_copy(&control.client).await?;
        Slot::remove(&control.client).await?;
        let slot = Slot::make(&control.client, replication, report).await?;
        let reader = Reader::connect(&contract.source, &application(&contract.name)).await?;
        let snapshot = reader.import(&slot.snapshot).await?;
        // the copy may take as long as the broker is away, or a person pauses it
        replication.release_snapshot().await?;
        tracing::info!(consistent_point = %slot.consistent_point, "made the slot; publishing the rows from before it");
        let before = Lsn(slot.consistent_point.0.saturating_sub(1));
        reader.rows(None, &snapshot, before, batches).await?;
        let mark = Mark { serial: 1, point: Point::Copied(slot.consistent_point) };
        super::source::send(batches, vec![Item::Mark(mark)]).await
    }
}

/// Passes the slot's position on to the status.
async fn tell(mut tails: watch::Receiver<Tail>, report: &Arc<Report>) {
    while tails.changed().await.is_ok() {
        let tail = *tails.borrow_and_update();
        report.tail(tail);
    }
}
