//! An HTTP endpoint: a server of the tests' own, since whatever accepts CloudEvents is one.

use std::{
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, StatusCode, Uri},
    response::{IntoResponse, Response},
};
use tokio::{net::TcpListener, task::JoinHandle};
use weft::contract::relay::{Format, HttpSink, Sink};

use super::{Broker, Received};
use crate::servers;

const LIMIT: usize = 64 * 1024;

#[derive(Clone, Debug, Default)]
struct Endpoint {
    received: Arc<Mutex<Vec<Received>>>,
    /// The token that is demanded.
    token: Option<&'static str>,
    /// Requests that are answered with 429 before any is accepted.
    busy: Arc<Mutex<u32>>,
}

#[derive(Debug)]
pub struct Receiver {
    port: u16,
    endpoint: Endpoint,
    task: Option<JoinHandle<()>>,
}

async fn receive(State(endpoint): State<Endpoint>, uri: Uri, headers: HeaderMap, body: Bytes) -> Response {
    let expected = endpoint.token.map(|token| format!("Bearer {token}"));
    let given = headers.get("authorization").and_then(|value| value.to_str().ok());
    if expected.is_some() && expected.as_deref() != given {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if body.len() > LIMIT {
        return StatusCode::PAYLOAD_TOO_LARGE.into_response();
    }
    if body.windows(9).any(|part| part == b"\"refused\"") {
        return StatusCode::UNPROCESSABLE_ENTITY.into_response();
    }
    if uri.path().ends_with("/forbidden") {
        return StatusCode::FORBIDDEN.into_response();
    }
    let mut busy = endpoint.busy.lock().unwrap();
    if *busy > 0 {
        *busy -= 1;
        return (StatusCode::TOO_MANY_REQUESTS, [("retry-after", "1")]).into_response();
    }
    let text = |value: &axum::http::HeaderValue| value.to_str().unwrap().to_owned();
    let headers = headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect();
    endpoint.received.lock().unwrap().push(Received {
        destination: uri.path().to_owned(),
        headers,
        body: body.to_vec(),
    });
    StatusCode::ACCEPTED.into_response()
}

impl Receiver {
    async fn serve(&mut self) {
        let listener = TcpListener::bind(("127.0.0.1", self.port)).await.unwrap();
        let limit = axum::extract::DefaultBodyLimit::disable();
        let router = Router::new().fallback(receive).layer(limit).with_state(self.endpoint.clone());
        self.task = Some(tokio::spawn(async move { axum::serve(listener, router).await.unwrap() }));
    }

    async fn stop(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
            let _ = task.await;
        }
    }
}

impl Broker for Receiver {
    const SERVER: &'static str = "HTTP";

    async fn start() -> Self {
        let mut receiver = Self { port: servers::free_port(), endpoint: Endpoint::default(), task: None };
        receiver.serve().await;
        receiver
    }

    fn sink(&self, secret: Option<&Path>) -> Sink {
        let url = format!("http://127.0.0.1:{}/{{namespace}}/{{service}}/{{aggregate_id}}", self.port);
        Sink::Http(HttpSink { url, batch: None, secret_folder: secret.map(Path::to_owned) })
    }

    async fn kill9(&mut self) {
        self.stop().await;
    }

    async fn start_again(&mut self) {
        self.serve().await;
    }

    async fn received(&self) -> Vec<Received> {
        self.endpoint.received.lock().unwrap().clone()
    }

