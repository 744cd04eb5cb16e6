//! A choreographed Saga lowered into what the tracker follows.

use std::collections::BTreeMap;

use kube::ResourceExt;

use super::publisher;
use crate::{
    api::v1alpha1::{Saga, SagaEvent, SagaReaction},
    controllers::{
        kinds::{
            outbox_relay::published::Use,
            saga::{Followed, Observed},
        },
        render::milliseconds,
        resources::{plan::Rejection, reason::Reason},
    },
    domain::choreography::{
        definition::{Definition, Kind, Reaction},
        lint,
    },
};

/// The definition of a choreographed Saga, or everything that is wrong with it in one sentence each.
pub fn define(object: &Saga, observed: &Observed) -> Result<Followed, Rejection> {
    let spec = &object.spec;
    let start = spec.start_on.as_ref().map(|start| Kind::new(&start.service, &start.event)).unwrap_or_default();
    let definition = Definition {
        name: object.name_any(),
        version: String::new(),
        start,
        reactions: spec.reactions.iter().map(reaction).collect(),
        completes: spec.completes.iter().map(kind).collect(),
        compensates: spec.compensates.iter().map(kind).collect(),
    };
    let findings: Vec<_> = lint::lint(&definition).iter().map(ToString::to_string).collect();
    if !findings.is_empty() {
        return Err(Rejection { reason: Reason::InvalidSaga, message: findings.join("; ") });
    }
    let reacting = spec.reactions.iter().enumerate();
    let reacting = reacting.map(|(index, reaction)| (format!("spec.reactions[{index}]"), reaction.service.as_str()));
    let named = spec.start_on.iter().map(|start| ("spec.startOn".to_owned(), start.service.as_str())).chain(reacting);
    let mut sinks = BTreeMap::new();
    for (field, service) in named {
        publisher::service(observed, &field, service)?;
        sinks.insert(service.to_owned(), publisher::sink(observed, &field, service, Use::Follow)?);
    }
    let since = object.creation_timestamp().map(|created| created.0);
    Ok(Followed { definition: definition.seal(), since, sinks })
}

fn kind(event: &SagaEvent) -> Kind {
    Kind::new(&event.service, &event.event)
}

/// A negative duration has no form in milliseconds and becomes zero, which the lint finds.
fn reaction(reaction: &SagaReaction) -> Reaction {
    let SagaReaction { to, and, service, emits, within } = reaction;
    Reaction {
        to: kind(to),
        and: and.iter().map(kind).collect(),
        service: service.clone(),
        emits: emits.clone(),
        within_ms: if within.is_negative() { 0 } else { milliseconds(*within) },
    }
}
