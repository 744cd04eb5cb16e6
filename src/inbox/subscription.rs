//! One subscription: reads its stream, hands the events to the service, and keeps what the service does not handle.
//!
//! ```text
//!   source ──messages──► queue (window) ──► deliverer ──► the service
//!                          │    ▲  └ settled up to: weft.inbox_position
//!                          ▼    └ events of a key that is free
//!                    weft.inbox_held: an event that fails again and again, those behind it in its key, dead letters
//! ```
//! Everything is decided in one task, and a write to the database is waited for before the position moves past its event.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures::{FutureExt, StreamExt, stream::FuturesUnordered};
use jiff::Timestamp;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::{
    deliver::{Deliverer, Outcome},
    event::{Event, Unusable},
    problem::InboxProblem,
    queue::{Circuit, Failed, HOLD_AFTER, Queue, backoff},
    reporter::Reporter,
    source::{Message, Nats, NatsSession, Opened, Position, SourceError},
    store::{Counted, Failure, Held, NewlyHeld, Store},
};
use crate::{
    contract::{
        inbox::{Inbox, Subscription},
        problem::ProblemReason,
        status::SubscriptionStatus,
    },
    domain::names,
    postgres::session::SessionError,
};

/// How often the position is recorded and the numbers are reported.
const TICK: Duration = Duration::from_millis(250);
/// How often held events are looked for and counted, while there are some, and while there are none.
const COUNT: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// How often an idle subscription's position follows the stream.
const FOLLOW: Duration = Duration::from_secs(30);
/// Wait before the source is opened again: the shortest, doubled each time, and the longest.
const REOPEN: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// How long deliveries on the way are waited for when the inbox is asked to end.
const END: Duration = Duration::from_secs(8);

#[derive(Debug, thiserror::Error)]
enum EndError {
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Database(#[from] SessionError),
}

/// What a subscription works with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context<'a> {
    pub contract: &'a Inbox,
    pub subscription: &'a Subscription,
    pub store: Store<'a>,
    pub reporter: &'a Reporter,
}

impl Context<'_> {
    /// Consumes until `stop`, whatever becomes of the broker; an error is the database's.
    pub(super) async fn run(self, stop: CancellationToken) -> Result<(), SessionError> {
        let name = &self.subscription.name;
        let deliverer = match Deliverer::new(self.subscription, &self.contract.database) {
            Ok(deliverer) => Arc::new(deliverer),
            Err(cause) => {
                self.report(InboxProblem::SourceUnusable { subscription: name.clone(), cause });
                stop.cancelled().await;
                return Ok(());
            }
        };
        let (mut circuit, mut wait) = (Circuit::default(), REOPEN.0);
        while !stop.is_cancelled() {
            let began = Instant::now();
            match Box::pin(self.consume(&deliverer, &mut circuit, &stop)).await {
                Ok(()) => {}
                Err(EndError::Database(error)) => return Err(error),
                Err(EndError::Source(error)) => self.report(self.problem(error)),
            }
            if began.elapsed() > REOPEN.1 * 2 {
                wait = REOPEN.0;
            }
            tokio::select! { () = sleep(wait) => {} () = stop.cancelled() => {} }
            wait = (wait * 2).min(REOPEN.1);
        }
        Ok(())
    }

    fn problem(&self, error: SourceError) -> InboxProblem {
        let subscription = self.subscription.name.clone();
        match error {
            SourceError::Unreachable(outage) => InboxProblem::BrokerUnreachable { subscription, outage },
            SourceError::StreamMissing { stream, address } => {
                InboxProblem::StreamMissing { subscription, stream, address }
            }
            SourceError::Unusable(cause) => InboxProblem::SourceUnusable { subscription, cause },
        }
    }

    fn report(&self, problem: InboxProblem) {
        self.reporter.report(problem);
    }

    fn resolve(&self, reason: ProblemReason) {
        self.reporter.resolve(reason, &self.subscription.name);
    }

    /// Consumes over one session of the source, until it fails or until `stop`.
    async fn consume(
        self,
        deliverer: &Arc<Deliverer>,
        circuit: &mut Circuit,
        stop: &CancellationToken,
    ) -> Result<(), EndError> {
        let source = Nats::new(self.contract, self.subscription)?;
        let recorded = self.store.position().await?;
        let (known, consumed) = recorded.map_or((None, 0), |(position, consumed)| (Some(position), consumed));
        let Opened { session, position, expired, behind } = tokio::select! {
            opened = source.open(known.as_ref()) => opened?,
            () = stop.cancelled() => return Ok(()),
        };
        if expired > 0 {
            let subscription = self.subscription.name.clone();
            self.report(InboxProblem::EventsExpired { subscription, events: expired });
        }
        // from here on `since` counts no more
        self.store.record(&position, consumed).await?;
        let successes = circuit.successes();
        let held = self.store.held_keys().await?.into_iter().map(|key| (key, HeldKey::new(successes)));
        for reason in [ProblemReason::BrokerUnreachable, ProblemReason::StreamMissing, ProblemReason::SourceUnusable] {
            self.resolve(reason);
        }
        let (next, max_attempts) = (position.next, self.subscription.max_attempts);
        let work = Work {
            context: self,
            deliverer: Arc::clone(deliverer),
            circuit,
            is_own_subject: source.is_own_subject(),
            source_of_events: names::event_source(&self.subscription.from.namespace, &self.subscription.from.service),
            queue: Queue::new(next, position.settled.iter().copied(), max_attempts),
            held: held.collect(),
            turn: VecDeque::new(),
            position,
            consumed,
            recorded: (next, consumed),
            behind,
            counted: Counted::default(),
            count_at: Instant::now(),
            follow_at: Instant::now() + FOLLOW,
        };
        Box::pin(work.run(session, stop)).await
    }
}

