//! Reads the events of one service for one saga, from where its relay publishes them.

use std::{
    error::Error,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use async_nats::jetstream::{self, Message, context::GetStreamErrorKind, stream::Stream};
use futures::StreamExt;
use jiff::Timestamp;
use tokio::{
    sync::mpsc,
    time::{MissedTickBehavior, interval},
};

use super::{
    Shared,
    committer::{Item, Progress},
    instance_id,
};
use crate::{
    contract::orchestrator::Start,
    domain::{
        choreography::{definition::Kind, instance::Seen},
        destination::{Style, Template},
        names,
    },
    nats::{self, Connection},
    saga::{
        engine::Engine,
        problem::{Problems, SagaProblem},
        reader::{ReadError, Reader},
        starts::{
            ACK_WAIT, RECONNECT_DELAY, RECORD_INTERVAL,
            position::{BoxError, Floor, Identity, Place},
            read_outage,
            received::Received,
        },
    },
};

/// Events that may be delivered before the first of them is acknowledged.
const MAX_PENDING: usize = 8_192;
/// How often it is recorded that everything was read.
const IDLE_INTERVAL: Duration = Duration::from_millis(500);
/// Added to the time after which events are delivered again, for their way.
const REDELIVERY_MARGIN: Duration = Duration::from_secs(2);
/// While another process holds the partitions, it reads.
const STANDBY_INTERVAL: Duration = Duration::from_secs(1);
/// An attribute of more characters is none that a service gives: the event is not followed.
const MAX_ATTRIBUTE: usize = 256;

pub(super) struct Consumer {
    pub namespace: String,
    pub orchestrator: String,
    /// The saga, the service, and where its events are.
    pub read: Start,
    /// The kind with which an instance begins.
    pub start: Kind,
    /// The saga is not followed any more: the consumer is deleted.
    pub over: bool,
    pub engine: Arc<Engine>,
    pub reader: Arc<Reader>,
    pub problems: Arc<Problems>,
    pub shared: Arc<Shared>,
    pub items: mpsc::Sender<Item>,
}

/// Where problems with the reading of a service's events are reported.
pub(super) fn source(read: &Start) -> String {
    format!("events of {} for saga {}", read.service, read.saga)
}

impl Consumer {
    /// Runs until cancelled.
    pub(super) async fn run(&self) {
        let source = source(&self.read);
        loop {
            if self.engine.held() == 0 {
                tokio::time::sleep(STANDBY_INTERVAL).await;
                continue;
            }
            match self.consume(&source).await {
                Ok(()) if self.over => return,
                Ok(()) => {}
                Err(problem) if self.over => {
                    // what is left at the broker hinders nobody, and the server deletes it in the end
                    tracing::warn!(%problem, "a consumer could not be deleted");
                    return;
                }
                Err(problem) => self.problems.report(&source, problem),
            }
            tokio::time::sleep(RECONNECT_DELAY).await;
        }
    }

    /// Reads over one connection, until it is lost.
    async fn consume(&self, source: &str) -> Result<(), SagaProblem> {
        let sink = &self.read.from;
        let template = Template::parse(&sink.subject, &self.namespace, &self.read.service, Style::Subject)
            .map_err(|error| SagaProblem::ContractInvalid(error.to_string()))?;
        let store = self.reader.store_id().await.map_err(|error| self.database(&error))?;
        let identity = Identity { store, namespace: self.namespace.clone(), orchestrator: self.orchestrator.clone() };
        let mut connection =
            Connection::open(&nats::Server::from(sink), "weft saga").await.map_err(SagaProblem::BrokerUnreachable)?;
        let mut jetstream = jetstream::new(connection.client.clone());
        jetstream.set_timeout(nats::TIMEOUT);
        let (started, address) = (Timestamp::now(), connection.address().to_owned());
        let stream = self.stream(&jetstream, &address).await?;
        let outage = |error: &(dyn Error + 'static)| {
            SagaProblem::BrokerUnreachable(nats::jetstream_outage(&address, started, error))
        };
        let failed = |error: BoxError| match error.downcast_ref::<ReadError>() {
            Some(error) => self.database(error),
            None => outage(error.as_ref()),
        };
        let found = Place::find(&identity, &self.read, (&jetstream, &stream), &self.reader, MAX_PENDING);
        let place = found.await.map_err(failed)?;
        if self.over {
            return place.retire().await.map_err(failed);
        }
        let (consumer, floor) = place.consumer(template.filter(None)).await.map_err(failed)?;
        let mut unread = consumer.cached_info().num_pending;
        // what was delivered to an earlier process, and not acknowledged, comes again after this time
        let redelivered =
            if consumer.cached_info().num_ack_pending == 0 { Duration::ZERO } else { ACK_WAIT + REDELIVERY_MARGIN };
        let settled = Instant::now() + redelivered;
        let mut messages = consumer.messages().await.map_err(|error| outage(&error))?.fuse();
        self.problems.resolve(source);
        let progress = Arc::new(Progress::default());
        let [mut idle, mut record] = [IDLE_INTERVAL, RECORD_INTERVAL].map(|period| {
            let mut ticks = interval(period);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            ticks
        });
        loop {
            tokio::select! {
                outage = connection.lost() => return Err(SagaProblem::BrokerUnreachable(outage)),
                message = messages.next() => match message {
                    Some(Ok(message)) => {
                        let pending = self.process(message, floor, &progress).await;
                        unread = pending.unwrap_or(unread);
                    }
                    Some(Err(error)) => return Err(SagaProblem::BrokerUnreachable(read_outage(&address, &error))),
                    None => return Ok(()),
                },
                _ = idle.tick(), if Instant::now() >= settled => {
                    let everything = unread == 0 && progress.under_way.load(Relaxed) == 0;
                    let recorded = Timestamp::from_millisecond(progress.recorded.load(Relaxed)).unwrap_or_default();
                    let until = if everything { connection.received_at() } else { recorded };
                    self.shared.set_read_until(&self.read, until);
                }
                _ = record.tick() => drop(place.record_progress().await.map_err(failed)?),
            }
            if self.engine.held() == 0 {
                return Ok(());
            }
        }
    }

    fn database(&self, error: &ReadError) -> SagaProblem {
        self.reader.problem(error, SagaProblem::database_fails)
    }

    async fn stream(&self, jetstream: &jetstream::Context, address: &str) -> Result<Stream, SagaProblem> {
        let (name, started) = (&self.read.from.stream, Timestamp::now());
        jetstream.get_stream(name).await.map_err(|error| match error.kind() {
            GetStreamErrorKind::JetStream(cause) if cause.code() == 404 => SagaProblem::NothingToWatch {
                saga: self.read.saga.clone(),
                service: self.read.service.clone(),
                address: address.to_owned(),
                stream: name.clone(),
            },
            _ => SagaProblem::BrokerUnreachable(nats::jetstream_outage(address, started, &error)),
        })
    }

    /// Passes an event on; returns how many are behind it at the broker.
    async fn process(&self, message: Message, floor: Floor, progress: &Arc<Progress>) -> Option<u64> {
        let info = message.info().ok();
        let (sequence, pending) = info.as_ref().map_or((0, None), |info| (info.stream_sequence, Some(info.pending)));
        let published = info.and_then(|info| Timestamp::from_nanosecond(info.published.unix_timestamp_nanos()).ok());
        let published = published.unwrap_or_else(Timestamp::now);
        let seen = if floor.is_past(sequence, published) { None } else { self.read(&message, published) };
        let (_, acker) = message.split();
        let Some((correlation, event)) = seen else {
            if let Err(error) = acker.ack().await {
                tracing::debug!(%error, "an event could not be acknowledged and is delivered again");
            }
            return pending;
        };
        progress.under_way.fetch_add(1, Relaxed);
        let saga: Arc<str> = self.read.saga.as_str().into();
        let id = instance_id(&saga, &correlation);
        let (published, progress) = (published.as_millisecond(), Arc::clone(progress));
        let item = Item { saga, id, correlation, event, acker, published, progress };
        // it is closed when the process ends
        let _ = self.items.send(item).await;
        pending
    }

    /// The event with its correlation; `None` when it can belong to no instance.
    fn read(&self, message: &Message, published: Timestamp) -> Option<(String, Seen)> {
        let received = Received::attributes(message);
        if received.source.as_deref() != Some(&names::event_source(&self.namespace, &self.read.service)) {
            return None;
        }
        let kind = Kind { service: self.read.service.clone(), event: received.kind?.into_owned() };
        let text = |text: std::borrow::Cow<'_, str>| Some(text.into_owned()).filter(|text| !text.is_empty());
        let id = received.id.and_then(text)?;
        let correlation = received.correlation.and_then(text).unwrap_or_else(|| id.clone());
        let cause = received.causation.and_then(text).filter(|cause| *cause != id);
        // it begins a correlation of its own, and that of no instance
        if correlation == id && kind != self.start {
            return None;
        }
        let is_long = |text: &str| text.chars().count() > MAX_ATTRIBUTE;
        if is_long(&id) || is_long(&correlation) || is_long(&kind.event) || cause.as_deref().is_some_and(is_long) {
            tracing::warn!(
                saga = self.read.saga,
                "an event with an attribute of more than 256 characters is not followed"
            );
            return None;
        }
        let recorded = received.time.and_then(|time| time.parse::<Timestamp>().ok());
        let at = recorded.unwrap_or(published).as_millisecond();
        Some((correlation, Seen { kind, id, cause, at }))
    }
}
