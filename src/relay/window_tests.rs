use super::*;

#[derive(Clone, Debug, PartialEq, Eq)]
struct Row(u64, &'static str);

impl Entry for Row {
    fn key(&self) -> u64 {
        self.0
    }

    fn size(&self) -> usize {
        self.1.len()
    }
}

const SECOND: Duration = Duration::from_secs(1);

const LIMITS: Limits =
    Limits { events: 4, bytes: 10, in_flight: 3, shortest_run: 2, backoff: (SECOND, Duration::from_secs(8)) };

fn window() -> Window<Row, u32> {
    Window::new(LIMITS)
}

fn sent(window: &mut Window<Row, u32>) -> Vec<(Ticket, &'static str)> {
    let mut sent = Vec::new();
    while let Some((ticket, row)) = window.take(1) {
        sent.push((ticket, row.1));
    }
    sent
}

fn acknowledged(window: &mut Window<Row, u32>, ticket: Ticket) -> Option<Row> {
    let mut events = Vec::new();
    window.acknowledged(ticket, &mut events);
    assert!(events.len() <= 1);
    events.pop()
}

#[test]
fn a_key_has_one_event_on_the_way() {
    let mut window = window();
    for row in [Row(1, "a1"), Row(1, "a2"), Row(2, "b1")] {
        window.admit(row);
    }
    let first = sent(&mut window);
    assert_eq!(first.iter().map(|&(_, name)| name).collect::<Vec<_>>(), ["a1", "b1"]);
    assert_eq!(acknowledged(&mut window, first[0].0), Some(Row(1, "a1")));
    assert_eq!(sent(&mut window)[0].1, "a2");
}

#[test]
fn a_mark_is_passed_when_all_before_it_is_acknowledged() {
    let mut window = window();
    window.admit(Row(1, "a"));
    window.mark(1);
    window.admit(Row(2, "b"));
    window.mark(2);
    let tickets = sent(&mut window);
    acknowledged(&mut window, tickets[1].0);
    assert_eq!(window.passed(), None);
    acknowledged(&mut window, tickets[0].0);
    assert_eq!(window.passed(), Some(2));
    window.mark(3);
    assert_eq!(window.passed(), Some(3), "nothing is before it");
}

#[test]
fn a_failure_holds_its_key_and_no_other() {
    let mut window = window();
    for row in [Row(1, "a1"), Row(2, "b1"), Row(1, "a2"), Row(2, "b2")] {
        window.admit(row);
    }
    let tickets = sent(&mut window);
    window.failed(tickets[0].0, Duration::ZERO);
    acknowledged(&mut window, tickets[1].0);
    assert_eq!(sent(&mut window).iter().map(|&(_, name)| name).collect::<Vec<_>>(), ["b2"]);
    assert_eq!(window.wake(Duration::ZERO), Some(SECOND));
    assert_eq!(window.wake(SECOND), None);
    assert_eq!(sent(&mut window)[0].1, "a1");
}

#[test]
fn waits_grow_to_the_longest() {
    let mut window = window();
    window.admit(Row(1, "a"));
    let mut now = Duration::ZERO;
    let mut waits = Vec::new();
    for _ in 0..6 {
        let (ticket, _) = sent(&mut window)[0];
        window.failed(ticket, now);
        let until = window.wake(now).unwrap();
        waits.push(until.saturating_sub(now).as_secs());
        now = until;
        window.wake(now);
    }
    assert_eq!(waits, [1, 2, 4, 8, 8, 8]);
}

#[test]
fn a_late_acknowledgement_of_an_earlier_attempt_counts() {
    let mut window = window();
    window.admit(Row(1, "a"));
    let (first, _) = sent(&mut window)[0];
    window.connection_lost();
    let (second, _) = sent(&mut window)[0];
    assert_ne!(first, second);
    assert_eq!(acknowledged(&mut window, first), Some(Row(1, "a")));
    assert_eq!(acknowledged(&mut window, second), None);
    assert_eq!(window.in_flight(), 0);
}

#[test]
fn a_late_failure_of_an_earlier_attempt_counts_nothing() {
    let mut window = window();
    window.admit(Row(1, "a"));
    let (first, _) = sent(&mut window)[0];
    window.connection_lost();
    let (second, _) = sent(&mut window)[0];
    window.failed(first, Duration::ZERO);
    assert_eq!(window.in_flight(), 1);
    assert_eq!(acknowledged(&mut window, second), Some(Row(1, "a")));
}

#[test]
fn an_acknowledgement_while_waiting_counts() {
    let mut window = window();
    window.admit(Row(1, "a"));
    window.admit(Row(1, "b"));
    let (first, _) = sent(&mut window)[0];
    window.failed(first, Duration::ZERO);
    acknowledged(&mut window, first);
    assert_eq!(window.wake(100 * SECOND), None);
    assert_eq!(sent(&mut window)[0].1, "b");
}

#[test]
fn a_lost_connection_sends_again_in_order() {
    let mut window = window();
    for row in [Row(1, "a"), Row(2, "b"), Row(3, "c"), Row(4, "d")] {
        window.admit(row);
    }
    assert_eq!(sent(&mut window).len(), 3, "the bound of what is on the way");
    window.connection_lost();
    assert_eq!(sent(&mut window).iter().map(|&(_, name)| name).collect::<Vec<_>>(), ["a", "b", "c"]);
}

#[test]
fn the_window_is_bounded_by_count_and_by_bytes() {
    let mut window = window();
    for _ in 0..4 {
        assert!(window.has_room());
        window.admit(Row(1, "a"));
    }
    assert!(!window.has_room(), "four events");
    let mut window = self::window();
    window.admit(Row(1, "longer than all its bytes"));
    assert!(!window.has_room(), "ten bytes");
    let (ticket, _) = sent(&mut window)[0];
    acknowledged(&mut window, ticket);
    assert!(window.has_room());
}

#[test]
fn what_is_held_leaves_the_window_with_all_behind_it_in_its_key() {
    let mut window = window();
    for row in [Row(1, "a1"), Row(2, "b1"), Row(1, "a2"), Row(1, "a3")] {
        window.admit(row);
    }
    window.mark(1);
    let tickets = sent(&mut window);
    let held: Vec<_> = window.hold(tickets[0].0).into_iter().map(|row| row.1).collect();
    assert_eq!(held, ["a1", "a2", "a3"]);
    assert_eq!(window.hold(tickets[0].0), [], "only once");
    assert_eq!(window.passed(), None, "the mark waits for b1");
    acknowledged(&mut window, tickets[1].0);
    assert_eq!(window.passed(), Some(1));
    assert!(window.is_empty());
    assert_eq!((window.in_flight(), window.bytes, window.keys.len(), window.stretches.len()), (0, 0, 0, 0));
}

#[test]
fn no_mark_waits_for_an_event_that_is_recorded_elsewhere() {
    let mut window = window();
    window.admit_recorded(Row(1, "a"));
    window.admit(Row(2, "b"));
    window.mark(1);
    let tickets = sent(&mut window);
    assert_eq!(tickets.len(), 2);
    acknowledged(&mut window, tickets[1].0);
    assert_eq!(window.passed(), Some(1));
    assert_eq!(acknowledged(&mut window, tickets[0].0), Some(Row(1, "a")));
    assert!(window.is_empty());
}

#[test]
fn marks_that_wait_for_the_same_event_are_merged() {
    let mut window = window();
    window.admit(Row(1, "a"));
    let (first, _) = sent(&mut window)[0];
    for number in 0..1000 {
        window.admit(Row(2, "b"));
        window.mark(number);
        let (ticket, _) = sent(&mut window)[0];
        acknowledged(&mut window, ticket);
    }
    assert!(window.stretches.len() <= 2);
    assert_eq!(window.passed(), None);
    acknowledged(&mut window, first);
    assert_eq!(window.passed(), Some(999));
}

const RUNS: Limits = Limits { events: 16, bytes: 100, in_flight: 5, ..LIMITS };

/// A window with `a1` to `a6`, `b1` and `b2`, and what is in flight by the first ticket of at most four events.
fn with_a_run() -> (Window<Row, u32>, Ticket) {
    let mut window = Window::new(RUNS);
    for row in ["a1", "a2", "b1", "a3", "a4", "b2", "a5", "a6"] {
        window.admit(Row(u64::from(row.starts_with('b')), row));
    }
    window.mark(1);
    let (ticket, first) = window.take(4).unwrap();
    assert_eq!(first.1, "a1");
    assert_eq!(names(window.run(ticket)), ["a1", "a2", "a3", "a4"]);
    (window, ticket)
}

fn names<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Vec<&'static str> {
    rows.into_iter().map(|row| row.1).collect()
}

