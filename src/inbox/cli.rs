//! `weft inbox dead list|show|retry|skip|purge`: commands for people, about the events that the service does not handle.
//!
//! They work in the service's database, as the inbox does: `kubectl exec deploy/orders-inbox -- weft inbox dead list`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use base64::{Engine, prelude::BASE64_STANDARD};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, value::RawValue};
use tokio_postgres::{Client, Row, types::ToSql};

use crate::{
    contract::{Contract, inbox::Inbox},
    dead_letters::{self, LIMIT, State, Which},
    output::{self, Format},
};

#[derive(Debug, clap::Args)]
pub(super) struct Common {
    /// The contract file, which says where the database is
    #[arg(long, env = "WEFT_CONFIG", default_value = super::CONFIG)]
    config: PathBuf,
    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
    /// Only events of this subscription
    #[arg(long)]
    subscription: Option<String>,
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum Command {
    /// List the events that the service does not handle, those that wait behind them, and the dead letters
    List {
        /// Only those that are Refused, Waiting or Dead
        #[arg(long, value_enum, ignore_case = true)]
        state: Option<State>,
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i64).range(1..=LIMIT))]
        limit: i64,
        #[command(flatten)]
        common: Common,
    },
    /// Show an event with its data
    Show {
        /// The event's id
        id: String,
        #[command(flatten)]
        common: Common,
    },
    /// Deliver dead letters again, behind the events of their aggregates that wait; deliver refused events now
    Retry {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        common: Common,
    },
    /// Move refused events to the dead letters, so that those behind them go on
    Skip {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        common: Common,
    },
    /// Delete dead letters
    Purge {
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        common: Common,
    },
}

/// An event that is not handled.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    id: String,
    state: String,
    subscription: String,
    #[serde(rename = "type")]
    kind: String,
    subject: String,
    attempts: i32,
    since: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<String>,
    /// CloudEvents attributes.
    #[serde(skip_serializing_if = "Option::is_none")]
    attributes: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Box<RawValue>>,
    /// Of data that is not JSON.
    #[serde(skip_serializing_if = "Option::is_none")]
    data_base64: Option<String>,
}

/// The events that [`Which`] and [`Common`] name: `$1` says whether all, `$2` are the ids, `$3` is the subscription.
const CONDITION: &str =
    "($1::bool or event -> 'attributes' ->> 'id' = any ($2::text[])) and ($3::text is null or subscription = $3)";

pub(super) async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::List { state, limit, common } => {
            let client = common.connect().await?;
            let events = common.listed(&client, state, None, limit).await?;
            common.print(&events, || table(&events))
        }
        Command::Show { id, common } => {
            let client = common.connect().await?;
            let mut events = common.listed(&client, None, Some(&id), LIMIT).await?;
            if events.is_empty() {
                bail!("event {id} is neither refused, nor does it wait behind one that is, nor is it a dead letter");
            }
            let event = events.swap_remove(0);
            common.print(&event, || show(&event))
        }
        Command::Retry { which, common } => {
            let dead = format!(
                "update inbox_held set died_at = null, attempts = 0, cause = null, retry_at = now(), place = default
                  where died_at is not null and {CONDITION}"
            );
            let refused = format!(
                "update inbox_held set retry_at = now() where died_at is null and retry_at is not null and {CONDITION}"
            );
            common.change(&which, &[&refused, &dead], ["is to be delivered again", "are to be delivered again"]).await
        }
        Command::Skip { which, common } => {
            let skip = format!(
                "update inbox_held set died_at = now(), retry_at = null where died_at is null and cause is not null and {CONDITION}"
            );
            common.change(&which, &[&skip], ["is a dead letter now", "are dead letters now"]).await
        }
        Command::Purge { which, common } => {
            let purge = format!("delete from inbox_held where died_at is not null and {CONDITION}");
            common.change(&which, &[&purge], ["is deleted", "are deleted"]).await
        }
    }
}

/// The first event of each key that waits has its turn, whatever was before it.
const TURNS: &str = "update inbox_held as h set retry_at = now()
      from (select distinct on (subscription, key) place, retry_at from inbox_held
             where died_at is null order by subscription, key, place) as first
     where h.place = first.place and first.retry_at is null";

