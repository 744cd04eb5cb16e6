//! The event envelope: an outbox row as a CloudEvent in binary mode (CloudEvents 1.0; NATS protocol binding 1.0.3-wip, whose
//! earlier versions have the structured mode only).
//!
//! Attributes are `ce-…` headers; the row's `payload` is the message's data, unchanged. Consumers need the names below
//! and [`decode`]; the relay needs the rest.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt::{self, Arguments},
};

use bytes::Bytes;
use serde_json::{Map, Value};

use super::version;

pub const SPEC_VERSION: &str = "1.0";
pub const CONTENT_TYPE_JSON: &str = "application/json";
/// Media type of bytes of which nothing is known.
pub const CONTENT_TYPE_BYTES: &str = "application/octet-stream";
/// Media type of a message in structured mode: a JSON object with the attributes and the data.
pub const CONTENT_TYPE_STRUCTURED: &str = "application/cloudevents+json";
/// Media type of a message in batched content mode: a JSON array of such objects.
pub const CONTENT_TYPE_BATCH: &str = "application/cloudevents-batch+json";

/// Begins the name of an attribute's header.
pub const ATTRIBUTE_PREFIX: &str = "ce-";

/// Not CloudEvents' (but `application/cloudevents` would be the structured mode): for consumers that know only this one.
pub const HEADER_CONTENT_TYPE: &str = "content-type";
/// The payload's media type.
pub const HEADER_DATA_CONTENT_TYPE: &str = "ce-datacontenttype";
pub const HEADER_SPEC_VERSION: &str = "ce-specversion";
/// The event's id; the same for every duplicate.
pub const HEADER_ID: &str = "ce-id";
/// `/NAMESPACE/SERVICE`.
pub const HEADER_SOURCE: &str = "ce-source";
/// The row's `type`.
pub const HEADER_TYPE: &str = "ce-type";
/// The row's `aggregate_id`.
pub const HEADER_SUBJECT: &str = "ce-subject";
/// The row's `created_at`, RFC 3339 in UTC.
pub const HEADER_TIME: &str = "ce-time";
/// `AGGREGATE_TYPE/AGGREGATE_ID`: events with the same partition key are in commit order.
pub const HEADER_PARTITION_KEY: &str = "ce-partitionkey";
/// The event's [`Position`] among all events of its relay.
pub const HEADER_SEQUENCE: &str = "ce-sequence";
pub const HEADER_TRACEPARENT: &str = "ce-traceparent";
pub const HEADER_CORRELATION_ID: &str = "ce-correlationid";
pub const HEADER_CAUSATION_ID: &str = "ce-causationid";

/// The type of an event whose row has an empty one, which CloudEvents does not allow; it is also that of its subject.
pub const NO_TYPE: &str = "_";

/// Longest name of an extension attribute that is published. The specification recommends 20; longer names are in use.
const MAX_EXTENSION_NAME: usize = 64;
/// Attributes that are set from the row's columns; an extension of the same name is dropped.
const RESERVED: [&str; 11] = [
    "id",
    "source",
    "type",
    "specversion",
    "subject",
    "time",
    "data",
    "datacontenttype",
    "dataschema",
    "partitionkey",
    "sequence",
];

/// The position of an event in its relay's order. Its text sorts as it does, and is the CloudEvents attribute
/// `sequence`.
///
/// With log tailing it is the LSN of the transaction's commit record and the row's index in the transaction. For rows
/// that are older than the slot it is the slot's consistent point less one, and `seq`. With polling it is the WAL's
/// insert position at the time of the window's snapshot, and `seq`. All are positions in one WAL, so the order holds
/// when the mode changes. Of two deliveries of one event the later one may have another position (its row was read
/// again); the first one counts. When a former leader's last messages arrive after the next leader has begun, first deliveries of
/// one key, which are in order, may have positions that are not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub lsn: u64,
    pub index: u64,
}

impl fmt::Display for Position {
    /// 33 characters: two 16-digit upper-case hexadecimal numbers and a dash.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016X}-{:016X}", self.lsn, self.index)
    }
}

/// Text in a shared buffer. Valid UTF-8 by construction.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct Text(Bytes);

