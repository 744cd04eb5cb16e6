//! The request of a call: its arguments are evaluated, and each goes where the command has a place for it.
//!
//! As in gRPC's HTTP transcoding (`google.api.http`): an argument that the path names (`/orders/{orderId}`) fills the path.
//! The others are the members of the JSON body or, with GET and DELETE, which have no body, query parameters.

use std::fmt;

use serde_json::Value;

use super::{
    definition::Call,
    expression::{Expression, ExpressionError, Scope},
    meter,
};

/// Longest body of a call, in bytes.
pub const MAX_BODY: usize = 4 * 1024 * 1024;
/// Longest value in a path, a query or a header, in bytes.
pub const MAX_TEXT: usize = 1_024;
/// Most bytes of path and query that arguments give: servers accept 8 KiB of a whole request line (RFC 9110 §4.1).
const MAX_ARGUMENTS: usize = 7 * 1024;

/// Headers that every request has, or that are of the connection.
const RESERVED: [&str; 16] = [
    "accept",
    "connection",
    "content-length",
    "content-type",
    "correlationid",
    "expect",
    "host",
    "idempotency-key",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "traceparent",
    "tracestate",
    "transfer-encoding",
    "upgrade",
];

/// Where a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target<'a> {
    /// HTTP method, upper case.
    pub method: &'a str,
    /// Absolute URL; its path may name arguments: `/orders/{orderId}`.
    pub url: &'a str,
}

impl<'a> Target<'a> {
    pub fn of(call: &'a Call) -> Self {
        Self { method: &call.method, url: &call.url }
    }

    fn has_body(self) -> bool {
        !["GET", "DELETE"].contains(&self.method)
    }

    /// The arguments that the path names.
    fn parameters(self) -> impl Iterator<Item = &'a str> {
        self.url.split('{').skip(1).filter_map(|rest| Some(rest.split_once('}')?.0))
    }

    /// The URL with its parameters filled by `value`.
    fn fill(self, value: impl Fn(&str) -> Option<String>) -> Result<String, ExpressionError> {
        let mut parts = self.url.split('{');
        let mut url = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let (name, rest) = part.split_once('}').unwrap_or((part, ""));
            let absent = || ExpressionError::Unsendable(format!("the path names {{{name}}}, and no argument gives it"));
            push_encoded(&mut url, &value(name).ok_or_else(absent)?);
            url.push_str(rest);
        }
        Ok(url)
    }
}

/// Why a call cannot be sent to `target`: the member of the call, and what is wrong with it.
pub fn misfit(call: &Call, target: Target<'_>) -> Option<(String, String)> {
    let (command, method) = (&call.command, target.method);
    if let Some(parameter) = target.parameters().find(|name| !call.with.contains_key(*name)) {
        let message = format!(
            "the path of command `{command}` names `{{{parameter}}}`, and no argument gives it; add `{parameter}` and its expression"
        );
        return Some(("with".to_owned(), message));
    }
    call.body.as_ref()?;
    if !target.has_body() {
        let message =
            format!("command `{command}` is called by {method}, which has no body; give its arguments in `with`");
        return Some(("body".to_owned(), message));
    }
    let unused = call.with.keys().find(|name| !target.parameters().any(|parameter| parameter == *name))?;
    let message = format!(
        "`body` is the whole body, and the path of command `{command}` does not name `{{{unused}}}`; make it a member of `body`, or remove it"
    );
    Some((format!("with.{unused}"), message))
}

/// Why a header of this name cannot be sent, and what to do.
pub(super) fn wrong_header(name: &str) -> Option<&'static str> {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    if name.is_empty() || !name.bytes().all(is_token) {
        return Some("is not the name of a header; use letters, digits and `-`");
    }
    let is_reserved = RESERVED.iter().any(|reserved| name.eq_ignore_ascii_case(reserved));
    is_reserved.then_some("is set by Weft, or belongs to the connection; use another header")
}

/// A part of a call that an expression gives. Displays as its field.
#[derive(Clone, Copy)]
enum Part<'a> {
    With(&'a str),
    Body,
    Header(&'a str),
}

impl fmt::Display for Part<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::With(name) => write!(f, "with.{name}"),
            Self::Body => f.write_str("body"),
            Self::Header(name) => write!(f, "headers.{name}"),
        }
    }
}

/// A value in the form in which it is sent.
enum Piece {
    /// A member of the body.
    Member,
    /// The whole body.
    Whole,
    Path(String),
    /// Several of a list; none of `null`.
    Query(Vec<String>),
    Header(String),
}

/// Everything of a request that expressions decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Absolute.
    pub url: String,
    /// JSON. `None` with a method that has no body.
    pub body: Option<String>,
    pub headers: Vec<(String, String)>,
}

