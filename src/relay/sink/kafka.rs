//! Kafka: records by an idempotent producer (librdkafka), acknowledged by all replicas that are in sync.
//!
//! librdkafka connects again and sends again by itself, and the broker drops what it has stored already, which it knows by
//! the producer's id and a sequence number. So the producer outlives a session: an outage ends the session, and the next
//! session has the same producer. An event that the producer still has is not handed to it again.

mod producer;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use rdkafka::{
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, OwnedHeaders},
    producer::BaseRecord,
};
use tokio::time::{Instant, timeout_at};

use self::producer::{Heard, Producer};
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
    /// This event, or events like it, until a person changes something: it is held. With how to fix it.
    Refused(&'static str),
}

/// Errors of a record that Kafka 4 and librdkafka answer with. All others pass: an event that fails while others are stored
/// is held after some attempts.
const ERRORS: [(RDKafkaErrorCode, Class); 14] = [
    // of the event
    (RDKafkaErrorCode::MessageSizeTooLarge, Class::Refused("raise max.message.bytes of the topic")),
    (RDKafkaErrorCode::InvalidRecord, Class::Refused("the topic does not accept such records")),
    (RDKafkaErrorCode::InvalidTimestamp, Class::Refused("its created_at is too far from the broker's clock")),
    // of its topic
    (RDKafkaErrorCode::UnknownTopic, Class::Refused(CREATE)),
    (RDKafkaErrorCode::UnknownTopicOrPartition, Class::Refused(CREATE)),
    (RDKafkaErrorCode::UnknownPartition, Class::Refused(CREATE)),
    (RDKafkaErrorCode::InvalidTopic, Class::Refused("change the template")),
    (RDKafkaErrorCode::TopicAuthorizationFailed, Class::Refused("let its user write to the topic")),
    (RDKafkaErrorCode::PolicyViolation, Class::Refused("a policy of the broker forbids it")),
    // of everybody, or of a moment
    (RDKafkaErrorCode::ClusterAuthorizationFailed, Class::Passing),
    (RDKafkaErrorCode::NotEnoughReplicas, Class::Passing),
    (RDKafkaErrorCode::NotEnoughReplicasAfterAppend, Class::Passing),
    (RDKafkaErrorCode::KafkaStorageError, Class::Passing),
    (RDKafkaErrorCode::MessageTimedOut, Class::Passing),
];
const CREATE: &str = "create the topic, or let the broker create topics (auto.create.topics.enable)";

/// The cluster that events go to.
#[derive(Debug)]
pub struct Kafka {
    /// `HOST:PORT`, with commas between them.
    servers: String,
    tls: bool,
    mechanism: Mechanism,
    secret: SecretFolder,
    /// What the topics of the outbox have in common, for messages.
    topics: Arc<str>,
    /// Shown in the broker's log and metrics.
    name: String,
    /// Between two sessions.
    producer: Arc<Mutex<Option<Producer>>>,
}

impl Kafka {
    /// `template` is of the topics.
    pub fn new(sink: &KafkaSink, template: &Template, name: String) -> Self {
        let KafkaSink { servers, tls, secret_folder, mechanism, topic: _ } = sink;
        Self {
            servers: servers.join(","),
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
        settings.insert("bootstrap.servers", servers.clone());
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
            match (secret.text(secret::CERTIFICATE).await?, secret.text(secret::KEY).await?) {
                (Some(certificate), Some(key)) => {
                    settings.insert("ssl.certificate.pem", certificate);
                    settings.insert("ssl.key.pem", key);
                }
                (None, None) => {}
                (Some(_), None) => return Err(SecretError::Half(secret::CERTIFICATE, secret::KEY)),
                (None, Some(_)) => return Err(SecretError::Half(secret::KEY, secret::CERTIFICATE)),
            }
        }
        Ok(settings)
    }

    /// The producer of the last session, or a new one where the Secret has changed or the last one cannot go on.
    async fn producer(&self) -> Result<Producer, SinkError> {
        let unusable = |why: String| self.unreachable(Timestamp::now(), Failure::Refused(why));
        let settings = self.settings().await.map_err(|error| unusable(error.to_string()))?;
        let last = self.producer.lock().unwrap_or_else(PoisonError::into_inner).take();
        match last {
            Some(producer) if producer.can_go_on(&settings) => Ok(producer),
            _ => Producer::new(settings).map_err(|error| unusable(in_terms_of_the_secret(&error.to_string()))),
        }
    }

