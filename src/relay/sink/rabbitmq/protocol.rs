//! What a publisher needs of AMQP 0-9-1: <https://www.rabbitmq.com/amqp-0-9-1-reference>.

use std::borrow::Cow;

use bytes::{Buf, BufMut, BytesMut};

/// What a client sends first.
pub const HEADER: &[u8] = b"AMQP\0\0\x09\x01";
/// The channel that is used. Channel 0 is the connection itself.
pub const CHANNEL: u16 = 1;
/// Bytes of a frame besides its payload.
pub const FRAME: usize = 8;
/// Longest short text: names, routing keys.
pub const MAX_SHORT: usize = 255;
const END: u8 = 0xce;
/// Longest frame that is accepted before another limit is agreed upon, and at most.
pub const MAX_FRAME: usize = 128 * 1024;

const METHOD: u8 = 1;
const CONTENT_HEADER: u8 = 2;
const BODY: u8 = 3;
const HEARTBEAT: u8 = 8;

const BASIC: u16 = 60;
const HAS_CONTENT_TYPE: u16 = 1 << 15;
const HAS_CONTENT_ENCODING: u16 = 1 << 14;
const HAS_HEADERS: u16 = 1 << 13;
const HAS_DELIVERY_MODE: u16 = 1 << 12;
const HAS_PRIORITY: u16 = 1 << 11;
const HAS_CORRELATION_ID: u16 = 1 << 10;
const HAS_REPLY_TO: u16 = 1 << 9;
const HAS_EXPIRATION: u16 = 1 << 8;
const HAS_MESSAGE_ID: u16 = 1 << 7;
const PERSISTENT: u8 = 2;

/// What the server sent is no AMQP 0-9-1.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("it does not speak AMQP 0-9-1")]
pub struct Malformed;

/// What the server sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    Start {
        mechanisms: String,
    },
    Tune {
        max_frame: u32,
    },
    /// What was opened, declared or selected is so.
    Done,
    Blocked {
        reason: String,
    },
    Unblocked,
    ConnectionClosed {
        code: u16,
        text: String,
    },
    ChannelClosed {
        code: u16,
        text: String,
    },
    /// Every message up to this one when `multiple`.
    Confirmed {
        tag: u64,
        multiple: bool,
        stored: bool,
    },
    /// A message that no queue gets follows: its properties, and its body.
    Returned,
    Properties {
        message_id: String,
    },
    /// A heartbeat, a body, or a method without meaning here.
    Other,
}

/// Takes the first frame out of `input`. `None`: it is not complete yet.
pub fn receive(input: &mut BytesMut) -> Result<Option<Received>, Malformed> {
    let Some(header) = input.get(..FRAME - 1) else { return Ok(None) };
    if header.starts_with(b"AMQP") {
        return Err(Malformed); // it answers with the version that it wants
    }
    let mut header = Reader(header);
    let (kind, _channel, length) = (header.byte()?, header.short()?, header.long()? as usize);
    if length > MAX_FRAME {
        return Err(Malformed);
    }
    if input.len() < length + FRAME {
        return Ok(None);
    }
    let frame = input.split_to(length + FRAME);
    let payload = frame.get(FRAME - 1..length + FRAME - 1).ok_or(Malformed)?;
    if frame.last() != Some(&END) {
        return Err(Malformed);
    }
    let received = match kind {
        METHOD => method(Reader(payload))?,
        CONTENT_HEADER => Received::Properties { message_id: message_id(Reader(payload))? },
        BODY | HEARTBEAT => Received::Other,
        _ => return Err(Malformed),
    };
    Ok(Some(received))
}

fn method(mut from: Reader) -> Result<Received, Malformed> {
    Ok(match (from.short()?, from.short()?) {
        (10, 10) => {
            let _version = (from.byte()?, from.byte()?);
            from.table()?;
            Received::Start { mechanisms: from.long_text()? }
        }
        (10, 30) => {
            let _channels = from.short()?;
            Received::Tune { max_frame: from.long()? }
        }
        (10, 41) | (20 | 40 | 85, 11) => Received::Done,
        (10, 50) => Received::ConnectionClosed { code: from.short()?, text: from.short_text()? },
        (20, 40) => Received::ChannelClosed { code: from.short()?, text: from.short_text()? },
        (10, 60) => Received::Blocked { reason: from.short_text()? },
        (10, 61) => Received::Unblocked,
        (60, 50) => Received::Returned,
        (60, 80) => Received::Confirmed { tag: from.long_long()?, multiple: from.byte()? & 1 == 1, stored: true },
        (60, 120) => Received::Confirmed { tag: from.long_long()?, multiple: from.byte()? & 1 == 1, stored: false },
        _ => Received::Other,
    })
}

