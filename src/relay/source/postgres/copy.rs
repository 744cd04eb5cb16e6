//! A new slot for a log-tailing relay, and the rows from before it.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use tokio_util::task::AbortOnDropHandle;

use super::{DEADLINE, ledger, slot::Slot, snapshot::Snapshot, windows::Windows};
use crate::{
    contract::{problem::ProblemReason, relay::Relay},
    postgres::{
        outbox::Outbox,
        replication::{Lsn, Replication},
        session::Session,
    },
    relay::{
        problem::RelayProblem,
        reporter::Reporter,
        source::{SourceError, within},
    },
};

/// Waits between two windows while the slot is being made.
const WAIT: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));
/// The server makes a slot only after older transactions have ended; how often the transaction that it waits for is
/// reported.
const REPORT_PENDING: Duration = Duration::from_secs(5);
/// How often the publication is read while it cannot be used.
const READ_PUBLICATION: Duration = Duration::from_secs(2);
/// How often it is asked whether transactions are visible.
const VISIBLE: Duration = Duration::from_millis(20);

pub(super) struct Copy<'a> {
    pub(super) contract: &'a Relay,
    pub(super) application: &'a str,
    pub(super) outbox: &'a Outbox,
    pub(super) client: &'a Client,
    pub(super) reporter: &'a Reporter,
}

/// A slot that begins where the windows end.
pub(super) struct Copied {
    pub(super) replication: Replication,
    pub(super) consistent_point: Lsn,
    /// Transactions that it sees were sent already.
    pub(super) seen: Option<Snapshot>,
    pub(super) floor: Lsn,
    pub(super) serial: u64,
}

struct NewSlot {
    replication: Replication,
    consistent_point: Lsn,
    /// Sees every transaction that committed before the slot begins.
    snapshot: Snapshot,
}

impl NewSlot {
    /// Waits until all older transactions have ended.
    async fn make(mut replication: Replication, session: Session, slot: &str) -> Result<Self, SourceError> {
        let slot = replication.create_slot(slot).await?;
        let snapshot = Snapshot::import(&session.client, &slot.snapshot).await?;
        // what follows may take as long as the broker is unreachable or the relay is paused, and an exported snapshot
        // would keep the server from removing dead rows for all that time
        replication.release_snapshot().await?;
        Ok(Self { replication, consistent_point: slot.consistent_point, snapshot })
    }
}

impl Copy<'_> {
    /// Polls until the slot is made, then sends what is left from before it.
    pub(super) async fn run(&self, mut windows: Windows<'_>) -> Result<Copied, SourceError> {
        ledger::forget_slot(self.client).await?;
        Slot::remove(self.client, self.outbox).await?;
        self.wait_for_publication(&mut windows).await?;
        let NewSlot { replication, consistent_point, snapshot } = self.make_slot(&mut windows).await?;
        self.wait_until_visible(&windows, &snapshot).await?;
        tracing::info!(%consistent_point, "made the slot; publishing what is left from before it");
        windows.up_to(&snapshot, consistent_point).await?;
        let Windows { seen, floor, serial, .. } = windows;
        Ok(Copied { replication, consistent_point, seen, floor, serial })
    }

    async fn make_slot(&self, windows: &mut Windows<'_>) -> Result<NewSlot, SourceError> {
        let replication = Replication::connect(&self.contract.source, self.application).await?;
        let process = replication.process();
        let session = Session::connect(&self.contract.source, self.application).await?;
        let slot = self.outbox.slot.clone();
        let creating = async move { NewSlot::make(replication, session, &slot).await };
        let mut creating = AbortOnDropHandle::new(tokio::spawn(creating));
        let (mut wait, mut report_at) = (WAIT.0, Instant::now() + REPORT_PENDING);
        loop {
            // one window at least: what is left after the slot is made is read without the log's help
            wait = if windows.next().await? { WAIT.0 } else { (wait * 2).min(WAIT.1) };
            if let Ok(created) = timeout(wait, &mut creating).await {
                self.reporter.resolve(ProblemReason::SlotPending);
                return created.map_err(|_aborted| SourceError::Ended)?;
            }
            if Instant::now() >= report_at {
                report_at = Instant::now() + REPORT_PENDING;
                let blocker = Slot::blocker(self.client, process).await?;
                self.reporter.report(RelayProblem::SlotPending { blocker });
            }
        }
    }

    /// Polls until the publication has the outbox, and nothing else.
    async fn wait_for_publication(&self, windows: &mut Windows<'_>) -> Result<(), SourceError> {
        while let Some(tables) = self.publication().await? {
            let schema = self.outbox.schema.clone();
            self.reporter.report(RelayProblem::PublicationInvalid { schema, tables });
            let until = Instant::now() + READ_PUBLICATION;
            while Instant::now() < until {
                if !windows.next().await? {
                    sleep(WAIT.1).await;
                }
            }
        }
        self.reporter.resolve(ProblemReason::PublicationInvalid);
        Ok(())
    }

    /// The publication's tables, when they are not just the outbox.
    async fn publication(&self) -> Result<Option<String>, SourceError> {
        let action = "reading the publication";
        let statement = "select coalesce(string_agg(format('%I.%I', schemaname, tablename), ', ' order by 1), '')
              from pg_publication_tables where pubname = $1";
        let row = within(DEADLINE, action, self.client.query_one(statement, &[&self.outbox.publication])).await?;
        let tables: String = row.try_get(0).map_err(SourceError::query(action))?;
        Ok((tables != format!("{}.outbox", self.outbox.schema)).then_some(tables))
    }

    /// Waits until no transaction that the slot's snapshot sees is still running for others. One that committed before
    /// the slot begins, and waits for a synchronous standby, is in that snapshot, but not visible to a query, and the log
    /// does not have it.
    async fn wait_until_visible(&self, windows: &Windows<'_>, snapshot: &Snapshot) -> Result<(), SourceError> {
        let mut report_at = Instant::now() + REPORT_PENDING;
        loop {
            let (now, _) = windows.reader.now().await?;
            let Some(running) = now.lacks(snapshot) else {
                self.reporter.resolve(ProblemReason::SlotPending);
                return Ok(());
            };
            if Instant::now() >= report_at {
                report_at = Instant::now() + REPORT_PENDING;
                let blocker = format!("transaction {running} has committed and waits for a synchronous standby");
                self.reporter.report(RelayProblem::SlotPending { blocker });
            }
            sleep(VISIBLE).await;
        }
    }
}
