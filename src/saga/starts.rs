//! Starts sagas by events: one durable JetStream consumer for each start, which acknowledges an event after the start
//! of the saga is durable.
//!
//! A consumer reads from the time at which the Saga was created, and only subjects that can contain its event.
//! Otherwise a Saga that is added to a system that has run for years would run for its whole past.

use std::{
    borrow::Cow,
    collections::HashMap,
    error::Error,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_nats::{
    datetime::from_nanos,
    jetstream::{
        self, AckKind, Context, Message,
        consumer::{
            AckPolicy, DeliverPolicy, FromConsumer, PullConsumer,
            pull::{self, MessagesError, MessagesErrorKind},
        },
        context::GetStreamErrorKind,
        stream::{RetentionPolicy, Stream},
    },
};
use futures::StreamExt;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio_util::sync::CancellationToken;

use super::{
    engine::{Engine, EngineError, Key},
    problem::{Problems, SagaProblem},
};
use crate::{
    contract::{
        orchestrator::{Orchestrator, Start},
        relay::{NatsSink, Sink},
    },
    domain::{destination::Template, event, names, saga::json},
    nats::{self, Connection},
    outage::{Failure, Outage},
};

/// Events of one start that are handled concurrently.
const MAX_CONCURRENT: usize = 256;
/// An event that was not acknowledged within this time is delivered again.
const ACK_WAIT: Duration = Duration::from_secs(30);
/// Time between two attempts to connect to the broker.
const RECONNECT_DELAY: Duration = Duration::from_secs(2);
/// An event that cannot be handled now is redelivered after this time.
const REDELIVERY_DELAY: Duration = Duration::from_secs(1);
/// Interval of the driver's heartbeats; it reports an error when two are missing.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// The consumers of the contract in force.
#[derive(Debug)]
pub(super) struct Starts {
    engine: Arc<Engine>,
    problems: Arc<Problems>,
    running: Mutex<HashMap<String, (Start, CancellationToken)>>,
}

impl Starts {
    pub(super) fn new(engine: Arc<Engine>, problems: Arc<Problems>) -> Self {
        Self { engine, problems, running: Mutex::default() }
    }

    /// Runs exactly the starts of `contract`.
    pub(super) fn follow(&self, contract: &Orchestrator) {
        let is_wanted = |start: &Start| !contract.draining.contains(&start.saga);
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|_, (start, token)| {
            let wanted = contract.starts.contains(start) && is_wanted(start);
            if !wanted {
                token.cancel();
                self.problems.resolve(&source(start));
            }
            wanted
        });
        for start in contract.starts.iter().filter(|start| is_wanted(start)) {
            let name = durable_name(contract, start);
            if running.contains_key(&name) {
                continue;
            }
            let token = CancellationToken::new();
            running.insert(name.clone(), (start.clone(), token.clone()));
            let consumer = Consumer {
                name,
                namespace: contract.namespace.clone(),
                event_source: names::event_source(&contract.namespace, &start.service),
                start: start.clone(),
                engine: Arc::clone(&self.engine),
                problems: Arc::clone(&self.problems),
            };
            self.engine.tasks.spawn(async move {
                tokio::select! { () = consumer.run() => {} () = token.cancelled() => {} }
            });
        }
    }

    /// Stops all consumers; events that are not acknowledged are delivered again to the next process.
    pub(super) fn stop(&self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.drain().for_each(|(_, (_, token))| token.cancel());
    }
}

fn source(start: &Start) -> String {
    format!("start of saga {}", start.saga)
}

/// The durable consumer's name: letters, digits, `-` and `_`. A start by another event gets another consumer, which
/// reads from its own start.
fn durable_name(contract: &Orchestrator, start: &Start) -> String {
    let name = format!("weft-saga_{}_{}_{}_{}", contract.namespace, contract.name, start.saga, start.event_type);
    name.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' || c == '_' { c } else { '-' }).collect()
}

