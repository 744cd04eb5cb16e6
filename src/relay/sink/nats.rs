//! NATS JetStream: pipelined publishes, acknowledged on one reply subject.
//!
//! The driver's JetStream publish allocates a future and a subscription slot for each message. Here the reply subject
//! contains the ticket (`INBOX.NUMBER.ATTEMPT`), so an acknowledgement needs no lookup and no allocation of its own.
//!
//! A run is an atomic batch (ADR-50 of nats-architecture-and-design; from nats-server 2.12): messages with `Nats-Batch-Id` and
//! `Nats-Batch-Sequence`, of which the last one has `Nats-Batch-Commit` and gets the one answer. The server checks all of them
//! when they are complete, then stores them one after the other, or none. A server that dies meanwhile has the first ones. It
//! refuses a batch in which one message is a duplicate.

use std::{borrow::Cow, sync::Arc, time::Duration};

use async_nats::{
    Client, HeaderMap, Message, StatusCode, Subscriber,
    client::PublishErrorKind,
    header::{HeaderName, NATS_EXPECTED_STREAM, NATS_MESSAGE_ID},
    jetstream::{
        self,
        context::GetStreamErrorKind,
        stream::{Config, StorageType},
    },
};
use futures::{FutureExt, StreamExt};
use jiff::Timestamp;
use serde::Deserialize;
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

use super::{Answer, Reply, Session, Sink, SinkError};
use crate::{
    contract::relay::NatsSink,
    domain::destination::{self, Template},
    nats::{self, Connection, Server},
    outage::{Failure, Outage},
    relay::{encode::Message as Encoded, window::Ticket},
};

/// Duplicate window of a stream that the relay creates.
const DUPLICATE_WINDOW: Duration = Duration::from_mins(2);
/// How often the stream's subjects are read again when it does not accept an event's subject: a person may have added
/// it. Less than the time after which a refused event is tried again.
const SUBJECTS: Duration = Duration::from_secs(10);
/// Most events of a batch: the server accepts 1,000.
const LONGEST_RUN: usize = 256;
/// Most batches that wait for their answers: the server accepts 50 for each stream, of all who publish into it.
const MOST_RUNS: usize = 8;
/// The server forgets a batch that it has heard nothing of for this long.
const BATCH_FORGOTTEN: Duration = Duration::from_secs(10);
/// After a batch that was not stored events are sent one by one for this long.
const NO_RUNS: Duration = Duration::from_secs(1);
const BATCH_ID: &str = "Nats-Batch-Id";
const BATCH_SEQUENCE: &str = "Nats-Batch-Sequence";
const BATCH_COMMIT: &str = "Nats-Batch-Commit";
/// Maximum number of answers handled at once.
const BATCH: usize = 512;
/// A longer subject is not sent: the server closes a connection whose command line is longer than its
/// `max_control_line`, 4096 bytes by default, and one event must not close the connection for all others.
const MAX_SUBJECT: usize = 2048;
/// JetStream's limit of a message's headers (`processJetStreamMsg` of nats-server).
const MAX_HEADERS: usize = u16::MAX as usize;
/// Bytes of a message's headers on the wire in addition to names and values: the version line and the last line.
const HEADER_FRAME: usize = 14;

/// What an error of JetStream means for an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// It passes by itself, or stops everybody: the event waits where it is.
    Passing,
    /// This event, or events like it, until a person changes something: it is held.
    Refused,
}

