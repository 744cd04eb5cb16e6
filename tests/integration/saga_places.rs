//! At most 256 requests to one service at a time: what waits for a place, and what holds one.

use std::time::Duration;

use serde_json::json;

use crate::{
    saga_participant::Behaviour,
    saga_world::{Running, World, id},
    servers,
};

const PLACES: usize = 256;

/// An orchestrator of `order`, whose first step may take long, and of `quick`, whose only step is of the same service.
async fn orchestrator(world: &World) -> Running {
    let (mut order, mut quick) = (world.definition("order"), world.definition("quick"));
    order.steps[0].timeout_ms = Duration::from_mins(1).as_millis().try_into().unwrap();
    quick.steps = vec![world.step("quick", false)];
    quick.on_compensated = None;
    world.run(world.contract(vec![order.seal(), quick.seal()], Vec::new())).await
}

/// Starts as many orders as there are places, and waits until each has called its first step.
async fn fill(world: &World, orchestrator: &Running, behaviour: Behaviour) {
    world.participant.behave("reserve", behaviour);
    for _ in 0..PLACES {
        let (status, view) = orchestrator.start_saga("order", &json!({"orderId": "o", "total": 1}), "", None).await;
        assert_eq!(status, 201, "{view}");
    }
    servers::until("all are called", async || world.participant.count("reserve") == PLACES).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_never_finish_keep_no_other_call_from_going_out() {
    let world = World::new().await;
    let orchestrator = orchestrator(&world).await;
    fill(&world, &orchestrator, Behaviour::Unfinished).await;
    let (_, view) = orchestrator.start_saga("quick", &json!({"orderId": "o"}), "?wait=10s", None).await;
    assert_eq!(view["state"], "Completed", "{view}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_waits_for_a_place_is_not_made_after_a_pause() {
    let world = World::new().await;
    let orchestrator = orchestrator(&world).await;
    fill(&world, &orchestrator, Behaviour::NoAnswer).await;
    let input = json!({"orderId": "o"});
    let paused = id(&orchestrator.start_saga("quick", &input, "", None).await.1);
    assert_eq!(orchestrator.verb("quick", &paused, "pause").await.0, 200);
    let behind = id(&orchestrator.start_saga("quick", &input, "", None).await.1);
    assert_eq!(world.participant.count("quick"), 0, "there is no place");

    world.participant.behave("reserve", Behaviour::Succeed);
    // places are given in order: when the one behind it was called, the paused one had its turn
    orchestrator.until_state("quick", &behind, "Completed").await;
    assert_eq!(world.participant.effects(&paused), [""; 0]);
    assert_eq!(world.participant.count("quick"), 1);
    orchestrator.verb("quick", &paused, "resume").await;
    orchestrator.until_state("quick", &paused, "Completed").await;
    orchestrator.until_counts("order", &[("running", 0), ("completed", PLACES as u64)]).await;
}
