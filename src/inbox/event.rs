//! An event as a broker's message has it: attributes and data, in either mode of CloudEvents.

use std::{borrow::Cow, collections::BTreeMap};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, value::RawValue};

use crate::domain::event::{self, decode};

/// A larger event is not delivered.
pub(super) const MAX_BYTES: usize = 8 << 20;

/// Why a message can never be delivered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unusable {
    #[error("it is no CloudEvent: it has no {0}")]
    NoEvent(&'static str),
    #[error("it is a CloudEvent of version {0}, and this version of weft reads {read}", read = event::SPEC_VERSION)]
    Version(String),
    #[error("its structured form is not JSON: {0}")]
    NotJson(String),
    #[error("it has {0} bytes, and at most {MAX_BYTES} are delivered")]
    TooLarge(usize),
}

/// Attributes by their names, decoded, without `datacontenttype`; and the data.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Event {
    pub attributes: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    #[serde(skip)]
    pub data: Bytes,
}

impl Event {
    /// Reads a message's headers and body. What is unusable is kept as far as it was understood.
    pub(super) fn read<'a>(
        headers: impl Iterator<Item = (&'a str, &'a str)>,
        body: Bytes,
    ) -> (Self, Result<(), Unusable>) {
        let (mut attributes, mut content_type) = (BTreeMap::new(), None);
        for (name, value) in headers {
            if name.eq_ignore_ascii_case(event::HEADER_CONTENT_TYPE) {
                content_type.get_or_insert_with(|| value.to_owned());
            } else if let Some(attribute) = attribute(name) {
                attributes.insert(attribute, decode(value).into_owned());
            }
        }
        let structured = content_type.as_deref().is_some_and(|kind| kind.starts_with(event::CONTENT_TYPE_STRUCTURED));
        let size = body.len();
        let mut read = Self { attributes, content_type, data: body };
        if size > MAX_BYTES {
            return (read, Err(Unusable::TooLarge(size)));
        }
        if structured && let Err(unusable) = read.unfold() {
            return (read, Err(unusable));
        }
        // no text of the database has it, and no attribute may
        read.attributes.values_mut().for_each(|value| value.retain(|c| c != '\0'));
        if let Some(content_type) = read.attributes.remove("datacontenttype") {
            read.content_type = Some(content_type);
        }
        let checked = read.check();
        (read, checked)
    }

    /// Makes the attributes and the data of a body in structured mode.
    fn unfold(&mut self) -> Result<(), Unusable> {
        #[derive(Deserialize)]
        struct Structured {
            data: Option<Box<RawValue>>,
            data_base64: Option<String>,
            #[serde(flatten)]
            attributes: Map<String, Value>,
        }
        let not_json = |error: serde_json::Error| Unusable::NotJson(error.to_string());
        let structured: Structured = serde_json::from_slice(&self.data).map_err(not_json)?;
        let text = |value| match value {
            Value::String(text) => Some(text),
            Value::Number(number) => Some(number.to_string()),
            Value::Bool(truth) => Some(truth.to_string()),
            Value::Null | Value::Array(_) | Value::Object(_) => None,
        };
        let attributes = structured.attributes.into_iter().filter_map(|(name, value)| Some((name, text(value)?)));
        self.attributes = attributes.collect();
        self.content_type = Some(event::CONTENT_TYPE_JSON.to_owned());
        self.data = match (structured.data, structured.data_base64) {
            (Some(data), _) => Bytes::from(data.get().to_owned()),
            (None, Some(text)) => {
                let decoded = BASE64_STANDARD.decode(text);
                Bytes::from(decoded.map_err(|error| Unusable::NotJson(format!("data_base64: {error}")))?)
            }
            (None, None) => Bytes::new(),
        };
        Ok(())
    }

    fn check(&self) -> Result<(), Unusable> {
        match self.get("specversion") {
            None => return Err(Unusable::NoEvent("specversion")),
            Some(event::SPEC_VERSION) => {}
            Some(other) => return Err(Unusable::Version(other.to_owned())),
        }
        let needed = ["id", "source", "type"];
        needed.into_iter().find(|name| self.get(name).is_none()).map_or(Ok(()), |name| Err(Unusable::NoEvent(name)))
    }

    pub(super) fn get(&self, attribute: &str) -> Option<&str> {
        self.attributes.get(attribute).map(String::as_str).filter(|value| !value.is_empty())
    }

    pub(super) fn id(&self) -> &str {
        self.get("id").unwrap_or_default()
    }

    pub(super) fn source(&self) -> &str {
        self.get("source").unwrap_or_default()
    }

    /// CloudEvents `type`.
    pub(super) fn kind(&self) -> &str {
        self.get("type").unwrap_or_default()
    }

    /// Events with the same key are delivered in the order of the stream: those of one partition key, or of one subject where there is
    /// none. Events with neither have no order.
    pub(super) fn key(&self) -> u64 {
        let key = self.get("partitionkey").or_else(|| self.get("subject")).unwrap_or_else(|| self.id());
        crate::domain::version::fnv1a(key.as_bytes())
    }

    /// Headers of the HTTP binding: names and encoded values.
    pub(super) fn headers(&self) -> impl Iterator<Item = (String, Cow<'_, str>)> {
        let attributes = self.attributes.iter().filter(|(_, value)| !value.is_empty());
        attributes.map(|(name, value)| (format!("{}{name}", event::ATTRIBUTE_PREFIX), event::encode(value)))
    }

    /// The JSON event format: attributes, and `data` or `data_base64`.
    pub(super) fn to_json(&self) -> String {
        let mut members: BTreeMap<&str, Cow<'_, str>> =
            self.attributes.iter().map(|(name, value)| (name.as_str(), value.as_str().into())).collect();
        if let Some(content_type) = &self.content_type {
            members.insert("datacontenttype", content_type.into());
        }
        // a map of strings always has a form in JSON
        let mut json = serde_json::to_string(&members).unwrap_or_default();
        json.pop();
        let is_json = self.content_type.as_deref().is_none_or(event::is_json);
        match std::str::from_utf8(&self.data) {
            Ok("") => {}
            Ok(data) if is_json && serde_json::from_str::<serde::de::IgnoredAny>(data).is_ok() => {
                json.push_str(",\"data\":");
                json.push_str(data);
            }
            _ => {
                json.push_str(",\"data_base64\":\"");
                BASE64_STANDARD.encode_string(&self.data, &mut json);
                json.push('"');
            }
        }
        json.push('}');
        json
    }

    /// Attributes and media type, as `weft.inbox_held` has them: this type's own JSON.
    pub(super) fn to_record(&self) -> String {
        // texts and maps of texts always have a form in JSON
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Bytes that the event occupies, about.
    pub(super) fn size(&self) -> usize {
        self.data.len() + self.attributes.iter().map(|(name, value)| name.len() + value.len() + 96).sum::<usize>()
    }
}