/// The outage when a consumer's messages end with an error.
fn read_outage(address: &str, error: &MessagesError) -> Outage {
    let now = Timestamp::now();
    if error.kind() != MessagesErrorKind::MissingHeartbeat {
        return nats::jetstream_outage(address, now, error);
    }
    let since = now - 2 * HEARTBEAT;
    Outage { server: "JetStream on NATS", address: address.to_owned(), since, failure: Failure::Silent }
}

/// What a message says of its event, in either mode of CloudEvents; nothing when it is no CloudEvent.
#[derive(Debug, Default, Deserialize)]
struct Received<'a> {
    #[serde(borrow)]
    id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    source: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "type")]
    kind: Option<Cow<'a, str>>,
    data: Option<Box<RawValue>>,
}

impl<'a> Received<'a> {
    fn read(message: &'a Message) -> Self {
        let header = |name: &str| message.headers.as_ref()?.get(name).map(async_nats::HeaderValue::as_str);
        if header(event::HEADER_CONTENT_TYPE).is_some_and(|kind| kind.starts_with(event::CONTENT_TYPE_STRUCTURED)) {
            return serde_json::from_slice(&message.payload).unwrap_or_default();
        }
        let attribute = |name| header(name).map(event::decode);
        Self {
            id: attribute(event::HEADER_ID),
            source: attribute(event::HEADER_SOURCE),
            kind: attribute(event::HEADER_TYPE),
            data: serde_json::from_slice(&message.payload).ok(),
        }
    }
}

struct Consumer {
    name: String,
    /// The orchestrator's: events of another one start no saga.
    namespace: String,
    event_source: String,
    start: Start,
    engine: Arc<Engine>,
    problems: Arc<Problems>,
}

impl Consumer {
    async fn run(&self) {
        let Sink::Nats(sink) = &self.start.from;
        let source = source(&self.start);
        loop {
            if let Err(problem) = self.consume(sink, &source).await {
                self.problems.report(&source, problem);
            }
            tokio::time::sleep(RECONNECT_DELAY).await;
        }
    }

    /// Consumes events over one connection, until it is lost.
    async fn consume(&self, sink: &NatsSink, source: &str) -> Result<(), SagaProblem> {
        let filter = Template::parse(&sink.subject, &self.namespace, &self.start.service)
            .map_err(|error| SagaProblem::ContractInvalid(error.to_string()))?
            .filter(Some(&self.start.event_type));
        let server = nats::Server::from(sink);
        let mut connection = Connection::open(&server, "weft saga").await.map_err(SagaProblem::BrokerUnreachable)?;
        let mut jetstream = jetstream::new(connection.client.clone());
        jetstream.set_timeout(nats::TIMEOUT);
        let stream = self.stream(&jetstream, sink, connection.address()).await?;
        let (started, address) = (Timestamp::now(), connection.address().to_owned());
        let failed = |error: &(dyn Error + 'static)| {
            SagaProblem::BrokerUnreachable(nats::jetstream_outage(&address, started, error))
        };
        let consumer = self.consumer(&stream, filter).await.map_err(|error| failed(error.as_ref()))?;
        let mut messages = consumer.messages().await.map_err(|error| failed(&error))?.fuse();
        self.problems.resolve(source);
        let mut working = futures::stream::FuturesUnordered::new();
        loop {
            tokio::select! {
                outage = connection.lost() => return Err(SagaProblem::BrokerUnreachable(outage)),
                message = messages.next(), if working.len() < MAX_CONCURRENT => match message {
                    Some(Ok(message)) => working.push(self.process(message)),
                    Some(Err(error)) => return Err(SagaProblem::BrokerUnreachable(read_outage(&address, &error))),
                    None => return Ok(()),
                },
                Some(()) = working.next() => {}
            }
        }
    }

    async fn stream(&self, jetstream: &Context, sink: &NatsSink, address: &str) -> Result<Stream, SagaProblem> {
        let started = Timestamp::now();
        jetstream.get_stream(&sink.stream).await.map_err(|error| match error.kind() {
            GetStreamErrorKind::JetStream(cause) if cause.code() == 404 => SagaProblem::StreamMissing {
                saga: self.start.saga.clone(),
                address: address.to_owned(),
                stream: sink.stream.clone(),
            },
            _ => SagaProblem::BrokerUnreachable(nats::jetstream_outage(address, started, &error)),
        })
    }

