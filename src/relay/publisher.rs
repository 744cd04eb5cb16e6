//! The publisher: moves events from the source's batches through the window to the broker, and hands over what is
//! published or held to be recorded. It waits for nothing but its sockets.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use jiff::Timestamp;
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    encode::{Encoder, Message},
    held::HeldKeys,
    problem::RelayProblem,
    reporter::{Reporter, Waiting},
    sink::{Answer, Reply, Session, Sink, SinkError},
    source::{Again, Batch, Done, Held, Item, Mark, Row, SourceError},
    window::{Entry, Limits, Ticket, Window},
};
use crate::contract::problem::ProblemReason;

pub(crate) const LIMITS: Limits = Limits {
    events: 8192,
    bytes: 8 * 1024 * 1024,
    in_flight: 4096,
    shortest_run: 16,
    backoff: (Duration::from_millis(100), Duration::from_secs(5)),
};
/// Most events of a key that are sent together.
const LONGEST_RUN: usize = 256;
/// An event without an answer after this long is sent again.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// An event that has failed this often, while the broker stored others within `HOLD_WHILE`, is held like a refused one.
const HOLD_AFTER: u32 = 6;
const HOLD_WHILE: Duration = Duration::from_secs(5);
/// When the events of so many keys were refused, one after the other and none stored, it is not the events.
const EVERYBODY: usize = 3;
/// How often back-off times, deadlines and the status are checked.
const TICK: Duration = Duration::from_millis(200);
/// How often the status is updated while there is no connection.
const REPORT_WAITING: Duration = Duration::from_secs(1);
/// Shortest and longest wait before the next connection.
const RECONNECT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Most events that are done and wait to be recorded; beyond it nothing more is admitted.
const UNRECORDED: usize = 500_000;
/// How long an end that was asked for goes on publishing what was read from the log…
const FINISH: Duration = Duration::from_secs(2);
/// …and waits for answers.
const DRAIN: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub(crate) struct Pending {
    row: Row,
    /// Recorded as held, and tried again.
    held: bool,
    sent: Instant,
}

impl Entry for Pending {
    fn key(&self) -> u64 {
        self.row.event.key()
    }

    fn size(&self) -> usize {
        self.row.event.size()
    }
}

/// The publisher's ends of the queues to the other parts.
#[derive(Debug)]
pub(crate) struct Queues {
    pub(crate) batches: mpsc::Receiver<Batch>,
    pub(crate) again: mpsc::Receiver<Vec<Again>>,
    pub(crate) done: mpsc::Sender<Done>,
    pub(crate) paused: watch::Receiver<bool>,
    /// Asks to end: what is sent is waited for, nothing more is sent.
    pub(crate) stop: CancellationToken,
}

#[derive(Debug)]
pub(crate) struct Publisher<'a, S> {
    sink: &'a S,
    encoder: Encoder,
    /// Used again for each event, or for the events of a run.
    messages: Vec<Message>,
    /// Used again for each answer.
    acknowledged: Vec<Pending>,
    queues: Queues,
    reporter: &'a Arc<Reporter>,
    window: Window<Pending, Mark>,
    held: HeldKeys,
    /// What is to be handed over as soon as there is room in the queue.
    unrecorded: Done,
    started: Instant,
    /// Attempts in the order in which they were sent, with the time.
    sent: VecDeque<(Instant, Ticket)>,
    last_answer: Instant,
    last_stored: Option<Instant>,
    /// Wait before the next connection. It is reset only when the connection proves useful (an acknowledgement, or a
    /// long life): a broker that accepts connections and closes each of them as soon as an event is sent would
    /// otherwise be connected to ten times a second, forever.
    reconnect: Duration,
    failing: bool,
    /// Keys whose events were refused since the broker stored an event, up to [`EVERYBODY`].
    refused: HashSet<u64>,
    /// What was admitted last is an event of the log, and not a mark: all events since the last mark would come again.
    in_transaction: bool,
    /// Of the broker, for messages.
    address: String,
}

/// Why publishing over a connection ended.
enum Ended {
    Stopped,
    Source(SourceError),
    Connection(SinkError),
}

impl From<SinkError> for Ended {
    fn from(error: SinkError) -> Self {
        Self::Connection(error)
    }
}

impl<'a, S: Sink> Publisher<'a, S> {
    pub(crate) fn new(
        sink: &'a S,
        encoder: Encoder,
        queues: Queues,
        held: HeldKeys,
        reporter: &'a Arc<Reporter>,
    ) -> Self {
        let now = Instant::now();
        Self {
            sink,
            encoder,
            messages: vec![Message::default()],
            acknowledged: Vec::new(),
            queues,
            reporter,
            window: Window::new(LIMITS),
            held,
            unrecorded: Done::default(),
            started: now,
            sent: VecDeque::new(),
            last_answer: now,
            last_stored: None,
            reconnect: RECONNECT.0,
            failing: false,
            refused: HashSet::new(),
            in_transaction: false,
            address: String::new(),
        }
    }

