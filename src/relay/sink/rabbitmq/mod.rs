//! RabbitMQ: messages into an exchange, on one channel with publisher confirms.
//!
//! The client is written here. The driver that others use (lapin) gives a returned message to whichever confirmation comes next, so
//! that one that no queue got could count as stored; it logs returned messages whole; and its TLS is a second one beside the relay's.
//! What a publisher needs of the protocol is small (see [`protocol`]).
//!
//! The server confirms a message when every queue that gets it has it, on disk, on a quorum where the queue is one of those. A message that no queue
//! gets is returned before it is confirmed; it is recognized by its message id.

mod protocol;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jiff::Timestamp;
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use self::protocol::{MAX_FRAME, MAX_SHORT, Malformed, Received};
use super::{
    Answer, Reply, Session, Sink, SinkError,
    wire::{self, Address, AddressError, Progress, Wire},
};
use crate::{
    contract::relay::{RabbitMqSink, Unroutable},
    domain::event::{ATTRIBUTE_PREFIX, HEADER_CONTENT_TYPE, decode},
    outage::{Failure, Outage},
    relay::{encode::Message, window::Ticket},
    secret::{self, SecretFolder},
};

const SCHEMES: [(&str, u16); 2] = [("amqp", 5672), ("amqps", 5671)];
/// The user that a server has as it is installed, and its password. It may log in from the server's own machine only.
const GUEST: &str = "guest";
/// The server sends a heartbeat every half of it, and so has to be heard within the connection's limit of silence.
const HEARTBEAT_SECONDS: u16 = 3;
/// How long the server's limit of a message's size is believed, once it was learned.
const BELIEVED: Duration = Duration::from_mins(10);
const SECRET: &str = "check the Secret that spec.sink.rabbitmq.secret names";

/// What a person can do when the server closes channel or connection, by the code that it gives.
const REMEDIES: [(u16, &str); 4] = [
    (403, "check the Secret that spec.sink.rabbitmq.secret names, and what its user may write to and configure"),
    (404, "the relay declares the exchange again"),
    (406, "the events on the way are sent again"),
    (530, "create the virtual host, or give the user permissions in it"),
];
/// It closes the connection because a person wants it to, or because it stops.
const FORCED: u16 = 320;
/// How the server's text about a message that is too large ends, before the limit.
const TOO_LARGE: &str = "larger than configured max size ";

/// What the server says, as a sentence. What it quotes is left out: it may be a value of the row.
fn closed(code: u16, text: &str) -> Failure {
    let said = text.split(['\'', '"']).next().unwrap_or_default().trim_end_matches([' ', '.', ',', ':']).to_owned();
    if code == FORCED {
        return Failure::Disconnected(said);
    }
    let remedy = REMEDIES.iter().find(|(known, _)| *known == code).map(|(_, remedy)| remedy);
    Failure::Refused(remedy.map_or_else(|| said.clone(), |remedy| format!("{said}; {remedy}")))
}

/// The limit in what the server says about a message that is too large.
fn limit(text: &str) -> Option<usize> {
    text.split(TOO_LARGE).nth(1)?.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Largest message that the server accepts, learned when it closed the channel because of one: nobody learns it before.
#[derive(Clone, Debug, Default)]
struct Learned(Arc<Mutex<Option<(usize, Instant)>>>);

impl Learned {
    fn set(&self, limit: usize) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((limit, Instant::now()));
    }

    fn get(&self) -> Option<usize> {
        let learned = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        learned.filter(|(_, at)| at.elapsed() < BELIEVED).map(|(limit, _)| limit)
    }
}

/// The exchange that events go to.
#[derive(Debug)]
pub struct RabbitMq {
    addresses: Vec<Address>,
    secret: SecretFolder,
    virtual_host: String,
    exchange: String,
    mandatory: bool,
    /// Shown in the server's list of connections.
    name: String,
    max_message: Learned,
}

impl RabbitMq {
    pub fn new(sink: &RabbitMqSink, name: String) -> Result<Self, AddressError> {
        Ok(Self {
            addresses: Address::parse_all(&sink.servers, SCHEMES)?,
            secret: SecretFolder::new(sink.secret_folder.clone()),
            virtual_host: sink.virtual_host.clone(),
            exchange: sink.exchange.clone(),
            mandatory: sink.unroutable == Unroutable::Hold,
            name,
            max_message: Learned::default(),
        })
    }

