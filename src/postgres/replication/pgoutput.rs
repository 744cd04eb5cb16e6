//! The messages of `pgoutput`, protocol version 1, for an insert-only publication: Begin, Relation, Insert, Commit.
//!
//! A transaction is sent as a whole after it has committed, in commit order, so everything between Begin and Commit is
//! final.

use bytes::{Buf, Bytes};

use super::{Lsn, POSTGRES_EPOCH, ReplicationError};

#[derive(Debug)]
pub enum Message {
    Begin {
        /// LSN of the commit record: grows from transaction to transaction.
        commit_lsn: Lsn,
        /// Microseconds since 1970.
        committed_at: i64,
        /// The low half of the transaction's id.
        transaction: u32,
    },
    Commit {
        /// The end of the transaction; confirming it confirms the transaction and everything before it.
        end_lsn: Lsn,
    },
    Relation(Relation),
    Insert(Insert),
    /// A message that is irrelevant to a reader of inserts: origin, type, and whatever a later server adds.
    Other,
}

/// A table's layout; sent before its first row in a stream and whenever it has changed.
#[derive(Debug)]
pub struct Relation {
    pub oid: u32,
    pub schema: String,
    pub table: String,
    pub columns: Vec<Column>,
}

#[derive(Debug)]
pub struct Column {
    pub name: String,
    pub type_oid: u32,
}

#[derive(Debug)]
pub struct Insert {
    pub relation: u32,
    pub columns: Columns,
}

/// The values of one row, in the order of the relation's columns; slices of the receive buffer.
#[derive(Debug)]
pub struct Columns {
    left: u16,
    bytes: Bytes,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Value {
    Null,
    /// In the type's text form.
    Text(Bytes),
    /// In the type's binary form.
    Binary(Bytes),
}

const SHORT: ReplicationError = ReplicationError::Protocol("a pgoutput message that ends early");

impl Message {
    pub fn decode(mut bytes: Bytes) -> Result<Self, ReplicationError> {
        match u8(&mut bytes)? {
            b'B' => {
                let commit_lsn = Lsn(u64(&mut bytes)?);
                let committed_at = bytes.try_get_i64().map_err(|_| SHORT)?.saturating_add(POSTGRES_EPOCH);
                Ok(Self::Begin { commit_lsn, committed_at, transaction: u32(&mut bytes)? })
            }
            b'C' => {
                let (_flags, _commit_lsn) = (u8(&mut bytes)?, u64(&mut bytes)?);
                Ok(Self::Commit { end_lsn: Lsn(u64(&mut bytes)?) })
            }
            b'R' => Relation::decode(&mut bytes).map(Self::Relation),
            b'I' => {
                let relation = u32(&mut bytes)?;
                let _new_tuple = u8(&mut bytes)?;
                let left = u16(&mut bytes)?;
                Ok(Self::Insert(Insert { relation, columns: Columns { left, bytes } }))
            }
            _ => Ok(Self::Other),
        }
    }
}

impl Relation {
    fn decode(bytes: &mut Bytes) -> Result<Self, ReplicationError> {
        let oid = u32(bytes)?;
        let (schema, table) = (text(bytes)?, text(bytes)?);
        let _replica_identity = u8(bytes)?;
        let count = u16(bytes)?;
        let columns = (0..count).map(|_| Column::decode(bytes)).collect::<Result<_, _>>()?;
        Ok(Self { oid, schema, table, columns })
    }
}

impl Column {
    fn decode(bytes: &mut Bytes) -> Result<Self, ReplicationError> {
        let _flags = u8(bytes)?;
        let name = text(bytes)?;
        let type_oid = u32(bytes)?;
        let _modifier = u32(bytes)?;
        Ok(Self { name, type_oid })
    }
}

impl Iterator for Columns {
    type Item = Result<Value, ReplicationError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        Some(self.value())
    }
}

impl Columns {
    fn value(&mut self) -> Result<Value, ReplicationError> {
        let kind = u8(&mut self.bytes)?;
        if matches!(kind, b'n' | b'u') {
            return Ok(Value::Null);
        }
        let length = usize::try_from(u32(&mut self.bytes)?).map_err(|_| SHORT)?;
        if self.bytes.len() < length {
            return Err(SHORT);
        }
        let value = self.bytes.split_to(length);
        match kind {
            b't' => Ok(Value::Text(value)),
            b'b' => Ok(Value::Binary(value)),
            _ => Err(ReplicationError::Protocol("a value of unknown kind")),
        }
    }
}

fn u8(bytes: &mut Bytes) -> Result<u8, ReplicationError> {
    bytes.try_get_u8().map_err(|_| SHORT)
}

fn u16(bytes: &mut Bytes) -> Result<u16, ReplicationError> {
    bytes.try_get_u16().map_err(|_| SHORT)
}

fn u32(bytes: &mut Bytes) -> Result<u32, ReplicationError> {
    bytes.try_get_u32().map_err(|_| SHORT)
}

fn u64(bytes: &mut Bytes) -> Result<u64, ReplicationError> {
    bytes.try_get_u64().map_err(|_| SHORT)
}

fn text(bytes: &mut Bytes) -> Result<String, ReplicationError> {
    let end = bytes.iter().position(|&b| b == 0).ok_or(SHORT)?;
    let text = String::from_utf8_lossy(&bytes.split_to(end)).into_owned();
    bytes.advance(1);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, BytesMut};

    use super::*;

    fn insert() -> Bytes {
        let mut bytes = BytesMut::new();
        bytes.put_u8(b'I');
        bytes.put_u32(42);
        bytes.put_u8(b'N');
        bytes.put_u16(3);
        bytes.put_u8(b'n');
        bytes.put_u8(b't');
        bytes.put_u32(2);
        bytes.put_slice(b"ab");
        bytes.put_u8(b'b');
        bytes.put_u32(1);
        bytes.put_u8(7);
        bytes.freeze()
    }

    #[test]
    fn an_insert_gives_its_values_in_order() {
        let Message::Insert(insert) = Message::decode(insert()).unwrap() else { panic!("not an insert") };
        assert_eq!(insert.relation, 42);
        let values: Vec<Value> = insert.columns.map(Result::unwrap).collect();
        let expected = [Value::Null, Value::Text(Bytes::from_static(b"ab")), Value::Binary(Bytes::from_static(&[7]))];
        assert_eq!(values, expected);
    }

    #[test]
    fn a_message_cut_anywhere_is_an_error_and_no_panic() {
        let whole = insert();
        for length in 0..whole.len() {
            let complete = match Message::decode(whole.slice(..length)) {
                Ok(Message::Insert(insert)) => insert.columns.flatten().count() == 3,
                _ => false,
            };
            assert!(!complete, "{length} bytes");
        }
    }

    #[test]
    fn an_unknown_message_is_ignored() {
        assert!(matches!(Message::decode(Bytes::from_static(b"O123")).unwrap(), Message::Other));
    }
}