/// Errors with which JetStream answers a publish (`server/errors.json` and `processJetStreamMsg` of nats-server 2.15), by
/// their codes. Of any other one the status says whose it is: from 500 the server's, else the request's.
const ERRORS: [(u64, Class); 14] = [
    // of the account and the server: limits, leaders, load
    (10002, Class::Passing), // resource limits exceeded for account
    (10009, Class::Passing), // JetStream cluster can not handle request
    (10023, Class::Passing), // insufficient resources
    (10028, Class::Passing), // insufficient memory resources available
    (10047, Class::Passing), // insufficient storage resources available
    (10120, Class::Passing), // no JetStream default or applicable tiered limit present
    (10167, Class::Passing), // too many requests
    // of the stream, for every event
    (10059, Class::Passing), // stream not found: the relay makes it
    (10109, Class::Passing), // invalid operation on sealed stream
    (10158, Class::Passing), // duplicate message id is in process
    (10169, Class::Passing), // message counter increment is missing: the stream has counters, not events
    // of the event
    (10054, Class::Refused), // message size exceeds maximum allowed
    (10060, Class::Refused), // expected stream does not match: the subject is another stream's
    (10097, Class::Refused), // header size exceeds maximum allowed of 64k
];
/// The store's error is in the text (`server/store.go`): the stream is full, or only this event does not fit.
const STORE_FAILED: u64 = 10077;
const STORE_REFUSES: [&str; 2] = ["maximum messages per subject exceeded", "message too large"];

/// The stream that events go into.
#[derive(Debug)]
pub struct Nats {
    server: Server,
    stream: String,
    template: Arc<Template>,
    /// Of a stream that is created here; zero keeps events forever.
    max_age: Duration,
    name: String,
}

impl Nats {
    /// `template` is of the subjects; `name` is shown in the server's list of connections.
    pub fn new(sink: &NatsSink, template: Template, name: String) -> Self {
        Self {
            server: Server { inbox: sink.inbox_prefix.clone(), ..Server::from(sink) },
            stream: sink.stream.clone(),
            template: Arc::new(template),
            max_age: Duration::from_secs(sink.max_age_seconds),
            name,
        }
    }

    /// Returns the stream's configuration; creates the stream when it is missing, and never alters it.
    async fn ensure_stream(&self, client: &Client, address: &str) -> Result<Config, SinkError> {
        let started = Timestamp::now();
        let failed = |error: &(dyn std::error::Error + 'static)| {
            SinkError::Unreachable(nats::jetstream_outage(address, started, error))
        };
        let mut context = jetstream::new(client.clone());
        context.set_timeout(nats::TIMEOUT);
        match context.get_stream(&self.stream).await {
            Ok(stream) => {
                let config = &stream.cached_info().config;
                if config.duplicate_window < DUPLICATE_WINDOW {
                    tracing::warn!(
                        stream = self.stream,
                        duplicate_window_seconds = config.duplicate_window.as_secs(),
                        "the stream's duplicate window is short: after an outage that is longer, some events are delivered twice"
                    );
                }
                return Ok(config.clone());
            }
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(cause) if cause.code() == 404 => {}
                _ => return Err(failed(&error)),
            },
        }
        // other services publish into the same stream
        let subjects = vec![self.template.shared_filter().to_owned()];
        let config = Config {
            name: self.stream.clone(),
            subjects,
            // a server before 2.12 knows no batches, and does not have it in what it answers
            allow_atomic_publish: true,
            storage: StorageType::File,
            max_age: self.max_age,
            // the server refuses a duplicate window that is longer than `max_age`
            duplicate_window: if self.max_age.is_zero() {
                DUPLICATE_WINDOW
            } else {
                self.max_age.min(DUPLICATE_WINDOW)
            },
            description: Some("Events of services, created by weft relay".to_owned()),
            ..Config::default()
        };
        let stream = context.create_stream(config).await.map_err(|error| failed(&error))?;
        tracing::info!(stream = self.stream, subjects = self.template.shared_filter(), "created the stream");
        Ok(stream.cached_info().config.clone())
    }
}

impl Sink for Nats {
    const SERVER: &'static str = "NATS";
    type Session = NatsSession;

