//! A `pg_snapshot`: which transactions are visible.
//!
//! The polling source goes from snapshot to snapshot, not from number to number: a window consists of the rows that one
//! snapshot sees and the previous one does not. This is PgQ's algorithm (Skype, 2007; `pgq.get_batch_events`). A lower
//! id that commits late is in a later window, so it is not lost; a transaction that stays open is left out, so it
//! blocks nothing.

use std::{fmt, str::FromStr};

use tokio_postgres::Client;

use super::DEADLINE;
use crate::relay::source::{SourceError, within};

/// `XMIN:XMAX:XIP,…` as PostgreSQL writes it. Every id below `xmax` and not in `xip` is seen, if it committed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    xmin: u64,
    xmax: u64,
    /// Sorted.
    xip: Vec<u64>,
}

#[derive(Debug, thiserror::Error)]
#[error("not a pg_snapshot: {0:?}")]
pub struct SnapshotError(String);

impl Snapshot {
    /// The snapshot that sees no transaction.
    pub fn nothing() -> Self {
        Self { xmin: 1, xmax: 1, xip: Vec::new() }
    }

    /// Reads a snapshot that another connection has exported.
    pub(crate) async fn import(client: &Client, name: &str) -> Result<Self, SourceError> {
        let name = name.replace('\'', "''");
        let begin = format!("begin isolation level repeatable read read only; set transaction snapshot '{name}'");
        let query = async {
            client.batch_execute(&begin).await?;
            let row = client.query_one("select pg_current_snapshot()::text", &[]).await?;
            client.batch_execute("commit").await?;
            row.try_get::<_, String>(0)
        };
        let text = within(DEADLINE, "importing the slot's snapshot", query).await?;
        text.parse().map_err(|_| SourceError::Layout("a snapshot cannot be read"))
    }

    /// It sees none from here on.
    pub fn xmax(&self) -> u64 {
        self.xmax
    }

    /// The transactions below `xmax` that it does not see, in their order.
    pub fn running(&self) -> &[u64] {
        &self.xip
    }

    pub fn sees(&self, txid: u64) -> bool {
        txid < self.xmax && self.xip.binary_search(&txid).is_err()
    }

    /// A transaction that `other` sees and this one does not.
    pub fn lacks(&self, other: &Self) -> Option<u64> {
        // `xmax` follows the last transaction that has *ended*: one that runs may be beyond it
        let mut unseen = self.xip.iter().copied().chain(self.xmax..other.xmax);
        unseen.find(|&transaction| other.sees(transaction))
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:", self.xmin, self.xmax)?;
        for (index, id) in self.xip.iter().enumerate() {
            write!(f, "{}{id}", if index == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}

impl FromStr for Snapshot {
    type Err = SnapshotError;

    fn from_str(text: &str) -> Result<Self, SnapshotError> {
        let parse = || -> Option<Self> {
            let mut parts = text.splitn(3, ':');
            let xmin: u64 = parts.next()?.parse().ok()?;
            let xmax = parts.next()?.parse().ok()?;
            let ids = parts.next()?.split(',').filter(|id| !id.is_empty());
            let mut xip: Vec<u64> = ids.map(str::parse).collect::<Result<_, _>>().ok()?;
            // in a slot's exported snapshot `xmax` follows the last transaction that *committed*, and `xmin` is the oldest one
            // that runs: transactions that rolled back in between make it the greater one, which the server does not read again
            xip.retain(|id| *id < xmax);
            xip.sort_unstable();
            Some(Self { xmin: xip.first().map_or(xmin, |first| xmin.min(*first)).min(xmax), xmax, xip })
        };
        parse().ok_or_else(|| SnapshotError(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_read_as_it_is_written() {
        for text in ["1:1:", "10:20:10,14,15", "730:730:"] {
            assert_eq!(text.parse::<Snapshot>().unwrap().to_string(), text);
        }
        for text in ["", "1", "1:2", "a:b:", "1:5:x"] {
            assert!(text.parse::<Snapshot>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_slots_snapshot_is_written_as_the_server_reads_it() {
        for (exported, read) in [("801:800:", "800:800:"), ("803:800:801,802", "800:800:"), ("5:9:4,7", "4:9:4,7")] {
            assert_eq!(exported.parse::<Snapshot>().unwrap().to_string(), read);
        }
    }

    #[test]
    fn open_and_later_transactions_are_not_seen() {
        let snapshot: Snapshot = "10:20:10,14".parse().unwrap();
        let seen: Vec<u64> = (8..22).filter(|&id| snapshot.sees(id)).collect();
        assert_eq!(seen, [8, 9, 11, 12, 13, 15, 16, 17, 18, 19]);
        assert!(!Snapshot::nothing().sees(3));
    }

    #[test]
    fn what_another_snapshot_sees_is_lacking_whether_it_runs_below_or_beyond_the_last_that_ended() {
        let lacks = |now: &str, other: &str| now.parse::<Snapshot>().unwrap().lacks(&other.parse().unwrap());
        assert_eq!(lacks("733:736:733", "733:738:733,734,735"), Some(736));
        assert_eq!(lacks("733:736:733", "733:738:733,736"), Some(737));
        assert_eq!(lacks("733:738:733", "734:738:734"), Some(733));
        assert_eq!(lacks("733:738:733", "733:738:733,735"), None);
        assert_eq!(lacks("733:736:", "733:738:736,737"), None);
    }
}
