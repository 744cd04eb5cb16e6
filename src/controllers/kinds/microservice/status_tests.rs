use std::sync::Arc;

use super::{super::plan::plan, *};
use crate::{
    api::v1alpha1::SetUp,
    controllers::{
        fixtures::{self, job, message, microservice, now, ready, refused, settings, summaries},
        resources::{
            child::{ChildKind, ChildRef},
            observed::{JobOutcome, Migrations, Problem, Workload},
            outcome::Failure,
            reason::Reason,
        },
    },
};

const ORDERS: &str = r"
image: i
replicas: 2
database: {postgres: {}, migrations: {configMap: orders-migrations}}
dependsOn: [{service: customers}]
";

struct Case {
    object: Microservice,
    observed: Observed,
    applied: Applied,
}

impl Case {
    /// Everything is there and ready.
    fn settled() -> Self {
        let object = microservice("orders", ORDERS);
        let mut observed = Observed { deployment: Some(ready(2)), ..Observed::default() };
        observed.database.server = Some(ready(1));
        observed.database.migrations =
            Some(Migrations::Found { hash: "abc".to_owned(), files: vec!["001.sql".to_owned()] });
        observed.dependencies = [("customers".to_owned(), Arc::new(microservice("customers", "{image: i}")))].into();
        let mut case = Self { object, observed, applied: Applied::default() };
        case.set_up(JobOutcome::Succeeded);
        case
    }

    fn set_up(&mut self, outcome: JobOutcome) {
        self.observed.database.jobs.clear();
        let plan = plan(&self.object, &self.observed, &settings()).unwrap();
        let name = fixtures::names(&plan).into_iter().find_map(|name| name.strip_prefix("Job/").map(str::to_owned));
        self.observed.database.jobs.insert(name.unwrap(), job(outcome));
    }

    fn status(&self) -> MicroserviceStatus {
        let planned = plan(&self.object, &self.observed, &settings());
        status(&self.object, &self.observed, &planned, &self.applied, now())
    }
}

#[test]
fn a_service_that_is_as_wanted() {
    insta::assert_yaml_snapshot!(Case::settled().status());
}

#[test]
fn a_new_service_says_what_it_waits_for_in_turn() {
    let mut case = Case::settled();
    case.observed.deployment = None;
    case.observed.database.jobs.clear();
    case.observed.database.server = None;
    let progress = |case: &Case| summaries(&case.status().conditions[..3]);
    assert_eq!(progress(&case), ["Ready=False Creating", "Reconciling=True Creating", "Stalled=False NotStalled"]);
    case.observed.database.server = Some(Workload { wanted: 1, ..Workload::default() });
    assert_eq!(progress(&case)[0], "Ready=False Starting");
    case.observed.database.server = Some(ready(1));
    assert_eq!(progress(&case)[0], "Ready=False SetupPending");
    case.set_up(JobOutcome::Running);
    assert_eq!(progress(&case)[0], "Ready=False SetupRunning");
    case.set_up(JobOutcome::Succeeded);
    assert_eq!(progress(&case)[0], "Ready=False Creating");
    case.observed.deployment = Some(Workload { wanted: 2, ready: 1, updated: 2, replicas: 2, ..Workload::default() });
    let status = case.status();
    assert_eq!(message(&status.conditions, "Ready"), "the service: 1 of 2 pods of the newest version are ready");
    assert_eq!(status.summary.unwrap().replicas, "1/2");
}

#[test]
fn a_failed_migration_stalls_says_file_and_cause_and_that_the_old_version_serves() {
    let mut case = Case::settled();
    case.set_up(JobOutcome::Failed {
        message: "migration 002.sql failed: syntax error at or near \"tabel\".".to_owned(),
    });
    let conditions = case.status().conditions;
    assert_eq!(
        summaries(&conditions)[..3],
        ["Ready=False SetupFailed", "Reconciling=False Settled", "Stalled=True SetupFailed"]
    );
    assert!(summaries(&conditions).contains(&"Migrated=False SetupFailed".to_owned()));
    let ready = message(&conditions, "Ready");
    assert!(
        ready.starts_with("migration 002.sql failed: syntax error at or near \"tabel\"; change the migrations"),
        "{ready}"
    );
    assert!(ready.ends_with("the version that runs goes on serving"), "{ready}");
}

