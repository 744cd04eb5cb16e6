//! One example of every problem that the data plane can report.
//!
//! The two functions at the end do not compile when a variant is added, and the test fails until it has an example here.

#![allow(dead_code, reason = "each test uses what it needs")]

use std::path::PathBuf;

use jiff::Timestamp;
use weft::{
    contract::{Contract, inbox::Inbox, relay::Relay},
    inbox::problem::InboxProblem,
    outage::{Failure, Outage, address},
    postgres,
    relay::problem::RelayProblem,
    saga::problem::SagaProblem,
};

fn outage(server: &'static str, host: &str, port: u16, failure: Failure) -> Outage {
    let since: Timestamp = "2026-01-02T12:04:05Z".parse().unwrap();
    Outage { server, address: address(host, port), since, failure }
}

fn refused() -> Failure {
    Failure::of_io(&std::io::Error::from(std::io::ErrorKind::ConnectionRefused))
}

pub fn relay() -> Vec<RelayProblem> {
    let nats = || address("nats.shop", 4222);
    let event = |others, waiting| RelayProblem::EventRefused {
        event: "0192f3a4-0000-7000-8000-000000000001".parse().unwrap(),
        others,
        waiting,
        cause: "it has 2000123 bytes and NATS accepts 1048576: raise the server's max_payload".to_owned(),
    };
    let dead = |events| RelayProblem::DeadLetters {
        events,
        latest: "0192f3a4-0000-7000-8000-000000000001".to_owned(),
        cause: "HTTP 422 Unprocessable Entity".to_owned(),
    };
    let invalid = Relay::from_yaml("apiVersion: contract.weft.dev/v1\nkind: Saga\n", "/etc/weft/relay.yaml".as_ref());
    vec![
        RelayProblem::contract(&invalid.unwrap_err()),
        RelayProblem::DatabaseUnreachable(outage(postgres::SERVER, "orders-db.shop.svc", 5432, refused())),
        RelayProblem::DatabaseUnreachable(outage(postgres::SERVER, "fd00::7", 5432, Failure::Silent)),
        RelayProblem::DatabaseNotReady {
            address: address("orders-db.shop.svc", 5432),
            cause: "logging in as relay: password authentication failed for user \"relay\" (SQLSTATE 28P01)".to_owned(),
        },
        RelayProblem::BrokerUnreachable(outage("NATS", "nats.shop", 4222, Failure::Silent)),
        RelayProblem::BrokerUnreachable(outage("NATS", "nats.shop", 4222, refused())),
        RelayProblem::BrokerUnreachable(outage("JetStream on NATS", "nats.shop", 4222, Failure::Silent)),
        RelayProblem::StreamMissing { address: nats(), stream: "events".to_owned() },
        RelayProblem::PublishFailing {
            server: "NATS",
            address: nats(),
            cause: "maximum bytes exceeded (JetStream error 10077)".to_owned(),
        },
        event(0, 0),
        event(0, 1),
        event(1, 2),
        dead(1),
        dead(3),
        RelayProblem::SlotAtRisk { bytes: 1_048_576 },
        RelayProblem::SlotLost,
        RelayProblem::PublicationInvalid { schema: "weft".to_owned(), tables: String::new() },
        RelayProblem::PublicationInvalid { schema: "weft".to_owned(), tables: "shop.orders, weft.outbox".to_owned() },
        RelayProblem::SlotPending {
            blocker: "it waits for process 4711 (role app); `select pg_terminate_backend(4711)` ends it".to_owned(),
        },
    ]
}

pub fn inbox() -> Vec<InboxProblem> {
    let subscription = || "orders".to_owned();
    let address = || address("nats.shop", 4222);
    let event = || "0192f3a4-0000-7000-8000-000000000001".to_owned();
    let refused_event = |held| InboxProblem::EventRefused {
        subscription: subscription(),
        event: event(),
        held,
        cause: "HTTP 500 Internal Server Error".to_owned(),
    };
    let dead = |events| InboxProblem::DeadLetters {
        subscription: subscription(),
        events,
        latest: event(),
        cause: "HTTP 422 Unprocessable Entity: no such customer".to_owned(),
    };
    let invalid = Inbox::from_yaml("apiVersion: contract.weft.dev/v1\nkind: Saga\n", "/etc/weft/inbox.yaml".as_ref());
    let broker = outage("NATS", "nats.shop", 4222, refused());
    vec![
        InboxProblem::ContractInvalid(format!("{}", invalid.unwrap_err())),
        InboxProblem::DatabaseUnreachable(outage(postgres::SERVER, "customers-db.shop.svc", 5432, Failure::Silent)),
        InboxProblem::DatabaseNotReady {
            address: weft::outage::address("customers-db.shop.svc", 5432),
            cause: "reading weft.inbox_position: relation \"weft.inbox_position\" does not exist (SQLSTATE 42P01)"
                .to_owned(),
        },
        InboxProblem::BrokerUnreachable { subscription: subscription(), outage: broker },
        InboxProblem::StreamMissing { subscription: subscription(), stream: "events".to_owned(), address: address() },
        InboxProblem::SourceUnusable {
            subscription: subscription(),
            cause: "the template \"\" is not usable: it is empty".to_owned(),
        },
        InboxProblem::DeliveryFailing {
            subscription: subscription(),
            cause: "customers.shop.svc:8080 cannot be reached: connection refused".to_owned(),
        },
        InboxProblem::EventsExpired { subscription: subscription(), events: 40 },
        refused_event(1),
        refused_event(3),
        dead(1),
        dead(2),
    ]
}

