//! `weft inbox` as a separate process between a real broker and a service with a real database, which records each effect.

#![allow(dead_code, reason = "each test uses what it needs")]

use std::{
    collections::BTreeMap,
    fs,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::post,
};
use deadpool_postgres::{Manager, Pool};
use rand::{Rng, SeedableRng, rngs::StdRng};
use tempfile::TempDir;
use tokio_postgres::NoTls;
use weft::contract::{
    Contract,
    inbox::{FunctionTarget, HttpTarget, Inbox, Publisher, Subscription, Target},
    relay::{Mode, Sink},
    status::{InboxStatus, SubscriptionStatus},
};

use crate::{
    database::{APP_PASSWORD, DATABASE, Database},
    relay_harness::Setting,
    servers::{self, Program},
};

/// The table of effects, and a function that does the same as the handler.
const EFFECTS: &str = "
    create table effects (seq bigint generated always as identity, path text, aggregate text, number bigint, id text);
    -- aggregates whose events fail
    create table failing (aggregate text primary key);
    create function on_event(event jsonb) returns void language plpgsql as $$
    begin
        if exists (select from failing where aggregate = event ->> 'subject') then
            raise exception 'it fails';
        end if;
        insert into effects (path, aggregate, number, id)
        values ('function', event ->> 'subject', (event -> 'data' ->> 'n')::bigint, event ->> 'id');
    end $$;
    create function on_order(event jsonb) returns void language plpgsql as $$
    begin
        if event -> 'data' ->> 'refuse' is not null then
            raise exception 'no such customer' using errcode = 'WEFTR';
        end if;
        insert into outbox (aggregate_type, aggregate_id, type, payload) values ('customer', '1', 'Counted', '{}');
    end $$;";

/// What the service does with a request, by chance, and what a test wants of it.
#[derive(Debug)]
pub struct Behaviour {
    random: Mutex<StdRng>,
    /// Of a hundred requests so many fail before they have an effect, and so many after it.
    pub failures: AtomicUsize,
    /// By the event's subject, or by path: what is answered instead of handling it.
    pub answers: Mutex<BTreeMap<String, u16>>,
    /// Requests that were answered, by path.
    pub requests: Mutex<BTreeMap<String, usize>>,
    /// Headers of the last one.
    pub headers: Mutex<HeaderMap>,
    pub slow: AtomicBool,
}

#[derive(Clone, Debug)]
struct Service {
    pool: Pool,
    behaviour: Arc<Behaviour>,
}

