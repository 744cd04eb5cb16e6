//! Why an object is as it is: one list, shared by conditions, Events and logs.

use super::outcome::Class;
use crate::contract::problem::{ProblemReason, reasons};

reasons! {
    /// Why a condition is as it is, or what an Event is about. `docs/runbook.md` explains those that are not calm.
    Reason {
        // all is well
        Accepted,
        AsDeclared,
        Consuming,
        Found,
        Migrated,
        NoneStuck,
        NotStalled,
        Paused,
        Publishing,
        Ready,
        Settled,
        SlotSafe,
        // a roll-out
        Creating,
        Loading,
        RollingOut,
        SetupPending,
        SetupRunning,
        Settling,
        Starting,
        // somebody asked for it, or somebody else must do something first
        InboxSilent,
        MicroserviceNotReady,
        NoLeader,
        OrchestratorSilent,
        RelaySilent,
        ScaledToZero,
        SharedDatabase,
        Suspended,
        // why an object is not planned
        CommandNotFound,
        ContractNotWritable,
        DependsOnItself,
        InvalidDatabase,
        InvalidPodTemplate,
        InvalidSaga,
        InvalidStorageSize,
        Malformed,
        MicroserviceMalformed,
        MicroserviceNotFound,
        NamespaceNotEnabled,
        NameTooLong,
        NoBroker,
        NoDatabase,
        NoEventType,
        NoHttpPort,
        NoTarget,
        NotItsOwn,
        NotShareable,
        OutboxRelayMalformed,
        OutboxRelayNotFound,
        OutboxTaken,
        PredecessorEnding,
        // why a child cannot be written
        ApiUnavailable,
        ChildConflict,
        ChildRefused,
        Forbidden,
        NamespaceTerminating,
        NotFound,
        Unauthorized,
        // what keeps pods from running, or from being ready
        ConfigMapMissing,
        ContainerRefused,
        CrashLooping,
        ImagePullFailed,
        ImagePulling,
        OutOfMemory,
        PodsRefused,
        ProbeFailing,
        ProgressDeadlineExceeded,
        QuotaExceeded,
        SecretMissing,
        Unschedulable,
        VolumeFull,
        VolumeNotMounted,
        VolumeNotProvisioned,
        // what keeps a database from being set up
        MigrationsBehind,
        MigrationsEmpty,
        MigrationsNotFound,
        SetupFailed,
        SlotRemains,
        // somebody else writes what Weft declares, or beside it
        AddedByOthers,
        ChangedByOthers,
        // of sagas
        Draining,
        NoSuchEvent,
        InstancesStuck,
        NotAsDeclared,
        // of Events only
        Contested,
        DriftCorrected,
        Drifted,
        MigrationFailed,
        SagaStuck,
        SagaUnstuck,
        ScopeAvailable,
        ScopeUnavailable,
    }
    and DataPlane(ProblemReason)
}

impl Reason {
    /// Nothing is to be done, and nothing waited for.
    pub fn is_calm(self) -> bool {
        matches!(
            self,
            Self::Accepted
                | Self::AsDeclared
                | Self::Consuming
                | Self::Found
                | Self::Migrated
                | Self::NoneStuck
                | Self::NotStalled
                | Self::Paused
                | Self::Publishing
                | Self::Ready
                | Self::Settled
                | Self::SlotSafe
        )
    }

    /// A stage of a roll-out that goes well.
    pub fn is_progress(self) -> bool {
        matches!(
            self,
            Self::Creating
                | Self::Starting
                | Self::SetupPending
                | Self::SetupRunning
                | Self::Settling
                | Self::Migrated
                | Self::RollingOut
                | Self::Loading
                | Self::Ready
        )
    }

    /// Of an object that is not planned: that ends by itself, once what the object names is applied too.
    pub fn is_waited_for(self) -> bool {
        matches!(
            self,
            Self::MicroserviceNotFound
                | Self::OutboxRelayNotFound
                | Self::PredecessorEnding
                | Self::MicroserviceMalformed
                | Self::OutboxRelayMalformed
        )
    }

    /// Of a database that is not set up: not because that takes time.
    pub fn is_failed_set_up(self) -> bool {
        matches!(self, Self::SetupFailed | Self::ImagePullFailed)
    }

    /// Of a child that could not be written: how that is handled.
    pub fn class(self) -> Class {
        match self {
            Self::Forbidden | Self::Unauthorized => Class::Fatal,
            Self::ApiUnavailable
            | Self::ChildConflict
            | Self::NamespaceTerminating
            | Self::NotFound
            | Self::QuotaExceeded => Class::Retry,
            _ => Class::Invalid,
        }
    }
}

impl From<ProblemReason> for Reason {
    fn from(reason: ProblemReason) -> Self {
        Self::DataPlane(reason)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_has_a_text_of_its_own() {
        let texts: BTreeSet<_> = Reason::all().map(Reason::as_str).collect();
        assert_eq!(texts.len(), Reason::all().count());
        assert!(Reason::all().all(|reason| Reason::parse(reason.as_str()) == Some(reason)));
    }
}
