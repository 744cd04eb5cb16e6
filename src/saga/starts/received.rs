//! What a message says of its event.

use std::borrow::Cow;

use async_nats::jetstream::Message;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::domain::event;

/// The attributes and the data of an event, in either mode of CloudEvents; what a message does not have is missing.
#[derive(Debug, Default, Deserialize)]
pub(super) struct Received<'a> {
    #[serde(borrow)]
    pub id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    pub source: Option<Cow<'a, str>>,
    #[serde(borrow, rename = "type")]
    pub kind: Option<Cow<'a, str>>,
    pub data: Option<Box<RawValue>>,
}

impl<'a> Received<'a> {
    pub(super) fn read(message: &'a Message) -> Self {
        let header = |name: &str| message.headers.as_ref()?.get(name).map(async_nats::HeaderValue::as_str);
        if header(event::HEADER_CONTENT_TYPE).is_some_and(|kind| kind.starts_with(event::CONTENT_TYPE_STRUCTURED)) {
            return serde_json::from_slice(&message.payload).unwrap_or_default();
        }
        let attribute = |name| header(name).map(event::decode);
        Self {
            id: attribute(event::HEADER_ID),
            source: attribute(event::HEADER_SOURCE),
            kind: attribute(event::HEADER_TYPE),
            data: serde_json::from_slice(&message.payload).ok(),
        }
    }
}
