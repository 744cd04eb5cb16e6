//! Sagas that are more than a sequence: parallel branches, conditions, lists, waits and signals.

use std::time::Duration;

use serde_json::{Value, json};
use weft::domain::saga::definition::{Definition, ForEach, Signal, Step, Task, Transaction, Undo, Wait};

use crate::{
    saga_participant::Behaviour,
    saga_world::{Running, World, group, history_lines, id},
    servers,
};

impl World {
    /// An orchestrator of one saga, `trip`, of these steps.
    async fn trip(&self, steps: Vec<Step>) -> Running {
        let definition = Definition { name: "trip".into(), deadline_ms: 60_000, steps, ..Definition::default() };
        self.run(self.contract(vec![definition.seal()], Vec::new())).await
    }

    fn after(&self, name: &str) -> Step {
        let mut step = self.step(name, false);
        step.transaction_mut().unwrap().failures.clear();
        step
    }
}

fn signal(name: &str, within_ms: Option<u64>) -> Step {
    Step { name: name.into(), task: Task::Signal(Signal { within_ms }), ..Step::default() }
}

async fn start(trip: &Running, input: &Value) -> String {
    id(&trip.start_saga("trip", input, "", None).await.1)
}

async fn send(trip: &Running, id: &str, name: &str, key: Option<&str>, body: &Value) -> (u16, Value) {
    let client = reqwest::Client::new();
    let mut request = client.post(trip.url(&format!("/sagas/trip/{id}/signals/{name}"))).json(body);
    if let Some(key) = key {
        request = request.header("idempotency-key", key);
    }
    let response = request.send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn branches_are_called_at_the_same_time_and_the_next_step_when_all_are_done() {
    let world = World::new().await;
    let stay = group("stay", Task::Steps(vec![world.step("hotel", true), world.step("seat", true)]));
    let reserve = group("reserve", Task::All(vec![world.step("flight", true), stay]));
    let trip = world.trip(vec![reserve, world.after("mail")]).await;
    world.participant.behave("flight", Behaviour::NoAnswer);
    let id = start(&trip, &json!({"orderId": "o-1"})).await;
    servers::until("the other branch goes on", async || world.participant.count("seat") == 1).await;
    let (_, detail) = trip.get(&format!("/sagas/trip/{id}")).await;
    assert_eq!(detail["current"][0]["step"], "flight", "{detail}");
    assert_eq!(world.participant.count("mail"), 0);
    world.participant.behave("flight", Behaviour::Succeed);
    trip.until_state("trip", &id, "Completed").await;
    assert_eq!(world.participant.effects(&id), ["hotel do", "seat do", "flight do", "mail do"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_fails_undoes_the_others_also_those_in_progress() {
    let world = World::new().await;
    let branches = Task::All(vec![world.step("flight", true), world.step("hotel", true), world.step("car", true)]);
    let trip = world.trip(vec![world.step("account", true), group("reserve", branches)]).await;
    // it takes effect, and its answer comes when nobody waits for it any more
    world.participant.behave("flight", Behaviour::Slow(Duration::from_secs(2)));
    world.participant.behave("car", Behaviour::NoAnswer);
    let id = start(&trip, &json!({"orderId": "o-1"})).await;
    servers::until("both are in progress", async || {
        world.participant.effects(&id).contains(&"flight do".to_owned()) && world.participant.count("car") == 1
    })
    .await;
    servers::until("the hotel is booked", async || {
        let detail = trip.get(&format!("/sagas/trip/{id}")).await.1;
        history_lines(&detail).contains(&"hotel do succeeded".to_owned())
    })
    .await;
    world.participant.behave("car", Behaviour::Refuse("SoldOut"));
    let detail = trip.until_state("trip", &id, "Compensated").await;
    assert_eq!(detail["failure"]["step"], "car", "{detail}");
    let effects = world.participant.effects(&id);
    let undone: Vec<&str> = effects.iter().map(String::as_str).filter(|effect| effect.ends_with(" undo")).collect();
    assert_eq!(undone, ["flight undo", "hotel undo", "account undo"], "{effects:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_of_two_that_are_stuck_is_named_to_be_skipped() {
    let world = World::new().await;
    let mut charge = world.step("charge", false);
    charge.transaction_mut().unwrap().pivot = true;
    let close = group("close", Task::All(vec![world.after("mail"), world.after("book")]));
    let trip = world.trip(vec![charge, close]).await;
    world.participant.behave("mail", Behaviour::Refuse("NoAddress"));
    world.participant.behave("book", Behaviour::Refuse("NoBook"));
    let id = start(&trip, &json!({"orderId": "o-1"})).await;
    servers::until("both are stuck", async || {
        let detail = trip.get(&format!("/sagas/trip/{id}")).await.1;
        detail["current"]
            .as_array()
            .is_some_and(|current| current.iter().filter(|one| one["stuck"].is_string()).count() == 2)
    })
    .await;
    let (status, problem) = trip.verb("trip", &id, "skip").await;
    assert_eq!((status, problem["title"].as_str()), (409, Some("Refused")), "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("several of its steps are stuck"), "{problem}");
    let skipped = trip.cli(&["skip", "trip", &id, "--step", "mail"]).await;
    assert!(skipped.status.success(), "{skipped:?}");
    world.participant.behave("book", Behaviour::Succeed);
    assert_eq!(trip.verb("trip", &id, "retry").await.0, 200);
    trip.until_state("trip", &id, "Completed").await;
    assert_eq!(world.participant.effects(&id), ["charge do", "book do"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_condition_is_evaluated_once_and_its_value_is_in_the_history() {
    let world = World::new().await;
    let mut insure = world.step("insure", true);
    insure.when = Some("input.total > 100".into());
    insure.otherwise = vec![world.step("warn", true)];
    let trip = world.trip(vec![insure, world.step("ship", true)]).await;
    for (total, chosen, called) in [(120, "insure when true", "insure"), (20, "insure when false", "warn")] {
        let view = trip.to_its_end("trip", &json!({"orderId": "o-1", "total": total})).await;
        let id = id(&view);
        assert_eq!(world.participant.effects(&id), [format!("{called} do"), "ship do".to_owned()]);
        let detail = trip.get(&format!("/sagas/trip/{id}")).await.1;
        let wanted = ["started", chosen, &format!("{called} do succeeded"), "ship do succeeded"];
        assert_eq!(history_lines(&detail), wanted);
    }
    let (status, problem) = trip.start_saga("trip", &json!({"orderId": "o-1"}), "", None).await;
    assert_eq!((status, problem["title"].as_str()), (400, Some("UnusableInput")), "{problem}");
}

fn pack(world: &World, concurrency: u32) -> Step {
    let transaction = Transaction {
        action: world.call("pack", &[("sku", "item.sku"), ("order", "input.orderId")]),
        undo: Undo::Call(world.call("unpack", &[("sku", "item.sku")])),
        timeout_ms: 60_000,
        ..Transaction::default()
    };
    let for_each = Some(ForEach { items: "input.lines".into(), concurrency });
    Step { name: "pack".into(), for_each, task: Task::call(transaction), ..Step::default() }
}

fn order(lines: usize) -> Value {
    let lines: Vec<Value> = (0..lines).map(|line| json!({"sku": format!("s-{line}")})).collect();
    json!({"orderId": "o-1", "lines": lines})
}

#[tokio::test(flavor = "multi_thread")]
async fn each_item_has_a_key_of_its_own_and_its_reply_is_in_the_list() {
    let world = World::new().await;
    let ship = Transaction {
        action: world.call("ship", &[("packed", "steps.pack.reply.map(r, r.step)")]),
        timeout_ms: 2_000,
        ..Transaction::default()
    };
    let trip = world.trip(vec![pack(&world, 3), group("ship", Task::call(ship))]).await;
    let view = trip.to_its_end("trip", &order(3)).await;
    assert_eq!(view["state"], "Completed", "{view}");
    let id = id(&view);
    let mut keys: Vec<(String, Value)> = Vec::new();
    for (body, headers) in world.participant.calls("pack") {
        keys.push((headers["idempotency-key"].clone(), body["sku"].clone()));
    }
    keys.sort_by(|a, b| a.0.cmp(&b.0));
    let wanted = (0..3).map(|item| (format!("{id}/pack.{item}/do"), json!(format!("s-{item}")))).collect::<Vec<_>>();
    assert_eq!(keys, wanted);
    let (body, _) = world.participant.calls("ship").remove(0);
    assert_eq!(body, json!({"packed": ["pack.0", "pack.1", "pack.2"]}));
}

#[tokio::test(flavor = "multi_thread")]
async fn items_go_on_where_they_were_after_a_crash_and_are_undone() {
    let world = World::new().await;
    let mut trip = world.trip(vec![pack(&world, 2), world.step("ship", true)]).await;
    world.participant.behave("pack", Behaviour::NoAnswer);
    let id = start(&trip, &order(5)).await;
    servers::until("two are in progress", async || world.participant.count("pack") == 2).await;
    trip.kill9();
    trip.start();
    servers::until("two are in progress again", async || world.participant.count("pack") == 4).await;
    assert_eq!(world.participant.count("pack"), 4, "no more than two at a time");
    world.participant.behave("ship", Behaviour::Refuse("Lost"));
    world.participant.behave("pack", Behaviour::Succeed);
    trip.until_state("trip", &id, "Compensated").await;
    let effects = world.participant.effects(&id);
    let of = |operation: &str| {
        let mut of: Vec<String> =
            effects.iter().filter_map(|effect| effect.strip_suffix(operation)).map(str::to_owned).collect();
        of.sort();
        of
    };
    let all: Vec<String> = (0..5).map(|item| format!("pack.{item}")).collect();
    assert_eq!((of(" do"), of(" undo")), (all.clone(), all), "{effects:?}");
    let mut skus: Vec<_> = world.participant.calls("unpack").into_iter().map(|(body, _)| body["sku"].clone()).collect();
    skus.sort_by_key(ToString::to_string);
    assert_eq!(skus, ["s-0", "s-1", "s-2", "s-3", "s-4"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_goes_on_while_no_orchestrator_runs() {
    let world = World::new().await;
    let cool = group("cool", Task::Wait(Wait { duration_ms: 3_000 }));
    let mut trip = world.trip(vec![world.step("reserve", true), cool, world.step("ship", true)]).await;
    let began = std::time::Instant::now();
    let id = start(&trip, &json!({"orderId": "o-1"})).await;
    servers::until("it waits", async || {
        let detail = trip.get(&format!("/sagas/trip/{id}")).await.1;
        detail["current"][0]["operation"] == "wait" && detail["current"][0]["until"].is_string()
    })
    .await;
    trip.kill9();
    trip.start();
    let detail = trip.until_state("trip", &id, "Completed").await;
    assert!(began.elapsed() >= Duration::from_secs(3), "it has waited");
    let lines = history_lines(&detail);
    assert_eq!(lines, ["started", "reserve do succeeded", "cool wait elapsed", "ship do succeeded"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_is_received_once_early_or_late_and_survives_a_crash() {
    let world = World::new().await;
    let mut ship = world.after("ship");
    ship.transaction_mut().unwrap().action = world.call("ship", &[("sum", "steps.paid.reply.sum")]);
    let mut trip = world.trip(vec![world.step("reserve", true), signal("paid", None), ship]).await;
    // early
    world.participant.behave("reserve", Behaviour::NoAnswer);
    let early = start(&trip, &json!({"orderId": "o-1"})).await;
    let sum = json!({"sum": 7});
    assert_eq!(send(&trip, &early, "paid", Some("k"), &sum).await.0, 200);
    assert_eq!(send(&trip, &early, "paid", Some("k"), &sum).await.0, 200, "a repetition");
    trip.kill9();
    trip.start();
    trip.until_ready().await;
    assert_eq!(send(&trip, &early, "paid", Some("k"), &sum).await.0, 200, "a repetition after a crash");
    let (status, problem) = send(&trip, &early, "paid", Some("k"), &json!({"sum": 8})).await;
    assert_eq!((status, problem["title"].as_str()), (422, Some("KeyReused")), "{problem}");
    let (status, problem) = send(&trip, &early, "paid", Some("l"), &sum).await;
    assert_eq!((status, problem["title"].as_str()), (409, Some("Refused")), "{problem}");
    world.participant.behave("reserve", Behaviour::Succeed);
    trip.until_state("trip", &early, "Completed").await;
    let (body, _) = world.participant.calls("ship").remove(0);
    assert_eq!(body, json!({"sum": 7}));
    // late, by the command line
    let late = start(&trip, &json!({"orderId": "o-2"})).await;
    servers::until("it waits", async || {
        trip.get(&format!("/sagas/trip/{late}")).await.1["current"][0]["operation"] == "signal"
    })
    .await;
    let (status, problem) = send(&trip, &late, "payed", None, &sum).await;
    assert_eq!((status, problem["title"].as_str()), (404, Some("UnknownSignal")), "{problem}");
    let sent = trip.cli(&["signal", "trip", &late, "paid", r#"{"sum": 9}"#, "--key", "k"]).await;
    assert!(sent.status.success(), "{sent:?}");
    let detail = trip.until_state("trip", &late, "Completed").await;
    assert!(history_lines(&detail).contains(&"paid signal received".to_owned()), "{detail}");
    let (status, _) = send(&trip, &late, "paid", None, &sum).await;
    assert_eq!(status, 409, "it has ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_that_does_not_come_compensates() {
    let world = World::new().await;
    let trip = world.trip(vec![world.step("reserve", true), signal("paid", Some(300)), world.after("ship")]).await;
    let view = trip.to_its_end("trip", &json!({"orderId": "o-1"})).await;
    assert_eq!(view["failure"]["code"], "SignalTimeout", "{view}");
    assert_eq!(world.participant.effects(&id(&view)), ["reserve do", "reserve undo"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_at_the_time_that_an_expression_gives() {
    let world = World::new().await;
    let wait = group("departure", Task::WaitUntil("input.at".into()));
    let mut trip = world.trip(vec![world.step("flight", true), wait, world.after("mail")]).await;
    let order = |at: &str| json!({"orderId": "o-1", "at": at});
    let past = trip.to_its_end("trip", &order("2026-01-01T00:00:00+01:00")).await;
    assert_eq!(past["state"], "Completed", "a time that has passed is over at once: {past}");
    let lines = history_lines(&trip.get(&format!("/sagas/trip/{}", id(&past))).await.1);
    assert_eq!(lines[2..4], ["departure wait until 2025-12-31T23:00:00Z", "departure wait elapsed"]);

    let later = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second() + 300 * 86_400).unwrap().to_string();
    let future = start(&trip, &order(&later)).await;
    let current = async |trip: &Running| trip.get(&format!("/sagas/trip/{future}")).await.1["current"][0].clone();
    servers::until("it waits", async || current(&trip).await["until"] == later.as_str()).await;
    trip.kill9();
    trip.start();
    trip.until_ready().await;
    let waits = current(&trip).await;
    assert_eq!((&waits["operation"], &waits["until"]), (&json!("wait"), &json!(later)));
    assert_eq!(trip.verb("trip", &future, "cancel").await.0, 200);
    trip.until_state("trip", &future, "Compensated").await;

    for (at, why) in [
        ("tomorrow", "waitUntil is no time in the form of RFC 3339"),
        ("2999-01-01T00:00:00Z", "waitUntil is more than 8760h ahead"),
    ] {
        let (status, problem) = trip.start_saga("trip", &order(at), "", None).await;
        assert_eq!((status, problem["title"].as_str()), (400, Some("UnusableInput")), "{problem}");
        assert!(problem["detail"].as_str().unwrap().contains(why), "{problem}");
    }
}
