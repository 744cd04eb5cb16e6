//! The sample `customers-and-orders` as processes, without Kubernetes: both services, their databases and relays, the broker
//! and the orchestrator, by the contracts that the sample's manifests amount to.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use async_nats::jetstream::consumer::pull;
use axum::http::StatusCode;
use futures::StreamExt;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};
use tempfile::TempDir;
use weft::{
    api::v1alpha1::{Microservice, OutboxRelay, RelayMode, Saga},
    contract::{
        Contract,
        orchestrator::Start,
        relay::{Format, Mode, NatsSink, Relay, Sink},
    },
    controllers::{
        kinds::saga,
        resources::settings::{self, Settings},
        runtime::driver::Kind,
    },
    domain::saga::definition::{Call, Definition},
    nats::accounts::{Access, RELAY_INBOX},
};

use crate::{
    broker_accounts::Broker,
    database_example::Service,
    relay_harness::{RelayProcess, run_relay},
    saga_world::{Running, World},
    servers,
    settings::settings,
};

/// All objects of one kind in the sample.
fn sample<T: DeserializeOwned>(kind: &str) -> Vec<T> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/samples/customers-and-orders");
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        for document in serde_yaml::Deserializer::from_str(&fs::read_to_string(entry.unwrap().path()).unwrap()) {
            let mut document = Value::deserialize(document).unwrap();
            if document["kind"] == kind {
                document["metadata"]["namespace"] = "shop".into();
                found.push(serde_json::from_value(document).unwrap());
            }
        }
    }
    found
}

/// What the operator makes of the saga; its calls go to `ports`.
fn definition(broker: &Broker, ports: &BTreeMap<&str, u16>) -> (Definition, saga::Start) {
    let installed = settings::Broker { url: broker.server.url(), accounts: broker.accounts.clone() };
    let settings = Settings { broker: Some(installed), ..settings() };
    let services = sample::<Microservice>("Microservice").into_iter();
    let observed = saga::Observed {
        services: services.map(|service| (service.metadata.name.clone().unwrap(), Arc::new(service))).collect(),
        relays: sample::<OutboxRelay>("OutboxRelay")
            .into_iter()
            .filter(|relay| relay.spec.microservice == "orders")
            .map(Arc::new)
            .collect(),
        ..saga::Observed::default()
    };
    let object = sample::<Saga>("Saga").remove(0);
    let defined = saga::Controller::plan(&object, &observed, &settings).unwrap();
    let saga::Defined::Orchestrated { mut definition, start } = defined else { panic!("the sample is orchestrated") };
    let here = |call: &mut Call| {
        let path = call.url.splitn(4, '/').nth(3).unwrap();
        call.url = format!("http://127.0.0.1:{}/{path}", ports[call.service.as_str()]);
    };
    definition.calls_mut().into_iter().for_each(here);
    (definition.seal(), *start.unwrap())
}

struct System {
    customers: Service,
    orders: Service,
    broker: Broker,
    relays: Vec<(PathBuf, RelayProcess)>,
    world: World,
    orchestrator: Running,
    _folder: TempDir,
}