async fn handle(
    State(service): State<Service>,
    Path(path): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, StatusCode> {
    let header = |name: &str| {
        headers
            .get(name)
            .map_or(String::new(), |value| weft::domain::event::decode(value.to_str().unwrap()).into_owned())
    };
    let behaviour = &service.behaviour;
    *behaviour.requests.lock().unwrap().entry(path.clone()).or_default() += 1;
    *behaviour.headers.lock().unwrap() = headers.clone();
    let answer = {
        let answers = behaviour.answers.lock().unwrap();
        answers.get(&path).or_else(|| answers.get(&header("ce-subject"))).copied()
    };
    if let Some(status) = answer {
        return Ok((StatusCode::from_u16(status).unwrap(), "as the test wants").into_response());
    }
    let chance = behaviour.random.lock().unwrap().random_range(0..100);
    let failures = behaviour.failures.load(Relaxed);
    if chance < failures {
        return Err(StatusCode::INTERNAL_SERVER_ERROR);
    }
    if behaviour.slow.load(Relaxed) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let number: serde_json::Value = serde_json::from_slice(&body).map_err(|_| StatusCode::BAD_REQUEST)?;
    let unavailable = |_| StatusCode::SERVICE_UNAVAILABLE;
    let mut client = service.pool.get().await.map_err(|_| StatusCode::SERVICE_UNAVAILABLE)?;
    let transaction = client.transaction().await.map_err(unavailable)?;
    let receive = "select weft.receive($1, $2, $3)";
    let new = transaction.query_one(receive, &[&path, &header("ce-source"), &header("ce-id")]).await;
    if new.map_err(unavailable)?.get(0) {
        let insert = "insert into effects (path, aggregate, number, id) values ($1, $2, $3, $4)";
        let (number, id) = (number["n"].as_i64(), header("ce-id"));
        transaction.execute(insert, &[&path, &header("ce-subject"), &number, &id]).await.map_err(unavailable)?;
    }
    transaction.commit().await.map_err(unavailable)?;
    if chance >= 100 - failures { Err(StatusCode::BAD_GATEWAY) } else { Ok(StatusCode::NO_CONTENT.into_response()) }
}

/// A publisher with its relay's broker, a consumer with its database, and the consumer's contract.
#[derive(Debug)]
pub struct World {
    pub publisher: Setting,
    pub database: Database,
    pub behaviour: Arc<Behaviour>,
    pub contract: Inbox,
    pub port: u16,
    folder: TempDir,
    server: tokio::task::JoinHandle<()>,
}

impl World {
    pub async fn new(seed: u64) -> Self {
        let publisher = Setting::new(Mode::Polling).await;
        let database = Database::empty().await;
        database.write_migration("001_effects.sql", EFFECTS);
        database.set_up_well();
        let behaviour = Arc::new(Behaviour {
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            failures: AtomicUsize::new(0),
            answers: Mutex::default(),
            requests: Mutex::default(),
            headers: Mutex::default(),
            slow: AtomicBool::new(false),
        });
        let url = database.server.url("app", &APP_PASSWORD.replace(' ', "%20"), DATABASE);
        let pool = Pool::builder(Manager::new(url.parse().unwrap(), NoTls)).max_size(16).build().unwrap();
        let service = Service { pool, behaviour: behaviour.clone() };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let router = Router::new().route("/{path}", post(handle)).with_state(service);
        let server = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        let contract = Inbox {
            version: String::new(),
            namespace: "shop".to_owned(),
            service: "customers".to_owned(),
            database: database.login("app"),
            subscriptions: Vec::new(),
        };
        Self { publisher, database, behaviour, contract, port, folder: tempfile::tempdir().unwrap(), server }
    }

    /// Adds a subscription to all events, delivered to `/NAME`.
    pub fn subscribe(&mut self, name: &str) -> &mut Subscription {
        let url = format!("http://127.0.0.1:{}/{name}", self.port);
        self.subscribe_to(name, Target::Http(HttpTarget { url, timeout_ms: 10_000 }))
    }

    /// Adds a subscription that calls a function.
    pub fn subscribe_function(&mut self, name: &str, function: &str) -> &mut Subscription {
        let (schema, function) = (None, function.to_owned());
        self.subscribe_to(name, Target::Function(FunctionTarget { schema, name: function }))
    }

    fn subscribe_to(&mut self, name: &str, target: Target) -> &mut Subscription {
        let Sink::Nats(stream) = self.publisher.contract.sink.clone() else { panic!("the harness publishes to NATS") };
        self.contract.subscriptions.push(Subscription {
            name: name.to_owned(),
            from: Publisher { namespace: "shop".to_owned(), service: "orders".to_owned() },
            types: Vec::new(),
            since: None,
            stream,
            target,
            max_attempts: 20,
        });
        self.contract.subscriptions.last_mut().unwrap()
    }

    pub fn write_contract(&self) -> std::path::PathBuf {
        let (new, path) = (self.folder.path().join("inbox.yaml.new"), self.folder.path().join("inbox.yaml"));
        fs::write(&new, self.contract.clone().seal().to_yaml().unwrap()).unwrap();
        fs::rename(new, &path).unwrap();
        path
    }

    pub fn start_inbox(&self) -> InboxProcess {
        run_inbox(&self.write_contract())
    }

    /// Writes events into the publisher's outbox: aggregate and payload.
    pub async fn publish(&self, events: &[(&str, &str)]) {
        let app = self.publisher.database.app().await;
        for (aggregate, payload) in events {
            let insert = "insert into weft.outbox (id, aggregate_type, aggregate_id, type, payload)
                values ($1 || '-' || ($2::text::jsonb ->> 'n'), 'order', $1, 'OrderChanged', $2::text::jsonb)";
            app.execute(insert, &[aggregate, payload]).await.unwrap();
        }
    }

    /// Events of these aggregates fail from now on, and those of all others do not.
    pub async fn fail(&self, aggregates: &[String]) {
        *self.behaviour.answers.lock().unwrap() = aggregates.iter().map(|aggregate| (aggregate.clone(), 500)).collect();
        let client = self.database.superuser().await;
        client.execute("delete from failing", &[]).await.unwrap();
        let insert = "insert into failing select unnest($1::text[])";
        client.execute(insert, &[&aggregates]).await.unwrap();
    }

    /// Of a path: the effects in their order, as aggregate and number.
    pub async fn effects(&self, path: &str) -> Vec<(String, u64)> {
        let client = self.database.superuser().await;
        let sql = "select aggregate, number from effects where path = $1 order by seq";
        let rows = client.query(sql, &[&path]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get::<_, i64>(1).unsigned_abs())).collect()
    }

    pub async fn until_effects(&self, path: &str, count: usize) -> Vec<(String, u64)> {
        let enough = async || self.effects(path).await.len() >= count;
        servers::within(Duration::from_mins(1), &format!("{count} effects of {path}"), enough).await;
        self.effects(path).await
    }

    /// Runs a command for people; its answer.
    pub fn dead(&self, arguments: &[&str]) -> Result<String, String> {
        let output = Command::new(env!("CARGO_BIN_EXE_weft"))
            .args(["inbox", "dead"])
            .args(arguments)
            .arg("--config")
            .arg(self.write_contract())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// A running `weft inbox`; killed when dropped.
pub type InboxProcess = Program<InboxStatus>;

fn run_inbox(contract: &std::path::Path) -> InboxProcess {
    Program::run("inbox", contract, Duration::from_secs(30))
}

pub fn of<'a>(status: &'a InboxStatus, subscription: &str) -> Option<&'a SubscriptionStatus> {
    status.subscriptions.get(subscription)
}