    async fn connect(&self) -> Result<NatsSession, SinkError> {
        let connection = Connection::open(&self.server, &self.name).await.map_err(SinkError::Unreachable)?;
        let client = connection.client.clone();
        let config = self.ensure_stream(&client, connection.address()).await?;
        let inbox = client.new_inbox();
        let (subscribed, subscribed_at) = (Timestamp::now(), Instant::now());
        let answers = client.subscribe(format!("{inbox}.>")).await.map_err(|error| {
            SinkError::Unreachable(nats::jetstream_outage(connection.address(), subscribed, &error))
        })?;
        Ok(NatsSession {
            client,
            connection,
            stream: self.stream.clone(),
            subjects: watch::Sender::new(config.subjects),
            has_batches: config.allow_atomic_publish,
            runs: Vec::new(),
            alone_until: subscribed_at,
            subjects_read: Instant::now(),
            inbox,
            answers,
            template: self.template.clone(),
        })
    }
}

/// One connection. A lost one is not re-established but replaced by a new session.
#[derive(Debug)]
pub struct NatsSession {
    client: Client,
    connection: Connection,
    stream: String,
    /// The stream's, as they were read last.
    subjects: watch::Sender<Vec<String>>,
    subjects_read: Instant,
    /// Whether the stream accepts atomic batches.
    has_batches: bool,
    /// The batches without an answer, their lengths, and when they were sent.
    runs: Vec<(Ticket, usize, Instant)>,
    /// No batch is sent until then.
    alone_until: Instant,
    inbox: String,
    answers: Subscriber,
    template: Arc<Template>,
}

impl Session for NatsSession {
    async fn publish(&mut self, ticket: Ticket, message: &Encoded) -> Result<Option<Answer>, SinkError> {
        let headers = match self.headers(message, None) {
            Ok(headers) => headers,
            Err(why) => return Ok(Some(Answer::Refused(why))),
        };
        self.send(message, headers, Some((ticket, 1))).await
    }

    fn longest_run(&mut self) -> usize {
        let now = Instant::now();
        self.runs.retain(|&(_, _, sent)| now - sent < BATCH_FORGOTTEN);
        let may = self.has_batches && self.runs.len() < MOST_RUNS && self.alone_until <= now;
        if may { LONGEST_RUN } else { 1 }
    }

    async fn publish_run(&mut self, ticket: Ticket, run: &[Encoded]) -> Result<Option<Answer>, SinkError> {
        // unique: the end of the inbox is this connection's
        let connection = self.inbox.rsplit('.').next().unwrap_or_default();
        let id = format!("{connection}-{:x}", ticket.number);
        let batch = |sequence| Batch { id: &id, sequence, commits: sequence == run.len() };
        let headers: Result<Vec<_>, _> =
            run.iter().zip(1..).map(|(message, sequence)| self.headers(message, Some(&batch(sequence)))).collect();
        let headers = match headers {
            Ok(headers) => headers,
            Err(why) => return Ok(Some(Answer::Refused(why))),
        };
        self.runs.push((ticket, run.len(), Instant::now()));
        for ((message, headers), sequence) in run.iter().zip(headers).zip(1..) {
            // without a reply subject: the answer to the last one says what has become of all
            let answer = self.send(message, headers, (sequence == run.len()).then_some((ticket, sequence))).await?;
            if answer.is_some() {
                return Ok(answer);
            }
        }
        Ok(None)
    }

    async fn replies(&mut self, replies: &mut Vec<Reply>) -> Result<(), SinkError> {
        let first = tokio::select! {
            outage = self.connection.lost() => return Err(SinkError::Unreachable(outage)),
            message = self.answers.next() => message,
        };
        let Some(first) = first else { return Err(SinkError::Unreachable(self.connection.outage())) };
        self.push_reply(&first, replies)?;
        for _ in 1..BATCH {
            let Some(Some(message)) = self.answers.next().now_or_never() else { break };
            self.push_reply(&message, replies)?;
        }
        Ok(())
    }

    fn silent(&self, since: Timestamp) -> SinkError {
        let address = self.connection.address().to_owned();
        SinkError::Unreachable(Outage { server: "JetStream on NATS", address, since, failure: Failure::Silent })
    }

    fn address(&self) -> &str {
        self.connection.address()
    }
}

