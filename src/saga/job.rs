//! A job that a participant has accepted: it answered 202 with a `Location` to poll (RFC 9110 §15.3.3), or 303 with the
//! `Location` of the result (§15.4.4).
//!
//! A status resource may answer 202, or 200 with a document that says how far the job is: `status` as in Azure's asynchronous
//! operations, or `done` as in Google's (AIP-151). Behind a 302 or 303 is the result, whatever its `status` is.

use std::time::Duration;

use url::{Position, Url};

use super::{
    answer::{self, Answer, Raw},
    members::{self, Members},
};
use crate::domain::saga::state::codes;

/// Shortest and longest pause between two polls, unless the participant sends `Retry-After`.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// After so many polls in a row without an answer the outcome is unknown.
const MAX_FAULTS: u32 = 5;
/// Maximum number of redirects in a row.
const MAX_REDIRECTS: u32 = 5;

/// States of a job, in lower case and without separators. Every other one is success.
const RUNNING: [&str; 12] = [
    "accepted",
    "executing",
    "inprogress",
    "notstarted",
    "pending",
    "processing",
    "queued",
    "running",
    "scheduled",
    "started",
    "submitted",
    "waiting",
];
const FAILED: [&str; 10] =
    ["aborted", "canceled", "cancelled", "error", "failed", "failure", "faulted", "rejected", "terminated", "timedout"];

#[derive(Debug)]
pub(super) struct Job {
    /// What is polled next.
    url: Url,
    is_result: bool,
    /// Time to wait before that.
    pub pause: Duration,
    backoff: Duration,
    /// Polls in a row without an answer.
    faults: u32,
    redirects: u32,
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Running,
    Done,
    Failed,
}

impl Job {
    /// The job that the answer to a command at `url` is about; `None` when that answer is the outcome. An error is the
    /// outcome when the job cannot be polled.
    pub(super) fn accepted(service: &str, url: &str, raw: &Raw) -> Option<Result<Self, Answer>> {
        if !matches!(raw.status, 202 | 303) {
            return None;
        }
        let (location, url) = (raw.location.as_deref()?, Url::parse(url).ok()?);
        let mut job = Self { url, is_result: false, pause: Duration::ZERO, backoff: PAUSE.0, faults: 0, redirects: 0 };
        Some(job.follow(service, raw, location).map_or(Ok(job), Err))
    }

    pub(super) fn path_and_query(&self) -> &str {
        &self.url[Position::BeforePath..Position::AfterQuery]
    }

    /// Handles the answer to a poll, or the reason why there is none. `None`: poll again after the pause.
    pub(super) fn polled(&mut self, service: &str, received: Result<Raw, String>) -> Option<Answer> {
        let raw = match received {
            Ok(raw) if !matches!(raw.status, 408 | 425 | 429 | 500..) => raw,
            fault => {
                self.faults += 1;
                let retry_after = fault.as_ref().ok().and_then(|raw| raw.retry_after);
                if self.faults < MAX_FAULTS {
                    return self.wait(retry_after);
                }
                return Some(match fault {
                    Ok(raw) => answer::classify(service, raw, true),
                    Err(why) => answer::unknown(&why, None),
                });
            }
        };
        self.faults = 0;
        match (raw.status, raw.location.as_deref()) {
            (202 | 301..=303 | 307..=308, Some(location)) => self.follow(service, &raw, location),
            (202, None) => self.wait(raw.retry_after),
            (200..=299, _) if !self.is_result => match progress(&raw) {
                Progress::Running => self.wait(raw.retry_after),
                Progress::Done => Some(answer::classify(service, raw, true)),
                Progress::Failed => {
                    Some(answer::definite(&raw, codes::JOB, &format!("{service} reported that its job failed")))
                }
            },
            _ => Some(answer::classify(service, raw, true)),
        }
    }

    fn wait(&mut self, retry_after: Option<Duration>) -> Option<Answer> {
        self.redirects = 0;
        self.pause = retry_after.unwrap_or(self.backoff).max(PAUSE.0);
        self.backoff = (self.backoff * 2).min(PAUSE.1);
        None
    }

