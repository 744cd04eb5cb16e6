//! Instances as people read them.

use std::fmt::Write as _;

use crate::{
    domain::saga::event::Audit,
    output,
    saga::view::{Current, Detail, Owed, Transition, View},
};

pub(super) fn table(views: &[View]) -> String {
    let head = ["ID", "KEY", "STATE", "STEP", "STARTED", "REASON"].map(str::to_owned);
    let rows = views.iter().map(|view| {
        // of many, what needs a person is said first
        let current = view.current.iter().find(|current| current.stuck.is_some()).or(view.current.first());
        let step = current.map_or_else(
            || owed(view),
            |current| match view.current.len() {
                1 => in_progress(current),
                count => format!("{}, and {} more", in_progress(current), count - 1),
            },
        );
        let stuck = current.and_then(|current| current.stuck.clone());
        let reason = stuck.or_else(|| view.failure.as_ref().map(|failure| failure.reason.clone())).unwrap_or_default();
        [
            view.id.to_string(),
            view.key.clone().unwrap_or_default(),
            state(view),
            step,
            format!("{:.0}", view.started_at),
            reason,
        ]
    });
    output::columns(std::iter::once(head).chain(rows).collect())
}

/// `customers owes CreditReserved or CreditLimitExceeded`, of the most urgent that is owed.
fn owed(view: &View) -> String {
    let more = if view.owed.len() > 1 { format!(", and {} more", view.owed.len() - 1) } else { String::new() };
    let first = view.owed.first();
    first.map_or_else(String::new, |owed| format!("{} owes {}{more}", owed.service, owed.events.join(" or ")))
}

fn in_progress(current: &Current) -> String {
    let attempt = if current.attempt > 1 { format!(" (attempt {})", current.attempt) } else { String::new() };
    format!("{} {}{attempt}", current.operation, current.step)
}

pub(super) fn state(view: &View) -> String {
    let mut text = view.state.as_str().to_owned();
    for (flag, suffix) in [(view.paused, " (paused)"), (view.overdue, " (overdue)")] {
        if flag {
            text.push_str(suffix);
        }
    }
    text
}

pub(super) fn history(detail: &Detail) -> String {
    let view = &detail.view;
    let mut text = format!(
        "Saga:     {} (version {})\nInstance: {}\nState:    {}\n",
        view.saga,
        view.version,
        view.id,
        state(view)
    );
    if let Some(key) = &view.key {
        let _ = writeln!(text, "Key:      {key}");
    }
    for current in &view.current {
        let until = current.until.map_or_else(String::new, |until| format!(", until {until:.0}"));
        let _ = writeln!(text, "Current:  {} {}, attempt {}{until}", current.operation, current.step, current.attempt);
        if let Some(stuck) = &current.stuck {
            let next = if current.waits_for_a_person {
                "waits for `retry`, `skip` or `cancel`"
            } else {
                "is retried automatically"
            };
            let _ = writeln!(text, "Stuck:    {stuck}; {next}");
        }
    }
    if let Some(failure) = &view.failure {
        let _ = writeln!(text, "Failure:  {} at {}: {}", failure.reason, failure.step, failure.message);
    }
    for Owed { service, events, to, since, due } in &view.owed {
        let events = events.join(" or ");
        let _ = writeln!(text, "Owed:     {service} owes {events} to {to} since {since:.3}, due {due:.3}");
    }
    let head = if let Some(correlation) = &view.correlation_id {
        let _ = writeln!(text, "Events:   of correlation {correlation}\n");
        ["TIME", "SERVICE", "EVENT", "OUTCOME", "DETAIL"]
    } else {
        let _ = writeln!(text, "Input:    {}", detail.input);
        if let Some(output) = &view.output {
            let _ = writeln!(text, "Output:   {output}");
        }
        text.push('\n');
        ["TIME", "STEP", "OPERATION", "OUTCOME", "DETAIL"]
    };
    let head = head.map(str::to_owned);
    text.push_str(&output::columns(std::iter::once(head).chain(detail.history.iter().map(row)).collect()));
    text
}

/// Without a head.
pub(super) fn transitions(transitions: &[Transition]) -> String {
    output::columns(transitions.iter().map(row).collect())
}

fn row(transition: &Transition) -> [String; 5] {
    [
        format!("{:.3}", transition.time),
        transition.step.clone().unwrap_or_default(),
        transition.operation.clone().unwrap_or_default(),
        outcome(transition),
        explanation(transition),
    ]
}