#[test]
fn a_missing_or_empty_config_map_of_migrations_is_named() {
    for (migrations, reason) in [
        (Migrations::Missing, Reason::MigrationsNotFound),
        (Migrations::Found { hash: "a".to_owned(), files: Vec::new() }, Reason::MigrationsEmpty),
    ] {
        let mut case = Case::settled();
        case.observed.database.migrations = Some(migrations);
        let conditions = case.status().conditions;
        assert_eq!(summaries(&conditions)[0], format!("Ready=False {reason}"));
        assert!(message(&conditions, "Migrated").contains("`orders-migrations`"));
    }
}

#[test]
fn a_file_that_the_config_map_does_not_have_yet_is_named() {
    let mut case = Case::settled();
    case.object.spec.database.as_mut().unwrap().migrations.as_mut().unwrap().last = Some("002.sql".to_owned());
    let conditions = case.status().conditions;
    assert_eq!(summaries(&conditions)[..2], ["Ready=False MigrationsBehind", "Reconciling=True MigrationsBehind"]);
    assert_eq!(
        message(&conditions, "Migrated"),
        "spec.database.migrations.last: ConfigMap `orders-migrations` has no `002.sql` (its last file is `001.sql`): add the file, or correct the name"
    );
}

#[test]
fn a_version_that_waits_a_moment_is_not_ready() {
    let mut case = Case::settled();
    case.observed.database.settles_in = Some(std::time::Duration::from_secs(2));
    assert_eq!(summaries(&case.status().conditions)[0], "Ready=False Settling");
}

#[test]
fn the_set_up_that_is_recorded_is_shown() {
    let mut case = Case::settled();
    let record = SetUp { hash: "01234567".to_owned(), files: Some(1), ..SetUp::default() };
    case.observed.database.recorded = Some(record.clone());
    assert_eq!(case.status().database.unwrap().set_up, Some(record));
}

#[test]
fn what_is_wrong_with_pods_is_said_and_goes_away_by_itself() {
    let mut case = Case::settled();
    let crashing =
        Problem::new(Reason::CrashLooping, "container service of pod orders-1 exits with code 1: no such table");
    case.observed.deployment = Some(Workload { ready: 1, problems: vec![crashing.clone()], ..ready(2) });
    let conditions = case.status().conditions;
    assert_eq!(summaries(&conditions)[..2], ["Ready=False CrashLooping", "Reconciling=True CrashLooping"]);
    assert_eq!(message(&conditions, "Ready"), crashing.message);
    case.observed.deployment = Some(ready(2));
    assert_eq!(summaries(&case.status().conditions)[0], "Ready=True Ready");
}

#[test]
fn a_database_that_cannot_start_says_why() {
    let mut case = Case::settled();
    let full = Problem::new(Reason::CrashLooping, "container postgres exits with code 1: No space left on device");
    case.observed.database.server = Some(Workload { ready: 0, problems: vec![full], ..ready(1) });
    let conditions = case.status().conditions;
    assert!(summaries(&conditions).contains(&"DatabaseReady=False CrashLooping".to_owned()));
    assert!(message(&conditions, "Ready").contains("No space left on device"));
}

#[test]
fn a_missing_dependency_is_said_and_stops_nothing() {
    let mut case = Case::settled();
    case.observed.dependencies.clear();
    let conditions = case.status().conditions;
    assert_eq!(summaries(&conditions)[0], "Ready=True Ready");
    assert_eq!(summaries(&conditions).last().unwrap(), "DependenciesFound=False MicroserviceNotFound");
    assert!(message(&conditions, "DependenciesFound").contains("`customers`"));
}