/// The message id among the properties in a content header; empty without one.
fn message_id(mut from: Reader) -> Result<String, Malformed> {
    let (_class, _weight, _size) = (from.short()?, from.short()?, from.long_long()?);
    let flags = from.short()?;
    let has = |property| flags & property != 0;
    for text in [HAS_CONTENT_TYPE, HAS_CONTENT_ENCODING] {
        if has(text) {
            from.short_text()?;
        }
    }
    if has(HAS_HEADERS) {
        from.table()?;
    }
    for byte in [HAS_DELIVERY_MODE, HAS_PRIORITY] {
        if has(byte) {
            from.byte()?;
        }
    }
    for text in [HAS_CORRELATION_ID, HAS_REPLY_TO, HAS_EXPIRATION] {
        if has(text) {
            from.short_text()?;
        }
    }
    if has(HAS_MESSAGE_ID) { from.short_text() } else { Ok(String::new()) }
}

/// Reads the fields of a frame one after the other.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.0.split_at_checked(count).ok_or(Malformed)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn byte(&mut self) -> Result<u8, Malformed> {
        self.bytes(1).map(|mut bytes| bytes.get_u8())
    }

    fn short(&mut self) -> Result<u16, Malformed> {
        self.bytes(2).map(|mut bytes| bytes.get_u16())
    }

    fn long(&mut self) -> Result<u32, Malformed> {
        self.bytes(4).map(|mut bytes| bytes.get_u32())
    }

    fn long_long(&mut self) -> Result<u64, Malformed> {
        self.bytes(8).map(|mut bytes| bytes.get_u64())
    }

    fn short_text(&mut self) -> Result<String, Malformed> {
        let length = self.byte()?;
        Ok(String::from_utf8_lossy(self.bytes(length.into())?).into_owned())
    }

    fn long_text(&mut self) -> Result<String, Malformed> {
        Ok(String::from_utf8_lossy(self.table()?).into_owned())
    }

    /// A table, as its bytes: like a long text, it begins with its length.
    fn table(&mut self) -> Result<&'a [u8], Malformed> {
        let length = self.long()?;
        self.bytes(length as usize)
    }
}

/// Appends a frame; `fill` writes its payload.
fn frame(output: &mut BytesMut, kind: u8, channel: u16, fill: impl FnOnce(&mut BytesMut)) {
    output.put_u8(kind);
    output.put_u16(channel);
    sized(output, fill);
    output.put_u8(END);
}

/// Appends what `fill` writes, with its length before it.
fn sized(output: &mut BytesMut, fill: impl FnOnce(&mut BytesMut)) {
    let start = output.len();
    output.put_u32(0);
    fill(output);
    let length = u32::try_from(output.len() - start - 4).unwrap_or(u32::MAX);
    if let Some(mut place) = output.get_mut(start..start + 4) {
        place.put_u32(length);
    }
}

fn call(output: &mut BytesMut, channel: u16, (class, method): (u16, u16), fill: impl FnOnce(&mut BytesMut)) {
    frame(output, METHOD, channel, |output| {
        output.put_u16(class);
        output.put_u16(method);
        fill(output);
    });
}

pub fn start_ok(output: &mut BytesMut, name: &str, mechanism: &str, response: &str) {
    call(output, 0, (10, 11), |output| {
        sized(output, |properties| {
            for (key, value) in [("connection_name", name), ("product", "weft")] {
                short_text(properties, key);
                properties.put_u8(b'S');
                long_text(properties, value);
            }
            short_text(properties, "capabilities");
            properties.put_u8(b'F');
            sized(properties, |capabilities| {
                for known in ["publisher_confirms", "basic.nack", "connection.blocked", "authentication_failure_close"]
                {
                    short_text(capabilities, known);
                    capabilities.put_slice(b"t\x01");
                }
            });
        });
        short_text(output, mechanism);
        long_text(output, response);
        short_text(output, "en_US");
    });
}

pub fn tune_ok(output: &mut BytesMut, max_frame: u32, heartbeat_seconds: u16) {
    call(output, 0, (10, 31), |output| {
        output.put_u16(CHANNEL); // so many channels
        output.put_u32(max_frame);
        output.put_u16(heartbeat_seconds);
    });
}

pub fn open(output: &mut BytesMut, virtual_host: &str) {
    call(output, 0, (10, 40), |output| {
        short_text(output, virtual_host);
        output.put_slice(&[0, 0]); // reserved
    });
}

pub fn open_channel(output: &mut BytesMut) {
    call(output, CHANNEL, (20, 10), |output| output.put_u8(0)); // reserved
}

pub fn close_channel_ok(output: &mut BytesMut) {
    call(output, CHANNEL, (20, 41), |_| {});
}

/// Declares a durable topic exchange; `passive` only asks whether it exists.
pub fn declare_exchange(output: &mut BytesMut, exchange: &str, passive: bool) {
    const DURABLE: u8 = 2;
    call(output, CHANNEL, (40, 10), |output| {
        output.put_u16(0); // reserved
        short_text(output, exchange);
        short_text(output, "topic");
        output.put_u8(DURABLE | u8::from(passive));
        sized(output, |_no_arguments| {});
    });
}