impl System {
    async fn start() -> Self {
        let (customers, orders, world) = (Service::customers().await, Service::orders().await, World::new().await);
        let broker = Broker::start().await;
        let folder = tempfile::tempdir().unwrap();
        let sink = |access: Access| {
            let secret = folder.path().join(format!("{access:?}"));
            fs::create_dir_all(&secret).unwrap();
            fs::write(secret.join("nats.creds"), broker.accounts.credentials("shop", "test", access)).unwrap();
            let spec = sample::<OutboxRelay>("OutboxRelay").remove(0).spec.sink.nats.unwrap();
            NatsSink {
                servers: vec![broker.server.url()],
                secret_folder: Some(secret),
                inbox_prefix: (access == Access::Publish).then(|| RELAY_INBOX.to_owned()),
                stream: spec.stream,
                subject: spec.subject,
                max_age_seconds: 0,
            }
        };
        let mut relays = Vec::new();
        for relay in sample::<OutboxRelay>("OutboxRelay") {
            let name = relay.metadata.name.unwrap();
            let service = if relay.spec.microservice == "orders" { &orders } else { &customers };
            let contract = Relay {
                namespace: "shop".into(),
                service: relay.spec.microservice.clone(),
                mode: match relay.spec.mode {
                    RelayMode::LogTailing => Mode::LogTailing,
                    RelayMode::Polling => Mode::Polling,
                },
                source: service.database.login("relay"),
                sink: Sink::Nats(sink(Access::Publish)),
                format: Format::CloudEvents,
                keep_published_ms: 0,
                dead_letter: None,
                paused: false,
                version: String::new(),
                name: name.clone(),
            };
            let file = folder.path().join(format!("{name}.yaml"));
            fs::write(&file, contract.to_yaml().unwrap()).unwrap();
            relays.push((file.clone(), run_relay(&file)));
        }
        let ports = BTreeMap::from([("customers", customers.listen().await), ("orders", orders.listen().await)]);
        let (definition, start) = definition(&broker, &ports);
        let saga::Start { service, event_type, since, sink: _ } = start;
        let start = Start { saga: definition.name.clone(), service, event_type, since, from: sink(Access::Consume) };
        let orchestrator = world.run(world.contract(vec![definition], vec![start])).await;
        Self { customers, orders, broker, relays, world, orchestrator, _folder: folder }
    }

    async fn customer(&self, credit_limit: i64) -> String {
        let (_, added) =
            self.customers.post("/customers", &[], json!({"name": "Ann", "creditLimit": credit_limit})).await;
        added["id"].as_str().unwrap().to_owned()
    }

    /// Places an order, as often as it takes: the key makes it one.
    async fn place(&self, key: &str, customer: &str, total: i64) -> String {
        self.place_for(key, customer, total, None).await
    }

    async fn place_for(&self, key: &str, customer: &str, total: i64, article: Option<&str>) -> String {
        let mut id = None;
        servers::until("the order is taken", async || {
            let body = json!({"customerId": customer, "total": total, "article": article});
            let (status, placed) = self.orders.post("/orders", &[("idempotency-key", key)], body).await;
            id = (status == StatusCode::CREATED).then(|| placed["id"].as_str().unwrap().to_owned());
            id.is_some()
        })
        .await;
        id.unwrap()
    }

    async fn decided(&self, id: &str) -> Value {
        let mut order = Value::Null;
        servers::until("the order is decided", async || {
            let (status, answer) = self.orders.ask(&format!("/orders/{id}")).await;
            order = answer;
            status == StatusCode::OK && order["state"] != "PENDING"
        })
        .await;
        order
    }

    async fn reserved(&self, customer: &str) -> i64 {
        self.customers.get(&format!("/customers/{customer}")).await["reserved"].as_i64().unwrap()
    }

    /// `(id, type, data)` of the stream's events.
    async fn events(&self) -> Vec<(String, String, Value)> {
        let context = self.broker.member("shop", Access::Consume).await;
        let mut stream = context.get_stream("events").await.unwrap();
        let count = usize::try_from(stream.info().await.unwrap().state.messages).unwrap();
        let consumer = stream.create_consumer(pull::OrderedConfig::default()).await.unwrap();
        let messages = consumer.messages().await.unwrap().take(count).map(|message| {
            let message = message.unwrap();
            let header = |name: &str| message.headers.as_ref().unwrap().get(name).unwrap().to_string();
            (header("ce-id"), header("ce-type"), serde_json::from_slice(&message.payload).unwrap())
        });
        messages.collect().await
    }

