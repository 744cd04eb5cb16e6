//! RabbitMQ. Tests that do not kill the server share one, with a virtual host for each.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use futures::StreamExt;
use lapin::{
    BasicProperties, Channel, ConnectionProperties, ExchangeKind,
    options::{BasicConsumeOptions, ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use weft::contract::{
    problem::{Problem, ProblemReason},
    relay::{RabbitMqSink, Sink, Unroutable},
};

use super::{Broker, INSERT, Received, setting};
use crate::servers::{
    RabbitMq,
    rabbitmq::{LOGIN, MAX_MESSAGE},
};

const EXCHANGE: &str = "events";
const QUEUE: &str = "everything";

/// A server, and the virtual host that a test has to itself.
#[derive(Debug)]
pub struct Host {
    server: Arc<RabbitMq>,
    name: String,
}

impl Host {
    /// Of the server that all tests share.
    fn shared() -> Self {
        static SHARED: LazyLock<Arc<RabbitMq>> = LazyLock::new(|| Arc::new(RabbitMq::start_shared()));
        static HOSTS: AtomicU8 = AtomicU8::new(1);
        Self { server: SHARED.clone(), name: HOSTS.fetch_add(1, Ordering::Relaxed).to_string() }
    }

    fn own() -> Self {
        Self { server: Arc::new(RabbitMq::start()), name: "1".to_owned() }
    }

    fn server(&mut self) -> &mut RabbitMq {
        Arc::get_mut(&mut self.server).expect("nobody shares it")
    }

    async fn channel(&self) -> (lapin::Connection, Channel) {
        let url = format!("{}/{}", self.server.url(), self.name);
        let connection = lapin::Connection::connect(&url, ConnectionProperties::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        (connection, channel)
    }

    /// A queue that gets everything.
    async fn bind(&self) {
        let (_connection, channel) = self.channel().await;
        let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(QUEUE.into(), durable, FieldTable::default()).await.unwrap();
        let all = QueueBindOptions::default();
        channel.queue_bind(QUEUE.into(), EXCHANGE.into(), "#".into(), all, FieldTable::default()).await.unwrap();
    }

    async fn with_queue(self) -> Self {
        let (_connection, channel) = self.channel().await;
        let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
        channel.exchange_declare(EXCHANGE.into(), ExchangeKind::Topic, durable, FieldTable::default()).await.unwrap();
        self.bind().await;
        self
    }

    fn sink(&self, secret: Option<&Path>, unroutable: Unroutable) -> Sink {
        Sink::RabbitMq(RabbitMqSink {
            // the first one is not there
            servers: vec!["amqp://127.0.0.1:9".to_owned(), self.server.url()],
            secret_folder: secret.map(Path::to_owned),
            virtual_host: self.name.clone(),
            exchange: EXCHANGE.to_owned(),
            routing_key: "{namespace}.{service}.{aggregate_type}.{type}".to_owned(),
            unroutable,
        })
    }

    async fn messages(&self) -> Vec<Received> {
        let (_connection, channel) = self.channel().await;
        let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
        let queue = channel.queue_declare(QUEUE.into(), passive, FieldTable::default()).await.unwrap();
        let count = usize::try_from(queue.message_count()).unwrap();
        let options = BasicConsumeOptions::default();
        let consumer = channel.basic_consume(QUEUE.into(), "".into(), options, FieldTable::default()).await.unwrap();
        // what is not acknowledged goes back when the connection ends
        let received = consumer.take(count).map(|message| {
            let message = message.unwrap();
            assert_eq!(*message.properties.delivery_mode(), Some(2), "it is persistent");
            let (destination, headers) = (message.routing_key.to_string(), headers(&message.properties));
            Received { destination, headers, body: message.data }
        });
        received.collect().await
    }
}

fn headers(properties: &BasicProperties) -> BTreeMap<String, String> {
    let text = |value: &AMQPValue| match value {
        AMQPValue::LongString(text) => text.to_string(),
        other => panic!("no text: {other:?}"),
    };
    let name = |name: &str| match name.strip_prefix("cloudEvents:") {
        Some(attribute) => format!("ce-{attribute}"),
        None => name.to_owned(),
    };
    let table = properties.headers().clone().unwrap();
    let mut all: BTreeMap<_, _> = table.inner().iter().map(|(key, value)| (name(key.as_str()), text(value))).collect();
    all.extend(properties.content_type().iter().map(|value| ("content-type".to_owned(), value.to_string())));
    let id = properties.message_id().clone().unwrap().to_string();
    assert!(id.starts_with(&format!("{} {} ", all["ce-source"], all["ce-id"])), "{id}");
    all
}

impl Broker for Host {
    const SERVER: &'static str = "RabbitMQ";

    async fn start() -> Self {
        Self::shared().with_queue().await
    }

    fn sink(&self, secret: Option<&Path>) -> Sink {
        self.sink(secret, Unroutable::Hold)
    }

    async fn kill9(&mut self) {
        self.server().kill9();
    }

    async fn start_again(&mut self) {
        self.server().restart();
    }

    async fn received(&self) -> Vec<Received> {
        self.messages().await
    }

    async fn demand_credentials(&mut self) -> Option<[Vec<(&'static str, String)>; 2]> {
        let login = |password: &str| vec![("username", LOGIN.0.to_owned()), ("password", password.to_owned())];
        Some([login(LOGIN.1), login("another password")])
    }

    fn too_large(&self) -> usize {
        2 * MAX_MESSAGE
    }
}

/// A server of its own, which may be killed.
#[derive(Debug)]
struct Own(Host);

impl Broker for Own {
    const SERVER: &'static str = Host::SERVER;

    async fn start() -> Self {
        Self(Host::own().with_queue().await)
    }

    fn sink(&self, secret: Option<&Path>) -> Sink {
        self.0.sink(secret, Unroutable::Hold)
    }

    async fn kill9(&mut self) {
        self.0.kill9().await;
    }

    async fn start_again(&mut self) {
        self.0.start_again().await;
    }

    async fn received(&self) -> Vec<Received> {
        self.0.messages().await
    }

    async fn demand_credentials(&mut self) -> Option<[Vec<(&'static str, String)>; 2]> {
        self.0.demand_credentials().await
    }

    fn too_large(&self) -> usize {
        self.0.too_large()
    }
}

contract!(Own, Host, true);

/// Over TLS the server is trusted by the Secret's CA only, and the client's certificate is its login.
#[tokio::test]
async fn a_connection_is_encrypted_and_both_sides_are_known() {
    let host = Host::shared().with_queue().await;
    let mut setting = setting(&host, Some(host.server.certificates())).await;
    let Sink::RabbitMq(sink) = &mut setting.contract.sink else { panic!("it is for RabbitMQ") };
    sink.servers = vec![host.server.tls_url()];
    super::published_over_tls(&mut setting, host.server.certificates()).await;
}

fn event(aggregate: u32) -> String {
    format!("{INSERT} ('order', '{aggregate}', 'Placed', '{{\"n\": 1}}', '{{}}')")
}

fn message_of(problems: &[Problem], reason: ProblemReason) -> Option<&str> {
    problems.iter().find(|problem| problem.reason == reason).map(|problem| problem.message.as_str())
}

/// An exchange that is missing is declared. An event that no queue gets is held until one does; with `Drop` it is published.
#[tokio::test]
async fn an_event_that_no_queue_gets_is_held_or_dropped() {
    let host = Host::shared();
    let mut setting = setting(&host, None).await;
    let relay = setting.start_relay();
    let app = setting.database.app().await;
    app.batch_execute(&event(1)).await.unwrap();
    let held = relay.until("it is held", |status| status.held == 1).await;
    let said = message_of(&held.problems, ProblemReason::EventRefused).unwrap();
    assert!(said.contains("no queue is bound to the exchange events"), "{said}");
    host.bind().await;
    relay.until("it is published", |status| status.published == 1 && status.held == 0).await;
    assert_eq!(host.messages().await.len(), 1);

    let (_connection, channel) = host.channel().await;
    channel.queue_delete(QUEUE.into(), lapin::options::QueueDeleteOptions::default()).await.unwrap();
    setting.contract.sink = host.sink(None, Unroutable::Drop);
    setting.write_contract();
    app.batch_execute(&event(2)).await.unwrap();
    relay.until("it is dropped", |status| status.published == 2 && status.problems.is_empty()).await;
}

/// A server that has an alarm is reported at once, and gets each event once when the alarm is over. One that is silent is reported,
/// and an exchange that was deleted is declared again.
#[tokio::test]
async fn a_blocked_connection_is_reported_and_so_is_silence() {
    let host = Host::own().with_queue().await;
    let setting = setting(&host, None).await;
    let relay = setting.start_relay();
    let app = setting.database.app().await;
    app.batch_execute(&event(1)).await.unwrap();
    relay.until("publishing", |status| status.published == 1).await;

    host.server.control(&["set_vm_memory_high_watermark", "absolute", "1"]);
    for aggregate in 2..=20 {
        app.batch_execute(&event(aggregate)).await.unwrap();
    }
    let blocked = |problems: &[Problem]| {
        message_of(problems, ProblemReason::PublishFailing).is_some_and(|said| said.contains("low on memory"))
    };
    let status = relay.until("the alarm is reported", |status| blocked(&status.problems)).await;
    assert!(!status.ready && status.published == 1, "{status:?}");
    host.server.control(&["set_vm_memory_high_watermark", "0.8"]);
    relay.until("all are published", |status| status.published == 20 && status.problems.is_empty()).await;
    assert_eq!(host.messages().await.len(), 20);

    host.server.signal("-STOP");
    let silent = |problems: &[Problem]| {
        message_of(problems, ProblemReason::BrokerUnreachable)
            .is_some_and(|said| said.contains("has not answered since"))
    };
    relay.within(Duration::from_secs(20), "the silence is reported", |status| silent(&status.problems)).await;
    host.server.signal("-CONT");
    relay.until("it is there again", |status| status.problems.is_empty()).await;

    let (_connection, channel) = host.channel().await;
    channel.exchange_delete(EXCHANGE.into(), lapin::options::ExchangeDeleteOptions::default()).await.unwrap();
    app.batch_execute(&event(21)).await.unwrap();
    relay.until("the exchange is there again", |status| status.held == 1).await;
    host.bind().await;
    relay.until("it is published", |status| status.published == 21).await;
}
