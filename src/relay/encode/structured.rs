//! CloudEvents in structured mode: the body is a JSON object with the attributes and the data (JSON event format 1.0.2).

use std::fmt::{self, Write as _};

use base64::{Engine, prelude::BASE64_STANDARD};
use bytes::Bytes;

use super::Message;
use crate::domain::event::{self, Event};

pub(super) fn write(event: &Event, source: &str, message: &mut Message) {
    // the attributes have about 350 bytes
    let mut json = String::with_capacity(512 + event.payload.len());
    json.push('{');
    event.attributes(source, |name, value| {
        // no attribute's name needs escaping
        let _ = write!(json, "\"{}\":\"", name.strip_prefix(event::ATTRIBUTE_PREFIX).unwrap_or(&name));
        let _ = Escaped(&mut json).write_fmt(value);
        json.push_str("\",");
    });
    // the payload of a column of bytes may be anything, whatever media type it has
    let is_json = event::is_json(event.content_type.as_str())
        && serde_json::from_slice::<serde::de::IgnoredAny>(&event.payload).is_ok();
    match std::str::from_utf8(&event.payload) {
        Ok(data) if is_json => {
            json.push_str("\"data\":");
            json.push_str(data);
        }
        _ => {
            json.push_str("\"data_base64\":\"");
            BASE64_STANDARD.encode_string(&event.payload, &mut json);
            json.push('"');
        }
    }
    json.push('}');
    message.put(event::HEADER_CONTENT_TYPE, format_args!("{}", event::CONTENT_TYPE_STRUCTURED));
    message.body = Bytes::from(json);
}

/// Escapes what is written through it, as the inside of a JSON string.
struct Escaped<'a>(&'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(|c: char| matches!(c, '"' | '\\' | '\0'..='\x1f')) {
            let (plain, tail) = rest.split_at(at);
            self.0.push_str(plain);
            let mut tail = tail.chars();
            match tail.next() {
                Some(c @ ('"' | '\\')) => self.0.extend(['\\', c]),
                Some(c) => write!(self.0, "\\u{:04x}", u32::from(c))?,
                None => {}
            }
            rest = tail.as_str();
        }
        self.0.push_str(rest);
        Ok(())
    }
}
