//! A Saga lowered into what the engine runs: names become addresses, durations become milliseconds.

use std::collections::BTreeMap;

use kube::{ResourceExt, core::Duration};

use super::{
    choreography,
    publisher::{self, Use},
};
use crate::{
    api::v1alpha1::{
        HttpCommand, HttpMethod, Microservice, Protocol, Retry, Saga, SagaCommand, SagaSpec, SagaStep, SagaStyle, Undo,
    },
    controllers::{
        kinds::saga::{Defined, Observed, Start},
        render::milliseconds,
        resources::{plan::Rejection, reason::Reason},
    },
    domain::saga::{
        definition::{Call, Definition, RetryPolicy, Step},
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
    if spec.style == SagaStyle::Choreography {
        return choreography::define(object, observed).map(Defined::Choreographed);
    }
    let mut findings = negative_durations(spec);
    findings.extend(lint::lint(&lint_spec(spec)).iter().map(ToString::to_string));
    if !findings.is_empty() {
        return Err(Rejection { reason: Reason::InvalidSaga, message: findings.join("; ") });
    }
    let namespace = object.namespace().unwrap_or_default();
    let participants = Participants { namespace, services: observed, deadline: spec.deadline };
    let definition = Definition {
        name: object.name_any(),
        version: String::new(),
        deadline_ms: milliseconds(spec.deadline),
        input: spec.input.clone(),
        steps: spec
            .steps
            .iter()
            .enumerate()
            .map(|(index, step)| lower_step(&format!("spec.steps[{index}]"), step, &participants))
            .collect::<Result<_, _>>()?,
        on_compensated: spec
            .on_compensated
            .as_ref()
            .map(|command| participants.call("spec.onCompensated", command))
            .transpose()?,
    };
    Ok(Defined::Orchestrated { definition: definition.seal(), start: start(object, observed)? })
}

fn lower_step(field: &str, step: &SagaStep, participants: &Participants<'_>) -> Result<Step, Rejection> {
    let undo = step.undo.as_ref().and_then(command_of);
    Ok(Step {
        name: step.name.clone(),
        pivot: step.pivot,
        action: participants.call(&format!("{field}.do"), &step.action)?,
        undo: undo.map(|command| participants.call(&format!("{field}.undo"), &command)).transpose()?,
        timeout_ms: milliseconds(step.timeout),
        retry: retry_policy(&step.retry),
        failures: step.failures.clone(),
    })
}

/// The Microservices that a Saga names, as its calls find them.
struct Participants<'a> {
    namespace: String,
    services: &'a Observed,
    deadline: Duration,
}

impl Participants<'_> {
    fn call(&self, field: &str, asked: &SagaCommand) -> Result<Call, Rejection> {
        let SagaCommand { service, command, with } = asked;
        let participant = publisher::service(self.services, field, service)?;
        let Some(found) = participant.spec.commands.get(command) else {
            return Err(unknown_command(field, asked, participant));
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
        Ok(Call {
            service: service.clone(),
            command: command.clone(),
            method: method_name(*method).to_owned(),
            url: format!("http://{service}.{}.svc:{}{path}", self.namespace, port.port),
            with: with.clone(),
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

fn unknown_command(field: &str, asked: &SagaCommand, participant: &Microservice) -> Rejection {
    let SagaCommand { service, command, .. } = asked;
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
    }
}

fn retry_policy(retry: &Retry) -> RetryPolicy {
    RetryPolicy {
        max_attempts: u32::try_from(retry.max_attempts).unwrap_or(0),
        initial_backoff_ms: milliseconds(retry.initial_backoff),
        max_backoff_ms: milliseconds(retry.max_backoff),
    }
}

/// `None` when there is nothing to undo.
fn command_of(undo: &Undo) -> Option<SagaCommand> {
    let Undo { none, service, command, with } = undo;
    (!none).then(|| SagaCommand {
        service: service.clone().unwrap_or_default(),
        command: command.clone().unwrap_or_default(),
        with: with.clone(),
    })
}

fn lint_spec(spec: &SagaSpec) -> lint::Spec {
    lint::Spec {
        deadline_ms: milliseconds(spec.deadline),
        input: spec.input.clone(),
        steps: spec.steps.iter().map(lint_step).collect(),
        on_compensated: spec.on_compensated.as_ref().map(lint_call),
    }
}

fn lint_step(step: &SagaStep) -> lint::Step {
    lint::Step {
        name: step.name.clone(),
        pivot: step.pivot,
        action: lint_call(&step.action),
        undo: match step.undo.as_ref().map(command_of) {
            None => lint::Undo::Missing,
            Some(None) => lint::Undo::Nothing,
            Some(Some(command)) => lint::Undo::Call(lint_call(&command)),
        },
        timeout_ms: milliseconds(step.timeout),
        retry: retry_policy(&step.retry),
        failures: step.failures.clone(),
    }
}

fn lint_call(command: &SagaCommand) -> lint::Call {
    let SagaCommand { service, command, with } = command.clone();
    lint::Call { service, command, with }
}

/// A negative duration has no form in milliseconds, so it is found here.
fn negative_durations(spec: &SagaSpec) -> Vec<String> {
    let mut durations =
        BTreeMap::from([("spec.deadline".to_owned(), spec.deadline), ("spec.retention".to_owned(), spec.retention)]);
    for (index, step) in spec.steps.iter().enumerate() {
        let field = format!("spec.steps[{index}]");
        durations.insert(format!("{field}.timeout"), step.timeout);
        durations.insert(format!("{field}.retry.initialBackoff"), step.retry.initial_backoff);
        durations.insert(format!("{field}.retry.maxBackoff"), step.retry.max_backoff);
    }
    let negative = durations.into_iter().filter(|(_, duration)| duration.is_negative());
    negative.map(|(field, duration)| format!("{field}: {duration} is negative; give a duration such as `2s`")).collect()
}
