//! The replication slot: its state, and making it anew.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;

use super::{
    control::DEADLINE,
    report::{Report, reason},
    source::{SourceError, within},
};
use crate::{
    domain::names,
    postgres::replication::{CreatedSlot, Lsn, Replication, ReplicationError, WalStream},
};

/// A walsender that a dead leader left behind is ended after this long; we hold the lock, so it is nobody's.
const PATIENCE: Duration = Duration::from_secs(5);
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// Making a slot waits for transactions; after this long it is said for which, and again as often.
const PENDING: Duration = Duration::from_secs(5);
/// After this long it is begun anew, in case that the connection is dead.
const MAKE_DEADLINE: Duration = Duration::from_mins(10);

/// A row of `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// `false`: the WAL that it needs is gone, or it is not ours to read.
    pub(crate) usable: bool,
    pub(crate) confirmed: Lsn,
    /// WAL that the server holds back for the slot, in bytes.
    pub(crate) lag_bytes: u64,
    /// The server will remove WAL that the slot needs; bytes that are left until then.
    pub(crate) at_risk: Option<u64>,
}

const STATE: &str = "\
select plugin = 'pgoutput' and database = current_database() and restart_lsn is not null
         and wal_status is distinct from 'lost' as usable,
       coalesce(confirmed_flush_lsn, '0/0')::text as confirmed,
       greatest(pg_wal_lsn_diff(pg_current_wal_lsn(), confirmed_flush_lsn), 0)::bigint as lag,
       case when wal_status = 'unreserved' or safe_wal_size < keep.bytes / 4 then greatest(safe_wal_size, 0) end as left_over
  from pg_replication_slots,
       (select setting::bigint * 1024 * 1024 as bytes from pg_settings where name = 'max_slot_wal_keep_size') keep
 where slot_name = $1";

impl Slot {
    /// `None`: there is no slot.
    pub(crate) async fn look(client: &Client) -> Result<Option<Self>, SourceError> {
        let doing = SourceError::query("looking at the replication slot");
        let row = within(DEADLINE, "looking at the replication slot", client.query_opt(STATE, &[&names::SLOT])).await?;
        let Some(row) = row else { return Ok(None) };
        let usable = row.try_get::<_, Option<bool>>(0).map_err(&doing)?.unwrap_or_default();
        let confirmed = row.try_get::<_, &str>(1).map_err(&doing)?.parse()?;
        let lag: Option<i64> = row.try_get(2).map_err(&doing)?;
        let left: Option<i64> = row.try_get(3).map_err(&doing)?;
        let bytes = |value: i64| u64::try_from(value).unwrap_or_default();
        Ok(Some(Self { usable, confirmed, lag_bytes: lag.map(bytes).unwrap_or_default(), at_risk: left.map(bytes) }))
    }

    /// Removes the slot when it is there, waiting for who still streams from it.
    pub(crate) async fn remove(client: &Client) -> Result<(), SourceError> {
        let drop = "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
                    where slot_name = $1 and database = current_database()";
        let mut wait = Wait::begin();
        loop {
            match timeout(DEADLINE, client.execute(drop, &[&names::SLOT])).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) if error.code() == Some(&tokio_postgres::error::SqlState::OBJECT_IN_USE) => {
                    wait.for_slot(client).await?;
                }
                Ok(Err(source)) => return Err(SourceError::query("removing the replication slot")(source)),
                Err(_elapsed) => return Err(SourceError::Timeout(DEADLINE.as_secs())),
            }
        }
    }

    /// Makes the slot, which is not there. The server first waits for the end of every transaction that is older and has
    /// written something; nothing is published until then, so it is said.
    pub(crate) async fn make(
        client: &Client,
        replication: &mut Replication,
        report: &Report,
    ) -> Result<CreatedSlot, SourceError> {
        let process = replication.process();
        let begun = Instant::now();
        let mut making = std::pin::pin!(replication.create_slot(names::SLOT));
        let made = loop {
            match timeout(PENDING, &mut making).await {
                Ok(made) => break made?,
                Err(_elapsed) if begun.elapsed() > MAKE_DEADLINE => {
                    return Err(SourceError::SlotPending(Self::holdup(client, process).await?));
                }
                Err(_elapsed) => {
                    let message = SourceError::SlotPending(Self::holdup(client, process).await?).to_string();
                    report.problem(reason::SLOT_PENDING, message);
                }
            }
        };
        report.mended(reason::SLOT_PENDING);
        Ok(made)
    }

    /// Who keeps the server from making the slot, of all that a role without privileges may know of others.
    async fn holdup(client: &Client, process: i32) -> Result<String, SourceError> {
        let statement = "select a.pid, coalesce(a.usename, ''), coalesce(a.application_name, '') \
             from unnest(pg_blocking_pids($1)) as blocking (pid) join pg_stat_activity a using (pid) limit 1";
        let doing = "looking for the transaction that the replication slot waits for";
        let row = within(DEADLINE, doing, client.query_opt(statement, &[&process])).await?;
        let Some(row) = row else {
            return Ok("look for old ones in pg_stat_activity and pg_prepared_xacts".to_owned());
        };
        let failed = SourceError::query(doing);
        let pid: i32 = row.try_get(0).map_err(&failed)?;
        let (role, application): (&str, &str) = (row.try_get(1).map_err(&failed)?, row.try_get(2).map_err(&failed)?);
        let called = if application.is_empty() { String::new() } else { format!(", {application:?}") };
        Ok(format!("now for the one of process {pid} (role {role}{called}), which pg_terminate_backend({pid}) ends"))
    }

    /// Streams from the slot as soon as nobody else does.
    pub(crate) async fn stream(
        client: &Client,
        connect: impl AsyncFn() -> Result<Replication, ReplicationError>,
    ) -> Result<WalStream, SourceError> {
        let mut wait = Wait::begin();
        loop {
            match connect().await?.stream(names::SLOT, names::PUBLICATION).await {
                Ok(stream) => return Ok(stream),
                Err(error) if error.is_slot_in_use() => wait.for_slot(client).await?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

struct Wait {
    since: Instant,
    next: Duration,
}

impl Wait {
    fn begin() -> Self {
        Self { since: Instant::now(), next: RETRY.0 }
    }

    async fn for_slot(&mut self, client: &Client) -> Result<(), SourceError> {
        tracing::info!("another process still streams from the slot");
        if self.since.elapsed() > PATIENCE {
            let end = "select pg_terminate_backend(active_pid) from pg_replication_slots \
                       where slot_name = $1 and active_pid is not null";
            let doing = "ending the process that a former leader left at the slot";
            within(DEADLINE, doing, client.execute(end, &[&names::SLOT])).await?;
        }
        sleep(self.next).await;
        self.next = (self.next * 2).min(RETRY.1);
        Ok(())
    }
}
