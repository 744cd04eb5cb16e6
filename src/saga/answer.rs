//! Classifies a participant's answer: success, definite failure, or unknown.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::domain::saga::state::{Event, Json, Phase};

/// A longer reply is discarded.
pub(super) const MAX_REPLY: usize = 64 * 1024;
/// A longer error text is truncated.
const MAX_TEXT: usize = 1024;
/// A longer failure code is truncated.
const MAX_CODE: usize = 128;

/// The HTTP response.
#[derive(Debug)]
pub(super) struct Raw {
    pub status: u16,
    /// `None`: longer than [`MAX_REPLY`].
    pub body: Option<Bytes>,
    pub location: Option<String>,
    pub retry_after: Option<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    Success(Option<Json>),
    Failure { code: String, message: String },
    Unknown { message: String, retry_after_ms: Option<u64> },
}

impl Answer {
    /// The event for an instance whose call (`at`, `attempt`) got this answer.
    pub(super) fn into_event(self, at: Phase, attempt: u32) -> Event {
        match self {
            Self::Success(reply) => Event::Succeeded { at, attempt, reply },
            Self::Failure { code, message } => Event::Failed { at, attempt, code, message },
            Self::Unknown { message, retry_after_ms } => Event::Unknown { at, attempt, message, retry_after_ms },
        }
    }

    /// The label for metrics.
    pub(super) fn outcome(&self) -> &'static str {
        match self {
            Self::Success(_) => "success",
            Self::Failure { .. } => "failure",
            Self::Unknown { .. } => "unknown",
        }
    }
}

pub(super) fn unknown(message: &str, retry_after_ms: Option<u64>) -> Answer {
    Answer::Unknown { message: cut(message, MAX_TEXT), retry_after_ms }
}

pub(super) fn failure(code: &str, message: &str) -> Answer {
    Answer::Failure { code: cut(code, MAX_CODE), message: cut(message, MAX_TEXT) }
}

/// 2xx is success; 4xx except 408, 425 and 429 is a definite failure; everything else is unknown.
pub(super) fn classify(raw: Raw) -> Answer {
    let Raw { status, body, location: _, retry_after } = raw;
    match status {
        200..=201 | 203..=299 => Answer::Success(body.as_deref().and_then(reply)),
        202 => unknown("the service answered 202 without a Location to poll", None),
        408 | 425 | 429 | 500..=599 => unknown_status(status, body.as_deref(), retry_after.as_deref()),
        400..=499 => {
            let problem = body.as_deref().map(Problem::read).unwrap_or_default();
            let code = problem.code().unwrap_or_else(|| format!("HTTP_{status}"));
            failure(&code, problem.text().unwrap_or(&format!("HTTP {status}")))
        }
        _ => unknown(&format!("HTTP {status} is not a valid answer to a command"), None),
    }
}

/// Classifies the answer from the `Location` of a 202. The command was accepted by then, so only a statement about the
/// command itself, 409 or 422, is a definite failure. Any other 4xx means that the poll failed (the service forgot the
/// job, or moved it); the command's outcome is unknown.
pub(super) fn classify_accepted(raw: Raw) -> Answer {
    match raw.status {
        409 | 422 => classify(raw),
        400..=499 => unknown_status(raw.status, raw.body.as_deref(), raw.retry_after.as_deref()),
        _ => classify(raw),
    }
}

fn unknown_status(status: u16, body: Option<&[u8]>, retry_after: Option<&str>) -> Answer {
    let problem = body.map(Problem::read).unwrap_or_default();
    let text = problem.text().map_or_else(String::new, |text| format!(": {text}"));
    unknown(&format!("HTTP {status}{text}"), retry_after.and_then(retry_after_ms))
}

/// A reply that is not JSON, or too long, is discarded: the step has succeeded all the same.
fn reply(body: &[u8]) -> Option<Json> {
    if body.is_empty() {
        return None;
    }
    serde_json::from_slice::<Box<RawValue>>(body).ok().map(Json::from)
}

