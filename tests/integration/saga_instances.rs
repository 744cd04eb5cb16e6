//! What becomes of an instance as a whole: its key, its definition's versions, deletion, retention; and what starts none.

use std::time::Duration;

use serde_json::{Value, json};
use weft::contract::orchestrator::Orchestrator;

use crate::{
    saga_participant::{Behaviour, Participant},
    saga_world::{World, id},
    servers,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_key_starts_one_instance_also_after_it_has_ended() {
    let world = World::new().await;
    let mut orchestrator = world.orchestrator().await;
    let input = json!({"orderId": "o-1", "total": 1});
    let (status, first) = orchestrator.start_saga("order", &input, "?wait=true", Some("k-1")).await;
    assert_eq!(status, 201);
    let (status, second) = orchestrator.start_saga("order", &input, "?wait=true", Some("k-1")).await;
    assert_eq!((status, &second["id"], &second["state"]), (200, &first["id"], &json!("Completed")));
    orchestrator.kill9();
    orchestrator.start();
    orchestrator.until_ready().await;
    let (status, third) = orchestrator.start_saga("order", &input, "", Some("k-1")).await;
    assert_eq!((status, &third["id"]), (200, &first["id"]));
    assert_eq!(world.participant.count("reserve"), 1);
    // under the same key another input is another request: of one that has ended, and of one that runs
    let other = json!({"orderId": "o-1", "total": 999});
    for query in ["", "?wait=true"] {
        let (status, problem) = orchestrator.start_saga("order", &other, query, Some("k-1")).await;
        assert_eq!((status, &problem["title"]), (422, &json!("KeyReused")), "{problem}");
    }
    world.participant.behave("ship", Behaviour::Unavailable);
    let (status, _) = orchestrator.start_saga("order", &input, "", Some("k-2")).await;
    assert_eq!(status, 201);
    let (status, problem) = orchestrator.start_saga("order", &other, "", Some("k-2")).await;
    assert_eq!((status, &problem["title"]), (422, &json!("KeyReused")), "{problem}");
    let (status, _) = orchestrator.start_saga("order", &input, "", Some("k-2")).await;
    assert_eq!(status, 200);
    world.participant.behave("ship", Behaviour::Succeed);
    orchestrator.until_counts("order", &[("completed", 2), ("running", 0)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_definition_is_for_new_instances() {
    let world = World::new().await;
    let mut orchestrator = world.orchestrator().await;
    let old = orchestrator.contract.sagas[0].version.clone();
    world.participant.behave("reserve", Behaviour::Slow(Duration::from_millis(1_500)));
    let input = json!({"orderId": "o-1", "total": 1});
    let (_, first) = orchestrator.start_saga("order", &input, "", None).await;
    let mut contract = orchestrator.contract.clone();
    contract.sagas[0].steps.remove(1);
    contract.sagas[0] = contract.sagas[0].clone().seal();
    let new = contract.sagas[0].version.clone();
    orchestrator.rewrite(contract);
    servers::until("the new version is in force", async || {
        orchestrator.status().await["sagas"]["order"]["version"] == new.as_str()
    })
    .await;
    // the old definition is not in the contract any more: a restart reads it from the database
    orchestrator.kill9();
    orchestrator.start();
    orchestrator.until_ready().await;
    let detail = orchestrator.until_state("order", &id(&first), "Completed").await;
    assert_eq!(detail["version"], old.as_str());
    assert_eq!(world.participant.effects(&id(&first)).len(), 4);
    world.participant.behave("reserve", Behaviour::Succeed);
    let second = orchestrator.to_its_end("order", &input).await;
    assert_eq!(second["version"], new.as_str());
    assert_eq!(world.participant.effects(&id(&second)), ["reserve do", "charge do", "ship do"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saga_that_is_being_deleted_starts_nothing_and_its_instances_end() {
    let world = World::new().await;
    let mut orchestrator = world.orchestrator().await;
    world.participant.behave("ship", Behaviour::Unavailable);
    let input = json!({"orderId": "o-1", "total": 1});
    let (_, first) = orchestrator.start_saga("order", &input, "", Some("k-1")).await;
    let mut contract = orchestrator.contract.clone();
    contract.draining = vec!["order".to_owned()];
    orchestrator.rewrite(contract.clone());
    orchestrator.until_counts("order", &[("running", 1)]).await;
    servers::until("it drains", async || orchestrator.status().await["sagas"]["order"]["draining"] == true).await;
    let (status, problem) = orchestrator.start_saga("order", &input, "", Some("k-2")).await;
    assert_eq!((status, &problem["title"]), (410, &json!("Draining")), "{problem}");
    // who lost the answer of an earlier start gets it
    let (status, again) = orchestrator.start_saga("order", &input, "", Some("k-1")).await;
    assert_eq!((status, &again["id"]), (200, &first["id"]), "{again}");
    // its spec may give no definition any more
    contract.sagas.clear();
    orchestrator.rewrite(contract);
    orchestrator.kill9();
    orchestrator.start();
    orchestrator.until_ready().await;
    world.participant.behave("ship", Behaviour::Succeed);
    orchestrator.until_state("order", &id(&first), "Completed").await;
    servers::until("none is left", async || {
        let order = orchestrator.status().await["sagas"]["order"].clone();
        order["draining"] == true && order["running"] == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_follows_its_participants_to_where_they_are_now() {
    let world = World::new().await;
    let mut orchestrator =
        world.orchestrator_of(|order| order.steps[1].transaction_mut().unwrap().retry.max_attempts = 1000).await;
    world.participant.behave("pack", Behaviour::Unavailable);
    let (_, first) = orchestrator.start_saga("order", &json!({"orderId": "o-1", "total": 1}), "", None).await;
    servers::until("a call is made", async || world.participant.count("pack") > 0).await;
    let (now, old) = (Participant::start().await, orchestrator.contract.sagas[0].version.clone());
    let mut contract = orchestrator.contract.clone();
    contract.sagas[0].on_compensated = None;
    for call in contract.sagas[0].calls_mut() {
        call.url = now.url(call.url.rsplit('/').next().unwrap());
    }
    contract.sagas[0] = contract.sagas[0].clone().seal();
    orchestrator.rewrite(contract);
    let detail = orchestrator.until_state("order", &id(&first), "Completed").await;
    assert_eq!(detail["version"], old.as_str());
    assert_eq!(world.participant.effects(&id(&first)), ["reserve do"]);
    assert_eq!(now.effects(&id(&first)), ["pack do", "charge do", "ship do"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_get_a_sentence() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    let (status, problem) = orchestrator.start_saga("nothing", &json!({}), "", None).await;
    assert_eq!((status, &problem["detail"]), (404, &json!("there is no saga `nothing`")));
    for (path, status, part) in [
        ("/sagas/order/none", 404, "has the id or the key `none`"),
        ("/sagas/order/0192f3a4-0000-7000-8000-000000000001", 404, "there is no instance"),
        ("/sagas/order?state=lost", 400, "there is no state `lost`"),
        ("/sagas/nothing", 404, "there is no saga"),
    ] {
        let (got, problem) = orchestrator.get(path).await;
        assert_eq!(got, status, "{path}");
        assert!(problem["detail"].as_str().unwrap_or_default().contains(part), "{path}: {problem}");
    }
    let (status, problem) = orchestrator.verb("order", "0192f3a4-0000-7000-8000-000000000001", "explode").await;
    assert_eq!(status, 404);
    assert!(problem["detail"].as_str().unwrap().contains("there is no verb `explode`"), "{problem}");
    let (status, document) = orchestrator.get("/openapi.json").await;
    assert_eq!((status, &document["openapi"]), (200, &json!("3.1.0")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_s_own_words_are_in_the_history_and_not_in_the_status() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    let words = "card 4111 1111 1111 1111 was declined";
    world.participant.behave("ship", Behaviour::Fail(json!({"error": "Internal Server Error", "message": words})));
    let (_, view) = orchestrator.start_saga("order", &json!({"orderId": "o-1", "total": 1}), "", None).await;
    let id = id(&view);
    let detail = orchestrator.until_state("order", &id, "Stuck").await;
    let text = format!("customers answered HTTP 500: {words}");
    assert_eq!(detail["current"][0]["stuck"], text.as_str(), "{detail}");
    assert!(detail["history"].as_array().unwrap().iter().any(|transition| transition["message"] == text.as_str()));
    let shown = orchestrator.cli(&["show", "order", &id]).await;
    assert!(String::from_utf8(shown.stdout).unwrap().contains(words));
    orchestrator.until_counts("order", &[("stuck", 1)]).await;
    let status = orchestrator.status().await;
    let stuck = &status["sagas"]["order"]["stuckInstances"][0];
    assert_eq!(stuck["message"], "customers answered HTTP 500", "{status}");
    assert!(!status.to_string().contains("4111"), "the status reaches the custom resource: {status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn instances_are_purged_when_they_ended_longer_ago_than_the_retention() {
    let world = World::new().await;
    let contract = Orchestrator { retention_ms: 2_000, ..world.contract(vec![world.definition("order")], Vec::new()) };
    let mut orchestrator = world.run(contract).await;
    let input = json!({"orderId": "o-1", "total": 1});
    world.participant.behave("ship", Behaviour::NoAnswer);
    let (_, view) = orchestrator.start_saga("order", &input, "", None).await;
    let running = id(&view);
    servers::until("its last step is called", async || world.participant.count("ship") == 1).await;
    let not_waiting = world.participant.clone();
    not_waiting.behave("ship", Behaviour::Unavailable);
    let (_, view) = orchestrator.start_saga("order", &input, "", Some("k-1")).await;
    let keyed = id(&view);
    not_waiting.behave("ship", Behaviour::Succeed);
    not_waiting.behave(&format!("ship/{running}"), Behaviour::Unavailable);
    orchestrator.until_state("order", &keyed, "Completed").await;
    let (status, again) = orchestrator.start_saga("order", &input, "", Some("k-1")).await;
    assert_eq!((status, id(&again)), (200, keyed.clone()));

    let superuser = world.database.superuser().await;
    let rows = async |table: &str| -> Vec<String> {
        let ids = format!("select distinct id::text from weft.{table} order by id");
        superuser.query(&ids, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
    };
    // the bucket of an instance that has not ended stays, so one that is alone in its bucket goes
    let (mut others, mut gone) = (Vec::new(), None);
    servers::until("a bucket was dropped", async || {
        others.push(id(&orchestrator.to_its_end("order", &input).await));
        let left = rows("saga_instance").await;
        gone = others.iter().find(|id| !left.contains(id)).cloned();
        gone.is_some()
    })
    .await;
    let gone = gone.unwrap();
    assert_eq!(orchestrator.get(&format!("/sagas/order/{gone}")).await.0, 404);
    assert!(rows("saga_event").await.contains(&running));
    assert!(!rows("saga_event").await.contains(&gone), "its log is gone, too");

    // also for a process that reads them again
    orchestrator.kill9();
    orchestrator.start();
    orchestrator.until_ready().await;
    not_waiting.behave(&format!("ship/{running}"), Behaviour::Succeed);
    orchestrator.until_state("order", &running, "Completed").await;
    servers::until("the key is forgotten with its instance", async || {
        let (status, _) = orchestrator.start_saga("order", &input, "?wait=true", Some("k-1")).await;
        status == 201
    })
    .await;
    let buckets = "select count(*) from weft.saga_bucket";
    servers::until("what is old is gone", async || {
        let left = rows("saga_instance").await;
        !left.contains(&running) && superuser.query_one(buckets, &[]).await.unwrap().get::<_, i64>(0) <= 7
    })
    .await;
    assert_eq!(world.participant.effects(&keyed), ["reserve do", "pack do", "charge do", "ship do"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_input_that_no_call_can_use_starts_nothing() {
    let world = World::new().await;
    let orchestrator = world
        .orchestrator_of(|order| {
            order.input = Some(json!({"properties": {"total": {"type": "integer"}, "lines": {"type": "array"}}}));
            let endless = "has(input.lines) && input.lines.exists(x, input.lines.exists(y, x != x || y != y))";
            order.steps[1].transaction_mut().unwrap().action.with.insert("endless".to_owned(), endless.to_owned());
        })
        .await;
    let numbers: Vec<usize> = (0..100_000).collect();
    for (input, wanted) in [
        (json!({}), "step `reserve` (do): cannot be evaluated: with.order: `input.orderId` has no `orderId`"),
        // what is read after the pivot, too: `ship` doubles the total
        (json!({"orderId": "o-1"}), "step `ship` (do): cannot be evaluated: with.twice: there is no `input.total`"),
        (json!({"orderId": "o-1", "total": "hunter2"}), "`/total` must satisfy `type: \"integer\"`"),
        (json!({"orderId": "o-1", "total": 1, "lines": numbers}), "it takes more than"),
    ] {
        let (status, problem) = orchestrator.start_saga("order", &input, "", None).await;
        assert_eq!((status, &problem["title"]), (400, &json!("UnusableInput")), "{problem}");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(wanted) && !detail.contains("hunter2"), "{detail}");
    }
    assert_eq!(world.participant.all(), 0);

    let view = orchestrator.to_its_end("order", &json!({"orderId": "o-1", "total": 1, "lines": [1]})).await;
    assert_eq!(view["state"], "Completed");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_memory_for_more_instances_a_start_waits() {
    let world = World::new().await;
    let mut orchestrator =
        world.orchestrator_of(|order| order.steps[0].transaction_mut().unwrap().timeout_ms = 60_000).await;
    orchestrator.terminate().await;
    orchestrator.memory_limit = Some(2 << 20);
    orchestrator.start();
    orchestrator.until_ready().await;
    world.participant.behave("reserve", Behaviour::NoAnswer);
    let input = json!({"orderId": "o-1", "total": 1, "text": "x".repeat(100_000)});
    let mut started = Vec::new();
    let problem = loop {
        let (status, view) = orchestrator.start_saga("order", &input, "", None).await;
        if status != 201 {
            assert_eq!(status, 429, "{view}");
            break view;
        }
        started.push(id(&view));
        assert!(started.len() < 12, "a half of 2 MiB is room for ten");
    };
    assert_eq!(problem["title"], "Full", "{problem}");
    // what runs goes on, also in the next process
    orchestrator.kill9();
    orchestrator.start();
    orchestrator.until_ready().await;
    world.participant.behave("reserve", Behaviour::Succeed);
    for id in &started {
        servers::until("it has ended", async || {
            orchestrator.get(&format!("/sagas/order/{id}")).await.1["endedAt"].is_string()
        })
        .await;
    }
    let view = orchestrator.to_its_end("order", &input).await;
    assert_eq!(view["state"], "Completed", "there is room again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_completed_instance_shows_its_output() {
    let world = World::new().await;
    let orchestrator = world
        .orchestrator_of(|definition| {
            let output = [("order", "input.orderId"), ("tracking", "steps.ship.reply.tracking")];
            definition.output = output.map(|(name, source)| (name.to_owned(), source.to_owned())).into();
        })
        .await;
    world.participant.behave("ship", Behaviour::Reply(json!({"tracking": "t-1"})));
    let input = json!({"orderId": "o-1", "total": 3});
    let view = orchestrator.to_its_end("order", &input).await;
    assert_eq!((&view["state"], &view["output"]), (&json!("Completed"), &json!({"order": "o-1", "tracking": "t-1"})));
    let shown = orchestrator.cli(&["show", "order", &id(&view)]).await;
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("\nOutput:   {\"order\":\"o-1\",\"tracking\":\"t-1\"}\n"), "{shown}");

    world.participant.behave("ship", Behaviour::Reply(json!({"number": "secret"})));
    let view = orchestrator.to_its_end("order", &input).await;
    assert_eq!((&view["state"], &view["output"]), (&json!("Completed"), &Value::Null));
    let detail = orchestrator.get(&format!("/sagas/order/{}", id(&view))).await.1;
    let last = detail["history"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["step"], &last["outcome"], &last["state"]),
        (&json!("output"), &json!("failed"), &json!("Completed"))
    );
    let why = "output.tracking cannot be evaluated: `steps.ship.reply.tracking` has no `tracking`";
    assert_eq!(last["message"], why);
    assert!(!orchestrator.status().await.to_string().contains("t-1"), "no output is in the status");
}
