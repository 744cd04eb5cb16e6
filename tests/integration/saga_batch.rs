//! A person's verbs for many instances, and what the history says of those who ask.

use futures::{StreamExt, stream};
use serde_json::{Value, json};
use weft::domain::saga::definition::{Definition, Signal, Step, Task};

use crate::{
    saga_participant::Behaviour,
    saga_world::{Running, World, group, id},
    servers,
};

async fn batch(orchestrator: &Running, path: &str) -> (u16, Value) {
    let response = reqwest::Client::new().post(orchestrator.url(path)).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

fn stdout(output: &std::process::Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn signal(name: &str) -> Step {
    group(name, Task::Signal(Signal { within_ms: None }))
}

#[tokio::test(flavor = "multi_thread")]
async fn many_instances_are_changed_page_by_page_each_with_who_and_why() {
    const MANY: usize = 1_010;
    let all = u64::try_from(MANY).unwrap();
    let world = World::new().await;
    let steps = vec![signal("paid"), signal("packed")];
    let definition = Definition {
        name: "order".into(),
        deadline_ms: 600_000,
        key: Some("input.orderId".into()),
        steps,
        ..Definition::default()
    };
    let orchestrator = world.run(world.contract(vec![definition.seal()], Vec::new())).await;
    let start = |number: usize| {
        let orchestrator = &orchestrator;
        async move { id(&orchestrator.start_saga("order", &json!({"orderId": number}), "", None).await.1) }
    };
    let ids: Vec<String> = stream::iter(0..MANY).map(start).buffer_unordered(64).collect().await;

    let paused = orchestrator
        .cli(&["pause", "order", "--all", "--step", "paid", "--by", "anna", "--reason", "bank is away"])
        .await;
    assert_eq!(stdout(&paused), format!("{MANY} changed\n"));
    let detail = orchestrator.get(&format!("/sagas/order/{}", ids[MANY / 2])).await.1;
    assert_eq!(detail["paused"], true, "{detail}");
    let last = detail["history"].as_array().unwrap().last().unwrap();
    assert_eq!(
        (&last["outcome"], &last["by"], &last["reason"]),
        (&json!("pause"), &json!("anna"), &json!("bank is away"))
    );
    let shown = stdout(&orchestrator.cli(&["show", "order", &ids[0]]).await);
    assert!(shown.contains("pause     by anna: bank is away\n"), "{shown}");

    // what is named is changed, and nothing else
    let (status, page) = batch(&orchestrator, "/sagas/order/batch/cancel?key=7&by=anna").await;
    assert_eq!((status, page), (200, json!({"changed": 1})));
    orchestrator.until_counts("order", &[("running", all - 1), ("compensated", 1)]).await;
    assert_eq!(batch(&orchestrator, "/sagas/order/batch/cancel?step=packed&all=true").await.1, json!({"changed": 0}));
    assert_eq!(batch(&orchestrator, "/sagas/order/batch/cancel?olderThan=1h").await.1, json!({"changed": 0}));
    let (_, page) = batch(&orchestrator, "/sagas/order/batch/resume?state=Running").await;
    assert_eq!(page["changed"], 1_000);
    let rest = format!("/sagas/order/batch/resume?state=Running&after={}", page["next"].as_str().unwrap());
    assert_eq!(batch(&orchestrator, &rest).await.1, json!({"changed": MANY - 1_001}));
    let cancelled = orchestrator.cli(&["cancel", "order", "--all", "-o", "json"]).await;
    assert_eq!(serde_json::from_str::<Value>(&stdout(&cancelled)).unwrap(), json!({"changed": MANY - 1}));
    orchestrator.until_counts("order", &[("running", 0), ("compensated", all)]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_changed_is_counted_by_reason() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    world.participant.behave("ship", Behaviour::Refuse("NoTruck"));
    let input = json!({"orderId": "o-1", "total": 1});
    for _ in 0..3 {
        orchestrator.start_saga("order", &input, "", None).await;
    }
    orchestrator.until_counts("order", &[("stuck", 3)]).await;
    let (status, page) = batch(&orchestrator, "/sagas/order/batch/cancel?state=Stuck").await;
    assert_eq!((status, &page["changed"], &page["refused"][0]["count"]), (200, &json!(0), &json!(3)), "{page}");
    assert!(page["refused"][0]["why"].as_str().unwrap().contains("past its point of no return"), "{page}");
    world.participant.behave("ship", Behaviour::Succeed);
    let retried = orchestrator.cli(&["retry", "order", "--state", "Stuck", "--step", "ship"]).await;
    assert_eq!(stdout(&retried), "3 changed\n");
    orchestrator.until_counts("order", &[("completed", 3), ("running", 0)]).await;

    for (path, status, why) in [
        ("pause", 400, "name the instances by `state`, `key` or `olderThan`"),
        ("cancel?step=ship", 400, "name the instances by `state`, `key` or `olderThan`"),
        ("cancel?key=&olderThan=1h", 400, "`key` is empty"),
        (
            "cancel?state=Running&olderthan=1h",
            400,
            "Failed to deserialize query string: olderthan: unknown field `olderthan`",
        ),
        ("pause?state=Completed", 400, "instances that have ended cannot be changed"),
        ("pause?state=Lost", 400, "there is no state `Lost`"),
        ("pause?olderThan=soon", 400, "olderThan=soon is no duration"),
        ("pause?all=true&reason=a%0Ab", 400, "`by` and `reason` have at most 512 bytes and no control characters"),
        ("skip?all=true", 404, "`skip` is no verb for many instances"),
    ] {
        let (found, problem) = batch(&orchestrator, &format!("/sagas/order/batch/{path}")).await;
        assert_eq!(found, status, "{path}: {problem}");
        assert!(problem["detail"].as_str().unwrap().starts_with(why), "{path}: {problem}");
    }
    let (status, problem) = batch(&orchestrator, "/sagas/lost/batch/pause?all=true").await;
    assert_eq!((status, problem["title"].as_str()), (404, Some("UnknownSaga")));
    let unnamed = orchestrator.cli(&["pause", "order"]).await;
    assert!(
        String::from_utf8_lossy(&unnamed.stderr).contains("name an instance, or several by --state"),
        "{unnamed:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_has_pages_also_across_those_that_have_ended() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    let input = json!({"orderId": "o-1", "total": 1});
    let mut started = Vec::new();
    for number in 0..9 {
        // every other one goes on
        let behaviour = if number % 2 == 0 { Behaviour::Succeed } else { Behaviour::Refuse("NoTruck") };
        world.participant.behave("ship", behaviour);
        let view = id(&orchestrator.start_saga("order", &input, "", None).await.1);
        let wanted = if number % 2 == 0 { "Completed" } else { "Stuck" };
        orchestrator.until_state("order", &view, wanted).await;
        started.push(view);
    }
    started.reverse();
    for size in [1, 2, 4] {
        let (mut listed, mut after) = (Vec::new(), String::new());
        loop {
            let page = orchestrator.get(&format!("/sagas/order?limit={size}{after}")).await.1;
            listed.extend(page["items"].as_array().unwrap().iter().map(id));
            let Some(next) = page["next"].as_str() else { break };
            after = format!("&after={next}");
        }
        assert_eq!(listed, started, "in pages of {size}");
    }
    let (status, problem) = orchestrator.get("/sagas/order?after=7").await;
    assert_eq!((status, &problem["detail"]), (400, &json!("after=7 is no `next` of a list")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_can_be_watched_until_the_end() {
    let world = World::new().await;
    let orchestrator = world.orchestrator().await;
    world.participant.behave("ship", Behaviour::NoAnswer);
    let view = id(&orchestrator.start_saga("order", &json!({"orderId": "o-1", "total": 1}), "", None).await.1);
    servers::until("the last step is called", async || world.participant.count("ship") == 1).await;
    let arguments = ["show", "order", &view, "--watch"];
    let ending = async { world.participant.behave("ship", Behaviour::Succeed) };
    let (watched, ()) = tokio::join!(orchestrator.cli(&arguments), ending);
    let text = stdout(&watched);
    assert!(text.contains("\nState:    Completed\n"), "{text}");
    for step in ["reserve", "pack", "charge", "ship"] {
        let rows = text.lines().filter(|row| row.contains(&format!("   {step} ")) && row.contains("succeeded"));
        assert_eq!(rows.count(), 1, "{text}");
    }
}
