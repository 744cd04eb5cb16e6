//! What `weft relay` and `weft inbox dead` share: commands for people about events that are refused, wait behind one that is, or are
//! dead letters. They work in the service's database, as the program itself does.

use anyhow::{Context, bail};
use serde::Serialize;
use tokio_postgres::{Client, types::ToSql};

use crate::{contract::DatabaseLogin, postgres::login};

/// Most events that one command lists.
pub const LIMIT: i64 = 10_000;

/// Which events.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub struct Which {
    /// Ids of events
    ids: Vec<String>,
    /// All of them
    #[arg(long)]
    all: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum State {
    Refused,
    Waiting,
    Dead,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "Refused",
            Self::Waiting => "Waiting",
            Self::Dead => "Dead",
        }
    }
}

/// What a command has changed.
#[derive(Debug, Serialize)]
pub struct Changed {
    pub events: u64,
}

impl Changed {
    /// `is` follows one event, `are` any other number of them.
    pub fn sentence(&self, is: &str, are: &str) -> String {
        let events = self.events;
        if events == 1 { format!("1 event {is}\n") } else { format!("{events} events {are}\n") }
    }
}

/// A person's session: it does not wait for long behind whoever has locked a row.
pub async fn connect(login: &DatabaseLogin, application: &str) -> anyhow::Result<Client> {
    let mut prepared = login::prepare(login, application).await?;
    prepared.config.options(login::search_path(login));
    let (client, connection) = prepared.open().await?;
    tokio::spawn(connection);
    client.batch_execute("set lock_timeout = '10s'").await.context("preparing the session")?;
    Ok(client)
}

impl Which {
    /// Executes `statements`, and then `last`, in one transaction. Their `$1` says whether all events are meant, `$2` are the ids, and
    /// `more` follows. The rows that `statements` change are counted; `list` is the command that shows which events there are.
    pub async fn change(
        &self,
        client: &Client,
        statements: &[&str],
        more: &[&(dyn ToSql + Sync)],
        last: Option<&str>,
        list: &str,
    ) -> anyhow::Result<Changed> {
        const CHANGING: &str = "changing the events";
        let mut parameters: Vec<&(dyn ToSql + Sync)> = vec![&self.all, &self.ids];
        parameters.extend(more);
        client.batch_execute("begin").await.context("beginning a transaction")?;
        let mut events = 0;
        for statement in statements {
            events += client.execute(*statement, &parameters).await.context(CHANGING)?;
        }
        if let Some(last) = last {
            client.batch_execute(last).await.context(CHANGING)?;
        }
        client.batch_execute("commit").await.context("committing")?;
        if events == 0 && !self.all {
            bail!("there is no such event: `{list}` shows those that there are");
        }
        Ok(Changed { events })
    }
}
