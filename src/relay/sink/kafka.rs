//! Kafka: records by an idempotent producer (librdkafka), acknowledged by all replicas that are in sync.
//!
//! librdkafka connects again and sends again by itself, and the broker drops what it has stored already, which it knows by
//! the producer's id and a sequence number. So the producer outlives a session: an outage ends the session, and the next
//! session has the same producer. An event that the producer still has is not handed to it again.

mod producer;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use jiff::Timestamp;
use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, OwnedHeaders},
    producer::BaseRecord,
};
use tokio::{
    sync::{Mutex, OwnedMappedMutexGuard, OwnedMutexGuard},
    time::{Instant, timeout_at},
};

use self::producer::Producer;
use super::{Answer, Reply, Session, Sink, SinkError};
use crate::{
    contract::relay::{KafkaSink, Mechanism},
    domain::{
        destination::Template,
        event::{self, HEADER_DATA_CONTENT_TYPE},
    },
    outage::{Failure, Outage},
    relay::{encode::Message, window::Ticket},
    secret::{self, SecretError, SecretFolder},
};

/// Deadline of connecting.
const CONNECT: Duration = Duration::from_secs(4);
/// How often it is checked whether a new producer has reached the cluster.
const REACHED_CHECK: Duration = Duration::from_millis(20);
/// Longest name of a topic (`Topic.MAX_NAME_LENGTH` of Kafka).
const MAX_TOPIC: usize = 249;
/// Begins the name of an attribute's header (CloudEvents Kafka protocol binding 1.0.2, section 3.2.3.1).
const ATTRIBUTE_PREFIX: &str = "ce_";

/// Settings of librdkafka, beside those of the connection.
const SETTINGS: [(&str, &str); 15] = [
    // acks=all, and at most five requests on the way, in order
    ("enable.idempotence", "true"),
    // as the Java client and Debezium choose the partition of a key
    ("partitioner", "murmur2_random"),
    // requests fill while others are on the way
    ("linger.ms", "0"),
    // a topic may accept less than a mebibyte, and a batch that is too large is refused with all that is in it
    ("batch.size", "65536"),
    // the broker judges an event's size, but closes the connection for a request of 100 MiB (socket.request.max.bytes)
    ("message.max.bytes", "100000000"),
    // an outage that is shorter makes no duplicates; what a partition without a leader has is then held some day
    ("message.timeout.ms", "30000"),
    // about five seconds, after which the broker's error is reported
    ("message.send.max.retries", "7"),
    // a topic that the broker is asked to make may take this long
    ("topic.metadata.propagation.max.ms", "3000"),
    // a request that is answered while nothing is published, by which a lost broker is detected
    ("topic.metadata.refresh.interval.ms", "1500"),
    ("socket.timeout.ms", "10000"),
    ("socket.connection.setup.timeout.ms", "4000"),
    ("api.version.request.timeout.ms", "4000"),
    ("reconnect.backoff.max.ms", "2000"),
    ("statistics.interval.ms", "1000"),
    // what the window permits to be in flight is less
    ("queue.buffering.max.messages", "100000"),
];

/// What an error means for an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// It passes by itself, or concerns everybody: the event waits where it is.
    Passing,
    /// This event, or events like it, until a person changes something: it is held. What is wrong, and how to fix it.
    Refused(&'static str),
}

const TOPIC_MISSING: &str =
    "its topic is missing: create the topic, or let the broker create topics (auto.create.topics.enable)";

/// Errors of a record that Kafka 4 and librdkafka answer with. All others pass: an event that fails while others are stored
/// is held after some attempts.
const ERRORS: [(RDKafkaErrorCode, Class); 15] = [
    // of the event
    (
        RDKafkaErrorCode::MessageSizeTooLarge,
        Class::Refused("it is larger than its topic accepts: raise the topic's max.message.bytes"),
    ),
    (
        RDKafkaErrorCode::InvalidTimestamp,
        Class::Refused("its created_at is further from the broker's clock than its topic accepts: correct the row"),
    ),
    (
        RDKafkaErrorCode::InvalidRecord,
        Class::Refused("its topic does not accept such records: check the topic's settings"),
    ),
    (
        RDKafkaErrorCode::PolicyViolation,
        Class::Refused("a policy of the broker forbids it: check the broker's policies"),
    ),
    // of its topic
    (RDKafkaErrorCode::UnknownTopic, Class::Refused(TOPIC_MISSING)),
    (RDKafkaErrorCode::UnknownTopicOrPartition, Class::Refused(TOPIC_MISSING)),
    (RDKafkaErrorCode::UnknownPartition, Class::Refused(TOPIC_MISSING)),
    (
        RDKafkaErrorCode::InvalidTopic,
        Class::Refused("the broker does not accept its topic's name: change the template"),
    ),
    (
        RDKafkaErrorCode::TopicAuthorizationFailed,
        Class::Refused("the relay's user may not write to its topic: grant Write and Describe"),
    ),
    // of everybody, or of a moment
    (RDKafkaErrorCode::InvalidDifferentRecord, Class::Passing),
    (RDKafkaErrorCode::ClusterAuthorizationFailed, Class::Passing),
    (RDKafkaErrorCode::NotEnoughReplicas, Class::Passing),
    (RDKafkaErrorCode::NotEnoughReplicasAfterAppend, Class::Passing),
    (RDKafkaErrorCode::KafkaStorageError, Class::Passing),
    (RDKafkaErrorCode::MessageTimedOut, Class::Passing),
];

