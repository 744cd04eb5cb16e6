//! Builds an [`Event`] from a row of `weft.outbox`, as the WAL contains it or as a query returns it.

use bytes::{Buf, Bytes, BytesMut};
use tokio_postgres::{
    Row,
    types::{FromSql, Type},
};

use crate::{
    domain::event::{CONTENT_TYPE_BYTES, CONTENT_TYPE_JSON, Event, Position, Text},
    postgres::replication::{
        POSTGRES_EPOCH,
        pgoutput::{Columns, Relation, Value},
    },
    relay::source::SourceError,
};

/// Columns of the event with their type OIDs, in the order of [`SELECT_COLUMNS`].
const COLUMNS: [(&str, u32); 11] = [
    ("id", TEXT),
    ("aggregate_type", TEXT),
    ("aggregate_id", TEXT),
    ("type", TEXT),
    ("payload", JSONB),
    ("body", 17),
    ("content_type", TEXT),
    ("headers", JSONB),
    ("context", JSONB),
    ("created_at", 1184),
    ("seq", 20),
];
const TEXT: u32 = 25;
const JSONB: u32 = 3802;
/// First byte of a jsonb value's binary form; the text follows.
const JSONB_VERSION: u8 = 1;
pub(crate) const COLUMN_COUNT: usize = COLUMNS.len();
pub(crate) const SELECT_COLUMNS: &str =
    "id, aggregate_type, aggregate_id, type, payload, body, content_type, headers, context, created_at, seq";

/// Of each of [`COLUMNS`] the binary form, or null.
type Values<T> = [Option<T>; COLUMNS.len()];

/// Maps the table's columns to [`COLUMNS`].
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    /// For each column of the table its index in [`COLUMNS`].
    fields: Vec<Option<usize>>,
}

impl Layout {
    /// An error when the relation is not the outbox.
    pub(crate) fn of(relation: &Relation, schema: &str) -> Result<Self, SourceError> {
        if relation.schema != schema || relation.table != "outbox" {
            return Err(SourceError::NotTheOutbox { table: format!("{}.{}", relation.schema, relation.table) });
        }
        let field = |name: &str| COLUMNS.iter().position(|&(column, _)| column == name);
        let fields: Vec<Option<usize>> = relation.columns.iter().map(|column| field(&column.name)).collect();
        for (wanted, type_oid) in COLUMNS {
            match relation.columns.iter().find(|column| column.name == wanted) {
                None => return Err(SourceError::Layout("a column is missing")),
                Some(column) if column.type_oid != type_oid => {
                    return Err(SourceError::Layout("a column has another type"));
                }
                Some(_) => {}
            }
        }
        Ok(Self { fields })
    }

    /// The event of an inserted row, and its `seq`.
    pub(crate) fn event(&self, columns: Columns, position: Position) -> Result<(Event, i64), SourceError> {
        let mut values: Values<Bytes> = Default::default();
        for (value, field) in columns.zip(&self.fields) {
            let value = value?;
            let Some(target) = field.and_then(|field| values.get_mut(field)) else { continue };
            *target = match value {
                Value::Binary(bytes) => Some(bytes),
                Value::Text(_) => return Err(SourceError::Layout("a value is not in binary form")),
                Value::Null => None,
            };
        }
        event_of(owned(values.each_ref().map(Option::as_deref)), |_seq| position)
    }
}

/// Copies the values into one allocation, so that a waiting event does not keep the whole receive buffer alive.
fn owned(values: Values<&[u8]>) -> Values<Bytes> {
    let mut buffer = BytesMut::with_capacity(values.iter().flatten().map(|value| value.len()).sum());
    for value in values.iter().flatten() {
        buffer.extend_from_slice(value);
    }
    let mut buffer = buffer.freeze();
    values.map(|value| value.map(|value| buffer.split_to(value.len())))
}

/// The event of a row whose [`COLUMNS`] have these values, and its `seq`, of which `position` makes the event's.
fn event_of(values: Values<Bytes>, position: impl FnOnce(i64) -> Position) -> Result<(Event, i64), SourceError> {
    let [id, aggregate_type, aggregate_id, kind, payload, body, content_type, headers, context, created_at, seq] =
        values;
    let (payload, default_type) = match (payload, body) {
        (Some(payload), None) => (json(payload)?, CONTENT_TYPE_JSON),
        (None, Some(body)) => (body, CONTENT_TYPE_BYTES),
        _ => return Err(SourceError::Layout("a row has neither payload nor body, or both")),
    };
    let seq = number(present(seq)?)?;
    let event = Event {
        id: text(present(id)?)?,
        aggregate_type: text(present(aggregate_type)?)?,
        aggregate_id: text(present(aggregate_id)?)?,
        kind: text(present(kind)?)?,
        content_type: content_type.map_or(Ok(default_type.into()), text)?,
        payload,
        headers: json(present(headers)?)?,
        context: context.map_or(Ok(Bytes::new()), json)?,
        created_at: Some(number(present(created_at)?)?.saturating_add(POSTGRES_EPOCH)),
        position: position(seq),
    };
    Ok((event, seq))
}

fn present(value: Option<Bytes>) -> Result<Bytes, SourceError> {
    value.ok_or(SourceError::Layout("a value is null"))
}

fn number(mut bytes: Bytes) -> Result<i64, SourceError> {
    bytes.try_get_i64().map_err(|_| SourceError::Layout("a value is too short"))
}

fn text(bytes: Bytes) -> Result<Text, SourceError> {
    Text::new(bytes).ok_or(SourceError::Layout("a text is not UTF-8"))
}

