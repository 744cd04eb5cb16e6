//! The representation of a watched instance in the API.

use super::row::{Row, timestamp};
use crate::{
    domain::{
        choreography::assessment::{Assessment, Graph, Verdict, assess},
        saga::event::Audit,
    },
    saga::view::{Detail, Owed, Transition, View},
};

pub(super) fn view(row: &Row, graph: &Graph) -> View {
    of(row, graph, &assess(graph, &row.instance))
}

fn of(row: &Row, graph: &Graph, assessment: &Assessment) -> View {
    let owed = assessment.owed.iter().filter_map(|owed| {
        let reaction = graph.definition.reactions.get(owed.reaction)?;
        Some(Owed {
            service: reaction.service.clone(),
            events: reaction.emits.clone(),
            to: row.instance.events().get(owed.to)?.kind.event.clone(),
            since: timestamp(owed.since),
            due: timestamp(owed.due),
        })
    });
    let is_owed = row.ended_at.is_none();
    View {
        id: row.id,
        saga: row.saga.clone(),
        version: row.version.clone(),
        key: None,
        state: row.status(),
        paused: false,
        overdue: false,
        started_at: row.started_at,
        ended_at: row.ended_at,
        current: Vec::new(),
        failure: None,
        output: None,
        correlation_id: Some(row.correlation.clone()),
        owed: owed.filter(|_| is_owed).collect(),
    }
}

pub(super) fn detail(row: &Row, graph: &Graph) -> Detail {
    let assessment = assess(graph, &row.instance);
    let events = row.instance.events();
    let history = events.iter().zip(&assessment.verdicts).map(|(event, verdict)| {
        let (outcome, to, late) = match *verdict {
            Verdict::Start => ("started", None, None),
            Verdict::Reaction { to, late_ms: None } => ("in time", Some(to), None),
            Verdict::Reaction { to, late_ms: Some(late) } => ("late", Some(to), Some(late)),
            Verdict::CauseUnseen => ("cause not seen", None, None),
            Verdict::Undeclared { to } => ("undeclared", to, None),
            Verdict::Repeated { to } => ("repeated", to, None),
        };
        let cause = to.and_then(|to| events.get(to));
        let reaction = cause.map(|cause| format!("in reaction to {}", cause.kind.event));
        let late = late.map(|late| format!("{:.1} s too late", std::time::Duration::from_millis(late).as_secs_f64()));
        let message = reaction.into_iter().chain(late).collect::<Vec<_>>().join(", ");
        Transition {
            time: timestamp(event.at),
            step: Some(event.kind.service.clone()),
            operation: Some(event.kind.event.clone()),
            attempt: None,
            outcome: outcome.to_owned(),
            code: None,
            message: Some(message).filter(|message| !message.is_empty()),
            reply: None,
            audit: Audit::default(),
            event_id: Some(event.id.clone()),
            causation_id: event.cause.clone(),
            state: row.status(),
        }
    });
    Detail { view: of(row, graph, &assessment), input: serde_json::Value::Null, history: history.collect() }
}
