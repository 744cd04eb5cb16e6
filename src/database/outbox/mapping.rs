//! Which expression over a row of the team's table gives which column of `weft.outbox`. It is the same in the trigger and for
//! rows that were there before it.

use postgres_protocol::escape::{escape_identifier, escape_literal};

use crate::contract::outbox::{ColumnOrValue, Outbox, OutboxColumns, OutboxTable};

const BYTEA: u32 = 17;
const INT8: u32 = 20;
const JSON: u32 = 114;
const JSONB: u32 = 3802;
const DATE: u32 = 1082;
const TIMESTAMP: u32 = 1114;
const TIMESTAMPTZ: u32 = 1184;
const UUID: u32 = 2950;

/// Years 1 to 9999, in milliseconds since 1970.
const FIRST_TIME: i64 = -62_135_596_800_000;
const LAST_TIME: i64 = 253_402_300_799_999;

/// A function has at most 100 arguments.
const HEADERS_PER_CALL: usize = 50;

/// A column of the team's table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    pub name: String,
    /// Its type, as SQL says it.
    pub shown: String,
    /// Its type, or what that domain is made of.
    pub type_oid: u32,
    /// `pg_type.typcategory`.
    pub category: char,
}

/// What a column must be able to hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    Name,
    Payload,
    Headers,
    Text,
    Time,
    Number,
}

impl Need {
    fn is_met_by(self, column: &Column) -> bool {
        let Column { type_oid, category, .. } = column;
        match self {
            Self::Name => matches!(category, 'S' | 'N' | 'E') || *type_oid == UUID,
            Self::Payload => *category == 'S' || [BYTEA, JSON, JSONB].contains(type_oid),
            Self::Headers => *category == 'S' || [JSON, JSONB].contains(type_oid),
            Self::Text => matches!(category, 'S' | 'E'),
            Self::Time => [INT8, TIMESTAMP, TIMESTAMPTZ].contains(type_oid),
            Self::Number => *category == 'N',
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Name => "text, uuid, a number or an enum",
            Self::Payload => "jsonb, json, text or bytea",
            Self::Headers => "jsonb, json or text",
            Self::Text => "text or an enum",
            Self::Time => "timestamptz, timestamp or bigint (milliseconds since 1970)",
            Self::Number => "a number",
        }
    }
}

impl Column {
    fn reference(&self) -> String {
        format!("new.{}", escape_identifier(&self.name))
    }

    /// An expression of the value as text, or null.
    fn text(&self) -> String {
        format!("{}::text", self.reference())
    }

    /// An expression of the value as a header, or null. Times are ISO 8601, and `true` is `true`.
    fn header(&self) -> String {
        if [DATE, TIMESTAMP, TIMESTAMPTZ].contains(&self.type_oid) { self.reference() } else { self.text() }
    }

    /// An expression of a point in time, or null.
    fn time(&self) -> String {
        let value = self.reference();
        match self.type_oid {
            // what is out of range (nanoseconds, for example) must not make the service's insert fail
            INT8 => format!(
                "case when {value} between {FIRST_TIME} and {LAST_TIME} then to_timestamp({value} / 1000.0) end"
            ),
            TIMESTAMP => format!("({value} at time zone 'UTC')"),
            _ => value,
        }
    }
}

pub fn layout(outbox: &Outbox) -> &'static str {
    match outbox {
        Outbox::Weft => "Weft",
        Outbox::Debezium { .. } => "Debezium",
        Outbox::Eventuate { .. } => "Eventuate",
        Outbox::Custom { .. } => "Custom",
    }
}

/// The team's table, if it is one.
pub fn table_of(outbox: &Outbox) -> Option<&OutboxTable> {
    match outbox {
        Outbox::Weft => None,
        Outbox::Debezium { table } | Outbox::Eventuate { table } | Outbox::Custom { table, .. } => Some(table),
    }
}

pub fn quoted_name(schema: &str, name: &str) -> String {
    format!("{}.{}", escape_identifier(schema), escape_identifier(name))
}

pub fn quoted(table: &OutboxTable) -> String {
    quoted_name(&table.schema, &table.name)
}

/// The columns that a layout needs, for a sentence.
pub fn needs(outbox: &Outbox) -> String {
    let needs = needed(outbox);
    let needs: Vec<_> = needs.iter().map(|(name, need)| format!("the column {name} ({})", need.describe())).collect();
    needs.join(", ")
}

