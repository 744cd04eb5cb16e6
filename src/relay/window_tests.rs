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

const LIMITS: Limits = Limits { events: 4, bytes: 10, in_flight: 3, backoff: (SECOND, Duration::from_secs(8)) };

fn window() -> Window<Row, u32> {
    Window::new(LIMITS)
}

fn sent(window: &mut Window<Row, u32>) -> Vec<(Ticket, &'static str)> {
    let mut sent = Vec::new();
    while let Some((ticket, row)) = window.take() {
        sent.push((ticket, row.1));
    }
    sent
}

#[test]
fn a_key_has_one_event_on_the_way() {
    let mut window = window();
    for row in [Row(1, "a1"), Row(1, "a2"), Row(2, "b1")] {
        window.admit(row);
    }
    let first = sent(&mut window);
    assert_eq!(first.iter().map(|&(_, name)| name).collect::<Vec<_>>(), ["a1", "b1"]);
    assert_eq!(window.acknowledged(first[0].0), Some(Row(1, "a1")));
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
    window.acknowledged(tickets[1].0);
    assert_eq!(window.passed(), None);
    window.acknowledged(tickets[0].0);
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
    window.acknowledged(tickets[1].0);
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
    assert_eq!(window.acknowledged(first), Some(Row(1, "a")));
    assert_eq!(window.acknowledged(second), None);
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
    assert_eq!(window.acknowledged(second), Some(Row(1, "a")));
}

#[test]
fn an_acknowledgement_while_waiting_counts() {
    let mut window = window();
    window.admit(Row(1, "a"));
    window.admit(Row(1, "b"));
    let (first, _) = sent(&mut window)[0];
    window.failed(first, Duration::ZERO);
    window.acknowledged(first);
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
    window.acknowledged(ticket);
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
    window.acknowledged(tickets[1].0);
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
    window.acknowledged(tickets[1].0);
    assert_eq!(window.passed(), Some(1));
    assert_eq!(window.acknowledged(tickets[0].0), Some(Row(1, "a")));
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
        window.acknowledged(ticket);
    }
    assert!(window.stretches.len() <= 2);
    assert_eq!(window.passed(), None);
    window.acknowledged(first);
    assert_eq!(window.passed(), Some(999));
}
