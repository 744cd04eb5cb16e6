//! A TCP proxy between a client and a server, which makes the network as bad as a test wants it.

use std::{
    net::Ipv4Addr,
    sync::mpsc as std_mpsc,
    thread,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;

const CHUNK: usize = 64 * 1024;
/// Chunks that are under way in one direction, so that a delay costs no throughput.
const UNDER_WAY: usize = 256;

/// What the network is like now.
#[derive(Clone, Debug)]
struct Network {
    target: u16,
    /// Of each direction.
    delay: Duration,
    /// Nothing arrives, and nobody is told.
    silent: bool,
    /// New connections are closed at once.
    refusing: bool,
    /// Cancelled by a cut: ends every connection that was made before it.
    connections: CancellationToken,
}

/// Listens on a port of its own until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    network: watch::Sender<Network>,
    end: CancellationToken,
}

impl Proxy {
    /// Before the server on this loopback port.
    pub fn before(target: u16) -> Self {
        let network = Network {
            target,
            delay: Duration::ZERO,
            silent: false,
            refusing: false,
            connections: CancellationToken::new(),
        };
        let (network, changes) = watch::channel(network);
        let end = CancellationToken::new();
        let (listening, port) = std_mpsc::channel();
        let ended = end.clone();
        // on a thread of its own: a test may block
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                let listener =
                    TcpListener::bind((Ipv4Addr::LOCALHOST, super::free_port())).await.expect("the port is free");
                listening.send(listener.local_addr().expect("an address").port()).expect("the test waits for it");
                let _ended = ended.run_until_cancelled(accept(listener, changes)).await;
            });
        });
        Self { port: port.recv().expect("the proxy listens"), network, end }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Delays what is sent, in each direction.
    pub fn delay(&self, delay: Duration) {
        self.network.send_modify(|network| network.delay = delay);
    }

    /// Delivers nothing any more, without closing a connection; or what was sent meanwhile, and everything again.
    pub fn set_silent(&self, silent: bool) {
        self.network.send_modify(|network| network.silent = silent);
    }

    /// Closes all connections. New ones are accepted.
    pub fn cut(&self) {
        self.network.send_modify(|network| {
            network.connections.cancel();
            network.connections = CancellationToken::new();
        });
    }

    /// Closes all connections, and new ones too, until it is set back.
    pub fn set_refusing(&self, refusing: bool) {
        self.network.send_modify(|network| network.refusing = refusing);
        if refusing {
            self.cut();
        }
    }

    /// Leads new connections to another server, and closes those to the old one.
    pub fn lead_to(&self, target: u16) {
        self.network.send_modify(|network| network.target = target);
        self.cut();
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.network.borrow().connections.cancel();
        self.end.cancel();
    }
}

async fn accept(listener: TcpListener, network: watch::Receiver<Network>) {
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        let now = network.borrow().clone();
        if now.refusing {
            continue;
        }
        let network = network.clone();
        let connections = now.connections.clone();
        tokio::spawn(connections.run_until_cancelled_owned(async move {
            let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, now.target)).await else { return };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
            // the end of one direction ends both, as a server's crash does
            tokio::select! {
                () = carry(from_client, to_server, network.clone()) => {}
                () = carry(from_server, to_client, network) => {}
            }
        }));
    }
}

async fn carry(from: OwnedReadHalf, to: OwnedWriteHalf, network: watch::Receiver<Network>) {
    let (sender, receiver) = mpsc::channel(UNDER_WAY);
    let delays = network.clone();
    tokio::join!(receive(from, sender, delays), deliver(receiver, to, network));
}

async fn receive(mut from: OwnedReadHalf, sender: mpsc::Sender<(Instant, Vec<u8>)>, network: watch::Receiver<Network>) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let due = Instant::now() + network.borrow().delay;
        if sender.send((due, buffer[..length].to_vec())).await.is_err() {
            return;
        }
    }
}

async fn deliver(
    mut chunks: mpsc::Receiver<(Instant, Vec<u8>)>,
    mut to: OwnedWriteHalf,
    mut network: watch::Receiver<Network>,
) {
    while let Some((due, bytes)) = chunks.recv().await {
        if due > Instant::now() {
            tokio::time::sleep_until(due.into()).await;
        }
        if network.wait_for(|network| !network.silent).await.is_err() || to.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_proxy_delays_silences_and_cuts() {
    let server = super::Postgres::start();
    let proxy = Proxy::before(server.port());
    let url = server.superuser_url().replace(&server.port().to_string(), &proxy.port().to_string());
    let client = super::connect(&url).await.unwrap();
    client.batch_execute("select 1").await.unwrap();
    proxy.delay(Duration::from_millis(50));
    let begun = Instant::now();
    client.batch_execute("select 1").await.unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(100), "{:?}", begun.elapsed());
    proxy.delay(Duration::ZERO);
    proxy.set_silent(true);
    let mut query = Box::pin(client.batch_execute("select 1"));
    assert!(tokio::time::timeout(Duration::from_millis(200), &mut query).await.is_err(), "nothing is answered");
    proxy.set_silent(false);
    query.await.unwrap();
    proxy.cut();
    assert!(client.batch_execute("select 1").await.is_err());
    assert!(super::connect(&url).await.is_ok(), "a cut is over at once");
    proxy.set_refusing(true);
    assert!(super::connect(&url).await.is_err());
}