fn json(mut bytes: Bytes) -> Result<Bytes, SourceError> {
    match bytes.try_get_u8() {
        Ok(JSONB_VERSION) => Ok(bytes),
        _ => Err(SourceError::Layout("a jsonb is of an unknown version")),
    }
}

/// A value's binary form, whatever its type.
struct Raw<'a>(&'a [u8]);

impl<'a> FromSql<'a> for Raw<'a> {
    fn from_sql(_: &Type, raw: &'a [u8]) -> Result<Self, Box<dyn std::error::Error + Sync + Send>> {
        Ok(Self(raw))
    }

    fn accepts(_: &Type) -> bool {
        true
    }
}

/// Whether there is a row, and not only the nulls of an outer join.
pub(crate) fn is_some(row: &Row) -> bool {
    row.try_get::<_, Option<Raw<'_>>>(0).is_ok_and(|id| id.is_some())
}

/// Builds the event from a row of [`SELECT_COLUMNS`] and returns it with the row's `seq`. `lsn` is the WAL position at
/// which the row was read.
pub(crate) fn event(row: &Row, lsn: u64) -> Result<(Event, i64), SourceError> {
    let mut raws: Values<&[u8]> = Default::default();
    for (index, raw) in raws.iter_mut().enumerate() {
        let value = row.try_get::<_, Option<Raw<'_>>>(index);
        *raw = value.map_err(SourceError::query("reading a row of the outbox"))?.map(|Raw(bytes)| bytes);
    }
    event_of(owned(raws), |seq| Position { lsn, index: seq.unsigned_abs() })
}

#[cfg(test)]
mod tests {
    use bytes::BufMut;

    use super::*;
    use crate::postgres::replication::pgoutput::{Column, Message};

    fn relation(columns: &[(&str, u32)]) -> Relation {
        let columns = columns.iter().map(|&(name, type_oid)| Column { name: name.to_owned(), type_oid }).collect();
        Relation { oid: 1, schema: "weft".to_owned(), table: "outbox".to_owned(), columns }
    }

    #[test]
    fn columns_may_stand_in_any_order_and_beside_others() {
        let mut columns = COLUMNS.to_vec();
        columns.reverse();
        columns.insert(3, ("tenant", 25));
        assert!(Layout::of(&relation(&columns), "weft").is_ok());
    }

    #[test]
    fn a_missing_column_or_another_type_is_said() {
        assert!(Layout::of(&relation(&COLUMNS[1..]), "weft").is_err());
        let mut columns = COLUMNS.to_vec();
        columns[4].1 = 17;
        assert!(Layout::of(&relation(&columns), "weft").is_err());
    }

    /// What the log says when a row with these values is inserted.
    fn insert(values: &Values<&[u8]>) -> Bytes {
        let mut message = BytesMut::from(&b"I\0\0\0\x01N\0\x0b"[..]);
        for value in values {
            let Some(value) = value else {
                message.put_u8(b'n');
                continue;
            };
            message.put_u8(b'b');
            message.put_u32(u32::try_from(value.len()).unwrap());
            message.put_slice(value);
        }
        message.freeze()
    }

    fn decoded(message: &Bytes) -> Result<Event, SourceError> {
        let layout = Layout::of(&relation(&COLUMNS), "weft").unwrap();
        let Message::Insert(insert) = Message::decode(message.clone()).unwrap() else { panic!("an insert") };
        layout.event(insert.columns, Position { lsn: 1, index: 0 }).map(|(event, _seq)| event)
    }

    #[test]
    fn an_event_keeps_no_receive_buffer_alive() {
        let chunk = insert(&row(Some(b"\x01{\"n\": 1}"), None, None));
        let event = decoded(&chunk).unwrap();
        assert_eq!((event.aggregate_id.as_str(), &event.payload[..]), ("42", &b"{\"n\": 1}"[..]));
        assert!(chunk.is_unique());
    }

    fn row<'a>(payload: Option<&'a [u8]>, body: Option<&'a [u8]>, content_type: Option<&'a [u8]>) -> Values<&'a [u8]> {
        let [id, aggregate_type, aggregate_id, kind] = [b"a b".as_slice(), b"order", b"42", b"Changed"].map(Some);
        let [headers, created_at, seq] = [b"\x01{}".as_slice(), &[0; 8], &[0; 8]].map(Some);
        let context = None;
        [id, aggregate_type, aggregate_id, kind, payload, body, content_type, headers, context, created_at, seq]
    }

    #[test]
    fn a_payload_is_json_or_the_bytes_of_a_body() {
        for (payload, body, content_type, expected) in [
            (Some(b"\x01[1]".as_slice()), None, None, Some(("application/json", b"[1]".as_slice()))),
            (Some(b"\x01[1]"), None, Some(b"a/b+json".as_slice()), Some(("a/b+json", b"[1]"))),
            (None, Some(b"\x00\xff".as_slice()), None, Some(("application/octet-stream", b"\x00\xff"))),
            (None, Some(b""), Some(b"avro/binary"), Some(("avro/binary", b""))),
            (None, None, None, None),
            (Some(b"\x01[1]"), Some(b""), None, None),
        ] {
            let event = decoded(&insert(&row(payload, body, content_type))).ok();
            let found = event.as_ref().map(|event| (event.content_type.as_str(), &event.payload[..]));
            assert_eq!(found, expected);
            assert!(event.is_none_or(|event| event.id.as_str() == "a b"));
        }
    }

    #[test]
    fn another_table_is_said_not_to_be_the_outbox() {
        let mut relation = relation(&COLUMNS);
        relation.table = "orders".to_owned();
        assert!(
            Layout::of(&relation, "weft")
                .unwrap_err()
                .to_string()
                .contains("the table weft.orders, which is not the outbox")
        );
    }
}
