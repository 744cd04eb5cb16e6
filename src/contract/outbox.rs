//! Where a service writes its events: into `weft.outbox`, or into a table of the team's own, whose new rows a trigger
//! copies there.

use serde::{Deserialize, Serialize};

/// The form of the table that the service writes its events to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "layout", rename_all_fields = "camelCase")]
pub enum Outbox {
    /// `weft.outbox` itself.
    Weft,
    /// The table of Debezium's outbox event router.
    Debezium { table: OutboxTable },
    /// The table `message` of Eventuate Tram.
    Eventuate { table: OutboxTable },
    /// Any table.
    Custom { table: OutboxTable, columns: Box<OutboxColumns> },
}

/// A table of the team's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OutboxTable {
    /// As in the catalog, without quotes.
    pub schema: String,
    pub name: String,
    /// Media type of the payloads, where no column says another one. Absent: that of the column's type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    pub existing: ExistingRows,
}

/// What becomes of rows that are in the table when its trigger is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExistingRows {
    /// They are never published.
    Skip,
    /// They are published once.
    Publish,
}

/// What the parts of an event are read from. Names are as in the catalog, without quotes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct OutboxColumns {
    pub id: String,
    pub aggregate_type: ColumnOrValue,
    pub aggregate_id: String,
    #[serde(rename = "type")]
    pub kind: ColumnOrValue,
    pub payload: String,
    /// A JSON object.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headers: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
}

/// A column, or what all rows have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ColumnOrValue {
    Column(String),
    Value { value: String },
}
