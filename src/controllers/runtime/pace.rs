//! How often a status may be written: each object's at its own pace, and all of them together within a budget.
//!
//! What a person waits for is written at once, numbers that move every 10 s. The stages of a roll-out wait for those that follow,
//! so that a roll-out which goes well is two or three writes. The budget is a token bucket for the whole operator. Who finds it
//! empty waits for a turn: the answers to new specs first, then conditions, then progress, then numbers, each of them in the order
//! in which they came. Whoever waits is reconciled when its turn comes, and not before.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::Notify, time::Instant};

use crate::controllers::resources::key::Key;

/// Shortest time between two writes of numbers; and the time in which one more immediate write is earned.
pub const PACE: Duration = Duration::from_secs(10);
/// Immediate writes (a condition moved) in a row, so that a rollout is reported as it goes but a flapping pod is not.
const BURST: u32 = 6;
/// How long progress waits for more of it: half as long as the status had been the same before, within these bounds. So it is
/// reported soon after a spec was applied, when somebody may be watching, and less often the longer a roll-out takes.
const PROGRESS_WAITS: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(30));
/// Writes a second, of all objects together: what the API server bears, however many relays are busy. As many may come at
/// once after a quiet second.
const RATE: f64 = 40.0;

/// What a new status brings. The order is that in which they get their turns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum News {
    /// The first status of a spec: whoever applied it waits for it, and it comes no more often than they apply.
    Answer,
    /// A condition moved that a person wants to know of: `Ready`, or a cause.
    Condition,
    /// A roll-out came a stage further, and nothing is wrong.
    Progress,
    Numbers,
}

/// Why a status is not written now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// The object's own pace: not before then.
    Until(Instant),
    /// The budget of all: [`StatusPace::turn`] names the object when it is its turn.
    Turn,
}

#[derive(Debug, Default)]
pub struct StatusPace {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    written: HashMap<Key, Written>,
    budget: Budget,
    line: Line,
    /// Whose turn has come, with a token that is already paid for.
    granted: HashSet<Key>,
}

#[derive(Clone, Copy, Debug)]
struct Written {
    last: Instant,
    /// Immediate writes used up, as of `last`.
    used: f64,
    /// Since when there is progress to be written.
    progress: Option<Instant>,
}

impl Written {
    /// When progress that is there `since` then may be written.
    fn progress_due(&self, since: Instant) -> Instant {
        let (least, most) = PROGRESS_WAITS;
        since + (since.duration_since(self.last) / 2).clamp(least, most)
    }
}

impl StatusPace {
    /// With another budget than [`RATE`].
    pub fn with_rate(rate: f64) -> Self {
        let budget = Budget { rate, tokens: rate, at: None };
        Self { state: Mutex::new(State { budget, ..State::default() }), ..Self::default() }
    }

    /// `Ok`: write now (and it counts as written).
    pub fn enter(&self, key: &Key, news: News, now: Instant) -> Result<(), Wait> {
        let mut state = self.lock();
        let granted = state.granted.remove(key);
        let allowed = state.allowed(key, news, now).and_then(|used| {
            let paid = granted || (state.line.is_empty() && state.budget.take(now));
            if paid { Ok(used) } else { Err(Wait::Turn) }
        });
        match allowed {
            Ok(used) => {
                state.line.leave(key);
                state.written.insert(key.clone(), Written { last: now, used: used + 1.0, progress: None });
                Ok(())
            }
            Err(wait) => {
                if granted {
                    state.budget.give_back();
                }
                if wait == Wait::Turn {
                    state.line.join(key, news);
                }
                self.changed.notify_one();
                Err(wait)
            }
        }
    }

    /// There is nothing to write for `key` any more: it neither waits nor keeps a token.
    pub fn withdraw(&self, key: &Key) {
        let mut state = self.lock();
        state.line.leave(key);
        if let Some(written) = state.written.get_mut(key) {
            written.progress = None;
        }
        if state.granted.remove(key) {
            state.budget.give_back();
            self.changed.notify_one();
        }
    }

