use std::sync::atomic::{AtomicU32, Ordering};

use prometheus_client::registry::Registry;

use super::*;
use crate::{
    contract::relay::Format,
    domain::destination::{Style, Template},
    outage::{Failure, Outage},
};

/// A broker that accepts every connection and closes it at once.
#[derive(Default)]
struct ClosingBroker(AtomicU32);

struct ClosedSession;

fn lost() -> SinkError {
    let failure = Failure::Disconnected("the connection was closed".to_owned());
    SinkError::Unreachable(Outage {
        server: "NATS",
        address: "n:4222".to_owned(),
        since: Timestamp::UNIX_EPOCH,
        failure,
    })
}

impl Sink for ClosingBroker {
    const SERVER: &'static str = "NATS";
    type Session = ClosedSession;

    async fn connect(&self) -> Result<ClosedSession, SinkError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(ClosedSession)
    }
}

impl Session for ClosedSession {
    async fn publish(&mut self, _: Ticket, _: &Message) -> Result<Option<Answer>, SinkError> {
        Ok(None)
    }

    async fn replies(&mut self, _: &mut Vec<Reply>) -> Result<(), SinkError> {
        Err(lost())
    }

    fn silent(&self, _: Timestamp) -> SinkError {
        lost()
    }

    fn address(&self) -> &'static str {
        "n:4222"
    }
}

#[tokio::test(start_paused = true)]
async fn connections_that_end_at_once_are_made_ever_less_often() {
    let (broker, reporter) = (ClosingBroker::default(), Reporter::new("r", &mut Registry::default()));
    let (ends, publisher) = publisher(&broker, &reporter);
    let minute = tokio::time::timeout(Duration::from_mins(1), publisher.run()).await;
    assert!(minute.is_err());
    drop(ends);
    let connections = broker.0.load(Ordering::Relaxed);
    assert!((10..25).contains(&connections), "{connections} connections in a minute");
}

/// A broker that accepts nothing for the time being, and says so.
#[derive(Default)]
struct BlockedBroker(AtomicU32);

struct BlockedSession;

impl Sink for BlockedBroker {
    const SERVER: &'static str = "RabbitMQ";
    type Session = BlockedSession;

    async fn connect(&self) -> Result<BlockedSession, SinkError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(BlockedSession)
    }
}

impl Session for BlockedSession {
    async fn publish(&mut self, _: Ticket, _: &Message) -> Result<Option<Answer>, SinkError> {
        Ok(None)
    }

    async fn replies(&mut self, _: &mut Vec<Reply>) -> Result<(), SinkError> {
        std::future::pending().await
    }

    fn blocked(&self) -> Option<&str> {
        Some("low on memory")
    }

    fn silent(&self, _: Timestamp) -> SinkError {
        lost()
    }

    fn address(&self) -> &'static str {
        "n:5672"
    }
}

#[tokio::test(start_paused = true)]
async fn a_broker_that_blocks_is_waited_for_and_reported() {
    let (broker, reporter) = (BlockedBroker::default(), Reporter::new("r", &mut Registry::default()));
    let (ends, publisher) = publisher(&broker, &reporter);
    ends.batches.send(vec![row(1, None)]).await.unwrap();
    let minute = tokio::time::timeout(Duration::from_mins(1), publisher.run()).await;
    assert!(minute.is_err());
    drop(ends);
    assert_eq!(broker.0.load(Ordering::Relaxed), 1, "the answer is not overdue");
    let problems = format!("{:?}", reporter.status().borrow().problems);
    assert!(problems.contains("low on memory"), "{problems}");
}

/// The other ends of the queues.
struct Ends {
    batches: mpsc::Sender<Batch>,
    _again: mpsc::Sender<Vec<Again>>,
    done: mpsc::Receiver<Done>,
    _pause: watch::Sender<bool>,
    stop: CancellationToken,
}

