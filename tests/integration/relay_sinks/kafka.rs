//! Kafka, one node of version 4 (KRaft).

use std::{path::Path, time::Duration};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::Headers,
};
use weft::contract::relay::{KafkaSink, Mechanism, Sink};

use super::{Broker, Received};
use crate::servers::{KAFKA_LOGIN, Kafka, KafkaOptions};

/// As the server counts it: topics accept 1,048,588 bytes by default.
const TOO_LARGE: usize = 2 * 1024 * 1024;

#[derive(Debug)]
struct Cluster {
    server: Kafka,
    demands_login: bool,
}

impl Broker for Cluster {
    const SERVER: &'static str = "Kafka";

    async fn start() -> Self {
        Self { server: Kafka::start(KafkaOptions { creates_topics: true }), demands_login: false }
    }

    fn sink(&self, secret: Option<&Path>) -> Sink {
        let address = if self.demands_login { self.server.sasl_address() } else { self.server.address() };
        Sink::Kafka(KafkaSink {
            // the first one is not there
            servers: vec!["127.0.0.1:9".to_owned(), address],
            tls: false,
            secret_folder: secret.map(Path::to_owned),
            mechanism: Mechanism::ScramSha512,
            topic: "{namespace}.{service}.{aggregate_type}".to_owned(),
        })
    }

    async fn kill9(&mut self) {
        self.server.kill9();
    }

    async fn start_again(&mut self) {
        self.server.restart();
    }

    async fn received(&self) -> Vec<Received> {
        let address = self.server.address();
        tokio::task::spawn_blocking(move || consume(&address))
            .await
            .unwrap()
            .into_iter()
            .map(|(_, message)| message)
            .collect()
    }

    async fn demand_credentials(&mut self) -> Option<[Vec<(&'static str, String)>; 2]> {
        self.demands_login = true;
        let (user, password) = KAFKA_LOGIN;
        let login = |password: &str| vec![("username", user.to_owned()), ("password", password.to_owned())];
        Some([login(password), login("another password")])
    }

    fn too_large(&self) -> usize {
        TOO_LARGE
    }
}

/// What a record has beside its message.
#[derive(Debug)]
struct Place {
    key: String,
    timestamp: Option<i64>,
}

/// All records of all topics but the server's own, partition by partition.
fn consume(address: &str) -> Vec<(Place, Received)> {
    const LIMIT: Duration = Duration::from_secs(20);
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", address)
        .set("group.id", "test")
        .set("enable.auto.commit", "false")
        .create()
        .unwrap();
    let metadata = consumer.fetch_metadata(None, LIMIT).unwrap();
    let mut all = Vec::new();
    for topic in metadata.topics().iter().filter(|topic| !topic.name().starts_with("__")) {
        for partition in topic.partitions() {
            let (low, high) = consumer.fetch_watermarks(topic.name(), partition.id(), LIMIT).unwrap();
            let mut assignment = TopicPartitionList::new();
            assignment.add_partition_offset(topic.name(), partition.id(), Offset::Offset(low)).unwrap();
            consumer.assign(&assignment).unwrap();
            let mut next = low;
            while next < high {
                let message = consumer.poll(LIMIT).expect("a record in time").unwrap();
                next = message.offset() + 1;
                all.push(received(&message));
            }
        }
    }
    all
}

fn received(message: &rdkafka::message::BorrowedMessage<'_>) -> (Place, Received) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let header = |header: rdkafka::message::Header<'_, &[u8]>| {
        let name = header.key.strip_prefix("ce_").map_or(header.key.to_owned(), |attribute| format!("ce-{attribute}"));
        (name, text(header.value.unwrap()))
    };
    let mut headers: std::collections::BTreeMap<_, _> =
        message.headers().into_iter().flat_map(Headers::iter).map(header).collect();
    // as the binding for Kafka maps it
    let content_type = headers["content-type"].clone();
    assert_eq!(headers.insert("ce-datacontenttype".to_owned(), content_type), None);
    let place = Place { key: text(message.key().unwrap()), timestamp: message.timestamp().to_millis() };
    let body = message.payload().unwrap().to_vec();
    (place, Received { destination: message.topic().to_owned(), headers, body })
}

/// Whether there is a server; without it, the test says so and passes.
fn is_there() -> bool {
    let missing = Kafka::missing();
    if let Some(why) = missing {
        eprintln!("not tested against Kafka: {why}");
    }
    missing.is_none()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_reordered() {
    if is_there() {
        super::nothing_is_lost_or_reordered::<Cluster>().await;
    }
}

#[tokio::test]
async fn a_refused_event_holds_up_nobody_else() {
    if is_there() {
        super::a_refused_event_holds_up_nobody_else::<Cluster>().await;
    }
}

#[tokio::test]
async fn a_message_is_what_was_written() {
    if is_there() {
        super::a_message_is_what_was_written::<Cluster>().await;
    }
}

#[tokio::test]
async fn credentials_are_read_again() {
    if is_there() {
        super::credentials_are_read_again::<Cluster>().await;
    }
}
