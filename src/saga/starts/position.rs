//! Where in a stream the events of a start are read: the durable consumer at the broker, whose position is also recorded in the
//! orchestrator's store, so that it survives the consumer, the Saga and a restore.

use std::{
    collections::{BTreeSet, HashMap},
    error::Error,
    time::Duration,
};

use async_nats::{
    datetime::from_nanos,
    jetstream::{
        Context,
        consumer::{self, AckPolicy, DeliverPolicy, FromConsumer, PullConsumer, pull},
        stream::{RetentionPolicy, Stream},
    },
};
use futures::TryStreamExt;
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;
use uuid::Uuid;

use super::ACK_WAIT;
use crate::{
    contract::orchestrator::Start,
    domain::version::short_hash,
    saga::reader::{Position, ReadError, Reader},
};

/// The server deletes a consumer that was not read for so long: whoever made it is gone, with its cluster or its namespace. One
/// that comes back later begins at the recorded position.
const INACTIVE: Duration = Duration::from_hours(7 * 24);
/// Clocks that differ less are the same: a request takes time.
const SAME_CLOCK: SignedDuration = SignedDuration::from_secs(1);

const STORE: &str = "weft.dev/store";
const NAMESPACE: &str = "weft.dev/namespace";
const ORCHESTRATOR: &str = "weft.dev/orchestrator";
const SAGA: &str = "weft.dev/saga";
const SERVICE: &str = "weft.dev/service";
const EVENT: &str = "weft.dev/event";

pub(in crate::saga) type BoxError = Box<dyn Error + Send + Sync>;

/// Who reads: what an orchestrator's consumers carry. Two clusters with the same names have different stores.
#[derive(Clone, Debug)]
pub(in crate::saga) struct Identity {
    pub store: Uuid,
    pub namespace: String,
    pub orchestrator: String,
}

impl Identity {
    /// The durable consumer's name: letters, digits, `-` and `_`, at most 95 characters. A start by another event gets
    /// another consumer.
    pub(in crate::saga) fn durable_name(&self, start: &Start) -> String {
        let Self { store, namespace, orchestrator } = self;
        let Start { saga, service, event_type, .. } = start;
        let all = format!("{store}\0{namespace}\0{orchestrator}\0{saga}\0{service}\0{event_type}");
        format!("weft-saga_{saga}_{}", short_hash(all.as_bytes(), 16))
    }

    fn metadata(&self, start: &Start) -> HashMap<String, String> {
        [
            (STORE, self.store.to_string()),
            (NAMESPACE, self.namespace.clone()),
            (ORCHESTRATOR, self.orchestrator.clone()),
            (SAGA, start.saga.clone()),
            (SERVICE, start.service.clone()),
            (EVENT, start.event_type.clone()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into()
    }

    fn owns(&self, config: &consumer::Config) -> bool {
        let store = self.store.to_string();
        [(STORE, &store), (NAMESPACE, &self.namespace), (ORCHESTRATOR, &self.orchestrator)]
            .into_iter()
            .all(|(key, value)| config.metadata.get(key) == Some(value))
    }
}

/// The stream as the server describes it now.
#[derive(Debug, Deserialize)]
struct Described {
    /// A stream that is made again counts from 1 again.
    created: String,
    /// The server's clock; servers before 2.10 do not give it.
    ts: Option<Timestamp>,
}

/// Events that count: those from `first` on, and of a work queue that is read for the first time those since `since`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::saga) struct Floor {
    first: u64,
    since: Option<Timestamp>,
}

impl Floor {
    pub(in crate::saga) fn is_past(&self, sequence: u64, published: Timestamp) -> bool {
        sequence < self.first || self.since.is_some_and(|since| published < since)
    }
}

/// Where the events of a start are read from, in one stream.
pub(in crate::saga) struct Place<'a> {
    pub identity: &'a Identity,
    pub start: &'a Start,
    pub stream: &'a Stream,
    pub reader: &'a Reader,
    /// Events that may be delivered before the first of them is acknowledged.
    pub max_pending: usize,
    stream_created: String,
    clock: Timestamp,
}