    async fn open(&self, address: Address) -> Result<RabbitMqSession, Failure> {
        let tls = if address.is_tls() { Some(self.secret.tls().await?) } else { None };
        let login = self.secret.login().await?;
        let by_certificate = login.is_none() && tls.is_some() && self.secret.path(secret::CERTIFICATE).is_some();
        let (user, password) = login.unwrap_or_else(|| (GUEST.to_owned(), GUEST.to_owned()));
        let (mechanism, response) =
            if by_certificate { ("EXTERNAL", String::new()) } else { ("PLAIN", format!("\0{user}\0{password}")) };

        let mut wire = Wire::open(&address, tls).await?;
        wire.output.extend_from_slice(protocol::HEADER);
        let Received::Start { mechanisms } = next(&mut wire).await? else { return Err(malformed(Malformed)) };
        if !mechanisms.split(' ').any(|offered| offered == mechanism) {
            return Err(Failure::Refused(format!("it does not offer the login {mechanism}; {SECRET}")));
        }
        protocol::start_ok(&mut wire.output, &self.name, mechanism, &response);
        let Received::Tune { max_frame } = next(&mut wire).await? else { return Err(malformed(Malformed)) };
        // 0: no limit
        let max_frame = usize::try_from(max_frame).unwrap_or_default();
        let max_frame = if max_frame == 0 { MAX_FRAME } else { max_frame.min(MAX_FRAME) };
        protocol::tune_ok(&mut wire.output, u32::try_from(max_frame).unwrap_or_default(), HEARTBEAT_SECONDS);
        protocol::open(&mut wire.output, &self.virtual_host);
        done(&mut wire).await?;
        self.open_channel(&mut wire).await?;
        Ok(RabbitMqSession {
            wire,
            address: address.to_string(),
            exchange: self.exchange.clone(),
            mandatory: self.mandatory,
            max_frame,
            max_message: self.max_message.clone(),
            tag: 0,
            unconfirmed: BTreeMap::new(),
            blocked: None,
        })
    }

    /// Opens the channel, and declares the exchange if it is missing. One that exists stays as it is.
    async fn open_channel(&self, wire: &mut Wire) -> Result<(), Failure> {
        const NOT_FOUND: u16 = 404;
        protocol::open_channel(&mut wire.output);
        done(wire).await?;
        protocol::declare_exchange(&mut wire.output, &self.exchange, true);
        match next(wire).await? {
            Received::Done => {}
            Received::ChannelClosed { code: NOT_FOUND, .. } => {
                protocol::close_channel_ok(&mut wire.output);
                protocol::open_channel(&mut wire.output);
                done(wire).await?;
                protocol::declare_exchange(&mut wire.output, &self.exchange, false);
                done(wire).await?;
                tracing::info!(exchange = self.exchange, "declared the exchange");
            }
            Received::ChannelClosed { code, text } => return Err(closed(code, &text)),
            _ => return Err(malformed(Malformed)),
        }
        protocol::select_confirms(&mut wire.output);
        done(wire).await
    }
}

/// Waits for what the server sends next. That it closes the connection is an error.
async fn next(wire: &mut Wire) -> Result<Received, Failure> {
    loop {
        match protocol::receive(&mut wire.input).map_err(malformed)? {
            Some(Received::ConnectionClosed { code, text }) => return Err(closed(code, &text)),
            Some(Received::Other) => {}
            Some(received) => return Ok(received),
            None => {
                wire.exchange().await?;
            }
        }
    }
}

/// Waits until what was asked for is done.
async fn done(wire: &mut Wire) -> Result<(), Failure> {
    match next(wire).await? {
        Received::Done => Ok(()),
        Received::ChannelClosed { code, text } => Err(closed(code, &text)),
        _ => Err(malformed(Malformed)),
    }
}

fn malformed(error: Malformed) -> Failure {
    Failure::Refused(error.to_string())
}

impl Sink for RabbitMq {
    const SERVER: &'static str = "RabbitMQ";
    type Session = RabbitMqSession;

    async fn connect(&self) -> Result<RabbitMqSession, SinkError> {
        wire::first(Self::SERVER, &self.addresses, |address| self.open(address)).await
    }
}

/// A message that the server has not confirmed.
#[derive(Debug)]
struct Unconfirmed {
    ticket: Ticket,
    message_id: String,
    returned: bool,
}

