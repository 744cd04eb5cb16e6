//! Reads what a participant wrote about an error: the failure's code, and a text for the history.

use hyper::StatusCode;

use super::{
    answer::{MAX_BODY, Raw},
    members::{self, Members},
};

/// A longer failure code is none.
const MAX_CODE: usize = 128;

/// Members that hold the text, the most specific first: RFC 9457's, then those that frameworks use.
const TEXTS: [&str; 6] = ["detail", "message", "error_description", "error", "errorMessage", "title"];

/// Words that name no failure, as in `{"type": "error", …}`.
const GENERIC: [&str; 6] = ["error", "errors", "exception", "failure", "fault", "problem"];

/// Frameworks set `type` to a page about the HTTP status: it names no failure of the service.
const SPECIFICATIONS: [&str; 7] = [
    "//tools.ietf.org/",
    "//datatracker.ietf.org/",
    "//www.rfc-editor.org/",
    "//rfc-editor.org/",
    "//httpstatuses.",
    "//httpwg.org/",
    "//developer.mozilla.org/",
];

/// What a participant wrote about an error, as far as it is understood.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Explanation {
    /// An identifier of at most [`MAX_CODE`] bytes. Else, as a clause, why the body has none.
    pub code: Result<String, String>,
    pub text: Option<String>,
}

impl Explanation {
    pub(super) fn of(raw: &Raw) -> Self {
        let body = members::text(&raw.body);
        let Some(members) = Members::of(&body) else {
            let is_plain = raw.content_type.as_deref().is_some_and(|media| media.starts_with("text/plain"));
            let text = members::string(&body).or_else(|| is_plain.then(|| body.to_string()));
            let why = if body.is_empty() { "is empty" } else { "is not a JSON object" };
            return Self { code: Err(why.to_owned()), text: text.as_deref().and_then(non_empty) };
        };
        let code = code(&members, raw.status).ok_or_else(|| {
            let beginning = format!("has none in its first {MAX_BODY} bytes; the rest was not read");
            if raw.complete { "has none in `type`, `code` or `error`".to_owned() } else { beginning }
        });
        Self { code, text: text(&members) }
    }
}

/// The most specific first: a URI in `type`, the member `code`, the same in the object `error`, and then single words.
fn code(members: &Members<'_>, status: u16) -> Option<String> {
    let error = members.object("error");
    let word = |members: &Members<'_>, name| members.string(name).filter(|word| names_a_failure(word, status));
    explicit(members, status)
        .or_else(|| explicit(error.as_ref()?, status))
        .or_else(|| word(members, "type"))
        .or_else(|| word(error.as_ref()?, "type"))
        // google.rpc.Status in HTTP: `code` is the HTTP status, `status` the name
        .or_else(|| word(error.as_ref()?, "status"))
        .or_else(|| word(members, "error"))
}

fn explicit(members: &Members<'_>, status: u16) -> Option<String> {
    let code = || members.string("code").or_else(|| members.integer("code").map(ToOwned::to_owned));
    let of_type = members.string("type").and_then(|kind| last_segment(&kind).map(ToOwned::to_owned));
    of_type.into_iter().chain(code()).find(|code| is_code(code) && *code != status.to_string())
}

/// `NoSlot` of `https://orders/problems/NoSlot?lang=en`, `https://orders/errors#NoSlot` and `urn:problem:NoSlot`. `None` for
/// one word, which is not a URI with a path. Of a path and a fragment, the one that is more than a lower-case word.
fn last_segment(uri: &str) -> Option<&str> {
    let (path, fragment) = uri.split_once('#').unwrap_or((uri, ""));
    let path = path.split('?').next().unwrap_or_default();
    let path = match path.split_once("//") {
        Some((_scheme, rest)) => rest.split_once('/')?.1,
        None if path.starts_with("about:") || !uri.contains([':', '/', '#']) => return None,
        None => path,
    };
    if SPECIFICATIONS.iter().any(|site| uri.contains(site)) {
        return None;
    }
    let (path, fragment) = (segment(path), segment(fragment.split('?').next().unwrap_or_default()));
    let is_telling = |text: &&str| !text.bytes().all(|byte| byte.is_ascii_lowercase());
    fragment.filter(is_telling).or(path.filter(is_telling)).or(fragment).or(path)
}

fn segment(path: &str) -> Option<&str> {
    path.trim_end_matches('/').rsplit(['/', ':']).next().filter(|last| is_code(last))
}

fn is_code(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= MAX_CODE
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'))
}

/// False for what frameworks write on every error: `error`, or the reason phrase of the status.
fn names_a_failure(word: &str, status: u16) -> bool {
    let word_letters = members::letters(word);
    let phrase = StatusCode::from_u16(status).ok().and_then(|status| status.canonical_reason()).map(members::letters);
    is_code(word)
        && !GENERIC.contains(&word_letters.as_str())
        && word_letters != status.to_string()
        && phrase.is_none_or(|phrase| phrase != word_letters)
}

fn text(members: &Members<'_>) -> Option<String> {
    TEXTS.iter().find_map(|name| {
        let text = members.string(name).or_else(|| members.object(name)?.string("message"));
        text.as_deref().and_then(non_empty)
    })
}