/// What is wrong with the effects of committed counters: lost, doubled, out of order in their aggregate.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct EffectVerdict {
    pub events: u64,
    pub lost: u64,
    pub doubled: u64,
    pub reordered: u64,
    pub phantoms: u64,
}

impl EffectVerdict {
    pub fn is_kept(&self) -> bool {
        (self.lost, self.doubled, self.reordered, self.phantoms) == (0, 0, 0, 0)
    }
}

/// Judges effects in their order against the committed counters (aggregate → the number of its last event).
pub fn check_effects(committed: &BTreeMap<String, u64>, effects: &[(String, u64)]) -> EffectVerdict {
    let mut verdict = EffectVerdict { events: committed.values().sum(), ..EffectVerdict::default() };
    let mut seen: BTreeMap<&str, Vec<u64>> = BTreeMap::new();
    for (aggregate, number) in effects {
        let of_aggregate = seen.entry(aggregate).or_default();
        if of_aggregate.contains(number) {
            verdict.doubled += 1;
        } else if of_aggregate.iter().any(|before| before > number) {
            verdict.reordered += 1;
        }
        of_aggregate.push(*number);
        verdict.phantoms += u64::from(committed.get(aggregate).is_none_or(|last| number > last));
    }
    for (aggregate, last) in committed {
        let effects = seen.get(aggregate.as_str());
        verdict.lost += (1..=*last).filter(|number| !effects.is_some_and(|seen| seen.contains(number))).count() as u64;
    }
    verdict
}

#[test]
fn the_checker_detects_each_way_to_break_the_promise() {
    let verdict = |last: u64, numbers: &[u64]| {
        let effects: Vec<_> = numbers.iter().map(|number| ("a".to_owned(), *number)).collect();
        check_effects(&BTreeMap::from([("a".to_owned(), last)]), &effects)
    };
    assert!(verdict(3, &[1, 2, 3]).is_kept());
    assert_eq!(verdict(3, &[1, 3]).lost, 1);
    assert_eq!(verdict(2, &[1, 1, 2]).doubled, 1);
    assert_eq!(verdict(2, &[2, 1]).reordered, 1);
    assert_eq!(verdict(1, &[1, 2]).phantoms, 1);
}