    /// `location` is resolved against the address that answered (RFC 9110 §10.2.2). Only the service itself is asked: another
    /// address could be anything that this pod reaches.
    fn follow(&mut self, service: &str, raw: &Raw, location: &str) -> Option<Answer> {
        let status = raw.status;
        let target = self.url.join(location.trim()).ok();
        let Some(target) = target.filter(|target| target.origin() == self.url.origin()) else {
            let own = self.url.origin().ascii_serialization();
            let message =
                format!("{service} answered HTTP {status} with a Location that is not on {own}, and is not asked");
            return Some(answer::unknown(&message, Some(location)));
        };
        self.url = target;
        if status == 202 {
            return self.wait(raw.retry_after);
        }
        self.redirects += 1;
        if self.redirects > MAX_REDIRECTS {
            return Some(answer::unknown(&format!("{service} redirected more than {MAX_REDIRECTS} times"), None));
        }
        self.is_result |= matches!(status, 302 | 303);
        self.pause = Duration::ZERO;
        None
    }
}

fn progress(raw: &Raw) -> Progress {
    let body = members::text(&raw.body);
    let Some(members) = Members::of(&body) else { return Progress::Done };
    match members.boolean("done") {
        Some(false) => return Progress::Running,
        Some(true) if members.object("error").is_some() => return Progress::Failed,
        Some(true) => return Progress::Done,
        None => {}
    }
    let words = ["status", "state"].map(|name| members::letters(&members.string(name).unwrap_or_default()));
    let any_of = |states: &[&str]| words.iter().any(|word| states.contains(&word.as_str()));
    if any_of(&FAILED) {
        Progress::Failed
    } else if any_of(&RUNNING) {
        Progress::Running
    } else {
        Progress::Done
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    const COMMAND: &str = "http://orders.shop.svc:80/commands/reserve?x=1";

    fn raw(status: u16, location: &str, body: &str) -> Raw {
        let location = (!location.is_empty()).then(|| location.to_owned());
        Raw { location, body: Bytes::from(body.to_owned()), ..Raw::new(status) }
    }

    fn accepted(status: u16, location: &str) -> Result<Job, Answer> {
        Job::accepted("orders", COMMAND, &raw(status, location, "")).unwrap()
    }

    fn job() -> Job {
        accepted(202, "7/status").unwrap()
    }

    fn polled(job: &mut Job, status: u16, location: &str, body: &str) -> Option<Answer> {
        job.polled("orders", Ok(raw(status, location, body)))
    }

    #[test]
    fn a_location_is_resolved_against_the_address_that_answered() {
        for (location, path) in [
            ("/jobs/7?x=1#top", "/jobs/7?x=1"),
            ("7/status", "/commands/7/status"),
            ("../jobs/7", "/jobs/7"),
            ("?job=7", "/commands/reserve?job=7"),
            ("//orders.shop.svc/jobs/7", "/jobs/7"),
            ("http://orders.shop.svc/jobs/7", "/jobs/7"),
            ("HTTP://ORDERS.shop.svc:80/jobs/7", "/jobs/7"),
            ("http://orders.shop.svc", "/"),
            (" /jobs/a b", "/jobs/a%20b"),
        ] {
            assert_eq!(accepted(202, location).unwrap().path_and_query(), path, "{location}");
        }
        // the next one is relative to the status resource
        let mut job = job();
        assert_eq!(polled(&mut job, 202, "again", ""), None);
        assert_eq!(job.path_and_query(), "/commands/7/again");
        assert_eq!(polled(&mut job, 303, "result", ""), None);
        assert_eq!(job.path_and_query(), "/commands/7/result");
    }

    #[test]
    fn another_service_is_not_asked() {
        for location in [
            "http://169.254.169.254/latest",
            "http://orders.shop.svc:8080/jobs/7",
            "https://orders.shop.svc/jobs/7",
            "//payments.shop.svc/jobs/7",
            "file:///etc/passwd",
            "http://",
        ] {
            for answer in [accepted(202, location).unwrap_err(), polled(&mut job(), 303, location, "").unwrap()] {
                let Answer::Unknown { message, detail, .. } = answer else { panic!("{location}: {answer:?}") };
                assert!(message.ends_with("with a Location that is not on http://orders.shop.svc, and is not asked"));
                assert_eq!(detail.as_deref(), Some(location));
            }
        }
    }

    #[test]
    fn only_202_and_303_are_followed_after_a_command() {
        for status in [200, 201, 204, 301, 302, 307, 308, 409] {
            assert!(Job::accepted("orders", COMMAND, &raw(status, "/jobs/7", "")).is_none(), "{status}");
        }
        assert!(Job::accepted("orders", COMMAND, &raw(202, "", "")).is_none());
    }

    #[test]
    fn a_job_runs_until_its_status_says_otherwise() {
        for body in [
            r#"{"status": "running"}"#,
            r#"{"status": "Not Started", "limit": 1e400}"#,
            r#"{"state": "IN_PROGRESS"}"#,
            r#"{"status": "in-progress"}"#,
            r#"{"status": 200, "state": "queued"}"#,
            r#"{"name": "operations/7", "done": false}"#,
        ] {
            assert_eq!(polled(&mut job(), 200, "", body), None, "{body}");
        }
        for body in [
            r#"{"status": "Succeeded"}"#,
            r#"{"status": "shipped"}"#,
            r#"{"done": true, "response": {"status": "pending"}}"#,
            r#"{"id": 7}"#,
            r#"["running"]"#,
            "running",
            "",
        ] {
            assert_eq!(polled(&mut job(), 200, "", body).unwrap().outcome(), "success", "{body}");
        }
        for (body, code, message) in [
            (r#"{"status": "Failed", "error": {"code": "NoSlot", "message": "none"}}"#, "NoSlot", "none"),
            (r#"{"done": true, "error": {"code": 5, "message": "none"}}"#, "5", "none"),
            (r#"{"state": "CANCELLED"}"#, "JobFailed", "orders reported that its job failed"),
        ] {
            let Some(Answer::Failure { code: found, message: text, .. }) = polled(&mut job(), 200, "", body) else {
                panic!("{body}")
            };
            assert_eq!((found.as_str(), text.as_str()), (code, message), "{body}");
        }
    }

    #[test]
    fn behind_a_redirect_to_the_result_a_status_is_a_part_of_it() {
        let mut moved = job();
        assert_eq!(polled(&mut moved, 308, "/v2/jobs/7", ""), None);
        assert_eq!(moved.pause, Duration::ZERO);
        assert_eq!(polled(&mut moved, 200, "", r#"{"status": "running"}"#), None, "the status has moved");
        for status in [302, 303] {
            assert_eq!(polled(&mut moved, status, "/orders/7", ""), None);
            let order = r#"{"status": "pending"}"#;
            assert_eq!(polled(&mut moved, 200, "", order).unwrap().outcome(), "success", "{status}");
        }
        let mut result = accepted(303, "/orders/7").unwrap();
        assert_eq!(polled(&mut result, 202, "", ""), None);
        assert_eq!(polled(&mut result, 200, "", r#"{"status": "failed"}"#).unwrap().outcome(), "success");
        assert_eq!(polled(&mut accepted(303, "/orders/7").unwrap(), 409, "", "").unwrap().outcome(), "failure");
    }

    #[test]
    fn redirects_and_faults_are_bounded() {
        let mut circle = job();
        let answers = (0..=MAX_REDIRECTS).map(|_| polled(&mut circle, 303, "/a", "")).collect::<Vec<_>>();
        assert!(answers.iter().rev().skip(1).all(Option::is_none), "{answers:?}");
        assert_eq!(answers.last().unwrap().as_ref().unwrap().outcome(), "unknown");

        let mut faulty = job();
        for _ in 0..3 {
            for _ in 1..MAX_FAULTS {
                assert_eq!(polled(&mut faulty, 503, "", ""), None);
            }
            assert_eq!(polled(&mut faulty, 202, "", ""), None);
        }
        for _ in 1..MAX_FAULTS {
            assert_eq!(faulty.polled("orders", Err("no connection".into())), None);
        }
        assert_eq!(faulty.polled("orders", Err("no connection".into())), Some(answer::unknown("no connection", None)));
        assert_eq!(polled(&mut job(), 404, "", "").unwrap().outcome(), "unknown", "the job is forgotten");
    }

    #[test]
    fn pauses_grow_and_obey_the_participant() {
        let mut job = job();
        let mut pauses = vec![job.pause.as_millis()];
        for _ in 0..6 {
            polled(&mut job, 202, "", "");
            pauses.push(job.pause.as_millis());
        }
        assert_eq!(pauses, [100, 200, 400, 800, 1600, 2000, 2000]);
        for (status, seconds) in [(202, 30), (200, 7), (429, 9)] {
            let retry_after = Some(Duration::from_secs(seconds));
            let raw = Raw { retry_after, ..raw(status, "", r#"{"status": "running"}"#) };
            assert_eq!(job.polled("orders", Ok(raw)), None);
            assert_eq!(job.pause.as_secs(), seconds, "{status}");
        }
        job.polled("orders", Ok(Raw { retry_after: Some(Duration::ZERO), ..raw(202, "", "") }));
        assert_eq!(job.pause, PAUSE.0);
    }
}