pub const INBOX_VARIANTS: usize = 10;

pub fn inbox_variant(problem: &InboxProblem) -> usize {
    match problem {
        InboxProblem::ContractInvalid(_) => 0,
        InboxProblem::DatabaseUnreachable(_) => 1,
        InboxProblem::DatabaseNotReady { .. } => 2,
        InboxProblem::BrokerUnreachable { .. } => 3,
        InboxProblem::StreamMissing { .. } => 4,
        InboxProblem::SourceUnusable { .. } => 5,
        InboxProblem::DeliveryFailing { .. } => 6,
        InboxProblem::EventsExpired { .. } => 7,
        InboxProblem::EventRefused { .. } => 8,
        InboxProblem::DeadLetters { .. } => 9,
    }
}

pub fn saga() -> Vec<SagaProblem> {
    let database = || address("default-orchestrator-db.shop.svc", 5432);
    let refused_by_database =
        |cause: &str, problem: fn(String, String) -> SagaProblem| problem(database(), cause.to_owned());
    let gap = "rows are missing in the log of instance 0192f3a4-0000-7000-8000-000000000001";
    vec![
        SagaProblem::ContractUnreadable {
            path: PathBuf::from("/etc/weft/saga.yaml"),
            cause: "Permission denied (os error 13)".to_owned(),
        },
        SagaProblem::ContractInvalid(
            "the contract file /etc/weft/saga.yaml is of kind Relay, expected Orchestrator".to_owned(),
        ),
        refused_by_database("permission denied for table saga_definition (SQLSTATE 42501)", |address, cause| {
            SagaProblem::DefinitionsNotStored { address, cause }
        }),
        SagaProblem::DefinitionInvalid { saga: "create-order".to_owned() },
        SagaProblem::DatabaseUnreachable(outage(postgres::SERVER, "default-orchestrator-db.shop.svc", 5432, refused())),
        refused_by_database(
            "could not extend file: No space left on device (SQLSTATE 53100)",
            SagaProblem::database_fails,
        ),
        refused_by_database("permission denied for table saga_instance (SQLSTATE 42501)", |address, cause| {
            SagaProblem::RecoveryFailed { partition: 3, address, cause }
        }),
        SagaProblem::InstanceUnreadable { errors: vec![gap.to_owned()], more: 0 },
        SagaProblem::InstanceUnreadable { errors: vec![gap.to_owned()], more: 2 },
        SagaProblem::Standby,
        SagaProblem::BrokerUnreachable(outage("NATS", "nats.shop", 4222, Failure::Silent)),
        SagaProblem::StreamMissing {
            saga: "create-order".to_owned(),
            address: address("nats.shop", 4222),
            stream: "events".to_owned(),
        },
        SagaProblem::NothingToWatch {
            saga: "create-order".to_owned(),
            service: "customers".to_owned(),
            address: address("nats.shop", 4222),
            stream: "events".to_owned(),
        },
    ]
}

/// The variant's number.
pub fn relay_variant(problem: &RelayProblem) -> usize {
    match problem {
        RelayProblem::ContractInvalid(_) => 0,
        RelayProblem::DatabaseUnreachable(_) => 1,
        RelayProblem::DatabaseNotReady { .. } => 2,
        RelayProblem::BrokerUnreachable(_) => 3,
        RelayProblem::StreamMissing { .. } => 4,
        RelayProblem::PublishFailing { .. } => 5,
        RelayProblem::EventRefused { .. } => 6,
        RelayProblem::SlotAtRisk { .. } => 7,
        RelayProblem::SlotLost => 8,
        RelayProblem::SlotPending { .. } => 9,
        RelayProblem::PublicationInvalid { .. } => 10,
        RelayProblem::DeadLetters { .. } => 11,
    }
}

/// The number of variants of [`RelayProblem`].
pub const RELAY_VARIANTS: usize = 12;

/// The variant's number.
pub fn saga_variant(problem: &SagaProblem) -> usize {
    match problem {
        SagaProblem::ContractUnreadable { .. } => 0,
        SagaProblem::ContractInvalid(_) => 1,
        SagaProblem::DefinitionsNotStored { .. } => 2,
        SagaProblem::DefinitionInvalid { .. } => 3,
        SagaProblem::DatabaseUnreachable(_) => 4,
        SagaProblem::DatabaseFails { .. } => 5,
        SagaProblem::RecoveryFailed { .. } => 6,
        SagaProblem::InstanceUnreadable { .. } => 7,
        SagaProblem::Standby => 8,
        SagaProblem::BrokerUnreachable(_) => 9,
        SagaProblem::StreamMissing { .. } => 10,
        SagaProblem::NothingToWatch { .. } => 11,
    }
}

/// The number of variants of [`SagaProblem`].
pub const SAGA_VARIANTS: usize = 12;