/// Of a key with held events.
#[derive(Debug)]
struct HeldKey {
    /// Deliveries of its first event in vain, by this process.
    failures: u32,
    /// Successes of the subscription when it was last tried.
    successes: u64,
    /// Its first event is on the way, or has its turn.
    busy: bool,
}

impl HeldKey {
    fn new(successes: u64) -> Self {
        Self { failures: 0, successes, busy: false }
    }
}

/// An event in the window.
#[derive(Debug)]
struct Pending {
    event: Event,
    key: u64,
    stored_at: Timestamp,
}

/// An event on the way.
#[derive(Debug)]
enum Job {
    /// Of the window, by its sequence.
    Window(u64),
    Held(Box<Held>),
}

struct Work<'a, 'b> {
    context: Context<'a>,
    deliverer: Arc<Deliverer>,
    circuit: &'b mut Circuit,
    is_own_subject: bool,
    /// CloudEvents `source` of the publisher.
    source_of_events: String,
    queue: Queue<Arc<Pending>>,
    held: HashMap<u64, HeldKey>,
    /// Held events whose turn it is.
    turn: VecDeque<Held>,
    position: Position,
    consumed: u64,
    /// The position and the count as they were last recorded.
    recorded: (u64, u64),
    behind: u64,
    counted: Counted,
    count_at: Instant,
    follow_at: Instant,
}

impl Work<'_, '_> {
    async fn run(mut self, mut session: NatsSession, stop: &CancellationToken) -> Result<(), EndError> {
        let mut delivering = FuturesUnordered::new();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut end = None;
        loop {
            while end.is_none()
                && let Some((job, event)) = self.next(delivering.len())
            {
                let (deliverer, began) = (Arc::clone(&self.deliverer), Instant::now());
                delivering.push(async move {
                    let outcome = deliverer.deliver(event.event()).await;
                    (job, outcome, began.elapsed())
                });
            }
            if let Some(end) = end
                && (delivering.is_empty() || end < Instant::now())
            {
                break;
            }
            let due = self.wakes_at(delivering.len());
            tokio::select! {
                Some(delivered) = delivering.next() => {
                    let mut next = Some(delivered);
                    while let Some((job, outcome, elapsed)) = next {
                        self.delivered(job, outcome, elapsed).await?;
                        next = delivering.next().now_or_never().flatten();
                    }
                }
                messages = session.next(), if end.is_none() && self.queue.has_room() => self.received(messages?).await?,
                _ = tick.tick() => self.tick(&session).await?,
                () = stop.cancelled(), if end.is_none() => end = Some(Instant::now() + END),
                () = at(due), if end.is_none() => {}
            }
        }
        self.record().await?;
        session.close().await;
        Ok(())
    }

    /// The next event to be delivered, beside those on the way.
    fn next(&mut self, on_the_way: usize) -> Option<(Job, Delivery)> {
        let now = Instant::now();
        if on_the_way >= self.deliverer.concurrency() || !self.circuit.admits(on_the_way, now) {
            return None;
        }
        if let Some((sequence, pending)) = self.queue.take(self.circuit, now) {
            return Some((Job::Window(sequence), Delivery::Pending(Arc::clone(pending))));
        }
        let mut held = self.turn.pop_front()?;
        let event = std::mem::take(&mut held.event);
        Some((Job::Held(Box::new(held)), Delivery::Held(Box::new(event))))
    }

    /// When there may be something to deliver, if nothing else happens.
    fn wakes_at(&self, on_the_way: usize) -> Option<Instant> {
        let now = Instant::now();
        let due = if self.turn.is_empty() { self.queue.next_due()? } else { now };
        if on_the_way >= self.deliverer.concurrency() {
            return None;
        }
        if self.circuit.is_open() {
            return if on_the_way == 0 { self.circuit.until().map(|until| until.max(due)) } else { None };
        }
        Some(due)
    }

