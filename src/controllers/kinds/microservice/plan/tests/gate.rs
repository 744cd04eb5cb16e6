//! What waits for a set-up, and what counts as one that is done.

use std::time::Duration;

use super::*;
use crate::{
    api::v1alpha1::SetUp,
    contract::database_setup::Outcome,
    controllers::resources::observed::{JobState, Released},
};

/// What the operator reads of the ConfigMap of `plan`: the released template, and the recorded set-up.
fn kept(plan: &Plan) -> (Option<Box<Released>>, Option<SetUp>) {
    if !fixtures::names(plan).contains(&"ConfigMap/orders-db-setup".to_owned()) {
        return (None, None);
    }
    let config_map = find(plan, "ConfigMap/orders-db-setup");
    let released = config_map["data"]["released.json"].as_str();
    let record = config_map["metadata"]["annotations"]["weft.dev/set-up"].as_str();
    (released.map(|text| serde_json::from_str(text).unwrap()), record.map(|text| serde_json::from_str(text).unwrap()))
}

/// `orders` after its set-up, as it is found again when its Job was deleted.
fn released(object: &Microservice) -> Observed {
    let mut observed = settled(object);
    let plan = plan(object, &observed, &settings()).unwrap();
    (observed.database.released, observed.database.recorded) = kept(&plan);
    observed.deployment = Some(live(&plan));
    observed.database.jobs.clear();
    observed
}

/// The only Job of the plan, or none.
fn job_of(plan: &Plan) -> Option<String> {
    fixtures::names(plan).into_iter().find_map(|name| name.strip_prefix("Job/").map(str::to_owned))
}

/// The contract of the plan's Job, which its pods read from their own annotation.
fn contract_of(plan: &Plan) -> Option<String> {
    let job = find(plan, &format!("Job/{}", job_of(plan)?));
    let template = &job["spec"]["template"];
    let file = &template["spec"]["volumes"][0]["downwardAPI"]["items"][0];
    assert_eq!(file["path"], "setup.yaml");
    assert_eq!(file["fieldRef"]["fieldPath"], "metadata.annotations['weft.dev/contract']");
    template["metadata"]["annotations"]["weft.dev/contract"].as_str().map(str::to_owned)
}

fn migrations(files: &[&str], hash: &str) -> Migrations {
    let files = files.iter().map(|file| (*file).to_owned()).collect();
    Migrations::Found { hash: hash.to_owned(), files }
}

fn second_version() -> Microservice {
    let mut object = orders();
    "localhost/orders:2".clone_into(&mut object.spec.image);
    object.spec.replicas = 3;
    object
}

fn image_and_replicas(plan: &Plan) -> (Value, Value) {
    let spec = &find(plan, "Deployment/orders")["spec"];
    (spec["template"]["spec"]["containers"][0]["image"].clone(), spec["replicas"].clone())
}

#[test]
fn while_a_set_up_fails_only_the_pod_template_waits() {
    let mut observed = released(&orders());
    let first = find(&plan(&orders(), &observed, &settings()).unwrap(), "Deployment/orders");
    observed.database.migrations = Some(migrations(&["001.sql", "002.sql"], "def"));
    let job = job_of(&plan(&second_version(), &observed, &settings()).unwrap()).unwrap();
    let failed = JobOutcome::Failed { message: "002.sql: no".to_owned() };
    observed.database.jobs.insert(job, fixtures::job(failed));
    for deployment in [observed.deployment.clone(), None] {
        observed.deployment = deployment;
        let plan = plan(&second_version(), &observed, &settings()).unwrap();
        let second = find(&plan, "Deployment/orders");
        assert_eq!(second["spec"]["template"], first["spec"]["template"]);
        assert_eq!(second["metadata"]["annotations"], first["metadata"]["annotations"]);
        assert_eq!(second["spec"]["replicas"], 3);
        assert!(fixtures::names(&plan).contains(&"PodDisruptionBudget/orders".to_owned()));
        assert_eq!(kept(&plan), (observed.database.released.clone(), observed.database.recorded.clone()));
    }
}

