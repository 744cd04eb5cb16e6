//! Sends requests over pooled HTTP/1.1 connections.
//!
//! hyper's connections are used directly: a pool of idle connections for each address is all that is needed, and a
//! client with redirects, proxies and cookies costs more than the rest of a step.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt, Full};
use hyper::{
    Request, Response,
    body::Incoming,
    client::conn::http1::{self, SendRequest},
    header,
};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::answer::{self, MAX_BODY, Raw};

/// Maximum number of idle connections for each address.
const IDLE: usize = 256;
/// A connection is closed after this time, so that new pods of the service get requests.
const MAX_AGE: Duration = Duration::from_mins(1);

#[derive(Debug, thiserror::Error)]
pub(super) enum SendError {
    #[error("the lease is too old for a call")]
    LeaseTooOld,
    #[error("connecting to {0}")]
    Connect(String, #[source] std::io::Error),
    #[error("sending the request")]
    Send(#[source] hyper::Error),
    #[error("reading the answer")]
    Read(#[source] hyper::Error),
}

#[derive(Debug)]
struct Connection {
    sender: SendRequest<Full<Bytes>>,
    since: Instant,
}

/// The idle connections, by `HOST:PORT`.
#[derive(Debug, Default)]
pub(super) struct Connections(Mutex<HashMap<String, Vec<Connection>>>);

impl Connections {
    /// `may_send` is asked when there is a connection, right before the request is sent.
    pub(super) async fn send(
        &self,
        host: &str,
        mut request: Request<Full<Bytes>>,
        may_send: impl Fn() -> bool,
    ) -> Result<Raw, SendError> {
        loop {
            let (mut connection, fresh) = match self.idle(host) {
                Some(connection) => (connection, false),
                None => (connect(host).await?, true),
            };
            if !may_send() {
                return Err(SendError::LeaseTooOld);
            }
            match connection.sender.try_send_request(request).await {
                Ok(response) => return self.receive(host, connection, response).await,
                Err(mut error) => match error.take_message() {
                    // an idle connection that the service had closed: the request was not sent
                    Some(unsent) if !fresh => request = unsent,
                    _ => return Err(SendError::Send(error.into_error())),
                },
            }
        }
    }

    async fn receive(
        &self,
        host: &str,
        connection: Connection,
        response: Response<Incoming>,
    ) -> Result<Raw, SendError> {
        let (parts, body) = response.into_parts();
        let header = |name| parts.headers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        let (location, content_type) = (header(header::LOCATION), header(header::CONTENT_TYPE));
        let retry_after = header(header::RETRY_AFTER)
            .and_then(|value| answer::retry_after(&value, header(header::DATE).as_deref(), SystemTime::now()));
        let (body, complete) = read(body).await.map_err(SendError::Read)?;
        if complete {
            self.keep(host, connection);
        }
        Ok(Raw { status: parts.status.as_u16(), body, complete, content_type, location, retry_after })
    }

    fn idle(&self, host: &str) -> Option<Connection> {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let connections = idle.get_mut(host)?;
        while let Some(connection) = connections.pop() {
            if connection.sender.is_ready() && connection.since.elapsed() < MAX_AGE {
                return Some(connection);
            }
        }
        None
    }

    fn keep(&self, host: &str, connection: Connection) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match idle.get_mut(host) {
            Some(connections) if connections.len() >= IDLE => {}
            Some(connections) => connections.push(connection),
            None => {
                idle.insert(host.to_owned(), vec![connection]);
            }
        }
    }
}

async fn connect(host: &str) -> Result<Connection, SendError> {
    let failed = |error| SendError::Connect(host.to_owned(), error);
    let stream = TcpStream::connect(host).await.map_err(failed)?;
    stream.set_nodelay(true).map_err(failed)?;
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(SendError::Send)?;
    // the task ends when the service closes the connection, or when its sender is dropped
    tokio::spawn(connection);
    Ok(Connection { sender, since: Instant::now() })
}

/// At most [`MAX_BODY`] bytes, and whether that is all.
async fn read(mut body: Incoming) -> Result<(Bytes, bool), hyper::Error> {
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        if let Ok(data) = frame?.into_data() {
            let room = MAX_BODY - bytes.len();
            bytes.extend_from_slice(data.get(..room).unwrap_or(&data));
            if data.len() > room {
                return Ok((bytes.freeze(), false));
            }
        }
    }
    Ok((bytes.freeze(), true))
}
