//! The publisher: from the source's batches through the window to the broker, and back to the recorder.

use std::{
    collections::{HashMap, VecDeque, hash_map::DefaultHasher},
    hash::{Hash, Hasher},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep, sleep_until},
};
use uuid::Uuid;

use super::{
    checkpoint::{Done, UNSEEN},
    report::{Report, Waiting, reason},
    sink::{Answer, Reply, Session, Sink, SinkError},
    source::{Batch, Item, Mark, SourceError},
    window::{Entry, Limits, Ticket, Window},
};
use crate::domain::event::Event;

pub(crate) const LIMITS: Limits = Limits {
    events: 8192,
    bytes: 8 * 1024 * 1024,
    in_flight: 4096,
    parked_events: 16_384,
    parked_bytes: 16 * 1024 * 1024,
    backoff: (Duration::from_millis(100), Duration::from_secs(5)),
    refused: Duration::from_secs(15),
};
/// An answer that did not come by then will not come.
const ANSWER: Duration = Duration::from_secs(10);
/// How often waits, deadlines and the status are looked after.
const TICK: Duration = Duration::from_millis(200);
/// How often it is asked whether a person has deleted the row of a refused event. One that is absent twice in a row is
/// gone; one that is absent once may be of a transaction that others do not see yet (see [`super::checkpoint`]).
const ASK: Duration = UNSEEN;
const RECONNECT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Tells which of these rows are still in the outbox.
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
    report: &'a Arc<Report>,
    window: Window<Pending, Mark>,
    begun: Instant,
    /// Attempts in the order in which they were sent.
    sent: VecDeque<(Instant, Ticket)>,
    answered: Instant,
    /// Wait before the next connection. Only what shows that the connection is of use shortens it again: one that is made
    /// and then ended by what is sent would otherwise be made ten times a second, for ever.
    reconnect: Duration,
    failing: bool,
    /// Refused events by their ids.
    refused: HashMap<Uuid, Refused>,
    ask: Instant,
}

#[derive(Debug)]
struct Refused {
    ticket: Ticket,
    why: String,
    /// Its row was not in the table when it was last looked for.
    absent: bool,
}

impl<'a, S: Sink, R: Rows> Publisher<'a, S, R> {
    pub(crate) fn new(
        sink: &'a S,
        rows: R,
        batches: mpsc::Receiver<Batch>,
        done: mpsc::Sender<Done>,
        paused: watch::Receiver<bool>,
        report: &'a Arc<Report>,
    ) -> Self {
        let now = Instant::now();
        Self {
            sink,
            rows,
            batches,
            done,
            paused,
            report,
            window: Window::new(LIMITS),
            begun: now,
            sent: VecDeque::new(),
            answered: now,
            reconnect: RECONNECT.0,
            failing: false,
            refused: HashMap::new(),
            ask: now,
        }
    }

