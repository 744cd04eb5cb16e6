//! RESP2, the protocol of Redis: <https://redis.io/docs/latest/develop/reference/protocol-spec/>.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Deepest nesting of a reply. Those that are asked for have two levels.
const DEPTH: u8 = 8;
/// Longest reply that is waited for: no command that is sent has a longer one.
const MAX_REPLY: usize = 1024 * 1024;

/// What the server sent is no RESP2.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("it does not speak the protocol of Redis")]
pub struct Malformed;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `OK`, or a value; empty where there is none.
    Text(Bytes),
    /// Begins with a code: `WRONGTYPE Operation against…`.
    Error(String),
    Integer(i64),
    List(Vec<Reply>),
}

impl Reply {
    /// The text, where it is one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => std::str::from_utf8(text).ok(),
            Self::Error(_) | Self::Integer(_) | Self::List(_) => None,
        }
    }
}

/// Begins a command of `count` arguments, its name included.
pub fn begin(output: &mut BytesMut, count: usize) {
    header(output, b'*', count);
}

pub fn argument(output: &mut BytesMut, argument: &[u8]) {
    header(output, b'$', argument.len());
    output.put_slice(argument);
    output.put_slice(b"\r\n");
}

fn header(output: &mut BytesMut, kind: u8, number: usize) {
    output.put_u8(kind);
    // writing into the buffer never fails
    let _ = std::fmt::Write::write_fmt(output, format_args!("{number}\r\n"));
}

/// Takes the first reply out of `input`. `None`: it is not complete yet.
pub fn reply(input: &mut BytesMut) -> Result<Option<Reply>, Malformed> {
    let mut rest = &input[..];
    let parsed = parse(&mut rest, DEPTH)?;
    match parsed {
        Some(reply) => {
            let used = input.len() - rest.len();
            input.advance(used);
            Ok(Some(reply))
        }
        None if input.len() > MAX_REPLY => Err(Malformed),
        None => Ok(None),
    }
}

fn parse(rest: &mut &[u8], depth: u8) -> Result<Option<Reply>, Malformed> {
    let Some(end) = rest.windows(2).position(|pair| pair == b"\r\n") else { return Ok(None) };
    let (line, after) = (rest.get(..end).unwrap_or_default(), rest.get(end + 2..).unwrap_or_default());
    let (&kind, line) = line.split_first().ok_or(Malformed)?;
    let text = std::str::from_utf8(line).map_err(|_| Malformed);
    let number = || text?.parse::<i64>().map_err(|_| Malformed);
    *rest = after;
    Ok(Some(match kind {
        b'+' => Reply::Text(Bytes::copy_from_slice(line)),
        b'-' => Reply::Error(String::from_utf8_lossy(line).into_owned()),
        b':' => Reply::Integer(number()?),
        b'$' => {
            let length = number()?;
            let Ok(length) = usize::try_from(length) else { return Ok(Some(Reply::Text(Bytes::new()))) };
            if length > MAX_REPLY {
                return Err(Malformed);
            }
            let Some(value) = rest.get(..length + 2) else { return Ok(None) };
            let value = value.strip_suffix(b"\r\n").ok_or(Malformed)?;
            *rest = rest.get(length + 2..).unwrap_or_default();
            Reply::Text(Bytes::copy_from_slice(value))
        }
        b'*' => {
            let depth = depth.checked_sub(1).ok_or(Malformed)?;
            let mut list = Vec::new();
            for _ in 0..number()? {
                let Some(reply) = parse(rest, depth)? else { return Ok(None) };
                list.push(reply);
            }
            Reply::List(list)
        }
        _ => return Err(Malformed),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &'static str) -> Reply {
        Reply::Text(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn a_command_is_a_list_of_its_arguments() {
        let mut output = BytesMut::new();
        begin(&mut output, 2);
        argument(&mut output, b"AUTH");
        argument(&mut output, "ü\r\n".as_bytes());
        assert_eq!(&output[..], "*2\r\n$4\r\nAUTH\r\n$4\r\nü\r\n\r\n".as_bytes());
    }

    #[test]
    fn replies_are_read_in_their_order_however_they_are_cut() {
        let bytes = b"+OK\r\n$3\r\n1-1\r\n-ERR no\r\n:7\r\n$-1\r\n*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n*-1\r\n";
        let expected = [
            text("OK"),
            text("1-1"),
            Reply::Error("ERR no".to_owned()),
            Reply::Integer(7),
            text(""),
            Reply::List(vec![text("master"), Reply::Integer(0), Reply::List(Vec::new())]),
            Reply::List(Vec::new()),
        ];
        for size in 1..bytes.len() {
            let (mut input, mut replies) = (BytesMut::new(), Vec::new());
            for chunk in bytes.chunks(size) {
                input.extend_from_slice(chunk);
                while let Some(reply) = reply(&mut input).unwrap() {
                    replies.push(reply);
                }
            }
            assert_eq!(replies, expected, "in pieces of {size}");
        }
    }

    #[test]
    fn what_is_no_reply_is_an_error() {
        let deep = b"*1\r\n".repeat(usize::from(DEPTH) + 1);
        for bytes in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"\r\n", b":x\r\n", b"$x\r\n", b"$1\r\nabc\r\n", &deep] {
            assert_eq!(reply(&mut BytesMut::from(bytes)), Err(Malformed), "{bytes:?}");
        }
    }
}
