//! Kafka, one node of version 4 (KRaft).

use std::{path::Path, time::Duration};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    consumer::{BaseConsumer, Consumer},
    message::Headers,
};
use weft::{
    contract::relay::{KafkaSink, Mechanism, Sink},
    domain::destination::{Style, Template},
    relay::sink::{self, Sink as _},
};

use super::{Broker, Received};
use crate::{
    checker,
    relay_harness::Writers,
    servers::{KAFKA_LOGIN, Kafka, KafkaOptions},
};

/// As the server counts it: topics accept 1,048,588 bytes by default.
const TOO_LARGE: usize = 2 * 1024 * 1024;

#[derive(Debug)]
struct Cluster {
    server: Kafka,
    demands_login: bool,
}

impl Cluster {
    fn start_with(options: KafkaOptions) -> Self {
        Self { server: Kafka::start(options), demands_login: false }
    }

    fn sink(&self, secret: Option<&Path>, mechanism: Mechanism) -> Sink {
        let address = if self.demands_login { self.server.tls_address() } else { self.server.address() };
        Sink::Kafka(KafkaSink {
            // the first one is not there
            servers: vec!["127.0.0.1:9".to_owned(), address],
            tls: self.demands_login,
            secret_folder: secret.map(Path::to_owned),
            mechanism,
            topic: "{namespace}.{service}.{aggregate_type}".to_owned(),
        })
    }

    /// Keys of a Secret.
    fn login(&self, password: &str) -> Vec<(&'static str, String)> {
        let user = KAFKA_LOGIN.0.to_owned();
        vec![("username", user), ("password", password.to_owned()), ("ca.crt", self.server.ca())]
    }

    async fn records(&self) -> Vec<(Place, Received)> {
        let address = self.server.address();
        tokio::task::spawn_blocking(move || consume(&address)).await.unwrap()
    }
}

impl Broker for Cluster {
    const SERVER: &'static str = "Kafka";

    async fn start() -> Self {
        Self::start_with(KafkaOptions { creates_topics: true })
    }

    fn sink(&self, secret: Option<&Path>) -> Sink {
        self.sink(secret, Mechanism::Plain)
    }

    async fn kill9(&mut self) {
        self.server.kill9();
    }

    async fn start_again(&mut self) {
        self.server.restart();
    }

    async fn received(&self) -> Vec<Received> {
        self.records().await.into_iter().map(|(_, message)| message).collect()
    }

