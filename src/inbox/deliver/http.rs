//! A POST for each event: CloudEvents over HTTP in binary mode (HTTP protocol binding 1.0.2).
//!
//! | answer | |
//! |---|---|
//! | 2xx | handled |
//! | 409, 413, 422, or any other but 2xx with the header `Weft-Reject` | refused for good; the header's value is the reason |
//! | anything else, or none | delivered again |

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use reqwest::{
    Client, Method, Request, Response, Url,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
    redirect,
};
use tokio::time::Instant;

use super::Outcome;
use crate::{
    inbox::event::Event,
    outage::{innermost_cause, with_causes},
};

/// Requests on the way at a time.
pub(super) const CONCURRENT: usize = 64;
/// A connection is made within this time.
const CONNECT: Duration = Duration::from_secs(4);
/// After this time connections are made anew, so that new pods of the service get requests.
const MAX_AGE: Duration = Duration::from_secs(30);
/// Of a response's body, what a message quotes; a longer one is not read further.
const QUOTED: usize = 200;
const REJECT: &str = "weft-reject";
const REFUSED: [u16; 3] = [409, 413, 422];

#[derive(Debug)]
pub(in crate::inbox) struct Http {
    url: Url,
    timeout: Duration,
    client: Mutex<(Client, Instant)>,
}

impl Http {
    pub(super) fn new(url: &str, timeout: Duration) -> Result<Self, String> {
        let parsed: Url = url.parse().map_err(|error| format!("the URL {url} is not usable: {error}"))?;
        let client = client(timeout).map_err(|error| with_causes(&error))?;
        Ok(Self { url: parsed, timeout, client: Mutex::new((client, Instant::now())) })
    }

    pub(super) async fn deliver(&self, event: &Event) -> Outcome {
        let request = match self.request(event) {
            Ok(request) => request,
            Err(why) => return Outcome::Refused(why),
        };
        match self.client().execute(request).await {
            Ok(response) => outcome(response).await,
            Err(error) if error.is_timeout() && !error.is_connect() => {
                Outcome::Failed(format!("{} did not answer within {} ms", self.address(), self.timeout.as_millis()))
            }
            Err(error) => {
                let connecting = if error.is_connect() { "cannot be reached" } else { "did not answer" };
                Outcome::Failed(format!("{} {connecting}: {}", self.address(), innermost_cause(&error.without_url())))
            }
        }
    }

    /// One that keeps its connections for [`MAX_AGE`]: the one before ends with its last request.
    fn client(&self) -> Client {
        let mut current = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if current.1.elapsed() > MAX_AGE
            && let Ok(new) = client(self.timeout)
        {
            *current = (new, Instant::now());
        }
        current.0.clone()
    }

    fn address(&self) -> String {
        crate::outage::address(self.url.host_str().unwrap_or_default(), self.url.port_or_known_default().unwrap_or(80))
    }

    /// The error explains why the event cannot be sent.
    fn request(&self, event: &Event) -> Result<Request, String> {
        let mut request = Request::new(Method::POST, self.url.clone());
        let headers = request.headers_mut();
        for (name, value) in event.headers() {
            let unusable = || format!("its attribute {name} cannot be a header of HTTP");
            let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| unusable())?;
            headers.insert(header, HeaderValue::from_str(&value).map_err(|_| unusable())?);
        }
        // for tracing of HTTP requests, which knows no attributes of events
        for name in ["traceparent", "tracestate"] {
            if let Some(value) = event.get(name).and_then(|value| HeaderValue::from_str(value).ok()) {
                headers.insert(HeaderName::from_static(name), value);
            }
        }
        if let Some(content_type) = &event.content_type {
            let value = HeaderValue::from_str(content_type);
            headers.insert(CONTENT_TYPE, value.map_err(|_| "its media type cannot be a header of HTTP".to_owned())?);
        }
        *request.body_mut() = Some(event.data.clone().into());
        Ok(request)
    }
}

fn client(timeout: Duration) -> reqwest::Result<Client> {
    Client::builder()
        .user_agent("weft inbox")
        .connect_timeout(CONNECT)
        .timeout(timeout)
        .redirect(redirect::Policy::none())
        .no_proxy()
        .http1_only()
        .pool_max_idle_per_host(CONCURRENT)
        .build()
}

async fn outcome(response: Response) -> Outcome {
    let status = response.status();
    if status.is_success() {
        // the connection can be used again when the body is read
        let _ = response.bytes().await;
        return Outcome::Handled;
    }
    let reject = response.headers().get(REJECT).map(|reason| String::from_utf8_lossy(reason.as_bytes()).into_owned());
    if let Some(reason) = reject {
        return Outcome::Refused(format!("HTTP {status}, Weft-Reject: {}", quoted(&reason)));
    }
    let why = format!("HTTP {status}{}", body(response).await);
    if REFUSED.contains(&status.as_u16()) { Outcome::Refused(why) } else { Outcome::Failed(why) }
}

/// The beginning of a body, for a message.
async fn body(mut response: Response) -> String {
    let mut bytes = Vec::new();
    while bytes.len() < QUOTED * 4
        && let Ok(Some(chunk)) = response.chunk().await
    {
        bytes.extend_from_slice(&chunk);
    }
    let text = quoted(&String::from_utf8_lossy(&bytes));
    if text.is_empty() { text } else { format!(": {text}") }
}

/// In one line.
fn quoted(text: &str) -> String {
    let words = text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty());
    let line = words.collect::<Vec<_>>().join(" ");
    line.chars().take(QUOTED).collect()
}
