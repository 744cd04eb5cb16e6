//! The services that a Saga names, and where they publish their events.

use crate::{
    api::v1alpha1::{EventFormat, Microservice, NatsSink},
    controllers::{
        kinds::{
            outbox_relay,
            saga::{Defined, Observed},
        },
        render::reach,
        resources::{plan::Rejection, reason::Reason, settings::Settings},
    },
};

/// What events are read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    Start,
    Follow,
}

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
    if let Some(relay) = observed.kept_relays.get(service) {
        return Err(Rejection {
            reason: Reason::OutboxRelayMalformed,
            message: format!(
                "{field}.service: OutboxRelay `{relay}`, which publishes the events of `{service}`, cannot be read: correct it; its own conditions say what is wrong"
            ),
        });
    }
    let relay = observed.relays.iter().find(|relay| relay.spec.microservice == service).ok_or_else(|| Rejection {
        reason: Reason::OutboxRelayNotFound,
        message: format!(
            "{field}.service: no OutboxRelay publishes the events of `{service}`: apply one whose spec.microservice names it"
        ),
    })?;
    let (verb, otherwise) = match purpose {
        Use::Start => ("start", ", or start the saga over its HTTP API"),
        Use::Follow => ("follow", ""),
    };
    if relay.spec.format == EventFormat::Raw {
        return Err(Rejection {
            reason: Reason::NoEventType,
            message: format!(
                "{field}: the OutboxRelay of `{service}` publishes in the format Raw, whose messages have no type to {verb} a saga by: set its spec.format to CloudEvents or CloudEventsStructured"
            ),
        });
    }
    let sink = relay.spec.sink.nats.as_ref().ok_or_else(|| Rejection {
        reason: Reason::NoBroker,
        message: format!(
            "{field}: the OutboxRelay of `{service}` publishes to {}, and events that {verb} a saga are read from NATS: give the relay spec.sink.nats{otherwise}",
            relay.spec.sink.kind()
        ),
    })?;
    if let Some(secret) = &sink.secret {
        // its own controller refuses the relay for it
        reach::check_secret(service, "spec.sink", secret)
            .map_err(|rejection| relay_rejected(&format!("{field}.service"), service, rejection))?;
    }
    Ok(sink.clone())
}

fn relay_rejected(field: &str, service: &str, Rejection { reason, message }: Rejection) -> Rejection {
    Rejection { reason, message: format!("{field}: the OutboxRelay of `{service}` is rejected: {message}") }
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
