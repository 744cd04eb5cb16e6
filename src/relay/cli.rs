//! `weft relay list|show|retry|skip|purge`: commands for people, about the events that the broker refuses.
//!
//! They work in the service's database, as the relay does: `kubectl exec deploy/orders -c weft-relay -- weft relay list`.

use std::path::PathBuf;

use anyhow::{Context, bail};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::value::RawValue;
use tokio_postgres::{Client, types::ToSql};

use crate::{
    contract::{Contract, relay::Relay},
    dead_letters::{self, Changed, LIMIT, State, Which},
    output::{self, Format},
    relay::source::postgres::dead::LETTERS,
};

#[derive(Debug, clap::Args)]
pub struct Common {
    /// The contract file, which says where the database is
    #[arg(long, env = "WEFT_CONFIG", default_value = super::CONFIG)]
    config: PathBuf,
    /// Form of the answer
    #[arg(short, long, value_enum, default_value_t)]
    output: Format,
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// List the events that the broker refuses, those that wait behind them, and the dead letters
    List {
        /// Only those that are Refused, Waiting or Dead
        #[arg(long, value_enum, ignore_case = true)]
        state: Option<State>,
        #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(i64).range(1..=LIMIT))]
        limit: i64,
        #[command(flatten)]
        common: Common,
    },
    /// Show an event with its payload
    Show {
        /// The event's id
        id: String,
        #[command(flatten)]
        common: Common,
    },
    /// Publish dead letters again, as new events of their aggregates with the same ids; try refused events now
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
    /// Publish again what was published and is kept (`spec.retention.after`), as new events with the same ids: consumers that
    /// know these ids drop them
    Replay {
        #[command(flatten)]
        what: Published,
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

/// What is published again.
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("chosen").required(true)))]
pub struct Published {
    /// Ids of events
    #[arg(group = "chosen")]
    ids: Vec<String>,
    /// Those that were published at this time or later: 2026-11-27T10:00:00Z
    #[arg(long, group = "chosen")]
    from: Option<Timestamp>,
    /// Only those that were published before this time
    #[arg(long, requires = "from")]
    to: Option<Timestamp>,
    /// Only those of this type
    #[arg(long = "type")]
    kind: Option<String>,
    /// Only say how many there are
    #[arg(long)]
    dry_run: bool,
}

/// An event that is not published.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed {
    id: String,
    state: String,
    aggregate_type: String,
    aggregate_id: String,
    #[serde(rename = "type")]
    kind: String,
    attempts: i32,
    since: Timestamp,
    #[serde(skip_serializing_if = "Option::is_none")]
    cause: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    headers: Option<Box<RawValue>>,
    /// Where it is not application/json.
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<Box<RawValue>>,
}

/// What becomes of one event, and of several.
const AGAIN: [&str; 2] = ["is to be published again", "are to be published again"];
/// What an event consists of.
const WRITTEN: &str =
    "id, aggregate_type, aggregate_id, type, payload, body, content_type, headers, context, created_at";
/// A payload that is no JSON is shown in hexadecimal digits.
/// Headers and payload are read where one event is asked for: they may be large.
const COLUMNS: &str = "o.id, o.aggregate_type, o.aggregate_id, o.type, \
    case when $2::text is not null then (coalesce(o.context, '{}') || o.headers)::text end as headers, \
    case when $2::text is not null then coalesce(o.payload, to_jsonb(encode(o.body, 'hex')))::text end as payload, \
    o.content_type";

pub(super) async fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::List { state, limit, common } => {
            let client = common.connect().await?;
            let events = listed(&client, state, None, limit).await?;
            common.print(&events, || table(&events))
        }
        Command::Show { id, common } => {
            let client = common.connect().await?;
            let mut events = listed(&client, None, Some(&id), LIMIT).await?;
            if events.is_empty() {
                bail!("event {id} is neither refused, nor does it wait behind one that is, nor is it a dead letter");
            }
            let event = events.swap_remove(0);
            common.print(&event, || show(&event))
        }
        Command::Retry { which, common } => {
            let dead = format!(
                "with again as (delete from relay_dead as d where {CONDITION} returning *)
                 insert into outbox ({WRITTEN}) select {WRITTEN} from again order by seq"
            );
            let refused = format!(
                "update relay_held as h set retry_at = now() from outbox as d
                  where d.seq = h.seq and h.retry_at is not null and {CONDITION}"
            );
            common.change(&which, &[&dead, &refused], AGAIN).await
        }
        Command::Skip { which, common } => {
            // the relay finds that the row is gone, and goes on with those behind it
            let skip = format!(
                "with due as (
                     select d.seq, h.attempts, h.cause from relay_held as h join outbox as d using (seq)
                      where h.cause is not null and {CONDITION} for update of d
                 ), {LETTERS}
                 select from letters"
            );
            common.change(&which, &[&skip], ["is a dead letter now", "are dead letters now"]).await
        }
        Command::Replay { what, common } => what.replay(&common.connect().await?, &common).await,
        Command::Purge { which, common } => {
            let purge = format!("delete from relay_dead as d where {CONDITION}");
            common.change(&which, &[&purge], ["is deleted", "are deleted"]).await
        }
    }
}

/// The events `d` that [`Which`] names: `$1` says whether all.
const CONDITION: &str = "($1::bool or d.id = any ($2::text[]))";

