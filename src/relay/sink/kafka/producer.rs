//! A producer of librdkafka, and what is known of it: whether it reaches the cluster, and which events it has.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use jiff::Timestamp;
use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
    message::DeliveryResult,
    producer::{BaseProducer, BaseRecord, Producer as _, ProducerContext, PurgeConfig},
};
use serde::Deserialize;
use tokio::{sync::mpsc, time::Instant};

use crate::{outage::Failure, relay::window::Ticket};

/// Without a byte for this long, although something is asked every 1.5 s, the cluster is lost.
const SILENCE: Duration = Duration::from_millis(3500);
/// The same before anything was published: librdkafka then asks every ten seconds.
const SILENCE_UNUSED: Duration = Duration::from_secs(14);
/// How long the polling thread waits at a time. At the end of each wait the driver spins for up to a millisecond.
const POLL: Duration = Duration::from_secs(2);
/// Most events of librdkafka that are handled at once.
const BATCH: usize = 512;

/// What librdkafka reports, on threads of its own.
#[derive(Debug)]
enum Event {
    /// The record of this number is stored, or is not.
    Delivered(u64, Result<(), KafkaError>),
    /// A broker cannot be used.
    Failed(Failure),
    /// This producer cannot go on.
    Fatal(String),
    Statistics(Statistics),
}

/// Of librdkafka's statistics (its STATISTICS.md), what shows whether the cluster answers.
#[derive(Debug, Default, Deserialize)]
struct Statistics {
    brokers: HashMap<String, BrokerStatistics>,
    #[serde(rename = "eos")]
    idempotence: IdempotenceStatistics,
}

#[derive(Debug, Default, Deserialize)]
struct IdempotenceStatistics {
    /// `Assigned` when the cluster has given the producer its id.
    #[serde(rename = "idemp_state")]
    state: String,
}

#[derive(Debug, Deserialize)]
struct BrokerStatistics {
    state: String,
    #[serde(rename = "rxbytes")]
    received: u64,
}

/// An event, with its number in the window.
pub(super) type Record<'a> = BaseRecord<'a, [u8], [u8], Box<u64>>;

pub(super) struct Producer {
    settings: BTreeMap<&'static str, String>,
    client: Arc<BaseProducer<Callbacks>>,
    /// Ends the polling thread.
    stop: Arc<AtomicBool>,
    events: mpsc::UnboundedReceiver<Event>,
    buffer: Vec<Event>,
    /// Events without an answer that was handed over, with their last attempt.
    unanswered: HashMap<u64, u32>,
    /// Answers that were not handed over yet.
    delivered: Vec<(u64, Result<(), KafkaError>)>,
    link: Link,
}

/// The connections to the brokers, taken together.
#[derive(Debug)]
struct Link {
    state: State,
    received: u64,
    received_at: Instant,
    up_at: Instant,
    /// The last time that the cluster was known to answer, or the beginning.
    since: Timestamp,
    failure: Option<Failure>,
    /// Whether anything was published.
    used: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// It may know the cluster without having reported that.
    New,
    Connected,
    Lost,
    /// The producer cannot go on.
    Ended,
}

impl Producer {
    /// `last` is the one that it replaces.
    pub(super) fn new(settings: BTreeMap<&'static str, String>, last: Option<&Self>) -> Result<Self, String> {
        let mut config = ClientConfig::new();
        for (key, value) in &settings {
            config.set(*key, value);
        }
        config.set_log_level(RDKafkaLogLevel::Info);
        let (sender, events) = mpsc::unbounded_channel();
        let client: BaseProducer<_> =
            config.create_with_context(Callbacks { events: sender }).map_err(|error| error.to_string())?;
        let (client, stop) = (Arc::new(client), Arc::new(AtomicBool::new(false)));
        let (polled, stopped) = (client.clone(), stop.clone());
        // the last one to have the client: it closes the connections, which no task may wait for
        let poll = move || {
            while !stopped.load(Ordering::Relaxed) {
                polled.poll(POLL);
            }
        };
        std::thread::Builder::new().name("kafka".to_owned()).spawn(poll).map_err(|error| error.to_string())?;
        Ok(Self {
            settings,
            client,
            stop,
            events,
            buffer: Vec::new(),
            unanswered: HashMap::new(),
            delivered: Vec::new(),
            link: Link::new(Instant::now(), last.map(|last| &last.link)),
        })
    }

    pub(super) fn can_go_on(&self, settings: &BTreeMap<&'static str, String>) -> bool {
        self.link.state != State::Ended && self.settings == *settings
    }