fn non_empty(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn code_of(body: &str) -> Result<String, String> {
        Explanation::of(&Raw { body: Bytes::from(body.to_owned()), ..Raw::new(409) }).code
    }

    #[test]
    fn a_code_is_the_last_segment_of_the_type() {
        for kind in [
            "https://orders/problems/NoSlot",
            "https://orders/problems/NoSlot/",
            "https://orders/problems/NoSlot?lang=en",
            "https://orders/problems/NoSlot?lang=en#details",
            "https://orders/problems/NoSlot/?a=/b:c",
            "https://orders/problems/NoSlot#details",
            "https://orders/errors#NoSlot",
            "https://orders/#/errors/NoSlot",
            "/problems/NoSlot",
            "problems/NoSlot",
            "#NoSlot",
            "urn:shop:problem:NoSlot",
            "tag:shop,2026:NoSlot",
        ] {
            let body = format!(r#"{{"type": "{kind}", "code": "Other", "error": "Another"}}"#);
            assert_eq!(code_of(&body).as_deref(), Ok("NoSlot"), "{kind}");
        }
        assert_eq!(code_of(r#"{"type": "https://orders/errors#rate-limit"}"#).as_deref(), Ok("rate-limit"));
    }

    #[test]
    fn a_code_is_in_code_or_in_error() {
        for (body, code) in [
            (r#"{"code": "NoSlot"}"#, "NoSlot"),
            (r#"{"code": 1234}"#, "1234"),
            (r#"{"code": -32000}"#, "-32000"),
            (r#"{"error": {"code": "NoSlot", "message": "none"}}"#, "NoSlot"),
            (r#"{"error": {"code": 1234}}"#, "1234"),
            (r#"{"error": {"code": 409, "status": "NO_SLOT"}}"#, "NO_SLOT"),
            (r#"{"error": {"type": "https://orders/problems/NoSlot"}}"#, "NoSlot"),
            (r#"{"error": "NoSlot"}"#, "NoSlot"),
            (r#"{"type": "NoSlot"}"#, "NoSlot"),
            (r#"{"type": "NoSlot", "error": "Conflict"}"#, "NoSlot"),
            (r#"{"type": "error", "code": "NoSlot"}"#, "NoSlot"),
            (r#"{"type": "business", "code": "NoSlot"}"#, "NoSlot"),
            (r#"{"type": "error", "error": {"type": "NoSlot"}}"#, "NoSlot"),
            (r#"{"type": "about:blank", "code": "NoSlot"}"#, "NoSlot"),
            (r#"{"type": 7, "code": "NoSlot", "error": []}"#, "NoSlot"),
            (r#"{"type": "https://orders/", "code": "NoSlot"}"#, "NoSlot"),
            (r#"{"type": "https://orders/problems/no slot", "code": "NoSlot"}"#, "NoSlot"),
            (r#"{"code": 409, "error": "NoSlot"}"#, "NoSlot"),
            (r#"{"type": "https://tools.ietf.org/html/rfc9110#section-15.5.10", "code": "NoSlot"}"#, "NoSlot"),
        ] {
            assert_eq!(code_of(body).as_deref(), Ok(code), "{body}");
        }
    }

    #[test]
    fn what_frameworks_write_on_every_error_is_no_code() {
        for body in [
            "{}",
            r#"{"code": 409}"#,
            r#"{"code": "409"}"#,
            r#"{"code": null, "error": true}"#,
            r#"{"code": 1.5}"#,
            r#"{"code": "no slot is left"}"#,
            r#"{"status": 409, "error": "Conflict", "path": "/"}"#,
            r#"{"type": "error"}"#,
            r#"{"error": "column x does not exist"}"#,
            r#"{"type": "about:blank", "title": "Conflict"}"#,
            r#"{"type": "https://orders"}"#,
            r#"{"type": "https://orders/"}"#,
            r#"{"type": "https://orders?NoSlot"}"#,
            r#"{"type": "https://httpstatuses.io/409"}"#,
            r#"{"type": "https://example.org/409"}"#,
            r#"{"type": "the customer's card 4111 1111"}"#,
        ] {
            assert_eq!(code_of(body), Err("has none in `type`, `code` or `error`".to_owned()), "{body}");
        }
        assert_eq!(code_of(" \n"), Err("is empty".to_owned()));
        for body in ["<html>", "[]", "\"NoSlot\"", "\u{1f}\u{8b}\u{8}"] {
            assert_eq!(code_of(body), Err("is not a JSON object".to_owned()), "{body}");
        }
    }

    #[test]
    fn a_body_that_is_too_long_is_read_as_far_as_it_was_received() {
        let of = |body: &str| Explanation::of(&Raw { body: body.to_owned().into(), complete: false, ..Raw::new(409) });
        assert_eq!(
            of(r#"{"code": "NoSlot", "message": "none", "trace": "xx"#),
            Explanation { code: Ok("NoSlot".to_owned()), text: Some("none".to_owned()) }
        );
        let why = "has none in its first 65536 bytes; the rest was not read";
        assert_eq!(of(r#"{"trace": "xx"#), Explanation { code: Err(why.to_owned()), text: None });
    }
}
