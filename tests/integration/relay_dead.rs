//! Dead letters: events that were given up, and what a person does about them by `weft relay`.

use std::process::Command;

use axum::{Router, body::Bytes, http::StatusCode, routing::post};
use serde_json::Value;
use tokio::net::TcpListener;
use weft::contract::{
    problem::ProblemReason,
    relay::{DeadLetter, HttpSink, Mode, Sink},
    status::RelayStatus,
};

use crate::relay_harness::Setting;

/// An endpoint that refuses events with `"bad"` in them, until it is set to accept all; and what it has accepted, in its order.
#[derive(Clone, Debug, Default)]
struct Endpoint(std::sync::Arc<std::sync::Mutex<(Vec<u64>, bool)>>);

impl Endpoint {
    async fn start(&self) -> Sink {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/{{aggregate_id}}", listener.local_addr().unwrap());
        let own = self.clone();
        let receive = async move |body: Bytes| {
            let event: Value = serde_json::from_slice(&body).unwrap();
            let mut own = own.0.lock().unwrap();
            if event["bad"] == true && !own.1 {
                return StatusCode::UNPROCESSABLE_ENTITY;
            }
            own.0.push(event["n"].as_u64().unwrap());
            StatusCode::ACCEPTED
        };
        let router = Router::new().route("/{aggregate}", post(receive));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Sink::Http(HttpSink { url, batch: None, secret_folder: None })
    }

    fn accept_all(&self) {
        self.0.lock().unwrap().1 = true;
    }

    fn accepted(&self) -> Vec<u64> {
        self.0.lock().unwrap().0.clone()
    }
}

async fn setting(mode: Mode, max_attempts: Option<u32>) -> (Setting, Endpoint) {
    let endpoint = Endpoint::default();
    let mut setting = Setting::new(mode).await;
    setting.contract.sink = endpoint.start().await;
    setting.contract.dead_letter = max_attempts.map(|max_attempts| DeadLetter { max_attempts });
    setting.write_contract();
    (setting, endpoint)
}

async fn insert(setting: &Setting, aggregate: &str, number: u64, bad: bool) -> String {
    let insert = format!(
        "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         values ('order', '{aggregate}', 'Placed', '{{\"n\": {number}, \"bad\": {bad}}}') returning id"
    );
    setting.database.app().await.query_one(&insert, &[]).await.unwrap().get(0)
}

/// What `weft relay ARGUMENTS` prints; an error is its standard error.
fn weft(setting: &Setting, arguments: &[&str]) -> Result<String, String> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_weft"));
    command.arg("relay").args(arguments).arg("--config").arg(setting.contract_file());
    let output = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn listed(setting: &Setting, state: &str) -> Vec<Value> {
    serde_json::from_str(&weft(setting, &["list", "--state", state, "-o", "json"]).unwrap()).unwrap()
}

fn dead(status: &RelayStatus, events: u64) -> bool {
    let said = status.problems.iter().any(|problem| problem.reason == ProblemReason::DeadLetters);
    status.dead_letters == events && said == (events > 0) && status.ready
}

#[tokio::test]
async fn an_event_that_is_refused_too_often_is_given_up_and_those_behind_it_go_on() {
    for (mode, max_attempts) in [(Mode::LogTailing, 2), (Mode::Polling, 1)] {
        let (setting, endpoint) = setting(mode, Some(max_attempts)).await;
        let relay = setting.start_relay();
        relay.until("leading", |status| status.ready && status.leading).await;
        let bad = insert(&setting, "a", 1, true).await;
        for number in 2..=4 {
            insert(&setting, "a", number, false).await;
        }
        let status =
            relay.until("given up", |status| dead(status, 1) && status.published == 3 && status.held == 0).await;
        assert_eq!(endpoint.accepted(), [2, 3, 4], "{mode:?}");
        let message = &status.problems[0].message;
        assert!(
            message.contains(&bad) && message.contains("HTTP 422") && message.contains("weft relay retry"),
            "{message}"
        );
        let [letter] = &listed(&setting, "dead")[..] else { panic!("one dead letter") };
        assert_eq!((&letter["id"], &letter["attempts"]), (&bad.clone().into(), &max_attempts.into()));
        // it is published again, behind those that went on meanwhile
        endpoint.accept_all();
        assert_eq!(weft(&setting, &["retry", &bad]).unwrap(), "1 event is to be published again\n");
        setting.drained().await;
        relay.until("none is dead", |status| dead(status, 0) && status.published == 4).await;
        assert_eq!(endpoint.accepted(), [2, 3, 4, 1], "{mode:?}");
        insert(&setting, "a", 5, false).await;
        relay.until("the aggregate goes on", |status| status.published == 5).await;
    }
}

