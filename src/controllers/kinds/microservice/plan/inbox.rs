//! The inbox of a Microservice that consumes events: `NAME-inbox`, its contract and its pod.
//!
//! One pod beside the service's: a change of `spec.consumes` restarts nothing of the service, and the events go to the service's
//! address, so that all replicas share them. When it is replaced, the new one waits for the old one's lock and leads at once.

use std::collections::BTreeSet;

use k8s_openapi::api::{
    apps::v1::Deployment,
    core::v1::{ConfigMap, Container, PodSpec, PodTemplateSpec, Secret},
};
use kube::{ResourceExt, core::ObjectMeta};

use super::relay::{admin_port, admin_probe};
use crate::{
    api::v1alpha1::{Consumption, Microservice, Protocol},
    contract::{
        ADMIN_PORT, Contract,
        inbox::{FunctionTarget, HttpTarget, Inbox, Publisher, Subscription, Target},
        relay::NatsSink,
    },
    controllers::{
        database::{self, Mount, User, placement},
        kinds::{
            microservice::{InboxWanted, Observed},
            outbox_relay::{
                self,
                published::{Reader, Use, relay_rejected},
            },
        },
        render::{
            broker, milliseconds, network,
            owner::Owner,
            pod::{config_map_volume, mount, pin, pod_spec, service_account, single, wants_upgrade, weft_security},
            sink,
        },
        resources::{
            child::Child,
            labels::Component,
            plan::Rejection,
            reason::Reason,
            settings::{Defaults, Settings},
        },
    },
    domain::names,
    nats::accounts::Access,
};

const VOLUME: &str = "weft-inbox";
pub const CONTRACT_FILE: &str = "inbox.yaml";
const CONTRACT_FOLDER: &str = "/etc/weft/inbox";
/// Name of the container.
pub const CONTAINER: &str = "weft-inbox";

pub fn children(
    object: &Microservice,
    owner: &Owner,
    observed: &Observed,
    settings: &Settings,
) -> Result<Vec<Child>, Rejection> {
    if object.spec.consumes.is_empty() {
        return Ok(Vec::new());
    }
    let metadata = || owner.metadata(names::inbox(&owner.name), Component::Inbox);
    let contract = in_force(object, owner, observed, settings)?.0;
    let text = contract.to_yaml().map_err(|error| Rejection {
        reason: Reason::ContractNotWritable,
        message: format!("the contract of the inbox of {} cannot be written: {error}", owner.name),
    })?;
    let config_map = ConfigMap {
        metadata: metadata(),
        data: Some([(CONTRACT_FILE.to_owned(), text)].into()),
        ..ConfigMap::default()
    };
    let credentials =
        broker::secret(owner, Access::Consume, settings, |name| owner.ending_metadata(name, Component::Inbox));
    let rules = vec![network::admit(ADMIN_PORT, network::observers(settings)), network::admit_probes()];
    let policy = network::policy(metadata(), owner.pods(Component::Inbox), rules);
    let secrets = secrets(&contract);
    let deployment = deployment(object, owner, observed, (credentials.as_ref(), &secrets), settings)?;
    let children = [
        Child::ConfigMap(config_map),
        Child::ServiceAccount(service_account(metadata(), settings)),
        Child::NetworkPolicy(policy),
        Child::Deployment(deployment),
    ];
    Ok(children.into_iter().chain(credentials.map(Child::Secret)).collect())
}

/// What the inbox is to do, for the status.
pub fn wanted(object: &Microservice, observed: &Observed, settings: &Settings) -> InboxWanted {
    if object.spec.consumes.is_empty() {
        return InboxWanted::default();
    }
    let owner = Owner::of(object, super::OWNER_KIND);
    match in_force(object, &owner, observed, settings) {
        Ok((contract, missing)) => InboxWanted { version: Some(contract.version), missing },
        Err(_rejected) => InboxWanted::default(),
    }
}

