//! Checks the relay's promise: no event lost, none reordered within its aggregate, duplicates under the same id, none
//! that was rolled back.
//!
//! A writer numbers the events of each aggregate 1, 2, 3, … in the transaction that writes them (a counter in the
//! aggregate's row), and puts the number into the payload as `n`. The committed counters are the truth, even when the
//! writer does not know whether its commit succeeded.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

/// An event as a consumer receives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Delivered {
    pub id: String,
    pub aggregate: String,
    /// The number that the writer gave it.
    pub number: u64,
    /// The CloudEvents attribute `sequence`.
    pub sequence: String,
}

/// The result; everything except `duplicates` must be zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub events: u64,
    pub lost: u64,
    /// First deliveries that came after one with a higher number of the same aggregate.
    pub reordered: u64,
    /// Deliveries of a number that was never committed.
    pub phantoms: u64,
    /// Deliveries of a number under another id than that of its first delivery.
    pub renamed: u64,
    /// First deliveries of an aggregate whose `sequence` is not above the one before.
    pub unsorted: u64,
    pub duplicates: u64,
    /// The first few violations.
    pub examples: Vec<String>,
}

impl Verdict {
    pub fn is_kept(&self) -> bool {
        self.lost == 0 && self.reordered == 0 && self.phantoms == 0 && self.renamed == 0 && self.unsorted == 0
    }

    fn example(&mut self, text: String) {
        if self.examples.len() < 10 {
            self.examples.push(text);
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { events, lost, reordered, phantoms, renamed, unsorted, duplicates, examples } = self;
        write!(
            f,
            "{events} events: lost={lost} reordered={reordered} phantoms={phantoms} renamed={renamed} unsorted={unsorted} duplicates={duplicates} {examples:?}"
        )
    }
}

/// Judges what was delivered against the committed counters (aggregate → the number of its last event).
pub fn check(committed: &BTreeMap<String, u64>, delivered: &[Delivered]) -> Verdict {
    let mut verdict = Verdict { events: committed.values().sum(), ..Verdict::default() };
    let mut seen: HashMap<&str, HashMap<u64, &str>> = HashMap::new();
    let mut last: HashMap<&str, (u64, &str)> = HashMap::new();
    for event in delivered {
        let Delivered { id, aggregate, number, sequence } = event;
        let of_aggregate = seen.entry(aggregate).or_default();
        if let Some(first) = of_aggregate.get(number) {
            verdict.duplicates += 1;
            if first != id {
                verdict.renamed += 1;
                verdict.example(format!("{aggregate} {number} came as {first} and as {id}"));
            }
            continue;
        }
        of_aggregate.insert(*number, id);
        if !(1..=committed.get(aggregate).copied().unwrap_or_default()).contains(number) {
            verdict.phantoms += 1;
            verdict.example(format!("{aggregate} {number} was never committed"));
            continue;
        }
        let &mut (highest, before) = last.entry(aggregate).or_insert((0, ""));
        if *number < highest {
            verdict.reordered += 1;
            verdict.example(format!("{aggregate} {number} came after {highest}"));
        } else {
            if sequence.as_str() <= before {
                verdict.unsorted += 1;
                verdict.example(format!("{aggregate} {number} has the sequence {sequence}, the one before {before}"));
            }
            last.insert(aggregate, (*number, sequence));
        }
    }
    for (aggregate, &count) in committed {
        let delivered = seen.get(aggregate.as_str());
        for number in 1..=count {
            if !delivered.is_some_and(|numbers| numbers.contains_key(&number)) {
                verdict.lost += 1;
                verdict.example(format!("{aggregate} {number} of {count} was never delivered"));
            }
        }
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delivered(numbers: &[(u64, &str)]) -> Vec<Delivered> {
        let event = |(index, &(number, id)): (usize, &(u64, &str))| Delivered {
            id: id.to_owned(),
            aggregate: "a".to_owned(),
            number,
            sequence: format!("{index:08}"),
        };
        numbers.iter().enumerate().map(event).collect()
    }

    fn verdict(count: u64, numbers: &[(u64, &str)]) -> Verdict {
        check(&BTreeMap::from([("a".to_owned(), count)]), &delivered(numbers))
    }

    #[test]
    fn the_checker_detects_each_way_to_break_the_promise() {
        assert!(verdict(2, &[(1, "x"), (2, "y")]).is_kept());
        assert!(verdict(2, &[(1, "x"), (2, "y"), (1, "x"), (2, "y")]).is_kept(), "duplicates are allowed");
        assert_eq!(verdict(2, &[(1, "x"), (1, "x"), (2, "y")]).duplicates, 1);
        assert_eq!(verdict(3, &[(1, "x"), (3, "y")]).lost, 1);
        assert_eq!(verdict(2, &[(2, "y"), (1, "x")]).reordered, 1);
        assert_eq!(verdict(1, &[(1, "x"), (2, "y")]).phantoms, 1);
        assert_eq!(verdict(1, &[(1, "x"), (1, "z")]).renamed, 1);
        let mut backwards = delivered(&[(1, "x"), (2, "y")]);
        backwards[1].sequence = "0".to_owned();
        assert_eq!(check(&BTreeMap::from([("a".to_owned(), 2)]), &backwards).unsorted, 1);
    }
}