/// What a call sends, compiled.
#[derive(Debug, Default)]
pub struct Arguments {
    with: Vec<(String, Expression)>,
    body: Option<Expression>,
    headers: Vec<(String, Expression)>,
}

impl Arguments {
    /// The error names the part.
    pub fn compile(call: &Call) -> Result<Self, ExpressionError> {
        let compile = |part: Part<'_>, source: &str| {
            Expression::compile(source).map_err(|error| ExpressionError::Parse(format!("{part} {error}")))
        };
        let with = call.with.iter().map(|(name, source)| Ok((name.clone(), compile(Part::With(name), source)?)));
        let headers =
            call.headers.iter().map(|(name, source)| Ok((name.clone(), compile(Part::Header(name), source)?)));
        let body = call.body.as_ref().map(|source| compile(Part::Body, source));
        Ok(Self {
            with: with.collect::<Result<_, ExpressionError>>()?,
            body: body.transpose()?,
            headers: headers.collect::<Result<_, ExpressionError>>()?,
        })
    }

    fn parts(&self) -> impl Iterator<Item = (Part<'_>, &Expression)> {
        let with = self.with.iter().map(|(name, expression)| (Part::With(name), expression));
        let headers = self.headers.iter().map(|(name, expression)| (Part::Header(name), expression));
        with.chain(self.body.iter().map(|expression| (Part::Body, expression))).chain(headers)
    }

    /// The names of the steps whose replies it reads.
    pub fn steps(&self) -> impl Iterator<Item = &str> {
        self.parts().flat_map(|(_, expression)| expression.steps())
    }

    /// Whether it may take so long that it belongs onto a thread of its own.
    pub fn is_heavy(&self) -> bool {
        self.parts().any(|(_, expression)| expression.is_heavy())
    }

    /// The request to `target`; the error names the part. All parts together have one budget.
    pub fn evaluate(&self, scope: Scope<'_>, target: Target<'_>) -> Result<Request, ExpressionError> {
        let mut made = Made::default();
        self.each(scope, |_| true, |part, value| made.add(part, target, value))?;
        let Made { mut body, path, query, headers } = made;
        if self.body.is_none() {
            body.push(b'}');
        }
        let value = |wanted: &str| path.iter().find(|(name, _)| name == wanted).map(|(_, text)| text.clone());
        let url = target.fill(value)? + &query;
        let body = target.has_body().then(|| String::from_utf8(body).unwrap_or_default());
        Ok(Request { url, body, headers })
    }

    /// Evaluates the parts that read the reply of no other steps than those, and an item only if there is one: the limits hold for
    /// these together.
    pub fn check(
        &self,
        scope: Scope<'_>,
        target: Target<'_>,
        steps: impl Fn(&str) -> bool,
    ) -> Result<(), ExpressionError> {
        let mut made = Made::default();
        self.each(scope, steps, |part, value| made.add(part, target, value))
    }

    fn each(
        &self,
        scope: Scope<'_>,
        steps: impl Fn(&str) -> bool,
        mut found: impl FnMut(Part<'_>, &Value) -> Result<(), ExpressionError>,
    ) -> Result<(), ExpressionError> {
        meter::begin();
        let known = |expression: &Expression| {
            expression.steps().all(&steps) && (scope.item.is_some() || !expression.reads_item())
        };
        for (part, expression) in self.parts().filter(|(_, expression)| known(expression)) {
            let value = expression.find(scope).map_err(|error| match error {
                ExpressionError::Evaluate(why) => ExpressionError::Evaluate(format!("{part}: {why}")),
                other => other,
            })?;
            found(part, &value)?;
        }
        Ok(())
    }
}

/// What is made of the parts so far.
struct Made {
    body: Vec<u8>,
    path: Vec<(String, String)>,
    query: String,
    headers: Vec<(String, String)>,
}

impl Default for Made {
    fn default() -> Self {
        Self { body: Vec::from(*b"{"), path: Vec::new(), query: String::new(), headers: Vec::new() }
    }
}

impl Made {
    fn add(&mut self, part: Part<'_>, target: Target<'_>, value: &Value) -> Result<(), ExpressionError> {
        match (piece(part, target, value)?, part) {
            (Piece::Member, Part::With(name)) => {
                if self.body.len() > 1 {
                    self.body.push(b',');
                }
                write_json(&mut self.body, &name);
                self.body.push(b':');
                write_json(&mut self.body, value);
            }
            (Piece::Path(text), Part::With(name)) => self.path.push((name.to_owned(), text)),
            (Piece::Query(texts), Part::With(name)) => {
                for text in texts {
                    self.query.push(if self.query.is_empty() { '?' } else { '&' });
                    push_encoded(&mut self.query, name);
                    self.query.push('=');
                    push_encoded(&mut self.query, &text);
                }
            }
            (Piece::Header(text), Part::Header(name)) => self.headers.push((name.to_owned(), text)),
            _ => {
                self.body.clear();
                write_json(&mut self.body, value);
            }
        }
        // a byte of a path is three characters at most
        let path: usize = self.path.iter().map(|(_, text)| 3 * text.len()).sum();
        if path + self.query.len() > MAX_ARGUMENTS {
            let why = format!("{part} makes path and query longer than the {MAX_ARGUMENTS} bytes that servers accept");
            return Err(ExpressionError::Unsendable(why));
        }
        if self.body.len() > MAX_BODY { Err(ExpressionError::BodyTooLong(part.to_string())) } else { Ok(()) }
    }
}

