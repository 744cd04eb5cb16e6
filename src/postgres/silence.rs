//! Whether a server is silent, or only busy with a statement that takes long.
//!
//! To TCP a server whose processes are stopped is alive: its kernel acknowledges. And a session answers only when its
//! statement has ended, which may wait for a lock or a disk, and has a deadline of its own. So when a session has not
//! answered for a while, the server is asked on a new connection. That needs no login and no session, and costs nothing
//! as long as answers come soon.

use std::{io, pin::pin, time::Duration};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use super::login::Address;
use crate::contract::DatabaseLogin;

/// How long a session's answer is awaited before the server is asked on a new connection, again and again.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long that answer is awaited. A caller that starts to wait every two seconds reports silence within 4.5 s of its
/// begin: an outage is to be reported within five.
const PROBE_TIMEOUT: Duration = Duration::from_millis(1500);

/// Awaits a session's answer. While it does not come, `report` is called with the time for which the server has been
/// silent, or with `None` when the server answers on a new connection. It is not called when the answer comes.
pub async fn watched<T>(
    login: &DatabaseLogin,
    answer: impl Future<Output = T>,
    report: impl Fn(Option<Duration>),
) -> T {
    let mut answer = pin!(answer);
    let mut last_answer = Instant::now();
    loop {
        let probed = async {
            sleep(PATIENCE).await;
            timeout(PROBE_TIMEOUT, probe(login)).await
        };
        tokio::select! {
            biased;
            answer = &mut answer => return answer,
            probed = probed => match probed {
                Ok(Ok(())) => {
                    last_answer = Instant::now();
                    report(None);
                }
                // neither proves anything about the session: a Service without ready Pods refuses new connections
                Ok(Err(error)) => tracing::debug!(%error, "the server could not be asked on a new connection"),
                Err(_elapsed) => report(Some(last_answer.elapsed())),
            },
        }
    }
}

/// Asks the server whether it supports TLS, which it answers before any login.
async fn probe(login: &DatabaseLogin) -> io::Result<()> {
    let address = Address::of(&login.server).await.map_err(io::Error::other)?;
    let mut stream = TcpStream::connect((address.host.as_str(), address.port)).await?;
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    stream.write_all(&request).await?;
    stream.read_u8().await?;
    Ok(())
}
