//! NATS JetStream. What is particular to it is in `relay.rs` and `relay_faults`.

use std::path::Path;

use async_nats::jetstream::{self, consumer::pull};
use futures::StreamExt;
use weft::contract::relay::{NatsSink, Sink};

use super::{Broker, Received};
use crate::servers::Nats;

impl Broker for Nats {
    const SERVER: &'static str = "NATS";

    async fn start() -> Self {
        Nats::start()
    }

    fn sink(&self, secret: Option<&Path>) -> Sink {
        Sink::Nats(NatsSink {
            // the first one is not there
            servers: vec!["nats://127.0.0.1:9".to_owned(), self.url()],
            secret_folder: secret.map(Path::to_owned),
            inbox_prefix: None,
            stream: "events".to_owned(),
            subject: "events.{namespace}.{service}.{aggregate_type}.{type}".to_owned(),
            max_age_seconds: 3600,
        })
    }

    async fn kill9(&mut self) {
        Nats::kill9(self);
    }

    async fn start_again(&mut self) {
        Nats::restart(self);
    }

    async fn received(&self) -> Vec<Received> {
        let client = match self.login() {
            Some((user, password)) => {
                async_nats::ConnectOptions::with_user_and_password(user, password).connect(self.url()).await.unwrap()
            }
            None => async_nats::connect(self.url()).await.unwrap(),
        };
        let stream = jetstream::new(client).get_stream("events").await.unwrap();
        let consumer = stream.create_consumer(pull::OrderedConfig::default()).await.unwrap();
        let count = usize::try_from(consumer.cached_info().num_pending).unwrap();
        let messages = consumer.messages().await.unwrap().take(count);
        let received = messages.map(|message| {
            let message = message.unwrap();
            let headers = message.headers.iter().flat_map(|headers| headers.iter());
            let header = |(name, values): (&async_nats::HeaderName, &Vec<async_nats::HeaderValue>)| {
                (name.to_string().to_lowercase(), values[0].as_str().to_owned())
            };
            Received {
                destination: message.subject.to_string(),
                headers: headers.map(header).collect(),
                body: message.payload.to_vec(),
            }
        });
        received.collect().await
    }

    async fn demand_credentials(&mut self) -> Option<[Vec<(&'static str, String)>; 2]> {
        self.demand_login("relay", "a right password");
        let login = |password: &str| vec![("username", "relay".to_owned()), ("password", password.to_owned())];
        Some([login("a right password"), login("another password")])
    }

    fn too_large(&self) -> usize {
        2 * 1024 * 1024
    }
}

contract!(Nats, Nats, true);
