//! HTTP: each event is a POST of a CloudEvent (CloudEvents HTTP protocol binding 1.0.2).
//!
//! A response of 2xx says that the receiver has the event for good; nothing weaker is asked, and nothing stronger can be known.
//! Responses come in any order, of at most [`CONCURRENT`] requests at a time.
//!
//! A request may have several events (CloudEvents' batched content mode), of one URL. They are of different keys, since the window has one
//! of each in flight, so nothing depends on what a receiver does with the first ones of a batch that it refuses. After a
//! refusal each of them is a request of its own, and so is an event that is sent again.

use std::{collections::VecDeque, time::Duration};

use bytes::{BufMut, BytesMut};
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use jiff::Timestamp;
use reqwest::{
    Client, Method, Request, Response, StatusCode, Url,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER},
    redirect,
};
use tokio::time::{Instant, timeout};

use super::{
    Answer, Reply, Session, Sink, SinkError,
    wire::{Address, AddressError},
};
use crate::{
    contract::relay::HttpSink,
    domain::{
        destination::TemplateError,
        event::{CONTENT_TYPE_BATCH, HEADER_CONTENT_TYPE},
    },
    outage::{Failure, Outage, innermost_cause, with_causes},
    relay::{encode::Message, window::Ticket},
    secret::{self, SecretFolder},
};

const SCHEMES: [(&str, u16); 2] = [("http", 80), ("https", 443)];
/// So many requests that failed one after the other, with none in between that was answered, are not the events' fault.
const LOSSES: u32 = 8;
/// Requests on the way at a time.
const CONCURRENT: usize = 64;
/// After a refused batch none is sent for so long: the endpoint may take none.
const NO_BATCHES: Duration = Duration::from_secs(1);
/// Bytes of events from which on a batch gets no more of them.
const BATCH_BYTES: usize = 256 * 1024;
/// A connection is made within this time.
const CONNECT: Duration = Duration::from_secs(4);
/// A response comes within this time; less than that after which the publisher sends an event again.
const RESPONSE: Duration = Duration::from_secs(8);
/// A longer body of an error, or one of unknown length, is not read.
const MAX_BODY: u64 = 64 * 1024;
/// Of a response's body, what a message quotes.
const QUOTED: usize = 200;
/// Longest pause that a response can ask for.
const MAX_PAUSE: Duration = Duration::from_mins(1);

/// What a status means for an event. Of any other one the class says it: 4xx is the event's, the rest passes.
const STATUSES: [(u16, Meaning); 8] = [
    (401, Meaning::Everybody),
    (403, Meaning::Everybody),
    (404, Meaning::Passing), // while others are stored, it is the event's after some attempts
    (405, Meaning::Passing),
    (407, Meaning::Everybody),
    (408, Meaning::Passing),
    (425, Meaning::Passing),
    (429, Meaning::Passing),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    /// It concerns the connection: no event is accepted.
    Everybody,
    /// Trying again may help.
    Passing,
    /// It concerns this event.
    Refused,
}

fn meaning(status: StatusCode) -> Meaning {
    let known = STATUSES.iter().find(|(code, _)| *code == status.as_u16()).map(|(_, meaning)| *meaning);
    known.unwrap_or(if status.is_client_error() { Meaning::Refused } else { Meaning::Passing })
}

/// The endpoint that events are sent to.
#[derive(Debug)]
pub struct Http {
    address: Address,
    secret: SecretFolder,
    longest_batch: usize,
    /// Sent as User-Agent.
    name: String,
}

impl Http {
    /// The placeholders of the URL are in its path, so its address is known.
    pub fn new(sink: &HttpSink, name: String) -> Result<Self, TemplateError> {
        let end = sink.url.match_indices('/').nth(2).map_or(sink.url.len(), |(at, _)| at);
        let unusable = |why| TemplateError { template: sink.url.clone(), why };
        let base = sink.url.get(..end).filter(|base| !base.contains('{')).unwrap_or_default();
        let address = Address::parse(base, SCHEMES).map_err(|error| {
            unusable(match error {
                AddressError::NoUrl(..) => {
                    "it is no URL: give `http://HOST:PORT/PATH`, with placeholders in the path only"
                }
                AddressError::HasCredentials => "user and password belong into the Secret",
            })
        })?;
        let secret = SecretFolder::new(sink.secret_folder.clone());
        Ok(Self { address, secret, longest_batch: sink.batch.unwrap_or(1), name })
    }

