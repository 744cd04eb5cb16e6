//! The orchestrator's behaviour: forward, compensation, stuck, verbs.

use std::time::Duration;

use serde_json::json;
use weft::domain::saga::definition::Definition;

use crate::{
    saga_participant::Behaviour,
    saga_world::{World, history_lines, id},
    servers,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_saga_runs_forward_and_has_a_history() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    let view = orchestrator.to_its_end("order", &json!({"orderId": "o-1", "total": 21})).await;
    assert_eq!(view["state"], "Completed", "{view}");
    let id = id(&view);
    assert_eq!(world.participant.effects(&id), ["reserve do", "pack do", "charge do", "ship do"]);
    let (body, headers) = world.participant.calls("ship").remove(0);
    assert_eq!(body, json!({"reserved": "reserve", "twice": 42}));
    assert_eq!(headers["idempotency-key"], format!("{id}/ship/do"));
    assert_eq!(headers["correlationid"], id);
    assert_eq!(headers["content-type"], "application/json");
    assert!(headers["traceparent"].starts_with(&format!("00-{}-", id.replace('-', ""))));
    let (status, detail) = orchestrator.get(&format!("/sagas/order/{id}")).await;
    assert_eq!(status, 200);
    assert_eq!(
        history_lines(&detail),
        ["started", "reserve do succeeded", "pack do succeeded", "charge do succeeded", "ship do succeeded"]
    );
    assert_eq!(detail["input"], json!({"orderId": "o-1", "total": 21}));
    orchestrator.until_counts("order", &[("running", 0), ("completed", 1), ("compensated", 0), ("stuck", 0)]).await;
    let client = world.database.superuser().await;
    let rows: i64 = client.query_one("select count(*) from weft.saga_event", &[]).await.unwrap().get(0);
    assert_eq!(rows, 5, "N steps make N + 1 rows");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_undoes_in_reverse_and_has_a_reason() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    world.participant.behave("charge", Behaviour::Refuse("CreditLimitExceeded"));
    let view = orchestrator.to_its_end("order", &json!({"orderId": "o-1", "total": 1})).await;
    assert_eq!(view["state"], "Compensated", "{view}");
    assert_eq!(view["failure"]["reason"], "INSUFFICIENT_CREDIT");
    let id = id(&view);
    assert_eq!(
        world.participant.effects(&id),
        ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]
    );
    let (body, _) = world.participant.calls("undo-pack").remove(0);
    assert_eq!(body, json!({"order": "o-1", "why": "INSUFFICIENT_CREDIT"}));
    let (body, _) = world.participant.calls("notify").remove(0);
    assert_eq!(body, json!({"reason": "INSUFFICIENT_CREDIT", "at": "charge"}));
    let shown = orchestrator.cli(&["show", "order", &id]).await;
    let text = String::from_utf8(shown.stdout).unwrap();
    for line in ["State:    Compensated", "INSUFFICIENT_CREDIT at charge: refused by the test", "undo        succeeded"]
    {
        assert!(text.contains(line), "{line} in\n{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_results_are_retried_and_effects_stay_single() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    for (command, behaviour) in [
        ("reserve", Behaviour::TooMany),
        ("pack", Behaviour::Accepted),
        ("ship", Behaviour::Reply(json!({"big": "x".repeat(100_000)}))),
    ] {
        world.participant.behave(command, behaviour);
    }
    // `reserve` is rejected once because of load, so its reply comes from a second attempt
    let view = orchestrator.to_its_end("order", &json!({"orderId": "o-1", "total": 1})).await;
    assert_eq!(view["state"], "Completed", "{view}");
    let id = id(&view);
    assert_eq!(world.participant.effects(&id), ["reserve do", "pack do", "charge do", "ship do"]);
    assert_eq!(world.participant.count("reserve"), 2);
    let detail = orchestrator.get(&format!("/sagas/order/{id}")).await.1;
    assert_eq!(detail["history"][3]["reply"], json!({"job": format!("{id}-pack-do")}), "{detail}");
    assert_eq!(detail["history"][5]["reply"], serde_json::Value::Null, "a reply of 100 kB is not kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_whose_answers_are_lost_is_undone_too() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    world.participant.behave("pack", Behaviour::LoseTheAnswer);
    let view = orchestrator.to_its_end("order", &json!({"orderId": "o-1", "total": 1})).await;
    assert_eq!(view["failure"]["code"], "AttemptsExhausted", "{view}");
    assert_eq!(
        world.participant.effects(&id(&view)),
        ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]
    );
    assert_eq!(world.participant.count("pack"), 3, "maxAttempts");
    world.participant.behave("pack", Behaviour::Unavailable);
    let view = orchestrator.to_its_end("order", &json!({"orderId": "o-2", "total": 1})).await;
    assert_eq!(
        world.participant.effects(&id(&view)),
        ["reserve do", "reserve undo", "onCompensated do"],
        "an undo without a do has no effect"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_nothing_to_undo_and_stays_until_a_person_asks_again() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    let input = json!({"orderId": "o-1", "total": 1});
    world.participant.behave("pack", Behaviour::RefuseAndLoseTheAnswer);
    let view = orchestrator.to_its_end("order", &input).await;
    assert_eq!(
        world.participant.effects(&id(&view)),
        ["reserve do", "reserve undo", "onCompensated do"],
        "the undo of pack was called and had nothing to undo"
    );
    assert_eq!(world.participant.count("undo-pack"), 1);

    world.participant.behave("pack", Behaviour::Succeed);
    world.participant.behave("ship", Behaviour::Refuse("Lost"));
    let (_, view) = orchestrator.start_saga("order", &input, "", None).await;
    let id = id(&view);
    orchestrator.until_state("order", &id, "Stuck").await;
    world.participant.behave("ship", Behaviour::Succeed);
    assert_eq!(orchestrator.verb("order", &id, "retry").await.0, 200);
    orchestrator.until_state("order", &id, "Completed").await;
    let keys: Vec<_> =
        world.participant.calls("ship").iter().map(|(_, headers)| headers["idempotency-key"].clone()).collect();
    assert_eq!(keys, [format!("{id}/ship/do"), format!("{id}/ship/redo")]);
    assert_eq!(world.participant.effects(&id), ["reserve do", "pack do", "charge do", "ship do"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pivot_with_an_undo_is_asked_before_the_saga_turns_back() {
    let world = World::new().await;
    let undo = world.step("charge", true).transaction().unwrap().undo.clone();
    let orchestrator = world
        .orchestrator_of(|order| {
            order.steps[2].transaction_mut().unwrap().undo = undo;
            order.steps[2].transaction_mut().unwrap().retry.max_attempts = 2;
        })
        .await;
    let input = json!({"orderId": "o-1", "total": 1});
    // it happened, and no answer arrives: its undo is refused
    world.participant.behave("charge", Behaviour::LoseTheAnswer);
    world.participant.behave("undo-charge", Behaviour::Refuse("Charged"));
    let (_, view) = orchestrator.start_saga("order", &input, "", None).await;
    let one = id(&view);
    servers::until("it is asked", async || world.participant.count("undo-charge") == 1).await;
    world.participant.behave("charge", Behaviour::Succeed);
    let detail = orchestrator.until_state("order", &one, "Completed").await;
    assert_eq!(world.participant.effects(&one), ["reserve do", "pack do", "charge do", "ship do"], "{detail}");
    assert_eq!(detail["failure"], serde_json::Value::Null);

    // it did not happen: from now on it cannot
    world.participant.behave("charge", Behaviour::Unavailable);
    world.participant.behave("undo-charge", Behaviour::Succeed);
    let two = id(&orchestrator.to_its_end("order", &input).await);
    assert_eq!(
        world.participant.effects(&two),
        ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]
    );

    // what a proxy answers in its place decides nothing
    world.participant.behave("charge", Behaviour::Unavailable);
    world.participant.behave("undo-charge", Behaviour::NotReached(404));
    let proxied = id(&orchestrator.to_its_end("order", &input).await);
    assert_eq!(
        world.participant.effects(&proxied),
        ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]
    );

    // a person who cancels need not verify anything
    world.participant.behave("charge", Behaviour::NoAnswer);
    let calls = world.participant.count("charge");
    let (_, view) = orchestrator.start_saga("order", &input, "", None).await;
    let three = id(&view);
    servers::until("the pivot is called", async || world.participant.count("charge") > calls).await;
    assert_eq!(orchestrator.verb("order", &three, "cancel").await.0, 200);
    orchestrator.until_state("order", &three, "Compensated").await;
    assert_eq!(
        world.participant.effects(&three),
        ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_accepted_step_that_the_service_forgot_is_unknown() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    let input = json!({"orderId": "o-1", "total": 1});
    world.participant.behave("pack", Behaviour::Forgotten);
    let view = orchestrator.to_its_end("order", &input).await;
    assert_eq!(view["failure"]["code"], "AttemptsExhausted", "{view}");
    assert_eq!(
        world.participant.effects(&id(&view)),
        ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]
    );
    let keys: Vec<_> =
        world.participant.calls("pack").iter().map(|(_, headers)| headers["idempotency-key"].clone()).collect();
    assert_eq!(keys, vec![format!("{}/pack/do", id(&view)); 3], "maxAttempts under one key");

    // a pivot that may have happened starts no compensation
    world.participant.behave("pack", Behaviour::Succeed);
    world.participant.behave("charge", Behaviour::Forgotten);
    let (_, view) = orchestrator.start_saga("order", &input, "", None).await;
    let id = id(&view);
    orchestrator.until_state("order", &id, "Stuck").await;
    world.participant.behave("charge", Behaviour::Succeed);
    orchestrator.until_state("order", &id, "Completed").await;
    assert_eq!(world.participant.effects(&id), ["reserve do", "pack do", "charge do", "ship do"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_proxy_answers_to_a_repeated_call_turns_nothing_back() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    for status in [400, 401, 404, 413] {
        // the pivot, a step that could be undone, and an undo
        for (command, code) in [("charge", None), ("pack", None), ("undo-pack", Some("CreditLimitExceeded"))] {
            world.participant.behave(command, Behaviour::LoseTheAnswerThen(status));
            world.participant.behave("charge", code.map_or(Behaviour::Succeed, Behaviour::Refuse));
            if command == "charge" {
                world.participant.behave(command, Behaviour::LoseTheAnswerThen(status));
            }
            let view = orchestrator.to_its_end("order", &json!({"orderId": "o-1", "total": 1})).await;
            let (state, effects): (_, &[&str]) = match code {
                None => ("Completed", &["reserve do", "pack do", "charge do", "ship do"]),
                Some(_) => ("Compensated", &["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]),
            };
            assert_eq!(view["state"], state, "{command} {status}: {view}");
            assert_eq!(world.participant.effects(&id(&view)), effects, "{command} {status}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_compensates_before_the_pivot() {
    let world = World::new().await;
    let deadline = |order: &mut Definition| {
        order.deadline_ms = 3_000;
        order.steps[1].transaction_mut().unwrap().timeout_ms = 60_000;
    };
    let orchestrator = world.orchestrator_of(deadline).await;
    world.participant.behave("pack", Behaviour::Slow(Duration::from_secs(30)));
    let view = orchestrator.to_its_end("order", &json!({"orderId": "o-1", "total": 1})).await;
    assert_eq!(view["failure"]["code"], "DeadlineExceeded", "{view}");
    assert_eq!(
        world.participant.effects(&id(&view)),
        ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_undo_is_reported_as_stuck_until_a_retry() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    world.participant.behave("charge", Behaviour::Refuse("CreditLimitExceeded"));
    world.participant.behave("undo-pack", Behaviour::Refuse("NotPacked"));
    let (_, view) = orchestrator.start_saga("order", &json!({"orderId": "o-1", "total": 1}), "", None).await;
    let id = id(&view);
    let detail = orchestrator.until_state("order", &id, "Stuck").await;
    assert_eq!(detail["current"][0]["waitsForAPerson"], true, "{detail}");
    orchestrator.until_counts("order", &[("running", 1), ("compensating", 1), ("stuck", 1)]).await;
    let reported = orchestrator.status().await["sagas"]["order"]["stuckInstances"][0].clone();
    assert_eq!(
        (reported["id"].as_str(), reported["step"].as_str(), reported["operation"].as_str()),
        (Some(id.as_str()), Some("pack"), Some("undo"))
    );
    servers::until("the metric counts it", async || {
        orchestrator.metrics().await.contains("weft_saga_stuck{saga=\"order\"} 1")
    })
    .await;
    let listed = orchestrator.get("/sagas/order?state=stuck").await.1;
    assert_eq!(listed["items"][0]["id"], id.as_str());

    world.participant.behave("undo-pack", Behaviour::Succeed);
    let output = orchestrator.cli(&["retry", "order", &id]).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let detail = orchestrator.until_state("order", &id, "Compensated").await;
    assert_eq!(
        world.participant.effects(&id),
        ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]
    );
    assert!(history_lines(&detail).contains(&"pack undo retry".to_owned()));
    orchestrator.until_counts("order", &[("running", 0), ("compensating", 0), ("stuck", 0), ("compensated", 1)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saga_recovers_from_an_outage_of_a_participant() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    world.participant.behave("ship", Behaviour::Unavailable);
    let (_, view) = orchestrator.start_saga("order", &json!({"orderId": "o-1", "total": 1}), "", None).await;
    let id = id(&view);
    orchestrator.until_state("order", &id, "Stuck").await;
    let calls = world.participant.count("ship");
    servers::until("it is retried", async || world.participant.count("ship") > calls + 2).await;
    world.participant.behave("ship", Behaviour::Succeed);
    orchestrator.until_state("order", &id, "Completed").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn verbs_pause_resume_cancel_and_skip() {
    let world = World::new().await;
    let orchestrator =
        world.orchestrator_of(|order| order.steps[1].transaction_mut().unwrap().timeout_ms = 60_000).await;
    let input = json!({"orderId": "o-1", "total": 1});
    world.participant.behave("pack", Behaviour::Slow(Duration::from_secs(2)));
    let (_, view) = orchestrator.start_saga("order", &input, "", None).await;
    let one = id(&view);
    servers::until("pack is called", async || world.participant.count("pack") == 1).await;
    let (status, view) = orchestrator.verb("order", &one, "pause").await;
    assert_eq!((status, &view["paused"]), (200, &json!(true)), "{view}");
    servers::until("the result is recorded all the same", async || {
        history_lines(&orchestrator.get(&format!("/sagas/order/{one}")).await.1)
            .contains(&"pack do succeeded".to_owned())
    })
    .await;
    assert_eq!(world.participant.count("charge"), 0);
    let (status, _) = orchestrator.verb("order", &one, "cancel").await;
    assert_eq!(status, 200);
    assert_eq!(world.participant.count("undo-pack"), 0, "paused all the same");
    let (status, problem) = orchestrator.verb("order", &one, "skip").await;
    assert_eq!((status, &problem["title"]), (409, &json!("Refused")), "{problem}");
    orchestrator.verb("order", &one, "resume").await;
    let detail = orchestrator.until_state("order", &one, "Compensated").await;
    assert_eq!(detail["failure"]["code"], "Cancelled");
    assert_eq!(
        world.participant.effects(&one),
        ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]
    );

    world.participant.behave("ship", Behaviour::Refuse("Lost"));
    let (_, view) = orchestrator.start_saga("order", &input, "", None).await;
    let two = id(&view);
    orchestrator.until_state("order", &two, "Stuck").await;
    let (status, problem) = orchestrator.verb("order", &two, "cancel").await;
    assert_eq!(status, 409);
    assert!(problem["detail"].as_str().unwrap().contains("past its point of no return"), "{problem}");
    assert_eq!(orchestrator.verb("order", &two, "skip").await.0, 200);
    orchestrator.until_state("order", &two, "Completed").await;
    let (status, problem) = orchestrator.verb("order", &two, "retry").await;
    assert_eq!(status, 409);
    assert!(problem["detail"].as_str().unwrap().contains("it has ended"), "{problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_pivot_is_cancelled_only_when_nothing_can_make_it_happen() {
    let world = World::new().await;
    let mut definition = world.definition("order");
    definition.steps[2].transaction_mut().unwrap().retry.max_attempts = 1;
    let orchestrator = world.run(world.contract(vec![definition.seal()], Vec::new())).await;
    world.participant.behave("charge", Behaviour::NoAnswer);
    let (_, view) = orchestrator.start_saga("order", &json!({"orderId": "o-1", "total": 1}), "", None).await;
    let id = id(&view);
    orchestrator.until_state("order", &id, "Stuck").await;
    let (status, problem) = orchestrator.verb("order", &id, "cancel").await;
    assert_eq!(status, 409, "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("pause it first"), "{problem}");

    // the next call has just begun: a pause does not cancel it
    let calls = world.participant.count("charge");
    servers::until("it is tried again", async || world.participant.count("charge") > calls).await;
    assert_eq!(orchestrator.verb("order", &id, "pause").await.0, 200);
    let (status, problem) = orchestrator.verb("order", &id, "cancel").await;
    assert_eq!(status, 409, "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("is in progress"), "{problem}");
    servers::until("the call has ended", async || orchestrator.verb("order", &id, "cancel").await.0 == 200).await;
    let calls = world.participant.count("charge");
    orchestrator.verb("order", &id, "resume").await;
    orchestrator.until_state("order", &id, "Compensated").await;
    assert_eq!(world.participant.count("charge"), calls);
    assert_eq!(
        world.participant.effects(&id),
        ["reserve do", "pack do", "pack undo", "reserve undo", "onCompensated do"]
    );
}