/// The cluster that events go to.
#[derive(Debug)]
pub struct Kafka {
    servers: Vec<String>,
    tls: bool,
    mechanism: Mechanism,
    secret: SecretFolder,
    /// What the topics of the outbox have in common, for messages.
    topics: Arc<str>,
    /// Shown in the broker's log and metrics.
    name: String,
    /// A session has it while it lasts.
    producer: Arc<Mutex<Option<Producer>>>,
}

impl Kafka {
    /// `template` is of the topics.
    pub fn new(sink: &KafkaSink, template: &Template, name: String) -> Self {
        let KafkaSink { servers, tls, secret_folder, mechanism, topic: _ } = sink;
        Self {
            servers: servers.clone(),
            tls: *tls,
            mechanism: *mechanism,
            secret: SecretFolder::new(secret_folder.clone()),
            topics: template.filter(None).into(),
            name,
            producer: Arc::default(),
        }
    }

    /// The settings of a producer with the credentials that the Secret has now.
    async fn settings(&self) -> Result<BTreeMap<&'static str, String>, SecretError> {
        let Self { servers, tls, mechanism, secret, topics: _, name, producer: _ } = self;
        let mut settings: BTreeMap<_, _> = SETTINGS.map(|(key, value)| (key, value.to_owned())).into();
        settings.insert("bootstrap.servers", servers.join(","));
        settings.insert("client.id", name.clone());
        let login = secret.login().await?;
        let protocol = match (tls, login.is_some()) {
            (false, false) => "plaintext",
            (true, false) => "ssl",
            (false, true) => "sasl_plaintext",
            (true, true) => "sasl_ssl",
        };
        settings.insert("security.protocol", protocol.to_owned());
        if let Some((username, password)) = login {
            settings.insert("sasl.mechanism", mechanism.as_str().to_owned());
            settings.insert("sasl.username", username);
            settings.insert("sasl.password", password);
        }
        if *tls {
            // the system's certificates, wherever this system has them
            settings.insert("ssl.ca.location", "probe".to_owned());
            if let Some(ca) = secret.text(secret::CA).await? {
                settings.remove("ssl.ca.location");
                settings.insert("ssl.ca.pem", ca);
            }
            let (certificate, key) = (secret.text(secret::CERTIFICATE).await?, secret.text(secret::KEY).await?);
            if let Some((certificate, key)) = secret::both([secret::CERTIFICATE, secret::KEY], certificate, key)? {
                settings.insert("ssl.certificate.pem", certificate);
                settings.insert("ssl.key.pem", key);
            }
        }
        Ok(settings)
    }

    /// The producer of the last session, or a new one where the Secret has changed or the last one cannot go on.
    async fn producer(&self) -> Result<OwnedMappedMutexGuard<Option<Producer>, Producer>, SinkError> {
        let unusable = |why| outage(self.address(), Timestamp::now(), Failure::Refused(why));
        let settings = self.settings().await.map_err(|error| unusable(error.to_string()))?;
        let mut slot = self.producer.clone().lock_owned().await;
        let producer = match slot.take() {
            Some(last) if last.can_go_on(&settings) => last,
            last => Producer::new(settings, last.as_ref()).map_err(|error| unusable(in_terms_of_the_secret(&error)))?,
        };
        Ok(OwnedMutexGuard::map(slot, |slot| slot.insert(producer)))
    }

    fn address(&self) -> String {
        self.servers.join(", ")
    }
}

fn outage(address: String, since: Timestamp, failure: Failure) -> SinkError {
    SinkError::Unreachable(Outage { server: Kafka::SERVER, address, since, failure })
}

/// librdkafka names its own settings.
fn in_terms_of_the_secret(error: &str) -> String {
    [("ssl.ca.pem", secret::CA), ("ssl.certificate.pem", secret::CERTIFICATE), ("ssl.key.pem", secret::KEY)]
        .iter()
        .fold(error.to_owned(), |text, (setting, key)| text.replace(setting, &format!("{key} of the Secret")))
}