impl Text {
    /// `None` when `bytes` is not UTF-8.
    pub fn new(bytes: Bytes) -> Option<Self> {
        std::str::from_utf8(&bytes).is_ok().then_some(Self(bytes))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn as_str(&self) -> &str {
        // checked by `new`
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl From<&'static str> for Text {
    fn from(text: &'static str) -> Self {
        Self(Bytes::from_static(text.as_bytes()))
    }
}

impl From<String> for Text {
    fn from(text: String) -> Self {
        Self(Bytes::from(text))
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

/// An event of an outbox.
#[derive(Clone, PartialEq, Eq)]
pub struct Event {
    /// Opaque; a uuid's text unless the service gives another one.
    pub id: Text,
    pub aggregate_type: Text,
    pub aggregate_id: Text,
    pub kind: Text,
    /// The payload's media type.
    pub content_type: Text,
    /// Must not get into logs or errors.
    pub payload: Bytes,
    /// JSON text of an object: extension attributes.
    pub headers: Bytes,
    /// JSON text of an object, or empty: what the row's transaction handled. Attributes that `headers` does not give.
    pub context: Bytes,
    /// Microseconds since 1970-01-01 UTC.
    pub created_at: Option<i64>,
    pub position: Position,
}

impl fmt::Debug for Event {
    /// Without payload and headers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event")
            .field("id", &self.id)
            .field("kind", &self.kind)
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}

/// Whether a media type is JSON's, by its name or its suffix (RFC 6839): `application/json`, `application/vnd.order+json; v=1`.
pub fn is_json(content_type: &str) -> bool {
    let essence = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence.rsplit_once('/').is_some_and(|(_, subtype)| subtype == "json" || subtype.ends_with("+json"))
}

impl Event {
    /// The event's size in bytes, for the limits of the window.
    pub fn size(&self) -> usize {
        self.payload.len()
            + self.headers.len()
            + self.context.len()
            + self.id.0.len()
            + self.aggregate_type.0.len()
            + self.aggregate_id.0.len()
            + self.kind.0.len()
    }

    /// Hash of what the event belongs to: events of one aggregate are published in order, others beside each other. It is
    /// kept in databases.
    pub fn key(&self) -> u64 {
        let separator = std::iter::once(&0xff);
        let bytes = self.aggregate_type.0.iter().chain(separator).chain(self.aggregate_id.0.iter());
        version::fnv1a(bytes)
    }

    /// The value of a header of the row by its name, when it is a string, number or boolean.
    pub fn header(&self, name: &str) -> Option<String> {
        let text = |object: &[u8]| parsed(object).remove(name).and_then(header_text);
        text(&self.headers).or_else(|| text(&self.context))
    }

    /// Calls `put` with each CloudEvents attribute: its header's name, and its value, which is not encoded yet; `source` is
    /// the relay's. An attribute without a value is left out. An event that belongs to nothing earlier begins something: its
    /// `correlationid` is its own id.
    pub fn attributes(&self, source: &str, mut put: impl FnMut(Cow<'static, str>, Arguments<'_>)) {
        let (aggregate_type, aggregate_id) = (self.aggregate_type.as_str(), self.aggregate_id.as_str());
        let mut fixed = |name: &'static str, value: Arguments<'_>| put(Cow::Borrowed(name), value);
        fixed(HEADER_SPEC_VERSION, format_args!("{SPEC_VERSION}"));
        fixed(HEADER_ID, format_args!("{}", self.id.as_str()));
        fixed(HEADER_SOURCE, format_args!("{source}"));
        fixed(HEADER_TYPE, format_args!("{}", if self.kind.is_empty() { NO_TYPE } else { self.kind.as_str() }));
        if !aggregate_id.is_empty() {
            fixed(HEADER_SUBJECT, format_args!("{aggregate_id}"));
        }
        if let Some(time) = self.created_at.and_then(time) {
            fixed(HEADER_TIME, format_args!("{time}"));
        }
        fixed(HEADER_PARTITION_KEY, format_args!("{aggregate_type}/{aggregate_id}"));
        fixed(HEADER_SEQUENCE, format_args!("{}", self.position));
        fixed(HEADER_DATA_CONTENT_TYPE, format_args!("{}", self.content_type.as_str()));
        let mut is_correlated = false;
        for (name, value) in extensions(&self.headers, &self.context) {
            is_correlated |= name == HEADER_CORRELATION_ID;
            put(Cow::Owned(name), format_args!("{value}"));
        }
        if !is_correlated {
            put(Cow::Borrowed(HEADER_CORRELATION_ID), format_args!("{}", self.id.as_str()));
        }
    }
}

/// `None` for `infinity`, and for years that RFC 3339 cannot write.
fn time(micros: i64) -> Option<jiff::Timestamp> {
    let time = jiff::Timestamp::from_microsecond(micros).ok()?;
    (1..=9999).contains(&time.to_zoned(jiff::tz::TimeZone::UTC).year()).then_some(time)
}

/// The extension attributes in a row's `headers`: names with a string, number or boolean. A name that CloudEvents does not
/// allow (`[a-z0-9]+`) is mapped to one: lower case, without anything but letters and digits; of two that become the same
/// the one that is written so counts. An attribute that is set from a column is left out, and so is one without a value. What
/// the headers do not give is that of the `context`.
fn extensions(headers: &[u8], context: &[u8]) -> impl Iterator<Item = (String, String)> {
    let mut attributes = BTreeMap::new();
    for (name, value) in parsed(headers) {
        let Some(text) = header_text(value).filter(|text| !text.is_empty()) else { continue };
        let attribute = attribute(&name);
        if is_extension(&attribute) && (attribute == name || !attributes.contains_key(&attribute)) {
            attributes.insert(attribute, text);
        }
    }
    for (name, value) in parsed(context) {
        if let Some(text) = header_text(value) {
            attributes.entry(name).or_insert(text);
        }
    }
    attributes.into_iter().map(|(name, text)| (format!("{ATTRIBUTE_PREFIX}{name}"), text))
}

fn parsed(headers: &[u8]) -> Map<String, Value> {
    if headers.len() <= 2 { Map::new() } else { serde_json::from_slice(headers).unwrap_or_default() }
}

fn header_text(value: Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(truth) => Some(truth.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

/// The attribute's name for the name of a header: `X-Tenant` becomes `xtenant`.
fn attribute(name: &str) -> String {
    name.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect()
}

fn is_extension(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_EXTENSION_NAME && !RESERVED.contains(&name)
}

/// Percent-encodes what a header cannot contain, as CloudEvents' HTTP and NATS bindings require: everything outside
/// U+0021–U+007E, and `"` and `%`.
pub fn encode(value: &str) -> Cow<'_, str> {
    let plain = |b: u8| matches!(b, 0x21..=0x7e) && b != b'"' && b != b'%';
    escape(value, plain)
}

/// The inverse of [`encode`]; text that is not properly encoded is returned unchanged.
pub fn decode(value: &str) -> Cow<'_, str> {
    if !value.contains('%') {
        return Cow::Borrowed(value);
    }
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = if first == b'%' { tail.get(..2).and_then(hex) } else { None };
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { tail.get(2..).unwrap_or_default() } else { tail };
    }
    String::from_utf8(bytes).map_or(Cow::Borrowed(value), Cow::Owned)
}

fn hex(digits: &[u8]) -> Option<u8> {
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// Percent-encodes the bytes for which `plain` is false.
pub(crate) fn escape(value: &str, plain: impl Fn(u8) -> bool) -> Cow<'_, str> {
    if value.bytes().all(&plain) {
        return Cow::Borrowed(value);
    }
    let mut encoded = String::with_capacity(value.len() + 8);
    for byte in value.bytes() {
        if plain(byte) {
            encoded.push(char::from(byte));
        } else {
            let digit = |nibble: u8| char::from_digit(u32::from(nibble), 16).unwrap_or('0').to_ascii_uppercase();
            encoded.extend(['%', digit(byte >> 4), digit(byte & 15)]);
        }
    }
    Cow::Owned(encoded)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn event(headers: &'static str) -> Event {
        Event {
            id: "7".into(),
            content_type: CONTENT_TYPE_JSON.into(),
            aggregate_type: "order".into(),
            aggregate_id: "o 1".into(),
            kind: "OrderCreated".into(),
            payload: Bytes::from_static(b"{}"),
            headers: Bytes::from_static(headers.as_bytes()),
            context: Bytes::new(),
            created_at: Some(1_700_000_000_000_000),
            position: Position { lsn: 0x016b_3748, index: 2 },
        }
    }

    fn attributes(event: &Event) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        event.attributes("/shop/orders", |name, value| {
            assert!(all.insert(name.into_owned(), value.to_string()).is_none(), "each once");
        });
        all
    }

    #[test]
    fn what_is_not_an_extension_is_dropped() {
        let all = attributes(&event(r#"{"id": "x", "--": "1", "nested": {}, "attempt": 3, "dry": true}"#));
        assert_eq!(all.get("ce-id"), Some(&"7".to_owned()));
        assert_eq!(all.get("ce-attempt").map(String::as_str), Some("3"));
        assert_eq!(all.get("ce-dry").map(String::as_str), Some("true"));
        assert_eq!(all.len(), 12);
    }

    #[test]
    fn names_that_cloud_events_does_not_allow_are_mapped() {
        let headers = r#"{"correlationId": "1", "X-Tenant": "2", "trace_parent": "3", "a-b": "mapped", "ab": "exact", "aB": "too"}"#;
        let all = attributes(&event(headers));
        for (name, value) in
            [("ce-correlationid", "1"), ("ce-xtenant", "2"), ("ce-traceparent", "3"), ("ce-ab", "exact")]
        {
            assert_eq!(all.get(name).map(String::as_str), Some(value), "{name}");
        }
        assert_eq!(all.len(), 13);
    }

    #[test]
    fn what_the_transaction_handled_is_carried_unless_the_headers_say_otherwise() {
        let carried = |headers, context| {
            let mut event = event(headers);
            event.context = Bytes::from_static(context);
            let all = attributes(&event);
            ["correlationid", "causationid", "traceparent"].map(|name| all.get(&format!("ce-{name}")).cloned())
        };
        let context = br#"{"correlationid": "5", "causationid": "/shop/orders/8", "traceparent": "00-a"}"#;
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(carried("{}", context), [some("5"), some("/shop/orders/8"), some("00-a")]);
        let given = r#"{"correlationId": "mine", "traceparent": ""}"#;
        assert_eq!(carried(given, context), [some("mine"), some("/shop/orders/8"), some("00-a")]);
        assert_eq!(carried("{}", b""), [some("7"), None, None], "an event of nothing earlier begins something");
        let mut event = event(r#"{"causationid": null}"#);
        event.context = Bytes::from_static(context);
        assert_eq!(event.header("causationid").as_deref(), Some("/shop/orders/8"));
    }

    #[test]
    fn no_attribute_is_empty() {
        let mut event = event("{}");
        (event.kind, event.aggregate_id) = ("".into(), "".into());
        // `infinity`, `-infinity`, and a year before the first
        for created_at in [i64::MAX, i64::MIN, -62_200_000_000_000_000] {
            event.created_at = Some(created_at);
            let all = attributes(&event);
            assert_eq!(all.get("ce-type").map(String::as_str), Some("_"));
            assert_eq!((all.get("ce-subject"), all.get("ce-time")), (None, None));
            assert!(all.values().all(|value| !value.is_empty()), "{all:?}");
        }
    }

    #[test]
    fn json_has_many_media_types() {
        for content_type in
            ["application/json", "text/json", "Application/JSON; charset=utf-8", "application/vnd.x+json"]
        {
            assert!(is_json(content_type), "{content_type}");
        }
        for content_type in ["", "json", "application/jsonl", "application/x-ndjson", "text/plain; a=/json"] {
            assert!(!is_json(content_type), "{content_type}");
        }
    }

    #[test]
    fn headers_that_are_not_an_object_are_ignored() {
        assert_eq!(attributes(&event("[1]")).len(), 10);
    }

    #[test]
    fn a_header_never_breaks_the_line_and_decodes_to_the_same_text() {
        for text in ["plain", "a b", "x\r\ny: z", "100%", "Zürich", "\"q\"", "", "%41"] {
            let encoded = encode(text);
            assert!(encoded.bytes().all(|b| matches!(b, 0x21..=0x7e)), "{encoded}");
            assert_eq!(decode(&encoded), text);
        }
        assert_eq!(decode("50% off"), "50% off");
    }

    #[test]
    fn positions_sort_as_their_texts() {
        let positions = [(0, 9), (1, 0), (0xff, 0x10), (0x100, 0), (u64::MAX, u64::MAX)];
        let texts: Vec<String> = positions.iter().map(|&(lsn, index)| Position { lsn, index }.to_string()).collect();
        assert!(texts.is_sorted());
    }
}
