//! Where a service writes its events, from the OutboxRelay to the contract of the set-up.

use crate::{
    api::v1alpha1::{self, OutboxLayout},
    contract::outbox::{ColumnOrValue, ExistingRows, Outbox, OutboxColumns, OutboxTable},
    domain::version,
};

const DEBEZIUM_TABLE: &str = "public.outbox";
const EVENTUATE_TABLE: &str = "eventuate.message";

/// Hash of an outbox in a table of the team's; `None` for Weft's own.
pub fn hash(outbox: &v1alpha1::Outbox) -> Option<String> {
    (outbox.layout != OutboxLayout::Weft).then(|| version::of(&contract(outbox)))
}

/// What the definition's rules keep from being missing is empty here, and the set-up refuses it.
pub(super) fn contract(outbox: &v1alpha1::Outbox) -> Outbox {
    let v1alpha1::Outbox { layout, table, columns, values, existing } = outbox;
    let values = values.clone().unwrap_or_default();
    let table = |default: &str| {
        let table = table.as_deref().unwrap_or(default);
        let (schema, name) = table.split_once('.').unwrap_or(("", table));
        OutboxTable {
            schema: schema.to_owned(),
            name: name.to_owned(),
            content_type: values.content_type.clone(),
            existing: match existing {
                v1alpha1::ExistingRows::Skip => ExistingRows::Skip,
                v1alpha1::ExistingRows::Publish => ExistingRows::Publish,
            },
        }
    };
    match layout {
        OutboxLayout::Weft => Outbox::Weft,
        OutboxLayout::Debezium => Outbox::Debezium { table: table(DEBEZIUM_TABLE) },
        OutboxLayout::Eventuate => Outbox::Eventuate { table: table(EVENTUATE_TABLE) },
        OutboxLayout::Custom => {
            let v1alpha1::OutboxColumns {
                id,
                aggregate_type,
                aggregate_id,
                kind,
                payload,
                headers,
                content_type,
                created_at,
            } = columns.clone().unwrap_or_default();
            let columns = Box::new(OutboxColumns {
                id,
                aggregate_type: either(aggregate_type, values.aggregate_type.clone()),
                aggregate_id,
                kind: either(kind, values.kind.clone()),
                payload,
                headers,
                content_type,
                created_at,
            });
            Outbox::Custom { table: table(""), columns }
        }
    }
}

fn either(column: Option<String>, value: Option<String>) -> ColumnOrValue {
    match value {
        Some(value) => ColumnOrValue::Value { value },
        None => ColumnOrValue::Column(column.unwrap_or_default()),
    }
}
