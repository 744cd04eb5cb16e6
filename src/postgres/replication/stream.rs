//! The bytes to and from a server: over TCP, or by TLS within it.
//!
//! Source: PostgreSQL documentation, "SSL Session Encryption".

use std::{fmt, io};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};
use tokio_postgres::config::SslMode;
use tokio_rustls::TlsConnector;

use super::ReplicationError;
use crate::postgres::login::Address;

/// The server's answer when it supports TLS.
const SUPPORTED: u8 = b'S';

pub trait Bytes: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + fmt::Debug + Send + Unpin> Bytes for T {}

pub type Stream = Box<dyn Bytes>;

/// Connects; the caller has a deadline.
pub async fn open(address: &Address) -> Result<Stream, ReplicationError> {
    let Address { host, port, tls, .. } = address;
    let connected = TcpStream::connect((host.as_str(), *port)).await;
    let mut stream =
        connected.map_err(|source| ReplicationError::Connect { host: host.clone(), port: *port, source })?;
    stream.set_nodelay(true)?;
    if tls.mode == SslMode::Disable {
        return Ok(Box::new(stream));
    }
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await?;
    match (stream.read_u8().await?, tls.mode) {
        (SUPPORTED, _) => {
            let name = ServerName::try_from(host.clone()).map_err(io::Error::other)?;
            let secured = TlsConnector::from(tls.config.clone()).connect(name, stream).await?;
            Ok(Box::new(secured))
        }
        (_, SslMode::Prefer) => Ok(Box::new(stream)),
        _ => Err(ReplicationError::Protocol("a server that does not support TLS")),
    }
}
