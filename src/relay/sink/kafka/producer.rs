//! A producer of librdkafka, and what is known of it: whether it reaches the cluster, and which events it has.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use jiff::Timestamp;
use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    message::DeliveryResult,
    producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer},
};
use serde::Deserialize;
use tokio::{sync::mpsc, time::Instant};

use super::{Answer, Reply, Ticket};
use crate::outage::Failure;

/// Without a byte for this long, although something is asked every 1.5 s, the cluster is lost.
const SILENCE: Duration = Duration::from_millis(3500);
/// The same before anything was published: librdkafka then asks every ten seconds.
const SILENCE_UNUSED: Duration = Duration::from_secs(14);
/// Most events of librdkafka that are handled at once.
const BATCH: usize = 512;

/// What librdkafka reports, on threads of its own.
#[derive(Debug)]
enum Event {
    /// The record of this number is stored, or is not.
    Delivered(usize, Result<(), KafkaError>),
    /// A broker cannot be used.
    Failed(Failure),
    /// This producer cannot go on.
    Fatal(String),
    Statistics(Statistics),
}

/// Of librdkafka's statistics (its STATISTICS.md), what tells whether the cluster answers.
#[derive(Debug, Default, Deserialize)]
struct Statistics {
    brokers: HashMap<String, BrokerStatistics>,
}

#[derive(Debug, Deserialize)]
struct BrokerStatistics {
    state: String,
    #[serde(rename = "rxbytes")]
    received: u64,
}

/// What came of waiting.
#[derive(Debug)]
pub(super) enum Heard {
    Nothing,
    Failure(Failure),
}

pub(super) struct Producer {
    settings: BTreeMap<&'static str, String>,
    /// There until this is dropped.
    client: Option<ThreadedProducer<Callbacks>>,
    events: mpsc::UnboundedReceiver<Event>,
    buffer: Vec<Event>,
    /// Events without an answer that was handed over, with their last attempt.
    unanswered: HashMap<usize, u32>,
    delivered: Vec<(usize, Result<(), KafkaError>)>,
    link: Link,
}

/// The connections to the brokers, taken together.
#[derive(Debug)]
struct Link {
    connected: bool,
    received: u64,
    received_at: Instant,
    up_at: Instant,
    /// The last time that the cluster was known to answer, or the beginning.
    since: Timestamp,
    failure: Option<Failure>,
    fatal: bool,
    /// Whether anything was published.
    used: bool,
}

impl Producer {
    pub(super) fn new(settings: BTreeMap<&'static str, String>) -> KafkaResult<Self> {
        let mut config = ClientConfig::new();
        for (key, value) in &settings {
            config.set(*key, value);
        }
        // what matters comes as an error; the log has names of topics, which have values of rows
        config.set_log_level(RDKafkaLogLevel::Emerg);
        let (sender, events) = mpsc::unbounded_channel();
        let client = config.create_with_context(Callbacks { events: sender })?;
        Ok(Self {
            settings,
            client: Some(client),
            events,
            buffer: Vec::new(),
            unanswered: HashMap::new(),
            delivered: Vec::new(),
            link: Link::new(Instant::now()),
        })
    }

    pub(super) fn can_go_on(&self, settings: &BTreeMap<&'static str, String>) -> bool {
        !self.link.fatal && self.settings == *settings
    }

    /// Hands a record over. One that is there already is not taken twice: its answer counts for the new attempt.
    pub(super) fn send(&mut self, ticket: Ticket, record: BaseRecord<'_, [u8], [u8], usize>) -> Result<(), KafkaError> {
        let number = record.delivery_opaque;
        if let Some(attempt) = self.unanswered.get_mut(&number) {
            *attempt = ticket.attempt;
            return Ok(());
        }
        let Some(client) = &self.client else { return Err(KafkaError::Canceled) };
        client.send(record).map_err(|(error, _record)| error)?;
        self.link.used = true;
        self.unanswered.insert(number, ticket.attempt);
        Ok(())
    }

    /// Waits until something is reported. Dropping the future loses nothing.
    pub(super) async fn hear(&mut self) -> Heard {
        if self.buffer.is_empty() {
            self.events.recv_many(&mut self.buffer, BATCH).await;
        }
        let now = Instant::now();
        let mut heard = Heard::Nothing;
        for event in self.buffer.drain(..) {
            match event {
                Event::Delivered(number, result) => self.delivered.push((number, result)),
                Event::Statistics(statistics) => self.link.observe(&statistics, now),
                Event::Failed(failure) => {
                    self.link.failure = Some(failure.clone());
                    heard = Heard::Failure(failure);
                }
                Event::Fatal(why) => {
                    (self.link.fatal, self.link.connected) = (true, false);
                    self.link.failure = Some(Failure::Refused(why));
                }
            }
        }
        heard
    }

    pub(super) fn has_no_answers(&self) -> bool {
        self.delivered.is_empty()
    }

