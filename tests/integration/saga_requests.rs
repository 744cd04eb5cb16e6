//! What is sent to participants: methods, paths, queries, headers and bodies.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use weft::domain::saga::definition::{Call, Definition, Step, Task, Transaction, Undo};

use crate::{
    saga_participant::Behaviour,
    saga_world::{World, group, id},
};

fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
    pairs.iter().map(|(name, source)| ((*name).to_owned(), (*source).to_owned())).collect()
}

impl World {
    fn resource(&self, method: &str, path: &str, with: &[(&str, &str)]) -> Call {
        let url = self.participant.resource_url(path);
        Call { method: method.into(), url, ..self.call("resource", with) }
    }
}

fn step(name: &str, action: Call, undo: Undo) -> Step {
    group(name, Task::call(Transaction { action, undo, timeout_ms: 2_000, ..Transaction::default() }))
}

#[tokio::test(flavor = "multi_thread")]
async fn each_method_sends_its_arguments_where_they_belong() {
    let world = World::new().await;
    let read = world.resource("GET", "{id}", &[("id", "input.id"), ("tag", "input.tags")]);
    let remove = world.resource("DELETE", "{id}/hold", &[("id", "input.id"), ("why", "failure.code")]);
    let put = Call {
        headers: map(&[("X-Tenant", "input.tenant")]),
        ..world.resource("PUT", "{id}/hold", &[("id", "input.id"), ("price", "steps.read.reply.price * 2")])
    };
    let whole = Call { body: Some("input".into()), ..world.resource("PATCH", "all", &[]) };
    let steps = vec![
        step("read", read, Undo::Nothing),
        step("hold", put, Undo::Call(remove)),
        step("whole", whole, Undo::Nothing),
    ];
    let definition = Definition { name: "order".into(), deadline_ms: 60_000, steps, ..Definition::default() };
    let order = world.run(world.contract(vec![definition.seal()], Vec::new())).await;
    let get = "GET /orders/a%2Fb?tag=x%20y&tag=z";
    world.participant.behave(get, Behaviour::Reply(json!({"price": 7})));
    world.participant.behave("PATCH /orders/all", Behaviour::Refuse("NoSlot"));
    let input = json!({"id": "a/b", "tags": ["x y", "z"], "tenant": "acme"});
    let view = order.to_its_end("order", &input).await;
    assert_eq!(view["state"], "Compensated", "{view}");

    for (command, body, key, content) in [
        (get, Value::Null, "read/do", None),
        ("PUT /orders/a%2Fb/hold", json!({"price": 14}), "hold/do", Some("application/json")),
        ("PATCH /orders/all", input.clone(), "whole/do", Some("application/json")),
        ("DELETE /orders/a%2Fb/hold?why=NoSlot", Value::Null, "hold/undo", None),
    ] {
        let calls = world.participant.calls(command);
        let [(sent, headers)] = calls.as_slice() else { panic!("{command}: {calls:?}") };
        assert_eq!(*sent, body, "{command}");
        assert_eq!(headers["idempotency-key"], format!("{}/{key}", id(&view)), "{command}");
        assert_eq!(headers.get("content-type").map(String::as_str), content, "{command}");
        assert_eq!(headers.get("x-tenant").is_some_and(|tenant| tenant == "acme"), command.starts_with("PUT"));
    }
    assert_eq!(world.participant.all(), 4);

    let (status, problem) = order.start_saga("order", &json!({"id": "", "tags": [], "tenant": ""}), "", None).await;
    assert_eq!((status, problem["title"].as_str()), (400, Some("UnusableInput")), "{problem}");
    assert!(problem["detail"].as_str().unwrap().contains("with.id is empty, and the path needs it"), "{problem}");
    assert_eq!(world.participant.all(), 4, "nothing was sent");
}