    /// Publishes until the source ends or it is to stop, and reconnects to the broker whenever the connection is lost.
    /// After a stop the queue of batches is given back: a source must not take its end for an error.
    pub(crate) async fn run(mut self) -> Result<mpsc::Receiver<Batch>, SourceError> {
        loop {
            let sink = self.sink;
            let ended = match Box::pin(self.admit_while(sink.connect())).await {
                Err(ended) => ended,
                Ok(Err(error)) => Ended::Connection(error),
                Ok(Ok(mut session)) => {
                    session.address().clone_into(&mut self.address);
                    self.reporter.broker(true);
                    let connected = Instant::now();
                    let ended = self.publish_until_lost(&mut session).await;
                    if connected.elapsed() > ANSWER_TIMEOUT {
                        self.reconnect = RECONNECT.0;
                    }
                    match ended {
                        Ended::Stopped => {
                            let _ = timeout(DRAIN, self.drain(&mut session)).await;
                            Ended::Stopped
                        }
                        ended => ended,
                    }
                }
            };
            let error = match ended {
                Ended::Stopped => return self.end().await,
                Ended::Source(error) => return Err(error),
                Ended::Connection(error) => error,
            };
            self.window.connection_lost();
            self.window.wake_all();
            self.sent.clear();
            self.reporter.broker(false);
            self.reporter.report(error.problem());
            self.report_waiting();
            match self.admit_while(sleep(self.reconnect)).await {
                Ok(()) => {}
                Err(Ended::Source(error)) => return Err(error),
                Err(Ended::Stopped | Ended::Connection(_)) => return self.end().await,
            }
            self.reconnect = (self.reconnect * 2).min(RECONNECT.1);
        }
    }

    /// Hands over the rest; the end of the queue is the end of what is to be recorded.
    async fn end(mut self) -> Result<mpsc::Receiver<Batch>, SourceError> {
        let rest = std::mem::take(&mut self.unrecorded);
        let Queues { batches, again: _, done, .. } = self.queues;
        done.send(rest).await.map_err(|_closed| SourceError::Ended)?;
        Ok(batches)
    }

    fn has_room(&self) -> bool {
        self.window.has_room() && self.unrecorded.published.len() + self.unrecorded.held.len() < UNRECORDED
    }

    /// Awaits `future`, and meanwhile admits batches while there is room, so that the status has what waits.
    async fn admit_while<T>(&mut self, future: impl Future<Output = T>) -> Result<T, Ended> {
        let mut future = std::pin::pin!(future);
        let mut report_at = Instant::now() + REPORT_WAITING;
        let recorder = self.queues.done.clone();
        loop {
            tokio::select! {
                biased;
                () = self.queues.stop.cancelled() => return Err(Ended::Stopped),
                done = &mut future => return Ok(done),
                permit = recorder.reserve(), if !self.unrecorded.is_empty() => {
                    permit.map_err(|_closed| Ended::Source(SourceError::Ended))?.send(std::mem::take(&mut self.unrecorded));
                }
                again = self.queues.again.recv() => self.admit_again(again)?,
                batch = self.queues.batches.recv(), if self.has_room() => self.admit(batch)?,
                () = sleep_until(report_at) => {
                    self.report_waiting();
                    report_at = Instant::now() + REPORT_WAITING;
                }
            }
        }
    }

    async fn publish_until_lost(&mut self, session: &mut S::Session) -> Ended {
        let recorder = self.queues.done.clone();
        let mut replies = Vec::new();
        let mut tick = Instant::now();
        self.last_answer = tick;
        loop {
            if let Err(error) = self.send(session).await {
                return error.into();
            }
            let ended = tokio::select! {
                answered = session.replies(&mut replies) => {
                    self.handle_replies(&mut replies);
                    answered.map_err(Ended::Connection)
                }
                permit = recorder.reserve(), if !self.unrecorded.is_empty() => match permit {
                    Ok(permit) => {
                        permit.send(std::mem::take(&mut self.unrecorded));
                        Ok(())
                    }
                    Err(_closed) => Err(Ended::Source(SourceError::Ended)),
                },
                batch = self.queues.batches.recv(), if self.has_room() => self.admit(batch),
                again = self.queues.again.recv() => self.admit_again(again),
                changed = self.queues.paused.changed() => {
                    changed.map_err(|_closed| Ended::Source(SourceError::Ended))
                }
                () = self.queues.stop.cancelled() => Err(Ended::Stopped),
                () = sleep_until(tick) => match self.check_timeouts(session) {
                    Ok(next) => {
                        tick = next;
                        Ok(())
                    }
                    Err(error) => Err(error.into()),
                },
            };
            if let Err(ended) = ended {
                return ended;
            }
        }
    }

