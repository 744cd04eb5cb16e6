//! Redis Streams: pipelined `XADD` on one connection, whose replies come in the order of the commands.
//!
//! The client is written here, because what is needed of the protocol is a list of arguments and a reply: events go into one
//! buffer, and a reply belongs to the first command that waits.
//!
//! The server gives the ids (`*`). Ids made from the event's position would let it drop duplicates, but ids of a stream must grow:
//! an event that is sent again after an error would be refused when a later one of another aggregate has passed it.

mod protocol;

use std::collections::VecDeque;

use jiff::Timestamp;

use self::protocol::{Malformed, Reply, argument, begin};
use super::{
    Answer, Session, Sink, SinkError,
    wire::{self, Address, AddressError, Progress, Wire},
};
use crate::{
    contract::relay::RedisSink,
    domain::event::decode,
    outage::{Failure, Outage},
    relay::{encode::Message, window::Ticket},
    secret::SecretFolder,
};

const SCHEMES: [(&str, u16); 2] = [("redis", 6379), ("rediss", 6379)];
/// Field of an entry that has the event's body.
const DATA: &str = "data";
/// Largest value that a server accepts unless it is configured otherwise: `proto-max-bulk-len`.
const MAX_VALUE: usize = 512 * 1024 * 1024;

/// What an error of the server means for an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// It concerns the connection: no event is accepted.
    Everybody,
    /// Trying again may help.
    Passing,
    /// It concerns this event.
    Refused,
}

/// Errors by the codes that they begin with, and what a person can do about them. Any other passes: when others are stored
/// meanwhile, the event is held after some attempts.
const ERRORS: [(&str, Meaning, &str); 15] = [
    ("NOAUTH", Meaning::Everybody, "check the Secret that spec.sink.redis.secret names"),
    ("WRONGPASS", Meaning::Everybody, "check the Secret that spec.sink.redis.secret names"),
    ("READONLY", Meaning::Everybody, "it is a replica: name the primary, too"),
    ("MASTERDOWN", Meaning::Everybody, "it is a replica that has lost its primary"),
    ("NOPERM", Meaning::Passing, "permit the user XADD and the streams' keys"),
    ("OOM", Meaning::Passing, "its memory is full: trim the streams (maxLength), or raise maxmemory"),
    ("MISCONF", Meaning::Passing, "it cannot write to its disk"),
    ("NOREPLICAS", Meaning::Passing, "it has fewer replicas than min-replicas-to-write"),
    ("LOADING", Meaning::Passing, "it starts"),
    ("BUSY", Meaning::Passing, "it runs a script"),
    ("CLUSTERDOWN", Meaning::Passing, "its cluster is incomplete"),
    ("TRYAGAIN", Meaning::Passing, "its cluster moves the stream"),
    ("ASK", Meaning::Passing, "its cluster moves the stream"),
    ("MOVED", Meaning::Passing, "the stream is on another node of its cluster, which the relay does not look for"),
    (
        "WRONGTYPE",
        Meaning::Refused,
        "the key of its stream has a value of another type: delete that, or change spec.sink.redis.stream",
    ),
];
/// Texts of errors without a code of their own that concern one event.
const TOO_LARGE: [&str; 2] = ["too large to be stored", "invalid bulk length"];
const NOT_KNOWN: &str = "unknown command";

fn meaning(error: &str) -> (Meaning, Option<&'static str>) {
    let code = error.split(' ').next().unwrap_or_default();
    if let Some((_, meaning, remedy)) = ERRORS.iter().find(|(known, ..)| *known == code) {
        return (*meaning, Some(remedy));
    }
    if TOO_LARGE.iter().any(|text| error.contains(text)) {
        return (Meaning::Refused, None);
    }
    let remedy = error.contains(NOT_KNOWN).then_some("streams need Redis 5 or newer, and XADD under its name");
    (Meaning::Passing, remedy)
}

/// The error as a sentence. What the server quotes is left out: it may be a value of the row.
fn sentence(error: &str, remedy: Option<&str>) -> String {
    let end = error.find(['\'', '`', '"']).unwrap_or(error.len());
    let said: String = error.chars().take(error.get(..end).map_or(0, |said| said.chars().count()).min(200)).collect();
    let said = said.trim_end_matches([' ', '.', ',', ':']);
    remedy.map_or_else(|| said.to_owned(), |remedy| format!("{said}; {remedy}"))
}

/// The servers of one Redis: the primary is found among them.
#[derive(Debug)]
pub struct Redis {
    addresses: Vec<Address>,
    secret: SecretFolder,
    max_length: Option<u64>,
    /// Shown by `CLIENT LIST`.
    name: String,
}