#[test]
fn a_rejected_object_is_not_accepted_and_stalls() {
    let mut case = Case::settled();
    case.object.spec.pod_template = Some(serde_json::json!({"spec": {"hostNetwork": "yes"}}));
    let conditions = case.status().conditions;
    assert_eq!(
        summaries(&conditions)[..4],
        [
            "Ready=False InvalidPodTemplate",
            "Reconciling=False Settled",
            "Stalled=True InvalidPodTemplate",
            "Accepted=False InvalidPodTemplate"
        ]
    );
}

#[test]
fn what_could_not_be_written_is_said_with_the_worst_first() {
    let mut case = Case::settled();
    let failure = |reason| Failure {
        child: ChildRef::new(ChildKind::Service, "orders"),
        reason,
        message: format!("Service orders: {reason}"),
    };
    case.applied.failures = vec![failure(Reason::ApiUnavailable)];
    assert_eq!(summaries(&case.status().conditions)[1], "Reconciling=True ApiUnavailable");
    case.applied.failures.push(failure(Reason::Forbidden));
    assert_eq!(summaries(&case.status().conditions)[2], "Stalled=True Forbidden");
}

#[test]
fn a_spec_that_becomes_a_child_that_is_refused_is_not_accepted_until_it_is_mended() {
    let mut case = Case::settled();
    case.applied = refused(ChildKind::Deployment, "orders");
    let conditions = case.status().conditions;
    assert_eq!(summaries(&conditions)[2..4], ["Stalled=True ChildRefused", "Accepted=False ChildRefused"]);
    assert_eq!(message(&conditions, "Accepted"), "cannot apply Deployment orders: no such quantity");
    assert_eq!(message(&conditions, "Ready"), message(&conditions, "Accepted"));
    case.applied = Applied::default();
    assert_eq!(summaries(&case.status().conditions)[2..4], ["Stalled=False NotStalled", "Accepted=True Accepted"]);
}

#[test]
fn what_is_no_fault_of_the_spec_leaves_it_accepted() {
    let mut case = Case::settled();
    case.applied = refused(ChildKind::Deployment, "orders");
    for reason in [Reason::ApiUnavailable, Reason::Forbidden] {
        case.applied.failures[0] = Failure { reason, ..case.applied.failures[0].clone() };
        assert_eq!(summaries(&case.status().conditions)[3], "Accepted=True Accepted");
    }
}

#[test]
fn a_suspended_object_says_so_and_is_as_ready_as_its_pods() {
    let mut case = Case::settled();
    case.object.spec.suspend = true;
    case.set_up(JobOutcome::Failed { message: "no".to_owned() });
    assert_eq!(summaries(&case.status().conditions)[0], "Ready=True Suspended");
    case.observed.deployment = None;
    assert_eq!(summaries(&case.status().conditions)[0], "Ready=False Suspended");
}

#[test]
fn what_keeps_events_from_a_consumer_is_a_condition() {
    let mut case = Case::settled();
    let consumes = serde_json::json!([{"from": "stock", "function": "stock.on_moved"}]);
    case.object.spec.consumes = serde_json::from_value(consumes).unwrap();
    case.observed.inbox_wanted.version = Some("2".to_owned());
    let consuming = |case: &Case| {
        summaries(&case.status().conditions).into_iter().find(|one| one.starts_with("Consuming")).unwrap()
    };
    assert_eq!(consuming(&case), "Consuming=Unknown InboxSilent");
    let stopped = Workload {
        problems: vec![Problem::new(Reason::ImagePullFailed, "it cannot be pulled")],
        updated: 0,
        ..ready(1)
    };
    case.observed.inbox_deployment = Some(stopped.clone());
    assert_eq!(consuming(&case), "Consuming=False ImagePullFailed");
    let reported = |contract: &str| {
        let status =
            InboxStatus { contract: contract.to_owned(), leading: true, ready: true, ..InboxStatus::default() };
        [("orders-inbox-1".to_owned(), Some(status))].into()
    };
    case.observed.inbox_pods = reported("2");
    assert_eq!(consuming(&case), "Consuming=False ImagePullFailed", "it is the former pod that reports");
    case.observed.inbox_deployment = Some(ready(1));
    assert_eq!(consuming(&case), "Consuming=True Consuming");
    case.observed.inbox_pods = reported("1");
    assert_eq!(consuming(&case), "Consuming=Unknown Loading");
    let missing = Rejection { reason: Reason::OutboxRelayNotFound, message: "nobody publishes".to_owned() };
    case.observed.inbox_wanted.missing = Some(missing);
    assert_eq!(consuming(&case), "Consuming=False OutboxRelayNotFound");
}

