//! The publisher: moves events from the source's batches through the window to the broker, and hands what is
//! acknowledged to the recorder.

use std::{
    collections::{HashMap, VecDeque, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};
use uuid::Uuid;

use super::{
    checkpoint::{Done, INVISIBLE_GRACE},
    problem::RelayProblem,
    reporter::{Reporter, Waiting},
    sink::{Answer, Reply, Session, Sink, SinkError},
    source::{Batch, Item, Mark, SourceError},
    window::{Entry, Limits, Ticket, Window},
};
use crate::{contract::problem::ProblemReason, domain::event::Event};

pub(crate) const LIMITS: Limits = Limits {
    events: 8192,
    bytes: 8 * 1024 * 1024,
    in_flight: 4096,
    parked_events: 16_384,
    parked_bytes: 16 * 1024 * 1024,
    backoff: (Duration::from_millis(100), Duration::from_secs(5)),
    refused: Duration::from_secs(15),
};
/// An event without an answer after this long is sent again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often back-off times, deadlines and the status are checked.
const TICK: Duration = Duration::from_millis(200);
/// How often the outbox is queried for the rows of refused events, because a person may have deleted one. A row that is
/// absent twice in a row is deleted; a row that is absent once may belong to a transaction that is not visible to other
/// sessions yet (see [`super::checkpoint`]).
const PRESENCE_CHECK: Duration = INVISIBLE_GRACE;
/// How often the status is updated while there is no connection.
const REPORT_WAITING: Duration = Duration::from_secs(1);
/// Shortest and longest wait before the next connection.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// The rows of the outbox table.
pub(crate) trait Rows {
    fn present(&self, ids: &[Uuid]) -> impl Future<Output = Result<Vec<Uuid>, SourceError>> + Send;
}

#[derive(Debug)]
pub(crate) struct Pending {
    event: Event,
    sent: Instant,
}

impl Entry for Pending {
    fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.event.aggregate_type.as_str().hash(&mut hasher);
        self.event.aggregate_id.as_str().hash(&mut hasher);
        hasher.finish()
    }

    fn size(&self) -> usize {
        self.event.size()
    }
}

#[derive(Debug)]
pub(crate) struct Publisher<'a, S, R> {
    sink: &'a S,
    rows: R,
    batches: mpsc::Receiver<Batch>,
    done: mpsc::Sender<Done>,
    paused: watch::Receiver<bool>,
    reporter: &'a Arc<Reporter>,
    window: Window<Pending, Mark>,
    started: Instant,
    /// Attempts in the order in which they were sent, with the time.
    sent: VecDeque<(Instant, Ticket)>,
    last_answer: Instant,
    /// Wait before the next connection. It is reset only when the connection proves useful (an acknowledgement, or a
    /// long life): a broker that accepts connections and closes each of them as soon as an event is sent would
    /// otherwise be connected to ten times a second, forever.
    reconnect: Duration,
    failing: bool,
    /// Of the broker, for messages.
    address: String,
    /// Refused events by their ids.
    refused: HashMap<Uuid, Refused>,
    check_presence_at: Instant,
}

#[derive(Debug)]
struct Refused {
    ticket: Ticket,
    why: String,
    /// Its row was not in the table at the last query.
    absent: bool,
}

impl<'a, S: Sink, R: Rows> Publisher<'a, S, R> {
    pub(crate) fn new(
        sink: &'a S,
        rows: R,
        batches: mpsc::Receiver<Batch>,
        done: mpsc::Sender<Done>,
        paused: watch::Receiver<bool>,
        reporter: &'a Arc<Reporter>,
    ) -> Self {
        let now = Instant::now();
        Self {
            sink,
            rows,
            batches,
            done,
            paused,
            reporter,
            window: Window::new(LIMITS),
            started: now,
            sent: VecDeque::new(),
            last_answer: now,
            reconnect: RECONNECT.0,
            failing: false,
            address: String::new(),
            refused: HashMap::new(),
            check_presence_at: now,
        }
    }

    /// Publishes until the source ends, and reconnects to the broker whenever the connection is lost.
    pub(crate) async fn run(mut self) -> Result<(), SourceError> {
        loop {
            let sink = self.sink;
            let error = match Box::pin(self.admit_while(sink.connect())).await? {
                Err(error) => error,
                Ok(mut session) => {
                    session.address().clone_into(&mut self.address);
                    self.reporter.broker(true);
                    let connected = Instant::now();
                    match self.publish_until_lost(&mut session).await {
                        Ok(ended) => return ended,
                        Err(error) => {
                            if connected.elapsed() > ANSWER_TIMEOUT {
                                self.reconnect = RECONNECT.0;
                            }
                            error
                        }
                    }
                }
            };
            self.window.connection_lost();
            self.window.wake_all();
            self.sent.clear();
            self.reporter.broker(false);
            self.reporter.report(error.problem());
            self.report_waiting();
            self.admit_while(sleep(self.reconnect)).await?;
            self.reconnect = (self.reconnect * 2).min(RECONNECT.1);
        }
    }

