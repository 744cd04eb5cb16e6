//! Copies the events that a service writes into a table of its own to `weft.outbox`, by a trigger on that table.
//!
//! The copy is made in the transaction of the service's insert, so relay, ledger and held events know one table, and both
//! modes keep their promises for every layout. The trigger comes after the insert: a row that `on conflict do nothing`
//! leaves out is no event.
//!
//! The trigger's function is generated from the table's columns, and replaced after a migration that adds one. The trigger
//! itself stays for as long as the layout is of the same table. A migration that puts another table in its place ends with
//! `weft.keep_outbox()`, in the same transaction, which gives the new one its trigger: otherwise the rows that a waiting
//! service inserts right after the commit would be missed.

mod mapping;

use postgres_protocol::escape::{escape_identifier, escape_literal};
use tokio_postgres::{Client, IsolationLevel, Transaction};

use self::mapping::{Column, Mapping};
use super::{
    locks::LOCK_TIMEOUT,
    schemas::{Schemas, Tenancy},
};
use crate::{
    contract::outbox::{ExistingRows, Outbox, OutboxTable},
    domain::names,
};

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

impl Trigger {
    fn create(self, table: &str) -> String {
        let Self { name, when, function } = self;
        format!("create trigger {name} {when} insert on {table} for each row execute function weft.{function}()")
    }
}

/// Of each function. Values of time are the same whoever inserts.
const SETTINGS: &str = "set search_path = pg_catalog, pg_temp set timezone = 'UTC'";

/// Makes the triggers of a new table of the outbox's name.
const KEEP: &str = "keep_outbox";

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

impl Found {
    fn is_one_of(&self, wanted: &[Trigger], relation: &Relation) -> bool {
        self.oid == relation.oid && wanted.iter().any(|trigger| trigger.name == self.name)
    }
}

/// Makes, replaces or drops triggers and functions, so that they are as `outbox` asks for. Where they are, it locks nothing.
pub async fn adapt(admin: &mut Client, outbox: &Outbox, schemas: &Schemas) -> Result<(), AdaptError> {
    let transaction = begin(admin).await?;
    match mapping::table_of(outbox) {
        None => {
            drop_triggers(&transaction, &found(&transaction, schemas).await?).await?;
            let drop = schemas.fill(&format!("drop function if exists weft.{KEEP}()"));
            transaction.batch_execute(&drop).await?;
        }
        Some(table) => {
            if !replace_where_followed(&transaction, outbox, table, schemas).await? {
                follow(&transaction, outbox, table, schemas).await?;
            }
        }
    }
    transaction.commit().await?;
    Ok(())
}

/// After one of several migrations: replaces the functions, where the table that `outbox` asks for is followed already and
/// fits. A later migration may make it fit.
pub async fn adapt_between(
    admin: &mut Client,
    outbox: &Outbox,
    schemas: &Schemas,
) -> Result<(), tokio_postgres::Error> {
    let Some(table) = mapping::table_of(outbox) else { return Ok(()) };
    let transaction = begin(admin).await?;
    match replace_where_followed(&transaction, outbox, table, schemas).await {
        Ok(_) => transaction.commit().await,
        Err(AdaptError::Unfit(_)) => Ok(()),
        Err(AdaptError::Query(error)) => Err(error),
    }
}

async fn begin(admin: &mut Client) -> Result<Transaction<'_>, tokio_postgres::Error> {
    let transaction = admin.build_transaction().isolation_level(IsolationLevel::ReadCommitted).start().await?;
    transaction.batch_execute(&format!("set local lock_timeout = '{LOCK_TIMEOUT}'")).await?;
    Ok(transaction)
}

fn triggers_of(outbox: &Outbox) -> &'static [Trigger] {
    if matches!(outbox, Outbox::Eventuate { .. }) { &[MARK, COPY] } else { &[COPY] }
}

/// False where the triggers are not the ones that are wanted.
async fn replace_where_followed(
    transaction: &Transaction<'_>,
    outbox: &Outbox,
    table: &OutboxTable,
    schemas: &Schemas,
) -> Result<bool, AdaptError> {
    let relation = relation(transaction, outbox, table, schemas).await?;
    let (there, wanted) = (found(transaction, schemas).await?, triggers_of(outbox));
    let followed = there.len() == wanted.len() && there.iter().all(|found| found.is_one_of(wanted, &relation));
    if followed {
        replace_functions(transaction, outbox, table, &mapping(outbox, table, &relation)?, schemas).await?;
    }
    Ok(followed)
}