    /// Publishes what was read from the log, up to the end of a transaction, and waits for the answers: only events before a
    /// recorded mark do not come again. Rows that were read from the table do not come again once they are recorded.
    async fn drain(&mut self, session: &mut S::Session) {
        let mut replies = Vec::new();
        let from_log =
            self.window.entries().any(|pending| pending.row.place.transaction.is_some()) || self.in_transaction;
        let until = Instant::now() + FINISH;
        loop {
            let finishing = from_log && !*self.queues.paused.borrow() && Instant::now() < until;
            if finishing && self.send(session).await.is_err() {
                return;
            }
            let more = finishing && self.in_transaction;
            if self.window.in_flight() == 0 && !more {
                return;
            }
            let ended = tokio::select! {
                answered = session.replies(&mut replies) => {
                    self.handle_replies(&mut replies);
                    answered.is_err()
                }
                batch = self.queues.batches.recv(), if more => self.admit(batch).is_err(),
                () = sleep_until(until), if finishing => false,
            };
            if ended {
                return;
            }
        }
    }

    fn admit(&mut self, batch: Option<Batch>) -> Result<(), Ended> {
        let sent = self.started;
        for item in batch.ok_or(Ended::Source(SourceError::Ended))? {
            match item {
                Item::Event(row) => {
                    self.in_transaction = row.place.transaction.is_some();
                    let key = row.event.key();
                    if self.held.has(key) {
                        self.hold(key, row, None);
                    } else {
                        self.window.admit(Pending { row, held: false, sent });
                    }
                }
                Item::Mark(mark) => {
                    self.in_transaction = false;
                    self.window.mark(mark);
                }
            }
        }
        // a mark may have no unacknowledged event in front of it
        self.pass();
        Ok(())
    }

    fn admit_again(&mut self, again: Option<Vec<Again>>) -> Result<(), Ended> {
        let sent = self.started;
        for again in again.ok_or(Ended::Source(SourceError::Ended))? {
            match again {
                Again::Event(row) => self.window.admit_recorded(Pending { row: *row, held: true, sent }),
                Again::Free { key, handed } => {
                    self.held.free(key, handed);
                    if self.held.is_empty() {
                        self.refused.clear();
                        self.report_failing(None, true);
                    }
                }
            }
        }
        Ok(())
    }

    /// Hands an event over to be held.
    fn hold(&mut self, key: u64, row: Row, cause: Option<String>) {
        let Row { event, place, .. } = row;
        self.held.hand_over(key, 1);
        self.unrecorded.held.push(Held { place, key, position: event.position, cause });
    }

    fn pass(&mut self) {
        if let Some(mark) = self.window.passed() {
            self.unrecorded.mark = Some(mark);
        }
    }

    async fn send(&mut self, session: &mut S::Session) -> Result<(), SinkError> {
        if *self.queues.paused.borrow() {
            return Ok(());
        }
        let (now, mut at_once) = (Instant::now(), Vec::new());
        while session.has_room()
            && let Some((ticket, first)) = self.window.take(session.longest_run().min(LONGEST_RUN))
        {
            first.sent = now;
            let mut events = 0;
            for pending in self.window.run(ticket) {
                if events == self.messages.len() {
                    self.messages.push(Message::default());
                }
                if let Some(message) = self.messages.get_mut(events) {
                    self.encoder.encode(&pending.row, message);
                }
                events += 1;
            }
            let answer = match self.messages.get(..events).unwrap_or_default() {
                [message] => session.publish(ticket, message).await?,
                run => session.publish_run(ticket, run).await?,
            };
            self.sent.push_back((now, ticket));
            at_once.extend(answer.map(|answer| Reply { ticket, answer }));
        }
        if !at_once.is_empty() {
            // they do not come from the broker, which may be silent
            let last_answer = self.last_answer;
            self.handle_replies(&mut at_once);
            self.last_answer = last_answer;
        }
        Ok(())
    }

