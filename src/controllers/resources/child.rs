//! The kinds of objects that Weft makes: one table, so that a new kind is one entry.

use k8s_openapi::{
    api::{
        apps::v1::{Deployment, StatefulSet},
        autoscaling::v2::HorizontalPodAutoscaler,
        batch::v1::Job,
        core::v1::{ConfigMap, Secret, Service, ServiceAccount},
        networking::v1::NetworkPolicy,
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use kube::api::ApiResource;
use serde::{Deserialize, Serialize};
use smol_str::SmolStr;

/// How a child is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// Server-side apply of what differs.
    Apply,
    /// As [`Write::Apply`]; but one of this name that somebody else made need not conflict with ours in any field, so the first
    /// write is a creation, which fails if there is one.
    ApplyUnlessTaken,
    /// Created when missing, never changed: a Job's template is immutable, and whatever matters is in the hash in its name.
    CreateOnce,
    /// As [`Write::CreateOnce`], and never read either: the operator has no right to. Its name is its identity.
    CreateUnseen,
}

/// How much of a child is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Metadata, and the few fields of spec and status that conditions are made of.
    Status,
    /// Metadata only, of the children that carry Weft's label.
    Metadata,
    /// Metadata only, of all objects of the kind: those of others may be named by a custom resource.
    MetadataOfAll,
    /// Of all objects of the kind: those of others decide about Weft's pods too.
    SpecOfAll,
    /// Not at all.
    Never,
}

macro_rules! children {
    ($($kind:ident: $write:ident, $watch:ident;)+) => {
        /// One object that Weft makes.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Child {
            $($kind($kind),)+
        }

        /// The kinds of [`Child`].
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum ChildKind {
            $($kind,)+
        }

        impl Child {
            pub fn kind(&self) -> ChildKind {
                match self { $(Self::$kind(_) => ChildKind::$kind,)+ }
            }

            pub fn metadata(&self) -> &ObjectMeta {
                match self { $(Self::$kind(child) => &child.metadata,)+ }
            }

            /// The object as JSON, with `apiVersion` and `kind`.
            pub fn to_json(&self) -> serde_json::Result<serde_json::Value> {
                match self { $(Self::$kind(child) => serde_json::to_value(child),)+ }
            }
        }

        impl ChildKind {
            pub const ALL: &'static [Self] = &[$(Self::$kind,)+];

            /// As in `kind:`.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$kind => stringify!($kind),)+ }
            }

            /// Group, version and plural, for requests.
            pub fn resource(self) -> ApiResource {
                match self { $(Self::$kind => ApiResource::erase::<$kind>(&()),)+ }
            }

            pub fn write(self) -> Write {
                match self { $(Self::$kind => Write::$write,)+ }
            }

            pub fn watch(self) -> Watch {
                match self { $(Self::$kind => Watch::$watch,)+ }
            }
        }

        $(impl From<$kind> for Child {
            fn from(child: $kind) -> Self {
                Self::$kind(child)
            }
        })+
    };
}

children! {
    ServiceAccount: ApplyUnlessTaken, Metadata;
    Secret: CreateUnseen, Never;
    ConfigMap: ApplyUnlessTaken, MetadataOfAll;
    Service: Apply, Metadata;
    StatefulSet: Apply, Status;
    Job: CreateOnce, Status;
    Deployment: Apply, Status;
    NetworkPolicy: Apply, SpecOfAll;
    PodDisruptionBudget: Apply, Metadata;
    HorizontalPodAutoscaler: ApplyUnlessTaken, Metadata;
}

impl Child {
    /// Its kind and name.
    pub fn reference(&self) -> ChildRef {
        ChildRef::new(self.kind(), self.metadata().name.as_deref().unwrap_or_default())
    }
}

/// Names a child within its namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ChildRef {
    pub kind: ChildKind,
    pub name: SmolStr,
}

impl ChildRef {
    pub fn new(kind: ChildKind, name: impl AsRef<str>) -> Self {
        Self { kind, name: SmolStr::new(name) }
    }
}

/// `Deployment orders`.
impl std::fmt::Display for ChildRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.kind.as_str(), self.name)
    }
}