fn ready(window: &mut Window<Row, u32>) -> Vec<&'static str> {
    sent(window).into_iter().map(|(_, name)| name).collect()
}

#[test]
fn a_run_is_acknowledged_as_a_whole() {
    let (mut window, ticket) = with_a_run();
    let (second, _) = window.take(4).unwrap();
    assert_eq!(names(window.run(second)), ["b1"], "one more may be in flight");
    assert!(window.take(4).is_none());
    let mut events = Vec::new();
    window.acknowledged(ticket, &mut events);
    assert_eq!(names(&events), ["a1", "a2", "a3", "a4"]);
    assert_eq!((window.in_flight(), window.passed()), (1, None));
    let (third, _) = window.take(4).unwrap();
    assert_eq!(names(window.run(third)), ["a5", "a6"]);
    for ticket in [second, third] {
        window.acknowledged(ticket, &mut events);
    }
    window.acknowledged(ticket, &mut events);
    assert_eq!((events.len(), ready(&mut window)), (7, vec!["b2"]));
}

#[test]
fn a_run_that_failed_is_sent_again_one_by_one_and_at_once() {
    for refused in [false, true] {
        let (mut window, ticket) = with_a_run();
        if refused {
            assert_eq!(window.hold(ticket), [], "one of them is at fault, and the others are not");
        } else {
            assert!(!window.failed(ticket, Duration::ZERO), "that is no failure of an event");
        }
        assert_eq!(window.in_flight(), 0);
        let (b, _) = window.take(4).unwrap();
        assert_eq!(names(window.run(b)), ["b1", "b2"], "it was ready before");
        for name in ["a1", "a2", "a3", "a4"] {
            let (ticket, row) = window.take(4).unwrap();
            assert_eq!((row.1, window.run(ticket).count()), (name, 1));
            assert!(acknowledged(&mut window, ticket).is_some());
        }
        let (ticket, _) = window.take(4).unwrap();
        assert_eq!(names(window.run(ticket)), ["a5", "a6"], "these are sent for the first time");
    }
}