    /// Applies the broker's answers to the window, and hands over what they end.
    fn handle_replies(&mut self, replies: &mut Vec<Reply>) {
        let (now, today) = (Instant::now(), Timestamp::now().as_microsecond());
        let (mut stored, mut failed) = (0, None);
        for Reply { ticket, answer } in replies.drain(..) {
            self.last_answer = now;
            match answer {
                Answer::Stored => {
                    self.reconnect = RECONNECT.0;
                    self.window.acknowledged(ticket, &mut self.acknowledged);
                    // the first one of a run has its time
                    let sent = self.acknowledged.first().map_or(now, |first| first.sent);
                    for Pending { row, held, .. } in self.acknowledged.drain(..) {
                        stored += 1;
                        // of two clocks the database's may be ahead
                        let since = |at: i64| u64::try_from(today.saturating_sub(at)).unwrap_or_default();
                        let latency = row.committed_at.map(|at| Duration::from_micros(since(at)));
                        self.reporter.acknowledged_after(now - sent, latency);
                        self.unrecorded.published.push(row.place);
                        if held {
                            self.unrecorded.freed.push((row.event.key(), row.place.seq));
                        }
                    }
                }
                Answer::Failed(why) if self.only_it_fails(ticket, now) => self.refuse(ticket, why),
                Answer::Failed(why) => {
                    if self.window.failed(ticket, now - self.started) {
                        self.reporter.retried();
                        failed = Some(why);
                    }
                }
                Answer::Refused(why) => self.refuse(ticket, why),
            }
        }
        while self.sent.front().is_some_and(|&(_, ticket)| !self.window.is_in_flight(ticket)) {
            self.sent.pop_front();
        }
        if stored > 0 {
            self.refused.clear();
            self.last_stored = Some(now);
            self.reporter.acknowledged(stored);
        }
        self.report_failing(failed, stored > 0);
        self.pass();
    }

    /// The broker stores others meanwhile: waiting in the window would hold them up some day.
    fn only_it_fails(&self, ticket: Ticket, now: Instant) -> bool {
        let others = self.last_stored.is_some_and(|stored| now - stored < HOLD_WHILE);
        others && self.window.failures(ticket) >= HOLD_AFTER
    }

    fn report_failing(&mut self, failed: Option<String>, progress: bool) {
        if let Some(why) = failed {
            self.failing = true;
            let address = self.address.clone();
            self.reporter.report(RelayProblem::PublishFailing { server: S::SERVER, address, cause: why });
        } else if progress && std::mem::take(&mut self.failing) {
            self.reporter.resolve(ProblemReason::PublishFailing);
        }
    }

    /// The event leaves the window with all that wait behind it.
    fn refuse(&mut self, ticket: Ticket, why: String) {
        let mut cause = Some(why);
        for Pending { row, held, .. } in self.window.hold(ticket) {
            let cause = cause.take();
            if let Some(cause) = &cause
                && (!held || self.last_stored.is_none())
            {
                self.count_refusal(row.event.key(), cause);
            }
            self.unrecorded.everybody = self.refused.len() >= EVERYBODY;
            if !held {
                self.hold(row.event.key(), row, cause);
            } else if let Some(cause) = cause {
                // those behind it are recorded, and come again after it
                self.unrecorded.refused.push((row.place.seq, cause));
            }
        }
        self.pass();
    }

    /// Attempts to publish held events again count only as long as the broker has stored nothing at all.
    fn count_refusal(&mut self, key: u64, cause: &str) {
        if self.refused.len() < EVERYBODY && self.refused.insert(key) && self.refused.len() == EVERYBODY {
            self.report_failing(Some(format!("it refuses the events of every aggregate: {cause}")), false);
        }
    }

    /// Checks everything that depends on time (answers that are overdue, back-off) and returns when to check again.
    fn check_timeouts(&mut self, session: &S::Session) -> Result<Instant, SinkError> {
        let now = Instant::now();
        if let Some(why) = session.blocked() {
            self.report_failing(Some(format!("it accepts no events for the time being: {why}")), false);
            self.last_answer = now;
            for (sent, _) in &mut self.sent {
                *sent = now;
            }
        }
        while let Some(&(sent, ticket)) = self.sent.front() {
            if self.window.is_in_flight(ticket) {
                if now - sent < ANSWER_TIMEOUT {
                    break;
                }
                if now - self.last_answer >= ANSWER_TIMEOUT {
                    let silence = now - self.last_answer;
                    return Err(session.silent(Timestamp::now() - silence));
                }
                if self.window.failed(ticket, now - self.started) {
                    self.reporter.retried();
                }
            }
            self.sent.pop_front();
        }
        let due = self.window.wake(now - self.started).map(|due| self.started + due);
        self.report_waiting();
        Ok(due.map_or(now + TICK, |due| due.min(now + TICK)))
    }

    fn report_waiting(&self) {
        self.reporter.waiting(Waiting {
            events: self.window.len(),
            in_flight: self.window.in_flight(),
            oldest: self.window.oldest().and_then(|pending| pending.row.event.created_at),
        });
    }
}

#[cfg(test)]
#[path = "publisher_tests.rs"]
mod tests;
