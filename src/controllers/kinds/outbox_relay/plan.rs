//! What should exist because of an OutboxRelay: its contract. The sidecar that reads it is part of the Microservice's
//! Deployment, or of the relay's own; a change of the contract is read without a restart.

mod sink;

pub use sink::nats;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::ResourceExt;

use super::{Observed, Planned};
use crate::{
    api::v1alpha1::{EventFormat, OutboxRelay, RelayMode},
    contract::{
        Contract,
        relay::{self, Format, Mode, Relay},
    },
    controllers::{
        database::{Access, placement},
        render::{milliseconds, owner::Owner, reach},
        resources::{
            child::Child,
            labels::Component,
            plan::{Plan, Rejection},
            reason::Reason,
            settings::Settings,
        },
    },
    domain::names::{self, MAX_NAME},
};

/// Value of `weft.dev/owner-kind` on the children of an OutboxRelay.
pub const OWNER_KIND: &str = "OutboxRelay";

/// Key of the ConfigMap, and where it is mounted in the sidecar.
pub const CONTRACT_FILE: &str = "relay.yaml";
pub const CONTRACT_FOLDER: &str = "/etc/weft/relay";

pub fn plan(object: &OutboxRelay, observed: &Observed, settings: &Settings) -> Result<Planned, Rejection> {
    check(object, observed)?;
    let owner = Owner::of(object, OWNER_KIND);
    let contract = contract(object, observed, settings)?;
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

fn contract(object: &OutboxRelay, observed: &Observed, settings: &Settings) -> Result<Relay, Rejection> {
    let spec = &object.spec;
    let (namespace, service) = (object.namespace().unwrap_or_default(), spec.microservice.clone());
    // `check` has refused one without
    let database = observed.microservice.as_ref().and_then(|found| found.spec.database.as_ref());
    let database = database.ok_or_else(|| Rejection::microservice_not_found("spec.microservice", &service))?;
    let Access { relay: source, .. } = placement(database).access(&service, &namespace);
    let contract = Relay {
        name: object.name_any(),
        mode: match spec.mode {
            RelayMode::LogTailing => Mode::LogTailing,
            RelayMode::Polling => Mode::Polling,
        },
        source,
        sink: sink::sink(&spec.sink, settings)?,
        format: match spec.format {
            EventFormat::CloudEvents => Format::CloudEvents,
            EventFormat::CloudEventsStructured => Format::CloudEventsStructured,
            EventFormat::Raw => Format::Raw,
        },
        keep_published_ms: milliseconds(spec.retention.after),
        dead_letter: spec
            .dead_letter
            .map(|letter| relay::DeadLetter { max_attempts: u32::try_from(letter.max_attempts).unwrap_or(u32::MAX) }),
        paused: spec.paused,
        version: String::new(),
        namespace,
        service,
    };
    Ok(contract.seal())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        api::v1alpha1::Microservice,
        controllers::fixtures::{self, microservice, relay, relay_of, settings},
    };

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
