//! How an event is written as a message. An encoder knows no broker: what a broker has beyond destination, headers and
//! body (NATS' own headers, for example) is its sink's.
//!
//! Messages are written into buffers that are used again, because this is done once for each event.

mod cloud_events;
mod raw;
mod structured;

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
    ops::Range,
};

use bytes::Bytes;

use super::source::Row;
use crate::{
    contract::relay::Format,
    domain::{
        destination::Template,
        event::{self, Event, Text},
    },
};

/// A message for a broker. It is cleared before each event and keeps its buffers.
#[derive(Debug, Default)]
pub struct Message {
    /// In the style of the template.
    pub destination: String,
    /// Of the event's aggregate, within its type: events of one key are in order.
    pub key: Text,
    /// `SOURCE ID SEQ`: the same for every attempt to publish one row, and of no other row.
    pub identity: String,
    /// The row's `created_at`, in microseconds since 1970.
    pub time: Option<i64>,
    pub body: Bytes,
    headers: Vec<(Cow<'static, str>, Range<usize>)>,
    values: String,
}

impl Message {
    /// Names and values. Values consist of U+0021–U+007E.
    pub fn headers(&self) -> impl Iterator<Item = (&Cow<'static, str>, &str)> {
        self.headers.iter().map(|(name, range)| (name, self.values.get(range.clone()).unwrap_or_default()))
    }

    fn put(&mut self, name: impl Into<Cow<'static, str>>, value: fmt::Arguments<'_>) {
        let start = self.values.len();
        // writing into a text never fails
        let _ = Encoded(&mut self.values).write_fmt(value);
        if self.values.len() > start {
            self.headers.push((name.into(), start..self.values.len()));
        }
    }

    /// A media type as a header: the blanks that it may have around `;` would be encoded.
    fn put_content_type(&mut self, content_type: &str) {
        if content_type.contains(' ') {
            self.put(event::HEADER_CONTENT_TYPE, format_args!("{}", content_type.replace(' ', "")));
        } else {
            self.put(event::HEADER_CONTENT_TYPE, format_args!("{content_type}"));
        }
    }

    fn clear(&mut self) {
        let Self { destination, key, identity, time, body, headers, values } = self;
        destination.clear();
        *key = Text::default();
        identity.clear();
        *time = None;
        *body = Bytes::new();
        headers.clear();
        values.clear();
    }
}

/// Writes events of one outbox as messages.
#[derive(Debug)]
pub struct Encoder {
    template: Template,
    format: Format,
    /// CloudEvents `source`.
    source: String,
}

impl Encoder {
    pub fn new(template: Template, format: Format, source: String) -> Self {
        Self { template, format, source }
    }

    /// Replaces what is in `message`.
    pub fn encode(&self, row: &Row, message: &mut Message) {
        let Row { event, place, .. } = row;
        message.clear();
        self.template.write(event, &mut message.destination);
        message.key = event.aggregate_id.clone();
        message.time = event.created_at;
        // ids are unique only within their source, and an application may give one id twice
        let _ = write!(Encoded(&mut message.identity), "{}", self.source);
        message.identity.push(' ');
        let _ = write!(Encoded(&mut message.identity), "{}", event.id.as_str());
        let _ = write!(message.identity, " {}", place.seq);
        self.write(event, message);
    }

    fn write(&self, event: &Event, message: &mut Message) {
        match self.format {
            Format::CloudEvents => cloud_events::write(event, &self.source, message),
            Format::CloudEventsStructured => structured::write(event, &self.source, message),
            Format::Raw => raw::write(event, message),
        }
    }
}

/// Percent-encodes what is written through it, as a header's value.
struct Encoded<'a>(&'a mut String);