/// Makes the table's triggers, and drops those of another one.
async fn follow(
    transaction: &Transaction<'_>,
    outbox: &Outbox,
    table: &OutboxTable,
    schemas: &Schemas,
) -> Result<(), AdaptError> {
    let wanted = triggers_of(outbox);
    let quoted = mapping::quoted(table);
    // keeps writers out until the end, so that each row is either there now or meets the trigger
    transaction.batch_execute(&format!("lock table {quoted} in share row exclusive mode")).await?;
    let relation = relation(transaction, outbox, table, schemas).await?;
    let mapping = mapping(outbox, table, &relation)?;
    replace_functions(transaction, outbox, table, &mapping, schemas).await?;
    let there = found(transaction, schemas).await?.into_iter();
    let (stay, go): (Vec<_>, Vec<_>) = there.partition(|found| found.is_one_of(wanted, &relation));
    drop_triggers(transaction, &go).await?;
    for trigger in wanted.iter().filter(|trigger| !stay.iter().any(|found| found.name == trigger.name)) {
        transaction.batch_execute(&schemas.fill(&trigger.create(&quoted))).await?;
        tracing::info!(table = quoted, trigger = trigger.name, "trigger made");
    }
    let is_new = !stay.iter().any(|found| found.name == COPY.name);
    if is_new && table.existing == ExistingRows::Publish {
        publish_existing(transaction, &mapping, &relation, schemas).await?;
    }
    Ok(())
}

async fn found(transaction: &Transaction<'_>, schemas: &Schemas) -> Result<Vec<Found>, tokio_postgres::Error> {
    let functions: Vec<&str> = [COPY, MARK].iter().map(|trigger| trigger.function).collect();
    let rows = transaction.query(&schemas.fill(TRIGGERS), &[&functions]).await?;
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

async fn relation(
    transaction: &Transaction<'_>,
    outbox: &Outbox,
    table: &OutboxTable,
    schemas: &Schemas,
) -> Result<Relation, AdaptError> {
    let unfit = |problem: String| AdaptError::Unfit(OutboxError::new(outbox, table, vec![problem]));
    if schemas.tenancy == Tenancy::Shared && table.schema != schemas.own {
        return Err(unfit(format!("it is not in the schema {} of this service", schemas.own)));
    }
    if table.schema == names::SCHEMA {
        return Err(unfit("it is Weft's own, which a relay of the layout Weft reads".to_owned()));
    }
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

async fn replace_functions(
    transaction: &Transaction<'_>,
    outbox: &Outbox,
    table: &OutboxTable,
    mapping: &Mapping,
    schemas: &Schemas,
) -> Result<(), tokio_postgres::Error> {
    let keep = keep_source(table, triggers_of(outbox), schemas);
    let copy = schemas.fill(&mapping.function_source());
    let functions = [(COPY.function, "trigger", copy), (KEEP, "void", keep)];
    for (name, returns, source) in functions {
        let there = transaction.query_opt(&schemas.fill(SOURCE), &[&name]).await?;
        if there.map(|row| row.try_get::<_, String>(0)).transpose()?.is_some_and(|there| there == source) {
            continue;
        }
        // the first one executes as whoever inserts: see `publish_existing`
        let (weft, source) = (&schemas.weft, escape_literal(&source));
        let create = format!(
            "create or replace function {weft}.{name}() returns {returns} language plpgsql {SETTINGS} as {source};
             revoke execute on function {weft}.{name}() from public"
        );
        transaction.batch_execute(&create).await?;
        tracing::info!(function = name, "function replaced");
    }
    Ok(())
}

fn keep_source(table: &OutboxTable, wanted: &[Trigger], schemas: &Schemas) -> String {
    let quoted = mapping::quoted(table);
    let create: Vec<_> = wanted.iter().map(|trigger| schemas.fill(&trigger.create(&quoted))).collect();
    format!(
        "
begin
    if exists (
        select from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
         where n.nspname = {} and c.relname = {} and c.relkind in ('r', 'p')
           and not exists (select from pg_trigger as t where t.tgrelid = c.oid and t.tgname = '{}')
    ) then
        {};
    end if;
end
",
        escape_literal(&table.schema),
        escape_literal(&table.name),
        COPY.name,
        create.join(";\n        ")
    )
}

/// Publishes the rows that are there, as the table's owner: even to read a table can execute the team's code (casts, functions
/// in the predicates of indexes), which must not run as the superuser. In a `security definer` function the role cannot be
/// changed back.
async fn publish_existing(
    transaction: &Transaction<'_>,
    mapping: &Mapping,
    relation: &Relation,
    schemas: &Schemas,
) -> Result<(), tokio_postgres::Error> {
    let weft = &schemas.weft;
    let statement = format!(
        "create function {weft}.publish_existing() returns void language sql security definer {SETTINGS} as {};
         alter function {weft}.publish_existing() owner to {};
         select {weft}.publish_existing();
         drop function {weft}.publish_existing()",
        escape_literal(&schemas.fill(&mapping.publish_existing(relation.partitioned))),
        escape_identifier(&relation.owner)
    );
    transaction.batch_execute(&statement).await?;
    tracing::info!("rows that were there are published");
    Ok(())
}