/// One connection, and its channel.
#[derive(Debug)]
pub struct RabbitMqSession {
    wire: Wire,
    address: String,
    exchange: String,
    mandatory: bool,
    max_frame: usize,
    max_message: Learned,
    /// The server counts the channel's messages from 1.
    tag: u64,
    unconfirmed: BTreeMap<u64, Unconfirmed>,
    /// The server reads no more from connections that publish; the text is its reason.
    blocked: Option<String>,
}

impl Session for RabbitMqSession {
    async fn publish(&mut self, ticket: Ticket, message: &Message) -> Result<Option<Answer>, SinkError> {
        if let Err(why) = self.write(message) {
            return Ok(Some(Answer::Refused(why)));
        }
        self.tag += 1;
        let message_id = message_id(&message.identity).into_owned();
        self.unconfirmed.insert(self.tag, Unconfirmed { ticket, message_id, returned: false });
        Ok(None)
    }

    fn has_room(&self) -> bool {
        self.wire.has_room() && self.blocked.is_none()
    }

    async fn replies(&mut self, replies: &mut Vec<Reply>) -> Result<(), SinkError> {
        loop {
            while let Some(received) =
                protocol::receive(&mut self.wire.input).map_err(|error| self.lost(malformed(error)))?
            {
                self.handle(received, replies)?;
            }
            if !replies.is_empty() {
                return Ok(());
            }
            match self.wire.exchange().await {
                Ok(Progress::Received) => {}
                Ok(Progress::Room) => return Ok(()),
                Ok(Progress::Idle) => protocol::heartbeat(&mut self.wire.output),
                Err(failure) => return Err(self.lost(failure)),
            }
        }
    }

    fn blocked(&self) -> Option<&str> {
        self.blocked.as_deref()
    }

    fn silent(&self, since: Timestamp) -> SinkError {
        SinkError::Unreachable(Outage {
            server: RabbitMq::SERVER,
            address: self.address.clone(),
            since,
            failure: Failure::Silent,
        })
    }

    fn address(&self) -> &str {
        &self.address
    }
}

impl RabbitMqSession {
    fn lost(&self, failure: Failure) -> SinkError {
        self.wire.lost(RabbitMq::SERVER, &self.address, failure)
    }

    /// Writes the message into the output; the error is the sentence that explains why it cannot be sent. What the server would
    /// answer by closing the channel must be caught here: it would hold up all other events.
    fn write(&mut self, message: &Message) -> Result<(), String> {
        let (routing_key, size) = (&message.destination, message.body.len());
        let short = |what: &str, text: &str| match text.len() {
            length if length > MAX_SHORT => Err(format!("its {what} has {length} bytes and AMQP allows {MAX_SHORT}")),
            _ => Ok(()),
        };
        short("routing key, which the template makes of its row,", routing_key)?;
        if let Some(most) = self.max_message.get().filter(|&most| size > most) {
            return Err(format!(
                "it has {size} bytes and RabbitMQ accepts {most}: raise the server's max_message_size"
            ));
        }
        let mut content_type = None;
        for (name, value) in message.headers() {
            if name.as_ref() == HEADER_CONTENT_TYPE {
                short("content type", value)?;
                content_type = Some(value);
            } else {
                short("longest header name", &property(name))?;
            }
        }
        let headers = message.headers().filter(|(name, _)| name.as_ref() != HEADER_CONTENT_TYPE);
        let headers = headers.map(|(name, value)| (property(name), decode(value)));
        let (output, most) = (&mut self.wire.output, self.max_frame);
        let start = output.len();
        protocol::publish(output, &self.exchange, routing_key, self.mandatory);
        let bytes = protocol::properties(output, size, content_type, headers, &message_id(&message.identity));
        if bytes > most {
            output.truncate(start);
            return Err(format!(
                "its headers have {bytes} bytes and RabbitMQ accepts {most}: raise the server's frame_max, or shorten the row's headers"
            ));
        }
        protocol::body(output, &message.body, most);
        Ok(())
    }