    /// Kills one process of the system without a warning, and starts it again.
    fn crash_something(&mut self, random: &mut StdRng) {
        match random.random_range(0..7) {
            0 => self.broker.server.restart(),
            1 => {
                self.orchestrator.kill9();
                self.orchestrator.start();
            }
            n @ 2..=3 => {
                let (file, relay) = &mut self.relays[n - 2];
                relay.kill9();
                *relay = run_relay(file);
            }
            4 => self.customers.database.server.restart(),
            5 => self.orders.database.server.restart(),
            _ => self.world.database.server.restart(),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_are_approved_or_rejected_with_the_reason() {
    let system = System::start().await;
    let ann = system.customer(1_000).await;
    let approved = system.place_for("a", &ann, 700, Some("teapot")).await;
    assert_eq!(system.decided(&approved).await["state"], "APPROVED");
    let (poor, unknown) = (system.place("b", &ann, 700).await, system.place("c", "nobody", 1).await);
    let sold_out = system.place_for("d", &ann, 200, Some("unicorn")).await;
    for (order, reason) in [(&poor, "INSUFFICIENT_CREDIT"), (&unknown, "UNKNOWN_CUSTOMER"), (&sold_out, "OUT_OF_STOCK")]
    {
        let order = system.decided(order).await;
        assert_eq!((&order["state"], &order["reason"]), (&json!("REJECTED"), &json!(reason)));
    }
    assert_eq!(system.reserved(&ann).await, 700);
    system.orchestrator.until_counts("create-order", &[("completed", 1), ("compensated", 3), ("running", 0)]).await;
    let expected =
        [("CreditReleased", 1), ("CreditReserved", 2), ("OrderApproved", 1), ("OrderCreated", 4), ("OrderRejected", 3)];
    servers::until("all events are in the stream", async || {
        let mut counts = BTreeMap::new();
        for (_, kind, _) in system.events().await {
            *counts.entry(kind).or_insert(0) += 1;
        }
        counts.iter().map(|(kind, &count)| (kind.as_str(), count)).eq(expected)
    })
    .await;
}

/// `WEFT_TEST_SEED` repeats a failing run's choices.
#[tokio::test(flavor = "multi_thread")]
async fn orders_and_credit_agree_whatever_is_killed() {
    let seed = std::env::var("WEFT_TEST_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("WEFT_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let mut system = System::start().await;
    let mut customers = Vec::new();
    for limit in [500, 5_000, 50_000] {
        customers.push((system.customer(limit).await, limit));
    }
    customers.push(("nobody".to_owned(), 0));
    let mut placed = Vec::new();
    for n in 0..60 {
        let (customer, _) = customers[random.random_range(0..customers.len())].clone();
        let total = random.random_range(1..=400);
        placed.push((system.place(&n.to_string(), &customer, total).await, customer, total));
        if n % 6 == 5 {
            system.crash_something(&mut random);
        }
    }
    let mut approved: BTreeMap<String, i64> = BTreeMap::new();
    for (order, customer, total) in &placed {
        if system.decided(order).await["state"] == "APPROVED" {
            *approved.entry(customer.clone()).or_default() += total;
        }
    }
    assert!(!approved.is_empty() && !approved.contains_key("nobody"), "{approved:?}");
    servers::until("all sagas have ended", async || {
        let status = system.orchestrator.status().await;
        let counts = &status["sagas"]["create-order"];
        let ended = counts["completed"].as_u64().zip(counts["compensated"].as_u64());
        ended.is_some_and(|(completed, compensated)| completed + compensated == 60)
    })
    .await;
    for (customer, limit) in customers.iter().filter(|(customer, _)| customer != "nobody") {
        let reserved = system.reserved(customer).await;
        assert_eq!(
            reserved,
            approved.get(customer).copied().unwrap_or_default(),
            "credit is kept for approved orders only"
        );
        assert!(reserved <= *limit);
    }
    // every order has told what became of it, once: duplicates of an event have its id
    let expected: BTreeSet<_> = placed.iter().map(|(order, ..)| order.clone()).collect();
    servers::until("every order's end is in the stream", async || {
        let events = system.events().await.into_iter();
        let ends: BTreeSet<_> = events
            .filter(|(_, kind, _)| ["OrderApproved", "OrderRejected"].contains(&kind.as_str()))
            .map(|(id, _, data)| (id, data["orderId"].as_str().unwrap().to_owned()))
            .collect();
        let orders: BTreeSet<_> = ends.iter().map(|(_, order)| order.clone()).collect();
        assert_eq!(orders.len(), ends.len(), "an order ended twice");
        orders == expected
    })
    .await;
}
