//! What is reconciled: a kind, a namespace and a name.

use std::{collections::BTreeMap, fmt};

use smol_str::SmolStr;

use super::labels::{OWNER_KIND_LABEL, OWNER_NAME_LABEL};
use crate::domain::names;

/// An object's identity within its kind. It is kept in many places, and names are short: those are in it, and not on the heap.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectId {
    pub namespace: SmolStr,
    pub name: SmolStr,
}

impl ObjectId {
    pub fn new(namespace: impl AsRef<str>, name: impl AsRef<str>) -> Self {
        Self { namespace: SmolStr::new(namespace), name: SmolStr::new(name) }
    }
}

/// What has a reconcile of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectKind {
    Microservice,
    OutboxRelay,
    Saga,
    /// What the Sagas that name one orchestrator own together; it has no custom resource.
    Orchestrator,
}

impl ObjectKind {
    pub const ALL: [Self; 4] = [Self::Microservice, Self::OutboxRelay, Self::Saga, Self::Orchestrator];

    /// As in `kind:` and in the label [`OWNER_KIND_LABEL`].
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Microservice => "Microservice",
            Self::OutboxRelay => "OutboxRelay",
            Self::Saga => "Saga",
            Self::Orchestrator => "Orchestrator",
        }
    }
}

/// One thing to reconcile.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    pub kind: ObjectKind,
    pub id: ObjectId,
}

impl Key {
    pub fn new(kind: ObjectKind, namespace: impl AsRef<str>, name: impl AsRef<str>) -> Self {
        Self { kind, id: ObjectId::new(namespace, name) }
    }

    pub fn of(kind: ObjectKind, id: &ObjectId) -> Self {
        Self { kind, id: id.clone() }
    }

    /// The owner that a child's labels name. An orchestrator's children carry [`names::orchestrator`] of its name.
    pub fn of_owner(namespace: &str, labels: &BTreeMap<String, String>) -> Option<Self> {
        let (kind, owner) = (labels.get(OWNER_KIND_LABEL)?, labels.get(OWNER_NAME_LABEL)?);
        let kind = ObjectKind::ALL.into_iter().find(|known| known.as_str() == kind)?;
        let name = match kind {
            ObjectKind::Orchestrator => owner.strip_suffix(&names::orchestrator("")).unwrap_or(owner),
            ObjectKind::Microservice | ObjectKind::OutboxRelay | ObjectKind::Saga => owner,
        };
        Some(Self::new(kind, namespace, name))
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind.as_str(), self.id.namespace, self.id.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::resources::labels::{Component, labels};

    #[test]
    fn a_child_leads_back_to_its_owner() {
        let labels = labels("Orchestrator", &names::orchestrator("default"), Component::Orchestrator);
        assert_eq!(Key::of_owner("shop", &labels), Some(Key::new(ObjectKind::Orchestrator, "shop", "default")));
    }
}
