//! Who holds the lock that a set-up waits for.
//!
//! A statement that waits for a lock on a table is in front of everyone who comes later, readers too: a migration that
//! waits for one long query stops the whole service. So it waits for [`LOCK_TIMEOUT`], unless it says otherwise, is rolled
//! back, and is tried again a little later. When it gives up the server says only that it did; whoever held the lock must
//! be asked for before that.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tokio_postgres::Client;

/// How long a set-up waits for a lock (and the service may wait behind it); a migration may set its own.
pub const LOCK_TIMEOUT: &str = "5s";
/// How long it waits for other set-ups, of its database or of its server, which holds up nobody else.
pub const TURN_TIMEOUT: &str = "30s";
/// How long, in seconds, it waits whatever a migration says, as dumps say `set lock_timeout = 0`. Who waits for the end of another
/// transaction (`virtualxid`), as `create index concurrently` does, holds up nobody.
const LONGEST_WAIT: f64 = 45.0;
/// How often the server is asked what the set-up waits for; several times within [`LOCK_TIMEOUT`].
const INTERVAL: Duration = Duration::from_secs(1);
const QUERY_DEADLINE: Duration = Duration::from_secs(5);

const HOLDER: &str = "\
select format('process %s (role %s, %s), %s %s, holds %s', a.pid, coalesce(a.usename, 'none'),
              coalesce(quote_literal(nullif(a.application_name, '')), 'nameless'),
              case when a.xact_start is null then 'connected since' else 'whose transaction is open since' end,
              to_char(coalesce(a.xact_start, a.backend_start) at time zone 'UTC', 'HH24:MI:SS \"UTC\"'),
              coalesce('the table ' || l.relation::regclass, 'it')),
       clock_timestamp() - l.waitstart > make_interval(secs => $2) and l.locktype <> 'virtualxid'
  from pg_locks as l
 cross join lateral unnest(pg_blocking_pids(l.pid)) as blocking (pid)
  join pg_stat_activity as a on a.pid = blocking.pid
 where l.pid = $1 and not l.granted
 order by coalesce(a.xact_start, a.backend_start) limit 1";

/// How work under [`watched`] ended.
pub struct Watched<T> {
    /// `None`: it was given up, after a lock was waited for too long.
    pub ended: Option<T>,
    /// Who was last seen to hold a lock that it waited for.
    pub holder: Option<String>,
}

/// Does `work`, which the server's process `process` executes, and finds out who holds the locks that it waits for.
/// `connect` gives a connection to ask on, which is made only when `work` takes its time.
pub async fn watched<T, E>(
    process: i32,
    connect: impl AsyncFn() -> Result<Client, E>,
    work: impl Future<Output = T>,
) -> Watched<T> {
    let mut holder = None;
    let ended = tokio::select! {
        ended = work => Some(ended),
        () = watch(process, connect, &mut holder) => None,
    };
    Watched { ended, holder }
}

/// Ends when a lock was waited for too long.
async fn watch<E>(process: i32, connect: impl AsyncFn() -> Result<Client, E>, holder: &mut Option<String>) {
    loop {
        sleep(INTERVAL).await;
        // the work goes on also when nobody can be asked about it
        let Ok(Ok(client)) = timeout(QUERY_DEADLINE, connect()).await else { continue };
        while let Ok(Ok(row)) = timeout(QUERY_DEADLINE, client.query_opt(HOLDER, &[&process, &LONGEST_WAIT])).await {
            if let Some(row) = row {
                *holder = row.try_get(0).ok();
                if row.try_get(1).ok().flatten().unwrap_or(false) {
                    return;
                }
            }
            sleep(INTERVAL).await;
        }
    }
}