    async fn received(&mut self, messages: Vec<Message>) -> Result<(), EndError> {
        let (now, mut holding) = (Instant::now(), Vec::new());
        for Message { sequence, stored_at, headers, body, behind } in messages {
            self.behind = behind;
            self.queue.received(sequence);
            if self.queue.is_settled(sequence) {
                continue;
            }
            let headers = headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
            let (event, usable) = Event::read(headers, body);
            if !self.is_wanted(&event, &usable) {
                continue;
            }
            let key = event.key();
            let failure = usable.err().map(|why| Failure { attempts: 0, cause: why.to_string(), again_in: None });
            if failure.is_some() || self.held.contains_key(&key) {
                holding.push(NewlyHeld { sequence, key, stored_at, event, failure });
            } else {
                let size = event.size();
                self.queue.push(sequence, key, size, Arc::new(Pending { event, key, stored_at }), now);
            }
        }
        self.hold(&holding).await
    }

    /// Subjects that others use too have events of other services and types.
    fn is_wanted(&self, event: &Event, usable: &Result<(), Unusable>) -> bool {
        let types = &self.context.subscription.types;
        let is_of_type = types.is_empty() || types.iter().any(|wanted| wanted == event.kind());
        if usable.is_err() {
            return self.is_own_subject || (event.source() == self.source_of_events && is_of_type);
        }
        event.source() == self.source_of_events && is_of_type
    }

    async fn hold(&mut self, events: &[NewlyHeld]) -> Result<(), EndError> {
        if events.is_empty() {
            return Ok(());
        }
        self.context.store.hold(&self.position.stream_created, events).await?;
        self.count_at = Instant::now();
        for NewlyHeld { event, sequence, failure, .. } in events {
            if let Some(Failure { cause, again_in: None, .. }) = failure {
                let subscription = &self.context.subscription.name;
                tracing::error!(subscription, event = event.id(), sequence, cause, "an event is a dead letter");
            }
        }
        Ok(())
    }

    async fn delivered(&mut self, job: Job, outcome: Outcome, elapsed: Duration) -> Result<(), EndError> {
        self.context.reporter.delivered(&self.context.subscription.name, &outcome, elapsed);
        if let Outcome::Failed(cause) = &outcome {
            self.circuit.failed(Instant::now());
            if self.circuit.is_open() {
                let (subscription, cause) = (self.context.subscription.name.clone(), cause.clone());
                self.context.report(InboxProblem::DeliveryFailing { subscription, cause });
            }
        } else {
            if self.circuit.is_open() {
                self.context.resolve(ProblemReason::DeliveryFailing);
            }
            // a service that refuses an event works, as one that handles it
            self.circuit.succeeded();
        }
        self.consumed += u64::from(outcome == Outcome::Handled);
        match job {
            Job::Window(sequence) => self.delivered_of_window(sequence, outcome).await,
            Job::Held(held) => self.delivered_of_held(*held, outcome).await,
        }
    }

    async fn delivered_of_window(&mut self, sequence: u64, outcome: Outcome) -> Result<(), EndError> {
        let now = Instant::now();
        let (attempts, cause) = match outcome {
            Outcome::Handled => {
                self.queue.settle(sequence, now);
                return Ok(());
            }
            Outcome::Refused(cause) => (1, cause),
            Outcome::Failed(cause) => match self.queue.fail(sequence, self.circuit, now) {
                Failed::Again => return Ok(()),
                Failed::Dead { attempts } => (attempts, cause),
                Failed::Hold { attempts } => return self.hold_key_of(sequence, attempts, cause).await,
            },
        };
        if let Some(pending) = self.queue.settle(sequence, now) {
            let failure = Failure { attempts, cause, again_in: None };
            self.hold(&[newly_held(sequence, &pending, Some(failure))]).await?;
        }
        Ok(())
    }

    /// An event and those behind it in its key leave the window.
    async fn hold_key_of(&mut self, sequence: u64, attempts: u32, cause: String) -> Result<(), EndError> {
        let removed = self.queue.remove_key_of(sequence);
        let mut failure = Some(Failure { attempts, cause, again_in: Some(backoff(HOLD_AFTER)) });
        let events: Vec<_> =
            removed.iter().map(|(sequence, pending)| newly_held(*sequence, pending, failure.take())).collect();
        self.hold(&events).await?;
        if let Some(first) = events.first() {
            self.held.insert(first.key, HeldKey { failures: HOLD_AFTER, ..HeldKey::new(self.circuit.successes()) });
        }
        Ok(())
    }