    async fn client(&self) -> Result<Client, Failure> {
        let mut builder = Client::builder()
            .user_agent(&self.name)
            .connect_timeout(CONNECT)
            .timeout(RESPONSE)
            // a receiver that moved is a person's to follow: the events go where the manifest says
            .redirect(redirect::Policy::none())
            .no_proxy()
            .pool_max_idle_per_host(CONCURRENT);
        if self.address.is_tls() {
            builder = builder.tls_backend_preconfigured(self.secret.tls().await?);
        }
        let bearer = self.secret.text(secret::TOKEN).await?;
        let login = self.secret.login().await?;
        let authorization = match (bearer, login) {
            (Some(token), _) => Some(format!("Bearer {token}")),
            (None, Some((user, password))) => {
                use base64::{Engine, prelude::BASE64_STANDARD};
                Some(format!("Basic {}", BASE64_STANDARD.encode(format!("{user}:{password}"))))
            }
            (None, None) => None,
        };
        if let Some(text) = authorization {
            let mut value = HeaderValue::from_str(&text).map_err(|_| {
                Failure::Refused(
                    "the credentials cannot be used: they have characters that no header may have".to_owned(),
                )
            })?;
            value.set_sensitive(true);
            builder = builder.default_headers(HeaderMap::from_iter([(AUTHORIZATION, value)]));
        }
        builder.build().map_err(|error| Failure::Refused(with_causes(&error.without_url())))
    }
}

fn unreachable(address: &str, failure: Failure) -> SinkError {
    SinkError::Unreachable(Outage {
        server: Http::SERVER,
        address: address.to_owned(),
        since: Timestamp::now(),
        failure,
    })
}

impl Sink for Http {
    const SERVER: &'static str = "the HTTP endpoint";
    type Session = HttpSession;

    async fn connect(&self) -> Result<HttpSession, SinkError> {
        let address = self.address.to_string();
        let unusable = |failure| unreachable(&address, failure);
        let client = self.client().await.map_err(unusable)?;
        // whether anything listens is known before the first event is sent
        match timeout(CONNECT, self.address.connect()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(unusable(Failure::of_io(&error))),
            Err(_elapsed) => return Err(unusable(Failure::Silent)),
        }
        Ok(HttpSession {
            client,
            address,
            requests: FuturesUnordered::new(),
            longest_batch: self.longest_batch,
            batch: Vec::new(),
            one_by_one: VecDeque::new(),
            alone_until: Instant::now(),
            accepted: false,
            losses: 0,
            paused_until: None,
        })
    }
}

/// The requests on the way. An endpoint that does not answer ends it.
pub struct HttpSession {
    client: Client,
    address: String,
    requests: FuturesUnordered<BoxFuture<'static, (Sent, Outcome)>>,
    longest_batch: usize,
    /// Events of the next request, which is sent when it has as many as it may, or when all are handed over that can be.
    batch: Vec<(Ticket, Request)>,
    /// Events of refused batches, which are sent again one by one.
    one_by_one: VecDeque<(Ticket, Request)>,
    /// No batch is sent until then.
    alone_until: Instant,
    /// The endpoint has accepted an event in this session.
    accepted: bool,
    /// Requests that failed since it last answered one.
    losses: u32,
    /// The endpoint asked for a pause.
    paused_until: Option<Instant>,
}

impl std::fmt::Debug for HttpSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HttpSession").field("address", &self.address).finish_non_exhaustive()
    }
}

/// What a request has sent.
enum Sent {
    Event(Ticket),
    /// Each with the request that it is alone.
    Batch(Vec<(Ticket, Request)>),
}

impl Sent {
    fn tickets(self) -> Vec<Ticket> {
        match self {
            Self::Event(ticket) => vec![ticket],
            Self::Batch(events) => events.into_iter().map(|(ticket, _)| ticket).collect(),
        }
    }
}

/// How a request ended.
enum Outcome {
    Answered(Answer, Option<Duration>),
    /// There was no answer, or one that usually concerns everybody; but a proxy may give either for a single event.
    Lost(Failure),
    /// There is no connection.
    Down(Failure),
}

