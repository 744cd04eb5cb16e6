//! What should exist because of an OutboxRelay: its contract. The sidecar that reads it is part of the Microservice's
//! Deployment; a change of the contract is read without a restart.

use std::path::Path;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;

use super::{Observed, Planned};
use crate::{
    api::v1alpha1::{
        DeleteWhen, EventFormat, HttpSink, KafkaMechanism, KafkaSink, NatsSink, OutboxRelay, RelayMode, RelaySink,
    },
    contract::{
        Contract, DatabaseLogin, Role,
        relay::{self, Format, Mechanism, Mode, Relay, Retention, Sink},
    },
    controllers::{
        database::{self, RELAY_PASSWORD},
        render::{broker, owner::Owner, pod::PASSWORD, reach, sink as secrets},
        resources::{
            child::Child,
            labels::Component,
            plan::{Plan, Rejection},
            reason::Reason,
            settings::Settings,
        },
    },
    domain::names::{self, MAX_NAME, POSTGRES_PORT},
    nats::accounts::RELAY_INBOX,
};

/// Value of `weft.dev/owner-kind` on the children of an OutboxRelay.
pub const OWNER_KIND: &str = "OutboxRelay";

/// Key of the ConfigMap, and where it is mounted in the sidecar.
pub const CONTRACT_FILE: &str = "relay.yaml";
pub const CONTRACT_FOLDER: &str = "/etc/weft/relay";

pub fn plan(object: &OutboxRelay, observed: &Observed, settings: &Settings) -> Result<Planned, Rejection> {
    check(object, observed)?;
    let owner = Owner::of(object, OWNER_KIND);
    let contract = contract(object, settings)?;
    let text = contract.to_yaml().map_err(|error| Rejection {
        reason: Reason::ContractNotWritable,
        message: format!("the contract of relay {} cannot be written: {error}", owner.name),
    })?;
    let config_map = ConfigMap {
        metadata: owner.metadata(names::relay(&owner.name), Component::Relay),
        data: Some([(CONTRACT_FILE.to_owned(), text)].into()),
        ..ConfigMap::default()
    };
    let children = Plan { children: vec![Child::ConfigMap(config_map)], ..Plan::default() };
    Ok(Planned { children, contract_version: contract.version })
}

fn check(object: &OutboxRelay, observed: &Observed) -> Result<(), Rejection> {
    let (name, service) = (object.name_any(), &object.spec.microservice);
    if name.len() > MAX_NAME {
        return Err(Rejection {
            reason: Reason::NameTooLong,
            message: format!("metadata.name: `{name}` has {} characters: use at most {MAX_NAME}", name.len()),
        });
    }
    let first = observed.kept_relay.clone().or_else(|| observed.relays.first().map(|first| first.name_any()));
    let first = first.filter(|first| *first != name);
    if let Some(first) = first {
        return Err(Rejection {
            reason: Reason::OutboxTaken,
            message: format!(
                "spec.microservice: the outbox of `{service}` has the relay `{first}` already, and one outbox has one relay: delete one of them"
            ),
        });
    }
    if let Some(secret) = object.spec.sink.secret() {
        reach::check_secret(service, "spec.sink", secret)?;
    }
    match &observed.microservice {
        Some(found) if found.spec.database.is_none() => Err(Rejection {
            reason: Reason::NoDatabase,
            message: format!(
                "spec.microservice: `{service}` has no database, so it has no outbox: give it spec.database, or delete this relay"
            ),
        }),
        Some(_) => Ok(()),
        None if observed.unreadable => Err(Rejection::microservice_malformed("spec.microservice", service)),
        None => Err(Rejection::microservice_not_found("spec.microservice", service)),
    }
}

fn contract(object: &OutboxRelay, settings: &Settings) -> Result<Relay, Rejection> {
    let spec = &object.spec;
    let (namespace, service) = (object.namespace().unwrap_or_default(), spec.microservice.clone());
    let contract = Relay {
        name: object.name_any(),
        mode: match spec.mode {
            RelayMode::LogTailing => Mode::LogTailing,
            RelayMode::Polling => Mode::Polling,
        },
        source: DatabaseLogin {
            host: database::host(&service, &namespace),
            port: POSTGRES_PORT,
            database: names::database_name(&service),
            role: Role {
                name: names::RELAY_ROLE.to_owned(),
                password_file: Path::new(RELAY_PASSWORD.1).join(PASSWORD),
            },
        },
        sink: sink(&spec.sink, settings)?,
        format: match spec.format {
            EventFormat::CloudEvents => Format::CloudEvents,
            EventFormat::CloudEventsStructured => Format::CloudEventsStructured,
            EventFormat::Raw => Format::Raw,
        },
        retention: match spec.retention.delete {
            DeleteWhen::AfterPublish => Retention::AfterPublish,
        },
        paused: spec.paused,
        version: String::new(),
        namespace,
        service,
    };
    Ok(contract.seal())
}