fn debezium() -> OutboxColumns {
    let column = |name: &str| name.to_owned();
    OutboxColumns {
        id: column("id"),
        aggregate_type: ColumnOrValue::Column(column("aggregatetype")),
        aggregate_id: column("aggregateid"),
        kind: ColumnOrValue::Column(column("type")),
        payload: column("payload"),
        headers: None,
        content_type: None,
        created_at: None,
    }
}

fn needed(outbox: &Outbox) -> Vec<(String, Need)> {
    let of_columns = |columns: &OutboxColumns| {
        let OutboxColumns { id, aggregate_type, aggregate_id, kind, payload, headers, content_type, created_at } =
            columns.clone();
        let column = |part| match part {
            ColumnOrValue::Column(name) => Some(name),
            ColumnOrValue::Value { .. } => None,
        };
        let each = [
            (Some(id), Need::Name),
            (column(aggregate_type), Need::Name),
            (Some(aggregate_id), Need::Name),
            (column(kind), Need::Name),
            (Some(payload), Need::Payload),
            (headers, Need::Headers),
            (content_type, Need::Text),
            (created_at, Need::Time),
        ];
        each.into_iter().filter_map(|(name, need)| Some((name?, need))).collect()
    };
    match outbox {
        Outbox::Weft => Vec::new(),
        Outbox::Debezium { .. } => of_columns(&debezium()),
        Outbox::Custom { columns, .. } => of_columns(columns),
        Outbox::Eventuate { .. } => [
            ("id", Need::Name),
            ("destination", Need::Name),
            ("headers", Need::Headers),
            ("payload", Need::Payload),
            ("published", Need::Number),
        ]
        .map(|(name, need)| (name.to_owned(), need))
        .into(),
    }
}

/// How a row of the team's table becomes one of `weft.outbox`.
#[derive(Debug)]
pub struct Mapping {
    table: String,
    /// Columns of `weft.outbox`, each with its expression over the row `new` (and `parsed`).
    columns: Vec<(&'static str, String)>,
    /// What is computed once for a row: a subquery.
    parsed: Option<String>,
    /// Order of the rows that are there, and which of them are not marked as published.
    order: Vec<String>,
    condition: Option<&'static str>,
}

impl Mapping {
    /// An error lists all that the table lacks.
    pub fn of(outbox: &Outbox, columns: &[Column]) -> Result<Self, Vec<String>> {
        let find = |name: &str| columns.iter().find(|column| column.name == name);
        let problem = |(name, need): (String, Need)| match find(&name) {
            None => Some(format!("the column {name} is missing")),
            Some(column) if !need.is_met_by(column) => {
                Some(format!("the column {name} is {} and must be {}", column.shown, need.describe()))
            }
            Some(_) => None,
        };
        let problems: Vec<_> = needed(outbox).into_iter().filter_map(problem).collect();
        let Some(table) = table_of(outbox).filter(|_| problems.is_empty()) else { return Err(problems) };
        let debezium = debezium();
        let parts = match outbox {
            Outbox::Custom { columns, .. } => Some(columns.as_ref()),
            Outbox::Debezium { .. } => Some(&debezium),
            Outbox::Eventuate { .. } | Outbox::Weft => None,
        };
        let every_other_is_header = matches!(outbox, Outbox::Debezium { .. });
        let mapping = match parts {
            Some(parts) => Self::of_parts(table, parts, every_other_is_header, columns),
            None => Self::of_message(table, columns),
        };
        // every column that is needed was found above
        mapping.ok_or_else(|| vec!["a column is missing".to_owned()])
    }

