//! Starts sagas by events: one durable JetStream consumer for each start, which acknowledges an event after the start
//! of the saga is durable.
//!
//! A consumer reads from where starting began (see [`position`]), and only subjects that can contain its event. Otherwise a
//! Saga that is added to a system that has run for years would run for its whole past. An event that can never start its
//! saga is recorded as a dead start.

pub(super) mod position;
pub(super) mod received;

use std::{
    collections::{BTreeMap, BTreeSet},
    error::Error,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use async_nats::jetstream::{
    self, AckKind, Context, Message,
    consumer::pull::{MessagesError, MessagesErrorKind},
    context::GetStreamErrorKind,
    stream::Stream,
};
use futures::{StreamExt, TryStreamExt};
use jiff::Timestamp;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use self::{
    position::{BoxError, Floor, Identity, Place},
    received::Received,
};
use super::{
    engine::{Engine, EngineError},
    key::Key,
    problem::{Problems, SagaProblem},
    reader::{DeadStart, ReadError, Reader},
    tracker,
};
use crate::{
    contract::{
        orchestrator::{Orchestrator, Start},
        relay::NatsSink,
        status::StartReport,
    },
    domain::{
        destination::{Style, Template},
        names,
        saga::json,
    },
    nats::{self, Connection},
    outage::{Failure, Outage},
};

/// Events of one start that are handled concurrently.
const MAX_CONCURRENT: usize = 256;
/// An event that was not acknowledged within this time is delivered again.
pub(super) const ACK_WAIT: Duration = Duration::from_secs(30);
/// Time between two attempts to connect to the broker.
pub(super) const RECONNECT_DELAY: Duration = Duration::from_secs(2);
/// An event that cannot be handled now is redelivered after this time.
const REDELIVERY_DELAY: Duration = Duration::from_secs(1);
/// Interval of the driver's heartbeats; it reports an error when two are missing.
const HEARTBEAT: Duration = Duration::from_secs(15);
/// How often the position is recorded, and the types of events are read until the wanted one is there.
pub(super) const RECORD_INTERVAL: Duration = Duration::from_secs(10);
/// How many types of events are reported.
const MAX_TYPES: usize = 20;
/// How many subjects are read for them; a subject may have the aggregate's id.
const MAX_SUBJECTS: usize = 1_000;

/// The consumers of the contract in force.
#[derive(Debug)]
pub(super) struct Starts {
    engine: Arc<Engine>,
    reader: Arc<Reader>,
    problems: Arc<Problems>,
    running: Mutex<Vec<(Task, CancellationToken)>>,
    shared: Arc<Shared>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Task {
    start: Start,
    /// Its Saga is being deleted: the consumer is, too.
    over: bool,
}

/// What all consumers know.
#[derive(Debug, Default)]
struct Shared {
    /// Of the contract in force, those that are not over, and those by which choreographies are read.
    wanted: Mutex<Vec<Start>>,
    /// By saga.
    reports: Mutex<BTreeMap<String, StartReport>>,
}

impl Shared {
    fn names(&self, identity: &Identity) -> BTreeSet<String> {
        let wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.iter().map(|start| identity.durable_name(start)).collect()
    }

    fn report(&self, saga: &str, change: impl FnOnce(&mut StartReport)) {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        change(reports.entry(saga.to_owned()).or_default());
    }
}

impl Starts {
    pub(super) fn new(engine: Arc<Engine>, reader: Arc<Reader>, problems: Arc<Problems>) -> Self {
        Self { engine, reader, problems, running: Mutex::default(), shared: Arc::default() }
    }

    /// Runs exactly the starts of `contract`.
    pub(super) fn follow(&self, contract: &Orchestrator) {
        let is_over = |start: &Start| contract.draining.contains(&start.saga);
        let tasks: Vec<_> =
            contract.starts.iter().map(|start| Task { start: start.clone(), over: is_over(start) }).collect();
        let wanted: Vec<_> = tasks.iter().filter(|task| !task.over).map(|task| task.start.clone()).collect();
        let read = contract.choreographies.iter().flat_map(tracker::reads);
        let mut reports = self.shared.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports.retain(|saga, _| wanted.iter().any(|start| start.saga == *saga));
        drop(reports);
        *self.shared.wanted.lock().unwrap_or_else(PoisonError::into_inner) = wanted.into_iter().chain(read).collect();
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.retain(|(task, token)| {
            let stays = tasks.contains(task);
            if !stays {
                token.cancel();
                self.problems.resolve(&source(&task.start));
            }
            stays
        });
        for task in tasks {
            if running.iter().any(|(known, _)| *known == task) {
                continue;
            }
            let token = CancellationToken::new();
            running.push((task.clone(), token.clone()));
            let consumer = Consumer {
                namespace: contract.namespace.clone(),
                orchestrator: contract.name.clone(),
                event_source: names::event_source(&contract.namespace, &task.start.service),
                is_own_subject: is_own_subject(&task.start),
                start: task.start,
                over: task.over,
                seen: AtomicBool::new(false),
                engine: Arc::clone(&self.engine),
                reader: Arc::clone(&self.reader),
                problems: Arc::clone(&self.problems),
                shared: Arc::clone(&self.shared),
            };
            self.engine.tasks.spawn(async move {
                tokio::select! { () = consumer.run() => {} () = token.cancelled() => {} }
            });
        }
    }

    /// Stops all consumers; events that are not acknowledged are delivered again to the next process.
    pub(super) fn stop(&self) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.drain(..).for_each(|(_, token)| token.cancel());
    }

    /// By saga.
    pub(super) fn reports(&self) -> BTreeMap<String, StartReport> {
        self.shared.reports.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Whether the subjects of the start's events are those of no other service and type.
fn is_own_subject(start: &Start) -> bool {
    ["{namespace}", "{service}", "{type}"].iter().all(|part| start.from.subject.contains(part))
}

fn source(start: &Start) -> String {
    format!("start of saga {}", start.saga)
}

/// The outage when a consumer's messages end with an error.
pub(super) fn read_outage(address: &str, error: &MessagesError) -> Outage {
    let now = Timestamp::now();
    if error.kind() != MessagesErrorKind::MissingHeartbeat {
        return nats::jetstream_outage(address, now, error);
    }
    let since = now - 2 * HEARTBEAT;
    Outage { server: "JetStream on NATS", address: address.to_owned(), since, failure: Failure::Silent }
}

struct Consumer {
    /// The orchestrator's: events of another one start no saga.
    namespace: String,
    orchestrator: String,
    event_source: String,
    is_own_subject: bool,
    start: Start,
    over: bool,
    /// An event of the start's type exists.
    seen: AtomicBool,
    engine: Arc<Engine>,
    reader: Arc<Reader>,
    problems: Arc<Problems>,
    shared: Arc<Shared>,
}

impl Consumer {
    async fn run(&self) {
        let sink = &self.start.from;
        let source = source(&self.start);
        loop {
            match self.consume(sink, &source).await {
                Ok(()) if self.over => return,
                Ok(()) => {}
                // the Saga is deleted: what is left at the broker hinders nobody
                Err(problem) if self.over => tracing::warn!(%problem, "a consumer could not be deleted yet"),
                Err(problem) => self.problems.report(&source, problem),
            }
            tokio::time::sleep(RECONNECT_DELAY).await;
        }
    }

    /// Consumes events over one connection, until it is lost. When the start is over, deletes its consumer.
    async fn consume(&self, sink: &NatsSink, source: &str) -> Result<(), SagaProblem> {
        let template = Template::parse(&sink.subject, &self.namespace, &self.start.service, Style::Subject)
            .map_err(|error| SagaProblem::ContractInvalid(error.to_string()))?;
        let store = self.reader.store_id().await.map_err(|error| self.database(&error))?;
        let identity = Identity { store, namespace: self.namespace.clone(), orchestrator: self.orchestrator.clone() };
        let server = nats::Server::from(sink);
        let mut connection = Connection::open(&server, "weft saga").await.map_err(SagaProblem::BrokerUnreachable)?;
        let mut jetstream = jetstream::new(connection.client.clone());
        jetstream.set_timeout(nats::TIMEOUT);
        let stream = self.stream(&jetstream, sink, connection.address()).await?;
        let (started, address) = (Timestamp::now(), connection.address().to_owned());
        let outage = |error: &(dyn Error + 'static)| {
            SagaProblem::BrokerUnreachable(nats::jetstream_outage(&address, started, error))
        };
        let failed = |error: BoxError| match error.downcast_ref::<ReadError>() {
            Some(error) => self.database(error),
            None => outage(error.as_ref()),
        };
        let found = Place::find(&identity, &self.start, (&jetstream, &stream), &self.reader, 4 * MAX_CONCURRENT);
        let place = found.await.map_err(failed)?;
        if self.over {
            return place.retire().await.map_err(failed);
        }
        let (consumer, floor) = place.consumer(template.filter(Some(&self.start.event_type))).await.map_err(failed)?;
        place.sweep(&self.shared.names(&identity)).await.map_err(failed)?;
        let mut messages = consumer.messages().await.map_err(|error| outage(&error))?.fuse();
        self.problems.resolve(source);
        let mut working = futures::stream::FuturesUnordered::new();
        let mut record = interval(RECORD_INTERVAL);
        record.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                outage = connection.lost() => return Err(SagaProblem::BrokerUnreachable(outage)),
                message = messages.next(), if working.len() < MAX_CONCURRENT => match message {
                    Some(Ok(message)) => working.push(self.process(message, floor)),
                    Some(Err(error)) => return Err(SagaProblem::BrokerUnreachable(read_outage(&address, &error))),
                    None => return Ok(()),
                },
                Some(()) = working.next() => {}
                _ = record.tick() => self.record(&place, &template).await.map_err(failed)?,
            }
        }
    }

    fn database(&self, error: &ReadError) -> SagaProblem {
        self.reader.problem(error, SagaProblem::database_fails)
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

    /// Records the position, and reports what was seen.
    async fn record(&self, place: &Place<'_>, template: &Template) -> Result<(), BoxError> {
        let delivered = place.record_progress().await?;
        let filter = template.filter(Some(&self.start.event_type));
        let typed = template.type_of(&filter).is_some();
        if typed && !self.seen.load(Relaxed) {
            let any = place.stream.info_with_subjects(filter).await?.try_next().await?.is_some();
            self.seen.store(delivered || any, Relaxed);
        }
        let seen = self.seen.load(Relaxed);
        let mut types = BTreeSet::new();
        if typed && !seen {
            let subjects = place.stream.info_with_subjects(template.filter(None)).await?;
            let mut subjects = subjects.take(MAX_SUBJECTS);
            while let Some((subject, _count)) = subjects.try_next().await?
                && types.len() < MAX_TYPES
            {
                types.extend(template.type_of(&subject));
            }
        }
        let dead = self.reader.dead_starts(&self.start.saga).await?;
        self.shared.report(&self.start.saga, |report| {
            let types = types.into_iter().collect();
            *report = StartReport { seen: (typed || seen).then_some(seen), types, dead };
        });
        Ok(())
    }

    async fn process(&self, message: Message, floor: Floor) {
        let kind = self.handle(&message, floor).await;
        let answered = match kind {
            // acknowledge last: the start is durable, or the event starts no saga
            None => message.ack().await,
            Some(kind) => message.ack_with(kind).await,
        };
        if let Err(error) = answered {
            tracing::debug!(%error, "an event could not be acknowledged and is delivered again");
        }
    }

    /// Handles an event; `None` when it is to be acknowledged.
    async fn handle(&self, message: &Message, floor: Floor) -> Option<AckKind> {
        let info = message.info().ok();
        let sequence = info.as_ref().map_or(0, |info| info.stream_sequence);
        let published = info.and_then(|info| Timestamp::from_nanosecond(info.published.unix_timestamp_nanos()).ok());
        if published.is_some_and(|published| floor.is_past(sequence, published)) {
            return None;
        }
        let event = Received::read(message);
        let is_event = event.source.is_some() && event.kind.is_some();
        if !is_event && self.is_own_subject {
            return self.bury(message, sequence, None, "it is no CloudEvent: it has no source or no type").await;
        }
        let ours = event.source.as_deref() == Some(&self.event_source)
            && event.kind.as_deref() == Some(&self.start.event_type);
        if !ours {
            return None;
        }
        if !self.seen.swap(true, Relaxed) {
            self.shared.report(&self.start.saga, |report| {
                report.seen = Some(true);
                report.types.clear();
            });
        }
        let saga = &self.start.saga;
        let Some(id) = event.id else {
            return self.bury(message, sequence, None, "it has no id").await;
        };
        let Some(data) = event.data else {
            return self.bury(message, sequence, Some(&id), "its data is not JSON").await;
        };
        let started = match json::admit(data.get().as_bytes()) {
            Ok(input) => self.engine.start(saga, input, Some(Key::Event(&id))).await,
            Err(why) => Err(EngineError::UnusableInput(why.to_string())),
        };
        match started {
            Ok(_) => None,
            Err(EngineError::UnusableInput(why)) => {
                let why = format!("its data cannot be the saga's input: {why}");
                self.bury(message, sequence, Some(&id), &why).await
            }
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

    /// Records an event that can never start the saga; it is delivered again until that is durable.
    async fn bury(&self, message: &Message, sequence: u64, event: Option<&str>, why: &str) -> Option<AckKind> {
        let saga = &self.start.saga;
        let dead = DeadStart { stream: &self.start.from.stream, sequence, subject: &message.subject, event, why };
        match self.reader.bury(saga, &dead).await {
            Ok(count) => {
                tracing::error!(saga, subject = %message.subject, sequence, why, "an event can never start its saga");
                self.shared.report(saga, |report| report.dead = count);
                Some(AckKind::Term)
            }
            Err(error) => {
                tracing::warn!(saga, %error, "a dead start cannot be recorded now; the event is redelivered");
                Some(AckKind::Nak(Some(REDELIVERY_DELAY)))
            }
        }
    }
}
