//! What the engine runs of a Saga: it is linted, and its commands get addresses.

use kube::{ResourceExt, core::Duration};

use super::{choreography, lower::lower, publisher};
use crate::{
    api::v1alpha1::{HttpCommand, HttpMethod, Microservice, Protocol, Saga, SagaStyle},
    controllers::{
        kinds::{
            outbox_relay::published::Use,
            saga::{Defined, Observed, Start},
        },
        render::milliseconds,
        resources::{plan::Rejection, reason::Reason},
    },
    domain::saga::{
        definition::{self, Call, Step, Task, Transaction},
        lint,
        request::{self, Target},
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
    if spec.style == SagaStyle::Choreography {
        return choreography::define(object, observed).map(Defined::Choreographed);
    }
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
    Ok(Defined::Orchestrated { definition: definition.seal(), start: start(object, observed)? })
}

/// The Microservices that a Saga names, as its calls find them.
struct Participants<'a> {
    namespace: String,
    services: &'a Observed,
    deadline: Duration,
}

impl Participants<'_> {
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
            Task::Wait(_) | Task::WaitUntil(_) | Task::Signal(_) => {}
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
        let participant = publisher::service(self.services, field, service)?;
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
        request::misfit(call, Target::of(call)).map_or(Ok(()), |(member, why)| {
            Err(Rejection { reason: Reason::InvalidSaga, message: format!("{field}.{member}: {why}") })
        })
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
fn start(object: &Saga, observed: &Observed) -> Result<Option<Box<Start>>, Rejection> {
    let Some(start) = &object.spec.start_on else { return Ok(None) };
    publisher::service(observed, "spec.startOn", &start.service)?;
    let sink = publisher::sink(observed, "spec.startOn", &start.service, Use::Start)?;
    Ok(Some(Box::new(Start {
        service: start.service.clone(),
        event_type: start.event.clone(),
        since: object.creation_timestamp().map(|created| created.0),
        sink,
    })))
}

fn method_name(method: HttpMethod) -> &'static str {
    match method {
        HttpMethod::Post => "POST",
        HttpMethod::Put => "PUT",
        HttpMethod::Patch => "PATCH",
        HttpMethod::Get => "GET",
        HttpMethod::Delete => "DELETE",
    }
}