    fn unreachable(&self, since: Timestamp, failure: Failure) -> SinkError {
        outage(&self.servers, since, failure)
    }
}

fn outage(servers: &str, since: Timestamp, failure: Failure) -> SinkError {
    let address = servers.replace(',', ", ");
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
        let producer = self.producer().await?;
        // gives the producer back when the connection fails, too
        let mut session = KafkaSession {
            producer: Some(producer),
            servers: self.servers.clone(),
            topics: self.topics.clone(),
            keep: self.producer.clone(),
        };
        let deadline = Instant::now() + CONNECT;
        let Some(producer) = &mut session.producer else { return Err(session.silent(Timestamp::now())) };
        let failed = loop {
            if producer.is_connected() {
                return Ok(session);
            }
            // a new producer knows the cluster before it has reported anything
            let wait = if producer.is_new() { Instant::now() + REACHED_CHECK } else { deadline };
            match timeout_at(wait.min(deadline), producer.hear()).await {
                Ok(Heard::Failure(failure @ Failure::Refused(_))) => break failure,
                Ok(Heard::Failure(_) | Heard::Nothing) => {}
                Err(_elapsed) if Instant::now() >= deadline => break producer.failure(),
                Err(_elapsed) => {}
            }
        };
        Err(self.unreachable(producer.since(), failed))
    }
}

/// The time during which the cluster can be reached.
#[derive(Debug)]
pub struct KafkaSession {
    /// There until the session ends.
    producer: Option<Producer>,
    servers: String,
    topics: Arc<str>,
    /// Where the producer is left for the next session.
    keep: Arc<Mutex<Option<Producer>>>,
}

impl Drop for KafkaSession {
    fn drop(&mut self) {
        *self.keep.lock().unwrap_or_else(PoisonError::into_inner) = self.producer.take();
    }
}

impl Session for KafkaSession {
    async fn publish(&mut self, ticket: Ticket, message: &Message) -> Result<Option<Answer>, SinkError> {
        let topic = &message.destination;
        if topic.len() > MAX_TOPIC || matches!(topic.as_str(), "." | "..") {
            return Ok(Some(Answer::Refused(format!(
                "the name of its topic, which the template makes of its row, has {} characters, and Kafka accepts {MAX_TOPIC}: shorten the values that the template uses",
                topic.len()
            ))));
        }
        let Some(producer) = &mut self.producer else { return Err(self.silent(Timestamp::now())) };
        let Ok(number) = usize::try_from(ticket.number) else { return Err(self.silent(Timestamp::now())) };
        let mut record = BaseRecord::<[u8], [u8], usize>::with_opaque_to(topic, number)
            .key(message.key.as_str().as_bytes())
            .payload(&message.body)
            .headers(headers(message));
        if let Some(milliseconds) = message.time.map(|time| time / 1000).filter(|&time| time > 0) {
            record = record.timestamp(milliseconds);
        }
        match producer.send(ticket, record) {
            Ok(()) => Ok(None),
            Err(error) => Ok(Some(answer(&error, &self.topics))),
        }
    }

    async fn replies(&mut self, replies: &mut Vec<Reply>) -> Result<(), SinkError> {
        let Some(producer) = &mut self.producer else { return Err(self.silent(Timestamp::now())) };
        while replies.is_empty() {
            if !producer.is_connected() {
                return Err(outage(&self.servers, producer.since(), producer.failure()));
            }
            if producer.has_no_answers() {
                producer.hear().await;
            }
            producer.answers(replies, |error| answer(error, &self.topics));
        }
        Ok(())
    }

    fn silent(&self, since: Timestamp) -> SinkError {
        outage(&self.servers, since, Failure::Silent)
    }

    fn address(&self) -> &str {
        &self.servers
    }
}

/// The answer for an event with this error. Without the topic's name, which has values of the row.
fn answer(error: &KafkaError, topics: &str) -> Answer {
    let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail);
    let class = ERRORS.iter().find(|(known, _)| *known == code).map_or(Class::Passing, |(_, class)| *class);
    match class {
        Class::Refused(remedy) => Answer::Refused(format!("{code} in a topic {topics}: {remedy}")),
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
