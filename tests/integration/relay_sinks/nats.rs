//! NATS JetStream. What is particular to it is in `relay.rs` and `relay_faults`.

use std::path::Path;

use async_nats::jetstream::{self, consumer::pull};
use futures::StreamExt;
use weft::contract::relay::{NatsSink, Sink};

use super::{Broker, Received, insert_hot, setting, unreachable};
use crate::{checker, relay_harness::STREAM, servers::Nats};

impl Broker for Nats {
    const SERVER: &'static str = "NATS";

    async fn start() -> Self {
        Nats::start()
    }

    fn sink(&self, secret: Option<&Path>) -> Sink {
        Sink::Nats(NatsSink {
            // the first one is not there
            servers: vec!["nats://127.0.0.1:9".to_owned(), self.url()],
            secret_folder: secret.map(Path::to_owned),
            inbox_prefix: None,
            stream: "events".to_owned(),
            subject: "events.{namespace}.{service}.{aggregate_type}.{type}".to_owned(),
            max_age_seconds: 3600,
        })
    }

    async fn kill9(&mut self) {
        Nats::kill9(self);
    }

    async fn start_again(&mut self) {
        Nats::restart(self);
    }

    async fn received(&self) -> Vec<Received> {
        let client = match self.login() {
            Some((user, password)) => {
                async_nats::ConnectOptions::with_user_and_password(user, password).connect(self.url()).await.unwrap()
            }
            None => async_nats::connect(self.url()).await.unwrap(),
        };
        let stream = jetstream::new(client).get_stream("events").await.unwrap();
        let consumer = stream.create_consumer(pull::OrderedConfig::default()).await.unwrap();
        let count = usize::try_from(consumer.cached_info().num_pending).unwrap();
        let messages = consumer.messages().await.unwrap().take(count);
        let received = messages.map(|message| {
            let message = message.unwrap();
            let headers = message.headers.iter().flat_map(|headers| headers.iter());
            let header = |(name, values): (&async_nats::HeaderName, &Vec<async_nats::HeaderValue>)| {
                (name.to_string().to_lowercase(), values[0].as_str().to_owned())
            };
            Received {
                destination: message.subject.to_string(),
                headers: headers.map(header).collect(),
                body: message.payload.to_vec(),
            }
        });
        received.collect().await
    }

    async fn demand_credentials(&mut self) -> Option<[Vec<(&'static str, String)>; 2]> {
        self.demand_login("relay", "a right password");
        let login = |password: &str| vec![("username", "relay".to_owned()), ("password", password.to_owned())];
        Some([login("a right password"), login("another password")])
    }

    fn too_large(&self) -> usize {
        2 * 1024 * 1024
    }
}

contract!(Nats, Nats, true);

fn are_batched(received: &[Received]) -> bool {
    received.iter().any(|message| message.headers.contains_key("nats-batch-commit"))
}

/// The first events of an aggregate that wait are sent as atomic batches.
#[tokio::test(flavor = "multi_thread")]
async fn batches_survive_the_death_of_server_and_relay() {
    const EVENTS: i64 = 20_000;
    let mut broker = Nats::start();
    let setting = setting(&broker, None).await;
    insert_hot(&setting, 1..=EVENTS).await;
    let mut relay = setting.start_relay();
    relay.until("publishing", |status| status.published > 1000).await;
    Broker::kill9(&mut broker).await;
    relay.until("the loss is reported", |status| unreachable(status, Nats::SERVER)).await;
    broker.start_again().await;
    relay.until("publishing again", |status| status.published > 3000 && status.problems.is_empty()).await;
    relay.kill9();
    let relay = setting.start_relay();
    setting.drained().await;
    relay.until("nothing is wrong", |status| status.problems.is_empty() && status.pending == 0).await;
    let received = broker.received().await;
    let delivered: Vec<_> = received.iter().map(Received::delivered).collect();
    let verdict = checker::check(&[("hot".to_owned(), EVENTS.unsigned_abs())].into(), &delivered);
    assert!(verdict.is_kept() && are_batched(&received), "{verdict}");
}

/// The server looks at a batch when it is complete, and stores none of it.
#[tokio::test]
async fn a_batch_that_the_server_refuses_is_sent_one_by_one() {
    let broker = Nats::start();
    let config = jetstream::stream::Config {
        name: STREAM.to_owned(),
        subjects: vec!["events.>".to_owned()],
        allow_atomic_publish: true,
        max_message_size: 4096,
        ..jetstream::stream::Config::default()
    };
    let client = async_nats::connect(broker.url()).await.unwrap();
    jetstream::new(client).create_stream(config).await.unwrap();
    let setting = setting(&broker, None).await;
    insert_hot(&setting, 1..=100).await;
    let large = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         values ('order', 'hot', 'Placed', jsonb_build_object('n', 101, 'text', repeat('x', 5000)))";
    setting.database.app().await.batch_execute(large).await.unwrap();
    insert_hot(&setting, 102..=200).await;
    let relay = setting.start_relay();
    let held = relay.until("one is refused", |status| status.published == 100 && status.held == 100).await;
    let problems = format!("{:?}", held.problems);
    assert!(problems.contains("message size exceeds maximum allowed") && !problems.contains("batch"), "{problems}");
    let received = broker.received().await;
    let numbers: Vec<_> = received.iter().map(Received::delivered).map(|event| event.number).collect();
    assert_eq!(numbers, (1..=100).collect::<Vec<_>>());
}

/// A stream of somebody else's, which the relay does not alter.
#[tokio::test]
async fn a_stream_without_batches_gets_events_one_by_one() {
    let broker = Nats::start();
    let (name, subjects) = (STREAM.to_owned(), vec!["events.>".to_owned()]);
    let config = jetstream::stream::Config { name, subjects, ..jetstream::stream::Config::default() };
    let client = async_nats::connect(broker.url()).await.unwrap();
    jetstream::new(client).create_stream(config).await.unwrap();
    let setting = setting(&broker, None).await;
    insert_hot(&setting, 1..=200).await;
    let _relay = setting.start_relay();
    setting.drained().await;
    let received = broker.received().await;
    assert!(received.len() == 200 && !are_batched(&received));
}
