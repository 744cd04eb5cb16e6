//! Classifies a participant's answer: success, definite failure, or unknown.

use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::explanation::Explanation;
use crate::domain::saga::{
    decide::MAX_RETRY_AFTER_MS,
    event::Event,
    json,
    state::{At, Json},
};

/// What is read of a body. A longer reply is discarded; of a longer error document the first part is used.
pub(super) const MAX_BODY: usize = 64 * 1024;
/// A longer error text is truncated.
const MAX_TEXT: usize = 1024;

/// The HTTP response.
#[derive(Debug)]
pub(super) struct Raw {
    pub status: u16,
    /// At most [`MAX_BODY`] bytes.
    pub body: Bytes,
    /// Whether `body` is all of it.
    pub complete: bool,
    pub content_type: Option<String>,
    pub location: Option<String>,
    /// At most [`MAX_RETRY_AFTER_MS`].
    pub retry_after: Option<Duration>,
}

#[cfg(test)]
impl Raw {
    pub(super) fn new(status: u16) -> Self {
        let (content_type, location, retry_after) = (None, None, None);
        Self { status, body: Bytes::new(), complete: true, content_type, location, retry_after }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Answer {
    /// `note`: why the body is not the reply.
    Success { reply: Option<Json>, note: Option<String> },
    /// `message` is the participant's own text, or the status.
    /// `note`: why the code is not the participant's own.
    Failure { code: String, message: String, note: Option<String> },
    /// `message` has nothing that the participant wrote; that is in `detail`.
    Unknown { message: String, detail: Option<String>, retry_after_ms: Option<u64> },
}

impl Answer {
    /// The event for an instance whose call (`at`, `attempt`) got this answer.
    pub(super) fn into_event(self, at: At, attempt: u32) -> Event {
        match self {
            Self::Success { reply, note } => Event::Succeeded { at, attempt, reply, note },
            Self::Failure { code, message, note } => Event::Failed { at, attempt, code, message, note },
            Self::Unknown { message, detail, retry_after_ms } => {
                Event::Unknown { at, attempt, message, detail, retry_after_ms }
            }
        }
    }

    /// The label for metrics.
    pub(super) fn outcome(&self) -> &'static str {
        match self {
            Self::Success { .. } => "success",
            Self::Failure { .. } => "failure",
            Self::Unknown { .. } => "unknown",
        }
    }
}

/// `detail` is what the participant wrote.
pub(super) fn unknown(message: &str, detail: Option<&str>) -> Answer {
    let detail = detail.map(|detail| cut(detail, MAX_TEXT));
    Answer::Unknown { message: cut(message, MAX_TEXT), detail, retry_after_ms: None }
}

pub(super) fn failure(code: &str, message: &str) -> Answer {
    Answer::Failure { code: code.to_owned(), message: cut(message, MAX_TEXT), note: None }
}

/// Classifies the answer of `service`. 2xx is success; 4xx except 408, 425 and 429 is a definite failure; everything else is
/// unknown.
///
/// `doubtful`: the command may have had its effect already, because the outcome of an earlier attempt is unknown, or because
/// a 202 has accepted it. Then only a statement about the command itself, 409 or 422, is a definite failure. Any other 4xx
/// may be the answer of a proxy, or of a pod that has never reached the handler, and says nothing about the earlier attempt.
pub(super) fn classify(service: &str, raw: Raw, doubtful: bool) -> Answer {
    match raw.status {
        200..=201 | 203..=299 => success(&raw),
        status @ (202 | 303) => unknown(&format!("{service} answered HTTP {status} without a Location"), None),
        status @ 300..=399 => {
            unknown(&format!("{service} answered HTTP {status}: a command is not sent to another address"), None)
        }
        408 | 425 | 429 | 500..=599 => unknown_status(service, &raw),
        400..=408 | 410..=421 | 423..=499 if doubtful => unknown_status(service, &raw),
        400..=499 => {
            definite(&raw, &format!("HTTP_{}", raw.status), &format!("{service} answered HTTP {}", raw.status))
        }
        status => unknown(&format!("{service} answered HTTP {status}, which is not a valid answer to a command"), None),
    }
}

/// A failure with the participant's code and text; `code` and `message` are for an answer that has none.
pub(super) fn definite(raw: &Raw, code: &str, message: &str) -> Answer {
    let explanation = Explanation::of(raw);
    let message = cut(explanation.text.as_deref().unwrap_or(message), MAX_TEXT);
    match explanation.code {
        Ok(code) => Answer::Failure { code, message, note: None },
        Err(why) => {
            let note = Some(format!("the code is {code}, because the answer's body {why}"));
            Answer::Failure { code: code.to_owned(), message, note }
        }
    }
}

fn unknown_status(service: &str, raw: &Raw) -> Answer {
    Answer::Unknown {
        message: cut(&format!("{service} answered HTTP {}", raw.status), MAX_TEXT),
        detail: Explanation::of(raw).text.map(|text| cut(&text, MAX_TEXT)),
        retry_after_ms: raw.retry_after.and_then(|pause| u64::try_from(pause.as_millis()).ok()),
    }
}

/// A body that cannot be a reply is discarded, and the history says why: the step has succeeded all the same.
fn success(raw: &Raw) -> Answer {
    let note = |why: &str| Some(cut(&format!("the answer's body is not kept: {why}"), MAX_TEXT));
    let (reply, note) = match json::admit(&raw.body) {
        _ if !raw.complete => (None, note(&format!("it has more than {MAX_BODY} bytes"))),
        _ if raw.body.is_empty() => (None, None),
        Ok(reply) => (Some(reply), None),
        Err(why) => (None, note(&why.to_string())),
    };
    Answer::Success { reply, note }
}

/// The time of a `Retry-After` (RFC 9110 §10.2.3): seconds, or a date, which counts from the answer's own `Date`, so that the
/// clocks need not agree.
pub(super) fn retry_after(value: &str, date: Option<&str>, now: SystemTime) -> Option<Duration> {
    let value = value.trim();
    let pause = value.parse().map(Duration::from_secs).ok().or_else(|| {
        let since = date.and_then(|date| httpdate::parse_http_date(date).ok()).unwrap_or(now);
        Some(httpdate::parse_http_date(value).ok()?.duration_since(since).unwrap_or_default())
    })?;
    Some(pause.min(Duration::from_millis(MAX_RETRY_AFTER_MS)))
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
        Raw { body: Bytes::from(body.to_owned()), retry_after: Some(Duration::from_secs(3)), ..Raw::new(status) }
    }