/// Parses seconds. The other form, a date, is not supported: services that want to be retried soon do not use it.
fn retry_after_ms(value: &str) -> Option<u64> {
    value.trim().parse::<u64>().ok().map(|seconds| seconds.saturating_mul(1_000))
}

/// The fields of an RFC 9457 document that are used.
#[derive(Debug, Default, Deserialize)]
struct Problem {
    #[serde(rename = "type")]
    kind: Option<String>,
    title: Option<String>,
    detail: Option<String>,
}

impl Problem {
    fn read(body: &[u8]) -> Self {
        serde_json::from_slice(body).unwrap_or_default()
    }

    /// The last segment of `type`: `CreditLimitExceeded` of `https://customers/problems/CreditLimitExceeded`.
    fn code(&self) -> Option<String> {
        let last = self.kind.as_deref()?.trim_end_matches('/').rsplit(['/', '#', ':']).next()?;
        (!last.is_empty() && last != "blank").then(|| last.to_owned())
    }

    fn text(&self) -> Option<&str> {
        self.detail.as_deref().or(self.title.as_deref()).filter(|text| !text.is_empty())
    }
}

/// At most `max` bytes, without control characters.
fn cut(text: &str, max: usize) -> String {
    let mut end = text.len().min(max);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(status: u16, body: &str) -> Raw {
        Raw { status, body: Some(Bytes::from(body.to_owned())), location: None, retry_after: Some("3".into()) }
    }

    #[test]
    fn an_answer_is_success_failure_or_unknown() {
        for status in [200, 201, 204] {
            assert!(matches!(classify(raw(status, "")), Answer::Success(None)), "{status}");
        }
        for status in [400, 401, 404, 409, 410, 422] {
            assert_eq!(classify(raw(status, "")).outcome(), "failure", "{status}");
        }
        for status in [202, 301, 302, 408, 425, 429, 500, 502, 503, 504] {
            assert_eq!(classify(raw(status, "")).outcome(), "unknown", "{status}");
        }
    }

    #[test]
    fn once_accepted_a_command_fails_only_by_409_and_422() {
        for status in [409, 422] {
            assert_eq!(classify_accepted(raw(status, "")).outcome(), "failure", "{status}");
        }
        for status in [400, 401, 403, 404, 405, 408, 410, 429, 500, 503] {
            assert_eq!(classify_accepted(raw(status, "")).outcome(), "unknown", "{status}");
        }
        assert_eq!(classify_accepted(raw(200, "")), Answer::Success(None));
    }

    #[test]
    fn a_problem_document_names_the_failure() {
        let body = r#"{"type": "https://customers/problems/CreditLimitExceeded", "title": "t", "detail": "120 > 100"}"#;
        assert_eq!(classify(raw(409, body)), failure("CreditLimitExceeded", "120 > 100"));
        assert_eq!(
            classify(raw(422, r#"{"type": "about:blank", "title": "Unprocessable"}"#)),
            failure("HTTP_422", "Unprocessable")
        );
        assert_eq!(classify(raw(409, "<html>")), failure("HTTP_409", "HTTP 409"));
    }

    #[test]
    fn a_reply_is_the_json_of_a_success() {
        let Answer::Success(Some(json)) = classify(raw(200, r#"{"id": 1}"#)) else { panic!() };
        assert_eq!(json.as_str(), r#"{"id": 1}"#);
        assert_eq!(classify(raw(200, "fine")), Answer::Success(None));
        let long = Raw { status: 200, body: None, location: None, retry_after: None };
        assert_eq!(classify(long), Answer::Success(None));
    }

    #[test]
    fn texts_are_bounded_and_retry_after_is_read() {
        let long = "ü".repeat(5_000);
        let Answer::Unknown { message, retry_after_ms } = classify(raw(503, &format!(r#"{{"detail": "{long}"}}"#)))
        else {
            panic!()
        };
        assert!(message.len() <= MAX_TEXT);
        assert_eq!(retry_after_ms, Some(3_000));
    }
}
