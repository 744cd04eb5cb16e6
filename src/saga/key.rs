//! Ids of instances, and which partition they belong to.

use uuid::Uuid;

/// Number of partitions of an orchestrator's instances: as many as `orchestrator.sql` inserts rows.
pub(super) const PARTITIONS: i16 = 16;

/// Namespace of the ids that are derived from idempotency keys (UUID version 5).
const KEY_NAMESPACE: Uuid = Uuid::from_u128(0x8f1d_6a52_94f0_4c53_9a0e_2d2f_6b70_31c8);

/// What makes a repeated start the same one. Keys of the two kinds are apart, also when they have the same text.
#[derive(Clone, Copy, Debug)]
pub(super) enum Key<'a> {
    /// The header `Idempotency-Key`; another input under it is an error.
    Request(&'a str),
    /// The id of an event.
    Event(&'a str),
    /// The correlation of a choreographed saga's events.
    Correlation(&'a str),
}

impl Key<'_> {
    pub(super) fn id(self, saga: &str) -> Uuid {
        let (kind, text) = match self {
            Self::Request(text) => ("request", text),
            Self::Event(text) => ("event", text),
            Self::Correlation(text) => ("correlation", text),
        };
        Uuid::new_v5(&KEY_NAMESPACE, format!("{saga}\0{kind}\0{text}").as_bytes())
    }
}

/// Whether the id is derived from a [`Key`].
pub(super) fn is_keyed(id: Uuid) -> bool {
    id.get_version() == Some(uuid::Version::Sha1)
}

pub(super) fn partition_of(id: Uuid) -> i16 {
    let [.., last] = *id.as_bytes();
    i16::from(last) % PARTITIONS
}