/// How `value` is sent, or why it cannot be. The message has no value.
fn piece(part: Part<'_>, target: Target<'_>, value: &Value) -> Result<Piece, ExpressionError> {
    let wrong = |why: &str| ExpressionError::Unsendable(format!("{part} {why}"));
    match part {
        Part::Body => Ok(Piece::Whole),
        Part::Header(_) => match text(part, value)? {
            text if text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) => Ok(Piece::Header(text)),
            _ => Err(wrong("has characters that a header cannot have: only visible ASCII and spaces can be sent")),
        },
        Part::With(name) if target.parameters().any(|parameter| parameter == name) => match text(part, value)?.as_str()
        {
            "" => Err(wrong("is empty, and the path needs it")),
            "." | ".." => Err(wrong("is a dot segment, which would lead to another path")),
            text => Ok(Piece::Path(text.to_owned())),
        },
        Part::With(_) if target.has_body() => Ok(Piece::Member),
        Part::With(_) => match value {
            Value::Null => Ok(Piece::Query(Vec::new())),
            Value::Array(items) => {
                items.iter().map(|item| text(part, item)).collect::<Result<_, _>>().map(Piece::Query)
            }
            one => text(part, one).map(|text| Piece::Query(vec![text])),
        },
    }
}

fn text(part: Part<'_>, value: &Value) -> Result<String, ExpressionError> {
    let wrong = |why: String| ExpressionError::Unsendable(format!("{part} {why}"));
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Number(number) => number.to_string(),
        Value::Bool(value) => value.to_string(),
        Value::Null | Value::Array(_) | Value::Object(_) => {
            return Err(wrong("must be a string, a number or a boolean where it is sent".to_owned()));
        }
    };
    if text.len() <= MAX_TEXT { Ok(text) } else { Err(wrong(format!("is longer than {MAX_TEXT} bytes"))) }
}

/// Writing strings and JSON into memory cannot fail.
fn write_json(to: &mut Vec<u8>, value: &impl serde::Serialize) {
    let _ = serde_json::to_writer(to, value);
}

