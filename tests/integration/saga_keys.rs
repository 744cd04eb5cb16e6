//! Business keys: what people know an instance by.

use serde_json::{Value, json};

use crate::{
    saga_participant::Behaviour,
    saga_world::{Running, World, id},
    servers,
};

async fn by_key(orchestrator: &Running, key: &str, more: &str) -> Vec<String> {
    let list = orchestrator.get(&format!("/sagas/order?key={key}{more}")).await.1;
    list["items"].as_array().unwrap_or_else(|| panic!("{list}")).iter().map(id).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_found_and_changed_by_its_business_key() {
    let world = World::new().await;
    let mut orchestrator = world.orchestrator_of(|definition| definition.key = Some("input.orderId".into())).await;
    let order = |key: &str| json!({"orderId": key, "total": 1});
    let first = id(&orchestrator.to_its_end("order", &order("o-1")).await);
    world.participant.behave("pack", Behaviour::NoAnswer);
    let second = orchestrator.start_saga("order", &order("o-1"), "", None).await.1;
    assert_eq!(second["key"], "o-1", "{second}");
    let second = id(&second);
    let other = id(&orchestrator.start_saga("order", &order("o-2"), "", None).await.1);
    servers::until("both are in progress", async || world.participant.count("pack") == 3).await;

    assert_eq!(by_key(&orchestrator, "o-1", "").await, [second.clone(), first.clone()]);
    assert_eq!(by_key(&orchestrator, "o-1", "&state=Running").await, std::slice::from_ref(&second));
    assert_eq!(by_key(&orchestrator, "o-1", "&state=Completed").await, std::slice::from_ref(&first));
    assert_eq!(by_key(&orchestrator, "o-3", "").await, Vec::<String>::new());
    let listed = String::from_utf8(orchestrator.cli(&["list", "order", "--key", "o-2"]).await.stdout).unwrap();
    assert!(listed.lines().count() == 2 && listed.contains(&format!("{other}   o-2   Running")), "{listed}");

    // also after a restart, by the key in place of the id: the one that runs
    orchestrator.kill9();
    orchestrator.start();
    orchestrator.until_ready().await;
    assert_eq!(orchestrator.get("/sagas/order/o-1").await.1["id"], json!(second));
    let cancelled = orchestrator.cli(&["cancel", "order", "o-1"]).await;
    assert!(cancelled.status.success(), "{cancelled:?}");
    world.participant.behave("pack", Behaviour::Succeed);
    orchestrator.until_state("order", &second, "Compensated").await;
    orchestrator.until_state("order", &other, "Completed").await;

    let (status, problem) = orchestrator.verb("order", "o-1", "pause").await;
    assert_eq!((status, problem["title"].as_str()), (409, Some("Refused")), "it has ended: {problem}");
    let (status, problem) = orchestrator.verb("order", "o-3", "pause").await;
    assert_eq!((status, problem["title"].as_str()), (404, Some("UnknownInstance")), "{problem}");
    assert_eq!(problem["detail"], "no instance of saga `order` has the id or the key `o-3`");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_several_running_instances_names_none() {
    let world = World::new().await;
    let orchestrator = world.orchestrator_of(|definition| definition.key = Some("input.orderId".into())).await;
    world.participant.behave("pack", Behaviour::NoAnswer);
    // a key may look like an id
    let key = "0192f3a4-0000-7000-8000-000000000001";
    let order = json!({"orderId": key, "total": 1});
    for _ in 0..2 {
        orchestrator.start_saga("order", &order, "", None).await;
    }
    let (status, problem) = orchestrator.verb("order", key, "cancel").await;
    assert_eq!((status, problem["title"].as_str()), (409, Some("SeveralRunning")), "{problem}");
    let running = by_key(&orchestrator, key, "").await;
    assert_eq!(orchestrator.verb("order", &running[0], "cancel").await.0, 200);
    world.participant.behave("pack", Behaviour::Succeed);
    orchestrator.until_state("order", &running[0], "Compensated").await;
    orchestrator.until_state("order", &running[1], "Completed").await;

    let (status, problem) = orchestrator.start_saga("order", &json!({"orderId": "", "total": 1}), "", None).await;
    assert_eq!((status, &problem["title"]), (400, &Value::from("UnusableInput")), "{problem}");
    assert!(problem["detail"].as_str().unwrap().ends_with(": key is empty, or has control characters"), "{problem}");
}
