//! At most 256 concurrent requests to one service: what waits for a permit, and what holds one.

use std::time::Duration;

use serde_json::json;

use crate::{
    saga_participant::Behaviour,
    saga_world::{Running, World, id},
    servers,
};

const PERMITS: usize = 256;

/// Runs `order`, whose first step may take long, and `quick`, whose only step calls the same service.
async fn orchestrator(world: &World) -> Running {
    let (mut order, mut quick) = (world.definition("order"), world.definition("quick"));
    order.steps[0].transaction_mut().unwrap().timeout_ms = Duration::from_mins(1).as_millis().try_into().unwrap();
    quick.steps = vec![world.step("quick", false)];
    quick.on_compensated = None;
    world.run(world.contract(vec![order.seal(), quick.seal()], Vec::new())).await
}

/// Starts as many orders as there are permits, and waits until each has called its first step.
async fn fill(world: &World, orchestrator: &Running, behaviour: Behaviour) {
    world.participant.behave("reserve", behaviour);
    for _ in 0..PERMITS {
        let (status, view) = orchestrator.start_saga("order", &json!({"orderId": "o", "total": 1}), "", None).await;
        assert_eq!(status, 201, "{view}");
    }
    servers::until("all are called", async || world.participant.count("reserve") == PERMITS).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_never_finish_block_no_other_call() {
    let world = World::new().await;
    let orchestrator = orchestrator(&world).await;
    fill(&world, &orchestrator, Behaviour::Unfinished).await;
    let (_, view) = orchestrator.start_saga("quick", &json!({"orderId": "o"}), "?wait=10s", None).await;
    assert_eq!(view["state"], "Completed", "{view}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_waits_for_a_permit_is_not_made_after_a_pause() {
    let world = World::new().await;
    let orchestrator = orchestrator(&world).await;
    fill(&world, &orchestrator, Behaviour::NoAnswer).await;
    let input = json!({"orderId": "o"});
    let paused = id(&orchestrator.start_saga("quick", &input, "", None).await.1);
    assert_eq!(orchestrator.verb("quick", &paused, "pause").await.0, 200);
    let behind = id(&orchestrator.start_saga("quick", &input, "", None).await.1);
    assert_eq!(world.participant.count("quick"), 0, "there is no permit");

    world.participant.behave("reserve", Behaviour::Succeed);
    // permits are granted in order: when the later instance was called, the paused one had its turn
    orchestrator.until_state("quick", &behind, "Completed").await;
    assert_eq!(world.participant.effects(&paused), [""; 0]);
    assert_eq!(world.participant.count("quick"), 1);
    orchestrator.verb("quick", &paused, "resume").await;
    orchestrator.until_state("quick", &paused, "Completed").await;
    orchestrator.until_counts("order", &[("running", 0), ("completed", PERMITS as u64)]).await;
}
