//! The sink of an OutboxRelay as the data plane reads it.

use crate::{
    api::v1alpha1::{HttpSink, KafkaMechanism, KafkaSink, NatsSink, RabbitMqSink, RedisSink, RelaySink, Unroutable},
    contract::relay::{self, Mechanism, Sink},
    controllers::{
        render::{broker, sink::folder},
        resources::{plan::Rejection, reason::Reason, settings::Settings},
    },
    nats::accounts::RELAY_INBOX,
};

pub(super) fn sink(sink: &RelaySink, settings: &Settings) -> Result<Sink, Rejection> {
    Ok(match sink {
        RelaySink { nats: Some(sink), .. } => Sink::Nats(nats(sink, settings)?),
        RelaySink { kafka: Some(sink), .. } => Sink::Kafka(kafka(sink)),
        RelaySink { rabbitmq: Some(sink), .. } => Sink::RabbitMq(rabbitmq(sink)),
        RelaySink { redis: Some(sink), .. } => Sink::Redis(redis(sink)),
        RelaySink { http: Some(sink), .. } => Sink::Http(http(sink)),
        // refused by the API server
        RelaySink { nats: None, kafka: None, rabbitmq: None, redis: None, http: None } => {
            return Err(Rejection {
                reason: Reason::NoBroker,
                message: "spec.sink names no broker: give one of nats, kafka, rabbitmq, redis and http".to_owned(),
            });
        }
    })
}

/// A stream of NATS, on the servers that are named or on the broker that is installed with Weft.
pub fn nats(sink: &NatsSink, settings: &Settings) -> Result<relay::NatsSink, Rejection> {
    let NatsSink { servers, secret, stream, subject, max_age } = sink;
    let (servers, secret_folder, inbox_prefix) = match &settings.broker {
        _ if !servers.is_empty() => (servers.clone(), secret.as_deref().map(folder), None),
        Some(broker) => (vec![broker.url.clone()], Some(broker::credentials_folder()), Some(RELAY_INBOX.to_owned())),
        None => {
            return Err(Rejection {
                reason: Reason::NoBroker,
                message: "spec.sink.nats.servers is missing, and no broker was installed with Weft (its chart has nats.enabled=false): give the address of your NATS server".to_owned(),
            });
        }
    };
    Ok(relay::NatsSink {
        servers,
        secret_folder,
        inbox_prefix,
        stream: stream.clone(),
        subject: subject.clone(),
        // its rule leaves no negative one
        max_age_seconds: std::time::Duration::from(*max_age).as_secs(),
    })
}

fn kafka(sink: &KafkaSink) -> relay::KafkaSink {
    let KafkaSink { servers, tls, secret, mechanism, topic } = sink;
    relay::KafkaSink {
        servers: servers.clone(),
        tls: *tls,
        secret_folder: secret.as_deref().map(folder),
        mechanism: match mechanism {
            KafkaMechanism::Plain => Mechanism::Plain,
            KafkaMechanism::ScramSha256 => Mechanism::ScramSha256,
            KafkaMechanism::ScramSha512 => Mechanism::ScramSha512,
        },
        topic: topic.clone(),
    }
}

fn rabbitmq(sink: &RabbitMqSink) -> relay::RabbitMqSink {
    let RabbitMqSink { servers, secret, virtual_host, exchange, routing_key, unroutable } = sink;
    relay::RabbitMqSink {
        servers: servers.clone(),
        secret_folder: secret.as_deref().map(folder),
        virtual_host: virtual_host.clone(),
        exchange: exchange.clone(),
        routing_key: routing_key.clone(),
        unroutable: match unroutable {
            Unroutable::Hold => relay::Unroutable::Hold,
            Unroutable::Drop => relay::Unroutable::Drop,
        },
    }
}

fn redis(sink: &RedisSink) -> relay::RedisSink {
    let RedisSink { servers, secret, stream, max_length } = sink;
    relay::RedisSink {
        servers: servers.clone(),
        secret_folder: secret.as_deref().map(folder),
        stream: stream.clone(),
        // its schema leaves no negative one
        max_length: max_length.map(i64::unsigned_abs),
    }
}

fn http(sink: &HttpSink) -> relay::HttpSink {
    let HttpSink { url, secret, batch } = sink;
    let batch = batch.map(|batch| usize::try_from(batch.max).unwrap_or(1));
    relay::HttpSink { url: url.clone(), batch, secret_folder: secret.as_deref().map(folder) }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::controllers::fixtures::{relay, relay_of, settings, settings_with_broker};

    #[test]
    fn without_an_address_it_publishes_to_the_installed_broker_by_credentials() {
        let object = relay("orders", "{microservice: orders, sink: {nats: {}}}");
        let sink = nats(&object.spec.sink.nats.clone().unwrap(), &settings_with_broker()).unwrap();
        assert_eq!(sink.servers, ["nats://weft-nats.weft-system:4222"]);
        assert_eq!(sink.secret_folder.as_deref(), Some(Path::new("/etc/weft/broker")));
        assert_eq!(super::sink(&object.spec.sink, &settings()).unwrap_err().reason, Reason::NoBroker);
    }

    #[test]
    fn another_broker_does_not_get_the_credentials() {
        let sink = nats(&relay_of("orders").spec.sink.nats.clone().unwrap(), &settings_with_broker()).unwrap();
        assert_eq!((sink.servers, sink.secret_folder), (vec!["nats://nats.messaging:4222".to_owned()], None));
    }
}
