//! Choreographed sagas: the tracker reads a real NATS JetStream and stores in a real PostgreSQL what it saw.

use std::collections::BTreeMap;

use async_nats::{HeaderMap, jetstream};
use futures::{StreamExt, stream};
use jiff::{SignedDuration, Timestamp};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use serde_json::{Value, json};
use weft::{
    api::v1alpha1::Saga,
    contract::orchestrator::{Choreography, Source},
    domain::choreography::definition::{Definition, Kind, Reaction},
};

use crate::{
    saga_starts::published,
    saga_world::{Running, World},
    servers::{self, Nats},
};

const SAGA: &str = "create-order";

fn reaction(on: (&str, &str), service: &str, emits: &[&str], within_ms: u64) -> Reaction {
    Reaction {
        to: Kind::new(on.0, on.1),
        and: Vec::new(),
        service: service.to_owned(),
        emits: emits.iter().map(|&event| event.to_owned()).collect(),
        within_ms,
    }
}

fn definition(within_ms: u64) -> Definition {
    Definition {
        name: SAGA.to_owned(),
        version: String::new(),
        start: Kind::new("orders", "OrderCreated"),
        reactions: vec![
            reaction(("orders", "OrderCreated"), "customers", &["CreditReserved", "CreditLimitExceeded"], within_ms),
            reaction(("customers", "CreditReserved"), "orders", &["OrderApproved"], within_ms),
            reaction(("customers", "CreditLimitExceeded"), "orders", &["OrderRejected"], within_ms),
        ],
        completes: vec![Kind::new("orders", "OrderApproved")],
        compensates: vec![Kind::new("orders", "OrderRejected")],
    }
    .seal()
}

fn choreography(nats: &Nats, within_ms: u64) -> Choreography {
    let source = |service: &str| Source { service: service.to_owned(), from: published(nats) };
    Choreography {
        definition: definition(within_ms),
        since: None,
        sources: vec![source("customers"), source("orders")],
    }
}

#[derive(Clone, Debug)]
struct Event {
    service: &'static str,
    kind: &'static str,
    id: String,
    correlation: Option<String>,
    cause: Option<String>,
    at: Timestamp,
}

impl Event {
    fn start(order: &str) -> Self {
        let id = format!("{order}-created");
        Self { service: "orders", kind: "OrderCreated", id, correlation: None, cause: None, at: Timestamp::now() }
    }

    /// A reaction to `self`, so many milliseconds later.
    fn then(&self, service: &'static str, kind: &'static str, milliseconds: i64) -> Self {
        let correlation = self.correlation.clone().or_else(|| Some(self.id.clone()));
        Self {
            service,
            kind,
            id: format!("{}-{kind}", correlation.as_deref().unwrap()),
            correlation,
            cause: Some(self.id.clone()),
            at: self.at + SignedDuration::from_millis(milliseconds),
        }
    }