impl Common {
    /// Changes the events of `which`; `is` and `are` say what became of them.
    async fn change(&self, which: &Which, statements: &[&str], [is, are]: [&str; 2]) -> anyhow::Result<()> {
        let client = self.connect().await?;
        let list = "weft inbox dead list";
        let changed = which.change(&client, statements, &[&self.subscription], Some(TURNS), list).await?;
        self.print(&changed, || changed.sentence(is, are))
    }

    async fn connect(&self) -> anyhow::Result<Client> {
        let contract = Inbox::load(&self.config)
            .context("--config: run it in the inbox's container, or give its contract file")?;
        dead_letters::connect(&contract.database, "weft inbox, a person").await
    }

    fn print(&self, answer: &impl Serialize, table: impl FnOnce() -> String) -> anyhow::Result<()> {
        output::print(self.output, answer, table)
    }

    async fn listed(
        &self,
        client: &Client,
        state: Option<State>,
        id: Option<&str>,
        limit: i64,
    ) -> anyhow::Result<Vec<Listed>> {
        // the data is read where one event is asked for: it may be large
        let statement = "select * from (
                select subscription, attempts, coalesce(died_at, held_at) as since, cause, event -> 'attributes' as attributes,
                       case when $2::text is not null then data end as data, place,
                       case when died_at is not null then 'Dead' when cause is null then 'Waiting' else 'Refused' end as state
                  from inbox_held
             ) as events
             where ($1::text is null or state = $1) and ($2::text is null or attributes ->> 'id' = $2)
               and ($3::text is null or subscription = $3)
             order by state = 'Dead', place limit $4";
        let state = state.map(State::as_str);
        let parameters: [&(dyn ToSql + Sync); 4] = [&state, &id, &self.subscription, &limit];
        let rows = client.query(statement, &parameters).await.context("reading the events")?;
        rows.iter().map(|row| listed(row, id.is_some())).collect::<Result<_, _>>().context("reading the events")
    }
}

fn listed(row: &Row, whole: bool) -> anyhow::Result<Listed> {
    let attributes: Value = row.try_get(4)?;
    let text = |name: &str| attributes.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    let bytes: Option<Vec<u8>> = row.try_get(5)?;
    let json = bytes.as_deref().and_then(|bytes| serde_json::from_slice::<Box<RawValue>>(bytes).ok());
    Ok(Listed {
        id: text("id"),
        kind: text("type"),
        subject: text("subject"),
        subscription: row.try_get(0)?,
        attempts: row.try_get(1)?,
        since: row.try_get(2)?,
        cause: row.try_get(3)?,
        state: row.try_get(7)?,
        data_base64: bytes.filter(|_| json.is_none()).map(|bytes| BASE64_STANDARD.encode(bytes)),
        data: json,
        attributes: whole.then_some(attributes),
    })
}

fn table(events: &[Listed]) -> String {
    if events.is_empty() {
        return "no event is refused, waits behind one that is, or is a dead letter\n".to_owned();
    }
    let head = ["ID", "STATE", "SUBSCRIPTION", "TYPE", "SUBJECT", "ATTEMPTS", "SINCE", "CAUSE"].map(str::to_owned);
    let rows = events.iter().map(|event| {
        [
            event.id.clone(),
            event.state.clone(),
            event.subscription.clone(),
            event.kind.clone(),
            event.subject.clone(),
            event.attempts.to_string(),
            format!("{:.0}", event.since),
            event.cause.clone().unwrap_or_default(),
        ]
    });
    output::columns(std::iter::once(head).chain(rows).collect())
}

fn show(event: &Listed) -> String {
    let Listed { id, state, subscription, attempts, since, cause, attributes, data, data_base64, .. } = event;
    let data = data.as_ref().map(|data| data.get()).or(data_base64.as_deref()).unwrap_or("-");
    let attributes = attributes.as_ref().map_or_else(String::new, Value::to_string);
    format!(
        "Event:        {id}\nSubscription: {subscription}\nState:        {state} since {since:.0}, {attempts} attempts\nCause:        {}\nAttributes:   {attributes}\nData:         {data}\n",
        cause.as_deref().unwrap_or("it waits behind another event of its aggregate"),
    )
}
