//! The payload alone. Three headers are for consumers that drop duplicates, keep the order, or need the media type.

use super::Message;
use crate::domain::event::Event;

/// The event's id.
const HEADER_ID: &str = "event-id";
/// `AGGREGATE_TYPE/AGGREGATE_ID`: events with the same key are in commit order.
const HEADER_KEY: &str = "event-key";

pub(super) fn write(event: &Event, message: &mut Message) {
    message.put(HEADER_ID, format_args!("{}", event.id.as_str()));
    message.put(HEADER_KEY, format_args!("{}/{}", event.aggregate_type.as_str(), event.aggregate_id.as_str()));
    message.put_content_type(event.content_type.as_str());
    message.body = event.payload.clone();
}