#[test]
fn more_pods_than_are_wanted_are_not_counted() {
    let mut case = Case::settled();
    case.observed.deployment = Some(ready(3));
    assert_eq!(case.status().summary.unwrap().replicas, "2/2");
}

#[test]
fn nothing_changes_in_a_status_when_nothing_changed() {
    let mut case = Case::settled();
    let first = case.status();
    case.object.status = Some(first.clone());
    let planned = plan(&case.object, &case.observed, &settings());
    let later = jiff::Timestamp::from_second(now().as_second() + 60).unwrap();
    assert_eq!(status(&case.object, &case.observed, &planned, &case.applied, later), first);
}

#[test]
fn that_a_database_is_shared_is_a_condition_of_both() {
    let guest = microservice(
        "reports",
        "{image: i, database: {sharedWith: {service: orders, schema: reports, reads: [customers]}}}",
    );
    let mut case = Case::settled();
    case.observed.guests = vec![Arc::new(guest.clone())];
    assert_eq!(
        message(&case.status().conditions, "SharedDatabase"),
        "in this database are also `reports`, by their spec.database.sharedWith"
    );
    case.object = guest;
    case.observed = Observed::default();
    let conditions = case.status().conditions;
    assert_eq!(
        message(&conditions, "SharedDatabase"),
        "the data is in the schema reports of the database of `orders`, and reads customers"
    );
    assert!(summaries(&conditions).contains(&"DatabaseReady=False MicroserviceNotFound".to_owned()));
    assert!(message(&conditions, "Ready").contains("there is no Microservice `orders`"), "{conditions:?}");
    let written = SetUp { written_by_others: vec!["public.customers".to_owned()], ..SetUp::default() };
    case.observed.database.recorded = Some(written);
    let conditions = case.status().conditions;
    assert!(
        message(&conditions, "SharedDatabase")
            .ends_with("; both this service and another one may write public.customers")
    );
    assert_eq!(case.status().summary.unwrap().database.unwrap(), "in orders");
}

#[test]
fn an_external_server_is_ready_when_a_set_up_has_reached_it() {
    let mut case = Case::settled();
    case.object = microservice("orders", "{image: i, database: {external: {secret: production}}}");
    case.observed = Observed { deployment: Some(ready(1)), ..Observed::default() };
    case.set_up(JobOutcome::Running);
    let database = |case: &Case| {
        summaries(&case.status().conditions).into_iter().find(|one| one.starts_with("DatabaseReady")).unwrap()
    };
    assert_eq!(database(&case), "DatabaseReady=False Starting");
    let problem = Problem::new(
        Reason::SetupFailed,
        "the server is a read-only replica: name its primary in `host` of the Secret",
    );
    case.observed.database.jobs.values_mut().next().unwrap().problems = vec![problem.clone()];
    let conditions = case.status().conditions;
    assert_eq!(message(&conditions, "DatabaseReady"), problem.message);
    assert_eq!(message(&conditions, "Migrated"), problem.message);
    case.set_up(JobOutcome::Succeeded);
    case.observed.database.recorded = Some(SetUp::default());
    assert_eq!(database(&case), "DatabaseReady=True Ready");
    let mut removal = job(JobOutcome::Running);
    removal.problems = vec![problem];
    case.observed.database.jobs.insert("orders-db-setup-slot".to_owned(), removal);
    assert_eq!(database(&case), "DatabaseReady=True Ready", "another Job than that of the set-up");
    let status = case.status();
    assert_eq!(status.binding.unwrap().name, "production");
    assert_eq!(status.summary.unwrap().database.unwrap(), "external");
}