impl fmt::Write for Encoded<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.push_str(&event::encode(text));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        domain::{
            destination::Style,
            event::{CONTENT_TYPE_JSON, Position},
        },
        relay::source::Place,
    };

    fn row(headers: &'static str) -> Row {
        let event = Event {
            id: "00000000-0000-0000-0000-000000000007".into(),
            aggregate_type: "order".into(),
            aggregate_id: "o \"1\"".into(),
            kind: "OrderCreated".into(),
            content_type: CONTENT_TYPE_JSON.into(),
            payload: Bytes::from_static(b"{\"n\": 1}"),
            headers: Bytes::from_static(headers.as_bytes()),
            context: Bytes::new(),
            created_at: Some(1_700_000_000_000_000),
            position: Position { lsn: 0x016b_3748, index: 2 },
        };
        Row { event, place: Place { seq: 9, transaction: None }, committed_at: None }
    }

    fn encode(format: Format, row: &Row) -> (BTreeMap<String, String>, String, Message) {
        let template =
            Template::parse("events.{namespace}.{service}.{aggregate_id}", "shop", "orders", Style::Subject).unwrap();
        let encoder = Encoder::new(template, format, "/shop/orders".to_owned());
        let mut message = Message::default();
        // what was in it before is gone
        encoder.encode(&self::row(r#"{"before": "1"}"#), &mut message);
        encoder.encode(row, &mut message);
        let headers: Vec<(String, String)> =
            message.headers().map(|(name, value)| (name.clone().into_owned(), value.to_owned())).collect();
        let all: BTreeMap<String, String> = headers.iter().cloned().collect();
        assert_eq!(all.len(), headers.len(), "each name once");
        assert!(all.values().all(|value| !value.is_empty() && value.bytes().all(|b| matches!(b, 0x21..=0x7e))));
        let body = String::from_utf8_lossy(&message.body).into_owned();
        (all, body, message)
    }

    #[test]
    fn an_event_in_each_format() {
        let row = row(r#"{"traceparent": "00-ab-cd-01", "correlationid": "s 1\n", "attempt": 3}"#);
        for format in [Format::CloudEvents, Format::CloudEventsStructured, Format::Raw] {
            let (headers, body, message) = encode(format, &row);
            assert_eq!(message.destination, "events.shop.orders.o%20\"1\"");
            assert_eq!(message.identity, "/shop/orders 00000000-0000-0000-0000-000000000007 9");
            insta::assert_yaml_snapshot!(format!("{format:?}"), (headers, body));
        }
    }

    #[test]
    fn a_structured_event_is_json_whatever_its_values() {
        let mut row = row(r#"{"x": "\"\\\u0001ü"}"#);
        row.event.kind = "a\"b\\c\n".into();
        let (_, body, _) = encode(Format::CloudEventsStructured, &row);
        let event: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!((&event["type"], &event["x"]), (&"a\"b\\c\n".into(), &"\"\\\u{1}ü".into()));
        assert_eq!((&event["subject"], &event["data"]["n"]), (&"o \"1\"".into(), &1.into()));
        for (content_type, payload, member, value) in [
            ("application/avro", &[0xff, 0, 1][..], "data_base64", "/wAB"),
            ("text/plain", b"a \"b\"", "data_base64", "YSAiYiI="),
            ("application/json", b"{", "data_base64", "ew=="),
            ("application/vnd.x+json", b"\"1\"", "data", "1"),
        ] {
            (row.event.content_type, row.event.payload) = (content_type.into(), Bytes::from_static(payload));
            let (_, body, _) = encode(Format::CloudEventsStructured, &row);
            let event: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert_eq!((&event[member], &event["datacontenttype"]), (&value.into(), &content_type.into()));
        }
    }

    #[test]
    fn a_media_type_with_parameters_stays_one() {
        let mut row = row("{}");
        row.event.content_type = "text/plain; charset=utf-8".into();
        let (headers, ..) = encode(Format::CloudEvents, &row);
        assert_eq!(headers.get("content-type").map(String::as_str), Some("text/plain;charset=utf-8"));
    }

    #[test]
    fn no_header_is_empty_and_none_breaks_its_line() {
        let mut row = row("{}");
        let event = &mut row.event;
        (event.kind, event.aggregate_id, event.created_at) = (Text::default(), Text::default(), None);
        event.id = "a\r\nb c".into();
        for format in [Format::CloudEvents, Format::CloudEventsStructured, Format::Raw] {
            let (headers, _, message) = encode(format, &row);
            assert_eq!(message.identity, "/shop/orders a%0D%0Ab%20c 9", "{headers:?}");
        }
        let (headers, ..) = encode(Format::CloudEvents, &row);
        assert_eq!(headers.get("ce-type").map(String::as_str), Some("_"));
        assert_eq!((headers.get("ce-subject"), headers.get("ce-time")), (None, None));
    }
}