impl<'a> Place<'a> {
    pub(in crate::saga) async fn find(
        identity: &'a Identity,
        start: &'a Start,
        (jetstream, stream): (&Context, &'a Stream),
        reader: &'a Reader,
        max_pending: usize,
    ) -> Result<Self, BoxError> {
        let name = &stream.cached_info().config.name;
        let described: Described = jetstream.request(format!("STREAM.INFO.{name}"), &()).await?;
        let clock = described.ts.unwrap_or_else(Timestamp::now);
        Ok(Self { identity, start, stream, reader, max_pending, stream_created: described.created, clock })
    }

    fn stream_name(&self) -> &str {
        &self.stream.cached_info().config.name
    }

    /// The durable consumer, created where it is missing: at the recorded position, and without one at the first event since
    /// the Saga was created. An existing one keeps its position.
    pub(in crate::saga) async fn consumer(&self, filter: String) -> Result<(PullConsumer, Floor), BoxError> {
        let recorded = self.reader.position(self.start, self.stream_name()).await?;
        // of a stream that was made again, everything counts
        let first =
            recorded.as_ref().map(|known| if known.stream_created == self.stream_created { known.next } else { 1 });
        let since = self.start.since.map(|since| since_by_server(since, self.clock, Timestamp::now()));
        let config = self.config(filter.clone(), first, since)?;
        let name = self.identity.durable_name(self.start);
        let mut consumer = self.stream.get_or_create_consumer(&name, config.clone()).await?;
        let mut next = consumer.cached_info().ack_floor.stream_sequence + 1;
        // the consumer is further than the database knows: that was restored from a backup, or stopped before it recorded the
        // last seconds. What it does not know may not have started; what has, is not started again
        if first.is_some_and(|first| first < next) && self.retention() == RetentionPolicy::Limits {
            self.stream.delete_consumer(&name).await?;
            consumer = self.stream.create_consumer(config).await?;
            next = 0;
        }
        let is_queue = self.is_queue();
        let floor = Floor { first: first.unwrap_or(0), since: since.filter(|_| first.is_none() && is_queue) };
        self.record(next.max(floor.first)).await?;
        Ok((self.refiltered(consumer, filter).await?, floor))
    }

    fn is_queue(&self) -> bool {
        self.retention() == RetentionPolicy::WorkQueue
    }

    fn retention(&self) -> RetentionPolicy {
        self.stream.cached_info().config.retention
    }

    fn config(&self, filter: String, first: Option<u64>, since: Option<Timestamp>) -> Result<pull::Config, BoxError> {
        let retention = self.retention();
        Ok(pull::Config {
            durable_name: Some(self.identity.durable_name(self.start)),
            description: Some(format!("reads events of saga {}", self.start.saga)),
            metadata: self.identity.metadata(self.start),
            deliver_policy: match (first, since) {
                // a work queue must be consumed from its start, or the server refuses the consumer: see `Floor`
                _ if self.is_queue() => DeliverPolicy::All,
                (Some(first), _) => DeliverPolicy::ByStartSequence { start_sequence: first.max(1) },
                (None, Some(since)) => DeliverPolicy::ByStartTime { start_time: from_nanos(since.as_nanosecond())? },
                (None, None) => DeliverPolicy::All,
            },
            // with the other policies the server drops what no consumer waits for
            inactive_threshold: if retention == RetentionPolicy::Limits { INACTIVE } else { Duration::ZERO },
            ack_policy: AckPolicy::Explicit,
            ack_wait: ACK_WAIT,
            max_ack_pending: i64::try_from(self.max_pending).unwrap_or(i64::MAX),
            filter_subject: filter,
            ..pull::Config::default()
        })
    }

    /// The consumer may have been created for another subject template: events that were published under that one and were
    /// not read yet must still be delivered.
    async fn refiltered(&self, consumer: PullConsumer, filter: String) -> Result<PullConsumer, BoxError> {
        let info = consumer.cached_info();
        let is_read = info.num_pending == 0 && info.num_ack_pending == 0;
        let wanted = if info.config.filter_subject == filter || is_read { filter } else { String::new() };
        if info.config.filter_subject == wanted {
            return Ok(consumer);
        }
        let config =
            pull::Config { filter_subject: wanted, ..pull::Config::try_from_consumer_config(info.config.clone())? };
        Ok(self.stream.update_consumer(config).await?)
    }

    /// Records that everything before `next` was handled.
    pub(in crate::saga) async fn record(&self, next: u64) -> Result<(), ReadError> {
        let position = Position { stream_created: self.stream_created.clone(), next };
        self.reader.record_position(self.start, self.stream_name(), &position).await
    }

    /// Records how far the consumer is; true when an event was delivered by it.
    pub(in crate::saga) async fn record_progress(&self) -> Result<bool, BoxError> {
        let info = self.stream.consumer_info(&self.identity.durable_name(self.start)).await?;
        self.record(info.ack_floor.stream_sequence + 1).await?;
        Ok(info.delivered.consumer_sequence > 0)
    }

    /// Deletes the consumer, and keeps its position: a Saga of the same name continues there.
    pub(in crate::saga) async fn retire(&self) -> Result<(), BoxError> {
        let name = self.identity.durable_name(self.start);
        match self.stream.consumer_info(&name).await {
            Ok(info) => self.record(info.ack_floor.stream_sequence + 1).await?,
            Err(error) if is_missing(&error) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        self.stream.delete_consumer(&name).await?;
        tracing::info!(consumer = name, "the consumer of a start that is over was deleted");
        Ok(())
    }

    /// Retires the consumers of this orchestrator that belong to no start of `wanted`.
    pub(in crate::saga) async fn sweep(&self, wanted: &BTreeSet<String>) -> Result<(), BoxError> {
        let mut consumers = self.stream.consumers();
        let mut over = Vec::new();
        while let Some(info) = consumers.try_next().await? {
            if self.identity.owns(&info.config) && !wanted.contains(&info.name) {
                over.push(info);
            }
        }
        for info in over {
            let label = |key| info.config.metadata.get(key).cloned().unwrap_or_default();
            let start =
                Start { saga: label(SAGA), service: label(SERVICE), event_type: label(EVENT), ..self.start.clone() };
            let (stream_created, clock) = (self.stream_created.clone(), self.clock);
            Place { start: &start, stream_created, clock, ..*self }.retire().await?;
        }
        Ok(())
    }
}

fn is_missing(error: &async_nats::jetstream::context::ConsumerInfoError) -> bool {
    use async_nats::jetstream::context::ConsumerInfoErrorKind as Kind;
    match error.kind() {
        Kind::NotFound => true,
        Kind::JetStream(cause) => cause.code() == 404,
        _ => false,
    }
}

/// The time at which a Saga was created, by the clock of the server. That of the API server is not known; it and this process
/// are of one cluster, so their clocks are taken to be the same.
fn since_by_server(since: Timestamp, server: Timestamp, own: Timestamp) -> Timestamp {
    let ahead = server.duration_since(own);
    if ahead.abs() < SAME_CLOCK { since } else { since.saturating_add(ahead).unwrap_or(since) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::relay::NatsSink;

    fn start(saga: &str, event_type: &str) -> Start {
        let from = NatsSink {
            servers: Vec::new(),
            secret_folder: None,
            inbox_prefix: None,
            stream: "events".to_owned(),
            subject: "events.{type}".to_owned(),
            max_age_seconds: 0,
        };
        let (saga, event_type) = (saga.to_owned(), event_type.to_owned());
        Start { saga, service: "orders".to_owned(), event_type, since: None, from }
    }

    #[test]
    fn a_consumer_s_name_says_whose_it_is() {
        let identity = |store: u128, namespace: &str| Identity {
            store: Uuid::from_u128(store),
            namespace: namespace.to_owned(),
            orchestrator: "default".to_owned(),
        };
        let long = (identity(1, &"n".repeat(63)), start(&"s".repeat(63), &"E.".repeat(64)));
        let names: BTreeSet<_> = [
            identity(1, "shop").durable_name(&start("order", "A.B")),
            identity(2, "shop").durable_name(&start("order", "A.B")),
            identity(1, "shop_order").durable_name(&start("order", "A.B")),
            identity(1, "shop").durable_name(&start("order", "A-B")),
            identity(1, "shop").durable_name(&start("order-A", "B")),
            long.0.durable_name(&long.1),
        ]
        .into();
        assert_eq!(names.len(), 6, "another cluster, namespace, event or saga: another name");
        let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        assert!(names.iter().all(|name| name.len() <= 95 && name.chars().all(is_plain)), "{names:?}");
    }

    #[test]
    fn a_saga_s_age_is_counted_by_the_server_s_clock() {
        let at = |second: i64| Timestamp::from_second(second).unwrap();
        assert_eq!(since_by_server(at(100), at(200), at(200)), at(100));
        // the cluster is an hour ahead: events of the last hour were published after the Saga was created
        assert_eq!(since_by_server(at(10_000), at(10_000 - 3_590), at(10_010)), at(6_400));
        assert_eq!(since_by_server(at(100), at(3_700), at(100)), at(3_700));
    }

    #[test]
    fn what_was_handled_before_is_past() {
        let floor = Floor { first: 7, since: None };
        assert!(floor.is_past(6, Timestamp::MAX) && !floor.is_past(7, Timestamp::UNIX_EPOCH));
        let queue = Floor { first: 0, since: Some(Timestamp::UNIX_EPOCH) };
        assert!(queue.is_past(9, Timestamp::MIN) && !queue.is_past(9, Timestamp::UNIX_EPOCH));
    }
}
