//! Where the events of a service are published, for whoever reads them.

use crate::{
    api::v1alpha1::{EventFormat, NatsSink, OutboxRelay},
    controllers::{
        render::reach,
        resources::{plan::Rejection, reason::Reason},
    },
};

/// What events are read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// A saga is started by them.
    Start,
    /// A choreographed saga is followed by them.
    Follow,
    /// A service consumes them.
    Consume,
}

impl Use {
    /// What the messages of the format Raw lack.
    fn lacks(self) -> &'static str {
        match self {
            Self::Start => "whose messages have no type to start a saga by",
            Self::Follow => "whose messages have no type to follow a saga by",
            Self::Consume => "whose messages are no CloudEvents",
        }
    }

    /// That the events are read from NATS alone, and what is to be done.
    fn needs_nats(self) -> &'static str {
        match self {
            Self::Start => {
                "events that start a saga are read from NATS: give the relay spec.sink.nats, or start the saga over its HTTP API"
            }
            Self::Follow => "events that follow a saga are read from NATS: give the relay spec.sink.nats",
            Self::Consume => "events are consumed from NATS: give the relay spec.sink.nats",
        }
    }
}

/// Who reads, for messages: the field, and the field that names the service.
#[derive(Clone, Copy, Debug)]
pub struct Reader<'a> {
    pub field: &'a str,
    pub service_field: &'a str,
    pub purpose: Use,
}

impl Reader<'_> {
    /// Where `relay`, the one that publishes the events of `service`, publishes them. `unreadable` is its name when it cannot be read.
    pub fn sink<'a>(
        &self,
        service: &str,
        relay: Option<&'a OutboxRelay>,
        unreadable: Option<&str>,
    ) -> Result<&'a NatsSink, Rejection> {
        let Self { field, service_field, purpose } = self;
        let rejection = |reason, message| Rejection { reason, message };
        if let Some(relay) = unreadable {
            return Err(rejection(
                Reason::OutboxRelayMalformed,
                format!(
                    "{service_field}: OutboxRelay `{relay}`, which publishes the events of `{service}`, cannot be read: correct it; its own conditions say what is wrong"
                ),
            ));
        }
        let relay = relay.ok_or_else(|| {
            rejection(
                Reason::OutboxRelayNotFound,
                format!(
                    "{service_field}: no OutboxRelay publishes the events of `{service}`: apply one whose spec.microservice names it"
                ),
            )
        })?;
        if relay.spec.format == EventFormat::Raw {
            return Err(rejection(
                Reason::NoEventType,
                format!(
                    "{field}: the OutboxRelay of `{service}` publishes in the format Raw, {}: set its spec.format to CloudEvents or CloudEventsStructured",
                    purpose.lacks()
                ),
            ));
        }
        let sink = relay.spec.sink.nats.as_ref().ok_or_else(|| {
            rejection(
                Reason::NoBroker,
                format!(
                    "{field}: the OutboxRelay of `{service}` publishes to {}, and {}",
                    relay.spec.sink.kind(),
                    purpose.needs_nats()
                ),
            )
        })?;
        if let Some(secret) = &sink.secret {
            // its own controller refuses the relay for it
            reach::check_secret(service, "spec.sink", secret)
                .map_err(|rejection| relay_rejected(service_field, service, rejection))?;
        }
        Ok(sink)
    }
}

/// The relay's own controller refuses it for this.
pub fn relay_rejected(field: &str, service: &str, Rejection { reason, message }: Rejection) -> Rejection {
    Rejection { reason, message: format!("{field}: the OutboxRelay of `{service}` is rejected: {message}") }
}