/// The contract, and what keeps events of the first entry that is not consumed (or not as the spec says) from it. A new one waits
/// for the set-up, as the new pods do that handle its events.
fn in_force(
    object: &Microservice,
    owner: &Owner,
    observed: &Observed,
    settings: &Settings,
) -> Result<(Inbox, Option<Rejection>), Rejection> {
    let (streams, missing) = streams(object, observed, settings);
    let new = contract(object, owner, streams)?;
    let Some(kept) = observed.inbox_contract.as_deref().filter(|_| observed.inbox_waits) else {
        return Ok((new, missing));
    };
    // what is consumed, and how, waits; not where it is
    let subscriptions = kept.subscriptions.iter().map(|kept| {
        let now = new.subscriptions.iter().find(|new| new.name == kept.name);
        Subscription { stream: now.map_or_else(|| kept.stream.clone(), |now| now.stream.clone()), ..kept.clone() }
    });
    let kept = Inbox { database: new.database.clone(), subscriptions: subscriptions.collect(), ..kept.clone() }.seal();
    let waits = (kept != new).then(|| Rejection {
        reason: Reason::SetupPending,
        message: "spec.consumes as it is now waits for the set-up of the database, whose condition Migrated names the cause; until then events are consumed as before".to_owned(),
    });
    Ok((kept, missing.or(waits)))
}

