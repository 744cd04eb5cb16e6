//! Who holds the lock that a set-up waits for.
//!
//! A statement that waits for a lock on a table is in front of everyone who comes later, readers too: a migration that
//! waits for one long query stops the whole service. So it waits for [`LOCK_TIMEOUT`] at most, is rolled back, and tries
//! again a little later. When it gives up the server says only that it did; who stood in its way must be asked before that.

use std::{convert::Infallible, time::Duration};

use tokio::time::{sleep, timeout};
use tokio_postgres::Client;

/// How long a set-up waits for a lock (and the service may wait behind it); a migration may set its own.
pub const LOCK_TIMEOUT: &str = "5s";
/// How often it is looked whether the set-up waits for a lock; several times within [`LOCK_TIMEOUT`].
const LOOK: Duration = Duration::from_secs(1);
const ANSWER: Duration = Duration::from_secs(5);

const HOLDER: &str = "\
select format('process %s (role %s, %s), whose transaction is open since %s, holds %s', a.pid, a.usename,
              coalesce(quote_literal(nullif(a.application_name, '')), 'nameless'),
              to_char(a.xact_start at time zone 'UTC', 'HH24:MI:SS \"UTC\"'),
              coalesce((select 'the table ' || l.relation::regclass from pg_locks as l
                         where l.pid = $1 and not l.granted and l.relation is not null limit 1), 'it'))
  from unnest(pg_blocking_pids($1)) as blocking (pid) join pg_stat_activity as a using (pid)
 where a.xact_start is not null
 order by a.xact_start limit 1";

/// Does `work`, which the server's process `process` executes, and tells who was last seen to hold a lock that it waited for.
/// `connect` gives a connection to look with, which is made only when `work` takes its time.
pub async fn watched<T, E>(
    process: i32,
    connect: impl AsyncFn() -> Result<Client, E>,
    work: impl Future<Output = T>,
) -> (T, Option<String>) {
    let mut holder = None;
    let done = tokio::select! {
        done = work => done,
        never = watch(process, connect, &mut holder) => match never {},
    };
    (done, holder)
}

async fn watch<E>(
    process: i32,
    connect: impl AsyncFn() -> Result<Client, E>,
    holder: &mut Option<String>,
) -> Infallible {
    loop {
        sleep(LOOK).await;
        // whoever cannot look leaves the work alone
        let Ok(Ok(client)) = timeout(ANSWER, connect()).await else { continue };
        while let Ok(Ok(row)) = timeout(ANSWER, client.query_opt(HOLDER, &[&process])).await {
            if let Some(found) = row.and_then(|row| row.try_get(0).ok()) {
                *holder = Some(found);
            }
            sleep(LOOK).await;
        }
    }
}