/// A message's place in an atomic batch, counted from 1.
struct Batch<'a> {
    id: &'a str,
    sequence: usize,
    commits: bool,
}

impl NatsSession {
    /// The headers of a message; the error is the sentence that explains why it cannot be sent.
    fn headers(&mut self, message: &Encoded, batch: Option<&Batch<'_>>) -> Result<HeaderMap, String> {
        let Encoded { destination, body, .. } = message;
        let (headers, length) = headers(message, &self.stream, batch);
        if !self.accepts(destination) && self.subjects_read.elapsed() >= SUBJECTS {
            self.read_subjects();
        }
        self.check(destination, length, body.len())?;
        Ok(headers)
    }

    /// Sends a message, whose answer, to so many messages, comes by the ticket if it has one.
    async fn send(
        &mut self,
        Encoded { destination, body, .. }: &Encoded,
        headers: HeaderMap,
        ticket: Option<(Ticket, usize)>,
    ) -> Result<Option<Answer>, SinkError> {
        let (client, subject, body) = (&self.client, destination.clone(), body.clone());
        let reply = ticket.map(|(Ticket { number, attempt }, messages)| {
            format!("{}.{number:x}.{attempt:x}.{messages:x}", self.inbox)
        });
        let sent = async {
            match reply {
                Some(reply) => client.publish_with_reply_and_headers(subject, reply, headers, body).await,
                None => client.publish_with_headers(subject, headers, body).await,
            }
        };
        let sent = tokio::select! {
            biased; // nearly always at once, and then the other future costs nothing
            sent = timeout(nats::TIMEOUT, sent) => sent,
            outage = self.connection.lost() => return Err(SinkError::Unreachable(outage)),
        };
        match sent {
            Ok(Ok(())) => Ok(None),
            Ok(Err(error)) => match error.kind() {
                PublishErrorKind::MaxPayloadExceeded | PublishErrorKind::InvalidSubject => {
                    Ok(Some(Answer::Refused(format!("the NATS client refuses it: {error}"))))
                }
                PublishErrorKind::Send => Err(SinkError::Unreachable(self.connection.outage())),
            },
            Err(_elapsed) => Err(SinkError::Unreachable(self.connection.outage())),
        }
    }

    /// Notes the answer to a batch of `length` messages, however late it comes.
    fn end_run(
        &mut self,
        ticket: Ticket,
        length: usize,
        Acknowledgement { answer, count, code }: Acknowledgement,
    ) -> Answer {
        if length == 1 {
            return answer;
        }
        self.runs.retain(|&(run, _, _)| run != ticket);
        let answer = match answer {
            Answer::Stored if count != length => Answer::Failed("the server has not taken the batch as one".to_owned()),
            answer => answer,
        };
        self.has_batches &= !NEVER_A_BATCH.contains(&code);
        if answer != Answer::Stored {
            self.alone_until = Instant::now() + NO_RUNS;
        }
        answer
    }

    fn accepts(&self, subject: &str) -> bool {
        self.subjects.borrow().iter().any(|filter| destination::matches(filter, subject))
    }

    /// Reads the stream's subjects again, beside the publishing: the event that they are read for is refused now, and
    /// tried again later. Without an answer the known ones stay: a lost connection is detected elsewhere.
    fn read_subjects(&mut self) {
        self.subjects_read = Instant::now();
        let mut context = jetstream::new(self.client.clone());
        context.set_timeout(nats::TIMEOUT);
        let (stream, subjects) = (self.stream.clone(), self.subjects.clone());
        tokio::spawn(async move {
            if let Ok(stream) = context.get_stream(&stream).await {
                subjects.send_replace(stream.cached_info().config.subjects.clone());
            }
        });
    }

