//! The polling source: reads the rows between two snapshots, as often as rows come, and sleeps when none come.
//!
//! A transaction is polled as soon as it is visible. With `synchronous_commit = off` that is before it is durable, and
//! a crash of the server can then leave a published event whose transaction is lost. Log tailing does not have this
//! gap.
//!
//! # Sleep
//! A relay that sleeps is woken by `NOTIFY`, which the outbox's trigger sends only then: transactions that notify commit
//! one after the other. Where transactions can be prepared nothing notifies, since one that did could not be prepared.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};
use tokio_postgres::Client;

use super::{DEADLINE, windows::Windows};
use crate::{
    domain::names,
    postgres::session::Session,
    relay::source::{SourceError, within},
};

/// Shortest wait between two queries that found nothing; doubled each time.
const SHORTEST: Duration = Duration::from_millis(1);
/// The longest while awake, asleep, and asleep when nothing can notify.
const AWAKE: Duration = Duration::from_millis(16);
const ASLEEP: Duration = Duration::from_secs(6);
const UNNOTIFIED: Duration = Duration::from_millis(500);
/// Asleep when no row came for this long…
const TIRED: Duration = Duration::from_secs(1);
/// …and awake again when this many windows of rows came within that time.
const BUSY: u32 = 20;

/// Whether the relay asks to be notified.
pub(super) struct Sleep<'a> {
    client: &'a Client,
    notified: Arc<Notify>,
    notifies: bool,
    asleep: bool,
}

impl<'a> Sleep<'a> {
    pub(super) async fn new(session: &'a Session) -> Result<Self, SourceError> {
        let client = &session.client;
        let action = "listening for new rows";
        let listen = format!("listen {}", names::OUTBOX_CHANNEL);
        within(DEADLINE, action, client.batch_execute(&listen)).await?;
        let statement = "select current_setting('max_prepared_transactions') = '0'";
        let row = within(DEADLINE, action, client.query_one(statement, &[])).await?;
        let notifies = row.try_get(0).map_err(SourceError::query(action))?;
        never_wake(client).await?;
        Ok(Self { client, notified: session.notified.clone(), notifies, asleep: false })
    }

    async fn set(&mut self, asleep: bool) -> Result<(), SourceError> {
        if self.notifies && self.asleep != asleep {
            let statement = "update relay_wake set asleep = $1";
            within(DEADLINE, "writing weft.relay_wake", self.client.execute(statement, &[&asleep])).await?;
        }
        self.asleep = asleep;
        Ok(())
    }
}

/// Nothing notifies the relay.
pub(super) async fn never_wake(client: &Client) -> Result<(), SourceError> {
    let statement = "update relay_wake set asleep = false where asleep";
    within(DEADLINE, "writing weft.relay_wake", client.execute(statement, &[])).await?;
    Ok(())
}

/// Polls until an error.
pub(super) async fn poll(mut windows: Windows<'_>, mut sleep: Sleep<'_>) -> Result<(), SourceError> {
    let (mut wait, mut last_row) = (SHORTEST, Instant::now());
    let (mut since, mut busy) = (Instant::now(), 0);
    loop {
        if windows.next().await? {
            (wait, last_row) = (SHORTEST, Instant::now());
            if since.elapsed() > TIRED {
                (since, busy) = (Instant::now(), 0);
            }
            busy += 1;
            if sleep.asleep && busy > BUSY {
                sleep.set(false).await?;
            }
            continue;
        }
        if !sleep.asleep && last_row.elapsed() > TIRED {
            // a transaction that has not seen this does not notify: it is found by the queries, which come soon at first
            sleep.set(true).await?;
            (wait, busy) = (SHORTEST, 0);
            continue;
        }
        let longest = match (sleep.asleep, sleep.notifies) {
            (false, _) => AWAKE,
            (true, true) => ASLEEP,
            (true, false) => UNNOTIFIED,
        };
        // a notification that came during the query has stored a permit, which ends this wait at once
        wait = match timeout(wait, sleep.notified.notified()).await {
            Ok(()) => SHORTEST,
            Err(_elapsed) => (wait * 2).min(longest),
        };
    }
}