#[test]
fn of_a_run_on_a_lost_connection_the_first_is_sent_alone_and_its_late_answer_is_for_no_other() {
    let (mut window, run) = with_a_run();
    window.connection_lost();
    assert_eq!((window.in_flight(), ready(&mut window)), (0, vec!["a1", "b1"]));
    let mut events = Vec::new();
    window.acknowledged(run, &mut events);
    assert_eq!((names(&events), ready(&mut window)), (vec!["a1"], vec!["a2"]));
}

#[test]
fn what_is_in_a_run_may_be_held_with_all_behind_it_after_it_was_sent_alone() {
    let (mut window, run) = with_a_run();
    window.failed(run, Duration::ZERO);
    let (b, _) = window.take(4).unwrap();
    let (a1, _) = window.take(4).unwrap();
    assert_eq!(names(&window.hold(a1)), ["a1", "a2", "a3", "a4", "a5", "a6"]);
    let mut events = Vec::new();
    window.acknowledged(b, &mut events);
    assert_eq!((names(&events), window.passed(), window.is_empty()), (vec!["b1", "b2"], Some(1), true));
}

#[test]
fn few_events_are_no_run() {
    let mut window: Window<Row, u32> = Window::new(Limits { shortest_run: 3, ..RUNS });
    window.admit(Row(1, "a1"));
    window.admit(Row(1, "a2"));
    let (ticket, _) = window.take(4).unwrap();
    assert_eq!(names(window.run(ticket)), ["a1"]);
}