    async fn demand_credentials(&mut self) -> Option<[Vec<(&'static str, String)>; 2]> {
        self.demands_login = true;
        Some([self.login(KAFKA_LOGIN.1), self.login("another password")])
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

contract!(Cluster, Cluster, is_there());

/// Only a relay that dies makes duplicates: its producer drops those of a broker that dies, or is silent for a while.
#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_dies_makes_no_duplicates() {
    if !is_there() {
        return;
    }
    let mut broker = Cluster::start().await;
    let setting = super::setting(&broker, None).await;
    let relay = setting.start_relay();
    let writers = Writers::start(&setting.url(), 20_261_127, 4, 300);
    relay.until("publishing", |status| status.published > 100).await;
    broker.server.signal("-STOP");
    relay.until("its silence is reported", |status| super::unreachable(status, "has not answered since")).await;
    broker.server.signal("-CONT");
    relay.until("it answers", |status| status.problems.is_empty()).await;
    broker.server.kill9();
    broker.server.restart();
    writers.finished().await;
    setting.drained().await;
    let delivered: Vec<_> = broker.received().await.iter().map(Received::delivered).collect();
    let verdict = checker::check(&setting.committed().await, &delivered);
    assert!(verdict.is_kept() && verdict.duplicates == 0, "{verdict}");
}

/// Where the broker makes no topics, an event waits for its own, and others do not.
#[tokio::test]
async fn a_missing_topic_holds_up_only_its_own_events() {
    if !is_there() {
        return;
    }
    let mut broker = Cluster::start_with(KafkaOptions { creates_topics: false });
    broker.demands_login = true;
    let secret = tempfile::tempdir().unwrap();
    for (key, text) in broker.login(KAFKA_LOGIN.1) {
        std::fs::write(secret.path().join(key), text).unwrap();
    }
    let mut setting = super::setting(&broker, None).await;
    setting.contract.sink = broker.sink(Some(secret.path()), Mechanism::ScramSha512);
    setting.write_contract();
    create_topic(&broker.server.address(), "shop.orders.order").await;
    let relay = setting.start_relay();
    let app = setting.database.app().await;
    for kind in ["secretly", "order"] {
        let values = format!("('{kind}', 'ä/1', 'Placed', '{{\"n\": 1}}', '{{}}', '2026-01-02 03:04:05.678+00')");
        let columns = "(aggregate_type, aggregate_id, type, payload, headers, created_at)";
        app.batch_execute(&format!("insert into weft.outbox {columns} values {values}")).await.unwrap();
    }
    let held = relay.until("one is published", |status| status.published == 1 && status.held == 1).await;
    let message = &held.problems[0].message;
    assert!(message.contains("create the topic") && message.contains("shop.orders.*"), "{message}");
    assert!(!message.contains("secretly") && held.ready, "{held:?}");
    create_topic(&broker.server.address(), "shop.orders.secretly").await;
    relay.until("the other one is published", |status| status.published == 2 && status.problems.is_empty()).await;
    for (place, _) in broker.records().await {
        assert_eq!((place.key.as_str(), place.timestamp), ("ä/1", Some(1_767_323_045_678)));
    }
}

async fn create_topic(address: &str, name: &str) {
    let admin: AdminClient<_> = ClientConfig::new().set("bootstrap.servers", address).create().unwrap();
    let topic = NewTopic::new(name, 3, TopicReplication::Fixed(1));
    admin.create_topics([&topic], &AdminOptions::new()).await.unwrap()[0].clone().unwrap();
}

/// Why there is no connection is one sentence that says what to change.
#[tokio::test]
async fn a_connection_that_cannot_be_made_is_explained() {
    if !is_there() {
        return;
    }
    let server = Kafka::start(KafkaOptions { creates_topics: true });
    let [right, none, stranger] = [0; 3].map(|_| tempfile::tempdir().unwrap());
    for folder in [&right, &stranger] {
        std::fs::write(folder.path().join("username"), KAFKA_LOGIN.0).unwrap();
        std::fs::write(folder.path().join("password"), KAFKA_LOGIN.1).unwrap();
    }
    std::fs::write(right.path().join("ca.crt"), server.ca()).unwrap();
    std::fs::write(none.path().join("note"), "a Secret without a login").unwrap();
    let (plain, tls) = (server.address(), server.tls_address());
    let cases = [
        (&plain, false, &none, None),
        (&tls, true, &right, None),
        (&"127.0.0.1:9".to_owned(), false, &none, Some("has not accepted connections since")),
        (&"kafka.invalid:9092".to_owned(), false, &none, Some("resolve")),
        (&tls, true, &stranger, Some("check ca.crt, tls.crt and tls.key of the Secret")),
        (&tls, false, &none, Some("check tls")),
        (&plain, true, &right, Some("PLAINTEXT broker listener")),
    ];
    let explained = cases.map(async |(address, tls, folder, expected)| {
        let sink = KafkaSink {
            servers: vec![address.clone()],
            tls,
            secret_folder: Some(folder.path().to_owned()),
            mechanism: Mechanism::ScramSha256,
            topic: "all".to_owned(),
        };
        let template = Template::parse(&sink.topic, "shop", "orders", Style::Topic).unwrap();
        let connected = sink::kafka::Kafka::new(&sink, &template, "weft relay orders".to_owned()).connect().await;
        let said = connected.err().map(|error| error.to_string());
        match (said, expected) {
            (None, None) => {}
            (Some(said), Some(expected)) if said.contains(expected) => {}
            (said, expected) => panic!("{address}, TLS {tls}: {said:?} instead of {expected:?}"),
        }
    });
    futures::future::join_all(explained).await;
}