fn explanation(transition: &Transition) -> String {
    let text =
        [transition.code.clone(), transition.message.clone()].into_iter().flatten().collect::<Vec<_>>().join(": ");
    let id = transition.event_id.as_ref().map(|id| format!("id {id}"));
    let Audit { by, reason } = &transition.audit;
    let by = by.as_ref().map(|by| format!("by {by}"));
    let audit = by.into_iter().chain(reason.clone()).collect::<Vec<_>>().join(": ");
    [text, audit].into_iter().filter(|text| !text.is_empty()).chain(id).collect::<Vec<_>>().join("; ")
}

fn outcome(transition: &Transition) -> String {
    match transition.attempt {
        Some(attempt) if attempt > 1 => format!("{} (attempt {attempt})", transition.outcome),
        _ => transition.outcome.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choreography_s_history_says_who_owes_what() {
        let detail: Detail = serde_json::from_value(serde_json::json!({
            "id": "0192f3a4-0000-5000-8000-000000000001", "saga": "create-order", "version": "1f2e", "correlationId": "c-1",
            "state": "Stuck", "startedAt": "2026-11-23T12:04:00Z",
            "owed": [{"service": "customers", "events": ["CreditReserved", "CreditLimitExceeded"], "to": "OrderCreated",
                      "since": "2026-11-23T12:04:00Z", "due": "2026-11-23T12:04:05Z"}],
            "history": [
                {"time": "2026-11-23T12:04:00Z", "step": "orders", "operation": "OrderCreated", "outcome": "started", "state": "Stuck"},
                {"time": "2026-11-23T12:04:01Z", "step": "customers", "operation": "CreditChecked", "outcome": "undeclared",
                 "message": "in reaction to OrderCreated", "eventId": "7", "state": "Stuck"},
            ],
        }))
        .unwrap();
        insta::assert_snapshot!(history(&detail), @r"
        Saga:     create-order (version 1f2e)
        Instance: 0192f3a4-0000-5000-8000-000000000001
        State:    Stuck
        Owed:     customers owes CreditReserved or CreditLimitExceeded to OrderCreated since 2026-11-23T12:04:00.000Z, due 2026-11-23T12:04:05.000Z
        Events:   of correlation c-1

        TIME                       SERVICE     EVENT           OUTCOME      DETAIL
        2026-11-23T12:04:00.000Z   orders      OrderCreated    started
        2026-11-23T12:04:01.000Z   customers   CreditChecked   undeclared   in reaction to OrderCreated; id 7
        ");
        assert!(table(&[detail.view]).contains("Stuck   customers owes CreditReserved or CreditLimitExceeded   "));
    }

    #[test]
    fn a_history_reads_from_top_to_bottom() {
        let detail: Detail = serde_json::from_value(serde_json::json!({
            "id": "0192f3a4-0000-7000-8000-000000000001", "saga": "create-order", "version": "1f2e", "key": "o-1",
            "state": "Compensated", "startedAt": "2026-11-23T10:00:00Z", "endedAt": "2026-11-23T10:00:01Z",
            "failure": {"step": "reserve-credit", "code": "CreditLimitExceeded", "reason": "INSUFFICIENT_CREDIT", "message": "120 > 100"},
            "input": {"orderId": "o-1"}, "output": {"total": 120},
            "history": [
                {"time": "2026-11-23T10:00:00Z", "outcome": "started", "state": "Running"},
                {"time": "2026-11-23T10:00:00.5Z", "step": "reserve-credit", "operation": "do", "attempt": 2, "outcome": "failed",
                 "code": "CreditLimitExceeded", "message": "120 > 100", "state": "Compensating"},
            ],
        }))
        .unwrap();
        insta::assert_snapshot!(history(&detail), @r#"
        Saga:     create-order (version 1f2e)
        Instance: 0192f3a4-0000-7000-8000-000000000001
        State:    Compensated
        Key:      o-1
        Failure:  INSUFFICIENT_CREDIT at reserve-credit: 120 > 100
        Input:    {"orderId":"o-1"}
        Output:   {"total":120}

        TIME                       STEP             OPERATION   OUTCOME              DETAIL
        2026-11-23T10:00:00.000Z                                started
        2026-11-23T10:00:00.500Z   reserve-credit   do          failed (attempt 2)   CreditLimitExceeded: 120 > 100
        "#);
    }
}
