//! Every message that the data plane reports in its status, in one table: what a person reads in conditions.

#![allow(clippy::unwrap_used, reason = "these are tests")]

#[path = "support/problems.rs"]
mod problems;

use std::collections::BTreeSet;

#[test]
fn every_problem_has_an_example() {
    let relay: BTreeSet<_> = problems::relay().iter().map(problems::relay_variant).collect();
    assert_eq!(relay, (0..problems::RELAY_VARIANTS).collect());
    let inbox: BTreeSet<_> = problems::inbox().iter().map(problems::inbox_variant).collect();
    assert_eq!(inbox, (0..problems::INBOX_VARIANTS).collect());
    let saga: BTreeSet<_> = problems::saga().iter().map(problems::saga_variant).collect();
    assert_eq!(saga, (0..problems::SAGA_VARIANTS).collect());
}

#[test]
fn every_message_of_the_data_plane() {
    let relay = problems::relay().into_iter().map(|problem| format!("relay  {}: {problem}", problem.reason()));
    let saga = problems::saga().into_iter().map(|problem| format!("saga   {}: {problem}", problem.reason()));
    let inbox = problems::inbox().into_iter().map(|problem| format!("inbox  {}: {problem}", problem.reason()));
    insta::assert_snapshot!(relay.chain(inbox).chain(saga).collect::<Vec<_>>().join("\n"));
}

#[test]
fn no_message_has_a_word_twice_in_a_row_or_a_wrong_plural() {
    let relay = problems::relay().into_iter().map(|problem| problem.to_string());
    let relay = relay.chain(problems::inbox().into_iter().map(|problem| problem.to_string()));
    for message in relay.chain(problems::saga().into_iter().map(|problem| problem.to_string())) {
        let words: Vec<_> = message.split_whitespace().collect();
        assert!(words.windows(2).all(|pair| pair.first() != pair.last()), "{message}");
        assert!(!message.contains(" 1 events") && !message.ends_with('.'), "{message}");
    }
}
