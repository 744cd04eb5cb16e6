use super::*;

fn call(with: &[(&str, &str)]) -> Call {
    Call {
        service: "customers".into(),
        command: "ReserveCredit".into(),
        with: with.iter().map(|(name, source)| ((*name).to_owned(), (*source).to_owned())).collect(),
    }
}

fn step(name: &str) -> Step {
    Step {
        name: name.into(),
        action: call(&[("id", "input.id")]),
        undo: Undo::Nothing,
        timeout_ms: 2_000,
        ..Step::default()
    }
}

fn good() -> Spec {
    let reserve = Step {
        undo: Undo::Call(call(&[("id", "input.id"), ("why", "failure.reason")])),
        failures: [("CreditLimitExceeded".to_owned(), "INSUFFICIENT_CREDIT".to_owned())].into(),
        ..step("reserve-credit")
    };
    let charge = Step { pivot: true, undo: Undo::Missing, ..step("charge") };
    let approve = Step {
        undo: Undo::Missing,
        action: call(&[
            ("reservation", r#"steps["reserve-credit"].reply.id"#),
            ("lines", "input.lines.map(l, l.n + 1)"),
        ]),
        ..step("approve")
    };
    Spec {
        deadline_ms: 60_000,
        input: None,
        steps: vec![reserve, charge, approve],
        on_compensated: Some(call(&[("why", "failure.reason")])),
    }
}

/// The one finding that a change to the good saga leads to.
fn finding(change: impl FnOnce(&mut Spec)) -> String {
    let mut spec = good();
    change(&mut spec);
    let findings: Vec<String> = lint(&spec).iter().map(ToString::to_string).collect();
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
    let message = finding(|spec| spec.steps[0].undo = Undo::Missing);
    assert!(message.starts_with("spec.steps[0].undo: step `reserve-credit` comes before the pivot"), "{message}");
    let mut without_pivot = good();
    without_pivot.steps[1].pivot = false;
    assert_eq!(lint(&without_pivot).len(), 2, "both later steps are before a pivot that does not exist");
}

#[test]
fn a_step_is_undone_where_it_was_done() {
    let message = finding(|spec| {
        let elsewhere = Call { service: "ledger".into(), ..with("input.id") };
        spec.steps[0].undo = Undo::Call(elsewhere);
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
        spec.steps[1].action = with("input.total + 1");
    });
    let wanted = "spec.steps[1].do.with.x: `input.total` is not in spec.input, which has no property `total` there";
    assert!(message.starts_with(wanted), "{message}");
}

#[test]
fn nothing_after_the_pivot_is_undone() {
    let mut asked = good();
    asked.steps[1].undo = Undo::Call(with("input.id"));
    assert_eq!(lint(&asked), [], "the undo of a pivot asks whether it happened");
    let message = finding(|spec| spec.steps[2].undo = Undo::Call(with("input.id")));
    assert!(message.starts_with("spec.steps[2].undo: step `approve` comes after the pivot"), "{message}");
}

#[test]
fn nothing_after_the_pivot_can_fail() {
    let message = finding(|spec| spec.steps[2].failures = [("Refused".to_owned(), "NO".to_owned())].into());
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
    assert!(
        finding(|spec| spec.steps[2].pivot = true).starts_with("spec.steps[2].pivot: `charge` is the pivot already")
    );
}

#[test]
fn times_fit_into_each_other() {
    let message = finding(|spec| spec.steps[1].timeout_ms = 90_500);
    assert!(
        message.starts_with("spec.steps[1].timeout: one attempt may take 90500ms and the whole saga only 60s"),
        "{message}"
    );
    assert!(finding(|spec| spec.steps[1].timeout_ms = 0).starts_with("spec.steps[1].timeout: 0s"));
    assert!(finding(|spec| spec.deadline_ms = 0).starts_with("spec.deadline: 0s"));
    assert!(finding(|spec| spec.steps[1].retry.max_attempts = 0).starts_with("spec.steps[1].retry.maxAttempts: 0"));
    assert!(
        finding(|spec| spec.steps[1].retry.initial_backoff_ms = 60_000)
            .starts_with("spec.steps[1].retry.initialBackoff: 60s")
    );
}

#[test]
fn a_saga_has_steps_and_a_call_has_an_address() {
    let empty = Spec { deadline_ms: 1, ..Spec::default() };
    assert_eq!(lint(&empty).first().map(|f| f.field.as_str()), Some("spec.steps"));
    assert!(
        finding(|spec| spec.steps[0].action.service = String::new())
            .starts_with("spec.steps[0].do.service: no service")
    );
    assert!(
        finding(|spec| spec.on_compensated.as_mut().unwrap().command = String::new())
            .starts_with("spec.onCompensated.command:")
    );
}

#[test]
fn broken_expressions_are_found() {
    let message = finding(|spec| spec.steps[1].action = with("input.total +"));
    assert!(message.starts_with("spec.steps[1].do.with.x: `input.total +` is not a CEL expression: "), "{message}");
    let message = finding(|spec| spec.steps[1].action = with(&"1+".repeat(600)));
    assert!(message.contains("has 1200 characters"), "{message}");
}

#[test]
fn unknown_variables_functions_and_members_are_found() {
    assert!(finding(|spec| spec.steps[1].action = with("inptu.total")).contains("`inptu` is not a variable"));
    assert!(finding(|spec| spec.steps[1].action = with("uuid()")).contains("`uuid` is not a function"));
    assert!(finding(|spec| spec.steps[1].action = with("failure.reason")).contains("`failure` is known only in"));
    assert!(finding(|spec| spec.steps[1].action = with("steps")).contains("used as a whole"));
    assert!(
        finding(|spec| spec.steps[1].action = with(r#"steps["reserve-credit"].body"#))
            .contains("has a `reply` and nothing else")
    );
    assert_eq!(
        lint(&{
            let mut spec = good();
            spec.steps[1].action = with("input.lines.all(inptu, inptu.n > 0)");
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
        let message = finding(|spec| spec.steps[1].action = with(source));
        assert!(message.contains(part), "{source}: {message}");
        let refused = expression::Expression::compile(source).unwrap_err().to_string();
        assert!(refused.starts_with("is not allowed: ") && refused.contains(part), "{source}: {refused}");
    }
}

#[test]
fn a_reply_is_used_only_where_it_exists() {
    assert!(finding(|spec| spec.steps[1].action = with("steps.approve.reply.id")).contains("is not there yet"));
    assert!(finding(|spec| spec.steps[1].action = with("steps.charge.reply.id")).contains("is not there yet"));
    assert!(
        finding(|spec| spec.steps[1].action = with("steps.nothing.reply"))
            .contains("`nothing` is not a step; there are `reserve-credit`, `charge`, `approve`")
    );
    assert!(
        finding(|spec| spec.steps[0].undo = Undo::Call(with("steps.charge.reply.id"))).contains("later step `charge`")
    );
    assert!(
        finding(|spec| spec.steps[0].undo = Undo::Call(with(r#"steps["reserve-credit"].reply.id"#)))
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
    spec.steps[2].action = with("steps.reserve-credit.reply.id");
    let message = lint(&spec).iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert!(message.contains(r#"written `steps["reserve-credit"].reply`"#), "{message}");
}