impl Session for HttpSession {
    async fn publish(&mut self, ticket: Ticket, message: &Message) -> Result<Option<Answer>, SinkError> {
        let request = match request(message) {
            Ok(request) => request,
            Err(why) => return Ok(Some(Answer::Refused(why))),
        };
        if self.longest_batch < 2 || ticket.attempt > 1 || Instant::now() < self.alone_until {
            self.execute(Sent::Event(ticket), request);
            return Ok(None);
        }
        let bytes: usize = self.batch.iter().map(|(_, request)| body(request).len()).sum();
        let full = self.batch.len() >= self.longest_batch || bytes >= BATCH_BYTES;
        if full || self.batch.first().is_some_and(|(_, first)| first.url() != request.url()) {
            self.send_batch();
        }
        self.batch.push((ticket, request));
        Ok(None)
    }

    fn has_room(&self) -> bool {
        self.requests.len() < CONCURRENT
            && self.one_by_one.is_empty()
            && self.paused_until.is_none_or(|until| until <= Instant::now())
    }

    async fn replies(&mut self, replies: &mut Vec<Reply>) -> Result<(), SinkError> {
        // the publisher waits: no more events come for the batch
        self.send_batch();
        if self.requests.is_empty() {
            // nothing is on the way; a pause ends by itself
            match self.paused_until {
                Some(until) if until > Instant::now() => tokio::time::sleep_until(until).await,
                _ => std::future::pending().await,
            }
            return Ok(());
        }
        let mut next = self.requests.next().await;
        while let Some((sent, outcome)) = next {
            match (outcome, sent) {
                (Outcome::Answered(Answer::Refused(_), _), Sent::Batch(events)) => {
                    self.losses = 0;
                    self.alone_until = Instant::now() + NO_BATCHES;
                    self.one_by_one.extend(events);
                }
                (Outcome::Answered(answer, pause), sent) => {
                    if let Some(pause) = pause {
                        self.paused_until = Some(Instant::now() + pause);
                    }
                    self.losses = 0;
                    self.accepted |= answer == Answer::Stored;
                    let reply = |ticket| Reply { ticket, answer: answer.clone() };
                    replies.extend(sent.tickets().into_iter().map(reply));
                }
                (Outcome::Lost(failure), sent) => {
                    self.losses += 1;
                    let nobody_else = self.requests.is_empty() && !self.accepted;
                    if self.losses >= LOSSES || nobody_else {
                        return Err(unreachable(&self.address, failure));
                    }
                    let answer = Answer::Failed(sentence(failure));
                    let reply = |ticket| Reply { ticket, answer: answer.clone() };
                    replies.extend(sent.tickets().into_iter().map(reply));
                }
                (Outcome::Down(failure), _) => return Err(unreachable(&self.address, failure)),
            }
            self.send_one_by_one();
            next = self.requests.next().now_or_never().flatten();
        }
        Ok(())
    }

    fn silent(&self, since: Timestamp) -> SinkError {
        let address = self.address.clone();
        SinkError::Unreachable(Outage { server: Http::SERVER, address, since, failure: Failure::Silent })
    }

    fn address(&self) -> &str {
        &self.address
    }
}

impl HttpSession {
    fn execute(&mut self, sent: Sent, request: Request) {
        let client = self.client.clone();
        self.requests.push(async move { (sent, outcome(client.execute(request).await).await) }.boxed());
    }

    /// Sends what there is room for.
    fn send_one_by_one(&mut self) {
        while self.requests.len() < CONCURRENT
            && let Some((ticket, request)) = self.one_by_one.pop_front()
        {
            self.execute(Sent::Event(ticket), request);
        }
    }

    /// Sends what is collected, if anything.
    fn send_batch(&mut self) {
        let mut events = std::mem::take(&mut self.batch);
        match &events[..] {
            [] => {}
            [_] => {
                if let Some((ticket, request)) = events.pop() {
                    self.execute(Sent::Event(ticket), request);
                }
            }
            [(_, first), ..] => {
                let mut request = Request::new(Method::POST, first.url().clone());
                request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE_BATCH));
                let mut array = BytesMut::new();
                for (place, (_, event)) in events.iter().enumerate() {
                    array.put_u8(if place == 0 { b'[' } else { b',' });
                    array.put_slice(body(event));
                }
                array.put_u8(b']');
                *request.body_mut() = Some(array.freeze().into());
                self.execute(Sent::Batch(events), request);
            }
        }
    }
}

/// The bytes of an event's request.
fn body(request: &Request) -> &[u8] {
    request.body().and_then(reqwest::Body::as_bytes).unwrap_or_default()
}