    async fn publish(&self, context: &jetstream::Context) {
        let mut headers = HeaderMap::new();
        headers.insert("ce-specversion", "1.0");
        headers.insert("ce-source", format!("/shop/{}", self.service));
        headers.insert("ce-type", self.kind);
        headers.insert("ce-id", self.id.as_str());
        headers.insert("ce-time", self.at.to_string());
        if let Some(correlation) = &self.correlation {
            headers.insert("ce-correlationid", correlation.as_str());
        }
        if let Some(cause) = &self.cause {
            headers.insert("ce-causationid", cause.as_str());
        }
        let subject = format!("events.shop.{}.order.{}", self.service, self.kind);
        // the broker may be away for a moment
        for _ in 0..200 {
            if let Ok(sent) = context.publish_with_headers(subject.clone(), headers.clone(), "{}".into()).await
                && sent.await.is_ok()
            {
                return;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        panic!("{self:?} could not be published");
    }
}

async fn broker(nats: &Nats) -> (jetstream::Context, jetstream::stream::Stream) {
    let mut context = jetstream::new(async_nats::connect(nats.url()).await.unwrap());
    context.set_timeout(std::time::Duration::from_secs(1));
    let config =
        jetstream::stream::Config { name: "events".into(), subjects: vec!["events.>".into()], ..Default::default() };
    let stream = context.create_stream(config).await.unwrap();
    (context, stream)
}

fn lines(detail: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let line = |t: &Value| {
        let parts = [&t["step"], &t["operation"], &t["outcome"], &t["message"]].map(text);
        parts.join(" ").trim().to_owned()
    };
    detail["history"].as_array().unwrap().iter().map(line).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_is_seen_from_its_start_to_its_end() {
    let (world, nats) = (World::new().await, Nats::start());
    let (context, _) = broker(&nats).await;
    let mut contract = world.contract(Vec::new(), Vec::new());
    contract.choreographies = vec![choreography(&nats, 60_000)];
    let orchestrator = world.run(contract).await;

    let created = Event::start("o-1");
    let refused = created.then("customers", "CreditLimitExceeded", 10);
    let rejected = refused.then("orders", "OrderRejected", 10);
    let checked = created.then("customers", "CreditChecked", 5);
    for event in [&created, &checked, &refused] {
        event.publish(&context).await;
    }
    orchestrator.until_counts(SAGA, &[("running", 1), ("compensating", 1)]).await;
    let list = orchestrator.get(&format!("/sagas/{SAGA}?state=compensating")).await.1;
    assert_eq!(list["items"][0]["owed"][0]["service"], "orders", "{list}");
    assert_eq!(list["items"][0]["owed"][0]["events"], json!(["OrderRejected"]));
    let elsewhere = Event { service: "customers", kind: "CustomerMoved", ..Event::start("o-1") };
    elsewhere.publish(&context).await;
    rejected.publish(&context).await;
    orchestrator.until_counts(SAGA, &[("running", 0), ("compensated", 1), ("compensating", 0)]).await;

    // by its id, and by its correlation
    let detail = orchestrator.get(&format!("/sagas/{SAGA}/o-1-created")).await.1;
    assert_eq!(detail["state"], "Compensated");
    let expected = [
        "orders OrderCreated started",
        "customers CreditChecked undeclared in reaction to OrderCreated",
        "customers CreditLimitExceeded in time in reaction to OrderCreated",
        "orders OrderRejected in time in reaction to CreditLimitExceeded",
    ];
    assert_eq!(lines(&detail), expected);
    let id = detail["id"].as_str().unwrap();
    assert_eq!(orchestrator.get(&format!("/sagas/{SAGA}/{id}")).await.1, detail);
    let shown = orchestrator.cli(&["show", SAGA, "o-1-created"]).await;
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("CreditChecked         undeclared   in reaction to OrderCreated"), "{shown}");
    let listed = String::from_utf8(orchestrator.cli(&["list", SAGA]).await.stdout).unwrap();
    assert!(listed.contains("Compensated"), "{listed}");

    let findings = orchestrator.status().await["sagas"][SAGA]["findings"].clone();
    let checked = json!({"finding": "undeclared", "event": {"service": "customers", "event": "CreditChecked"},
        "cause": {"service": "orders", "event": "OrderCreated"}, "count": 1});
    assert_eq!(findings, json!([checked]));
    assert!(
        orchestrator.metrics().await.contains("weft_saga_findings{saga=\"create-order\",finding=\"undeclared\"} 1")
    );
    let discovered = orchestrator.cli(&["discover", "--nats-url", &nats.url(), "--namespace", "shop"]).await;
    let text = String::from_utf8(discovered.stdout).unwrap();
    let manifest: Saga = serde_yaml::from_str(&text).unwrap();
    assert_eq!(manifest.spec.reactions[0].emits, ["CreditChecked", "CreditLimitExceeded"], "{text}");
    assert!(text.contains("startOn: {service: orders, event: OrderCreated}   # 1 times"), "{text}");
    assert_eq!(orchestrator.get(&format!("/sagas/{SAGA}/nothing")).await.0, 404);
    let (status, refusal) = orchestrator.start_saga(SAGA, &json!({}), "", None).await;
    assert_eq!((status, refusal["title"].as_str()), (409, Some("NotStartable")));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_that_waits_too_long_is_stuck_until_the_event_comes_or_a_person_skips_it() {
    let (world, nats) = (World::new().await, Nats::start());
    let (context, _) = broker(&nats).await;
    let mut contract = world.contract(Vec::new(), Vec::new());
    contract.choreographies = vec![choreography(&nats, 1_000)];
    let mut orchestrator = world.run(contract).await;
    let (late, never) = (Event::start("late"), Event::start("never"));
    late.publish(&context).await;
    never.publish(&context).await;
    orchestrator.until_counts(SAGA, &[("running", 2), ("stuck", 2)]).await;
    let status = async || orchestrator.status().await["sagas"][SAGA].clone();
    servers::until("the oldest are named", async || {
        status().await["stuckInstances"].as_array().is_some_and(|stuck| stuck.len() == 2)
    })
    .await;
    let since = late.at.strftime("%H:%M:%S UTC");
    let message = status().await["stuckInstances"][0]["message"].clone();
    let expected =
        format!("customers owes CreditReserved or CreditLimitExceeded to OrderCreated since {since}, within 1s");
    assert_eq!(message, expected);

    let reserved = late.then("customers", "CreditReserved", 3_500);
    reserved.publish(&context).await;
    reserved.then("orders", "OrderApproved", 1).publish(&context).await;
    orchestrator.until_counts(SAGA, &[("running", 1), ("stuck", 1), ("completed", 1)]).await;
    assert_eq!(
        lines(&orchestrator.get(&format!("/sagas/{SAGA}/late-created")).await.1)[1],
        "customers CreditReserved late in reaction to OrderCreated, 2.5 s too late"
    );
    // one that is started again knows it
    orchestrator.kill9();
    orchestrator.start();
    orchestrator.until_counts(SAGA, &[("running", 1), ("stuck", 1), ("completed", 1)]).await;
    let (code, refusal) = orchestrator.verb(SAGA, "never-created", "retry").await;
    assert_eq!((code, refusal["title"].as_str()), (409, Some("OnlyWatched")));
    let (code, view) = orchestrator.verb(SAGA, "never-created", "skip").await;
    assert_eq!((code, view["state"].as_str()), (200, Some("Completed")), "{view}");
    assert_eq!(orchestrator.verb(SAGA, "never-created", "skip").await.0, 409);
    orchestrator.until_counts(SAGA, &[("running", 0), ("stuck", 0), ("completed", 2)]).await;
}

/// What the services of 400 sagas emitted, and the counts that it amounts to.
fn load(random: &mut StdRng) -> (Vec<Event>, BTreeMap<&'static str, u64>) {
    let mut events = Vec::new();
    let mut counts: BTreeMap<_, u64> =
        ["running", "completed", "compensated", "undeclared", "repeated", "late"].map(|name| (name, 0)).into();
    let mut count = |name| *counts.get_mut(name).unwrap() += 1;
    for number in 0..400 {
        let created = Event::start(&format!("o-{number}"));
        let is_refused = random.random_bool(0.3);
        let is_late = random.random_bool(0.1);
        let (credit, end) =
            if is_refused { ("CreditLimitExceeded", "OrderRejected") } else { ("CreditReserved", "OrderApproved") };
        let answered = created.then("customers", credit, if is_late { 700_000 } else { 10 });
        let ended = answered.then("orders", end, 10);
        if random.random_bool(0.1) {
            events.push(created.then("customers", "CreditChecked", 3));
            count("undeclared");
        }
        if random.random_bool(0.1) {
            let mut again = answered.clone();
            (again.id, again.at) = (format!("{}-again", again.id), again.at + SignedDuration::from_millis(3));
            events.push(again);
            count("repeated");
        }
        events.push(created);
        events.push(answered);
        if is_late {
            count("late");
        }
        if random.random_bool(0.1) {
            count("running");
        } else {
            events.push(ended);
            count(if is_refused { "compensated" } else { "completed" });
        }
    }
    let duplicates: Vec<_> = events.iter().filter(|_| random.random_bool(0.3)).cloned().collect();
    events.extend(duplicates);
    events.shuffle(random);
    (events, counts)
}

/// How often the status says that something was undeclared, repeated and late.
async fn findings(orchestrator: &Running) -> [u64; 3] {
    let status = orchestrator.status().await;
    let mut found: BTreeMap<String, u64> = BTreeMap::new();
    for finding in status["sagas"][SAGA]["findings"].as_array().cloned().unwrap_or_default() {
        *found.entry(finding["finding"].as_str().unwrap().to_owned()).or_default() +=
            finding["count"].as_u64().unwrap();
    }
    ["undeclared", "repeated", "late"].map(|name| found.get(name).copied().unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_doubled_whatever_is_killed() {
    let seed: u64 = std::env::var("WEFT_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(12);
    let mut random = StdRng::seed_from_u64(seed);
    let (world, mut nats) = (World::new().await, Nats::start());
    let (context, _) = broker(&nats).await;
    let mut contract = world.contract(Vec::new(), Vec::new());
    contract.choreographies = vec![choreography(&nats, 600_000)];
    let mut orchestrator = world.run(contract).await;
    let (events, expected) = load(&mut random);
    let quarter = events.len() / 4;
    for (round, part) in events.chunks(quarter + 1).enumerate() {
        let publishing = stream::iter(part).for_each_concurrent(16, |event| event.publish(&context));
        let faults = async {
            let pause = std::time::Duration::from_millis(random.random_range(10..200));
            tokio::time::sleep(pause).await;
            if round % 2 == 0 {
                orchestrator.kill9();
                orchestrator.start();
            } else {
                nats.restart();
            }
        };
        tokio::join!(publishing, faults);
    }
    let count = |name: &str| expected[name];
    let ended =
        [("completed", count("completed")), ("compensated", count("compensated")), ("running", count("running"))];
    orchestrator.until_counts(SAGA, &ended).await;
    let wanted = ["undeclared", "repeated", "late"].map(count);
    servers::until(&format!("findings are {wanted:?} (seed {seed})"), async || findings(&orchestrator).await == wanted)
        .await;

    // the database says the same, and stays so when everything is delivered once more
    orchestrator.terminate().await;
    let database = world.database.superuser().await;
    database.execute("update weft.saga_start set next = 1", &[]).await.unwrap();
    let names: Vec<_> = {
        let stream = context.get_stream("events").await.unwrap();
        stream.consumer_names().map(Result::unwrap).collect().await
    };
    for name in names {
        context.get_stream("events").await.unwrap().delete_consumer(&name).await.unwrap();
    }
    orchestrator.start();
    servers::until("everything was read again", async || {
        let stream = context.get_stream("events").await.unwrap();
        let consumers: Vec<_> = stream.consumers().map(Result::unwrap).collect().await;
        let is_read = |info: &jetstream::consumer::Info| info.num_pending == 0 && info.num_ack_pending == 0;
        consumers.len() == 2 && consumers.iter().all(is_read)
    })
    .await;
    orchestrator.until_counts(SAGA, &ended).await;
    assert_eq!(findings(&orchestrator).await, wanted, "seed {seed}");
    let rows = database.query("select count(*), count(ended_at) from weft.choreography", &[]).await.unwrap();
    let counted: (i64, i64) = (rows[0].get(0), rows[0].get(1));
    assert_eq!(counted, (400, i64::try_from(400 - count("running")).unwrap()), "seed {seed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_saga_that_is_deleted_leaves_no_consumer_and_keeps_what_ended() {
    let (world, nats) = (World::new().await, Nats::start());
    let (context, stream) = broker(&nats).await;
    let mut contract = world.contract(vec![world.definition("order")], Vec::new());
    contract.choreographies = vec![choreography(&nats, 60_000)];
    let mut orchestrator = world.run(contract.clone()).await;
    let created = Event::start("o-1");
    let reserved = created.then("customers", "CreditReserved", 1);
    for event in [&created, &reserved, &reserved.then("orders", "OrderApproved", 1), &Event::start("o-2")] {
        event.publish(&context).await;
    }
    orchestrator.until_counts(SAGA, &[("completed", 1), ("running", 1)]).await;
    let mut without = contract.clone();
    without.choreographies.clear();
    orchestrator.rewrite(without);
    servers::until("its consumers are deleted", async || {
        stream.consumer_names().map(Result::unwrap).collect::<Vec<_>>().await.is_empty()
    })
    .await;
    orchestrator.until_counts(SAGA, &[("completed", 1), ("running", 0)]).await;
    // it is applied again, and goes on where it was
    Event::start("o-2").then("customers", "CreditReserved", 1).publish(&context).await;
    orchestrator.rewrite(contract);
    orchestrator.until_counts(SAGA, &[("completed", 1), ("running", 1)]).await;
    servers::until("what came meanwhile is seen", async || {
        let detail = orchestrator.get(&format!("/sagas/{SAGA}/o-2-created")).await.1;
        detail["owed"][0]["service"] == "orders"
    })
    .await;
}