impl Sink for Kafka {
    const SERVER: &'static str = "Kafka";
    type Session = KafkaSession;

    async fn connect(&self) -> Result<KafkaSession, SinkError> {
        let mut producer = self.producer().await?;
        let deadline = Instant::now() + CONNECT;
        let failure = loop {
            if producer.is_connected() {
                return Ok(KafkaSession { producer, address: self.address(), topics: self.topics.clone() });
            }
            let check = if producer.reports_late() { deadline.min(Instant::now() + REACHED_CHECK) } else { deadline };
            match timeout_at(check, producer.hear()).await {
                Ok(Some(failure @ Failure::Refused(_))) => break failure,
                Err(_elapsed) if Instant::now() >= deadline => break producer.failure(),
                Ok(_) | Err(_) => {}
            }
        };
        Err(outage(self.address(), producer.since(), failure))
    }
}

/// The time during which the cluster can be reached.
#[derive(Debug)]
pub struct KafkaSession {
    producer: OwnedMappedMutexGuard<Option<Producer>, Producer>,
    address: String,
    topics: Arc<str>,
}

impl Session for KafkaSession {
    async fn publish(&mut self, ticket: Ticket, message: &Message) -> Result<Option<Answer>, SinkError> {
        let topic = &message.destination;
        if topic.len() > MAX_TOPIC || matches!(topic.as_str(), "." | "..") {
            let why = format!(
                "the name of its topic has {} characters, and Kafka accepts {MAX_TOPIC}: shorten the values that the template uses",
                topic.len()
            );
            return Ok(Some(Answer::Refused(why)));
        }
        self.producer.send(ticket, || {
            let record = BaseRecord::with_opaque_to(topic, Box::new(ticket.number))
                .key(message.key.as_str().as_bytes())
                .payload(&*message.body)
                .headers(headers(message));
            match message.time.map(|microseconds| microseconds / 1000) {
                Some(milliseconds) if milliseconds > 0 => record.timestamp(milliseconds),
                _ => record,
            }
        });
        Ok(None)
    }

    async fn replies(&mut self, replies: &mut Vec<Reply>) -> Result<(), SinkError> {
        while replies.is_empty() {
            if !self.producer.is_connected() {
                return Err(outage(self.address.clone(), self.producer.since(), self.producer.failure()));
            }
            if !self.producer.has_answers() {
                self.producer.hear().await;
            }
            let topics = &self.topics;
            replies.extend(self.producer.answers().map(|(ticket, result)| Reply {
                ticket,
                answer: result.map_or_else(|error| answer(&error, topics), |()| Answer::Stored),
            }));
        }
        Ok(())
    }

    fn silent(&self, since: Timestamp) -> SinkError {
        outage(self.address.clone(), since, Failure::Silent)
    }

    fn address(&self) -> &str {
        &self.address
    }
}

/// The answer for an event with this error. Without the topic's name, which has values of the row.
fn answer(error: &KafkaError, topics: &str) -> Answer {
    let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail);
    let class = ERRORS.iter().find(|(known, _)| *known == code).map_or(Class::Passing, |(_, class)| *class);
    match class {
        Class::Refused(why) => Answer::Refused(format!("{why}; the relay's topics are {topics}")),
        Class::Passing => Answer::Failed(code.to_string()),
    }
}

/// Attributes of a CloudEvent have their own prefix in Kafka, and values are not encoded. `content-type` stands for
/// `datacontenttype`.
fn headers(message: &Message) -> OwnedHeaders {
    let mut headers = OwnedHeaders::new();
    for (name, value) in message.headers() {
        let value = event::decode(value);
        let header = |key| Header { key, value: Some(value.as_bytes()) };
        headers = match name.strip_prefix(event::ATTRIBUTE_PREFIX) {
            _ if name == HEADER_DATA_CONTENT_TYPE => headers,
            Some(attribute) => headers.insert(header(&format!("{ATTRIBUTE_PREFIX}{attribute}"))),
            None => headers.insert(header(name)),
        };
    }
    headers
}

#[cfg(test)]
mod tests {
    use rdkafka::message::Headers;

    use super::*;
    use crate::{
        contract::relay::Format,
        domain::{
            destination::Style,
            event::{Event, Position, Text},
        },
        relay::{
            encode::Encoder,
            source::{Place, Row},
        },
    };