#[test]
fn a_config_map_of_migrations_that_is_gone_stops_no_repair() {
    let mut observed = released(&orders());
    observed.deployment = None;
    observed.database.migrations = Some(Migrations::Missing);
    let plan = plan(&second_version(), &observed, &settings()).unwrap();
    assert_eq!(image_and_replicas(&plan), (json!("localhost/orders:1"), json!(3)));
}

#[test]
fn a_set_up_that_is_recorded_needs_no_job() {
    let observed = released(&orders());
    let plan = plan(&second_version(), &observed, &settings()).unwrap();
    assert_eq!(job_of(&plan), None);
    assert_eq!(image_and_replicas(&plan).0, "localhost/orders:2");
}

#[test]
fn a_job_that_has_ended_stays_for_its_log() {
    let observed = settled(&orders());
    let plan = plan(&orders(), &observed, &settings()).unwrap();
    let job = observed.database.jobs.keys().next().unwrap();
    assert_eq!((job_of(&plan), plan.retained), (None, vec![ChildRef::new(ChildKind::Job, job)]));
}

#[test]
fn a_server_that_is_made_anew_is_set_up_anew() {
    let mut observed = released(&orders());
    observed.database.server = Some(Workload { uid: "another".to_owned(), ..ready(1) });
    assert!(job_of(&plan(&orders(), &observed, &settings()).unwrap()).is_some());
    observed.database.server = None;
    assert_eq!(job_of(&plan(&orders(), &observed, &settings()).unwrap()), None, "it is not known for which");
}

/// A Job of `orders` whose own container has ended well.
fn reporting(outcome: JobOutcome, hash: &str) -> Observed {
    let mut observed = settled(&orders());
    let report = Outcome {
        files: 1,
        applied: 1,
        last: Some("001.sql".to_owned()),
        hash: hash.to_owned(),
        written_by_others: Vec::new(),
    };
    for job in observed.database.jobs.values_mut() {
        *job = JobState { report: Some(report.clone()), ..fixtures::job(outcome.clone()) };
    }
    observed
}

#[test]
fn a_set_up_is_done_whatever_else_runs_in_its_pod() {
    let ended = JobOutcome::Failed { message: "an injected container failed".to_owned() };
    for outcome in [JobOutcome::Running, ended] {
        let plan = plan(&orders(), &reporting(outcome, "abc"), &settings()).unwrap();
        let (_, recorded) = kept(&plan);
        let recorded = recorded.unwrap();
        assert_eq!((recorded.files, recorded.last.as_deref()), (Some(1), Some("001.sql")));
        assert_eq!(recorded.content_hash.as_deref(), Some("abc"));
        assert!(fixtures::names(&plan).contains(&"Deployment/orders".to_owned()));
        assert_eq!((job_of(&plan), plan.retained), (None, vec![]), "so that nothing runs for ever");
    }
}

#[test]
fn a_set_up_that_read_older_migrations_does_not_count() {
    let observed = reporting(JobOutcome::Succeeded, "the ones before");
    let first = plan(&orders(), &observed, &settings()).unwrap();
    assert_eq!((job_of(&first), kept(&first)), (None, (None, None)));
    assert_eq!(first.retained, [ChildRef::new(ChildKind::Deployment, "orders")], "the Job is pruned");
    let mut gone = observed;
    gone.database.jobs.clear();
    assert!(job_of(&plan(&orders(), &gone, &settings()).unwrap()).is_some());
}

#[test]
fn a_version_waits_for_the_file_that_it_names() {
    let mut object = second_version();
    object.spec.database.as_mut().unwrap().migrations.as_mut().unwrap().last = Some("002.sql".to_owned());
    let mut observed = released(&orders());
    let waiting = plan(&object, &observed, &settings()).unwrap();
    assert_eq!((job_of(&waiting), image_and_replicas(&waiting).0), (None, json!("localhost/orders:1")));
    observed.database.migrations = Some(migrations(&["001.sql", "002.sql", "003.sql"], "def"));
    let running = plan(&object, &observed, &settings()).unwrap();
    let contract = contract_of(&running).unwrap();
    assert!(contract.contains("lastMigration: 002.sql"), "{contract}");
    observed.database.jobs.insert(job_of(&running).unwrap(), fixtures::job(JobOutcome::Succeeded));
    let done = plan(&object, &observed, &settings()).unwrap();
    assert_eq!(image_and_replicas(&done).0, "localhost/orders:2");
}

