//! The delivery contract of `weft::relay::sink`, held against a real server of each kind: every sink passes the same tests.

/// The tests that every sink passes, in the module of the broker: of one that may be killed, and of one that may be shared.
/// `$there`: whether the server can be started on this machine.
macro_rules! contract {
    ($own:ty, $shared:ty, $there:expr) => {
        #[tokio::test(flavor = "multi_thread")]
        async fn nothing_is_lost_or_reordered() {
            if $there {
                super::nothing_is_lost_or_reordered::<$own>().await;
            }
        }

        #[tokio::test]
        async fn a_refused_event_holds_up_nobody_else() {
            if $there {
                super::a_refused_event_holds_up_nobody_else::<$shared>().await;
            }
        }

        #[tokio::test]
        async fn one_aggregate_stays_in_order_when_one_of_its_events_is_refused() {
            if $there {
                super::one_aggregate_stays_in_order_when_one_of_its_events_is_refused::<$shared>().await;
            }
        }

        #[tokio::test]
        async fn a_message_is_what_was_written() {
            if $there {
                super::a_message_is_what_was_written::<$shared>().await;
            }
        }

        #[tokio::test]
        async fn credentials_are_read_again() {
            if $there {
                super::credentials_are_read_again::<$shared>().await;
            }
        }
    };
}

mod http;
mod kafka;
mod nats;
mod rabbitmq;
mod redis;

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use weft::{
    contract::{
        problem::{Problem, ProblemReason},
        relay::{Mode, Sink},
        status::RelayStatus,
    },
    domain::event::decode,
};

use crate::{
    checker::{self, Delivered},
    database::Database,
    relay_harness::{RelayProcess, Setting, Writers},
    servers,
};

/// A real server, and what a consumer gets from it.
pub trait Broker: Sized {
    /// What messages call it.
    const SERVER: &'static str;