/// Where the events of each entry are, of those that are there; and what is missing of the first that is not: that is said in a
/// condition, and the others are consumed. Where an OutboxRelay is rejected or cannot be read, it publishes as it did: the stream that
/// is in the contract stays.
fn streams<'a>(
    object: &'a Microservice,
    observed: &Observed,
    settings: &Settings,
) -> (Vec<(&'a Consumption, NatsSink)>, Option<Rejection>) {
    let (mut streams, mut missing) = (Vec::new(), None);
    for consumption in &object.spec.consumes {
        match published(consumption, observed, settings) {
            Ok(stream) => streams.push((consumption, stream)),
            Err(rejection) => {
                let kept = kept(consumption, observed).filter(|_| stays_in_force(&rejection));
                streams.extend(kept.map(|stream| (consumption, stream)));
                _ = missing.get_or_insert(rejection);
            }
        }
    }
    (streams, missing)
}

fn kept(consumption: &Consumption, observed: &Observed) -> Option<NatsSink> {
    let mut earlier = observed.inbox_contract.as_ref()?.subscriptions.iter();
    earlier.find(|earlier| earlier.name == consumption.from).map(|earlier| earlier.stream.clone())
}

/// Whoever publishes is there, and does so by the last form that was good.
pub fn stays_in_force(rejection: &Rejection) -> bool {
    !matches!(rejection.reason, Reason::MicroserviceNotFound | Reason::OutboxRelayNotFound)
}

/// Where the events of an entry are; an error says what is missing, of which nothing else depends.
fn published(consumption: &Consumption, observed: &Observed, settings: &Settings) -> Result<NatsSink, Rejection> {
    let from = &consumption.from;
    let field = format!("spec.consumes[from={from}]");
    let Some(publisher) = observed.publishers.get(from) else {
        return Err(if observed.unreadable.contains(from) {
            Rejection::microservice_malformed(&field, from)
        } else {
            Rejection::microservice_not_found(&field, from)
        });
    };
    let relay = publisher.relays.first().map(AsRef::as_ref);
    let reader = Reader { field: &field, service_field: &field, purpose: Use::Consume };
    let sink = reader.sink(from, relay, publisher.kept_relay.as_deref())?;
    let sink = outbox_relay::nats(sink, settings).map_err(|rejection| relay_rejected(&field, from, rejection))?;
    // an inbox's credentials permit answers on every subject
    Ok(NatsSink { inbox_prefix: None, ..sink })
}

fn contract(object: &Microservice, owner: &Owner, streams: Vec<(&Consumption, NatsSink)>) -> Result<Inbox, Rejection> {
    // the API server refuses one without by CEL
    let database = object.spec.database.as_ref().ok_or_else(|| Rejection {
        reason: Reason::NoDatabase,
        message: "spec.consumes needs spec.database, which holds what was received and the dead letters: add it"
            .to_owned(),
    })?;
    let subscriptions = streams.into_iter().map(|(one, stream)| subscription(object, owner, one, stream));
    let mut subscriptions = subscriptions.collect::<Result<Vec<_>, _>>()?;
    subscriptions.sort_by(|a, b| a.name.cmp(&b.name));
    let contract = Inbox {
        version: String::new(),
        namespace: owner.namespace.clone(),
        service: owner.name.clone(),
        database: placement(database).access(&owner.name, &owner.namespace).app,
        subscriptions,
    };
    Ok(contract.seal())
}

fn subscription(
    object: &Microservice,
    owner: &Owner,
    consumption: &Consumption,
    stream: NatsSink,
) -> Result<Subscription, Rejection> {
    let Consumption { from, types, http, function, since, dead_letter } = consumption;
    let target = match (http, function) {
        (_, Some(function)) => {
            let (schema, name) = match function.split_once('.') {
                Some((schema, name)) => (Some(schema.to_owned()), name),
                None => (None, function.as_str()),
            };
            Target::Function(FunctionTarget { schema, name: name.to_owned() })
        }
        (Some(http), None) => {
            let port = object.spec.ports.iter().find(|port| port.protocol == Protocol::Http);
            let port = port.ok_or_else(|| Rejection {
                reason: Reason::NoHttpPort,
                message: "spec.consumes needs a port with `protocol: http` in spec.ports to deliver to".to_owned(),
            })?;
            let url = format!("http://{}.{}.svc:{}{}", owner.name, owner.namespace, port.port, http.path);
            Target::Http(HttpTarget { url, timeout_ms: milliseconds(http.timeout) })
        }
        // refused by the API server
        (None, None) => {
            return Err(Rejection {
                reason: Reason::NoTarget,
                message: format!("spec.consumes[from={from}] has neither http nor function: give one of them"),
            });
        }
    };
    let since = since.as_ref().map(|since| since.0).or_else(|| object.creation_timestamp().map(|created| created.0));
    Ok(Subscription {
        name: from.clone(),
        from: Publisher { namespace: owner.namespace.clone(), service: from.clone() },
        types: types.clone(),
        since,
        stream,
        target,
        max_attempts: u32::try_from(dead_letter.max_attempts).unwrap_or(u32::MAX),
    })
}

fn deployment(
    object: &Microservice,
    owner: &Owner,
    observed: &Observed,
    secrets: (Option<&Secret>, &BTreeSet<String>),
    settings: &Settings,
) -> Result<Deployment, Rejection> {
    let newest = settings.defaults(&settings.resources.relay);
    let pinned = pin(observed.inbox_deployment.as_ref(), newest, wants_upgrade(object), |defaults| {
        Ok(template(object, owner, observed, secrets, defaults, settings))
    })?;
    let metadata = owner.metadata(names::inbox(&owner.name), Component::Inbox);
    Ok(single(metadata, owner.pods(Component::Inbox), pinned))
}

fn template(
    object: &Microservice,
    owner: &Owner,
    observed: &Observed,
    (credentials, secrets): (Option<&Secret>, &BTreeSet<String>),
    defaults: &Defaults,
    settings: &Settings,
) -> PodTemplateSpec {
    let mut labels = owner.labels(Component::Inbox);
    let database = object.spec.database.as_ref().map(placement);
    labels.extend(database.and_then(|database| database::client_label(database, &owner.name)));
    let login = database.map(|database| database.volumes(&owner.name, User::App)).unwrap_or_default();
    let (volumes, mounts): (Vec<_>, Vec<_>) = login.into_iter().unzip();
    let contract = config_map_volume(VOLUME, names::inbox(&owner.name));
    let volumes = std::iter::once(contract).chain(volumes).chain(credentials.map(broker::volume));
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(labels),
            annotations: database::replaced_annotation(&observed.database, &[&names::database(&owner.name)]),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            containers: vec![container(&mounts, secrets, defaults, settings)],
            volumes: Some(volumes.chain(secrets.iter().map(|secret| sink::volume(secret))).collect()),
            ..pod_spec(names::inbox(&owner.name))
        }),
    }
}

