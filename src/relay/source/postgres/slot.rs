//! The replication slot: reading its state, creating it and dropping it.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;

use super::DEADLINE;
use crate::{
    postgres::{
        outbox::Outbox,
        replication::{Lsn, Replication, ReplicationError, WalStream},
    },
    relay::source::{SourceError, within},
};

/// The walsender of a former leader is terminated when it still uses the slot after this long. This process holds the
/// leader's lock, so no living leader can own that walsender.
const TERMINATE_AFTER: Duration = Duration::from_secs(5);
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// A row of `pg_replication_slots`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Slot {
    /// `false` when the WAL that it needs is removed, or when it is not a slot of this database and plugin.
    pub(crate) usable: bool,
    pub(crate) confirmed: Lsn,
    /// Bytes of WAL that the server keeps for the slot.
    pub(crate) lag_bytes: u64,
    /// Bytes that may still be written before the server removes WAL that the slot needs; `None` when the slot is not
    /// at risk.
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
    /// Reads the slot's state; `None` when there is no slot.
    pub(crate) async fn find(client: &Client, outbox: &Outbox) -> Result<Option<Self>, SourceError> {
        let action = SourceError::query("reading the replication slot's state");
        let row =
            within(DEADLINE, "reading the replication slot's state", client.query_opt(STATE, &[&outbox.slot])).await?;
        let Some(row) = row else { return Ok(None) };
        let usable = row.try_get::<_, Option<bool>>(0).map_err(&action)?.unwrap_or_default();
        let confirmed = row.try_get::<_, &str>(1).map_err(&action)?.parse()?;
        let lag: Option<i64> = row.try_get(2).map_err(&action)?;
        let left: Option<i64> = row.try_get(3).map_err(&action)?;
        let bytes = |value: i64| u64::try_from(value).unwrap_or_default();
        Ok(Some(Self { usable, confirmed, lag_bytes: lag.map(bytes).unwrap_or_default(), at_risk: left.map(bytes) }))
    }

    /// Drops the slot if it exists, after waiting until no process streams from it.
    pub(crate) async fn remove(client: &Client, outbox: &Outbox) -> Result<(), SourceError> {
        let drop = "select pg_drop_replication_slot(slot_name) from pg_replication_slots \
                    where slot_name = $1 and database = current_database()";
        let mut wait = Wait::start();
        loop {
            match timeout(DEADLINE, client.execute(drop, &[&outbox.slot])).await {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(error)) if error.code() == Some(&tokio_postgres::error::SqlState::OBJECT_IN_USE) => {
                    wait.for_slot(client, outbox).await?;
                }
                Ok(Err(source)) => return Err(SourceError::query("dropping the replication slot")(source)),
                Err(_elapsed) => return Err(SourceError::Timeout(DEADLINE.as_secs())),
            }
        }
    }

    /// Describes the transaction that blocks the creation of the slot, as far as a role without privileges can see
    /// other sessions.
    pub(crate) async fn blocker(client: &Client, process: i32) -> Result<String, SourceError> {
        let statement = "select a.pid, coalesce(a.usename, ''), coalesce(a.application_name, '') \
             from unnest(pg_blocking_pids($1)) as blocking (pid) join pg_stat_activity a using (pid) limit 1";
        let action = "finding the transaction that the replication slot waits for";
        let row = within(DEADLINE, action, client.query_opt(statement, &[&process])).await?;
        let Some(row) = row else {
            return Ok("find old ones in pg_stat_activity and pg_prepared_xacts".to_owned());
        };
        let failed = SourceError::query(action);
        let pid: i32 = row.try_get(0).map_err(&failed)?;
        let (role, application): (&str, &str) = (row.try_get(1).map_err(&failed)?, row.try_get(2).map_err(&failed)?);
        let called = if application.is_empty() { String::new() } else { format!(", {application:?}") };
        Ok(format!("it waits for process {pid} (role {role}{called}); `select pg_terminate_backend({pid})` ends it"))
    }

    /// Starts streaming from the slot as soon as no other process does.
    pub(crate) async fn stream(
        client: &Client,
        outbox: &Outbox,
        connect: impl AsyncFn() -> Result<Replication, ReplicationError>,
        start: Lsn,
    ) -> Result<WalStream, SourceError> {
        let mut wait = Wait::start();
        loop {
            match connect().await?.stream(&outbox.slot, &outbox.publication, start).await {
                Ok(stream) => return Ok(stream),
                Err(error) if error.is_slot_in_use() => wait.for_slot(client, outbox).await?,
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
    fn start() -> Self {
        Self { since: Instant::now(), next: RETRY.0 }
    }

    async fn for_slot(&mut self, client: &Client, outbox: &Outbox) -> Result<(), SourceError> {
        tracing::info!("waiting until the process that streams from the replication slot ends");
        if self.since.elapsed() > TERMINATE_AFTER {
            let end = "select pg_terminate_backend(active_pid) from pg_replication_slots \
                       where slot_name = $1 and active_pid is not null";
            let action = "terminating the former leader's walsender";
            within(DEADLINE, action, client.execute(end, &[&outbox.slot])).await?;
        }
        sleep(self.next).await;
        self.next = (self.next * 2).min(RETRY.1);
        Ok(())
    }
}