    /// Takes the answers that have come.
    pub(super) fn answers(&mut self, replies: &mut Vec<Reply>, error: impl Fn(&KafkaError) -> Answer) {
        for (number, result) in self.delivered.drain(..) {
            let Some(attempt) = self.unanswered.remove(&number) else { continue };
            let answer = result.map_or_else(|failed| error(&failed), |()| Answer::Stored);
            replies.push(Reply { ticket: Ticket { number: number as u64, attempt }, answer });
        }
    }

    /// Whether the cluster answers.
    pub(super) fn is_connected(&mut self) -> bool {
        // its id comes with the first answer
        let reached = |client: &ThreadedProducer<_>| client.client().fetch_cluster_id(Duration::ZERO).is_some();
        if self.is_new() && self.client.as_ref().is_some_and(reached) {
            self.link.reached(Instant::now());
        }
        self.link.connected
    }

    /// Whether it has never reached the cluster.
    pub(super) fn is_new(&self) -> bool {
        self.link.received == 0
    }

    pub(super) fn since(&self) -> Timestamp {
        self.link.since
    }

    /// Why the cluster does not answer.
    pub(super) fn failure(&self) -> Failure {
        self.link.failure.clone().unwrap_or(Failure::Silent)
    }
}

impl std::fmt::Debug for Producer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Producer").field("link", &self.link).finish_non_exhaustive()
    }
}

impl Drop for Producer {
    /// What it still has is given up. That waits for threads of librdkafka, which no task may wait for.
    fn drop(&mut self) {
        let client = self.client.take();
        std::thread::spawn(move || drop(client));
    }
}

impl Link {
    fn new(now: Instant) -> Self {
        Self {
            connected: false,
            received: 0,
            received_at: now,
            up_at: now,
            since: Timestamp::now(),
            failure: None,
            fatal: false,
            used: false,
        }
    }

    /// The cluster has answered.
    fn reached(&mut self, now: Instant) {
        (self.received_at, self.up_at) = (now, now);
        (self.received, self.connected) = (self.received.max(1), !self.fatal);
        (self.since, self.failure) = (Timestamp::now(), None);
    }

    fn observe(&mut self, statistics: &Statistics, now: Instant) {
        let brokers = statistics.brokers.values();
        let received = brokers.clone().map(|broker| broker.received).sum();
        let up = brokers.into_iter().any(|broker| broker.state == "UP");
        if up && received > self.received {
            self.received = received;
            self.reached(now);
            return;
        }
        if up {
            self.up_at = now;
        }
        let silence = if self.used { SILENCE } else { SILENCE_UNUSED };
        if now - self.received_at > silence || now - self.up_at > SILENCE {
            self.connected = false;
        }
    }
}

/// Called by librdkafka.
struct Callbacks {
    events: mpsc::UnboundedSender<Event>,
}

impl Callbacks {
    fn report(&self, event: Event) {
        // nobody waits for it when the producer is being dropped
        let _ = self.events.send(event);
    }
}

impl ClientContext for Callbacks {
    fn log(&self, _: RDKafkaLogLevel, _: &str, _: &str) {}

    fn stats_raw(&self, statistics: &[u8]) {
        self.report(Event::Statistics(serde_json::from_slice(statistics).unwrap_or_default()));
    }

    fn error(&self, error: KafkaError, reason: &str) {
        match error.rdkafka_error_code() {
            // it follows the errors of the brokers
            Some(RDKafkaErrorCode::AllBrokersDown) => {}
            Some(RDKafkaErrorCode::Fatal) => self.report(Event::Fatal(plain(reason))),
            code => self.report(Event::Failed(failure(code, reason))),
        }
    }
}

impl ProducerContext for Callbacks {
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, number: usize) {
        let result = result.as_ref().map(|_message| ()).map_err(|(error, _message)| error.clone());
        self.report(Event::Delivered(number, result));
    }
}

/// Why a broker cannot be used.
fn failure(code: Option<RDKafkaErrorCode>, reason: &str) -> Failure {
    let reason = plain(reason);
    match code {
        Some(RDKafkaErrorCode::OperationTimedOut | RDKafkaErrorCode::RequestTimedOut) => Failure::Silent,
        Some(RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SaslAuthenticationFailed) => {
            Failure::Refused(format!("{reason}; check username and password of the Secret, and the mechanism"))
        }
        Some(RDKafkaErrorCode::SSL) => {
            Failure::Refused(format!("{reason}; check ca.crt, tls.crt and tls.key of the Secret"))
        }
        Some(RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::Resolve) => Failure::Disconnected(reason),
        _ => Failure::Refused(reason),
    }
}

/// Without the broker's name before it, as `sasl_ssl://HOST:PORT/bootstrap: `, and without ` (after 3ms in state CONNECT)`.
fn plain(reason: &str) -> String {
    let rest = match reason.split_once(": ") {
        Some((name, rest)) if name.contains('/') => rest,
        _ => reason,
    };
    rest.split(" (after ").next().unwrap_or(rest).to_owned()
}