impl Redis {
    pub fn new(sink: &RedisSink, name: &str) -> Result<Self, AddressError> {
        Ok(Self {
            addresses: Address::parse_all(&sink.servers, SCHEMES)?,
            secret: SecretFolder::new(sink.secret_folder.clone()),
            max_length: sink.max_length,
            // the server accepts no blanks in it
            name: name.replace(' ', "-"),
        })
    }

    async fn open(&self, address: Address) -> Result<RedisSession, Failure> {
        let tls = if address.is_tls() { Some(self.secret.tls().await?) } else { None };
        let login = self.secret.login().await?;
        let mut wire = Wire::open(&address, tls).await?;
        if let Some((user, password)) = login {
            match call(&mut wire, &["AUTH", &user, &password]).await? {
                Reply::Error(error) => {
                    let remedy = meaning(&error).1.unwrap_or("check the Secret that spec.sink.redis.secret names");
                    return Err(Failure::Refused(sentence(&error, Some(remedy))));
                }
                Reply::Text(_) | Reply::Integer(_) | Reply::List(_) => {}
            }
        }
        // for a user without the right to ask these, the events' answers say it
        match call(&mut wire, &["ROLE"]).await? {
            Reply::Error(error) if meaning(&error).0 == Meaning::Everybody => {
                return Err(Failure::Refused(sentence(&error, meaning(&error).1)));
            }
            Reply::List(role) => match role.first().and_then(Reply::text) {
                Some("master") | None => {}
                Some(_) => return Err(Failure::Refused("it is no primary: name the primary, too".to_owned())),
            },
            Reply::Error(_) | Reply::Text(_) | Reply::Integer(_) => {}
        }
        call(&mut wire, &["CLIENT", "SETNAME", &self.name]).await?;
        let max_value = match call(&mut wire, &["CONFIG", "GET", "proto-max-bulk-len"]).await? {
            Reply::List(pair) => pair.get(1).and_then(Reply::text).and_then(|bytes| bytes.parse().ok()),
            Reply::Error(_) | Reply::Text(_) | Reply::Integer(_) => None,
        };
        Ok(RedisSession {
            wire,
            address: address.to_string(),
            max_length: self.max_length.map(|length| length.to_string()),
            max_value: max_value.unwrap_or(MAX_VALUE),
            waiting: VecDeque::new(),
        })
    }
}

/// Sends a command and waits for its reply.
async fn call(wire: &mut Wire, arguments: &[&str]) -> Result<Reply, Failure> {
    begin(&mut wire.output, arguments.len());
    for argument in arguments {
        self::argument(&mut wire.output, argument.as_bytes());
    }
    loop {
        if let Some(reply) = protocol::reply(&mut wire.input).map_err(malformed)? {
            return Ok(reply);
        }
        wire.exchange().await?;
    }
}

fn malformed(error: Malformed) -> Failure {
    Failure::Refused(error.to_string())
}

impl Sink for Redis {
    const SERVER: &'static str = "Redis";
    type Session = RedisSession;

    async fn connect(&self) -> Result<RedisSession, SinkError> {
        wire::first(Self::SERVER, &self.addresses, |address| self.open(address)).await
    }
}

/// One connection to the primary.
#[derive(Debug)]
pub struct RedisSession {
    wire: Wire,
    address: String,
    max_length: Option<String>,
    max_value: usize,
    /// The commands without a reply yet, in their order; `None` is a `PING`.
    waiting: VecDeque<Option<Ticket>>,
}

impl Session for RedisSession {
    async fn publish(&mut self, ticket: Ticket, message: &Message) -> Result<Option<Answer>, SinkError> {
        let size = message.body.len();
        if size > self.max_value {
            let most = self.max_value;
            return Ok(Some(Answer::Refused(format!(
                "it has {size} bytes and Redis accepts {most}: raise the server's proto-max-bulk-len"
            ))));
        }
        let output = &mut self.wire.output;
        // a length has three arguments; the names are `XADD`, the stream and its id
        let trimming = if self.max_length.is_some() { 3 } else { 0 };
        begin(output, 3 + trimming + 2 * (message.headers().count() + 1));
        argument(output, b"XADD");
        argument(output, message.destination.as_bytes());
        if let Some(length) = &self.max_length {
            argument(output, b"MAXLEN");
            argument(output, b"~");
            argument(output, length.as_bytes());
        }
        argument(output, b"*");
        for (name, value) in message.headers() {
            argument(output, name.as_bytes());
            argument(output, decode(value).as_bytes());
        }
        argument(output, DATA.as_bytes());
        argument(output, &message.body);
        self.waiting.push_back(Some(ticket));
        Ok(None)
    }