pub fn select_confirms(output: &mut BytesMut) {
    call(output, CHANNEL, (85, 10), |output| output.put_u8(0));
}

pub fn publish(output: &mut BytesMut, exchange: &str, routing_key: &str, mandatory: bool) {
    call(output, CHANNEL, (BASIC, 40), |output| {
        output.put_u16(0); // reserved
        short_text(output, exchange);
        short_text(output, routing_key);
        output.put_u8(u8::from(mandatory));
    });
}

pub fn body(output: &mut BytesMut, body: &[u8], max_frame: usize) {
    for part in body.chunks(max_frame - FRAME) {
        frame(output, BODY, CHANNEL, |output| output.put_slice(part));
    }
}

pub fn heartbeat(output: &mut BytesMut) {
    frame(output, HEARTBEAT, 0, |_| {});
}

/// A text that is longer than [`MAX_SHORT`] is cut: who has one of the row checks it before.
fn short_text(output: &mut BytesMut, text: &str) {
    let text = text.as_bytes();
    let text = text.get(..text.len().min(MAX_SHORT)).unwrap_or_default();
    output.put_u8(u8::try_from(text.len()).unwrap_or(u8::MAX));
    output.put_slice(text);
}

fn long_text(output: &mut BytesMut, text: &str) {
    sized(output, |output| output.put_slice(text.as_bytes()));
}

/// Appends the properties of a persistent message of `size` bytes. Returns the bytes of their frame.
pub fn properties<'a>(
    output: &mut BytesMut,
    size: usize,
    content_type: Option<&str>,
    headers: impl Iterator<Item = (Cow<'a, str>, Cow<'a, str>)>,
    message_id: &str,
) -> usize {
    let start = output.len();
    frame(output, CONTENT_HEADER, CHANNEL, |output| {
        output.put_u16(BASIC);
        output.put_u16(0); // weight, unused
        output.put_u64(size as u64);
        let flags = HAS_HEADERS | HAS_DELIVERY_MODE | HAS_MESSAGE_ID;
        output.put_u16(if content_type.is_some() { flags | HAS_CONTENT_TYPE } else { flags });
        if let Some(content_type) = content_type {
            short_text(output, content_type);
        }
        sized(output, |table| {
            for (name, value) in headers {
                short_text(table, &name);
                table.put_u8(b'S');
                long_text(table, &value);
            }
        });
        output.put_u8(PERSISTENT);
        short_text(output, message_id);
    });
    output.len() - start
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_read_however_they_are_cut() {
        let mut bytes = BytesMut::new();
        heartbeat(&mut bytes);
        call(&mut bytes, CHANNEL, (60, 80), |output| {
            output.put_u64(7);
            output.put_u8(1);
        });
        call(&mut bytes, CHANNEL, (60, 50), |output| {
            output.put_u16(312);
            short_text(output, "NO_ROUTE");
            short_text(output, "events");
            short_text(output, "a.b");
        });
        let headers = [("cloudEvents:id".into(), "1".into())].into_iter();
        properties(&mut bytes, 3, Some("text/plain"), headers, "/shop/orders 1 1");
        body(&mut bytes, b"abc", 4096);
        call(&mut bytes, CHANNEL, (20, 40), |output| {
            output.put_u16(404);
            short_text(output, "NOT_FOUND");
        });
        let expected = [
            Received::Other,
            Received::Confirmed { tag: 7, multiple: true, stored: true },
            Received::Returned,
            Received::Properties { message_id: "/shop/orders 1 1".to_owned() },
            Received::Other,
            Received::ChannelClosed { code: 404, text: "NOT_FOUND".to_owned() },
        ];
        for size in 1..bytes.len() {
            let (mut input, mut all) = (BytesMut::new(), Vec::new());
            for chunk in bytes.chunks(size) {
                input.extend_from_slice(chunk);
                while let Some(received) = receive(&mut input).unwrap() {
                    all.push(received);
                }
            }
            assert_eq!(all, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn a_body_is_cut_into_frames_that_the_server_accepts() {
        let mut output = BytesMut::new();
        body(&mut output, &[7; 10_000], 4096);
        assert_eq!(output.len(), 10_000 + 3 * FRAME);
        let mut none = BytesMut::new();
        body(&mut none, b"", 4096);
        assert!(none.is_empty());
    }

    #[test]
    fn what_is_no_frame_is_an_error() {
        for bytes in
            [&b"AMQP\0\0\x09\x01"[..], b"HTTP/1.1 400 Bad Request\r\n", b"\x01\0\0\0\0\0\0\0", b"\x07\0\0\0\0\0\0\xce"]
        {
            assert_eq!(receive(&mut BytesMut::from(bytes)), Err(Malformed), "{bytes:?}");
        }
    }
}