/// `ce-type` is the attribute `type`. Names of headers are not case-sensitive everywhere.
fn attribute(header: &str) -> Option<String> {
    let (prefix, name) = header.split_at_checked(event::ATTRIBUTE_PREFIX.len())?;
    prefix.eq_ignore_ascii_case(event::ATTRIBUTE_PREFIX).then(|| name.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(headers: &[(&str, &str)], body: &'static [u8]) -> (Event, Result<(), Unusable>) {
        Event::read(headers.iter().copied(), Bytes::from_static(body))
    }

    const HEADERS: [(&str, &str); 7] = [
        ("ce-specversion", "1.0"),
        ("Ce-Id", "7"),
        ("ce-source", "/shop/orders"),
        ("ce-type", "OrderCreated"),
        ("ce-partitionkey", "order/a%20b"),
        ("ce-datacontenttype", "application/json"),
        ("content-type", "application/json"),
    ];

    #[test]
    fn an_event_in_binary_mode_is_read_and_written() {
        let (event, checked) = read(&HEADERS, br#"{"n": 1}"#);
        assert_eq!(checked, Ok(()));
        assert_eq!((event.id(), event.get("partitionkey")), ("7", Some("order/a b")));
        let headers: BTreeMap<_, _> = event.headers().collect();
        assert_eq!(headers["ce-partitionkey"], "order/a%20b");
        assert!(!headers.contains_key("ce-datacontenttype"), "it is the content type of HTTP");
        assert_eq!(
            event.to_json(),
            r#"{"datacontenttype":"application/json","id":"7","partitionkey":"order/a b","source":"/shop/orders","specversion":"1.0","type":"OrderCreated","data":{"n": 1}}"#
        );
    }

    #[test]
    fn an_event_in_structured_mode_is_the_same_event() {
        let (binary, _) = read(&HEADERS, br#"{"n": 1}"#);
        let json: &'static [u8] = Box::leak(binary.to_json().into_boxed_str()).as_bytes();
        let (structured, checked) = read(&[("content-type", "application/cloudevents+json; charset=utf-8")], json);
        assert_eq!(checked, Ok(()));
        assert_eq!(structured, binary);
        let bytes =
            read(&[HEADERS[0], HEADERS[1], HEADERS[2], HEADERS[3], ("ce-datacontenttype", "a/b")], b"\xff\x00").0;
        let json: &'static [u8] = Box::leak(bytes.to_json().into_boxed_str()).as_bytes();
        assert_eq!(read(&[("content-type", "application/cloudevents+json")], json).0, bytes);
    }

    #[test]
    fn what_is_no_event_is_said_in_one_sentence() {
        let why = |headers: &[(&str, &str)], body: &'static [u8]| read(headers, body).1.unwrap_err().to_string();
        assert_eq!(why(&[], b"{}"), "it is no CloudEvent: it has no specversion");
        assert_eq!(why(&HEADERS[..2], b"{}"), "it is no CloudEvent: it has no source");
        let version = why(&[("ce-specversion", "0.3")], b"");
        assert_eq!(version, "it is a CloudEvent of version 0.3, and this version of weft reads 1.0");
        assert!(why(&[("content-type", "application/cloudevents+json")], b"{").starts_with("its structured form"));
        assert!(why(&HEADERS, Box::leak(vec![b' '; MAX_BYTES + 1].into_boxed_slice())).contains("at most 8388608"));
    }

    #[test]
    fn events_are_in_order_by_partition_key_or_subject() {
        let with = |name: &'static str, value: &'static str| {
            Event { attributes: [(name.to_owned(), value.to_owned())].into(), ..Event::default() }.key()
        };
        assert_eq!(with("partitionkey", "a"), with("subject", "a"));
        assert_ne!(with("partitionkey", "a"), with("partitionkey", "b"));
    }
}