    /// Checks whether the event can be sent; the error is the sentence that explains why not. Events to which the
    /// server would react by closing the connection must be caught here: each would close the next connection too, and
    /// hold up all other events.
    fn check(&self, subject: &str, headers: usize, payload: usize) -> Result<(), String> {
        let (stream, length, most) = (&self.stream, subject.len(), self.client.max_payload());
        if length > MAX_SUBJECT {
            return Err(format!("its subject has {length} bytes: shorten the values that its template uses"));
        }
        if !self.accepts(subject) {
            // without the subject itself, which has values of the row
            let filter = self.template.filter(None);
            return Err(format!(
                "the stream {stream} does not accept its subject, which the template makes of its row: add {filter} to the stream's subjects"
            ));
        }
        if headers > MAX_HEADERS {
            return Err(format!(
                "its headers have {headers} bytes and JetStream accepts {MAX_HEADERS}: shorten the row's headers"
            ));
        }
        let size = headers + payload;
        if size > most {
            return Err(format!("it has {size} bytes and NATS accepts {most}: raise the server's max_payload"));
        }
        Ok(())
    }

    fn push_reply(&mut self, message: &Message, replies: &mut Vec<Reply>) -> Result<(), SinkError> {
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            return Err(SinkError::StreamMissing {
                address: self.connection.address().to_owned(),
                stream: self.stream.clone(),
            });
        }
        if let Some((ticket, length)) = ticket(&message.subject) {
            let answer = self.end_run(ticket, length, acknowledgement(&message.payload));
            replies.push(Reply { ticket, answer });
        }
        Ok(())
    }
}

/// The ticket at the end of a reply subject, and how many messages were sent by it.
fn ticket(subject: &str) -> Option<(Ticket, usize)> {
    let mut tokens = subject.rsplit('.');
    let messages = usize::from_str_radix(tokens.next()?, 16).ok()?;
    let attempt = u32::from_str_radix(tokens.next()?, 16).ok()?;
    let number = u64::from_str_radix(tokens.next()?, 16).ok()?;
    Some((Ticket { number, attempt }, messages))
}

#[derive(Deserialize)]
struct PubAck<'a> {
    #[serde(borrow)]
    error: Option<PubError<'a>>,
    seq: Option<u64>,
    /// Messages of the batch.
    #[serde(default)]
    count: usize,
}

#[derive(Deserialize)]
struct PubError<'a> {
    /// As of HTTP.
    #[serde(default)]
    code: u64,
    #[serde(default)]
    err_code: u64,
    #[serde(borrow, default)]
    description: Cow<'a, str>,
}

fn class(error: &PubError<'_>) -> Class {
    if error.err_code == STORE_FAILED {
        let refuses = STORE_REFUSES.iter().any(|text| error.description.contains(text));
        return if refuses { Class::Refused } else { Class::Passing };
    }
    let known = ERRORS.iter().find(|(code, _)| *code == error.err_code).map(|(_, class)| *class);
    // 408, 429: a time-out, too many of something
    let passing = error.code >= 500 || matches!(error.code, 0 | 408 | 429);
    known.unwrap_or(if passing { Class::Passing } else { Class::Refused })
}

/// The batches that the stream does not allow, and those of the first servers that had any, which accepted no message ids in them.
const NEVER_A_BATCH: [u64; 2] = [10174, 10177];

/// What a payload says.
struct Acknowledgement {
    answer: Answer,
    /// Of how many messages of a batch.
    count: usize,
    /// Of JetStream's error; 0 without one.
    code: u64,
}

fn acknowledgement(payload: &[u8]) -> Acknowledgement {
    match serde_json::from_slice(payload) {
        Ok(PubAck { error: None, seq: Some(_), count }) => Acknowledgement { answer: Answer::Stored, count, code: 0 },
        Ok(PubAck { error: Some(error), .. }) => {
            let text = format!("{} (JetStream error {})", error.description, error.err_code);
            let answer = match class(&error) {
                Class::Refused => Answer::Refused(format!("{text}: change the stream")),
                Class::Passing => Answer::Failed(text),
            };
            Acknowledgement { answer, count: 0, code: error.err_code }
        }
        Ok(PubAck { error: None, seq: None, .. }) | Err(_) => {
            let answer = Answer::Failed("the answer is not a JetStream acknowledgement".to_owned());
            Acknowledgement { answer, count: 0, code: 0 }
        }
    }
}