    async fn demand_credentials(&mut self) -> Option<[Vec<(&'static str, String)>; 2]> {
        self.stop().await;
        self.endpoint.token = Some("a right token");
        self.serve().await;
        let token = |text: &str| vec![("token", text.to_owned())];
        Some([token("a right token\n"), token("another token")])
    }

    fn too_large(&self) -> usize {
        2 * LIMIT
    }
}

contract!(Receiver, Receiver, true);

/// An endpoint that has too much to do gets the pause that it asks for, and everything afterwards.
#[tokio::test]
async fn a_busy_endpoint_gets_its_pause() {
    let broker = Receiver::start().await;
    *broker.endpoint.busy.lock().unwrap() = 3;
    let setting = super::setting(&broker, None).await;
    let _relay = setting.start_relay();
    for number in 1..=5 {
        let values = format!("('order', '{number}', 'Placed', '{{\"n\": 1}}', '{{}}')");
        setting.database.app().await.batch_execute(&format!("{} {values}", super::INSERT)).await.unwrap();
    }
    let began = Instant::now();
    setting.drained().await;
    assert_eq!((broker.received().await.len(), *broker.endpoint.busy.lock().unwrap()), (5, 0));
    assert!(began.elapsed() > Duration::from_millis(700), "the pause of a second lasted {:?}", began.elapsed());
}

/// What usually concerns everybody, a proxy may say of one event: that one is held, and the others are published.
#[tokio::test]
async fn an_event_that_is_forbidden_holds_up_nobody_else() {
    let broker = Receiver::start().await;
    let setting = super::setting(&broker, None).await;
    let relay = setting.start_relay();
    let app = setting.database.app().await;
    let insert = async |aggregate: &str| {
        let values = format!("('order', '{aggregate}', 'Placed', '{{\"n\": 1}}', '{{}}')");
        app.batch_execute(&format!("{} {values}", super::INSERT)).await.unwrap();
    };
    // what is there when the relay begins is published first, so something has to be
    insert("first").await;
    setting.drained().await;
    insert("forbidden").await;
    let mut others = 1;
    crate::servers::until("it is held, and others go on", async || {
        insert(&others.to_string()).await;
        others += 1;
        relay.status().await.is_some_and(|status| status.held == 1 && status.ready)
    })
    .await;
    relay.until("all others are published", |status| status.published == others && status.pending == 1).await;
}

/// Events that wait are sent together, each aggregate's in order; of a batch that is refused all but the event at fault arrive.
#[tokio::test]
async fn events_of_several_aggregates_are_one_request() {
    const MAX: usize = 10;
    let broker = Receiver::start().await;
    let mut setting = super::setting(&broker, None).await;
    setting.contract.format = Format::CloudEventsStructured;
    let url = format!("http://127.0.0.1:{}/{{namespace}}", broker.port);
    setting.contract.sink = Sink::Http(HttpSink { url, batch: Some(MAX), secret_folder: None });
    setting.write_contract();
    let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         select 'order', (n % 40)::text, 'Placed', jsonb_build_object('n', n) from generate_series(0, 199) n order by n; \
         insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         values ('order', 'refused', 'Placed', '{}'), ('order', 'refused', 'Placed', '{}')";
    setting.database.superuser().await.batch_execute(insert).await.unwrap();
    let relay = setting.start_relay();
    relay.until("all but the refused", |status| status.published == 200 && status.held == 2).await;

    let mut events: Vec<serde_json::Value> = Vec::new();
    let mut longest = 0;
    for request in broker.received().await {
        let body = serde_json::from_slice(&request.body).unwrap();
        match request.headers["content-type"].as_str() {
            "application/cloudevents-batch+json" => {
                let serde_json::Value::Array(batch) = body else { panic!("an array: {body}") };
                longest = longest.max(batch.len());
                events.extend(batch);
            }
            "application/cloudevents+json" => events.push(body),
            other => panic!("{other}"),
        }
    }
    assert_eq!((events.len(), longest), (200, MAX));
    for aggregate in 0..40 {
        let subject = serde_json::Value::from(aggregate.to_string());
        let of_it = events.iter().filter(|event| event["subject"] == subject);
        let numbers: Vec<_> = of_it.map(|event| event["data"]["n"].as_i64().unwrap()).collect();
        assert_eq!(numbers, (0..5).map(|turn| turn * 40 + aggregate).collect::<Vec<_>>());
    }
}
