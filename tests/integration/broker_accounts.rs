//! The accounts of the broker that is installed with Weft, on a real server: nobody gets in without credentials, a namespace has
//! its own streams, and what a relay or an orchestrator has allows what that needs and no more.

use std::time::Duration;

use async_nats::{
    Client, ConnectOptions, Message,
    jetstream::{self, consumer::pull, stream},
};
use futures::StreamExt;
use weft::nats::accounts::{Access, Accounts, RELAY_INBOX};

use crate::servers::Nats;

const UPDATE: &str = "$SYS.REQ.CLAIMS.UPDATE";

/// A server with accounts, as the chart installs it.
pub struct Broker {
    pub accounts: Accounts,
    pub server: Nats,
}

impl Broker {
    pub async fn start() -> Self {
        let accounts = Accounts::new("0123456789abcdef0123456789abcdef".to_owned());
        let broker = Self { server: Nats::with_accounts(&accounts), accounts };
        for namespace in ["shop", "delivery"] {
            broker.give(namespace).await;
        }
        broker
    }

    /// JetStream for whoever has this access to the account of `namespace`.
    pub async fn member(&self, namespace: &str, access: Access) -> jetstream::Context {
        let credentials = self.accounts.credentials(namespace, "test", access);
        let client = match access {
            Access::Publish => self.connect_with_inbox(&credentials, RELAY_INBOX).await,
            Access::Consume | Access::Administer => self.connect(&credentials).await,
        };
        let mut context = jetstream::new(client.unwrap());
        context.set_timeout(Duration::from_secs(2));
        context
    }

    async fn give(&self, namespace: &str) -> Message {
        let system = self.connect(&self.accounts.system_credentials()).await.unwrap();
        system.request(UPDATE, self.accounts.account(namespace).into()).await.unwrap()
    }

    async fn connect_with_inbox(&self, credentials: &str, prefix: &str) -> Result<Client, async_nats::ConnectError> {
        let options = ConnectOptions::with_credentials(credentials).unwrap().custom_inbox_prefix(prefix);
        options.connect(self.server.url()).await
    }

    async fn connect(&self, credentials: &str) -> Result<Client, async_nats::ConnectError> {
        ConnectOptions::with_credentials(credentials).unwrap().connect(self.server.url()).await
    }
}

fn events() -> stream::Config {
    stream::Config { name: "events".into(), subjects: vec!["events.>".into()], ..stream::Config::default() }
}

async fn publish(context: &jetstream::Context, text: &'static str) {
    context.publish("events.shop.orders.order.OrderCreated", text.into()).await.unwrap().await.unwrap();
}

async fn all(context: &jetstream::Context) -> Vec<String> {
    let stream = context.get_stream("events").await.unwrap();
    let consumer = stream.create_consumer(pull::Config::default()).await.unwrap();
    let messages = consumer.fetch().max_messages(100).messages().await.unwrap();
    messages.map(|message| String::from_utf8(message.unwrap().payload.to_vec()).unwrap()).collect().await
}

#[tokio::test]
async fn only_who_has_credentials_of_these_accounts_gets_in() {
    let broker = Broker::start().await;
    let refused = async_nats::connect(broker.server.url()).await.unwrap_err();
    assert!(refused.to_string().contains("authorization violation"), "{refused}");
    let others = Accounts::new("ffffffffffffffffffffffffffffffff".to_owned());
    assert!(broker.connect(&others.credentials("shop", "test", Access::Administer)).await.is_err());
    // of these keys, and of a namespace that was given no account
    assert!(broker.connect(&broker.accounts.credentials("other", "test", Access::Administer)).await.is_err());
    broker.give("other").await;
    broker.connect(&broker.accounts.credentials("other", "test", Access::Administer)).await.unwrap();
}

#[tokio::test]
async fn a_namespace_sees_and_forges_no_event_of_another() {
    let broker = Broker::start().await;
    let shop = broker.member("shop", Access::Publish).await;
    let delivery = broker.member("delivery", Access::Publish).await;
    for context in [&shop, &delivery] {
        context.create_stream(events()).await.unwrap();
    }
    publish(&shop, "of shop").await;
    publish(&delivery, "forged by delivery").await;
    assert_eq!(all(&broker.member("shop", Access::Consume).await).await, ["of shop"]);
    assert_eq!(all(&broker.member("delivery", Access::Consume).await).await, ["forged by delivery"]);
}

#[tokio::test]
async fn a_relay_publishes_and_neither_reads_nor_deletes_and_a_reader_reads() {
    let broker = Broker::start().await;
    let relay = broker.member("shop", Access::Publish).await;
    relay.create_stream(events()).await.unwrap();
    publish(&relay, "one").await;
    let stream = relay.get_stream("events").await.unwrap();
    assert!(stream.create_consumer(pull::Config::default()).await.is_err());
    assert!(stream.purge().await.is_err());
    assert!(stream.delete_message(1).await.is_err());
    assert!(relay.delete_stream("events").await.is_err());

    let reader = broker.member("shop", Access::Consume).await;
    assert!(reader.delete_stream("events").await.is_err());
    assert!(reader.get_stream("events").await.unwrap().purge().await.is_err());
    let forged = reader.publish("events.shop.orders.order.OrderCreated", "forged".into()).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(1), forged.into_future()).await.is_err());
    assert_eq!(all(&reader).await, ["one"]);
    broker.member("shop", Access::Administer).await.delete_stream("events").await.unwrap();
}

#[tokio::test]
async fn a_relay_does_not_receive_what_others_are_sent() {
    let broker = Broker::start().await;
    let relay = broker.member("shop", Access::Publish).await;
    relay.create_stream(events()).await.unwrap();
    let credentials = broker.accounts.credentials("shop", "curious", Access::Publish);
    let curious = broker.connect_with_inbox(&credentials, RELAY_INBOX).await.unwrap();
    let mut overheard = Vec::new();
    for subject in [">", "_INBOX.>", "events.>"] {
        overheard.push(curious.subscribe(subject).await.unwrap());
    }
    curious.flush().await.unwrap();
    publish(&relay, "one").await;
    let reader = broker.member("shop", Access::Consume).await;
    assert_eq!(all(&reader).await, ["one"]);
    for mut subscription in overheard {
        let heard = tokio::time::timeout(Duration::from_millis(300), subscription.next()).await;
        assert!(!matches!(heard, Ok(Some(_))), "{heard:?}");
    }
}

#[tokio::test]
async fn accounts_and_events_outlive_the_server() {
    let mut broker = Broker::start().await;
    let relay = broker.member("shop", Access::Publish).await;
    relay.create_stream(events()).await.unwrap();
    publish(&relay, "before").await;
    broker.server.restart();
    publish(&broker.member("shop", Access::Publish).await, "after").await;
    // given again, as a new leader does: nothing changes
    let answer = broker.give("shop").await;
    assert!(String::from_utf8_lossy(&answer.payload).contains("\"code\":200"), "{answer:?}");
    assert_eq!(all(&broker.member("shop", Access::Consume).await).await, ["before", "after"]);
}
