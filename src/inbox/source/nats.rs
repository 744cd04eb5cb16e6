//! NATS JetStream: an ephemeral pull consumer without acknowledgements, made anew for each session.
//!
//! A durable consumer that is acknowledged message by message would deliver what was not acknowledged again after a while, and what
//! is behind it at once: events of one aggregate would overtake each other.

use std::{collections::BTreeSet, error::Error, time::Duration};

use async_nats::{
    datetime::from_nanos,
    jetstream::{
        self,
        consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
        context::GetStreamErrorKind,
        stream::{RetentionPolicy, Stream},
    },
};
use futures::{FutureExt, StreamExt};
use jiff::{SignedDuration, Timestamp};
use serde::Deserialize;

use super::{Message, Opened, Position, SourceError};
use crate::{
    contract::inbox::{Inbox, Subscription},
    domain::{
        destination::{Style, Template},
        version::short_hash,
    },
    nats::{self, Connection},
};

/// The server deletes a consumer that nobody has read for so long.
const INACTIVE: Duration = Duration::from_secs(30);
/// Messages that one call returns at most.
const BATCH: usize = 256;
/// Clocks that differ less are the same: a request takes time.
const SAME_CLOCK: SignedDuration = SignedDuration::from_secs(1);

/// How a subscription reads its stream.
#[derive(Debug)]
pub(in crate::inbox) struct Nats<'a> {
    contract: &'a Inbox,
    subscription: &'a Subscription,
    template: Template,
}

/// One connection with its consumer.
pub(in crate::inbox) struct NatsSession {
    connection: Connection,
    messages: pull::Stream,
    stream: Stream,
    consumer: String,
    /// Of the consumer: the number of the last message.
    delivered: u64,
}

impl std::fmt::Debug for NatsSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NatsSession").field("consumer", &self.consumer).finish_non_exhaustive()
    }
}

/// The stream as the server describes it.
#[derive(Debug, Deserialize)]
struct Described {
    created: String,
    /// The server's clock; servers before 2.10 do not give it.
    ts: Option<Timestamp>,
}

impl<'a> Nats<'a> {
    pub(in crate::inbox) fn new(contract: &'a Inbox, subscription: &'a Subscription) -> Result<Self, SourceError> {
        let (from, subject) = (&subscription.from, &subscription.stream.subject);
        let template = Template::parse(subject, &from.namespace, &from.service, Style::Subject)
            .map_err(|error| SourceError::Unusable(error.to_string()))?;
        Ok(Self { contract, subscription, template })
    }

