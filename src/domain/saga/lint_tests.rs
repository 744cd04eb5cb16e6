use super::*;
use crate::domain::saga::{
    definition::{ForEach, Signal, Wait},
    expression,
};

fn call(with: &[(&str, &str)]) -> Call {
    Call {
        service: "customers".into(),
        command: "ReserveCredit".into(),
        with: with.iter().map(|(name, source)| ((*name).to_owned(), (*source).to_owned())).collect(),
        ..Call::default()
    }
}

fn transaction() -> Transaction {
    Transaction { action: call(&[("id", "input.id")]), timeout_ms: 2_000, ..Transaction::default() }
}

fn step(name: &str, transaction: Transaction) -> Step {
    Step { name: name.into(), task: Task::call(transaction), ..Step::default() }
}

fn good() -> Definition {
    let reserve = Transaction {
        undo: Undo::Call(call(&[("id", "input.id"), ("why", "failure.reason")])),
        failures: [("CreditLimitExceeded".to_owned(), "INSUFFICIENT_CREDIT".to_owned())].into(),
        ..transaction()
    };
    let charge = Transaction { pivot: true, undo: Undo::Missing, ..transaction() };
    let approve = Transaction {
        undo: Undo::Missing,
        action: call(&[
            ("reservation", r#"steps["reserve-credit"].reply.id"#),
            ("lines", "input.lines.map(l, l.n + 1)"),
        ]),
        ..transaction()
    };
    Definition {
        deadline_ms: 60_000,
        steps: vec![step("reserve-credit", reserve), step("charge", charge), step("approve", approve)],
        on_compensated: Some(call(&[("why", "failure.reason")])),
        ..Definition::default()
    }
}

/// The transaction of a step at the top.
fn of(definition: &mut Definition, index: usize) -> &mut Transaction {
    definition.steps[index].transaction_mut().unwrap()
}

/// The one finding that a change to the good saga leads to.
fn finding(change: impl FnOnce(&mut Definition)) -> String {
    let mut definition = good();
    change(&mut definition);
    let findings: Vec<String> = lint(&definition).iter().map(ToString::to_string).collect();
    assert_eq!(findings.len(), 1, "{findings:#?}");
    findings.into_iter().next().unwrap()
}

fn with(source: &str) -> Call {
    call(&[("x", source)])
}

#[test]
fn a_good_saga_has_no_findings() {
    assert_eq!(lint(&good()), []);
}

#[test]
fn a_step_before_the_pivot_defines_how_it_is_undone() {
    let message = finding(|spec| of(spec, 0).undo = Undo::Missing);
    assert!(message.starts_with("spec.steps[0].undo: step `reserve-credit` comes before the pivot"), "{message}");
    let mut without_pivot = good();
    of(&mut without_pivot, 1).pivot = false;
    assert_eq!(lint(&without_pivot).len(), 2, "both later steps are before a pivot that does not exist");
}

#[test]
fn a_step_is_undone_where_it_was_done() {
    let message = finding(|spec| {
        let elsewhere = Call { service: "ledger".into(), ..with("input.id") };
        of(spec, 0).undo = Undo::Call(elsewhere);
    });
    assert_eq!(
        message,
        "spec.steps[0].undo.service: step `reserve-credit` is done in `customers` and undone in `ledger`, whose database \
         has no record of it, so `weft.enter` would undo nothing there; undo it in `customers`, and give `ledger` a step of \
         its own"
    );
}

#[test]
fn the_input_s_schema_is_one_and_lists_what_is_read() {
    let schema = serde_json::json!({"properties": {"id": {"type": "string"}, "lines": {"type": "array"}}});
    let mut described = good();
    described.input = Some(schema.clone());
    assert_eq!(lint(&described), []);
    let message = finding(|spec| spec.input = Some(serde_json::json!({"type": "objekt"})));
    assert!(message.starts_with("spec.input: is not a JSON Schema: /type"), "{message}");
    let message = finding(|spec| {
        spec.input = Some(schema);
        of(spec, 1).action = with("input.total + 1");
    });
    let wanted = "spec.steps[1].do.with.x: `input.total` is not in spec.input, which has no property `total` there";
    assert!(message.starts_with(wanted), "{message}");
}

#[test]
fn nothing_after_the_pivot_is_undone() {
    let mut asked = good();
    of(&mut asked, 1).undo = Undo::Call(with("input.id"));
    assert_eq!(lint(&asked), [], "the undo of a pivot asks whether it happened");
    let message = finding(|spec| of(spec, 2).undo = Undo::Call(with("input.id")));
    assert!(message.starts_with("spec.steps[2].undo: step `approve` comes after the pivot"), "{message}");
}

#[test]
fn nothing_after_the_pivot_can_fail() {
    let message = finding(|spec| of(spec, 2).failures = [("Refused".to_owned(), "NO".to_owned())].into());
    assert!(
        message
            .starts_with("spec.steps[2].failures: step `approve` comes after the pivot and may not fail, yet Refused"),
        "{message}"
    );
}

#[test]
fn names_are_there_unique_and_plain() {
    assert!(
        finding(|spec| spec.steps[2].name = "charge".into())
            .starts_with("spec.steps[2].name: `charge` is the name of spec.steps[1]")
    );
    assert!(finding(|spec| spec.steps[2].name = String::new()).starts_with("spec.steps[2].name: a step needs a name"));
    assert!(finding(|spec| spec.steps[2].name = "a/b".into()).starts_with("spec.steps[2].name: `a/b` may hold"));
}

#[test]
fn there_is_one_pivot_at_most() {
    assert!(finding(|spec| of(spec, 2).pivot = true).starts_with("spec.steps[2].pivot: `charge` is the pivot already"));
}

#[test]
fn times_fit_into_each_other() {
    let message = finding(|spec| of(spec, 1).timeout_ms = 90_500);
    assert!(
        message.starts_with("spec.steps[1].timeout: one attempt may take 90500ms and the whole saga only 60s"),
        "{message}"
    );
    assert!(finding(|spec| of(spec, 1).timeout_ms = 0).starts_with("spec.steps[1].timeout: 0s"));
    assert!(finding(|spec| spec.deadline_ms = 0).starts_with("spec.deadline: 0s"));
    assert!(finding(|spec| of(spec, 1).retry.max_attempts = 0).starts_with("spec.steps[1].retry.maxAttempts: 0"));
    assert!(
        finding(|spec| of(spec, 1).retry.initial_backoff_ms = 60_000)
            .starts_with("spec.steps[1].retry.initialBackoff: 60s")
    );
}

#[test]
fn a_saga_has_steps_and_a_call_has_an_address() {
    let empty = Definition { deadline_ms: 1, ..Definition::default() };
    assert_eq!(lint(&empty).first().map(|f| f.field.as_str()), Some("spec.steps"));
    assert!(
        finding(|spec| of(spec, 0).action.service = String::new()).starts_with("spec.steps[0].do.service: no service")
    );
    assert!(
        finding(|spec| spec.on_compensated.as_mut().unwrap().command = String::new())
            .starts_with("spec.onCompensated.command:")
    );
}

#[test]
fn broken_expressions_are_found() {
    let message = finding(|spec| of(spec, 1).action = with("input.total +"));
    assert!(message.starts_with("spec.steps[1].do.with.x: `input.total +` is not a CEL expression: "), "{message}");
    let message = finding(|spec| of(spec, 1).action = with(&"1+".repeat(600)));
    assert!(message.contains("has 1200 characters"), "{message}");
}

#[test]
fn unknown_variables_functions_and_members_are_found() {
    assert!(finding(|spec| of(spec, 1).action = with("inptu.total")).contains("`inptu` is not a variable"));
    assert!(finding(|spec| of(spec, 1).action = with("uuid()")).contains("`uuid` is not a function"));
    assert!(finding(|spec| of(spec, 1).action = with("failure.reason")).contains("`failure` is known only in"));
    assert!(finding(|spec| of(spec, 1).action = with("steps")).contains("used as a whole"));
    assert!(
        finding(|spec| of(spec, 1).action = with(r#"steps["reserve-credit"].body"#))
            .contains("has a `reply` and nothing else")
    );
    assert_eq!(
        lint(&{
            let mut spec = good();
            of(&mut spec, 1).action = with("input.lines.all(inptu, inptu.n > 0)");
            spec
        }),
        [],
        "a macro declares its variable"
    );
}

#[test]
fn what_the_interpreter_does_not_survive_is_refused() {
    for (source, part) in [
        ("size{a: 1}", "`size{…}` makes a message and there are none"),
        ("{'a': [size(size{})]}", "`size{…}` makes a message"),
        ("bytes(input.a).contains(bytes(input.b))", "`bytes` is not a function"),
        ("b'abc'.contains(b'')", "bytes have no JSON form"),
    ] {
        let message = finding(|spec| of(spec, 1).action = with(source));
        assert!(message.contains(part), "{source}: {message}");
        let refused = expression::Expression::compile(source).unwrap_err().to_string();
        assert!(refused.starts_with("is not allowed: ") && refused.contains(part), "{source}: {refused}");
    }
}

#[test]
fn a_reply_is_used_only_where_it_exists() {
    assert!(finding(|spec| of(spec, 1).action = with("steps.approve.reply.id")).contains("is not there yet"));
    assert!(finding(|spec| of(spec, 1).action = with("steps.charge.reply.id")).contains("is not there yet"));
    assert!(
        finding(|spec| of(spec, 1).action = with("steps.nothing.reply"))
            .contains("`nothing` is not a step; there are `reserve-credit`, `charge`, `approve`")
    );
    assert!(
        finding(|spec| of(spec, 0).undo = Undo::Call(with("steps.charge.reply.id"))).contains("later step `charge`")
    );
    assert!(
        finding(|spec| of(spec, 0).undo = Undo::Call(with(r#"steps["reserve-credit"].reply.id"#)))
            .contains("outcome is unknown")
    );
    assert!(finding(|spec| spec.on_compensated = Some(with("steps.charge.reply.id"))).contains("may not have run"));
    let mut guarded = good();
    guarded.on_compensated = Some(with("has(steps.charge.reply) ? steps.charge.reply.id : 0"));
    assert_eq!(lint(&guarded), []);
}

#[test]
fn a_dash_in_a_path_is_explained() {
    let mut spec = good();
    of(&mut spec, 2).action = with("steps.reserve-credit.reply.id");
    let message = lint(&spec).iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert!(message.contains(r#"written `steps["reserve-credit"].reply`"#), "{message}");
}

/// `book` and, at the same time, `hold` and `seat`; then `each` for each item, `maybe` on a condition, and the pivot.
fn tree() -> Definition {
    let undone = || Transaction { undo: Undo::Call(call(&[("id", "input.id")])), ..transaction() };
    let sequence = Step {
        name: "stay".into(),
        task: Task::Steps(vec![step("hold", undone()), step("seat", undone())]),
        ..Step::default()
    };
    let group =
        Step { name: "reserve".into(), task: Task::All(vec![step("book", undone()), sequence]), ..Step::default() };
    let each = Step {
        for_each: Some(ForEach { items: "input.lines".into(), concurrency: 2 }),
        ..step("each", Transaction { action: call(&[("n", "item.n + steps.book.reply.n")]), ..undone() })
    };
    let maybe = Step {
        when: Some("size(steps.each.reply) > 1".into()),
        otherwise: vec![step("other", undone())],
        ..step("maybe", undone())
    };
    let wait = Step { name: "cool".into(), task: Task::Wait(Wait { duration_ms: 1_000 }), ..Step::default() };
    let paid = Step { name: "paid".into(), task: Task::Signal(Signal { within_ms: Some(1_000) }), ..Step::default() };
    let charge = step("charge", Transaction { pivot: true, action: with("steps.paid.reply.sum"), ..transaction() });
    let ship =
        step("ship", Transaction { action: with("has(steps.maybe.reply) ? steps.maybe.reply.x : 0"), ..transaction() });
    let steps = vec![group, each, maybe, wait, paid, charge, ship];
    Definition { deadline_ms: 60_000, steps, ..Definition::default() }
}

/// The findings of a change to the tree.
fn findings(change: impl FnOnce(&mut Definition)) -> Vec<String> {
    let mut definition = tree();
    change(&mut definition);
    lint(&definition).iter().map(ToString::to_string).collect()
}

/// The steps of a group at the top.
fn group(definition: &mut Definition, index: usize) -> &mut Vec<Step> {
    match &mut definition.steps[index].task {
        Task::All(steps) | Task::Steps(steps) => steps,
        other => panic!("{other:?}"),
    }
}

fn within(steps: &mut [Step], index: usize) -> &mut Transaction {
    steps[index].transaction_mut().unwrap()
}

fn nested_each(definition: &mut Definition) {
    let each = definition.steps[1].for_each.clone();
    group(definition, 0)[0].for_each.clone_from(&each);
    definition.steps[0].for_each = each;
}

#[test]
fn a_good_tree_has_no_findings() {
    assert_eq!(lint(&tree()), []);
}

#[test]
fn a_tree_is_refused_with_the_field_and_the_remedy() {
    type Change = fn(&mut Definition);
    let cases: &[(Change, &str)] = &[
        (
            |d| group(d, 0).clear(),
            "spec.steps[0].all: a group without steps does nothing; give at least one step, or remove it",
        ),
        (
            |d| within(group(d, 0), 0).undo = Undo::Missing,
            "spec.steps[0].all[0].undo: step `book` comes before the pivot and does not define how it is undone",
        ),
        (
            |d| group(d, 0)[0].name = "charge".into(),
            "spec.steps[5].name: `charge` is the name of spec.steps[0].all[0] already",
        ),
        (
            |d| within(group(d, 0), 0).pivot = true,
            "spec.steps[0].all[0].pivot: every instance turns at its pivot, alone; make `book` a step of spec.steps, without `when` and `forEach`",
        ),
        (|d| d.steps[5].when = Some("input.x".into()), "spec.steps[5].pivot: every instance turns at its pivot, alone"),
        (
            |d| d.steps[2].when = None,
            "spec.steps[2].else: there is no `when` that could be false; add one, or move these steps out of `else`",
        ),
        (
            |d| d.steps[1].for_each.as_mut().unwrap().concurrency = 0,
            "spec.steps[1].forEach.concurrency: 0 items at a time never begin; give at least 1",
        ),
        (nested_each, "spec.steps[0].all[0].forEach: `book` is in a `forEach` already"),
        (
            |d| d.steps[1].for_each.as_mut().unwrap().items = "item.lines".into(),
            "spec.steps[1].forEach.items: `item` is known only in a step that has a `forEach`, or that is in one",
        ),
        (
            |d| of(d, 5).action = with("item"),
            "spec.steps[5].do.with.x: `item` is known only in a step that has a `forEach`",
        ),
        (|d| d.steps[2].when = Some("input.".into()), "spec.steps[2].when: `input.` is not a CEL expression"),
        (
            |d| d.steps[2].when = Some("steps.ship.reply.x".into()),
            "spec.steps[2].when: the reply of `ship` is not there yet",
        ),
        (
            |d| d.steps[4].for_each = d.steps[1].for_each.clone(),
            "spec.steps[4].signal: `paid` would be awaited once for each item",
        ),
        (
            |d| d.steps[3].task = Task::Wait(Wait { duration_ms: 0 }),
            "spec.steps[3].wait: 0s is over at once; give a duration such as `1h`, or remove it",
        ),
        (
            |d| d.steps[3].task = Task::Wait(Wait { duration_ms: 90_000 }),
            "spec.steps[3].wait: it may take 90s and the whole saga only 60s, by which it is compensated",
        ),
        (
            |d| d.steps[4].task = Task::Signal(Signal { within_ms: Some(90_000) }),
            "spec.steps[4].signal.within: it may take 90s and the whole saga only 60s",
        ),
        // who is known where
        (
            |d| within(group(d, 0), 0).action = with("steps.hold.reply.x"),
            "spec.steps[0].all[0].do.with.x: `hold` is done at the same time and its reply may not be there",
        ),
        (
            |d| within(&mut d.steps[2].otherwise, 0).action = with("steps.maybe.reply.x"),
            "spec.steps[2].else[0].do.with.x: `maybe` is done only when this is not",
        ),
        (
            |d| of(d, 6).action = with("steps.maybe.reply.x"),
            "spec.steps[6].do.with.x: `maybe` is not done when its condition is false, and then has no reply",
        ),
        (
            |d| of(d, 6).action = with("steps.reserve.reply.x"),
            "spec.steps[6].do.with.x: `reserve` has no reply, since it is no call and no signal",
        ),
        (|d| of(d, 6).action = with("steps.cool.reply.x"), "spec.steps[6].do.with.x: `cool` has no reply"),
        (
            |d| of(d, 6).undo = Undo::Call(with("input.id")),
            "spec.steps[6].undo: step `ship` comes after the pivot and is never undone",
        ),
    ];
    for (change, wanted) in cases {
        let found = findings(change);
        assert!(found.iter().any(|finding| finding.starts_with(wanted)), "{wanted}\n{found:#?}");
    }
    let many = findings(|definition| {
        let more = (0..MAX_STEPS).map(|index| step(&format!("s{index}"), transaction()));
        definition.steps.extend(more);
    });
    assert!(
        many[0].starts_with("spec.steps: there are 268 steps, those in groups counted, and at most 256"),
        "{many:#?}"
    );
}

#[test]
fn a_reply_of_a_branch_is_known_after_it_and_within_it() {
    let ok = |change: fn(&mut Definition)| assert_eq!(findings(change), Vec::<String>::new());
    ok(|d| of(d, 5).action = with("steps.book.reply.x"));
    ok(|d| match &mut group(d, 0)[1].task {
        Task::Steps(steps) => within(steps, 1).action = with("steps.hold.reply.x"),
        other => panic!("{other:?}"),
    });
    ok(|d| of(d, 5).action = with("steps.each.reply.all(r, r.ok)"));
}

#[test]
fn the_output_reads_what_every_completed_instance_has() {
    let output = |source: &str| {
        let mut definition = good();
        definition.output = [("x".to_owned(), source.to_owned())].into();
        lint(&definition).iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(output(r#"{'r': steps["reserve-credit"].reply.id, 'a': steps.approve.reply}"#), Vec::<String>::new());
    let unknown = output("steps.output.reply");
    assert!(
        unknown[0]
            .starts_with("spec.output.x: `output` is not a step; there are `reserve-credit`, `charge`, `approve`")
    );
    assert!(output("failure.reason")[0].starts_with("spec.output.x: `failure` is known only in `undo`"));
}