    #[test]
    fn an_error_is_the_events_or_everybodys() {
        for (code, expected) in [
            (RDKafkaErrorCode::MessageSizeTooLarge, "max.message.bytes; the relay's topics are shop.orders.*"),
            (RDKafkaErrorCode::UnknownTopic, "create the topic"),
            (RDKafkaErrorCode::TopicAuthorizationFailed, "grant Write and Describe"),
        ] {
            let Answer::Refused(why) = answer(&KafkaError::MessageProduction(code), "shop.orders.*") else {
                panic!("{code} is the event's")
            };
            assert!(why.contains(expected), "{why}");
        }
        for code in [RDKafkaErrorCode::NotEnoughReplicas, RDKafkaErrorCode::QueueFull, RDKafkaErrorCode::Unknown] {
            assert!(matches!(answer(&KafkaError::MessageProduction(code), ""), Answer::Failed(_)), "{code}");
        }
    }

    #[test]
    fn headers_are_as_the_binding_for_kafka_has_them() {
        let event = Event {
            id: "7".into(),
            aggregate_type: "order".into(),
            aggregate_id: "ä 1".into(),
            kind: "Placed".into(),
            content_type: "application/json".into(),
            payload: bytes::Bytes::from_static(b"{}"),
            headers: bytes::Bytes::from_static(br#"{"traceparent": "00-ab"}"#),
            context: bytes::Bytes::new(),
            created_at: Some(1_700_000_000_123_456),
            position: Position::default(),
        };
        let row = Row { event, place: Place { seq: 1, transaction: None }, committed_at: None };
        for (format, expected) in [
            (
                Format::CloudEvents,
                [
                    ("ce_id", "7"),
                    ("ce_subject", "ä 1"),
                    ("ce_traceparent", "00-ab"),
                    ("content-type", "application/json"),
                ]
                .as_slice(),
            ),
            (Format::CloudEventsStructured, &[("content-type", "application/cloudevents+json")]),
            (Format::Raw, &[("event-id", "7"), ("event-key", "order/ä 1"), ("content-type", "application/json")]),
        ] {
            let template = Template::parse("{aggregate_id}", "shop", "orders", Style::Topic).unwrap();
            let mut message = Message::default();
            Encoder::new(template, format, "/shop/orders".to_owned()).encode(&row, &mut message);
            assert_eq!(message.destination, "_C3_A4_201");
            assert_eq!((message.key.clone(), message.time), (Text::from("ä 1"), Some(1_700_000_000_123_456)));
            let headers = headers(&message);
            let headers: BTreeMap<_, _> =
                headers.iter().map(|header| (header.key.to_owned(), header.value.unwrap().to_owned())).collect();
            for (name, value) in expected {
                assert_eq!(headers.get(*name).map(Vec::as_slice), Some(value.as_bytes()), "{format:?} {name}");
            }
            assert!(headers.keys().all(|name| !name.starts_with("ce-") && name != "ce_datacontenttype"), "{headers:?}");
        }
    }

    fn sink(folder: &std::path::Path) -> Kafka {
        let sink = KafkaSink {
            servers: vec!["127.0.0.1:9".to_owned()],
            tls: true,
            secret_folder: Some(folder.to_owned()),
            mechanism: Mechanism::ScramSha256,
            topic: "{aggregate_type}".to_owned(),
        };
        let template = Template::parse(&sink.topic, "shop", "orders", Style::Topic).unwrap();
        Kafka::new(&sink, &template, "weft relay orders".to_owned())
    }

    #[tokio::test]
    async fn a_secret_decides_how_it_connects() {
        let folder = tempfile::tempdir().unwrap();
        let sink = sink(folder.path());
        assert!(sink.settings().await.is_err(), "the Secret is missing");
        std::fs::write(folder.path().join("note"), "a key that is for people").unwrap();
        let settings = sink.settings().await.unwrap();
        let of = |settings: &BTreeMap<&str, String>, key| settings.get(key).cloned().unwrap_or_default();
        assert_eq!(
            (of(&settings, "security.protocol"), of(&settings, "ssl.ca.location")),
            ("ssl".into(), "probe".into())
        );
        for (key, text) in [("username", "orders"), ("password", "secret"), ("ca.crt", "PEM")] {
            std::fs::write(folder.path().join(key), text).unwrap();
        }
        let settings = sink.settings().await.unwrap();
        assert_eq!(
            (of(&settings, "security.protocol"), of(&settings, "ssl.ca.pem")),
            ("sasl_ssl".into(), "PEM".into())
        );
        assert_eq!(
            (of(&settings, "sasl.mechanism"), of(&settings, "ssl.ca.location")),
            ("SCRAM-SHA-256".into(), String::new())
        );
    }

    #[tokio::test]
    async fn what_is_no_certificate_is_named_and_not_quoted() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("ca.crt"), "a secret").unwrap();
        let SinkError::Unreachable(outage) = sink(folder.path()).connect().await.unwrap_err() else {
            panic!("it is an outage")
        };
        let said = outage.to_string();
        assert!(said.contains("ca.crt of the Secret") && !said.contains("a secret"), "{said}");
    }
}