    /// Hands an event over. One that it has already is not taken twice: its answer counts for the new attempt.
    pub(super) fn send<'a>(&mut self, ticket: Ticket, record: impl FnOnce() -> Record<'a>) {
        let Ticket { number, attempt } = ticket;
        if self.unanswered.insert(number, attempt).is_some() {
            return;
        }
        self.link.used = true;
        if let Err((error, _record)) = self.client.send(record()) {
            self.buffer.push(Event::Delivered(number, Err(error)));
        }
    }

    /// Waits until something is reported; returns a failure that was. Dropping the future loses nothing.
    pub(super) async fn hear(&mut self) -> Option<Failure> {
        if self.buffer.is_empty() {
            self.events.recv_many(&mut self.buffer, BATCH).await;
        }
        let now = Instant::now();
        let mut heard = None;
        for event in self.buffer.drain(..) {
            match event {
                // the reason is reported besides, and the producer is replaced
                Event::Delivered(_, Err(error)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::Fatal) => {}
                Event::Delivered(number, result) => self.delivered.push((number, result)),
                Event::Statistics(statistics) => self.link.observe(&statistics, now),
                Event::Failed(failure) => {
                    self.link.failure = Some(failure.clone());
                    heard = Some(failure);
                }
                Event::Fatal(why) => {
                    self.link.end(why);
                    heard.clone_from(&self.link.failure);
                }
            }
        }
        heard
    }

    pub(super) fn has_answers(&self) -> bool {
        !self.delivered.is_empty()
    }

    /// Takes the answers that have come.
    pub(super) fn answers(&mut self) -> impl Iterator<Item = (Ticket, Result<(), KafkaError>)> {
        let Self { delivered, unanswered, .. } = self;
        delivered.drain(..).filter_map(|(number, result)| {
            let attempt = unanswered.remove(&number)?;
            Some((Ticket { number, attempt }, result))
        })
    }

    /// Whether the cluster answers.
    pub(super) fn is_connected(&mut self) -> bool {
        // its id comes with its first answer
        if self.reports_late() && self.client.client().fetch_cluster_id(Duration::ZERO).is_some() {
            self.link.reached(Instant::now());
        }
        self.link.state == State::Connected
    }

    /// Whether it may know the cluster without having reported that.
    pub(super) fn reports_late(&self) -> bool {
        self.link.state == State::New
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
    /// What it still has is given up.
    fn drop(&mut self) {
        self.client.purge(PurgeConfig::default().queue().inflight().non_blocking());
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Link {
    fn new(now: Instant, last: Option<&Self>) -> Self {
        // after one that could not go on, this one has to prove that it can
        let ended = last.filter(|last| last.state == State::Ended);
        Self {
            state: if ended.is_some() { State::Lost } else { State::New },
            received: 0,
            received_at: now,
            up_at: now,
            since: ended.map_or_else(Timestamp::now, |last| last.since),
            failure: ended.and_then(|last| last.failure.clone()),
            used: false,
        }
    }

    /// The cluster has answered.
    fn reached(&mut self, now: Instant) {
        if self.state == State::Ended {
            return;
        }
        self.state = State::Connected;
        (self.received_at, self.up_at) = (now, now);
        (self.since, self.failure) = (Timestamp::now(), None);
    }

    fn end(&mut self, why: String) {
        self.state = State::Ended;
        self.failure = Some(Failure::Refused(why));
    }

    fn observe(&mut self, statistics: &Statistics, now: Instant) {
        let brokers = statistics.brokers.values();
        let received = brokers.clone().map(|broker| broker.received).sum();
        let assigned = statistics.idempotence.state == "Assigned";
        let up = assigned && brokers.into_iter().any(|broker| broker.state == "UP");
        if up && received > self.received {
            self.received = received;
            self.reached(now);
            return;
        }
        if up {
            self.up_at = now;
        }
        let silence = if self.used { SILENCE } else { SILENCE_UNUSED };
        let lost = now - self.received_at > silence || now - self.up_at > SILENCE;
        if lost && self.state == State::Connected {
            self.state = State::Lost;
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
    /// A connection that a broker closes is no error for librdkafka. Of its log nothing else is taken: it has names of
    /// topics, which have values of rows.
    fn log(&self, level: RDKafkaLogLevel, kind: &str, message: &str) {
        if kind == "FAIL" && matches!(level, RDKafkaLogLevel::Warning | RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info)
        {
            self.report(Event::Failed(closed(message)));
        }
    }

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
    type DeliveryOpaque = Box<u64>;

    fn delivery(&self, result: &DeliveryResult<'_>, number: Box<u64>) {
        let result = result.as_ref().map(|_message| ()).map_err(|(error, _message)| error.clone());
        self.report(Event::Delivered(*number, result));
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
        Some(RDKafkaErrorCode::ClusterAuthorizationFailed) => {
            Failure::Refused(format!("{reason}; grant the relay's user Write to its topics"))
        }
        Some(RDKafkaErrorCode::BrokerTransportFailure | RDKafkaErrorCode::Resolve) => Failure::Disconnected(reason),
        _ => Failure::Refused(reason),
    }
}

/// Why a broker has closed the connection is not known. Where it knows another protocol, it does so at the beginning.
fn closed(message: &str) -> Failure {
    let remedy = if message.contains(" in state UP") { "" } else { "; check tls, and whether it demands a login" };
    Failure::Disconnected(format!("a broker closed the connection{remedy}"))
}

/// Without the broker's name before it, as `sasl_ssl://HOST:PORT/bootstrap: `, and without what concerns librdkafka:
/// ` (after 3ms in state CONNECT)`, `, verify that ssl.ca.location …`.
fn plain(reason: &str) -> String {
    let rest = match reason.split_once(": ") {
        Some((name, rest)) if name.contains('/') => rest,
        _ => reason,
    };
    let ends = [" (after ", ", verify that ", ": verify that "].iter().filter_map(|end| rest.find(end));
    rest.get(..ends.min().unwrap_or(rest.len())).unwrap_or(rest).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics(brokers: &[(&str, u64)]) -> Statistics {
        let brokers = brokers.iter().enumerate().map(|(number, &(state, received))| {
            (number.to_string(), BrokerStatistics { state: state.to_owned(), received })
        });
        let idempotence = IdempotenceStatistics { state: "Assigned".to_owned() };
        Statistics { brokers: brokers.collect(), idempotence }
    }

    #[tokio::test(start_paused = true)]
    async fn a_cluster_is_lost_when_no_broker_answers() {
        let after = |link: &mut Link, seconds, brokers: &[(&str, u64)]| {
            link.observe(&statistics(brokers), Instant::now() + Duration::from_secs(seconds));
            link.state == State::Connected
        };
        let mut link = Link::new(Instant::now(), None);
        // a login that is refused has received bytes
        assert!(!after(&mut link, 0, &[("AUTH_REQ", 10)]));
        assert!(after(&mut link, 0, &[("UP", 20), ("DOWN", 0)]));
        link.used = true;
        assert!(after(&mut link, 3, &[("UP", 20)]), "silent for three seconds");
        assert!(!after(&mut link, 4, &[("UP", 20)]), "and for four");
        link.failure = Some(Failure::Silent);
        assert!(!after(&mut link, 5, &[("CONNECT", 30)]));
        assert!(after(&mut link, 6, &[("DOWN", 30), ("UP", 1)]), "another broker answers");
        assert_eq!(link.failure, None);
        assert!(!after(&mut link, 10, &[("DOWN", 30), ("DOWN", 1)]));
        link.end("fenced".to_owned());
        assert!(!after(&mut link, 11, &[("UP", 50)]), "it cannot go on");
        let next = Link::new(Instant::now(), Some(&link));
        assert_eq!(next.state, State::Lost, "it has to prove that it can go on");
        assert_eq!((next.since, next.failure), (link.since, Some(Failure::Refused("fenced".to_owned()))), "one outage");
    }

    #[tokio::test(start_paused = true)]
    async fn before_anything_is_published_silence_may_last_longer() {
        let mut link = Link::new(Instant::now(), None);
        link.observe(&statistics(&[("UP", 1)]), Instant::now());
        link.observe(&statistics(&[("UP", 1)]), Instant::now() + Duration::from_secs(10));
        assert_eq!(link.state, State::Connected);
        link.observe(&statistics(&[("UP", 1)]), Instant::now() + Duration::from_secs(15));
        assert_eq!(link.state, State::Lost);
    }

    #[test]
    fn a_failure_is_a_sentence_of_its_own() {
        let refused = "sasl_ssl://kafka:9093/bootstrap: SASL authentication error: Authentication failed (after 3ms in state AUTH_REQ)";
        let Failure::Refused(why) = failure(Some(RDKafkaErrorCode::Authentication), refused) else {
            panic!("it is refused")
        };
        assert!(why.starts_with("SASL authentication error: Authentication failed; check username"), "{why}");
        let down =
            "kafka:9092/1: Connect to ipv4#10.0.0.1:9092 failed: Connection refused (after 0ms in state CONNECT)";
        assert_eq!(
            failure(Some(RDKafkaErrorCode::BrokerTransportFailure), down),
            Failure::Disconnected("Connect to ipv4#10.0.0.1:9092 failed: Connection refused".to_owned())
        );
        let untrusted = "ssl://kafka:9093/bootstrap: SSL handshake failed: certificate verify failed, verify that ssl.ca.location is right";
        assert_eq!(plain(untrusted), "SSL handshake failed: certificate verify failed");
        let Failure::Disconnected(why) = closed("kafka:9092/1: Disconnected (after 60ms in state APIVERSION_QUERY)")
        else {
            panic!("there is no connection")
        };
        assert_eq!(why, "a broker closed the connection; check tls, and whether it demands a login");
        let timeout = "kafka:9092/1: 1 request(s) timed out: disconnect (after 9000ms in state UP)";
        assert_eq!(failure(Some(RDKafkaErrorCode::OperationTimedOut), timeout), Failure::Silent);
    }
}
