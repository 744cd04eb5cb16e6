//! Hands an event to the service, by an HTTP request or a call of a function of its database.

mod function;
mod http;

use std::time::Duration;

use self::{function::Function, http::Http};
use super::event::Event;
use crate::contract::{
    DatabaseLogin,
    inbox::{Subscription, Target},
};

/// What became of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// The service has handled the event, or had before.
    Handled,
    /// The service refuses the event for good.
    Refused(String),
    /// It is to be delivered again: the service failed, or was not reached.
    Failed(String),
}

/// Where the events of a subscription go.
#[derive(Debug)]
pub(super) enum Deliverer {
    Http(Http),
    Function(Box<Function>),
}

impl Deliverer {
    /// An error is one of the contract.
    pub(super) fn new(subscription: &Subscription, database: &DatabaseLogin) -> Result<Self, String> {
        Ok(match &subscription.target {
            Target::Http(target) => Self::Http(Http::new(&target.url, Duration::from_millis(target.timeout_ms))?),
            Target::Function(function) => {
                Self::Function(Box::new(Function::new(&subscription.name, function, database)))
            }
        })
    }

    /// Deliveries that may be on the way at a time.
    pub(super) fn concurrency(&self) -> usize {
        match self {
            Self::Http(_) => http::CONCURRENT,
            Self::Function(_) => function::CONCURRENT,
        }
    }

    pub(super) async fn deliver(&self, event: &Event) -> Outcome {
        match self {
            Self::Http(http) => http.deliver(event).await,
            Self::Function(function) => function.deliver(event).await,
        }
    }
}
