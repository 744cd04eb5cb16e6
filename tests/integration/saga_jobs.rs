//! Participants that accept a job (202) or refuse with a long document, over real connections.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use axum::{
    Json, Router,
    http::{StatusCode, header},
    response::{IntoResponse, Redirect, Response},
    routing::{get, post},
};
use serde_json::json;
use tokio::net::TcpListener;
use weft::domain::saga::definition::Definition;

use crate::saga_world::{World, history_lines, id};

/// With the pauses of 100, 200, 400, 800 and 1600 ms before the polls, the job takes longer than the time-out of 2 s.
const POLLS_WHILE_RUNNING: usize = 4;

#[derive(Default)]
struct Participant {
    commands: AtomicUsize,
    polls: AtomicUsize,
}

impl Participant {
    /// Returns the base URL.
    async fn start(self: &Arc<Self>) -> String {
        let (pack, status) = (Arc::clone(self), Arc::clone(self));
        let accept = |location: &'static str| (StatusCode::ACCEPTED, [(header::LOCATION, location)]).into_response();
        let router = Router::new()
            .route(
                "/commands/pack",
                post(async move || {
                    pack.commands.fetch_add(1, Ordering::Relaxed);
                    accept("7/status")
                }),
            )
            .route("/commands/7/status", get(async move || status.status()))
            .route("/parcels/7", get(async || Json(json!({"parcel": 7, "status": "pending"}))))
            .route("/commands/endless", post(async move || accept("/endless")))
            .route("/endless", get(async || Json(json!({"status": "running"}))))
            .route("/commands/refuse", post(async || (StatusCode::CONFLICT, long_refusal())));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move { axum::serve(listener, router).await });
        format!("http://{address}/commands")
    }

    fn status(&self) -> Response {
        if self.polls.fetch_add(1, Ordering::Relaxed) < POLLS_WHILE_RUNNING {
            return Json(json!({"status": "Running"})).into_response();
        }
        Redirect::to("/parcels/7").into_response()
    }
}

fn long_refusal() -> String {
    format!(r#"{{"code": "NoSlot", "limit": 1e400, "trace": "{}"}}"#, "x".repeat(100_000))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_accepted_job_is_polled_until_it_has_ended_or_the_deadline_passes() {
    let world = World::new().await;
    let participant = Arc::new(Participant::default());
    let url = participant.start().await;
    let saga = |name: &str, command: &str, change: fn(&mut Definition)| {
        let mut definition = world.definition(name);
        definition.steps[1].transaction_mut().unwrap().action.url = format!("{url}/{command}");
        change(&mut definition);
        definition.seal()
    };
    let sagas = vec![
        saga("order", "pack", |_| {}),
        saga("refused", "refuse", |_| {}),
        saga("endless", "endless", |definition| definition.deadline_ms = 3_000),
    ];
    let orchestrator = world.run(world.contract(sagas, Vec::new())).await;
    let input = json!({"orderId": "o-1", "total": 1});

    let view = orchestrator.to_its_end("order", &input).await;
    assert_eq!(view["state"], "Completed", "{view}");
    let detail = orchestrator.get(&format!("/sagas/order/{}", id(&view))).await.1;
    assert_eq!(history_lines(&detail)[2], "pack do succeeded");
    assert_eq!(detail["history"][2]["reply"], json!({"parcel": 7, "status": "pending"}));
    assert_eq!(participant.commands.load(Ordering::Relaxed), 1, "the time-out is of a request, not of the job");

    let view = orchestrator.to_its_end("refused", &input).await;
    assert_eq!((&view["state"], &view["failure"]["code"]), (&json!("Compensated"), &json!("NoSlot")), "{view}");

    let view = orchestrator.to_its_end("endless", &input).await;
    assert_eq!(view["failure"]["code"], "DeadlineExceeded", "{view}");
    let detail = orchestrator.get(&format!("/sagas/endless/{}", id(&view))).await.1;
    let expected =
        ["started", "reserve do succeeded", "deadline passed", "pack undo succeeded", "reserve undo succeeded"];
    assert_eq!(history_lines(&detail)[..5], expected, "{detail}");
}
