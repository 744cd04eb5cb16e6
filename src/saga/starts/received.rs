//! What a message says of its event.

use std::borrow::Cow;

use async_nats::jetstream::Message;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::domain::event;

/// The attributes and the data of an event, in either mode of CloudEvents; what a message does not have is missing.
#[derive(Debug, Default, Deserialize)]
pub(in crate::saga) struct Received<'a> {
    #[serde(borrow)]
    pub id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub source: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "type")]
    pub kind: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub time: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "correlationid")]
    pub correlation: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "causationid")]
    pub causation: Option<Cow<'a, str>>,
    pub data: Option<Box<RawValue>>,
}

impl<'a> Received<'a> {
    pub(in crate::saga) fn read(message: &'a Message) -> Self {
        let attributes = Self::attributes(message);
        if is_structured(message) {
            return attributes;
        }
        Self { data: serde_json::from_slice(&message.payload).ok(), ..attributes }
    }

    /// As [`Self::read`], without the data of an event in binary mode.
    pub(in crate::saga) fn attributes(message: &'a Message) -> Self {
        if is_structured(message) {
            return serde_json::from_slice(&message.payload).unwrap_or_default();
        }
        let attribute = |name| header(message, name).map(event::decode);
        Self {
            id: attribute(event::HEADER_ID),
            source: attribute(event::HEADER_SOURCE),
            kind: attribute(event::HEADER_TYPE),
            time: attribute(event::HEADER_TIME),
            correlation: attribute(event::HEADER_CORRELATION_ID),
            causation: attribute(event::HEADER_CAUSATION_ID),
            data: None,
        }
    }
}

fn header<'a>(message: &'a Message, name: &str) -> Option<&'a str> {
    message.headers.as_ref()?.get(name).map(async_nats::HeaderValue::as_str)
}

fn is_structured(message: &Message) -> bool {
    header(message, event::HEADER_CONTENT_TYPE).is_some_and(|kind| kind.starts_with(event::CONTENT_TYPE_STRUCTURED))
}
