//! A row of `weft.choreography`: what is stored of one correlation, and what a change of it means for the counts. Pure.

use std::collections::BTreeMap;

use jiff::Timestamp;
use uuid::Uuid;

use crate::domain::{
    choreography::{
        assessment::{Assessment, Finding, Graph, assess},
        definition::Kind,
        instance::Instance,
    },
    saga::state::Status,
};

/// `state` of a row whose start has not been seen.
pub(super) const WAITING: &str = "Waiting";

#[derive(Clone, Debug)]
pub(super) struct Row {
    pub bucket: i32,
    pub id: Uuid,
    pub saga: String,
    /// Of the definition that the instance started with; empty while its start has not been seen.
    pub version: String,
    pub correlation: String,
    pub started_at: Timestamp,
    pub ended_at: Option<Timestamp>,
    /// `None` while it runs; [`WAITING`], or the [`Status`] in which it ended.
    pub state: Option<String>,
    pub compensating: bool,
    pub stuck_since: Option<Timestamp>,
    pub due_at: Option<Timestamp>,
    pub instance: Instance,
}

/// A finding, the event's kind and its cause's.
pub(super) type FindingKey = (Finding, Kind, Option<Kind>);

/// The part of a row that is counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub running: i64,
    pub compensating: i64,
    pub stuck: i64,
    pub completed: i64,
    pub compensated: i64,
    pub findings: BTreeMap<FindingKey, i64>,
}

impl Counted {
    pub(super) fn add(&mut self, other: &Self, factor: i64) {
        self.running += factor * other.running;
        self.compensating += factor * other.compensating;
        self.stuck += factor * other.stuck;
        self.completed += factor * other.completed;
        self.compensated += factor * other.compensated;
        for (key, count) in &other.findings {
            *self.findings.entry(key.clone()).or_default() += factor * count;
        }
        self.findings.retain(|_, count| *count != 0);
    }
}

