//! The outbox in PostgreSQL: read from the table ([`windows`]) or from the write-ahead log ([`tail`]).
//!
//! # Which events are published
//! [`ledger`] says it, and the table does not: a row that is present may be published (its transaction may be invisible
//! still, so that it could not be deleted), held, or new. The ledger has two positions that a reader can start from:
//! - a *snapshot*: every row that it sees is published or held;
//! - a position in the write-ahead log: every transaction that committed before it is published or held. It goes with a
//!   replication slot.
//!
//! A log-tailing relay starts from the log. Where that cannot be (there is no slot, the slot lost its log, belongs to
//! another server, or was moved by somebody) it starts from the snapshot, as a polling one does, and makes a slot
//! meanwhile ([`copy`]). So nothing is skipped, whatever happened to the slot, and nothing waits for a new one.

mod copy;
pub(crate) mod dead;
mod held;
pub(crate) mod ledger;
mod poll;
mod published;
pub(crate) mod recorder;
mod row;
pub(crate) mod slot;
pub mod snapshot;
mod table;
pub(crate) mod tail;
mod windows;

use std::{sync::Arc, time::Duration};

use tokio::sync::{mpsc, watch};
use tokio_postgres::Client;

use self::{copy::Copy, ledger::Ledger, poll::Sleep, slot::Slot, table::Reader, tail::Tailer, windows::Windows};
use super::{Batch, Mark, SourceError, stopped};
use crate::{
    contract::{
        problem::ProblemReason,
        relay::{Mode, Relay},
    },
    postgres::{outbox::Outbox, replication::Replication, session::Session},
    relay::{problem::RelayProblem, reporter::Reporter},
};

/// Deadline of every statement except the deletion of rows.
pub(crate) const DEADLINE: Duration = Duration::from_secs(10);

/// Reads the outbox from where the ledger ends.
pub(crate) struct Postgres<'a> {
    pub(crate) contract: &'a Relay,
    pub(crate) application: String,
    /// What the server has for this outbox.
    pub(crate) outbox: &'a Outbox,
    /// Of the leader: for statements about slot and ledger.
    pub(crate) client: &'a Client,
    pub(crate) ledger: Ledger,
    pub(crate) reporter: &'a Arc<Reporter>,
    pub(crate) batches: mpsc::Sender<Batch>,
    /// The last mark that was recorded. Its end is the end of the source, which then confirms what it has to.
    pub(crate) recorded: watch::Receiver<Option<Mark>>,
}

impl Postgres<'_> {
    /// Reads until an error, or until `recorded` ends.
    pub(crate) async fn run(self) -> Result<(), SourceError> {
        match self.contract.mode {
            Mode::LogTailing => self.tail().await,
            Mode::Polling => self.poll().await,
        }
    }

    async fn poll(self) -> Result<(), SourceError> {
        let Self { contract, application, outbox, client, ledger, reporter, batches, recorded } = self;
        reporter.resolve(ProblemReason::SlotPending);
        reporter.resolve(ProblemReason::PublicationInvalid);
        // a slot that nobody reads would make the server keep its log forever; when the mode changes back, a new slot
        // is made
        ledger::forget_slot(client).await?;
        Slot::remove(client, outbox).await?;
        let session = Session::connect(&contract.source, &application).await?;
        let reader = Reader::new(&contract.source, &application).await?;
        let windows = Windows::new(&reader, ledger, &batches);
        stopped(recorded, poll::poll(windows, Sleep::new(&session).await?)).await
    }

    async fn tail(self) -> Result<(), SourceError> {
        let Self { contract, application, outbox, client, ledger, reporter, batches, recorded } = self;
        poll::never_wake(client).await?;
        let connect = async || Replication::connect(&contract.source, &application).await;
        let transaction = ledger.next_transaction;
        let start = ledger.start(Slot::find(client, outbox).await?, client).await?;
        let (stream, seen, floor, serial) = match start {
            ledger::Start::Stream(lsn) => {
                (Slot::stream(client, outbox, connect, lsn).await?, ledger.snapshot, ledger.floor, 0)
            }
            ledger::Start::Copy(why) => {
                tracing::info!(why, "publishing from the table until there is a new replication slot");
                if why == ledger::LOST {
                    reporter.report(RelayProblem::SlotLost);
                }
                let reader = Reader::new(&contract.source, &application).await?;
                let windows = Windows::new(&reader, ledger, &batches);
                let copy = Copy { contract, application: &application, outbox, client, reporter };
                let copied = tokio::select! {
                    copied = Box::pin(copy.run(windows)) => copied?,
                    () = super::ended(recorded.clone()) => return Ok(()),
                };
                reporter.resolve(ProblemReason::SlotLost);
                let copy::Copied { replication, consistent_point, seen, floor, serial } = copied;
                // the floor must be recorded before it is the position of anything that the log has
                if !reached(recorded.clone(), serial).await {
                    return Ok(());
                }
                (replication.stream(&outbox.slot, &outbox.publication, consistent_point).await?, seen, floor, serial)
            }
        };
        let (positions, tails) = watch::channel(tail::Tail::default());
        let tailer = Tailer::new(
            stream,
            tail::Start { seen, floor, serial, transaction, schema: outbox.schema.clone() },
            recorded,
            positions,
        );
        let ended = tokio::select! {
            ended = tailer.run(&batches) => ended,
            () = report_tail(tails, reporter) => Err(SourceError::Ended),
        };
        if let Err(error) = &ended
            && error.is_of_the_slot()
        {
            // the same would happen again and again: the next term begins with a new slot
            ledger::forget_slot(client).await?;
        }
        ended
    }
}

/// Waits until the mark with this serial is recorded; `false` when nothing is recorded any more.
async fn reached(mut recorded: watch::Receiver<Option<Mark>>, serial: u64) -> bool {
    recorded.wait_for(|mark| mark.as_ref().is_some_and(|mark| mark.serial >= serial)).await.is_ok()
}

/// Reports the slot's position in the status.
async fn report_tail(mut tails: watch::Receiver<tail::Tail>, reporter: &Arc<Reporter>) {
    while tails.changed().await.is_ok() {
        let tail = *tails.borrow_and_update();
        reporter.tail(tail);
    }
    std::future::pending::<()>().await;
}