    /// Connects, and begins at the recorded position; without one at the first event since the subscription's `since`.
    pub(in crate::inbox) async fn open(&self, recorded: Option<&Position>) -> Result<Opened<NatsSession>, SourceError> {
        let sink = &self.subscription.stream;
        let server = nats::Server::from(sink);
        let connection = Connection::open(&server, "weft inbox").await.map_err(SourceError::Unreachable)?;
        let mut jetstream = jetstream::new(connection.client.clone());
        jetstream.set_timeout(nats::TIMEOUT);
        let (started, address) = (Timestamp::now(), connection.address().to_owned());
        let failed =
            |error: &(dyn Error + 'static)| SourceError::Unreachable(nats::jetstream_outage(&address, started, error));
        let stream = jetstream.get_stream(&sink.stream).await.map_err(|error| match error.kind() {
            GetStreamErrorKind::JetStream(cause) if cause.code() == 404 => {
                SourceError::StreamMissing { stream: sink.stream.clone(), address: address.clone() }
            }
            _ => failed(&error),
        })?;
        let info = stream.cached_info();
        if info.config.retention != RetentionPolicy::Limits {
            return Err(SourceError::Unusable(format!(
                "the stream {} on {address} removes events that one consumer has read, so that others would miss them: give it the retention `limits`",
                sink.stream
            )));
        }
        let described: Result<Described, _> = jetstream.request(format!("STREAM.INFO.{}", sink.stream), &()).await;
        let described = described.map_err(|error| failed(&error))?;
        let (first, end) = (info.state.first_sequence, info.state.last_sequence + 1);
        let known = recorded.filter(|known| known.stream == sink.stream && known.stream_created == described.created);
        let start = match (recorded, known) {
            // the stream may have been restored from a backup
            (_, Some(known)) => Start::At(known.next.clamp(1, end)),
            (Some(_), None) => Start::At(1),
            (None, None) => match self.subscription.since {
                Some(since) => Start::Since(by_server(since, described.ts, Timestamp::now())),
                None => Start::At(1),
            },
        };
        let expired = known.map_or(0, |known| first.saturating_sub(known.next));
        let config = self.config(start)?;
        let consumer: PullConsumer = stream.create_consumer(config).await.map_err(|error| failed(&error))?;
        let info = consumer.cached_info();
        let next = match start {
            Start::At(next) => next.max(first),
            Start::Since(_) => info.delivered.stream_sequence + 1,
        };
        let (behind, name) = (info.num_pending, info.name.clone());
        let messages = consumer.stream().max_messages_per_batch(2 * BATCH).messages().await;
        let messages = messages.map_err(|error| failed(&error))?;
        let settled = known.map(|known| known.settled.clone()).unwrap_or_default();
        let position = Position { stream: sink.stream.clone(), stream_created: described.created, next, settled };
        let session = NatsSession { connection, messages, stream, consumer: name, delivered: 0 };
        Ok(Opened { session, position, expired, behind })
    }

    /// Its name and metadata say at the broker whose it is.
    fn config(&self, start: Start) -> Result<pull::Config, SourceError> {
        let (Inbox { namespace, service, .. }, Subscription { name, types, .. }) = (self.contract, self.subscription);
        // a subject without the type in it gives the same filter for all types
        let filters: BTreeSet<_> = match types.as_slice() {
            [] => [self.template.filter(None)].into(),
            types => types.iter().map(|kind| self.template.filter(Some(kind))).collect(),
        };
        let who = short_hash(format!("{namespace}\0{service}\0{name}").as_bytes(), 16);
        let metadata = [("namespace", namespace), ("microservice", service), ("subscription", name)];
        Ok(pull::Config {
            name: Some(format!("weft-inbox_{service}_{who}_{:08x}", rand::random::<u32>())),
            description: Some(format!("the inbox of Microservice {service} in {namespace}, subscription {name}")),
            metadata: metadata.map(|(key, value)| (format!("weft.dev/{key}"), value.clone())).into(),
            deliver_policy: match start {
                Start::At(sequence) => DeliverPolicy::ByStartSequence { start_sequence: sequence.max(1) },
                Start::Since(since) => DeliverPolicy::ByStartTime {
                    start_time: from_nanos(since.as_nanosecond())
                        .map_err(|error| SourceError::Unusable(error.to_string()))?,
                },
            },
            ack_policy: AckPolicy::None,
            inactive_threshold: INACTIVE,
            filter_subjects: filters.into_iter().collect(),
            ..pull::Config::default()
        })
    }

    /// Whether the subjects of the events are those of no other service: then whatever comes is meant for the subscription.
    pub(in crate::inbox) fn is_own_subject(&self) -> bool {
        let has = |part| self.subscription.stream.subject.contains(part);
        has("{namespace}") && has("{service}") && (self.subscription.types.is_empty() || has("{type}"))
    }
}

#[derive(Clone, Copy)]
enum Start {
    At(u64),
    Since(Timestamp),
}

impl NatsSession {
    /// Some messages, at least one. Dropping the future loses nothing.
    pub(in crate::inbox) async fn next(&mut self) -> Result<Vec<Message>, SourceError> {
        let first = tokio::select! {
            first = self.messages.next() => first,
            outage = self.connection.lost() => return Err(SourceError::Unreachable(outage)),
        };
        let mut read = Vec::new();
        let mut next = Some(first);
        while let Some(message) = next {
            let address = self.connection.address();
            let failed = |error: &(dyn Error + 'static)| {
                SourceError::Unreachable(nats::jetstream_outage(address, Timestamp::now(), error))
            };
            let message = match message {
                Some(Ok(message)) => message,
                Some(Err(error)) => return Err(failed(&error)),
                None => return Err(SourceError::Unreachable(self.connection.outage())),
            };
            let info = message.info().map_err(|error| failed(error.as_ref()))?;
            if info.consumer_sequence != self.delivered + 1 {
                let (expected, found) = (self.delivered + 1, info.consumer_sequence);
                return Err(SourceError::Unusable(format!("message {expected} was awaited, and {found} came")));
            }
            self.delivered = info.consumer_sequence;
            let stored_at = Timestamp::from_nanosecond(info.published.unix_timestamp_nanos()).unwrap_or_default();
            let (sequence, behind) = (info.stream_sequence, info.pending);
            let headers = message.headers.iter().flat_map(async_nats::HeaderMap::iter);
            let headers = headers.filter_map(|(name, values)| Some((name.to_string(), values.first()?.to_string())));
            let headers = headers.collect();
            read.push(Message { sequence, stored_at, headers, body: message.payload.clone(), behind });
            next = if read.len() < BATCH { self.messages.next().now_or_never() } else { None };
        }
        Ok(read)
    }

    /// Messages that wait at the broker; `None` when it does not say.
    pub(in crate::inbox) async fn behind(&self) -> Option<u64> {
        self.stream.consumer_info(&self.consumer).await.ok().map(|info| info.num_pending)
    }

    /// A sequence up to which every event of the subscription was returned by [`NatsSession::next`]; `None` when some wait, or the
    /// server does not say. Others publish into the stream too: without it the position of a subscription with few events would
    /// fall behind what the stream keeps.
    pub(in crate::inbox) async fn read_up_to(&self) -> Option<u64> {
        let last = self.stream.get_info().await.ok()?.state.last_sequence;
        // asked after the stream: what came meanwhile waits, or is counted as delivered
        let consumer = self.stream.consumer_info(&self.consumer).await.ok()?;
        (consumer.num_pending == 0 && consumer.delivered.consumer_sequence == self.delivered).then_some(last)
    }

    /// Deletes the consumer; the server does it too, later.
    pub(in crate::inbox) async fn close(self) {
        if let Err(error) = self.stream.delete_consumer(&self.consumer).await {
            tracing::debug!(%error, consumer = self.consumer, "the consumer is left to the server");
        }
    }
}

/// A time of this cluster by the clock of the server.
fn by_server(since: Timestamp, server: Option<Timestamp>, own: Timestamp) -> Timestamp {
    let ahead = server.map_or(SignedDuration::ZERO, |server| server.duration_since(own));
    if ahead.abs() < SAME_CLOCK { since } else { since.saturating_add(ahead).unwrap_or(since) }
}