    /// Publishes until the source ends, over as many connections as it takes.
    pub(crate) async fn run(mut self) -> Result<(), SourceError> {
        loop {
            let error = match self.sink.connect().await {
                Err(error) => error,
                Ok(mut session) => {
                    self.report.broker(true);
                    let connected = Instant::now();
                    match self.pump(&mut session).await {
                        Ok(ended) => return ended,
                        Err(error) => {
                            if connected.elapsed() > ANSWER {
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
            self.report.broker(false);
            self.report.problem(error.reason(), format!("{error}"));
            self.tell_waiting();
            sleep(self.reconnect).await;
            self.reconnect = (self.reconnect * 2).min(RECONNECT.1);
        }
    }

    /// One connection. The outer error is the connection's, the inner one the source's end.
    async fn pump(&mut self, session: &mut S::Session) -> Result<Result<(), SourceError>, SinkError> {
        let mut replies = Vec::new();
        let mut tick = Instant::now();
        self.answered = tick;
        loop {
            self.send(session).await?;
            tokio::select! {
                answered = session.replies(&mut replies) => {
                    if let Err(ended) = self.settle(&mut replies).await {
                        return Ok(Err(ended));
                    }
                    answered?;
                }
                batch = self.batches.recv(), if self.window.has_room() => match batch {
                    Some(batch) => {
                        self.admit(batch);
                        // a mark may have nothing to wait for
                        if let Err(ended) = self.settle(&mut replies).await {
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
                    let next = self.look_after(session).await?;
                    tick = next;
                    // an event that was skipped may have been the last before a mark
                    if let Err(ended) = self.settle(&mut replies).await {
                        return Ok(Err(ended));
                    }
                }
            }
        }
    }

    fn admit(&mut self, batch: Batch) {
        let sent = self.begun;
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

    /// Takes the broker's answers in, and hands over what is done.
    async fn settle(&mut self, replies: &mut Vec<Reply>) -> Result<(), SourceError> {
        let now = Instant::now();
        let mut done = Done::default();
        let mut failed = None;
        for Reply { ticket, answer } in replies.drain(..) {
            self.answered = now;
            match answer {
                Answer::Stored => {
                    self.reconnect = RECONNECT.0;
                    if let Some(Pending { event, sent }) = self.window.acknowledged(ticket) {
                        self.report.took(now - sent);
                        self.refused.remove(&event.id);
                        done.rows.push(event.id);
                    }
                }
                Answer::Failed(why) => {
                    self.window.failed(ticket, now - self.begun);
                    self.report.retried();
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
        self.tell_failing(failed, !done.rows.is_empty());
        if !done.rows.is_empty() {
            self.report.acknowledged(done.rows.len());
        }
        done.mark = self.window.passed();
        if done.rows.is_empty() && done.mark.is_none() {
            return Ok(());
        }
        self.done.send(done).await.map_err(|_closed| SourceError::Ended)
    }

    fn tell_failing(&mut self, failed: Option<String>, progress: bool) {
        if let Some(why) = failed {
            self.failing = true;
            self.report.problem(reason::PUBLISH_FAILING, format!("the broker does not store events: {why}"));
        } else if progress && std::mem::take(&mut self.failing) {
            self.report.mended(reason::PUBLISH_FAILING);
        }
    }

    fn refuse(&mut self, id: Uuid, ticket: Ticket, why: String) {
        self.window.refused(ticket, self.begun.elapsed());
        let absent = self.refused.get(&id).is_some_and(|refused| refused.absent);
        self.refused.insert(id, Refused { ticket, why, absent });
        self.tell_refused();
    }

    fn tell_refused(&self) {
        let first = self.refused.iter().min_by_key(|(_, refused)| refused.ticket);
        let Some((id, Refused { why, .. })) = first else {
            self.report.mended(reason::EVENT_REFUSED);
            return;
        };
        let (others, parked) = (self.refused.len() - 1, self.window.parked());
        let others = if others == 0 { String::new() } else { format!(", and {others} more") };
        let message = format!(
            "the broker refuses event {id}{others}: {why}; deleting its row from weft.outbox skips it; {parked} events are held up"
        );
        self.report.problem(reason::EVENT_REFUSED, message);
    }

    /// What is due by time. Gives the next time to look.
    async fn look_after(&mut self, session: &S::Session) -> Result<Instant, SinkError> {
        let now = Instant::now();
        while let Some(&(sent, ticket)) = self.sent.front() {
            if self.window.is_in_flight(ticket) {
                if now - sent < ANSWER {
                    break;
                }
                if now - self.answered >= ANSWER {
                    return Err(session.silent(ANSWER.as_secs()));
                }
                self.window.failed(ticket, now - self.begun);
                self.report.retried();
            }
            self.sent.pop_front();
        }
        if !self.refused.is_empty() && now >= self.ask {
            self.ask = now + ASK;
            self.skip_deleted().await;
        }
        let due = self.window.wake(now - self.begun).map(|due| self.begun + due);
        self.tell_waiting();
        Ok(due.map_or(now + TICK, |due| due.min(now + TICK)))
    }

    /// A person may delete the row of a refused event: then it is skipped. That may have been before this term, so the row
    /// need not have been seen.
    async fn skip_deleted(&mut self) {
        let ids: Vec<Uuid> = self.refused.keys().copied().collect();
        let Ok(present) = self.rows.present(&ids).await else { return };
        for id in ids {
            let Some(refused) = self.refused.get_mut(&id) else { continue };
            let absent = !present.contains(&id);
            if std::mem::replace(&mut refused.absent, absent) && absent {
                tracing::warn!(event = %id, "its row was deleted: the refused event is skipped");
                let ticket = refused.ticket;
                self.refused.remove(&id);
                self.window.acknowledged(ticket);
            }
        }
        self.tell_refused();
    }

    fn tell_waiting(&self) {
        self.report.waiting(Waiting {
            events: self.window.len(),
            in_flight: self.window.in_flight(),
            parked: self.window.parked(),
            oldest: self.window.oldest().map(|pending| pending.event.created_at),
        });
        if self.refused.is_empty() {
            self.report.mended(reason::EVENT_REFUSED);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use prometheus_client::registry::Registry;

    use super::*;

    /// A broker that lets everyone in and ends each connection at once.
    #[derive(Default)]
    struct Doorman(AtomicU32);

    struct Thrown;

    fn lost() -> SinkError {
        SinkError::Lost { url: "nats://n".to_owned() }
    }

    impl Sink for Doorman {
        type Session = Thrown;

        async fn connect(&self) -> Result<Thrown, SinkError> {
            self.0.fetch_add(1, Ordering::Relaxed);
            Ok(Thrown)
        }
    }

    impl Session for Thrown {
        async fn publish(&mut self, _: Ticket, _: &Event) -> Result<Option<Answer>, SinkError> {
            Ok(None)
        }

        async fn replies(&mut self, _: &mut Vec<Reply>) -> Result<(), SinkError> {
            Err(lost())
        }

        fn silent(&self, _: u64) -> SinkError {
            lost()
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
        let (doorman, report) = (Doorman::default(), Report::new("r", &mut Registry::default()));
        let (_batches, received) = mpsc::channel(1);
        let (done, _finished) = mpsc::channel(1);
        let (_pause, paused) = watch::channel(false);
        let publisher = Publisher::new(&doorman, Nothing, received, done, paused, &report);
        let minute = tokio::time::timeout(Duration::from_mins(1), publisher.run()).await;
        assert!(minute.is_err());
        let connections = doorman.0.load(Ordering::Relaxed);
        assert!((10..25).contains(&connections), "{connections} connections in a minute");
    }
}
