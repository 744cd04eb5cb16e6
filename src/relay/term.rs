//! One term of leadership: from acquiring the lock to losing it.

use std::{collections::HashMap, sync::Arc};

use tokio::sync::{mpsc, watch};
use tokio_postgres::Client;
use uuid::Uuid;

use super::{
    checkpoint::{self, Checkpoint, Recorder},
    control::{Control, DEADLINE},
    problem::RelayProblem,
    publisher::{Publisher, Rows},
    reporter::Reporter,
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
    contract::{
        problem::ProblemReason,
        relay::{Mode, Relay, Retention, Sink},
    },
    domain::names,
    postgres::replication::{Lsn, Replication},
};

/// Capacity of the queues between source and publisher (batches), and between publisher and recorder.
const BATCH_QUEUE: usize = 2;
const DONE_QUEUE: usize = 64;

#[derive(Debug, thiserror::Error)]
pub(crate) enum TermError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Sink(#[from] SinkError),
    #[error("the connection that holds the leader's lock is lost")]
    LockLost,
}

/// Publishes as the leader. Returns only with an error; dropping the future stops all parts at once.
pub(crate) async fn lead(
    contract: &Relay,
    control: &Control,
    paused: watch::Receiver<bool>,
    reporter: &Arc<Reporter>,
) -> Result<(), TermError> {
    let Relay { name, namespace, service, mode, source: _, sink, retention, paused: _, version: _ } = contract;
    // `AfterPublish` is the only retention; the recorder deletes the rows
    let Retention::AfterPublish = retention;
    let Sink::Nats(nats) = sink;
    let sink = Nats::new(nats, &names::event_source(namespace, service), application(name))?;
    let checkpoint = checkpoint::open(&control.client, name).await?;
    reporter.checkpoint(checkpoint.published);
    reporter.leading(true);
    tracing::info!(relay = name, ?mode, published = checkpoint.published, "leading");

    let (batches, received) = mpsc::channel(BATCH_QUEUE);
    let (done, finished) = mpsc::channel(DONE_QUEUE);
    let (progress, progressed) = watch::channel(None);
    let publisher = Publisher::new(&sink, OutboxTable(&control.client), received, done, paused, reporter);
    let recorder = Recorder {
        client: &control.client,
        relay: name,
        done: finished,
        recorded: progress,
        reporter,
        slot: *mode == Mode::LogTailing,
        copied: false,
        not_visible: HashMap::new(),
        withheld: None,
    };
    let source = Source { contract, control, reporter, batches };
    tokio::select! {
        biased;
        () = control.lost.cancelled() => Err(TermError::LockLost),
        ended = Box::pin(source.run(checkpoint, progressed)) => Ok(ended?),
        ended = Box::pin(publisher.run()) => Ok(ended?),
        ended = Box::pin(recorder.run()) => Ok(ended?),
    }
}

/// The name that the relay's connections have in `pg_stat_activity` and in the broker's list of connections.
pub(crate) fn application(relay: &str) -> String {
    format!("weft relay {relay}")
}

struct OutboxTable<'a>(&'a Client);

impl Rows for OutboxTable<'_> {
    async fn present(&self, ids: &[Uuid]) -> Result<Vec<Uuid>, SourceError> {
        let action = "querying the rows of refused events";
        let statement = "select id from weft.outbox where id = any ($1)";
        let rows = within(DEADLINE, action, self.0.query(statement, &[&ids])).await?;
        rows.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>().map_err(SourceError::query(action))
    }
}

struct Source<'a> {
    contract: &'a Relay,
    control: &'a Control,
    reporter: &'a Arc<Reporter>,
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
        let Self { contract, control, reporter, batches } = self;
        reporter.resolve(ProblemReason::SlotPending);
        // a slot that nobody reads would make the server keep its WAL forever; when the mode changes back, a new slot
        // is created
        Slot::remove(&control.client).await?;
        control.listen().await?;
        let reader = Reader::connect(&contract.source, &application(&contract.name)).await?;
        poll::poll(&reader, control.notified.clone(), batches).await
    }

    async fn tail(&self, copied: bool, recorded: watch::Receiver<Option<Mark>>) -> Result<(), SourceError> {
        let Self { contract, control, reporter, batches } = self;
        control.set_notifications(false).await?;
        let connect = async || Replication::connect(&contract.source, &application(&contract.name)).await;
        let slot = Slot::find(&control.client).await?;
        let (stream, serial) = match slot {
            Some(Slot { usable: true, .. }) if copied => (Slot::stream(&control.client, connect).await?, 0),
            slot => {
                if slot.is_some_and(|slot| !slot.usable) {
                    reporter.report(RelayProblem::SlotLost);
                }
                let mut replication = connect().await?;
                self.copy(&mut replication).await?;
                reporter.resolve(ProblemReason::SlotLost);
                (replication.stream(names::SLOT, names::PUBLICATION).await?, 1)
            }
        };
        let (tail, tails) = watch::channel(Tail::default());
        let tailer = Tailer::new(stream, serial, recorded, tail);
        tokio::select! {
            ended = tailer.run(batches) => ended,
            () = report_tail(tails, reporter) => Err(SourceError::Ended),
        }
    }

    /// Creates the slot again and sends the rows that are older than it. Every row that is not acknowledged is still in
    /// the table (rows are deleted only after the acknowledgement), so nothing is skipped, whatever happened to the
    /// former slot.
    async fn copy(&self, replication: &mut Replication) -> Result<(), SourceError> {
        let Self { contract, control, reporter, batches } = self;
        checkpoint::begin_copy(&control.client).await?;
        Slot::remove(&control.client).await?;
        let slot = Slot::create(&control.client, replication, reporter).await?;
        let reader = Reader::connect(&contract.source, &application(&contract.name)).await?;
        let snapshot = reader.import(&slot.snapshot).await?;
        // the copy may take as long as the broker is unreachable or the relay is paused, and an exported snapshot would
        // keep the server from removing dead rows for all that time
        replication.release_snapshot().await?;
        tracing::info!(consistent_point = %slot.consistent_point, "made the slot; publishing the rows from before it");
        let before = Lsn(slot.consistent_point.0.saturating_sub(1));
        reader.rows(None, &snapshot, before, batches).await?;
        let mark = Mark { serial: 1, point: Point::Copied(slot.consistent_point) };
        super::source::send(batches, vec![Item::Mark(mark)]).await
    }
}

/// Reports the slot's position in the status.
async fn report_tail(mut tails: watch::Receiver<Tail>, reporter: &Arc<Reporter>) {
    while tails.changed().await.is_ok() {
        let tail = *tails.borrow_and_update();
        reporter.tail(tail);
    }
}
