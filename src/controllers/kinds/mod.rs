//! The kinds of objects that are reconciled: per kind `observe`, `plan` and `status`.

pub mod microservice;
pub mod outbox_relay;
pub mod saga;
mod secrets;

use std::{pin::Pin, sync::Arc};

use super::{
    resources::key::{Key, ObjectKind},
    runtime::{Context, Verdict, driver},
};

/// Reconciles one key by the controller of its kind.
pub fn reconcile<'a>(context: &'a Arc<Context>, key: &'a Key) -> Pin<Box<dyn Future<Output = Verdict> + Send + 'a>> {
    match key.kind {
        ObjectKind::Microservice => Box::pin(driver::reconcile::<microservice::Controller>(context, key)),
        ObjectKind::OutboxRelay => Box::pin(driver::reconcile::<outbox_relay::Controller>(context, key)),
        ObjectKind::Saga => Box::pin(driver::reconcile::<saga::Controller>(context, key)),
        ObjectKind::Orchestrator => Box::pin(driver::reconcile::<saga::OrchestratorController>(context, key)),
    }
}