#[test]
fn a_new_template_waits_for_migrations_that_may_follow_and_nothing_else_does() {
    let mut observed = released(&orders());
    observed.database.settles_in = Some(Duration::from_secs(2));
    let waiting = plan(&second_version(), &observed, &settings()).unwrap();
    assert_eq!(image_and_replicas(&waiting), (json!("localhost/orders:1"), json!(3)));
    assert_eq!(waiting.recheck_in, Some(Duration::from_secs(2)));
    let mut scaled = orders();
    scaled.spec.replicas = 3;
    let scaled = plan(&scaled, &observed, &settings()).unwrap();
    assert_eq!((image_and_replicas(&scaled).1, scaled.recheck_in), (json!(3), None));
    observed.database.settles_in = None;
    let rolled = plan(&second_version(), &observed, &settings()).unwrap();
    assert_eq!((image_and_replicas(&rolled).0, rolled.recheck_in), (json!("localhost/orders:2"), None));
}

#[test]
fn a_database_that_has_nothing_to_record_yet_needs_no_config_map() {
    let plan = plan(&orders(), &before_setup(), &settings()).unwrap();
    assert!(contract_of(&plan).is_some());
    assert!(!fixtures::names(&plan).contains(&"ConfigMap/orders-db-setup".to_owned()));
}

#[test]
fn a_meshs_proxy_lets_the_job_end() {
    let plan = plan(&orders(), &before_setup(), &settings()).unwrap();
    let job = find(&plan, &format!("Job/{}", job_of(&plan).unwrap()));
    let annotations = &job["spec"]["template"]["metadata"]["annotations"];
    assert_eq!(annotations["sidecar.istio.io/nativeSidecar"], "true");
    assert_eq!(annotations["config.beta.linkerd.io/proxy-enable-native-sidecar"], "true");
}

#[test]
fn an_outbox_of_another_layout_is_set_up_and_stays_when_its_relay_goes() {
    let mut observed = released(&orders());
    let mut with = |relay: Option<&str>| {
        let relay = relay.map(|outbox| {
            let sink = "sink: {nats: {servers: ['nats://n']}}";
            let spec = format!("{{microservice: orders, mode: Polling, {sink}, outbox: {outbox}}}");
            fixtures::relay("orders", &spec)
        });
        observed.relays = relay.into_iter().collect();
        let planned = plan(&orders(), &observed, &settings()).unwrap();
        let contract = contract_of(&planned);
        if let Some(job) = job_of(&planned) {
            observed.database.jobs.insert(job, fixtures::job(JobOutcome::Succeeded));
            let done = plan(&orders(), &observed, &settings()).unwrap();
            (observed.database.released, observed.database.recorded) = kept(&done);
            observed.database.jobs.clear();
        }
        contract.map(|contract| contract.split_once("\noutbox:\n").map_or(String::new(), |(_, it)| it.to_owned()))
    };
    let weft = "  layout: Weft\n";
    let debezium = "  layout: Debezium\n  table:\n    schema: public\n    name: outbox\n    existing: Skip\n";
    assert_eq!(with(Some("{layout: Weft}")), None, "every database has Weft's own");
    assert_eq!(with(Some("{layout: Debezium}")).as_deref(), Some(debezium));
    assert_eq!(with(Some("{layout: Debezium}")), None);
    assert_eq!(with(None), None);
    assert_eq!(with(Some("{layout: Debezium}")), None);
    assert!(with(Some("{layout: Debezium, table: public.Out Box}")).is_some());
    assert_eq!(with(None), None);
    assert_eq!(with(Some("{layout: Weft}")).as_deref(), Some(weft));
    assert_eq!(with(None), None);
}