    /// Awaits `future`, and meanwhile admits batches while there is room, so that the status has what waits.
    async fn admit_while<T>(&mut self, future: impl Future<Output = T>) -> Result<T, SourceError> {
        let mut future = std::pin::pin!(future);
        loop {
            tokio::select! {
                biased;
                done = &mut future => return Ok(done),
                batch = self.batches.recv(), if self.window.has_room() => {
                    self.admit(batch.ok_or(SourceError::Ended)?);
                    // a mark may have no unacknowledged event in front of it
                    self.handle_replies(&mut Vec::new()).await?;
                }
                () = sleep(REPORT_WAITING) => self.report_waiting(),
            }
        }
    }

    /// Publishes over one connection. The outer error is the connection's, the inner one the end of the source.
    async fn publish_until_lost(&mut self, session: &mut S::Session) -> Result<Result<(), SourceError>, SinkError> {
        let mut replies = Vec::new();
        let mut tick = Instant::now();
        self.last_answer = tick;
        loop {
            self.send(session).await?;
            tokio::select! {
                answered = session.replies(&mut replies) => {
                    if let Err(ended) = self.handle_replies(&mut replies).await {
                        return Ok(Err(ended));
                    }
                    answered?;
                }
                batch = self.batches.recv(), if self.window.has_room() => match batch {
                    Some(batch) => {
                        self.admit(batch);
                        // a mark may have no unacknowledged event in front of it
                        if let Err(ended) = self.handle_replies(&mut replies).await {
                            return Ok(Err(ended));
                        }
                    }
                    None => return Ok(Err(SourceError::Ended)),
                },
                changed = self.paused.changed() => {
                    if changed.is_err() {
                        return Ok(Err(SourceError::Ended));
                    }
                }
                () = sleep_until(tick) => {
                    let next = self.check_timeouts(session).await?;
                    tick = next;
                    // a skipped event may have been the last one in front of a mark
                    if let Err(ended) = self.handle_replies(&mut replies).await {
                        return Ok(Err(ended));
                    }
                }
            }
        }
    }

    fn admit(&mut self, batch: Batch) {
        let sent = self.started;
        for item in batch {
            match item {
                Item::Event(event) => self.window.admit(Pending { event, sent }),
                Item::Mark(mark) => self.window.mark(mark),
            }
        }
    }

    async fn send(&mut self, session: &mut S::Session) -> Result<(), SinkError> {
        if *self.paused.borrow() {
            return Ok(());
        }
        let now = Instant::now();
        while let Some((ticket, pending)) = self.window.take() {
            pending.sent = now;
            let answer = session.publish(ticket, &pending.event).await?;
            self.sent.push_back((now, ticket));
            if let Some(Answer::Refused(why)) = answer {
                let id = pending.event.id;
                self.refuse(id, ticket, why);
            }
        }
        Ok(())
    }

    /// Applies the broker's answers to the window, and hands acknowledged rows and passed marks to the recorder.
    async fn handle_replies(&mut self, replies: &mut Vec<Reply>) -> Result<(), SourceError> {
        let now = Instant::now();
        let mut done = Done::default();
        let mut failed = None;
        for Reply { ticket, answer } in replies.drain(..) {
            self.last_answer = now;
            match answer {
                Answer::Stored => {
                    self.reconnect = RECONNECT.0;
                    if let Some(Pending { event, sent }) = self.window.acknowledged(ticket) {
                        self.reporter.acknowledged_after(now - sent);
                        self.refused.remove(&event.id);
                        done.rows.push(event.id);
                    }
                }
                Answer::Failed(why) => {
                    self.window.failed(ticket, now - self.started);
                    self.reporter.retried();
                    failed = Some(why);
                }
                Answer::Refused(why) => {
                    if let Some(id) = self.window.get(ticket).map(|pending| pending.event.id) {
                        self.refuse(id, ticket, why);
                    }
                }
            }
        }
        while self.sent.front().is_some_and(|&(_, ticket)| !self.window.is_in_flight(ticket)) {
            self.sent.pop_front();
        }
        self.report_failing(failed, !done.rows.is_empty());
        if !done.rows.is_empty() {
            self.reporter.acknowledged(done.rows.len());
        }
        done.mark = self.window.passed();
        if done.rows.is_empty() && done.mark.is_none() {
            return Ok(());
        }
        self.done.send(done).await.map_err(|_closed| SourceError::Ended)
    }