impl Common {
    /// Changes the events of `which`; `is` and `are` say what became of them.
    async fn change(&self, which: &Which, statements: &[&str], [is, are]: [&str; 2]) -> anyhow::Result<()> {
        let client = self.connect().await?;
        let changed = which.change(&client, statements, &[], None, "weft relay list").await?;
        self.print(&changed, || changed.sentence(is, are))
    }
}

impl Published {
    async fn replay(&self, client: &Client, common: &Common) -> anyhow::Result<()> {
        let Self { ids, from, to, kind, dry_run } = self;
        let chosen = "from relay_published
            where (id = any ($1::text[]) or published_at >= $2::timestamptz)
              and ($3::timestamptz is null or published_at < $3) and ($4::text is null or type = $4)";
        let statement = if *dry_run {
            format!("select count(*) {chosen}")
        } else {
            // of an event that was published more than once, the latest time
            format!(
                "with again as (
                     insert into outbox ({WRITTEN})
                     select {WRITTEN} from (select distinct on (id) * {chosen} order by id, seq desc) as events order by seq
                     returning seq
                 ) select count(*) from again"
            )
        };
        let parameters: [&(dyn ToSql + Sync); 4] = [ids, from, to, kind];
        let counted = client.query_one(&statement, &parameters).await.context("reading weft.relay_published")?;
        let events = counted.try_get::<_, i64>(0)?.unsigned_abs();
        let [is, are] = if *dry_run { ["would be published again"; 2] } else { AGAIN };
        let changed = Changed { events };
        common.print(&changed, || changed.sentence(is, are))
    }
}

impl Common {
    async fn connect(&self) -> anyhow::Result<Client> {
        let contract = Relay::load(&self.config)
            .context("--config: run it in the relay's container, or give its contract file")?;
        // a replay may be long; whoever waits for it can interrupt it
        dead_letters::connect(&contract.source, "weft relay, a person").await
    }

    fn print(&self, answer: &impl Serialize, table: impl FnOnce() -> String) -> anyhow::Result<()> {
        output::print(self.output, answer, table)
    }
}

async fn listed(client: &Client, state: Option<State>, id: Option<&str>, limit: i64) -> anyhow::Result<Vec<Listed>> {
    let statement = format!(
        "select * from (
             select {COLUMNS}, case when h.cause is null then 'Waiting' else 'Refused' end as state,
                    h.attempts, h.held_at as since, h.cause, h.place as place
               from relay_held as h join outbox as o using (seq)
             union all
             select {COLUMNS}, 'Dead', o.attempts, o.died_at, o.cause, o.seq from relay_dead as o
         ) as events
         where ($1::text is null or state = $1) and ($2::text is null or id = $2)
         order by state = 'Dead', place limit $3"
    );
    let state = state.map(State::as_str);
    let parameters: [&(dyn ToSql + Sync); 3] = [&state, &id, &limit];
    let rows = client.query(&statement, &parameters).await.context("reading the events")?;
    let read = |row: &tokio_postgres::Row| -> anyhow::Result<Listed> {
        let json = |index| -> anyhow::Result<Option<Box<RawValue>>> {
            let text: Option<String> = row.try_get(index)?;
            Ok(text.map(RawValue::from_string).transpose()?)
        };
        Ok(Listed {
            id: row.try_get(0)?,
            aggregate_type: row.try_get(1)?,
            aggregate_id: row.try_get(2)?,
            kind: row.try_get(3)?,
            headers: json(4)?,
            payload: json(5)?,
            content_type: row.try_get(6)?,
            state: row.try_get(7)?,
            attempts: row.try_get(8)?,
            since: row.try_get(9)?,
            cause: row.try_get(10)?,
        })
    };
    rows.iter().map(read).collect::<Result<_, _>>().context("reading the events")
}

fn table(events: &[Listed]) -> String {
    if events.is_empty() {
        return "no event is refused, waits behind one that is, or is a dead letter\n".to_owned();
    }
    let head = ["ID", "STATE", "AGGREGATE", "TYPE", "ATTEMPTS", "SINCE", "CAUSE"].map(str::to_owned);
    let rows = events.iter().map(|event| {
        [
            event.id.clone(),
            event.state.clone(),
            format!("{}/{}", event.aggregate_type, event.aggregate_id),
            event.kind.clone(),
            event.attempts.to_string(),
            format!("{:.0}", event.since),
            event.cause.clone().unwrap_or_default(),
        ]
    });
    output::columns(std::iter::once(head).chain(rows).collect())
}

fn show(event: &Listed) -> String {
    let Listed {
        id,
        state,
        aggregate_type,
        aggregate_id,
        kind,
        attempts,
        since,
        cause,
        headers,
        content_type,
        payload,
    } = event;
    let form = content_type.as_ref().map_or_else(String::new, |content_type| format!(" ({content_type})"));
    let json = |value: &Option<Box<RawValue>>| value.as_ref().map_or("-", |value| value.get()).to_owned();
    format!(
        "Event:     {id}\nAggregate: {aggregate_type}/{aggregate_id}\nType:      {kind}\nState:     {state} since {since:.0}, {attempts} attempts\nCause:     {}\nHeaders:   {}\nPayload:   {}{form}\n",
        cause.as_deref().unwrap_or("it waits behind another event of its aggregate"),
        json(headers),
        json(payload)
    )
}