impl Row {
    pub(super) fn new(bucket: i32, id: Uuid, saga: &str, correlation: &str, now: Timestamp) -> Self {
        Self {
            bucket,
            id,
            saga: saga.to_owned(),
            version: String::new(),
            correlation: correlation.to_owned(),
            started_at: now,
            ended_at: None,
            state: Some(WAITING.to_owned()),
            compensating: false,
            stuck_since: None,
            due_at: None,
            instance: Instance::default(),
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.state.as_deref() == Some(WAITING)
    }

    /// Computes everything from the events. `read_until`: all events up to then have been read, so that what is due earlier is
    /// overdue; `None` when that is not known.
    pub(super) fn refresh(&mut self, graph: &Graph, read_until: Option<Timestamp>) {
        let assessment = assess(graph, &self.instance);
        let Some(started_at) = assessment.started_at else { return };
        if self.is_waiting() {
            self.version.clone_from(&graph.definition.version);
        }
        self.started_at = timestamp(started_at);
        self.compensating = assessment.compensating;
        self.state = assessment.end.map(|end| end.status.as_str().to_owned());
        self.ended_at = assessment.end.map(|end| timestamp(end.at));
        // what was found to be overdue before stays so until it is there
        let found = self.stuck_since.map(|since| since.as_millisecond().saturating_add(1));
        let now = read_until.map(Timestamp::as_millisecond).max(found).unwrap_or(i64::MIN);
        self.stuck_since = assessment.overdue(now).map(|owed| timestamp(owed.due)).min();
        self.due_at = assessment.owed.iter().filter(|owed| owed.due >= now).map(|owed| timestamp(owed.due)).min();
    }

    pub(super) fn status(&self) -> Status {
        let ended = self.state.as_deref().and_then(Status::parse);
        match (ended, self.stuck_since, self.compensating) {
            (Some(ended), _, _) => ended,
            (None, Some(_), _) => Status::Stuck,
            (None, None, true) => Status::Compensating,
            (None, None, false) => Status::Running,
        }
    }

    /// What a row counts; nothing while its start has not been seen.
    pub(super) fn counted(&self, graph: &Graph) -> Counted {
        if self.is_waiting() {
            return Counted::default();
        }
        let mut counted = Counted::default();
        match self.state.as_deref().and_then(Status::parse) {
            Some(Status::Completed) => counted.completed = 1,
            Some(Status::Compensated) => counted.compensated = 1,
            _ => {
                counted.running = 1;
                counted.compensating = i64::from(self.compensating);
                counted.stuck = i64::from(self.stuck_since.is_some());
            }
        }
        let assessment = assess(graph, &self.instance);
        for (finding, event, cause) in assessment.findings(&self.instance) {
            *counted.findings.entry((finding, event.kind.clone(), cause.map(|c| c.kind.clone()))).or_default() += 1;
        }
        counted
    }

    /// One sentence: who owes what to what since when, of what is overdue; of everything that is owed, when nothing is.
    pub(super) fn owes(&self, graph: &Graph, assessment: &Assessment) -> Vec<String> {
        let definition = &graph.definition;
        let sentence = |owed: &crate::domain::choreography::assessment::Owed| {
            let reaction = definition.reactions.get(owed.reaction)?;
            let to = &self.instance.events().get(owed.to)?.kind.event;
            let (since, within) = (timestamp(owed.since), duration(reaction.within_ms));
            let emits = reaction.emits.join(" or ");
            Some(format!(
                "{} owes {emits} to {to} since {}, within {within}",
                reaction.service,
                since.strftime("%H:%M:%S UTC")
            ))
        };
        assessment.owed.iter().filter_map(sentence).collect()
    }
}

pub(super) fn timestamp(milliseconds: i64) -> Timestamp {
    Timestamp::from_millisecond(milliseconds).unwrap_or_default()
}

/// `5s`, `1h`, `90s`, `1500ms`.
pub(super) fn duration(milliseconds: u64) -> String {
    for (unit, name) in [(3_600_000, "h"), (60_000, "m"), (1_000, "s")] {
        if milliseconds >= unit && milliseconds.is_multiple_of(unit) {
            return format!("{}{name}", milliseconds / unit);
        }
    }
    format!("{milliseconds}ms")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::choreography::{
        definition::{Definition, Reaction},
        instance::Seen,
    };

    fn graph() -> Graph {
        let created = Kind::new("orders", "OrderCreated");
        Graph::new(
            Definition {
                name: "create-order".to_owned(),
                start: created.clone(),
                reactions: vec![Reaction {
                    to: created,
                    and: Vec::new(),
                    service: "customers".to_owned(),
                    emits: vec!["CreditReserved".to_owned(), "CreditLimitExceeded".to_owned()],
                    within_ms: 5_000,
                }],
                completes: vec![Kind::new("customers", "CreditReserved")],
                compensates: vec![Kind::new("customers", "CreditLimitExceeded")],
                ..Definition::default()
            }
            .seal(),
        )
    }

    fn seen(service: &str, event: &str, cause: Option<&str>, at: i64) -> Seen {
        let cause = cause.map(ToOwned::to_owned);
        Seen { kind: Kind::new(service, event), id: event.to_owned(), cause, at }
    }

    #[test]
    fn an_instance_is_stuck_only_once_everything_was_read_up_to_the_time_that_is_over() {
        let (graph, mut row) = (graph(), Row::new(1, Uuid::nil(), "create-order", "c", Timestamp::UNIX_EPOCH));
        row.instance.observe(seen("orders", "OrderCreated", None, 43_440_000));
        row.refresh(&graph, None);
        assert_eq!((row.status(), row.due_at), (Status::Running, Some(timestamp(43_445_000))));
        row.refresh(&graph, Some(timestamp(43_445_000)));
        assert_eq!(row.status(), Status::Running);
        row.refresh(&graph, Some(timestamp(43_445_001)));
        assert_eq!((row.status(), row.due_at), (Status::Stuck, None));
        let assessment = assess(&graph, &row.instance);
        assert_eq!(
            row.owes(&graph, &assessment),
            ["customers owes CreditReserved or CreditLimitExceeded to OrderCreated since 12:04:00 UTC, within 5s"]
        );
        row.refresh(&graph, None);
        assert_eq!(row.status(), Status::Stuck, "a tracker that has just started does not know better");
        row.instance.observe(seen("customers", "CreditReserved", Some("OrderCreated"), 43_450_000));
        row.refresh(&graph, None);
        assert_eq!(row.status(), Status::Completed);
        let counted = row.counted(&graph);
        assert_eq!((counted.running, counted.stuck, counted.completed), (0, 0, 1));
        let late = (Finding::Late, Kind::new("customers", "CreditReserved"), Some(Kind::new("orders", "OrderCreated")));
        assert_eq!(counted.findings, [(late, 1)].into());
    }

    #[test]
    fn a_row_without_a_start_counts_nothing() {
        let (graph, mut row) = (graph(), Row::new(1, Uuid::nil(), "create-order", "c", Timestamp::UNIX_EPOCH));
        row.instance.observe(seen("customers", "Unheard", Some("OrderCreated"), 1_000));
        row.refresh(&graph, Some(Timestamp::MAX));
        assert!(row.is_waiting() && row.counted(&graph) == Counted::default());
        row.instance.observe(seen("orders", "OrderCreated", None, 500));
        row.refresh(&graph, None);
        assert_eq!((row.status(), row.counted(&graph).findings.len()), (Status::Running, 1));
        assert_eq!(row.version, graph.definition.version);
    }

    #[test]
    fn a_duration_is_written_as_people_do() {
        let written = [5_000, 90_000, 3_600_000, 120_000, 1_500, 0].map(duration);
        assert_eq!(written, ["5s", "90s", "1h", "2m", "1500ms", "0ms"]);
    }
}
