//! Copies the events that a service writes into a table of its own to `weft.outbox`, by a trigger on that table.
//!
//! The copy is made in the transaction of the service's insert, so relay, ledger and held events know one table, and both
//! modes keep their promises for every layout. The trigger comes after the insert: a row that `on conflict do nothing`
//! leaves out is no event.
//!
//! The trigger's function is generated from the table's columns, so a set-up after a migration that adds a column replaces
//! it. The trigger itself stays for as long as the layout is of the same table.

mod mapping;

use tokio_postgres::{Client, IsolationLevel, Transaction};

use self::mapping::{Column, Mapping};
use super::locks::LOCK_TIMEOUT;
use crate::contract::outbox::{ExistingRows, Outbox, OutboxTable};

/// The table is not as its layout needs it.
#[derive(Debug, thiserror::Error)]
#[error(
    "the outbox layout {layout} does not fit the table {table}: {}; change the table in a migration, or correct spec.outbox of the OutboxRelay",
    problems.join(", ")
)]
pub struct OutboxError {
    layout: &'static str,
    table: String,
    problems: Vec<String>,
}

#[derive(Debug)]
pub enum AdaptError {
    Unfit(OutboxError),
    Query(tokio_postgres::Error),
}

impl From<tokio_postgres::Error> for AdaptError {
    fn from(error: tokio_postgres::Error) -> Self {
        Self::Query(error)
    }
}

/// A trigger that a set-up makes on the team's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Trigger {
    name: &'static str,
    when: &'static str,
    function: &'static str,
}

const COPY: Trigger = Trigger { name: "weft_outbox", when: "after", function: "copy_to_outbox" };
/// Sets Eventuate's `published` before the row is written, which costs no update.
const MARK: Trigger = Trigger { name: "weft_outbox_published", when: "before", function: "mark_published" };

/// Triggers of tables that execute one of the functions above; not those that a partition has of its table.
const TRIGGERS: &str = "
    select t.tgname::text, t.tgrelid, n.nspname::text, c.relname::text
      from pg_trigger as t join pg_class as c on c.oid = t.tgrelid join pg_namespace as n on n.oid = c.relnamespace
     where t.tgparentid = 0
       and t.tgfoid in (select oid from pg_proc where pronamespace = 'weft'::regnamespace and proname = any ($1))";

/// A relation of this name, whether it is a table, and its owner.
const RELATION: &str = "
    select c.oid, c.relkind in ('r', 'p'), c.relkind = 'p', pg_get_userbyid(c.relowner)::text
      from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
     where n.nspname = $1 and c.relname = $2";

/// A relation's columns, with the types that their domains are made of.
const COLUMNS: &str = "
    with recursive resolved (number, name, shown, type) as (
        select a.attnum, a.attname::text, format_type(a.atttypid, null), a.atttypid
          from pg_attribute as a where a.attrelid = $1 and a.attnum > 0 and not a.attisdropped
        union all
        select r.number, r.name, r.shown, t.typbasetype
          from resolved as r join pg_type as t on t.oid = r.type where t.typtype = 'd'
    )
    select r.name, r.shown, r.type, t.typcategory::text
      from resolved as r join pg_type as t on t.oid = r.type where t.typtype <> 'd' order by r.number";

/// The function's source, if it is there.
const SOURCE: &str = "select prosrc from pg_proc where pronamespace = 'weft'::regnamespace and proname = $1";

/// A table of the team's as it is.
#[derive(Debug)]
struct Relation {
    oid: u32,
    partitioned: bool,
    owner: String,
    columns: Vec<Column>,
}

/// A trigger that is there.
#[derive(Debug)]
struct Found {
    name: String,
    oid: u32,
    /// Quoted.
    table: String,
}

/// Makes, replaces or drops triggers, so that they are as `outbox` asks for. Where they are, it locks nothing.
pub async fn adapt(admin: &mut Client, outbox: &Outbox) -> Result<(), AdaptError> {
    let transaction = admin.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await?;
    // values of time are the same whoever inserts
    let settings = format!("set local lock_timeout = '{LOCK_TIMEOUT}'; set local timezone = 'UTC'");
    transaction.batch_execute(&settings).await?;
    match mapping::table_of(outbox) {
        None => drop_triggers(&transaction, &found(&transaction).await?).await?,
        Some(table) => copy_from(&transaction, outbox, table).await?,
    }
    transaction.commit().await?;
    Ok(())
}

async fn copy_from(transaction: &Transaction<'_>, outbox: &Outbox, table: &OutboxTable) -> Result<(), AdaptError> {
    let wanted: &[Trigger] = if matches!(outbox, Outbox::Eventuate { .. }) { &[MARK, COPY] } else { &[COPY] };
    let relation = relation(transaction, outbox, table).await?;
    let there = found(transaction).await?;
    let is_wanted =
        |found: &Found| found.oid == relation.oid && wanted.iter().any(|trigger| trigger.name == found.name);
    if there.len() == wanted.len() && there.iter().all(is_wanted) {
        return replace_function(transaction, &mapping(outbox, table, &relation)?).await;
    }
    let quoted = mapping::quoted(table);
    // keeps writers out until the end, so that each row is either there now or meets the trigger
    transaction.batch_execute(&format!("lock table {quoted} in share row exclusive mode")).await?;
    let relation = self::relation(transaction, outbox, table).await?;
    let mapping = mapping(outbox, table, &relation)?;
    replace_function(transaction, &mapping).await?;
    let (stay, go): (Vec<_>, Vec<_>) = found(transaction)
        .await?
        .into_iter()
        .partition(|found| found.oid == relation.oid && wanted.iter().any(|trigger| trigger.name == found.name));
    drop_triggers(transaction, &go).await?;
    for Trigger { name, when, function } in wanted {
        if stay.iter().any(|found| found.name == *name) {
            continue;
        }
        let create =
            format!("create trigger {name} {when} insert on {quoted} for each row execute function weft.{function}()");
        transaction.batch_execute(&create).await?;
        tracing::info!(table = quoted, trigger = name, "trigger made");
    }
    let is_new = !stay.iter().any(|found| found.name == COPY.name);
    if is_new && table.existing == ExistingRows::Publish {
        publish_existing(transaction, &mapping, &relation).await?;
    }
    Ok(())
}

