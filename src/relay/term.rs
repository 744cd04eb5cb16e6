//! One term of leadership: from acquiring the lock to losing it.

use std::{sync::Arc, time::Duration};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::{
    encode::Encoder,
    held::HeldKeys,
    problem::RelayProblem,
    publisher::{Publisher, Queues},
    reporter::Reporter,
    sink::{self, AddressError, SinkError, http::Http, kafka::Kafka, nats::Nats, rabbitmq::RabbitMq, redis::Redis},
    source::{
        SourceError,
        postgres::{
            Postgres, ledger,
            recorder::{Ends, Options, Recorder},
        },
    },
};
use crate::{
    contract::relay::{Mode, Relay, Sink},
    domain::{
        destination::{Style, Template, TemplateError},
        names,
    },
    postgres::{outbox::Outbox, session::Session},
};

/// Capacity of the queue between source and publisher, in batches.
const BATCH_QUEUE: usize = 2;
/// How long a term that is asked to end may take to publish, record and confirm what is on the way.
const END: Duration = Duration::from_secs(8);

#[derive(Debug, thiserror::Error)]
pub(crate) enum TermError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Sink(#[from] SinkError),
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("the connection that holds the leader's lock is lost")]
    LockLost,
}

/// Publishes as the leader, until an error or until `stop`. Then what is sent is waited for, recorded and confirmed, so
/// that the next leader begins where this one ended.
pub(crate) async fn lead(
    contract: &Relay,
    paused: watch::Receiver<bool>,
    reporter: &Arc<Reporter>,
    stop: CancellationToken,
) -> Result<(), TermError> {
    let template = |template: &str, style| Template::parse(template, &contract.namespace, &contract.service, style);
    match &contract.sink {
        Sink::Nats(nats) => {
            let subjects = template(&nats.subject, Style::Subject)?;
            let sink = Nats::new(nats, subjects.clone(), application(&contract.name));
            Box::pin(lead_with(sink, subjects, contract, paused, reporter, stop)).await
        }
        Sink::Kafka(kafka) => {
            let topics = template(&kafka.topic, Style::Topic)?;
            let sink = Kafka::new(kafka, &topics, application(&contract.name));
            Box::pin(lead_with(sink, topics, contract, paused, reporter, stop)).await
        }
        Sink::Http(http) => {
            let sink = Http::new(http, application(&contract.name))?;
            Box::pin(lead_with(sink, template(&http.url, Style::Plain)?, contract, paused, reporter, stop)).await
        }
        Sink::RabbitMq(rabbitmq) => {
            let sink = RabbitMq::new(rabbitmq, application(&contract.name))?;
            let keys = template(&rabbitmq.routing_key, Style::Plain)?;
            Box::pin(lead_with(sink, keys, contract, paused, reporter, stop)).await
        }
        Sink::Redis(redis) => {
            let sink = Redis::new(redis, &application(&contract.name))?;
            Box::pin(lead_with(sink, template(&redis.stream, Style::Plain)?, contract, paused, reporter, stop)).await
        }
    }
}

async fn lead_with(
    sink: impl sink::Sink,
    template: Template,
    contract: &Relay,
    paused: watch::Receiver<bool>,
    reporter: &Arc<Reporter>,
    stop: CancellationToken,
) -> Result<(), TermError> {
    let Relay { name, namespace, service, mode, source, format, keep_published_ms, dead_letter, .. } = contract;
    let encoder = Encoder::new(template, *format, names::event_source(namespace, service));
    let session = Session::connect(source, &application(name)).await.map_err(SourceError::from)?;
    let outbox = Outbox::of(source).await.map_err(SourceError::from)?;
    let ledger = ledger::open(&session.client, name).await?;
    let held = ledger::held_keys(&session.client).await?;
    reporter.ledger(ledger.published);
    reporter.leading(true);
    tracing::info!(relay = name, ?mode, published = ledger.published, "leading");

    let (batches, received) = mpsc::channel(BATCH_QUEUE);
    let (done, finished) = mpsc::channel(1);
    let (again, again_received) = mpsc::channel(1);
    let (progress, recorded) = watch::channel(None);
    let ends = Ends { done: finished, again, recorded: progress };
    let options = Options {
        slot: (*mode == Mode::LogTailing).then_some(&outbox),
        any_held: !held.is_empty(),
        keep: Duration::from_millis(*keep_published_ms),
        max_attempts: dead_letter.map(|letter| letter.max_attempts),
    };
    let recorder = Recorder::new(&session.client, &ledger, options, ends, reporter).await?;
    let queues = Queues { batches: received, again: again_received, done, paused, stop: stop.clone() };
    let publisher = Publisher::new(&sink, encoder, queues, HeldKeys::new(held), reporter);
    let source_of_events = Postgres {
        contract,
        application: application(name),
        outbox: &outbox,
        client: &session.client,
        ledger,
        reporter,
        batches,
        recorded,
    };
    let parts = async {
        let ended =
            tokio::try_join!(Box::pin(source_of_events.run()), Box::pin(publisher.run()), Box::pin(recorder.run()),);
        ended.map(|((), _batches, ())| ())
    };
    let answers = |silence| match silence {
        Some(silence) => reporter.report(RelayProblem::silent_database(source, silence)),
        None => reporter.database_answers(),
    };
    tokio::select! {
        biased;
        () = session.lost.cancelled() => Err(TermError::LockLost),
        ended = parts => Ok(ended?),
        () = session.watch(source, answers) => Err(TermError::LockLost),
        () = async { stop.cancelled().await; tokio::time::sleep(END).await } => Ok(()),
    }
}

/// The name that the relay's connections have in `pg_stat_activity` and in the broker's list of connections.
pub(crate) fn application(relay: &str) -> String {
    format!("weft relay {relay}")
}