    fn has_room(&self) -> bool {
        self.wire.has_room()
    }

    async fn replies(&mut self, replies: &mut Vec<super::Reply>) -> Result<(), SinkError> {
        loop {
            while let Some(reply) =
                protocol::reply(&mut self.wire.input).map_err(|error| self.lost(malformed(error)))?
            {
                let waiting = self.waiting.pop_front().ok_or_else(|| self.lost(malformed(Malformed)))?;
                let Some(ticket) = waiting else { continue };
                match answer(&reply) {
                    Ok(answer) => replies.push(super::Reply { ticket, answer }),
                    Err(cause) => return Err(self.lost(Failure::Refused(cause))),
                }
            }
            if !replies.is_empty() {
                return Ok(());
            }
            match self.wire.exchange().await {
                Ok(Progress::Received) => {}
                Ok(Progress::Room) => return Ok(()),
                Ok(Progress::Idle) => {
                    begin(&mut self.wire.output, 1);
                    argument(&mut self.wire.output, b"PING");
                    self.waiting.push_back(None);
                }
                Err(failure) => return Err(self.lost(failure)),
            }
        }
    }

    fn silent(&self, since: Timestamp) -> SinkError {
        SinkError::Unreachable(Outage {
            server: Redis::SERVER,
            address: self.address.clone(),
            since,
            failure: Failure::Silent,
        })
    }

    fn address(&self) -> &str {
        &self.address
    }
}

impl RedisSession {
    fn lost(&self, failure: Failure) -> SinkError {
        self.wire.lost(Redis::SERVER, &self.address, failure)
    }
}

/// The answer to one event; an error concerns the connection, and ends it.
fn answer(reply: &Reply) -> Result<Answer, String> {
    let error = match reply {
        Reply::Text(id) if !id.is_empty() => return Ok(Answer::Stored),
        Reply::Error(error) => error,
        Reply::Text(_) | Reply::Integer(_) | Reply::List(_) => {
            return Ok(Answer::Failed("the answer is no id of an entry".to_owned()));
        }
    };
    let (meaning, remedy) = meaning(error);
    let sentence = sentence(error, remedy);
    match meaning {
        Meaning::Everybody => Err(sentence),
        Meaning::Passing => Ok(Answer::Failed(sentence)),
        Meaning::Refused => Ok(Answer::Refused(sentence)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_the_event_s_the_connection_s_or_pass() {
        let answer = |error: &str| answer(&Reply::Error(error.to_owned()));
        for (error, expected) in [
            ("OOM command not allowed when used memory > 'maxmemory'.", Meaning::Passing),
            ("LOADING Redis is loading the dataset in memory", Meaning::Passing),
            ("CLUSTERDOWN The cluster is down", Meaning::Passing),
            ("MOVED 866 127.0.0.1:7002", Meaning::Passing),
            ("NOPERM this user has no permissions to access one of the keys used as arguments", Meaning::Passing),
            ("ERR an error of a later version", Meaning::Passing),
            ("READONLY You can't write against a read only replica.", Meaning::Everybody),
            ("MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.", Meaning::Everybody),
            ("NOAUTH Authentication required.", Meaning::Everybody),
            ("WRONGPASS invalid username-password pair or user is disabled.", Meaning::Everybody),
            ("WRONGTYPE Operation against a key holding the wrong kind of value", Meaning::Refused),
            ("ERR Elements are too large to be stored", Meaning::Refused),
            ("ERR Protocol error: invalid bulk length", Meaning::Refused),
        ] {
            let found = match answer(error) {
                Err(_) => Meaning::Everybody,
                Ok(Answer::Failed(_)) => Meaning::Passing,
                Ok(Answer::Refused(_)) => Meaning::Refused,
                Ok(Answer::Stored) => panic!("{error} is stored"),
            };
            assert_eq!(found, expected, "{error}");
        }
        assert_eq!(super::answer(&Reply::Text("1-1".into())), Ok(Answer::Stored));
    }

    #[test]
    fn what_an_error_quotes_is_no_part_of_the_sentence() {
        for (error, expected) in [
            ("ERR unknown command 'XADD', with args beginning with: 'secret' ", "ERR unknown command; streams need"),
            ("NOPERM User relay has no permissions to access the 'secret' key", "NOPERM User relay has no"),
            (
                "OOM command not allowed when used memory > 'maxmemory'.",
                "OOM command not allowed when used memory >; its",
            ),
        ] {
            let sentence = sentence(error, meaning(error).1);
            assert!(sentence.starts_with(expected) && !sentence.contains("secret"), "{sentence}");
        }
    }
}
