//! CloudEvents in binary mode: attributes are headers, the payload is the body. See [`crate::domain::event`].

use super::Message;
use crate::domain::event::Event;

pub(super) fn write(event: &Event, source: &str, message: &mut Message) {
    event.attributes(source, |name, value| message.put(name, value));
    message.put_content_type(event.content_type.as_str());
    message.body = event.payload.clone();
}
