//! What the engine runs of a Saga: it is linted, and its commands get addresses.

use kube::{ResourceExt, core::Duration};

use super::lower::lower;
use crate::{
    api::v1alpha1::{EventFormat, HttpCommand, HttpMethod, Microservice, Protocol, Saga},
    controllers::{
        kinds::{
            outbox_relay,
            saga::{Defined, Observed, Start},
        },
        render::{milliseconds, reach},
        resources::{plan::Rejection, reason::Reason, settings::Settings},
    },
    domain::saga::{
        definition::{self, Call, Step, Task, Transaction},
        lint,
    },
};

/// The definition of a Saga, or everything that is wrong with it in one sentence each.
///
/// The Saga itself is checked first, so that its author learns of a mistake whatever else exists.
pub fn define(object: &Saga, observed: &Observed) -> Result<Defined, Rejection> {
    if let Some(rejection) = observed.orchestrator_pass.as_ref().and_then(|pass| pass.rejection.as_ref()) {
        return Err(rejection.clone());
    }
    let spec = &object.spec;
    let (mut definition, mut findings) = lower(&object.name_any(), spec);
    findings.extend(lint::lint(&definition).iter().map(ToString::to_string));
    if !findings.is_empty() {
        return Err(Rejection { reason: Reason::InvalidSaga, message: findings.join("; ") });
    }
    let namespace = object.namespace().unwrap_or_default();
    let participants = Participants { namespace, services: observed, deadline: spec.deadline };
    for (index, step) in definition.steps.iter_mut().enumerate() {
        participants.resolve(&format!("spec.steps[{index}]"), step)?;
    }
    if let Some(call) = &mut definition.on_compensated {
        participants.resolve_call("spec.onCompensated", call)?;
    }
    Ok(Defined { definition: definition.seal(), start: start(object, &participants)? })
}

/// The Microservices that a Saga names, as its calls find them.
struct Participants<'a> {
    namespace: String,
    services: &'a Observed,
    deadline: Duration,
}

impl Participants<'_> {
    fn service(&self, field: &str, name: &str) -> Result<&Microservice, Rejection> {
        let found = self.services.services.get(name).map(AsRef::as_ref);
        found.ok_or_else(|| {
            let field = format!("{field}.service");
            if self.services.unreadable.contains(name) {
                Rejection::microservice_malformed(&field, name)
            } else {
                Rejection::microservice_not_found(&field, name)
            }
        })
    }

    /// Gives the calls of a step, and of those in it, their addresses.
    fn resolve(&self, field: &str, step: &mut Step) -> Result<(), Rejection> {
        let mut groups = vec![("else", &mut step.otherwise)];
        match &mut step.task {
            Task::Call(transaction) => {
                let Transaction { action, undo, .. } = transaction.as_mut();
                self.resolve_call(&format!("{field}.do"), action)?;
                if let definition::Undo::Call(undo) = undo {
                    self.resolve_call(&format!("{field}.undo"), undo)?;
                }
            }
            Task::All(steps) => groups.insert(0, ("all", steps)),
            Task::Steps(steps) => groups.insert(0, ("steps", steps)),
            Task::Wait(_) | Task::Signal(_) => {}
        }
        for (group, steps) in groups {
            for (index, step) in steps.iter_mut().enumerate() {
                self.resolve(&format!("{field}.{group}[{index}]"), step)?;
            }
        }
        Ok(())
    }

    fn resolve_call(&self, field: &str, call: &mut Call) -> Result<(), Rejection> {
        let Call { service, command, .. } = &*call;
        let participant = self.service(field, service)?;
        let Some(found) = participant.spec.commands.get(command) else {
            return Err(unknown_command(field, call, participant));
        };
        self.check_window(participant)?;
        let HttpCommand { method, path } = &found.http;
        let http = participant.spec.ports.iter().find(|port| port.protocol == Protocol::Http);
        let port = http.ok_or_else(|| Rejection {
            reason: Reason::NoHttpPort,
            message: format!(
                "{field}.service: Microservice `{service}` has no port with `protocol: http` to be called on: add one to its spec.ports"
            ),
        })?;
        let url = format!("http://{service}.{}.svc:{}{path}", self.namespace, port.port);
        (call.method, call.url) = (method_name(*method).to_owned(), url);
        Ok(())
    }
}