async fn found(transaction: &Transaction<'_>) -> Result<Vec<Found>, tokio_postgres::Error> {
    let functions: Vec<&str> = [COPY, MARK].iter().map(|trigger| trigger.function).collect();
    let rows = transaction.query(TRIGGERS, &[&functions]).await?;
    let found = |row: &tokio_postgres::Row| {
        let table = mapping::quoted_name(row.try_get(2)?, row.try_get(3)?);
        Ok(Found { name: row.try_get(0)?, oid: row.try_get(1)?, table })
    };
    rows.iter().map(found).collect()
}

async fn drop_triggers(transaction: &Transaction<'_>, triggers: &[Found]) -> Result<(), tokio_postgres::Error> {
    for Found { name, table, .. } in triggers {
        transaction.batch_execute(&format!("drop trigger {name} on {table}")).await?;
        tracing::info!(table, trigger = name, "trigger dropped");
    }
    Ok(())
}

async fn relation(transaction: &Transaction<'_>, outbox: &Outbox, table: &OutboxTable) -> Result<Relation, AdaptError> {
    let unfit = |problem: String| AdaptError::Unfit(OutboxError::new(outbox, table, vec![problem]));
    let row = transaction.query_opt(RELATION, &[&table.schema, &table.name]).await?;
    let row = row.ok_or_else(|| unfit(format!("it does not exist, and needs {}", mapping::needs(outbox))))?;
    if !row.try_get::<_, bool>(1)? {
        return Err(unfit("it is no table, so no trigger can follow its rows".to_owned()));
    }
    let oid = row.try_get(0)?;
    let columns = transaction.query(COLUMNS, &[&oid]).await?;
    let column = |row: &tokio_postgres::Row| {
        let category: &str = row.try_get(3)?;
        Ok(Column {
            name: row.try_get(0)?,
            shown: row.try_get(1)?,
            type_oid: row.try_get(2)?,
            category: category.chars().next().unwrap_or_default(),
        })
    };
    let columns = columns.iter().map(column).collect::<Result<_, tokio_postgres::Error>>()?;
    Ok(Relation { oid, partitioned: row.try_get(2)?, owner: row.try_get(3)?, columns })
}

fn mapping(outbox: &Outbox, table: &OutboxTable, relation: &Relation) -> Result<Mapping, AdaptError> {
    Mapping::of(outbox, &relation.columns)
        .map_err(|problems| AdaptError::Unfit(OutboxError::new(outbox, table, problems)))
}

impl OutboxError {
    fn new(outbox: &Outbox, table: &OutboxTable, problems: Vec<String>) -> Self {
        Self { layout: mapping::layout(outbox), table: format!("{}.{}", table.schema, table.name), problems }
    }
}

async fn replace_function(transaction: &Transaction<'_>, mapping: &Mapping) -> Result<(), AdaptError> {
    let source = mapping.function_source();
    let there = transaction.query_opt(SOURCE, &[&COPY.function]).await?;
    if there.map(|row| row.try_get::<_, String>(0)).transpose()?.is_some_and(|there| there == source) {
        return Ok(());
    }
    let function = COPY.function;
    let create = format!(
        "create or replace function weft.{function}() returns trigger language plpgsql \
             set search_path = pg_catalog, pg_temp set timezone = 'UTC' as {};
         revoke execute on function weft.{function}() from public",
        postgres_protocol::escape::escape_literal(&source)
    );
    transaction.batch_execute(&create).await?;
    tracing::info!("the outbox's function is up to date");
    Ok(())
}

/// Publishes the rows that are there. The table's own code (triggers, checks) is executed as its owner, never as the
/// superuser: in a `security definer` function the role cannot be changed back.
async fn publish_existing(
    transaction: &Transaction<'_>,
    mapping: &Mapping,
    relation: &Relation,
) -> Result<(), AdaptError> {
    let copied = transaction.execute(&mapping.copy_existing(relation.partitioned), &[]).await?;
    tracing::info!(rows = copied, "rows that were there are published");
    let Some(mark) = mapping.mark_existing() else { return Ok(()) };
    let statement = format!(
        "create function weft.mark_existing() returns void language sql security definer \
             set search_path = pg_catalog, pg_temp as {};
         alter function weft.mark_existing() owner to {};
         select weft.mark_existing();
         drop function weft.mark_existing()",
        postgres_protocol::escape::escape_literal(&mark),
        postgres_protocol::escape::escape_identifier(&relation.owner)
    );
    transaction.batch_execute(&statement).await?;
    Ok(())
}