    fn answer(status: u16, body: &str) -> Answer {
        classify("customers", raw(status, body), false)
    }

    #[test]
    fn an_answer_is_success_failure_or_unknown() {
        for status in [200, 201, 204] {
            assert_eq!(answer(status, ""), Answer::Success { reply: None, note: None }, "{status}");
        }
        for status in [400, 401, 404, 409, 410, 422] {
            assert_eq!(answer(status, "").outcome(), "failure", "{status}");
        }
        for status in [202, 301, 302, 303, 304, 307, 308, 408, 425, 429, 500, 502, 503, 504] {
            assert_eq!(answer(status, "").outcome(), "unknown", "{status}");
        }
    }

    #[test]
    fn a_command_that_may_have_had_its_effect_fails_only_by_409_and_422() {
        let repeated = |status| classify("customers", raw(status, r#"{"code": "NoRoute"}"#), true);
        for status in [409, 422] {
            assert_eq!(repeated(status).outcome(), "failure", "{status}");
        }
        for status in [400, 401, 403, 404, 405, 408, 410, 413, 421, 429, 451, 500, 503] {
            assert_eq!(repeated(status).outcome(), "unknown", "{status}");
        }
        assert_eq!(repeated(200).outcome(), "success");
    }

    #[test]
    fn a_definite_failure_has_the_service_s_code_and_text_or_says_why_not() {
        let kind = r#""type": "https://customers/problems/CreditLimitExceeded""#;
        for (body, code, message) in [
            (format!(r#"{{{kind}, "title": "t", "detail": "120 > 100"}}"#), "CreditLimitExceeded", "120 > 100"),
            (
                format!(r#"{{{kind}, "title": 7, "detail": ["no"]}}"#),
                "CreditLimitExceeded",
                "customers answered HTTP 409",
            ),
            (r#"{"code": "CreditLimitExceeded", "message": "no"}"#.to_owned(), "CreditLimitExceeded", "no"),
            (r#"{"limit": 1e400, "error": {"code": 17, "message": "no"}}"#.to_owned(), "17", "no"),
        ] {
            assert_eq!(answer(409, &body), failure(code, message), "{body}");
        }
        for (body, message, why) in [
            (r#"{"title": "Conflict"}"#, "Conflict", "has none in `type`, `code` or `error`"),
            ("<html>", "customers answered HTTP 409", "is not a JSON object"),
            ("", "customers answered HTTP 409", "is empty"),
        ] {
            let note = Some(format!("the code is HTTP_409, because the answer's body {why}"));
            let expected = Answer::Failure { code: "HTTP_409".to_owned(), message: message.to_owned(), note };
            assert_eq!(answer(409, body), expected, "{body}");
        }
    }

    #[test]
    fn an_unknown_result_keeps_the_service_s_own_text_apart() {
        let plain = Raw { content_type: Some("text/plain; charset=utf-8".into()), ..raw(500, "disk full\n") };
        for (raw, text) in [
            (raw(500, r#"{"detail": "no connection to the pool"}"#), Some("no connection to the pool")),
            (
                raw(500, r#"{"timestamp": 1, "error": "Internal Server Error", "message": "deadlock"}"#),
                Some("deadlock"),
            ),
            (raw(500, r#"{"error": {"code": 7, "message": "quota"}}"#), Some("quota")),
            (raw(500, r#""busy""#), Some("busy")),
            (raw(500, r#"{"limit": 1e400, "detail": "odd \ud83d"}"#), Some(r"odd \ud83d")),
            (Raw { complete: false, ..raw(500, r#"{"detail": "disk full", "trace": "x"#) }, Some("disk full")),
            (plain, Some("disk full")),
            (raw(500, "<html>Oops</html>"), None),
            (raw(500, ""), None),
        ] {
            let body = raw.body.clone();
            let Answer::Unknown { message, detail, retry_after_ms } = classify("customers", raw, false) else {
                panic!()
            };
            assert_eq!((message.as_str(), detail.as_deref()), ("customers answered HTTP 500", text), "{body:?}");
            assert_eq!(retry_after_ms, Some(3_000));
        }
    }

    #[test]
    fn a_reply_is_the_json_of_a_success() {
        let Answer::Success { reply: Some(json), note: None } = answer(200, r#"{"id": 1}"#) else { panic!() };
        assert_eq!(json.as_str(), r#"{"id": 1}"#);
        let long = Raw { complete: false, ..raw(200, "[1") };
        for (answer, why) in [
            (answer(200, "fine"), "it is not JSON"),
            (answer(200, "\u{feff}{}"), "it is not JSON"),
            (answer(200, r#"["\ud83d"]"#), "it is not JSON"),
            (answer(200, "[12345678901234567.89]"), "the number at byte 1 has more digits"),
            (classify("customers", long, false), "it has more than 65536 bytes"),
        ] {
            let Answer::Success { reply: None, note: Some(note) } = answer else { panic!("{answer:?}") };
            assert!(note.starts_with(&format!("the answer's body is not kept: {why}")), "{note}");
        }
    }

    #[test]
    fn a_retry_after_is_seconds_or_a_date() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(784_111_777);
        let date = "Sun, 06 Nov 1994 09:00:00 GMT";
        for (value, date, seconds) in [
            ("120", None, Some(120)),
            (" 0 ", None, Some(0)),
            ("Sun, 06 Nov 1994 08:50:00 GMT", None, Some(23)),
            ("Sunday, 06-Nov-94 08:50:00 GMT", None, Some(23)),
            ("Sun, 06 Nov 1994 09:00:05 GMT", Some(date), Some(5)),
            ("Sun, 06 Nov 1994 08:50:00 GMT", Some("yesterday"), Some(23)),
            ("Sun, 06 Nov 1994 08:50:00 GMT", Some(date), Some(0)),
            ("Fri, 31 Dec 9999 23:59:59 GMT", None, Some(600)),
            ("86400", None, Some(600)),
            ("soon", None, None),
            ("", None, None),
            ("-1", None, None),
        ] {
            assert_eq!(retry_after(value, date, now).map(|pause| pause.as_secs()), seconds, "{value} {date:?}");
        }
    }

    #[test]
    fn texts_are_bounded() {
        let long = "ü".repeat(5_000);
        let Answer::Unknown { detail: Some(detail), .. } = answer(503, &format!(r#"{{"detail": "{long}"}}"#)) else {
            panic!()
        };
        assert!(detail.len() <= MAX_TEXT);
    }
}
