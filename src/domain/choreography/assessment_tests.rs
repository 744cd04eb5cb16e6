use super::*;
use crate::domain::choreography::definition::Reaction;

fn graph() -> Graph {
    let reaction = |on: Kind, service: &str, emits: &[&str]| Reaction {
        to: on,
        and: Vec::new(),
        service: service.to_owned(),
        emits: emits.iter().map(|&event| event.to_owned()).collect(),
        within_ms: 5_000,
    };
    let created = Kind::new("orders", "OrderCreated");
    Graph::new(Definition {
        name: "create-order".to_owned(),
        version: String::new(),
        start: created.clone(),
        reactions: vec![
            reaction(created, "customers", &["CreditReserved", "CreditLimitExceeded"]),
            reaction(Kind::new("customers", "CreditReserved"), "orders", &["OrderApproved"]),
            reaction(Kind::new("customers", "CreditLimitExceeded"), "orders", &["OrderRejected"]),
        ],
        completes: vec![Kind::new("orders", "OrderApproved")],
        compensates: vec![Kind::new("orders", "OrderRejected")],
    })
}

fn instance(events: &[(&str, &str, Option<&str>, i64)]) -> Instance {
    let mut instance = Instance::default();
    for &(service, event, cause, at) in events {
        let cause = cause.map(ToOwned::to_owned);
        assert!(instance.observe(Seen { kind: Kind::new(service, event), id: event.to_owned(), cause, at }));
    }
    instance
}

#[test]
fn who_owes_what_since_when_is_known_until_the_end() {
    let graph = graph();
    let mut so_far = vec![("orders", "OrderCreated", None, 1_000)];
    let assessment = assess(&graph, &instance(&so_far));
    assert_eq!(assessment.owed, [Owed { reaction: 0, to: 0, since: 1_000, due: 6_000 }]);
    assert_eq!(assessment.status(6_000), Status::Running);
    assert_eq!(assessment.status(6_001), Status::Stuck);
    so_far.push(("customers", "CreditLimitExceeded", Some("OrderCreated"), 2_000));
    let assessment = assess(&graph, &instance(&so_far));
    assert_eq!(assessment.owed, [Owed { reaction: 2, to: 1, since: 2_000, due: 7_000 }]);
    assert_eq!(assessment.status(6_001), Status::Compensating, "it can only end undone");
    so_far.push(("orders", "OrderRejected", Some("CreditLimitExceeded"), 7_500));
    let assessment = assess(&graph, &instance(&so_far));
    assert_eq!(assessment.end, Some(End { status: Status::Compensated, at: 7_500 }));
    assert_eq!(assessment.verdicts.last(), Some(&Verdict::Reaction { to: 1, late_ms: Some(500) }));
}

#[test]
fn events_that_name_no_cause_are_taken_as_what_is_owed() {
    let events = [
        ("customers", "CreditReserved", None, 2_000),
        ("orders", "OrderApproved", None, 3_000),
        ("orders", "OrderCreated", None, 1_000),
    ];
    assert_eq!(assess(&graph(), &instance(&events[..2])).verdicts, [Verdict::CauseUnseen; 2]);
    let assessment = assess(&graph(), &instance(&events));
    assert_eq!(assessment.end, Some(End { status: Status::Completed, at: 3_000 }));
    let late_ms = None;
    let expected = [Verdict::Start, Verdict::Reaction { to: 0, late_ms }, Verdict::Reaction { to: 1, late_ms }];
    assert_eq!(assessment.verdicts, expected);
}

#[test]
fn what_a_person_skips_is_owed_no_longer() {
    let mut instance = instance(&[("orders", "OrderCreated", None, 1_000)]);
    instance.skipped_at = Some(9_000);
    assert_eq!(assess(&graph(), &instance).end, Some(End { status: Status::Completed, at: 9_000 }));
    instance.skipped_at = Some(500);
    assert_eq!(assess(&graph(), &instance).end, None, "it was skipped before this was owed");
}

#[test]
fn a_correlation_with_too_many_events_is_kept_to_a_size() {
    let mut instance = Instance::default();
    for number in 0..1_000 {
        let kind = Kind::new("orders", "OrderViewed");
        instance.observe(Seen { kind, id: number.to_string(), cause: None, at: number });
    }
    assert_eq!(instance.events().len(), super::super::instance::MAX_EVENTS);
}
