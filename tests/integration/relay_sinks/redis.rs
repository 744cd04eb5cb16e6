//! Redis Streams.

use std::{collections::BTreeMap, path::Path, time::Duration};

use serde_json::Value;
use weft::contract::{
    problem::ProblemReason,
    relay::{RedisSink, Sink},
};

use super::{Broker, INSERT, Received, setting};
use crate::servers::{self, Redis, redis::MAX_VALUE};

impl Broker for Redis {
    const SERVER: &'static str = "Redis";

    async fn start() -> Self {
        Redis::start()
    }

    fn sink(&self, secret: Option<&Path>) -> Sink {
        Sink::Redis(RedisSink {
            // the first one is not there
            servers: vec!["redis://127.0.0.1:9".to_owned(), self.url()],
            secret_folder: secret.map(Path::to_owned),
            stream: "events:{namespace}:{service}:{aggregate_type}".to_owned(),
            max_length: None,
        })
    }

    async fn kill9(&mut self) {
        Redis::kill9(self);
    }

    async fn start_again(&mut self) {
        Redis::restart(self);
    }

    async fn received(&self) -> Vec<Received> {
        let keys = self.command(&["KEYS", "*"]);
        let keys = keys.as_array().unwrap().iter().map(|key| key.as_str().unwrap());
        let streams = keys.filter(|key| self.command(&["TYPE", key]) == "stream");
        streams.flat_map(|stream| entries(self, stream)).collect()
    }

    async fn demand_credentials(&mut self) -> Option<[Vec<(&'static str, String)>; 2]> {
        self.demand_password("a right password");
        let login = |password: &str| vec![("username", "default".to_owned()), ("password", password.to_owned())];
        Some([login("a right password\n"), login("another password")])
    }

    fn too_large(&self) -> usize {
        2 * MAX_VALUE
    }
}

fn entries(server: &Redis, stream: &str) -> Vec<Received> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let received = |entry: &Value| {
        let fields = entry[1].as_array().unwrap();
        let mut headers: BTreeMap<_, _> = fields.chunks(2).map(|pair| (text(&pair[0]), text(&pair[1]))).collect();
        let body = headers.remove("data").unwrap().into_bytes();
        Received { destination: stream.to_owned(), headers, body }
    };
    server.command(&["XRANGE", stream, "-", "+"]).as_array().unwrap().iter().map(received).collect()
}

contract!(Redis, Redis, true);

fn event(aggregate_type: &str, aggregate: u32) -> String {
    format!("{INSERT} ('{aggregate_type}', '{aggregate}', 'Placed', '{{\"n\": 1}}', '{{}}')")
}

/// Over TLS the server is trusted by the Secret's CA only, and the client is known by the Secret's certificate.
#[tokio::test]
async fn a_connection_is_encrypted_and_both_sides_are_known() {
    let server = Redis::start();
    let mut setting = setting(&server, Some(server.certificates())).await;
    let Sink::Redis(sink) = &mut setting.contract.sink else { panic!("it is for Redis") };
    sink.servers = vec![server.tls_url()];
    super::published_over_tls(&mut setting, server.certificates()).await;
}

/// A primary that falls silent is lost; its replica, once promoted, is found among the servers. A stream is trimmed. An event
/// whose key has another type is held.
#[tokio::test]
async fn a_promoted_replica_is_found_and_streams_are_trimmed() {
    let (primary, replica) = (Redis::start(), Redis::start());
    replica.follow(&primary);
    let mut setting = setting(&primary, None).await;
    setting.contract.sink = Sink::Redis(RedisSink {
        servers: vec![replica.url(), primary.url()],
        secret_folder: None,
        stream: "{aggregate_type}".to_owned(),
        max_length: Some(1),
    });
    setting.write_contract();
    let relay = setting.start_relay();
    let app = setting.database.app().await;
    app.batch_execute(&event("first", 1)).await.unwrap();
    relay.until("published to the primary", |status| status.published == 1).await;
    servers::until("replicated", async || replica.command(&["EXISTS", "first"]) == 1).await;

    primary.signal("-STOP");
    let said = |problem: &weft::contract::problem::Problem| {
        problem.reason == ProblemReason::BrokerUnreachable && problem.message.contains("has not answered since")
    };
    relay.within(Duration::from_secs(20), "the silence is reported", |status| status.problems.iter().any(said)).await;
    replica.command(&["REPLICAOF", "NO", "ONE"]);
    replica.command(&["SET", "text", "x"]);
    app.batch_execute(&event("text", 1)).await.unwrap();
    for aggregate in 0..400 {
        app.batch_execute(&event("second", aggregate)).await.unwrap();
    }
    let status =
        relay.until("published to the promoted one", |status| status.published == 401 && status.held == 1).await;
    let refused = status.problems.iter().find(|problem| problem.reason == ProblemReason::EventRefused).unwrap();
    assert!(refused.message.contains("WRONGTYPE"), "{}", refused.message);
    // trimmed by whole nodes of 100 entries
    let length = replica.command(&["XLEN", "second"]).as_u64().unwrap();
    assert!((1..=200).contains(&length), "{length}");
    primary.signal("-CONT");
}