    fn handle(&mut self, received: Received, replies: &mut Vec<Reply>) -> Result<(), SinkError> {
        match received {
            Received::Confirmed { tag, multiple, stored } => {
                let confirmed = if multiple {
                    let rest = self.unconfirmed.split_off(&(tag + 1));
                    std::mem::replace(&mut self.unconfirmed, rest)
                } else {
                    self.unconfirmed.remove(&tag).map(|message| (tag, message)).into_iter().collect()
                };
                replies.extend(confirmed.into_values().map(|message| Reply {
                    ticket: message.ticket,
                    answer: answer(stored, message.returned, &self.exchange),
                }));
            }
            Received::Properties { message_id } => {
                // of a returned message, which is confirmed after this; it is among the oldest
                let returned = self.unconfirmed.values_mut().find(|message| message.message_id == message_id);
                if let Some(message) = returned {
                    message.returned = true;
                }
            }
            Received::Blocked { reason } => self.blocked = Some(reason),
            Received::Unblocked => self.blocked = None,
            Received::ChannelClosed { code, text } | Received::ConnectionClosed { code, text } => {
                if let Some(limit) = limit(&text) {
                    self.max_message.set(limit);
                }
                return Err(self.lost(closed(code, &text)));
            }
            Received::Start { .. } | Received::Tune { .. } | Received::Done => {
                return Err(self.lost(malformed(Malformed)));
            }
            Received::Returned | Received::Other => {}
        }
        Ok(())
    }
}

fn answer(stored: bool, returned: bool, exchange: &str) -> Answer {
    match (stored, returned) {
        (_, true) => Answer::Refused(format!(
            "no queue is bound to the exchange {exchange} for its routing key, which the template makes of its row: bind one, or set spec.sink.rabbitmq.unroutable to Drop"
        )),
        (true, false) => Answer::Stored,
        (false, false) => Answer::Failed(
            "a queue rejects it (basic.nack): it is full, with the overflow `reject-publish`, or not available"
                .to_owned(),
        ),
    }
}

/// Name of a header in AMQP: attributes as the AMQP binding of CloudEvents has them.
fn property(name: &str) -> Cow<'_, str> {
    match name.strip_prefix(ATTRIBUTE_PREFIX) {
        Some(attribute) => format!("cloudEvents:{attribute}").into(),
        None => name.into(),
    }
}

/// The identity, which is ASCII; the end of a longer one than AMQP allows is its digest.
fn message_id(identity: &str) -> Cow<'_, str> {
    if identity.len() <= MAX_SHORT {
        return identity.into();
    }
    let digest = Sha256::digest(identity).iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    let beginning = identity.get(..MAX_SHORT - digest.len()).unwrap_or_default();
    format!("{beginning}{digest}").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_connection_is_a_sentence_without_what_the_server_quotes() {
        for (code, text, expected) in [
            (
                320,
                "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'",
                "CONNECTION_FORCED - broker forced",
            ),
            (
                403,
                "ACCESS_REFUSED - write access to topic 'secret' in exchange 'events' refused",
                "ACCESS_REFUSED - write access to topic; check the Secret",
            ),
            (404, "NOT_FOUND - no exchange 'events' in vhost '/'", "NOT_FOUND - no exchange; the relay declares"),
            (541, "INTERNAL_ERROR", "INTERNAL_ERROR"),
        ] {
            let failure = closed(code, text);
            let (Failure::Refused(said) | Failure::Disconnected(said)) = &failure else { panic!("{failure:?}") };
            assert!(said.starts_with(expected) && !said.contains("secret'"), "{said}");
            assert_eq!(matches!(failure, Failure::Disconnected(_)), code == FORCED);
        }
    }

    #[test]
    fn the_limit_of_a_message_is_learned_from_its_refusal() {
        let text = "PRECONDITION_FAILED - message size 131100 is larger than configured max size 65536";
        assert_eq!((limit(text), limit("PRECONDITION_FAILED - unknown delivery tag 1")), (Some(65536), None));
    }

    #[test]
    fn a_message_that_no_queue_gets_is_not_stored_though_it_is_confirmed() {
        assert_eq!(answer(true, false, "events"), Answer::Stored);
        assert!(matches!(answer(true, true, "events"), Answer::Refused(why) if why.contains("exchange events")));
        assert!(matches!(answer(false, false, "events"), Answer::Failed(_)));
    }

    #[test]
    fn a_message_id_is_short_and_its_own() {
        let long = |end: &str| format!("/shop/orders {}{end}", "x".repeat(300));
        let ids: std::collections::BTreeSet<_> = ["1", "2"].map(|end| message_id(&long(end)).into_owned()).into();
        assert!(ids.len() == 2 && ids.iter().all(|id| id.len() == MAX_SHORT), "{ids:?}");
        assert_eq!(message_id("/shop/orders 1 1"), "/shop/orders 1 1");
    }

    #[test]
    fn attributes_have_the_names_of_the_amqp_binding() {
        assert_eq!(property("ce-id"), "cloudEvents:id");
        assert_eq!(property("event-id"), "event-id");
    }
}
