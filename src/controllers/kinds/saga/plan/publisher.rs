//! The services that a Saga names, and where they publish their events.

use crate::{
    api::v1alpha1::{Microservice, NatsSink},
    controllers::{
        kinds::{
            outbox_relay::{
                self,
                published::{Reader, Use, relay_rejected},
            },
            saga::{Defined, Observed},
        },
        resources::{plan::Rejection, settings::Settings},
    },
};

/// The Microservice `name`, which `field` names.
pub fn service<'a>(observed: &'a Observed, field: &str, name: &str) -> Result<&'a Microservice, Rejection> {
    observed.services.get(name).map(AsRef::as_ref).ok_or_else(|| {
        let field = format!("{field}.service");
        if observed.unreadable.contains(name) {
            Rejection::microservice_malformed(&field, name)
        } else {
            Rejection::microservice_not_found(&field, name)
        }
    })
}

/// Where the relay of `service` publishes its events.
pub fn sink(observed: &Observed, field: &str, service: &str, purpose: Use) -> Result<NatsSink, Rejection> {
    let relay = observed.relays.iter().find(|relay| relay.spec.microservice == service).map(AsRef::as_ref);
    let unreadable = observed.kept_relays.get(service).map(String::as_str);
    let service_field = format!("{field}.service");
    let reader = Reader { field, service_field: &service_field, purpose };
    reader.sink(service, relay, unreadable).cloned()
}

/// Whether there is a broker to read the events from.
pub fn check_brokers(defined: &Defined, settings: &Settings) -> Result<(), Rejection> {
    let check = |field: &str, service: &str, sink: &NatsSink| match outbox_relay::nats(sink, settings) {
        Ok(_) => Ok(()),
        Err(rejection) => Err(relay_rejected(field, service, rejection)),
    };
    match defined {
        Defined::Orchestrated { start: None, .. } => Ok(()),
        Defined::Orchestrated { start: Some(start), .. } => check("spec.startOn.service", &start.service, &start.sink),
        Defined::Choreographed(followed) => {
            followed.sinks.iter().try_for_each(|(service, sink)| check("spec.reactions", service, sink))
        }
    }
}