    fn report_failing(&mut self, failed: Option<String>, progress: bool) {
        if let Some(why) = failed {
            self.failing = true;
            let address = self.address.clone();
            self.reporter.report(RelayProblem::PublishFailing { address, cause: why });
        } else if progress && std::mem::take(&mut self.failing) {
            self.reporter.resolve(ProblemReason::PublishFailing);
        }
    }

    fn refuse(&mut self, id: Uuid, ticket: Ticket, why: String) {
        self.window.refused(ticket, self.started.elapsed());
        let absent = self.refused.get(&id).is_some_and(|refused| refused.absent);
        self.refused.insert(id, Refused { ticket, why, absent });
        self.report_refused();
    }

    fn report_refused(&self) {
        let first = self.refused.iter().min_by_key(|(_, refused)| refused.ticket);
        let Some((id, Refused { why, .. })) = first else {
            self.reporter.resolve(ProblemReason::EventRefused);
            return;
        };
        self.reporter.report(RelayProblem::EventRefused {
            event: *id,
            others: self.refused.len() - 1,
            waiting: self.window.parked().saturating_sub(self.refused.len()),
            cause: why.clone(),
        });
    }

    /// Checks everything that depends on time (answers that are overdue, back-off, deleted rows) and returns when to
    /// check again.
    async fn check_timeouts(&mut self, session: &S::Session) -> Result<Instant, SinkError> {
        let now = Instant::now();
        while let Some(&(sent, ticket)) = self.sent.front() {
            if self.window.is_in_flight(ticket) {
                if now - sent < ANSWER_TIMEOUT {
                    break;
                }
                if now - self.last_answer >= ANSWER_TIMEOUT {
                    let silence = now - self.last_answer;
                    return Err(session.silent(Timestamp::now() - silence));
                }
                self.window.failed(ticket, now - self.started);
                self.reporter.retried();
            }
            self.sent.pop_front();
        }
        if !self.refused.is_empty() && now >= self.check_presence_at {
            self.check_presence_at = now + PRESENCE_CHECK;
            self.skip_deleted().await;
        }
        let due = self.window.wake(now - self.started).map(|due| self.started + due);
        self.report_waiting();
        Ok(due.map_or(now + TICK, |due| due.min(now + TICK)))
    }

    /// Skips refused events whose rows a person has deleted. The deletion may be older than this term, so the row need
    /// not have been seen present before.
    async fn skip_deleted(&mut self) {
        let ids: Vec<Uuid> = self.refused.keys().copied().collect();
        let Ok(present) = self.rows.present(&ids).await else { return };
        for id in ids {
            let Some(refused) = self.refused.get_mut(&id) else { continue };
            let absent = !present.contains(&id);
            if std::mem::replace(&mut refused.absent, absent) && absent {
                tracing::warn!(event = %id, "the refused event is skipped, because its row was deleted");
                let ticket = refused.ticket;
                self.refused.remove(&id);
                self.window.acknowledged(ticket);
            }
        }
        self.report_refused();
    }

    fn report_waiting(&self) {
        self.reporter.waiting(Waiting {
            events: self.window.len(),
            in_flight: self.window.in_flight(),
            parked: self.window.parked(),
            oldest: self.window.oldest().map(|pending| pending.event.created_at),
        });
        if self.refused.is_empty() {
            self.reporter.resolve(ProblemReason::EventRefused);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use prometheus_client::registry::Registry;

    use super::*;
    use crate::outage::{Failure, Outage};

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
        type Session = ClosedSession;

        async fn connect(&self) -> Result<ClosedSession, SinkError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(ClosedSession)
        }
    }

    impl Session for ClosedSession {
        async fn publish(&mut self, _: Ticket, _: &Event) -> Result<Option<Answer>, SinkError> {
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

    struct Nothing;

    impl Rows for Nothing {
        async fn present(&self, _: &[Uuid]) -> Result<Vec<Uuid>, SourceError> {
            Ok(Vec::new())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn connections_that_end_at_once_are_made_ever_less_often() {
        let (broker, reporter) = (ClosingBroker::default(), Reporter::new("r", &mut Registry::default()));
        let (_batches, received) = mpsc::channel(1);
        let (done, _finished) = mpsc::channel(1);
        let (_pause, paused) = watch::channel(false);
        let publisher = Publisher::new(&broker, Nothing, received, done, paused, &reporter);
        let minute = tokio::time::timeout(Duration::from_mins(1), publisher.run()).await;
        assert!(minute.is_err());
        let connections = broker.0.load(Ordering::Relaxed);
        assert!((10..25).contains(&connections), "{connections} connections in a minute");
    }
}