    /// The durable consumer, created when it is missing. An existing one keeps its position.
    async fn consumer(&self, stream: &Stream, filter: String) -> Result<PullConsumer, Box<dyn Error + Send + Sync>> {
        let config = pull::Config {
            durable_name: Some(self.name.clone()),
            description: Some(format!("starts saga {}", self.start.saga)),
            deliver_policy: match self.start.since {
                // a work queue must be consumed from its start, or the server refuses the consumer; past events are
                // skipped in `handle`
                _ if stream.cached_info().config.retention == RetentionPolicy::WorkQueue => DeliverPolicy::All,
                Some(since) => DeliverPolicy::ByStartTime { start_time: from_nanos(since.as_nanosecond())? },
                None => DeliverPolicy::All,
            },
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_ack_pending: 4 * i64::try_from(MAX_CONCURRENT).unwrap_or(i64::MAX),
            filter_subject: filter.clone(),
            ..pull::Config::default()
        };
        let consumer = stream.get_or_create_consumer(&self.name, config).await?;
        let info = consumer.cached_info();
        let present = info.config.filter_subject.clone();
        if present == filter {
            return Ok(consumer);
        }
        // the consumer was created for another subject template: events that were published under that one and were not
        // read yet must still be delivered
        let filter = if info.num_pending == 0 && info.num_ack_pending == 0 { filter } else { String::new() };
        if present == filter {
            return Ok(consumer);
        }
        let config =
            pull::Config { filter_subject: filter, ..pull::Config::try_from_consumer_config(info.config.clone())? };
        Ok(stream.update_consumer(config).await?)
    }

    async fn process(&self, message: Message) {
        let kind = self.handle(&message).await;
        let answered = match kind {
            // acknowledge last: the start is durable, or the event starts no saga
            None => message.ack().await,
            Some(kind) => message.ack_with(kind).await,
        };
        if let Err(error) = answered {
            tracing::debug!(%error, "an event could not be acknowledged and is delivered again");
        }
    }

    /// Whether the event is older than the Saga: the consumer may belong to an earlier Saga of the same name.
    fn is_past(&self, message: &Message) -> bool {
        let published = message.info().ok().map(|info| info.published.unix_timestamp_nanos());
        self.start.since.zip(published).is_some_and(|(since, published)| published < since.as_nanosecond())
    }

    /// Handles an event; `None` when it is to be acknowledged.
    async fn handle(&self, message: &Message) -> Option<AckKind> {
        let event = Received::read(message);
        let ours = event.source.as_deref() == Some(&self.event_source)
            && event.kind.as_deref() == Some(&self.start.event_type);
        if !ours || self.is_past(message) {
            return None;
        }
        let saga = &self.start.saga;
        let Some(id) = event.id else {
            tracing::error!(saga, "an event without an id cannot start its saga and is dropped");
            return Some(AckKind::Term);
        };
        let Some(data) = event.data else {
            tracing::error!(saga, event = %id, "an event whose data is not JSON cannot start its saga and is dropped");
            return Some(AckKind::Term);
        };
        let input = match json::admit(data.get().as_bytes()) {
            Ok(input) => input,
            Err(why) => {
                tracing::error!(saga, event = %id, %why, "an event whose data cannot be an input cannot start its saga and is dropped");
                return Some(AckKind::Term);
            }
        };
        match self.engine.start(saga, input, Some(Key::Event(&id))).await {
            Ok(_) => None,
            Err(error @ (EngineError::UnknownSaga(_) | EngineError::Draining(_) | EngineError::NotHeld)) => {
                tracing::debug!(saga, %error, "an event cannot start its saga now and is redelivered");
                Some(AckKind::Nak(Some(REDELIVERY_DELAY)))
            }
            Err(error) => {
                tracing::warn!(saga, %error, "an event cannot start its saga now and is redelivered");
                Some(AckKind::Nak(Some(REDELIVERY_DELAY)))
            }
        }
    }
}