    async fn start() -> Self;
    /// Where to publish; `secret` is the Secret's folder.
    fn sink(&self, secret: Option<&Path>) -> Sink;
    /// Ends it at once, as a lost node does.
    async fn kill9(&mut self);
    /// Starts it on what it had stored.
    async fn start_again(&mut self);
    /// Everything that it has, in its order.
    async fn received(&self) -> Vec<Received>;
    /// Keys of the Secret that it accepts, and of one that it does not; it accepts no others from now on. `None`: the server
    /// that the tests start has no logins.
    async fn demand_credentials(&mut self) -> Option<[Vec<(&'static str, String)>; 2]>;
    /// Bytes of a payload that it refuses.
    fn too_large(&self) -> usize;
}

/// A message as a consumer gets it: names of headers in lower case, as CloudEvents over HTTP and NATS has them.
#[derive(Clone, Debug)]
pub struct Received {
    pub destination: String,
    pub headers: BTreeMap<String, String>,
    pub body: Vec<u8>,
}

impl Received {
    fn header(&self, name: &str) -> String {
        self.headers.get(name).unwrap_or_else(|| panic!("{name} is missing: {:?}", self.headers)).clone()
    }

    fn delivered(&self) -> Delivered {
        let payload: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        Delivered {
            id: self.header("ce-id"),
            aggregate: decode(&self.header("ce-subject")).into_owned(),
            number: payload["n"].as_u64().unwrap(),
            sequence: self.header("ce-sequence"),
        }
    }
}

async fn setting<B: Broker>(broker: &B, secret: Option<&Path>) -> Setting {
    let mut setting = Setting::with(Mode::LogTailing, Database::empty().await);
    setting.contract.sink = broker.sink(secret);
    setting.write_contract();
    setting
}

const INSERT: &str = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload, headers) values";

/// The server is killed and started again, and so is the relay, while services write.
pub async fn nothing_is_lost_or_reordered<B: Broker>() {
    let mut broker = B::start().await;
    let setting = setting(&broker, None).await;
    let mut relay = setting.start_relay();
    let writers = Writers::start(&setting.url(), 20_261_127, 4, 400);
    relay.until("publishing", |status| status.published > 100).await;
    broker.kill9().await;
    relay.until("the loss is reported", |status| unreachable(status, B::SERVER)).await;
    broker.start_again().await;
    relay.until("publishing again", |status| status.published > 0 && status.problems.is_empty()).await;
    relay.kill9();
    let relay = setting.start_relay();
    writers.finished().await;
    setting.drained().await;
    relay.until("nothing is wrong", |status| status.problems.is_empty() && status.pending == 0).await;
    let delivered: Vec<_> = broker.received().await.iter().map(Received::delivered).collect();
    let verdict = checker::check(&setting.committed().await, &delivered);
    assert!(verdict.is_kept() && verdict.events > 1000, "{verdict}");
}

fn unreachable(status: &RelayStatus, server: &str) -> bool {
    let lost =
        |problem: &Problem| problem.reason == ProblemReason::BrokerUnreachable && problem.message.contains(server);
    !status.ready && status.problems.iter().any(lost)
}

/// What the server refuses is held, with those behind it in its aggregate; all others pass it.
pub async fn a_refused_event_holds_up_nobody_else<B: Broker>() {
    let broker = B::start().await;
    let setting = setting(&broker, None).await;
    let relay = setting.start_relay();
    let app = setting.database.app().await;
    let size = broker.too_large();
    let large = format!(
        "{INSERT} ('order', 'large', 'Placed', jsonb_build_object('n', 1, 'text', repeat('x', {size})), '{{}}')"
    );
    app.batch_execute(&large).await.unwrap();
    app.batch_execute(&format!("{INSERT} ('order', 'large', 'Placed', '{{\"n\": 2}}', '{{}}')")).await.unwrap();
    for number in 1..=20 {
        app.batch_execute(&format!("{INSERT} ('order', 'small', 'Placed', '{{\"n\": {number}}}', '{{}}')"))
            .await
            .unwrap();
    }
    let held = relay.until("the others are published", |status| status.published == 20 && status.held == 2).await;
    let refused = |problem: &&Problem| problem.reason == ProblemReason::EventRefused;
    let message = held.problems.iter().find(refused).map(|problem| problem.message.clone()).unwrap_or_default();
    assert!(message.contains("1 event waits behind it") && !message.contains("xxxx"), "{message}");
    assert!(held.ready, "{held:?}");
    setting
        .database
        .superuser()
        .await
        .batch_execute("delete from weft.outbox where length(payload::text) > 1000")
        .await
        .unwrap();
    relay.until("what waited goes on", |status| status.published == 21 && status.held == 0).await;
    let numbers: Vec<_> = broker.received().await.iter().map(Received::delivered).map(|event| event.number).collect();
    assert_eq!(numbers.len(), 21, "{numbers:?}");
}

/// Inserts events of the aggregate `hot` with these numbers, in one transaction.
async fn insert_hot(setting: &Setting, numbers: std::ops::RangeInclusive<i64>) {
    let insert = "insert into weft.outbox (aggregate_type, aggregate_id, type, payload) \
         select 'order', 'hot', 'Placed', jsonb_build_object('n', n) from generate_series($1::bigint, $2) n order by n";
    setting.database.app().await.execute(insert, &[numbers.start(), numbers.end()]).await.unwrap();
}

/// Many events of one aggregate wait: however they are sent, they arrive in order, up to the one that is refused.
pub async fn one_aggregate_stays_in_order_when_one_of_its_events_is_refused<B: Broker>() {
    let broker = B::start().await;
    let setting = setting(&broker, None).await;
    insert_hot(&setting, 1..=300).await;
    let size = broker.too_large();
    let large = format!("{INSERT} ('order', 'hot', 'Placed', jsonb_build_object('text', repeat('x', {size})), '{{}}')");
    setting.database.app().await.batch_execute(&large).await.unwrap();
    insert_hot(&setting, 301..=600).await;
    let relay = setting.start_relay();
    relay.until("one is refused", |status| status.published == 300 && status.held == 301).await;
    let delete = "delete from weft.outbox where length(payload::text) > 1000";
    setting.database.superuser().await.batch_execute(delete).await.unwrap();
    relay.until("the others go on", |status| status.published == 600 && status.held == 0).await;
    let numbers: Vec<_> = broker.received().await.iter().map(Received::delivered).map(|event| event.number).collect();
    assert_eq!(numbers, (1..=600).collect::<Vec<_>>());
}

/// Attributes, headers and payload arrive as they were written, whatever characters they have.
pub async fn a_message_is_what_was_written<B: Broker>() {
    let broker = B::start().await;
    let setting = setting(&broker, None).await;
    let _relay = setting.start_relay();
    let values = "('order', 'ä \"1\"', 'Placed', '{\"n\": 1, \"text\": \"Zürich\"}', '{\"traceparent\": \"00-ab-cd-01\", \"X-Tenant\": \"a b\"}')";
    setting.database.app().await.batch_execute(&format!("{INSERT} {values}")).await.unwrap();
    setting.drained().await;
    let received = broker.received().await;
    let [message] = &received[..] else { panic!("one message: {received:?}") };
    for (name, value) in [
        ("ce-specversion", "1.0"),
        ("ce-source", "/shop/orders"),
        ("ce-type", "Placed"),
        ("ce-subject", "ä \"1\""),
        ("ce-partitionkey", "order/ä \"1\""),
        ("ce-datacontenttype", "application/json"),
        ("ce-traceparent", "00-ab-cd-01"),
        ("ce-xtenant", "a b"),
        ("content-type", "application/json"),
    ] {
        assert_eq!(decode(&message.header(name)), value, "{name}");
    }
    assert!(message.destination.contains("shop") && message.destination.contains("orders"), "{}", message.destination);
    let body: serde_json::Value = serde_json::from_slice(&message.body).unwrap();
    assert_eq!(body, serde_json::json!({"n": 1, "text": "Zürich"}));
}

/// Wrong credentials are one sentence without the credentials; right ones are read again without a restart.
pub async fn credentials_are_read_again<B: Broker>() {
    let mut broker = B::start().await;
    let Some([right, wrong]) = broker.demand_credentials().await else { return };
    let folder = tempfile::tempdir().unwrap();
    let write = |keys: &[(&str, String)]| {
        for (key, text) in keys {
            fs::write(folder.path().join(key), text).unwrap();
        }
    };
    write(&wrong);
    let setting = setting(&broker, Some(folder.path())).await;
    let relay: RelayProcess = setting.start_relay();
    setting
        .database
        .app()
        .await
        .batch_execute(&format!("{INSERT} ('order', '1', 'Placed', '{{\"n\": 1}}', '{{}}')"))
        .await
        .unwrap();
    let status = relay.until("the credentials are refused", |status| unreachable(status, B::SERVER)).await;
    let said = format!("{:?}\n{}", status.problems, relay.log());
    assert!(said.contains("Secret"), "{said}");
    assert!(wrong.iter().all(|(_, text)| text.len() < 6 || !said.contains(text.as_str())), "{said}");
    write(&right);
    relay
        .within(Duration::from_mins(1), "published", |status| status.published == 1 && status.problems.is_empty())
        .await;
    servers::until("received", async || broker.received().await.len() == 1).await;
}

/// An event is published to a server that is known by `certificates`, and none to one that is not.
pub async fn published_over_tls(setting: &mut Setting, certificates: &Path) {
    let folder = tempfile::tempdir().unwrap();
    for key in ["tls.crt", "tls.key"] {
        fs::copy(certificates.join(key), folder.path().join(key)).unwrap();
    }
    match &mut setting.contract.sink {
        Sink::Redis(sink) => sink.secret_folder = Some(folder.path().to_owned()),
        Sink::RabbitMq(sink) => sink.secret_folder = Some(folder.path().to_owned()),
        sink => panic!("without a test of TLS: {sink:?}"),
    }
    setting.write_contract();
    let relay = setting.start_relay();
    let values = "('order', '1', 'Placed', '{\"n\": 1}', '{}')";
    setting.database.app().await.batch_execute(&format!("{INSERT} {values}")).await.unwrap();
    let unknown = |problem: &Problem| problem.message.contains("TLS failed: invalid peer certificate: UnknownIssuer");
    relay.until("the server is not trusted", |status| status.problems.iter().any(unknown)).await;
    fs::copy(certificates.join("ca.crt"), folder.path().join("ca.crt")).unwrap();
    relay.until("published", |status| status.published == 1 && status.problems.is_empty()).await;
}