/// The message's headers with NATS' own, and the bytes that they need on the wire.
fn headers(message: &Encoded, stream: &str, batch: Option<&Batch<'_>>) -> (HeaderMap, usize) {
    let mut headers = HeaderMap::new();
    let mut length = HEADER_FRAME;
    let mut put = |name: HeaderName, name_length: usize, value: &str| {
        length += name_length + value.len() + 4;
        headers.insert(name, value);
    };
    put(NATS_EXPECTED_STREAM, "Nats-Expected-Stream".len(), stream);
    put(NATS_MESSAGE_ID, "Nats-Msg-Id".len(), &message.identity);
    if let Some(Batch { id, sequence, commits }) = batch {
        put(HeaderName::from_static(BATCH_ID), BATCH_ID.len(), id);
        put(HeaderName::from_static(BATCH_SEQUENCE), BATCH_SEQUENCE.len(), &sequence.to_string());
        if *commits {
            put(HeaderName::from_static(BATCH_COMMIT), BATCH_COMMIT.len(), "1");
        }
    }
    for (name, value) in message.headers() {
        match name {
            Cow::Borrowed(known) => put(HeaderName::from_static(known), known.len(), value),
            Cow::Owned(custom) => {
                if let Ok(parsed) = custom.parse() {
                    put(parsed, custom.len(), value);
                }
            }
        }
    }
    (headers, length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledgements_and_errors_are_distinguished() {
        let answer = |payload: &[u8]| acknowledgement(payload).answer;
        assert_eq!(answer(br#"{"stream":"events","seq":7}"#), Answer::Stored);
        assert_eq!(acknowledgement(br#"{"stream":"events","seq":7,"batch":"b","count":3}"#).count, 3);
        assert_eq!(answer(br#"{"stream":"events","seq":7,"duplicate":true}"#), Answer::Stored);
        let full = br#"{"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"},"stream":"events","seq":0}"#;
        assert!(matches!(answer(full), Answer::Failed(text) if text.contains("maximum bytes")));
        let large = br#"{"error":{"code":400,"err_code":10054,"description":"message size exceeds maximum allowed"}}"#;
        assert!(matches!(answer(large), Answer::Refused(_)));
        for (code, err_code, description, refused) in [
            (503, 10077, "maximum messages per subject exceeded", true),
            (503, 10077, "maximum messages exceeded", false),
            (503, 10077, "maximum bytes exceeded", false),
            (400, 10109, "invalid operation on sealed stream", false),
            (400, 10002, "resource limits exceeded for account", false),
            (400, 10120, "no JetStream default or applicable tiered limit present", false),
            (400, 10169, "message counter increment is missing", false),
            (503, 10077, "message too large", true),
            (400, 10060, "expected stream does not match", true),
            (400, 10097, "header size exceeds maximum allowed of 64k", true),
            (400, 19999, "an error of a later version", true),
            (503, 19999, "an error of a later version", false),
            (429, 19999, "an error of a later version", false),
        ] {
            let error = serde_json::json!({"code": code, "err_code": err_code, "description": description});
            let answer = answer(serde_json::json!({"error": error}).to_string().as_bytes());
            assert_eq!(matches!(answer, Answer::Refused(_)), refused, "{err_code} {description}: {answer:?}");
        }
        for nonsense in [&b""[..], b"{}", b"[]", b"+OK", b"{\"seq\":\"x\"}"] {
            assert!(matches!(answer(nonsense), Answer::Failed(_)));
        }
    }

    #[test]
    fn a_ticket_is_read_from_the_reply_subject() {
        let expected = Ticket { number: 0x1f, attempt: 2 };
        assert_eq!(ticket("_INBOX.abc.1f.2.10"), Some((expected, 16)));
        assert_eq!(ticket("_INBOX.abc"), None);
        assert_eq!(ticket("1"), None);
    }
}