/// The sink as the data plane reads it.
fn sink(sink: &RelaySink, settings: &Settings) -> Result<Sink, Rejection> {
    let folder = |secret: &Option<String>| secret.as_deref().map(secrets::folder);
    match sink {
        RelaySink { nats: Some(nats), .. } => Ok(Sink::Nats(self::nats(nats, settings)?)),
        RelaySink { http: Some(HttpSink { url, secret }), .. } => {
            Ok(Sink::Http(relay::HttpSink { url: url.clone(), secret_folder: folder(secret) }))
        }
        RelaySink { kafka: Some(KafkaSink { servers, tls, secret, mechanism, topic }), .. } => {
            Ok(Sink::Kafka(relay::KafkaSink {
                servers: servers.clone(),
                tls: *tls,
                secret_folder: folder(secret),
                mechanism: match mechanism {
                    KafkaMechanism::Plain => Mechanism::Plain,
                    KafkaMechanism::ScramSha256 => Mechanism::ScramSha256,
                    KafkaMechanism::ScramSha512 => Mechanism::ScramSha512,
                },
                topic: topic.clone(),
            }))
        }
        // refused by the API server
        RelaySink { nats: None, http: None, kafka: None } => Err(Rejection {
            reason: Reason::NoBroker,
            message: "spec.sink names no broker: give one of nats, http and kafka".to_owned(),
        }),
    }
}

/// A stream of NATS, on the servers that are named or on the broker that is installed with Weft.
pub fn nats(sink: &NatsSink, settings: &Settings) -> Result<relay::NatsSink, Rejection> {
    let NatsSink { servers, secret, stream, subject, max_age } = sink;
    let (servers, secret_folder, inbox_prefix) = match &settings.broker {
        _ if !servers.is_empty() => (servers.clone(), secret.as_deref().map(secrets::folder), None),
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        api::v1alpha1::Microservice,
        controllers::fixtures::{self, microservice, relay, relay_of, settings, settings_with_broker},
    };

    #[test]
    fn without_an_address_it_publishes_to_the_installed_broker_by_credentials() {
        let object = relay("orders", "{microservice: orders, sink: {nats: {}}}");
        let sink = nats(&object.spec.sink.nats.clone().unwrap(), &settings_with_broker()).unwrap();
        assert_eq!(sink.servers, ["nats://weft-nats.weft-system:4222"]);
        assert_eq!(sink.secret_folder.as_deref(), Some(Path::new("/etc/weft/broker")));
        let observed = Observed { microservice: Some(orders()), relays: vec![object.clone()], ..Observed::default() };
        assert_eq!(plan(&object, &observed, &settings()).unwrap_err().reason, Reason::NoBroker);
    }

    #[test]
    fn another_broker_does_not_get_the_credentials() {
        let sink = nats(&relay_of("orders").spec.sink.nats.clone().unwrap(), &settings_with_broker()).unwrap();
        assert_eq!((sink.servers, sink.secret_folder), (vec!["nats://nats.messaging:4222".to_owned()], None));
    }

    #[test]
    fn another_microservices_secret_is_refused() {
        let object =
            relay("orders", "{microservice: orders, sink: {http: {url: 'http://thief/', secret: customers-db-admin}}}");
        let observed = Observed { microservice: Some(orders()), relays: vec![object.clone()], ..Observed::default() };
        assert_eq!(plan(&object, &observed, &settings()).unwrap_err().reason, Reason::NotItsOwn);
    }

    #[test]
    fn a_relay_is_one_contract() {
        let object = relay_of("orders");
        let observed = Observed { microservice: Some(orders()), relays: vec![object.clone()], ..Observed::default() };
        insta::assert_snapshot!(fixtures::yaml(&plan(&object, &observed, &settings()).unwrap().children));
    }

    fn orders() -> Arc<Microservice> {
        Arc::new(microservice("orders", "{image: i, database: {postgres: {}}}"))
    }

    #[test]
    fn a_microservice_that_is_not_there_is_said() {
        let object = relay_of("orders");
        let mut observed = Observed { relays: vec![object.clone()], ..Observed::default() };
        let refused = plan(&object, &observed, &settings()).unwrap_err();
        assert_eq!(refused.reason, Reason::MicroserviceNotFound);
        assert!(refused.reason.is_waited_for());
        observed.microservice = Some(orders());
        assert!(plan(&object, &observed, &settings()).is_ok());
    }

    #[test]
    fn one_outbox_has_one_relay_and_the_older_one_keeps_it() {
        let (old, new) =
            (relay_of("orders"), relay("younger", "{microservice: orders, sink: {nats: {servers: ['nats://n']}}}"));
        let observed =
            Observed { microservice: Some(orders()), relays: vec![old.clone(), new.clone()], ..Observed::default() };
        assert!(plan(&old, &observed, &settings()).is_ok());
        let refused = plan(&new, &observed, &settings()).unwrap_err();
        assert_eq!(refused.reason, Reason::OutboxTaken);
        assert!(refused.message.contains("`orders` has the relay `orders` already"), "{}", refused.message);
    }

    #[test]
    fn a_relay_that_cannot_be_read_keeps_its_outbox() {
        let object = relay_of("orders");
        let observed = Observed {
            microservice: Some(orders()),
            relays: vec![object.clone()],
            kept_relay: Some("older".to_owned()),
            ..Observed::default()
        };
        assert_eq!(plan(&object, &observed, &settings()).unwrap_err().reason, Reason::OutboxTaken);
    }

    #[test]
    fn a_microservice_without_a_database_has_no_outbox() {
        let object = relay_of("gateway");
        let observed = Observed {
            microservice: Some(Arc::new(microservice("gateway", "{image: i}"))),
            relays: vec![object.clone()],
            ..Observed::default()
        };
        assert_eq!(plan(&object, &observed, &settings()).unwrap_err().reason, Reason::NoDatabase);
    }
}