/// The error explains why the event cannot be sent. It does not have the URL, which has values of the row.
fn request(message: &Message) -> Result<Request, String> {
    let url = Url::parse(&message.destination)
        .map_err(|error| format!("its URL, which the template makes of its row, is none: {error}"))?;
    let mut request = Request::new(Method::POST, url);
    let headers = request.headers_mut();
    for (name, value) in message.headers() {
        let name = if name.as_ref() == HEADER_CONTENT_TYPE {
            CONTENT_TYPE
        } else {
            HeaderName::from_bytes(name.as_bytes())
                .map_err(|_| "one of its headers has a name that HTTP does not allow".to_owned())?
        };
        // values are printable ASCII
        let value = HeaderValue::from_str(value)
            .map_err(|_| format!("its header {name} has a value that HTTP does not allow"))?;
        headers.insert(name, value);
    }
    *request.body_mut() = Some(message.body.clone().into());
    Ok(request)
}

async fn outcome(result: reqwest::Result<Response>) -> Outcome {
    let response = match result {
        Ok(response) => response,
        Err(error) if error.is_connect() => {
            let silent = error.is_timeout();
            let cause = innermost_cause(&error.without_url());
            return Outcome::Down(if silent { Failure::Silent } else { Failure::Disconnected(cause) });
        }
        Err(error) if error.is_timeout() => return Outcome::Lost(Failure::Silent),
        Err(error) => return Outcome::Lost(Failure::Disconnected(innermost_cause(&error.without_url()))),
    };
    let status = response.status();
    if status.is_success() {
        // the connection can be used again when the body is read
        let _ = response.bytes().await;
        return Outcome::Answered(Answer::Stored, None);
    }
    let pause = pause(response.headers());
    let quoted = quoted(response).await;
    let why = format!("HTTP {status}{quoted}");
    match meaning(status) {
        Meaning::Everybody => {
            Outcome::Lost(Failure::Refused(format!("{why}; check the Secret that spec.sink.http.secret names")))
        }
        Meaning::Passing => Outcome::Answered(Answer::Failed(why), pause),
        Meaning::Refused => Outcome::Answered(Answer::Refused(why), None),
    }
}

/// A failure as that of one event.
fn sentence(failure: Failure) -> String {
    match failure {
        Failure::Silent => format!("it did not answer within {} s", RESPONSE.as_secs()),
        Failure::Disconnected(cause) | Failure::Refused(cause) => cause,
    }
}

fn pause(headers: &HeaderMap) -> Option<Duration> {
    let seconds: u64 = headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_PAUSE))
}

/// What the endpoint says about its own refusal: the `title` of a problem document (RFC 9457), which has no values of the
/// event. Its `detail`, and any other body, may quote the event.
async fn quoted(response: Response) -> String {
    if response.content_length().is_none_or(|length| length > MAX_BODY) {
        return String::new();
    }
    let title =
        match response.bytes().await.ok().and_then(|body| serde_json::from_slice::<serde_json::Value>(&body).ok()) {
            Some(body) => body.get("title").and_then(|title| title.as_str()).map(str::to_owned),
            None => None,
        };
    title.map_or_else(String::new, |title| format!(": {}", title.chars().take(QUOTED).collect::<String>()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_a_template_is_known() {
        for (url, address) in [
            ("http://gateway.shop.svc/events/{type}", "gateway.shop.svc:80"),
            ("https://[::1]:8443", "[::1]:8443"),
            ("https://gateway/", "gateway:443"),
        ] {
            let sink = HttpSink { url: url.to_owned(), batch: None, secret_folder: None };
            assert_eq!(Http::new(&sink, String::new()).unwrap().address.to_string(), address);
        }
        for url in ["", "gateway/events", "ftp://x/", "http://{type}/", "http://user:secret@gateway/"] {
            let sink = HttpSink { url: url.to_owned(), batch: None, secret_folder: None };
            assert!(Http::new(&sink, String::new()).is_err(), "{url}");
        }
    }

    #[test]
    fn a_status_is_the_event_s_the_connection_s_or_passes() {
        for (status, expected) in [
            (400, Meaning::Refused),
            (401, Meaning::Everybody),
            (404, Meaning::Passing),
            (409, Meaning::Refused),
            (413, Meaning::Refused),
            (422, Meaning::Refused),
            (429, Meaning::Passing),
            (302, Meaning::Passing),
            (500, Meaning::Passing),
            (503, Meaning::Passing),
        ] {
            assert_eq!(meaning(StatusCode::from_u16(status).unwrap()), expected, "{status}");
        }
    }
}