#[tokio::test]
async fn a_person_lists_shows_skips_and_purges() {
    let (setting, endpoint) = setting(Mode::LogTailing, None).await;
    let relay = setting.start_relay();
    relay.until("leading", |status| status.ready && status.leading).await;
    assert_eq!(
        weft(&setting, &["list"]).unwrap(),
        "no event is refused, waits behind one that is, or is a dead letter\n"
    );
    let bad = insert(&setting, "a", 1, true).await;
    let behind = insert(&setting, "a", 2, false).await;
    relay.until("held", |status| status.held == 2).await;
    let table = weft(&setting, &["list"]).unwrap();
    let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        (rows[1][0], rows[1][1], rows[1][2], rows[1][3]),
        (bad.as_str(), "Refused", "order/a", "Placed"),
        "{table}"
    );
    assert_eq!((rows[2][0], rows[2][1]), (behind.as_str(), "Waiting"), "{table}");
    assert!(!table.contains("bad"), "no payload in a list: {table}");
    let shown = weft(&setting, &["show", &bad]).unwrap();
    assert!(shown.contains("HTTP 422") && shown.contains("\"bad\": true"), "{shown}");
    assert_eq!(weft(&setting, &["skip", &bad]).unwrap(), "1 event is a dead letter now\n");
    relay.until("what waited goes on", |status| dead(status, 1) && status.held == 0 && status.published == 1).await;
    assert_eq!(endpoint.accepted(), [2]);
    let wrong = weft(&setting, &["purge", &behind]).unwrap_err();
    assert_eq!(wrong, "weft: there is no such event: `weft relay list` shows those that there are\n");
    assert_eq!(weft(&setting, &["purge", "--all", "-o", "json"]).unwrap(), "{\n  \"events\": 1\n}\n");
    relay.until("none is dead", |status| dead(status, 0)).await;
    assert_eq!(weft(&setting, &["purge", "--all"]).unwrap(), "0 events are deleted\n");
    let usage = weft(&setting, &["retry"]).unwrap_err();
    assert!(usage.contains("--all") && usage.lines().count() == 1, "{usage}");
}

/// As many tables as take turns have to pass before an event is gone.
const TURNS: usize = 8;

#[tokio::test]
async fn what_is_published_is_kept_as_long_as_it_should_be_and_can_be_published_again() {
    for mode in [Mode::LogTailing, Mode::Polling] {
        let (mut setting, endpoint) = setting(mode, None).await;
        setting.contract.keep_published_ms = 3_600_000;
        setting.write_contract();
        let mut relay = setting.start_relay();
        let first = insert(&setting, "a", 1, false).await;
        insert(&setting, "a", 2, false).await;
        setting.drained().await;
        relay.until("published", |status| status.published == 2 && status.pending == 0).await;
        let superuser = setting.database.superuser().await;
        let kept = async || {
            let row = superuser.query_one("select count(*) from weft.relay_published", &[]).await.unwrap();
            row.get::<_, i64>(0)
        };
        assert_eq!(kept().await, 2, "{mode:?}");
        assert_eq!(
            weft(&setting, &["replay", "--from", "2000-01-01T00:00:00Z", "--dry-run"]).unwrap(),
            "2 events would be published again\n"
        );
        assert_eq!(weft(&setting, &["replay", &first]).unwrap(), "1 event is to be published again\n");
        setting.drained().await;
        relay.until("published again", |status| status.published == 3).await;
        assert_eq!(endpoint.accepted(), [1, 2, 1], "{mode:?}");
        // once, though it is kept twice
        assert_eq!(
            weft(&setting, &["replay", "--from", "2000-01-01T00:00:00Z", "--type", "Placed"]).unwrap(),
            "2 events are to be published again\n"
        );
        setting.drained().await;
        relay.until("published again", |status| status.published == 5).await;
        assert!(weft(&setting, &["replay"]).unwrap_err().contains("--from"));
        // the tables take their turns; the one whose turn it is was emptied
        for turn in 0..TURNS {
            assert!(kept().await > 0, "{mode:?}: turn {turn}");
            superuser.batch_execute("update weft.relay_turn set since = '-infinity'").await.unwrap();
            relay.kill9();
            relay = setting.start_relay();
            crate::database::until(&superuser, "select since > '-infinity' from weft.relay_turn").await;
        }
        assert_eq!(kept().await, 0, "{mode:?}");
        insert(&setting, "a", 6, false).await;
        relay.until("published", |status| status.published == 6).await;
        setting.drained().await;
        assert_eq!(kept().await, 1, "{mode:?}");
        setting.contract.keep_published_ms = 0;
        setting.write_contract();
        crate::database::until(&superuser, "select not exists (select from weft.relay_published)").await;
    }
}