/// Undoing begins at the deadline, at the latest, and takes as long as an outage or a stuck instance does: a week, in milliseconds.
const UNDOING_MS: u64 = 604_800_000;

impl Participants<'_> {
    /// A command whose record is gone is done again when it comes again, and its undo undoes nothing.
    fn check_window(&self, participant: &Microservice) -> Result<(), Rejection> {
        let Some(database) = &participant.spec.database else { return Ok(()) };
        let (deadline, window) = (self.deadline, database.duplicate_window.commands);
        if milliseconds(deadline).saturating_add(UNDOING_MS) <= milliseconds(window) {
            return Ok(());
        }
        let name = participant.name_any();
        Err(Rejection {
            reason: Reason::InvalidSaga,
            message: format!(
                "spec.deadline: a saga of {deadline}, and a week for its undoing, may outlast the {window} for which Microservice `{name}` recognizes its commands: shorten it, or lengthen spec.database.duplicateWindow.commands of `{name}`"
            ),
        })
    }
}

fn unknown_command(field: &str, asked: &Call, participant: &Microservice) -> Rejection {
    let Call { service, command, .. } = asked;
    let known: Vec<_> = participant.spec.commands.keys().map(|known| format!("`{known}`")).collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    Rejection {
        reason: Reason::CommandNotFound,
        message: format!(
            "{field}.command: Microservice `{service}` has no command `{command}` (it has {known}): add it to its spec.commands, or correct the name"
        ),
    }
}

/// The event is read from where the service's relay publishes it.
fn start(object: &Saga, participants: &Participants<'_>) -> Result<Option<Start>, Rejection> {
    let Some(start) = &object.spec.start_on else { return Ok(None) };
    participants.service("spec.startOn", &start.service)?;
    if let Some(relay) = &participants.services.kept_relay {
        return Err(Rejection {
            reason: Reason::OutboxRelayMalformed,
            message: format!(
                "spec.startOn.service: OutboxRelay `{relay}`, which publishes the events of `{}`, cannot be read: correct it; its own conditions say what is wrong",
                start.service
            ),
        });
    }
    let relay = participants.services.relays.first().ok_or_else(|| Rejection {
        reason: Reason::OutboxRelayNotFound,
        message: format!(
            "spec.startOn.service: no OutboxRelay publishes the events of `{}`: apply one whose spec.microservice names it",
            start.service
        ),
    })?;
    if relay.spec.format == EventFormat::Raw {
        return Err(Rejection {
            reason: Reason::NoEventType,
            message: format!(
                "spec.startOn: the OutboxRelay of `{}` publishes in the format Raw, whose messages have no type to start a saga by: set its spec.format to CloudEvents or CloudEventsStructured",
                start.service
            ),
        });
    }
    let sink = relay.spec.sink.nats.as_ref().ok_or_else(|| Rejection {
        reason: Reason::NoBroker,
        message: format!(
            "spec.startOn: the OutboxRelay of `{}` publishes to {}, and events that start a saga are read from NATS: give the relay spec.sink.nats, or start the saga over its HTTP API",
            start.service,
            relay.spec.sink.kind()
        ),
    })?;
    if let Some(secret) = &sink.secret {
        // its own controller refuses the relay for it
        reach::check_secret(&start.service, "spec.sink", secret).map_err(|Rejection { reason, message }| {
            Rejection {
                reason,
                message: format!("spec.startOn.service: the OutboxRelay of `{}` is rejected: {message}", start.service),
            }
        })?;
    }
    Ok(Some(Start {
        service: start.service.clone(),
        event_type: start.event.clone(),
        since: object.creation_timestamp().map(|created| created.0),
        sink: sink.clone(),
    }))
}

/// Whether there is a broker to read the event from.
pub fn check_broker(start: &Start, settings: &Settings) -> Result<(), Rejection> {
    match outbox_relay::nats(&start.sink, settings) {
        Ok(_) => Ok(()),
        Err(Rejection { reason, message }) => Err(Rejection {
            reason,
            message: format!("spec.startOn.service: the OutboxRelay of `{}` is rejected: {message}", start.service),
        }),
    }
}

fn method_name(method: HttpMethod) -> &'static str {
    match method {
        HttpMethod::Post => "POST",
        HttpMethod::Put => "PUT",
        HttpMethod::Patch => "PATCH",
    }
}