    async fn delivered_of_held(&mut self, held: Held, outcome: Outcome) -> Result<(), EndError> {
        let store = self.context.store;
        let next = match outcome {
            Outcome::Handled => store.settled(&held).await?,
            Outcome::Refused(cause) => store.bury(&held, held.attempts + 1, &cause).await?,
            Outcome::Failed(cause) => {
                let successes = self.circuit.successes();
                let of_key = self.held.entry(held.key).or_insert_with(|| HeldKey::new(successes));
                let attempts = held.attempts + u32::from(successes > of_key.successes);
                (of_key.failures, of_key.successes) = (of_key.failures + 1, successes);
                if attempts < self.context.subscription.max_attempts {
                    of_key.busy = false;
                    let again_in = Some(backoff(of_key.failures));
                    store.failed(&held, &Failure { attempts, cause, again_in }).await?;
                    return Ok(());
                }
                store.bury(&held, attempts, &cause).await?
            }
        };
        self.count_at = Instant::now();
        match next {
            None => drop(self.held.remove(&held.key)),
            Some(next) => {
                let successes = self.circuit.successes();
                self.held.insert(held.key, HeldKey { busy: true, ..HeldKey::new(successes) });
                self.turn.push_back(next);
            }
        }
        Ok(())
    }

    async fn tick(&mut self, session: &NatsSession) -> Result<(), EndError> {
        if self.follow_at <= Instant::now() {
            self.follow_at = Instant::now() + FOLLOW;
            if let Some(sequence) = session.read_up_to().await {
                self.queue.received(sequence);
            }
        }
        self.record().await?;
        if self.count_at <= Instant::now() {
            self.find_held().await?;
            if !self.queue.has_room()
                && let Some(behind) = session.behind().await
            {
                self.behind = behind;
            }
            self.counted = self.context.store.count().await?;
            let any = self.counted.held > 0 || !self.held.is_empty();
            self.count_at = Instant::now() + if any { COUNT.0 } else { COUNT.1 };
            self.report_held();
        }
        self.report_numbers();
        Ok(())
    }

    /// Gives held events their turn.
    async fn find_held(&mut self) -> Result<(), EndError> {
        let busy: Vec<i64> = self.held.iter().filter(|(_, key)| key.busy).map(|(key, _)| key.cast_signed()).collect();
        for held in self.context.store.due(&busy).await? {
            // a dead letter that a person retries waits for those of its key in the window
            if !self.queue.is_idle(held.key) {
                continue;
            }
            let successes = self.circuit.successes();
            self.held.entry(held.key).or_insert_with(|| HeldKey::new(successes)).busy = true;
            self.turn.push_back(held);
        }
        Ok(())
    }

    async fn record(&mut self) -> Result<(), EndError> {
        let floor = self.queue.floor();
        if self.recorded != (floor, self.consumed) {
            self.position.next = floor;
            self.position.settled = self.queue.settled().collect();
            // everything before the floor is handled, or held: see the module
            self.context.store.record(&self.position, self.consumed).await?;
            self.recorded = (floor, self.consumed);
        }
        Ok(())
    }

    fn report_held(&self) {
        let subscription = || self.context.subscription.name.clone();
        let Counted { held, dead, refused, latest_dead, .. } = &self.counted;
        match refused {
            Some((event, cause)) => self.context.report(InboxProblem::EventRefused {
                subscription: subscription(),
                event: event.clone(),
                held: *held,
                cause: cause.clone(),
            }),
            None => self.context.resolve(ProblemReason::EventRefused),
        }
        match latest_dead {
            Some((latest, cause)) => self.context.report(InboxProblem::DeadLetters {
                subscription: subscription(),
                events: *dead,
                latest: latest.clone(),
                cause: cause.clone(),
            }),
            None => self.context.resolve(ProblemReason::DeadLetters),
        }
    }

    fn report_numbers(&self) {
        let oldest = self.queue.oldest().map(|pending| pending.stored_at).into_iter().chain(self.counted.oldest).min();
        let lag = oldest.map_or(0.0, |oldest| Timestamp::now().duration_since(oldest).as_secs_f64().max(0.0));
        self.context.reporter.numbers(
            &self.context.subscription.name,
            &SubscriptionStatus {
                consumed: self.consumed,
                waiting: self.queue.len() as u64 + self.behind + self.counted.held,
                held: self.counted.held,
                dead_letters: self.counted.dead,
                lag_seconds: lag,
            },
        );
    }
}

/// The event of a delivery.
#[derive(Debug)]
enum Delivery {
    Pending(Arc<Pending>),
    Held(Box<Event>),
}

impl Delivery {
    fn event(&self) -> &Event {
        match self {
            Self::Pending(pending) => &pending.event,
            Self::Held(event) => event,
        }
    }
}

fn newly_held(sequence: u64, pending: &Pending, failure: Option<Failure>) -> NewlyHeld {
    let Pending { event, key, stored_at } = pending;
    NewlyHeld { sequence, key: *key, stored_at: *stored_at, event: event.clone(), failure }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}
