//! The problems that the data plane reports in its `/status`.

use serde::{Deserialize, Serialize};

/// An enum of reasons: each variant's text is its own name. `and Variant(Type)` takes in those of another such enum.
macro_rules! reasons {
    ($(#[$about:meta])* $name:ident { $($(#[$meaning:meta])* $reason:ident,)+ } $(and $others:ident($other:ty))?) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name {
            $($(#[$meaning])* $reason,)+
            $($others($other),)?
        }

        impl $name {
            pub fn all() -> impl Iterator<Item = Self> {
                [$(Self::$reason,)+].into_iter()$(.chain(<$other>::all().map(Self::$others)))?
            }

            /// PascalCase.
            pub fn as_str(self) -> &'static str {
                match self {
                    $(Self::$reason => stringify!($reason),)+
                    $(Self::$others(other) => other.as_str(),)?
                }
            }

            /// `None`: this version does not know it.
            pub fn parse(text: &str) -> Option<Self> {
                Self::all().find(|known| known.as_str() == text)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(crate) use reasons;

reasons! {
    /// What kind of problem it is; the operator uses it as the reason of a condition. Problems are listed in this order, which is
    /// that of the alphabet.
    ProblemReason {
        BrokerUnreachable,
        ContractInvalid,
        ContractUnreadable,
        DatabaseFails,
        DatabaseNotReady,
        DatabaseUnreachable,
        DeadLetters,
        DefinitionInvalid,
        DefinitionsNotStored,
        DeliveryFailing,
        EventRefused,
        EventsExpired,
        InstanceUnreadable,
        PublicationInvalid,
        PublishFailing,
        RecoveryFailed,
        SlotAtRisk,
        SlotLost,
        SlotPending,
        SourceUnusable,
        Standby,
        StreamMissing,
        /// Of a data plane of another version; the message begins with the reason that it gave.
        UnknownProblem,
    }
}

/// A problem that a person should know about. It disappears from the status when it is resolved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", from = "Received")]
pub struct Problem {
    pub reason: ProblemReason,
    /// One sentence: what, where, since when, and how to fix it if that is known. Never a payload or a credential.
    pub message: String,
}

impl Serialize for ProblemReason {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl Problem {
    pub fn new(reason: ProblemReason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

/// A problem as another version may report it.
#[derive(Deserialize)]
struct Received {
    reason: String,
    message: String,
}

impl From<Received> for Problem {
    fn from(Received { reason, message }: Received) -> Self {
        match ProblemReason::parse(&reason) {
            Some(reason) => Self { reason, message },
            None => Self { reason: ProblemReason::UnknownProblem, message: format!("{reason}: {message}") },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_that_only_another_version_knows_stays_in_the_message() {
        let problem = |reason: &str| -> Problem {
            serde_json::from_value(serde_json::json!({"reason": reason, "message": "a sentence"})).unwrap()
        };
        let known = problem("SlotLost");
        assert_eq!((known.reason, known.message.as_str()), (ProblemReason::SlotLost, "a sentence"));
        let unknown = problem("MoonTooBright");
        assert_eq!(unknown.reason, ProblemReason::UnknownProblem);
        assert_eq!(unknown.message, "MoonTooBright: a sentence");
    }

    #[test]
    fn problems_are_listed_in_the_order_of_the_alphabet() {
        assert!(ProblemReason::all().map(ProblemReason::as_str).is_sorted());
        assert!(ProblemReason::all().is_sorted());
    }
}