    /// The next object whose turn has come, and what it has to write: it is to be reconciled, and may then enter.
    pub async fn turn(&self) -> (Key, News) {
        loop {
            let changed = self.changed.notified();
            let granted = self.lock().grant(Instant::now());
            match granted {
                Ok(turn) => return turn,
                Err(Some(at)) => tokio::select! { () = changed => {} () = tokio::time::sleep_until(at) => {} },
                Err(None) => changed.await,
            }
        }
    }

    /// When `key` is to be reconciled for its numbers; `None`: it waits for its turn anyway.
    pub fn next(&self, key: &Key, now: Instant) -> Option<Instant> {
        let state = self.lock();
        if state.line.holds(key) {
            return None;
        }
        Some(state.written.get(key).map_or(now, |written| (written.last + PACE).max(now)))
    }

    /// The object is gone.
    pub fn forget(&self, key: &Key) {
        self.withdraw(key);
        self.lock().written.remove(key);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// By the object's own pace: immediate writes that it has used up so far, or when it may write.
    fn allowed(&mut self, key: &Key, news: News, now: Instant) -> Result<f64, Wait> {
        let Some(written) = self.written.get_mut(key).filter(|_| news != News::Answer) else { return Ok(0.0) };
        written.progress = (news == News::Progress).then(|| written.progress.unwrap_or(now));
        let earned = now.duration_since(written.last).as_secs_f64() / PACE.as_secs_f64();
        let used = (written.used - earned).max(0.0);
        let due = written.progress.map_or(now, |since| written.progress_due(since));
        let may = if news == News::Numbers { earned >= 1.0 } else { used + 1.0 <= f64::from(BURST) };
        match may {
            true if due <= now => Ok(used),
            true => Err(Wait::Until(due)),
            false => Err(Wait::Until(due.max(written.last + PACE))),
        }
    }

    /// Whose turn it is now, or when somebody's will be.
    fn grant(&mut self, now: Instant) -> Result<(Key, News), Option<Instant>> {
        if self.line.is_empty() {
            return Err(None);
        }
        if !self.budget.take(now) {
            return Err(Some(self.budget.next(now)));
        }
        let Some((key, news)) = self.line.first() else { return Err(None) };
        self.granted.insert(key.clone());
        Ok((key, news))
    }
}

/// A token bucket that holds the tokens of one second.
#[derive(Clone, Copy, Debug)]
struct Budget {
    /// Tokens a second.
    rate: f64,
    tokens: f64,
    /// When `tokens` was right; `None`: nothing was taken yet.
    at: Option<Instant>,
}

impl Default for Budget {
    fn default() -> Self {
        Self { rate: RATE, tokens: RATE, at: None }
    }
}

impl Budget {
    fn fill(&mut self, now: Instant) {
        let since = self.at.map_or(Duration::ZERO, |at| now.duration_since(at));
        self.tokens = (self.tokens + since.as_secs_f64() * self.rate).min(self.rate);
        self.at = Some(now);
    }

    fn take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let enough = self.tokens >= 1.0;
        if enough {
            self.tokens -= 1.0;
        }
        enough
    }

    fn give_back(&mut self) {
        self.tokens = (self.tokens + 1.0).min(self.rate);
    }

    /// When there is a whole token again.
    fn next(&self, now: Instant) -> Instant {
        // a timer may fire a moment early
        now + Duration::from_secs_f64(((1.0 - self.tokens) / self.rate).max(0.001))
    }
}

/// Who waits for a turn.
#[derive(Debug, Default)]
struct Line {
    order: BTreeMap<(News, u64), Key>,
    places: HashMap<Key, (News, u64)>,
    /// How many have joined.
    count: u64,
}