    fn of_parts(table: &OutboxTable, parts: &OutboxColumns, others: bool, columns: &[Column]) -> Option<Self> {
        let find = |name: &str| columns.iter().find(|column| column.name == name);
        let optional = |name: &Option<String>| name.as_deref().and_then(find);
        let part = |part: &ColumnOrValue| match part {
            ColumnOrValue::Column(name) => find(name).map(Column::text),
            ColumnOrValue::Value { value } => Some(escape_literal(value)),
        };
        let (id, payload, time) = (find(&parts.id)?, find(&parts.payload)?, optional(&parts.created_at));
        let mut into = vec![
            ("id", format!("coalesce({}, gen_random_uuid()::text)", id.text())),
            ("aggregate_type", or_empty(&[part(&parts.aggregate_type)?])),
            ("aggregate_id", or_empty(&[find(&parts.aggregate_id)?.text()])),
            ("type", or_empty(&[part(&parts.kind)?])),
        ];
        into.extend(payload_and_type(payload, optional(&parts.content_type), table));
        if let Some(headers) = optional(&parts.headers) {
            into.push(("headers", parsed(headers)));
        } else if others {
            let is_other = |column: &&Column| {
                !needed(&Outbox::Debezium { table: table.clone() }).iter().any(|(name, _)| *name == column.name)
            };
            into.extend(headers_of(columns.iter().filter(is_other)).map(|headers| ("headers", headers)));
        }
        into.extend(time.map(|time| ("created_at", format!("coalesce({}, now())", time.time()))));
        let order = time.map(Column::reference).into_iter().chain((id.category == 'N').then(|| id.reference()));
        Some(Self { table: quoted(table), columns: into, parsed: None, order: order.collect(), condition: None })
    }

    /// Eventuate Tram's `message`. What is about the aggregate is in its headers, under the names of `EventMessageHeaders`
    /// and `Message` (eventuate-tram-core).
    fn of_message(table: &OutboxTable, columns: &[Column]) -> Option<Self> {
        let find = |name: &str| columns.iter().find(|column| column.name == name);
        let header = |name: &str| format!("parsed.headers ->> {}", escape_literal(name));
        let (id, destination) = (find("id")?, find("destination")?.text());
        let mut into = vec![
            ("id", format!("coalesce({}, {}, gen_random_uuid()::text)", id.text(), header("ID"))),
            ("aggregate_type", or_empty(&[header("event-aggregate-type"), destination.clone()])),
            ("aggregate_id", or_empty(&[header("event-aggregate-id"), header("PARTITION_ID")])),
            ("type", or_empty(&[header("event-type"), destination])),
            ("headers", "parsed.headers".to_owned()),
        ];
        into.extend(payload_and_type(find("payload")?, None, table));
        let time = find("creation_time").filter(|time| Need::Time.is_met_by(time));
        into.extend(time.map(|time| ("created_at", format!("coalesce({}, now())", time.time()))));
        Some(Self {
            table: quoted(table),
            columns: into,
            // `offset 0`: the planner would otherwise parse for each column
            parsed: Some(format!("(select {} as headers offset 0) as parsed", parsed(find("headers")?))),
            order: time.map(Column::reference).into_iter().chain([id.reference()]).collect(),
            condition: Some("coalesce(new.published, 0) = 0"),
        })
    }

    fn select(&self) -> String {
        let names: Vec<_> = self.columns.iter().map(|(name, _)| *name).collect();
        let expressions: Vec<_> = self.columns.iter().map(|(_, expression)| expression.as_str()).collect();
        format!("insert into weft.outbox ({})\n    select {}", names.join(", "), expressions.join(",\n        "))
    }

    /// The body of the trigger's function.
    pub fn function_source(&self) -> String {
        let from = self.parsed.as_ref().map(|parsed| format!("\n    from {parsed}")).unwrap_or_default();
        format!("\nbegin\n    {}{from};\n    return null;\nend\n", self.select())
    }