fn publisher<'a, S: Sink>(sink: &'a S, reporter: &'a Arc<Reporter>) -> (Ends, Publisher<'a, S>) {
    let (batches, received) = mpsc::channel(1);
    let (again, again_received) = mpsc::channel(1);
    let (done, finished) = mpsc::channel(1);
    let (pause, paused) = watch::channel(false);
    let stop = CancellationToken::new();
    let queues = Queues { batches: received, again: again_received, done, paused, stop: stop.clone() };
    let template = Template::parse("events.{type}", "shop", "orders", Style::Subject).unwrap();
    let encoder = Encoder::new(template, Format::CloudEvents, "/shop/orders".to_owned());
    let ends = Ends { batches, _again: again, done: finished, _pause: pause, stop };
    (ends, Publisher::new(sink, encoder, queues, HeldKeys::default(), reporter))
}

/// A broker that stores everything.
struct Storing;

#[derive(Default)]
struct StoringSession(Vec<Ticket>);

impl Sink for Storing {
    const SERVER: &'static str = "NATS";
    type Session = StoringSession;

    async fn connect(&self) -> Result<StoringSession, SinkError> {
        Ok(StoringSession::default())
    }
}

impl Session for StoringSession {
    async fn publish(&mut self, ticket: Ticket, _: &Message) -> Result<Option<Answer>, SinkError> {
        self.0.push(ticket);
        Ok(None)
    }

    async fn replies(&mut self, replies: &mut Vec<Reply>) -> Result<(), SinkError> {
        if self.0.is_empty() {
            std::future::pending::<()>().await;
        }
        replies.extend(self.0.drain(..).map(|ticket| Reply { ticket, answer: Answer::Stored }));
        Ok(())
    }

    fn silent(&self, _: Timestamp) -> SinkError {
        lost()
    }

    fn address(&self) -> &'static str {
        "n:4222"
    }
}

fn row(seq: i64, transaction: Option<u64>) -> Item {
    let event = crate::domain::event::Event {
        id: "1".into(),
        aggregate_type: "order".into(),
        aggregate_id: "1".into(),
        kind: "x".into(),
        content_type: "application/json".into(),
        payload: bytes::Bytes::from_static(b"{}"),
        headers: bytes::Bytes::from_static(b"{}"),
        context: bytes::Bytes::new(),
        created_at: None,
        position: crate::domain::event::Position { lsn: 1, index: seq.unsigned_abs() },
    };
    Item::Event(Row { event, place: crate::relay::source::Place { seq, transaction }, committed_at: None })
}

/// A term that is asked to end in the middle of a transaction: published rows, and whether the mark is recorded.
async fn asked_to_end(transaction: Option<u64>) -> (usize, bool) {
    let reporter = Reporter::new("r", &mut Registry::default());
    let (mut ends, publisher) = publisher(&Storing, &reporter);
    let rest = async {
        ends.batches.send(vec![row(1, transaction)]).await.unwrap();
        let mut published = ends.done.recv().await.unwrap().published.len();
        ends.stop.cancel();
        sleep(Duration::from_millis(50)).await;
        let point = crate::relay::source::Point::Committed(crate::postgres::replication::Lsn(7));
        let _ = ends.batches.send(vec![row(2, transaction), Item::Mark(Mark { serial: 1, point })]).await;
        let mut mark = None;
        while let Some(done) = ends.done.recv().await {
            published += done.published.len();
            mark = done.mark.or(mark);
        }
        (published, mark.is_some())
    };
    let (ended, recorded) = tokio::join!(publisher.run(), rest);
    assert!(ended.is_ok());
    recorded
}

#[tokio::test(start_paused = true)]
async fn a_term_that_is_asked_to_end_ends_with_a_transaction() {
    assert_eq!(asked_to_end(Some(5)).await, (2, true));
    // of rows from the table those that are recorded do not come again
    assert_eq!(asked_to_end(None).await, (1, false));
}