impl Line {
    /// A place at the end of those with the same news; who waits already keeps the place, or moves to a better one.
    fn join(&mut self, key: &Key, news: News) {
        if self.places.get(key).is_some_and(|(known, _)| *known <= news) {
            return;
        }
        self.leave(key);
        self.count += 1;
        self.order.insert((news, self.count), key.clone());
        self.places.insert(key.clone(), (news, self.count));
    }

    fn leave(&mut self, key: &Key) {
        if let Some(place) = self.places.remove(key) {
            self.order.remove(&place);
        }
    }

    fn first(&mut self) -> Option<(Key, News)> {
        let ((news, _), key) = self.order.pop_first()?;
        self.places.remove(&key);
        Some((key, news))
    }

    fn holds(&self, key: &Key) -> bool {
        self.places.contains_key(key)
    }

    fn is_empty(&self) -> bool {
        self.order.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::controllers::resources::key::ObjectKind;

    fn key(name: &str) -> Key {
        Key::new(ObjectKind::OutboxRelay, "shop", name)
    }

    #[tokio::test(start_paused = true)]
    async fn numbers_are_written_at_their_pace_and_conditions_at_once_within_bounds() {
        let (pace, key, start) = (StatusPace::default(), key("s"), Instant::now());
        let at = |second| start + Duration::from_secs(second);
        assert_eq!(pace.enter(&key, News::Numbers, start), Ok(()));
        assert_eq!(pace.enter(&key, News::Numbers, at(9)), Err(Wait::Until(start + PACE)));
        for second in 1..6 {
            assert_eq!(pace.enter(&key, News::Condition, at(second)), Ok(()), "{second}");
        }
        let flapping = (6..60).filter(|second| pace.enter(&key, News::Condition, at(*second)).is_ok());
        assert!(flapping.count() <= 6);
    }

    #[tokio::test(start_paused = true)]
    async fn the_stages_of_a_roll_out_wait_for_each_other_and_not_for_long() {
        let (pace, key, start) = (StatusPace::default(), key("s"), Instant::now());
        let at = |second| start + Duration::from_secs(second);
        assert_eq!(pace.enter(&key, News::Answer, start), Ok(()));
        // the first one, soon after the spec was applied
        assert_eq!(pace.enter(&key, News::Progress, at(1)), Err(Wait::Until(at(6))));
        assert_eq!(pace.enter(&key, News::Progress, at(4)), Err(Wait::Until(at(6))), "more of it does not defer it");
        assert_eq!(pace.enter(&key, News::Progress, at(6)), Ok(()));
        // a slow one
        assert_eq!(pace.enter(&key, News::Progress, at(26)), Err(Wait::Until(at(36))));
        // what a person wants to know of carries it
        assert_eq!(pace.enter(&key, News::Condition, at(27)), Ok(()));
        assert_eq!(pace.enter(&key, News::Progress, at(627)), Err(Wait::Until(at(657))), "and this is the longest");
        // back where it was: there is nothing to write any more
        pace.withdraw(&key);
        assert_eq!(pace.enter(&key, News::Progress, at(640)), Err(Wait::Until(at(670))));
    }

    #[tokio::test(start_paused = true)]
    async fn progress_that_goes_back_and_forth_is_written_at_the_pace_of_numbers() {
        let (pace, key, start) = (StatusPace::default(), key("s"), Instant::now());
        let written =
            (0..600).filter(|second| pace.enter(&key, News::Progress, start + Duration::from_secs(*second)).is_ok());
        let written = written.count();
        assert!((55..=66).contains(&written), "{written} in ten minutes");
    }

    #[tokio::test(start_paused = true)]
    async fn every_spec_gets_its_answer_at_once() {
        let (pace, key, start) = (StatusPace::default(), key("s"), Instant::now());
        while pace.enter(&key, News::Condition, start).is_ok() {}
        for _ in 0..20 {
            assert_eq!(pace.enter(&key, News::Answer, start), Ok(()));
        }
        assert_eq!(
            pace.enter(&key, News::Condition, start),
            Ok(()),
            "the roll-out of the new spec is reported as it proceeds"
        );
        assert_eq!(pace.enter(&key, News::Numbers, start), Err(Wait::Until(start + PACE)));
    }

    /// An operator whose `keys` all have new numbers all the time, for `seconds`: how often each was written.
    async fn busy(pace: &StatusPace, keys: Vec<Key>, seconds: u64) -> HashMap<Key, u32> {
        let start = Instant::now();
        let end = start + Duration::from_secs(seconds);
        let mut written = HashMap::new();
        let mut later: VecDeque<_> = keys.into_iter().map(|key| (start, key)).collect();
        loop {
            let next = later.front().map_or(end, |(at, _)| *at);
            let key = tokio::select! {
                (turn, _) = pace.turn() => turn,
                () = tokio::time::sleep_until(next.min(end)) => match later.pop_front() {
                    Some((_, key)) if Instant::now() < end => key,
                    _ => return written,
                },
            };
            if pace.enter(&key, News::Numbers, Instant::now()).is_ok() {
                *written.entry(key.clone()).or_default() += 1;
                later.push_back((Instant::now() + PACE, key));
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn ten_thousand_busy_relays_write_within_the_budget_and_each_in_its_turn() {
        let pace = StatusPace::default();
        let keys: Vec<_> = (0..2_000).map(|number| key(&format!("relay-{number}"))).collect();
        let written = busy(&pace, keys.clone(), 120).await;
        let total: u32 = written.values().sum();
        assert!(total <= 50 * 120, "{total} writes in 120 s");
        assert!(total >= 39 * 120, "the budget is used: {total}");
        assert_eq!(written.len(), keys.len(), "everybody was written");
        let (least, most) = (written.values().min(), written.values().max());
        assert!(most.zip(least).is_some_and(|(most, least)| most - least <= 1), "{least:?} {most:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn answers_come_first_then_conditions_then_progress_then_numbers() {
        let pace = StatusPace::default();
        let mut number = 0;
        while pace.enter(&key(&format!("first-{number}")), News::Numbers, Instant::now()).is_ok() {
            number += 1;
        }
        let now = Instant::now();
        assert_eq!(pace.enter(&key("numbers"), News::Numbers, now), Err(Wait::Turn));
        assert_eq!(pace.enter(&key("progress"), News::Progress, now), Err(Wait::Turn));
        assert_eq!(pace.enter(&key("condition"), News::Condition, now), Err(Wait::Turn));
        assert_eq!(pace.enter(&key("answer"), News::Answer, now), Err(Wait::Turn));
        // a condition that moves while numbers wait gets the better place
        assert_eq!(pace.enter(&key("both"), News::Numbers, now), Err(Wait::Turn));
        assert_eq!(pace.enter(&key("both"), News::Condition, now), Err(Wait::Turn));
        for expected in ["answer", "condition", "both", "progress", &format!("first-{number}"), "numbers"] {
            let (turn, news) = pace.turn().await;
            assert_eq!((turn.id.name.as_ref(), news == News::Answer), (expected, expected == "answer"));
            assert_eq!(pace.enter(&turn, News::Condition, Instant::now()), Ok(()), "{expected}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_is_not_needed_is_the_next_one_s() {
        let pace = StatusPace::default();
        let mut number = 0;
        while pace.enter(&key(&format!("first-{number}")), News::Numbers, Instant::now()).is_ok() {
            number += 1;
        }
        assert_eq!(pace.enter(&key("next"), News::Numbers, Instant::now()), Err(Wait::Turn));
        let (turn, _) = pace.turn().await;
        let at = Instant::now();
        pace.withdraw(&turn);
        assert_eq!((pace.turn().await.0, Instant::now()), (key("next"), at));
        pace.forget(&key("next"));
        assert!(tokio::time::timeout(PACE, pace.turn()).await.is_err(), "nobody waits");
    }
}