/// All but the unreserved characters of RFC 3986 §2.3 are encoded.
fn push_encoded(to: &mut String, text: &str) {
    use fmt::Write as _;
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            to.push(char::from(byte));
        } else {
            let _ = write!(to, "%{byte:02X}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, source)| ((*name).to_owned(), (*source).to_owned())).collect()
    }

    fn call(method: &str, path: &str, with: &[(&str, &str)]) -> Call {
        Call {
            command: "Act".into(),
            method: method.into(),
            url: format!("http://orders:80{path}"),
            with: map(with),
            ..Call::default()
        }
    }

    fn request(call: &Call, input: &Value) -> Result<Request, String> {
        let scope = Scope { input, steps: &Value::Null, item: None, failure: None };
        let arguments = Arguments::compile(call).map_err(|error| error.to_string())?;
        let made = arguments.evaluate(scope, Target::of(call)).map_err(|error| error.to_string());
        let checked = arguments.check(scope, Target::of(call), |_| true);
        assert_eq!(made.is_ok(), checked.is_ok(), "what is checked before is what can be sent: {made:?}, {checked:?}");
        made
    }

    #[test]
    fn an_argument_fills_the_path_or_is_a_member_of_the_body() {
        let act = call("PUT", "/orders/{id}/lines/{line}", &[("id", "input.id"), ("line", "7"), ("n", "input.n + 1")]);
        let made = request(&act, &json!({"id": "a/b c%é", "n": 2})).unwrap();
        assert_eq!(made.url, "http://orders:80/orders/a%2Fb%20c%25%C3%A9/lines/7");
        assert_eq!(made.body.as_deref(), Some(r#"{"n":3}"#));
        let plain = request(&call("POST", "/orders", &[]), &json!({})).unwrap();
        assert_eq!((plain.url.as_str(), plain.body.as_deref()), ("http://orders:80/orders", Some("{}")));
    }

    #[test]
    fn get_and_delete_have_query_parameters_and_no_body() {
        for method in ["GET", "DELETE"] {
            let with = [("id", "input.id"), ("tag", "input.tags"), ("x&y", "true"), ("none", "null")];
            let made = request(&call(method, "/orders/{id}", &with), &json!({"id": 7, "tags": ["a b", "c"]})).unwrap();
            assert_eq!(made.url, "http://orders:80/orders/7?tag=a%20b&tag=c&x%26y=true");
            assert_eq!(made.body, None);
        }
    }

    #[test]
    fn what_no_server_accepts_is_known_before() {
        let delete = call("DELETE", "/tickets", &[("ids", "input.ids")]);
        let ids = |count: usize| json!({"ids": vec!["x".repeat(64); count]});
        assert!(request(&delete, &ids(50)).is_ok());
        let why = request(&delete, &ids(1000)).unwrap_err();
        assert!(why.starts_with("with.ids makes path and query longer than"), "{why}");
        // what is checked ahead counts the body too
        let large = json!({"list": "x".repeat(MAX_BODY)});
        let scope = Scope { input: &large, steps: &Value::Null, item: None, failure: None };
        let post = call("POST", "/orders", &[("list", "input.list")]);
        let arguments = Arguments::compile(&post).unwrap();
        assert!(arguments.check(scope, Target::of(&post), |_| true).is_err());
    }

    #[test]
    fn a_whole_body_is_any_json() {
        let whole = Call { body: Some("input.list".into()), ..call("POST", "/orders/{id}", &[("id", "1")]) };
        let made = request(&whole, &json!({"list": [1, {"a": null}]})).unwrap();
        assert_eq!((made.url.as_str(), made.body.as_deref()), ("http://orders:80/orders/1", Some(r#"[1,{"a":null}]"#)));
        assert_eq!(request(&whole, &json!({"list": ""})).unwrap().body.as_deref(), Some("\"\""));
        let input = json!({"list": "x".repeat(MAX_BODY)});
        let scope = Scope { input: &input, steps: &Value::Null, item: None, failure: None };
        let long = Arguments::compile(&whole).unwrap().evaluate(scope, Target::of(&whole)).unwrap_err();
        assert_eq!(long.to_string(), "body makes the request longer than 4194304 bytes");
    }

    #[test]
    fn headers_are_text() {
        let with_headers = Call { headers: map(&[("X-Tenant", "input.t"), ("x-n", "3")]), ..call("GET", "/", &[]) };
        let made = request(&with_headers, &json!({"t": "a b"})).unwrap();
        let wanted = [("X-Tenant".to_owned(), "a b".to_owned()), ("x-n".to_owned(), "3".to_owned())];
        assert_eq!(made.headers, wanted);
        for tenant in ["a\r\nx: y", "é"] {
            let why = request(&with_headers, &json!({"t": tenant})).unwrap_err();
            assert!(why.starts_with("headers.X-Tenant has characters that a header cannot have"), "{why}");
        }
    }

    #[test]
    fn what_cannot_be_in_a_path_is_refused_before_anything_is_sent() {
        let act = call("POST", "/orders/{id}", &[("id", "input.id")]);
        let needs = "with.id must be a string, a number or a boolean where it is sent";
        for (input, why) in [
            (json!({"id": ""}), "with.id is empty, and the path needs it"),
            (json!({"id": ".."}), "with.id is a dot segment, which would lead to another path"),
            (json!({"id": null}), needs),
            (json!({"id": ["secret"]}), needs),
            (json!({"id": "x".repeat(MAX_TEXT + 1)}), "with.id is longer than 1024 bytes"),
            (json!({}), "cannot be evaluated: with.id: `input.id` has no `id`"),
        ] {
            assert_eq!(request(&act, &input).unwrap_err(), why);
        }
    }

    #[test]
    fn a_call_fits_its_command() {
        let why = |call: &Call| misfit(call, Target::of(call)).map(|(field, message)| format!("{field}: {message}"));
        assert_eq!(why(&call("GET", "/o/{id}", &[("id", "1"), ("q", "2")])), None);
        assert_eq!(
            why(&call("GET", "/o/{id}", &[("q", "2")])).unwrap(),
            "with: the path of command `Act` names `{id}`, and no argument gives it; add `id` and its expression"
        );
        let whole = |method, with| Call { body: Some("input".into()), ..call(method, "/o/{id}", with) };
        assert_eq!(why(&whole("PATCH", &[("id", "1")])), None);
        assert_eq!(
            why(&whole("DELETE", &[("id", "1")])).unwrap(),
            "body: command `Act` is called by DELETE, which has no body; give its arguments in `with`"
        );
        assert_eq!(
            why(&whole("POST", &[("id", "1"), ("n", "2")])).unwrap(),
            "with.n: `body` is the whole body, and the path of command `Act` does not name `{n}`; make it a member of `body`, or remove it"
        );
    }
}