/// The Secrets that people give for the brokers of those who publish.
fn secrets(contract: &Inbox) -> BTreeSet<String> {
    sink::secrets(contract.subscriptions.iter().filter_map(|one| one.stream.secret_folder.as_deref()))
}

/// `login`: what it mounts to log in to the database.
fn container(login: &[Mount], secrets: &BTreeSet<String>, defaults: &Defaults, settings: &Settings) -> Container {
    let config = format!("{CONTRACT_FOLDER}/{CONTRACT_FILE}");
    let login = login.iter().map(|(volume, path)| mount(volume, path));
    let mounts = std::iter::once(mount(VOLUME, CONTRACT_FOLDER)).chain(login).chain(broker::volume_mount(settings));
    Container {
        name: CONTAINER.to_owned(),
        image: Some(defaults.image.clone()),
        image_pull_policy: defaults.image_pull_policy.clone(),
        args: Some(["inbox", "run", "--config", &config].map(str::to_owned).into()),
        ports: Some(vec![admin_port()]),
        liveness_probe: Some(admin_probe("/livez")),
        resources: Some(defaults.resources.clone()),
        security_context: Some(weft_security(settings)),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        volume_mounts: Some(mounts.chain(secrets.iter().map(|secret| sink::volume_mount(secret))).collect()),
        ..Container::default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::controllers::{
        fixtures::{self, microservice, relay, settings, settings_with_broker},
        kinds::microservice::{Published, plan::plan},
    };

    fn customers() -> (Microservice, Observed) {
        let spec = "{image: i, ports: [{name: http, port: 8080}], database: {postgres: {}}, consumes: [
            {from: orders, types: [OrderCreated], http: {path: /events}}, {from: stock, function: stock.on_moved}]}";
        let relay = |name: &str| vec![relay(name, &format!("{{microservice: {name}, sink: {{nats: {{}}}}}}"))];
        let publisher = |name: &str| (name.to_owned(), Published { relays: relay(name), kept_relay: None });
        let observed = Observed { publishers: ["orders", "stock"].map(publisher).into(), ..Observed::default() };
        (microservice("customers", spec), observed)
    }

    #[test]
    fn an_inbox_is_a_contract_and_a_pod() {
        let (object, observed) = customers();
        let owner = Owner::of(&object, super::super::OWNER_KIND);
        let children = children(&object, &owner, &observed, &settings_with_broker()).unwrap();
        let plan = crate::controllers::resources::plan::Plan { children, ..Default::default() };
        insta::assert_snapshot!(fixtures::yaml(&plan));
    }

    #[test]
    fn who_does_not_publish_yet_is_left_out_and_said() {
        let (object, mut observed) = customers();
        observed.publishers.remove("orders");
        let settings = settings_with_broker();
        let consumptions = &object.spec.consumes;
        let missing = published(&consumptions[0], &observed, &settings).unwrap_err();
        assert_eq!(missing.reason, Reason::MicroserviceNotFound);
        assert!(published(&consumptions[1], &observed, &settings).is_ok());
        let owner = Owner::of(&object, super::super::OWNER_KIND);
        let contract = contract(&object, &owner, streams(&object, &observed, &settings).0).unwrap();
        assert_eq!(contract.subscriptions.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(), ["stock"]);
        observed.publishers.insert("orders".to_owned(), Published::default());
        let missing = published(&consumptions[0], &observed, &settings).unwrap_err();
        assert_eq!(missing.reason, Reason::OutboxRelayNotFound);
        let raw = relay("orders", "{microservice: orders, format: Raw, sink: {nats: {}}}");
        observed.publishers.insert("orders".to_owned(), Published { relays: vec![raw], kept_relay: None });
        assert_eq!(published(&consumptions[0], &observed, &settings).unwrap_err().reason, Reason::NoEventType);
    }

    /// The contract of the inbox in a plan.
    fn written(object: &Microservice, observed: &Observed) -> Inbox {
        let owner = Owner::of(object, super::super::OWNER_KIND);
        let children = children(object, &owner, observed, &settings_with_broker()).unwrap();
        let Child::ConfigMap(config_map) = &children[0] else { panic!("the contract comes first") };
        let text = &config_map.data.as_ref().unwrap()[CONTRACT_FILE];
        Inbox::from_yaml(text, std::path::Path::new(CONTRACT_FILE)).unwrap()
    }

    #[test]
    fn what_a_rejected_or_unreadable_relay_publishes_is_consumed_as_before() {
        let (object, mut observed) = customers();
        let own = "{microservice: orders, sink: {nats: {servers: ['nats://n:4222'], secret: gateway}}}";
        observed.publishers.get_mut("orders").unwrap().relays = vec![relay("orders", own)];
        let before = written(&object, &observed);
        observed.inbox_contract = Some(Box::new(before.clone()));
        let unreadable = Published { relays: Vec::new(), kept_relay: Some("orders".to_owned()) };
        let stolen = "{microservice: orders, sink: {nats: {servers: ['nats://n:4222'], secret: customers-db-admin}}}";
        let rejected = Published { relays: vec![relay("orders", stolen)], kept_relay: None };
        for (publisher, reason) in [(unreadable, Reason::OutboxRelayMalformed), (rejected, Reason::NotItsOwn)] {
            observed.publishers.insert("orders".to_owned(), publisher);
            assert_eq!(written(&object, &observed), before);
            let wanted = wanted(&object, &observed, &settings_with_broker());
            assert_eq!(wanted.missing.unwrap().reason, reason, "and that is said");
        }
        let plan = plan(&object, &observed, &settings_with_broker()).unwrap();
        let pod = fixtures::find(&plan, "Deployment/customers-inbox").to_string();
        assert!(pod.contains("gateway") && !pod.contains("customers-db-admin"), "{pod}");

        observed.publishers.remove("orders");
        observed.unreadable = ["orders".to_owned()].into();
        assert_eq!(written(&object, &observed), before);
        let missing = wanted(&object, &observed, &settings_with_broker()).missing.unwrap();
        assert_eq!(missing.reason, Reason::MicroserviceMalformed);
        observed.unreadable.clear();
        assert_eq!(written(&object, &observed).subscriptions.len(), 1, "one that is deleted publishes nothing");
    }

    #[test]
    fn a_new_contract_waits_for_the_set_up_as_the_new_pods_do() {
        let (mut object, mut observed) = customers();
        let before = written(&object, &observed);
        object.spec.consumes[0].types = vec!["OrderCreated".to_owned(), "OrderCancelled".to_owned()];
        assert_ne!(written(&object, &observed), before);
        observed.inbox_contract = Some(Box::new(before.clone()));
        observed.inbox_waits = true;
        assert_eq!(written(&object, &observed), before);
        let version = wanted(&object, &observed, &settings_with_broker()).version.unwrap();
        assert_eq!(version, before.version, "which the inbox has read");
    }

    #[test]
    fn where_pods_are_isolated_the_inbox_reaches_the_service() {
        let (object, mut observed) = customers();
        let policy = |observed: &Observed| {
            let plan = plan(&object, observed, &settings_with_broker()).unwrap();
            plan.children.into_iter().find_map(|child| match child {
                Child::NetworkPolicy(policy) if policy.name_any() == "customers" => Some(policy),
                _ => None,
            })
        };
        assert_eq!(policy(&observed), None, "everything is open");
        observed.isolated = true;
        let rules = policy(&observed).unwrap().spec.unwrap().ingress.unwrap();
        let text = serde_json::to_string(&rules).unwrap();
        assert!(text.contains("8080") && text.contains("inbox"), "{text}");
    }

    #[test]
    fn without_a_broker_nothing_is_consumed_and_the_service_runs() {
        let (object, observed) = customers();
        let object = Arc::new(object);
        let missing = published(&object.spec.consumes[0], &observed, &settings()).unwrap_err();
        assert_eq!(missing.reason, Reason::NoBroker);
        assert!(plan(&object, &observed, &settings()).is_ok());
    }
}