    /// The statements that publish the rows that are in the table, oldest first as far as that can be known, and mark them in the
    /// table itself if the layout has that. What inherits from the table has no trigger, but for partitions.
    pub fn publish_existing(&self, partitioned: bool) -> String {
        let table = format!("{}{}", if partitioned { "" } else { "only " }, self.table);
        let parsed = self.parsed.as_ref().map(|parsed| format!(" cross join lateral {parsed}")).unwrap_or_default();
        let condition = self.condition.map(|condition| format!("\n    where {condition}")).unwrap_or_default();
        let order: Vec<_> = self.order.iter().map(String::as_str).chain(["new.tableoid", "new.ctid"]).collect();
        let mark = self.condition.map(|_| format!("update {table} as new set published = 1{condition};\n"));
        format!(
            "\n{}\n    from {table} as new{parsed}{condition}\n    order by {};\n{}",
            self.select(),
            order.join(", "),
            mark.unwrap_or_default()
        )
    }
}

fn or_empty(expressions: &[String]) -> String {
    format!("coalesce({}, '')", expressions.join(", "))
}

/// An expression of headers that are JSON in one way or the other.
fn parsed(headers: &Column) -> String {
    if headers.type_oid == JSONB {
        format!("coalesce({}, '{{}}')", headers.reference())
    } else {
        format!("weft.outbox_headers({})", headers.text())
    }
}

/// The columns `payload` or `body`, and `content_type`. A payload that is null is published without any byte.
fn payload_and_type(
    payload: &Column,
    content_type: Option<&Column>,
    table: &OutboxTable,
) -> Vec<(&'static str, String)> {
    let value = payload.reference();
    let (columns, default) = match payload.type_oid {
        JSONB => {
            (vec![("payload", value.clone()), ("body", format!("case when {value} is null then ''::bytea end"))], None)
        }
        BYTEA => (vec![("body", format!("coalesce({value}, '')"))], None),
        _ => {
            // byte for byte what the service has written
            let body = format!("convert_to(coalesce({}, ''), 'UTF8')", payload.text());
            let default = match payload.type_oid {
                JSON => "'application/json'".to_owned(),
                _ => format!("weft.outbox_content_type({})", payload.text()),
            };
            (vec![("body", body)], Some(default))
        }
    };
    let of_row = content_type.map(|column| format!("nullif({}, '')", column.text()));
    let default = table.content_type.as_deref().map(escape_literal).or(default);
    let content_type: Vec<_> = of_row.into_iter().chain(default).collect();
    let content_type =
        (!content_type.is_empty()).then(|| ("content_type", format!("coalesce({})", content_type.join(", "))));
    columns.into_iter().chain(content_type).collect()
}

/// An expression of the headers that these columns are; those that are null are left out.
fn headers_of<'a>(columns: impl Iterator<Item = &'a Column>) -> Option<String> {
    let pairs: Vec<_> =
        columns.map(|column| format!("{}, {}", escape_literal(&column.name), column.header())).collect();
    let objects = pairs.chunks(HEADERS_PER_CALL).map(|pairs| format!("jsonb_build_object({})", pairs.join(", ")));
    let objects: Vec<_> = objects.collect();
    (!objects.is_empty()).then(|| format!("jsonb_strip_nulls({})", objects.join(" || ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::outbox::ExistingRows;

    const TEXT: u32 = 25;

    fn table(schema: &str, name: &str) -> OutboxTable {
        OutboxTable {
            schema: schema.to_owned(),
            name: name.to_owned(),
            content_type: None,
            existing: ExistingRows::Publish,
        }
    }

    fn columns(columns: &[(&str, u32, char)]) -> Vec<Column> {
        let column = |&(name, type_oid, category): &(&str, u32, char)| Column {
            name: name.to_owned(),
            shown: "a type".to_owned(),
            type_oid,
            category,
        };
        columns.iter().map(column).collect()
    }

    fn of_debezium(others: &[(&str, u32, char)]) -> Mapping {
        let needed = [
            ("id", UUID, 'U'),
            ("aggregatetype", TEXT, 'S'),
            ("aggregateid", TEXT, 'S'),
            ("type", 16_385, 'E'),
            ("payload", JSONB, 'U'),
        ];
        let outbox = Outbox::Debezium { table: table("public", "outbox") };
        Mapping::of(&outbox, &columns(&[&needed, others].concat())).unwrap()
    }

    #[test]
    fn a_function_copies_each_row() {
        let mapping = of_debezium(&[("it's", TEXT, 'S'), ("at", TIMESTAMPTZ, 'D')]);
        insta::assert_snapshot!(mapping.function_source());
    }

    #[test]
    fn rows_that_are_there_are_read_with_the_same_expressions() {
        let names = ["id", "destination", "headers", "payload"].map(|name| (name, TEXT, 'S'));
        let columns = columns(&[&names[..], &[("published", 21, 'N'), ("creation_time", INT8, 'N')]].concat());
        let outbox = Outbox::Eventuate { table: table("even\"tuate", "message") };
        let mapping = Mapping::of(&outbox, &columns).unwrap();
        insta::assert_snapshot!(mapping.publish_existing(false));
    }

    #[test]
    fn any_number_of_columns_become_headers() {
        let names: Vec<String> = (0..120).map(|number| format!("header{number}")).collect();
        let others: Vec<_> = names.iter().map(|name| (name.as_str(), TEXT, 'S')).collect();
        let source = of_debezium(&others).function_source();
        assert_eq!((source.matches("jsonb_build_object(").count(), source.matches("'header").count()), (3, 120));
        assert!(!of_debezium(&[]).function_source().contains("headers"));
    }
}
